"""Batches of tensors: checked and copied for a fused step; and in memory for a loop, a ``DataLoader`` without its work
on each row.

The kinds of targets are "labels", "soft" and "values", "ignored" for labels some of which may be the ignored index, and
OWN for those of a callable loss, any number of tensors, which it is given as they are.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusemlp.describe.checks import as_count
from fusemlp.describe.losses import Loss
from fusemlp.inputs.arrays import as_class_labels
from fusemlp.torch.modules import Reading
from fusemlp_kernels.contract import OWN
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DTypeError, ShapeError


class Batches:
    """Shuffled batches of tensors in memory: ``for x, y in Batches(X, Y, batch_size=64)``, an epoch at each iteration.

    It stands for ``DataLoader(TensorDataset(X, Y), batch_size=64, shuffle=True)`` in fused and in plain loops. The
    tensors stay on their device, and each batch is one ``index_select`` a tensor (a view with ``shuffle=False``).

    - tensors: any number, (n, ...) each with the same n, on one device
    - drop_last: leave out the last batch of an epoch if it is short
    - seed: the order is then a function of seed and ``epoch``, so ``batches.epoch = 7`` continues a run at epoch 7
    - generator: draws the order instead; without both, torch's default generator does, as ``torch.manual_seed`` sets it

    ``len(batches)`` is the number of batches in an epoch, ``epoch`` the number of the next one. Raises
    ArgumentTypeError, ShapeError or ArgumentError for tensors or options that give no batches.
    """

    def __init__(
        self,
        *tensors: Tensor,
        batch_size: int = 32,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.tensors = _checked(tensors)
        self.batch_size = as_count("batch_size", batch_size, minimum=1)
        self.shuffle = bool(shuffle)
        self.drop_last = bool(drop_last)
        self.seed = None if seed is None else as_count("seed", seed, minimum=0)
        if self.seed is not None and generator is not None:
            raise ArgumentError("seed, generator: both decide the order; give one of them")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ArgumentTypeError(f"generator: expected a torch.Generator, got {generator!r}; or use seed=")
        self.generator = generator
        self.epoch = 0
        if not len(self):
            raise ArgumentError(
                f"batch_size: {self.batch_size} is more than the {self._rows} rows, and drop_last leaves out the short "
                "batch; use a smaller batch_size or drop_last=False"
            )

    @property
    def _rows(self) -> int:
        return len(self.tensors[0])

    def __len__(self) -> int:
        whole, rest = divmod(self._rows, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Draw the order of an epoch, and yield its batches."""
        tensors, size = self.tensors, self.batch_size
        rows = min(self._rows, len(self) * size)
        order = self._order()[:rows] if self.shuffle else None
        self.epoch += 1
        if order is None:
            return zip(*(torch.split(tensor[:rows], size) for tensor in tensors), strict=True)
        return (tuple([tensor.index_select(0, picked) for tensor in tensors]) for picked in torch.split(order, size))

    def _order(self) -> Tensor:
        """Return the rows in the order of this epoch."""
        device, generator = self.tensors[0].device, self.generator
        if self.seed is not None:
            state = np.random.SeedSequence((self.seed, self.epoch)).generate_state(1, np.uint64)
            generator = torch.Generator(device).manual_seed(int(state[0]))
        where = device if generator is None else generator.device
        return torch.randperm(self._rows, generator=generator, device=where).to(device)

    def __repr__(self) -> str:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in self.tensors)
        return f"Batches({shapes}, batch_size={self.batch_size}, shuffle={self.shuffle}, drop_last={self.drop_last})"


