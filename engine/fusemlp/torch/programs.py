"""The bound programs of a fused step, one for each batch size and kind of target, and the arrays they read.

The kinds are those of ``batches.check_shapes`` ("labels", "soft", "values"), and "ignored" for labels some of which may
be the ignored index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusemlp.describe.losses import Loss
from fusemlp.inputs.arrays import as_class_labels
from fusemlp.program.layout import short_names
from fusemlp.program.lowering import lower_training
from fusemlp.program.program import Program, resolve
from fusemlp.program.step import Inputs
from fusemlp.runtime.memory import Memory, Workspace
from fusemlp.runtime.programs import BoundProgram
from fusemlp.torch.epilogue import Running, UpdateSet, bind_clipping, bind_output, bind_updates, bind_weighted_loss
from fusemlp.torch.modules import Reading
from fusemlp_kernels.contract import Backend, TensorRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DTypeError, ShapeError


def check_tensors(x: Any, y: Any, device: torch.device) -> None:
    """Check that x and y are tensors on the module's device; raises ArgumentTypeError or ArgumentError."""
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, Tensor):
            raise ArgumentTypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}; use torch.as_tensor")
        if value.device != device:
            raise ArgumentError(f"{name}: is on {value.device}, the module on {device}; use {name}.to({str(device)!r})")
        if value.layout != torch.strided:
            raise ArgumentTypeError(f"{name}: expected a dense tensor, got {value.layout}; use {name}.to_dense()")
        if value.requires_grad:
            raise ArgumentError(
                f"{name}: requires grad, and a fused step gives none to its inputs; pass {name}.detach(), or use "
                "FusedMLP in an eager loop"
            )


def check_shapes(x: Tensor, y: Tensor, reading: Reading, loss: Loss) -> str:
    """Return the kind of the targets: "labels", "soft" or "values". Raises ShapeError or DTypeError.

    x (m, K), or after a leading Flatten any (m, ...) with K elements a row. y (m,) int64 or (m, N) for cross-entropy,
    else the output's shape.
    """
    width, outputs = reading.network.sizes[0], reading.network.sizes[-1]
    shape, dtype = tuple(x.shape), reading.dtype
    if x.dim() < 2 or (x.dim() > 2 and not reading.flattens) or x.shape[1:].numel() != width:
        wanted = f"(rows, ...) of {width} elements a row" if reading.flattens else f"(rows, {width})"
        raise ShapeError(f"x: expected shape {wanted}, got {shape}; the first Linear has in_features={width}")
    if shape[0] == 0:
        raise ShapeError(f"x: expected at least one row, got shape {shape}")
    if x.dtype != dtype:
        raise DTypeError(f"x: expected {dtype}, the module's type, got {x.dtype}; use x.to({dtype})")
    rows = shape[0]
    target = tuple(y.shape)
    soft = not reading.log_softmax and target == (rows, outputs) and y.dtype.is_floating_point
    if loss.kind == "cross_entropy" and not soft:
        if target != (rows,):
            other = "" if reading.log_softmax else f" or ({rows}, {outputs}) for probabilities"
            raise ShapeError(f"y: expected shape ({rows},) for class indices{other}, got {target}")
        if y.dtype != torch.int64:
            raise DTypeError(f"y: expected class indices in torch.int64, got {y.dtype}; use y.long()")
        return "labels"
    output = (rows,) if reading.squeezes else (rows, outputs)
    if target != output:
        raise ShapeError(
            f"y: expected shape {output}, the shape of the module's output, got {target}; torch would broadcast them"
        )
    if y.dtype != dtype:
        raise DTypeError(f"y: expected {dtype}, the module's type, got {y.dtype}; use y.to({dtype})")
    return "soft" if loss.kind == "cross_entropy" else "values"


# This many batch sizes get programs of exactly their size; other batches are padded to a power of two.
EXACT_SIZES = 8


class Runnable:
    """A bound program: ``before`` are its calls up to the updates of ``sets``, its last ones.

    With ``captures`` the first run loads the kernels, the second captures a graph, and this and the others replay it.
    """

    def __init__(self, bound: BoundProgram, before: tuple[Callable[[], object], ...], *, captures: bool) -> None:
        self.bound = bound
        self.sets: list[UpdateSet] = []
        self._before, self._captures = before, captures
        self.run: Callable[[], object]

    def use(self, sets: list[UpdateSet], memory: Memory) -> None:
        """Bind the updates again, for the rules of ``sets``."""
        calls = (*self._before, *bind_updates(self.bound, sets, memory.layout))

        def run_calls() -> None:
            for call in calls:
                call()

        self.run = _replayed(self.bound.backend, run_calls) if self._captures else run_calls
        self.sets = sets


