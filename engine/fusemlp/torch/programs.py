"""The bound programs of a fused step, one for each batch size and kind of target, and the arrays they read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusemlp.describe.losses import CrossEntropy, Loss
from fusemlp.program.layout import Layout, short_names
from fusemlp.program.lowering import Inputs, lower_training
from fusemlp.program.program import Program
from fusemlp.runtime.bound import BoundProgram
from fusemlp.runtime.memory import Memory, Workspace
from fusemlp.torch.arena import as_tensor
from fusemlp.torch.batches import bad_label, check_shapes, check_tensors
from fusemlp.torch.modules import Reading
from fusemlp.torch.updates import UpdateSet, bind_updates
from fusemlp_kernels.contract import TensorRule
from fusemlp_kernels.errors import ArgumentError

# This many batch sizes get programs of exactly their size; other batches are padded to a power of two.
EXACT_SIZES = 8


class Runnable:
    """A bound program, with the updates of the rules at ``version``."""

    def __init__(self, bound: BoundProgram) -> None:
        self.bound = bound
        self.calls = bound.calls
        self.version = -1

    def use(self, sets: list[UpdateSet], layout: Layout, version: int) -> None:
        """Bind the updates again, for the rules of ``version``."""
        self.calls = (*self.bound.calls[:-1], *bind_updates(self.bound, sets, layout))
        self.version = version


class Batch:
    """Copies batches of one shape, with ``rows`` rows, into the arrays that the program reads."""

    def __init__(self, programs: Programs, rows: int, capacity: int, kind: str) -> None:
        self.rows = rows
        self.capacity = capacity
        self.kind = kind
        self._programs = programs
        self._x, self._y = programs.input(capacity, "x"), programs.input(capacity, kind)
        self._rows_of_x, self._rows_of_y = self._x[:rows], self._y[:rows]
        self._flat = programs.reading.flattens
        self._columns = programs.reading.network.sizes[0]
        self._squeezed = programs.reading.squeezes
        self._host = isinstance(self._x, np.ndarray)
        # As an unsigned number, a negative label is too large as well.
        self._unsigned = self._rows_of_y.view(np.uint64) if self._host and kind == "labels" else None
        self._classes = programs.reading.network.sizes[-1]
        self._plain = programs.runnable(capacity, kind, kind == "labels" and programs.always_ignores)
        self.nothing_scored = False

    def stage(self, x: Tensor, y: Tensor) -> Runnable:
        """Copy the batch and return its program; raises DataError for a label that is no class."""
        if self._flat and x.dim() != 2:
            x = x.reshape(self.rows, self._columns)
        if self._squeezed:
            y = y.unsqueeze(1)
        if self._host:
            np.copyto(self._rows_of_x, x.numpy())
            np.copyto(self._rows_of_y, y.numpy())
        else:
            self._rows_of_x.copy_(x)
            self._rows_of_y.copy_(y)
        if self.rows < self.capacity:
            self._x[self.rows :] = 0
            self._y[self.rows :] = 0
        if self._unsigned is None:
            return self._plain if self.kind != "labels" else self._checked(as_tensor(self._rows_of_y))
        if self._programs.always_ignores or np.maximum.reduce(self._unsigned) >= self._classes:
            return self._checked(as_tensor(self._rows_of_y))
        self.nothing_scored = False
        return self._plain

    def _checked(self, labels: Tensor) -> Runnable:
        """Return the program for labels that may be ignored. On a GPU the kernels check, without a synchronisation."""
        ignore_index = self._programs.ignore_index
        if labels.is_cpu:
            values = labels.numpy()
            ignored = values == ignore_index
            if (((values < 0) | (values >= self._classes)) & ~ignored).any():
                raise bad_label(values, self._classes, ignore_index)
            self.nothing_scored = bool(ignored.all())
        return self._programs.runnable(self.capacity, "labels", True)


class Programs:
    """Makes the programs of one network, loss and partition of its parameters, each on first use."""

    def __init__(
        self, memory: Memory, reading: Reading, loss: Loss, sets: list[UpdateSet], seed: int, item_bytes: int
    ) -> None:
        self.reading = reading
        self.loss = loss
        self._memory = memory
        self._sets = sets
        self._seed = seed
        self._item_bytes = item_bytes
        self._workspace = Workspace(memory.backend)
        self._runnables: dict[tuple[int, str, bool], Runnable] = {}
        self._inputs: dict[tuple[int, str], Any] = {}
        self._sizes: set[int] = set()
        spec = loss.spec(accuracy=False)
        never = replace(spec, ignore_index=None)
        self._specs = {
            ("labels", True): spec,
            ("labels", False): never,
            ("values", False): never,
            ("soft", False): replace(never, soft=loss.kind == "cross_entropy"),
        }
        self.ignore_index = -100 if spec.ignore_index is None else spec.ignore_index
        # Labels on a GPU are not read back, so any of them may be the ignored index.
        on_host = isinstance(memory.params, np.ndarray)
        self.always_ignores = not on_host or 0 <= self.ignore_index < reading.network.sizes[-1]
        self._class_weight: Any = None
        if isinstance(loss, CrossEntropy) and loss.class_weight is not None:
            real = np.float64 if item_bytes == 8 else np.float32
            self._class_weight = memory.backend.from_host(np.asarray(loss.class_weight, real))

    def batch(self, x: Any, y: Any, dtype: torch.dtype, device: torch.device) -> Batch:
        """Check a batch of a new shape, and return the object that copies it."""
        check_tensors(x, y, device)
        kind = check_shapes(x, y, self.reading, self.loss, dtype)
        if kind == "soft" and self.ignore_index >= 0:
            raise ArgumentError(
                f"loss_fn: ignore_index={self.ignore_index} is a class index, and y holds probabilities; leave it out"
            )
        rows = len(x)
        if rows in self._sizes or len(self._sizes) < EXACT_SIZES:
            self._sizes.add(rows)
            return Batch(self, rows, rows, kind)
        return Batch(self, rows, 1 << (rows - 1).bit_length(), kind)

    def build(self, rows: int) -> None:
        """Make the program for batches of ``rows`` rows."""
        self._sizes.add(rows)
        kind = "labels" if self.loss.kind == "cross_entropy" else "values"
        self.runnable(rows, kind, kind == "labels" and self.always_ignores)

    def runnable(self, capacity: int, kind: str, ignores: bool) -> Runnable:
        """Return the program for batches of ``capacity`` rows."""
        key = (capacity, kind, ignores)
        if key not in self._runnables:
            given = {"x": self.input(capacity, "x"), "target": self.input(capacity, kind)}
            if self._class_weight is not None:
                given["class_weight"] = self._class_weight
            program = self.lower(capacity, kind, ignores)
            self._runnables[key] = Runnable(BoundProgram(program, self._memory, self._workspace, given))
        return self._runnables[key]

    def input(self, capacity: int, kind: str) -> Any:
        """Return the array that programs of ``capacity`` rows read as x ("x"), or as targets of a kind."""
        key = (capacity, kind)
        if key not in self._inputs:
            sizes, backend = self.reading.network.sizes, self._memory.backend
            shape = (capacity,) if kind == "labels" else (capacity, sizes[0] if kind == "x" else sizes[-1])
            multiple = backend.traits.row_multiple
            pitch = capacity if kind == "labels" else -(-shape[-1] // multiple) * multiple
            size = pitch if kind == "labels" else capacity * pitch
            flat = backend.allocate(size, "int64" if kind == "labels" else "real")
            self._inputs[key] = backend.view(flat, 0, shape, pitch)
        return self._inputs[key]

    def lower(self, capacity: int, kind: str, ignores: bool) -> Program:
        """Return the step as data."""
        decays = {short: decay for one in self._sets for short, decay in one.decays.items()}
        options = {
            name: (short in decays, TensorRule(1.0, decays.get(short, 0.0)))
            for short, name in short_names(self.reading.network).items()
        }
        return lower_training(
            self.reading.network,
            self._specs[kind, ignores],
            max((one.rule for one in self._sets), key=lambda rule: rule.state_count),
            options.__getitem__,
            capacity,
            self._memory.backend.traits,
            self._memory.layout,
            Inputs(capacity, class_weighted=self._class_weight is not None),
            seed=self._seed,
            real_bytes=self._item_bytes,
            keep_gradients=len(self._sets) > 1,
        )


def program_key(reading: Reading, loss: Loss, sets: Sequence[UpdateSet]) -> tuple[Any, ...]:
    """Return a key; equal keys can share programs, with their updates bound again."""
    partition = frozenset(short for one in sets for short in one.decays)
    states = max(one.rule.state_count for one in sets)
    kinds = {one.rule.kind for one in sets}
    fusable = len(sets) == 1
    return reading.network, reading.flattens, reading.squeezes, loss, partition, states, fusable, *kinds
