"""Batches of tensors in memory, for a training loop: a ``DataLoader`` without its work on each row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fusemlp.describe.checks import as_count
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, ShapeError


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
        self.tensors = _check_tensors(tensors)
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
        rows = min(self._rows, len(self) * self.batch_size)
        order = self._order()[:rows] if self.shuffle else None
        self.epoch += 1
        return self._batches(order, rows)

    def _batches(self, order: Tensor | None, rows: int) -> Iterator[tuple[Tensor, ...]]:
        tensors, size = self.tensors, self.batch_size
        if order is None:
            yield from zip(*(torch.split(tensor[:rows], size) for tensor in tensors), strict=True)
        else:
            for picked in torch.split(order, size):
                yield tuple([tensor.index_select(0, picked) for tensor in tensors])

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


def _check_tensors(tensors: tuple[Any, ...]) -> tuple[Tensor, ...]:
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