def _replayed(backend: Backend, calls: Callable[[], object]) -> Callable[[], None]:
    """Return the run of these calls that loads their kernels at first, then captures a graph, and replays it.

    The ``Runnable`` is no part of it: in a ring the program and its memory would outlive their use.
    """
    warm, replay = False, None

    def run() -> None:
        nonlocal warm, replay
        if replay is not None:
            replay()
        elif warm:
            replay = backend.capture(calls, 1)
            replay()
        else:
            calls()
            warm = True

    return run


class BatchCopy:
    """Copies batches of one shape, with ``rows`` rows, into the arrays that the program reads.

    ``returns``: the program notes the output.
    """

    def __init__(self, programs: Programs, rows: int, capacity: int, kind: str, returns: bool) -> None:
        self.rows = rows
        self.nothing_scored = False
        self._programs, self._running = programs, programs.running
        self._capacity = capacity
        self._returns = returns
        self._x, self._y = programs.input(capacity, "x"), programs.input(capacity, kind)
        self._rows_of_x, self._rows_of_y = self._x[:rows], self._y[:rows]
        self._host = isinstance(self._x, np.ndarray)
        self._plain = programs.runnable(capacity, programs.labels if kind == "labels" else kind, returns)
        self._columns, self._classes = programs.reading.network.sizes[0], programs.reading.network.sizes[-1]
        self._squeezes = programs.reading.squeezes
        # Labels on a GPU are checked by the kernels, without a synchronisation.
        labels = kind == "labels" and programs.device == "cpu"
        self._labels = torch.as_tensor(self._rows_of_y).numpy() if labels else None
        # As an unsigned number, a negative label is too large as well. None where any label may be the ignored index.
        self._unsigned: Any = None
        if self._labels is not None and programs.labels == "labels":
            self._unsigned = self._labels.view(np.uint64)

    def stage(self, x: Tensor, y: Tensor) -> Runnable:
        """Copy the batch and return its program; raises DataError for a label that is no class."""
        self._running.rows = self.rows
        if x.dim() != 2:
            x = x.reshape(self.rows, self._columns)
        if self._squeezes:
            y = y.unsqueeze(1)
        if self._host:
            np.copyto(self._rows_of_x, x.numpy())
            np.copyto(self._rows_of_y, y.numpy())
        else:
            self._rows_of_x.copy_(x)
            self._rows_of_y.copy_(y)
        if self.rows < self._capacity:
            self._x[self.rows :] = 0
            self._y[self.rows :] = 0
        if self._labels is None:
            return self._plain
        if self._unsigned is not None and np.maximum.reduce(self._unsigned) < self._classes:
            self.nothing_scored = False
            return self._plain
        ignore_index = self._programs.ignore_index
        as_class_labels("y", self._labels, classes=self._classes, rows=None, ignore_index=ignore_index)
        self.nothing_scored = bool((self._labels == ignore_index).all())
        return self._programs.runnable(self._capacity, "ignored", self._returns)