def _checked(tensors: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Return the tensors; raises ArgumentTypeError, ShapeError or ArgumentError."""
    if not tensors:
        raise ArgumentTypeError("tensors: expected at least one, as in Batches(X, Y, batch_size=64)")
    for index, tensor in enumerate(tensors):
        name = f"tensors[{index}]"
        if not isinstance(tensor, Tensor):
            mend = "Batches(*dataset.tensors)" if isinstance(tensor, torch.utils.data.Dataset) else "torch.as_tensor"
            raise ArgumentTypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}; use {mend}")
        if tensor.dim() == 0 or len(tensor) == 0:
            raise ShapeError(f"{name}: expected at least one row, got shape {tuple(tensor.shape)}")
        first = tensors[0]
        if len(tensor) != len(first):
            raise ShapeError(f"{name}: has {len(tensor)} rows, tensors[0] has {len(first)}; expected as many")
        if tensor.device != first.device:
            raise ArgumentError(
                f"{name}: is on {tensor.device}, tensors[0] on {first.device}; bring all to one device with .to(...)"
            )
    return tensors


def _named(tensors: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Yield the targets of a step with the names of their arguments."""
    return zip(["y", *(f"targets[{index}]" for index in range(1, len(tensors)))], tensors, strict=False)


def check_tensors(x: Any, targets: Sequence[Any], device: torch.device) -> None:
    """Check that x and the targets are tensors on the module's device; raises ArgumentTypeError or ArgumentError."""
    for name, value in (("x", x), *_named(targets)):
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


def check_shapes(x: Tensor, targets: Sequence[Tensor], reading: Reading, loss: Loss) -> str:
    """Return the kind of the targets, but "ignored". Raises ShapeError, DTypeError or ArgumentTypeError.

    x (m, K), or after a leading Flatten any (m, ...) with K elements a row. One target, (m,) int64 or (m, N) for
    cross-entropy, else of the output's shape; for a callable loss any (m, ...).
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
    if loss.kind == OWN:
        for name, value in _named(targets):
            if value.shape[:1] != (rows,):
                raise ShapeError(f"{name}: expected {rows} rows, as x has, got shape {tuple(value.shape)}")
        return OWN
    if len(targets) != 1:
        raise ArgumentTypeError(f"step: {loss.kind} has one target, step(x, y), got {len(targets)}")
    y = targets[0]
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


class BatchCopy:
    """Copies batches of one shape, with ``rows`` rows, into the arrays that the program reads.

    ``returns``: the program notes the output.
    """

    def __init__(self, programs: Any, rows: int, capacity: int, kind: str, returns: bool) -> None:
        self.rows = rows
        self.nothing_scored = False
        self._programs, self._running = programs, programs.running
        self._capacity = capacity
        self._returns = returns
        self._x, self._y = programs.input(capacity, "x"), programs.input(capacity, kind)
        self._rows_of_x, self._rows_of_y = self._x[:rows], None if self._y is None else self._y[:rows]
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

    def stage(self, x: Tensor, targets: tuple[Tensor, ...]) -> Any:
        """Copy the batch and return its program; raises DataError for a label that is no class."""
        self._running.rows = self.rows
        if x.dim() != 2:
            x = x.reshape(self.rows, self._columns)
        self._copy(self._x, self._rows_of_x, x)
        if self._y is None:
            self._running.targets = targets
            return self._plain
        y = targets[0]
        self._copy(self._y, self._rows_of_y, y.unsqueeze(1) if self._squeezes else y)
        if self._labels is None:
            return self._plain
        if self._unsigned is not None and np.maximum.reduce(self._unsigned) < self._classes:
            self.nothing_scored = False
            return self._plain
        ignore_index = self._programs.ignore_index
        as_class_labels("y", self._labels, classes=self._classes, rows=None, ignore_index=ignore_index)
        self.nothing_scored = bool((self._labels == ignore_index).all())
        return self._programs.runnable(self._capacity, "ignored", self._returns)

    def _copy(self, array: Any, rows: Any, tensor: Tensor) -> None:
        if self._host:
            np.copyto(rows, tensor.numpy())
        else:
            rows.copy_(tensor)
        if self.rows < self._capacity:
            array[self.rows :] = 0