class Programs:
    """Makes the programs of one network, loss and partition of its parameters, each on first use."""

    def __init__(
        self,
        memory: Memory,
        reading: Reading,
        loss: Loss,
        sets: list[UpdateSet],
        seed: int,
        *,
        pos_weight: Sequence[float] | None = None,
        clip_norm: float | None = None,
    ) -> None:
        self.reading = reading
        self.loss = loss
        self.sets = sets
        self.running = Running()
        self._pos_weight, self._clip_norm = pos_weight, clip_norm
        self.device = memory.backend.device
        self._memory = memory
        self._seed = seed
        self._workspace = Workspace(memory.backend)
        self._runnables: dict[tuple[int, str, bool], Runnable] = {}
        self._inputs: dict[tuple[int, str], Any] = {}
        self._sizes: set[int] = set()
        ignored = loss.spec(accuracy=False).ignore_index
        self.ignore_index = -100 if ignored is None else ignored
        # Labels on a GPU are not read back, so any of them may be the ignored index.
        read = isinstance(memory.params, np.ndarray) and not 0 <= self.ignore_index < reading.network.sizes[-1]
        self.labels = "labels" if read else "ignored"
        self._class_weight: Any = None
        if loss.class_weight is not None:
            weights = np.asarray(loss.class_weight, f"f{reading.dtype.itemsize}")
            self._class_weight = memory.backend.from_host(weights)

    @property
    def usual(self) -> str:
        """The usual kind of targets of the loss."""
        return self.labels if self.loss.kind == "cross_entropy" else "values"

    def batch(self, x: Any, y: Any, returns: bool) -> BatchCopy:
        """Check a batch of a new shape, and return the object that copies it."""
        check_tensors(x, y, self.reading.device)
        kind = check_shapes(x, y, self.reading, self.loss)
        if kind == "soft" and self.ignore_index >= 0:
            raise ArgumentError(
                f"loss_fn: ignore_index={self.ignore_index} is a class index, and y holds probabilities; leave it out"
            )
        rows = len(x)
        exact = rows in self._sizes or len(self._sizes) < EXACT_SIZES
        if exact:
            self._sizes.add(rows)
        return BatchCopy(self, rows, rows if exact else 1 << (rows - 1).bit_length(), kind, returns)

    def build(self, rows: int) -> None:
        """Make the program for batches of ``rows`` rows."""
        self._sizes.add(rows)
        self.runnable(rows, self.usual)

    def runnable(self, capacity: int, kind: str, returns: bool = False) -> Runnable:
        """Return the program for batches of ``capacity`` rows; ``returns``: it notes the output."""
        key = (capacity, kind, returns)
        if key not in self._runnables:
            target = self.input(capacity, "labels" if kind == "ignored" else kind)
            given = {"x": self.input(capacity, "x"), "target": target}
            if self._class_weight is not None:
                given["class_weight"] = self._class_weight
            program = self.lower(capacity, kind, returns)
            bound = BoundProgram(program, self._memory, self._workspace, given)
            # torch's calls between the kernels' depend on the number of rows, or return memory
            captures = "graph" in bound.backend.traits.plans and not returns and self._pos_weight is None
            self._runnables[key] = Runnable(bound, tuple(self._before_updates(bound, returns)), captures=captures)
        return self._runnables[key]

    def _before_updates(self, bound: BoundProgram, returns: bool) -> Iterator[Callable[[], object]]:
        """Yield the calls before the updates: the program's, and torch's between them."""
        arrays = bound.arrays
        for call, run in zip(bound.program.calls[:-1], bound.calls, strict=False):
            if call.op == "loss_grad":
                operands = resolve(call.operands, arrays.__getitem__)
                if returns:
                    yield bind_output(self.running, self.reading, operands["z"], operands.get("slope_param"))
                if self._pos_weight is not None:
                    yield bind_weighted_loss(self.running, operands, self._pos_weight)
                    continue
            yield run
        if self._clip_norm is not None and len(self.sets) > 1:
            trained = [short for one in self.sets for short in one.decays]
            yield bind_clipping([arrays[f"d{short}"] for short in trained], self._clip_norm)

    def input(self, capacity: int, kind: str) -> Any:
        """Return the array that programs of ``capacity`` rows read as x ("x"), or as targets of a kind."""
        key = (capacity, kind)
        if key not in self._inputs:
            backend, sizes = self._memory.backend, self.reading.network.sizes
            if kind == "labels":
                self._inputs[key] = backend.allocate(capacity, "int64")
            else:
                width, multiple = sizes[0] if kind == "x" else sizes[-1], backend.traits.row_multiple
                pitch = -(-width // multiple) * multiple
                flat = backend.allocate(capacity * pitch, "real")
                self._inputs[key] = backend.view(flat, 0, (capacity, width), pitch)
        return self._inputs[key]

    def lower(self, capacity: int, kind: str, returns: bool = False) -> Program:
        """Return the step as data; ``returns``: the output passes through memory."""
        traits = self._memory.backend.traits
        if returns or self._pos_weight is not None:
            traits = replace(traits, widest_fused_output=0)
        decays = {short: decay for update_set in self.sets for short, decay in update_set.decays.items()}
        options = {
            name: (short in decays, TensorRule(1.0, decays.get(short, 0.0)))
            for short, name in short_names(self.reading.network).items()
        }
        spec = self.loss.spec(accuracy=False)
        return lower_training(
            self.reading.network,
            replace(spec, ignore_index=spec.ignore_index if kind == "ignored" else None, soft=kind == "soft"),
            max((update_set.rule for update_set in self.sets), key=lambda rule: rule.state_count),
            options.__getitem__,
            capacity,
            traits,
            self._memory.layout,
            Inputs(capacity, class_weighted=self._class_weight is not None),
            seed=self._seed,
            real_bytes=self.reading.dtype.itemsize,
            keep_gradients=len(self.sets) > 1,
        )
