"""The launches of a step for several models at once, over those of a list that changes.

A kernel reads the call of its block's model in a table on the card; a product is cuBLAS's over arrays of addresses.
The list of the models that take part, and their addresses, lie on the card too: a launch over fewer models reads less
of them, and a captured graph serves every list of one length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fusemlp_kernels.cupy import sources
from fusemlp_kernels.cupy.blas import gemm_of_many
from fusemlp_kernels.cupy.device import INT64, THREADS, Array, Device, Run
from fusemlp_kernels.cupy.products import matrix

# The source of the kernels for several models.
MODULE = "fleet"
# What the second dimension of a grid has at most (the CUDA programming guide's table of compute capabilities).
MOST_MODELS = 65535
# Steps that are unrolled in one graph, steps of as many models that make up for capturing it, and for how many lengths
# of the list graphs are kept: models with fewer rows than others leave and come back in every epoch.
STEPS_A_GRAPH, WORTH_A_GRAPH, KEPT_LENGTHS = 8, 32, 4

# Starts a launch for so many models.
Start = Callable[[int], object]


@dataclass(frozen=True)
class Each:
    """An array with the axis of models in front: the call of each has the address of its own part."""

    array: Array

    @property
    def addresses(self) -> np.ndarray[Any, Any]:
        """(models,) int64."""
        models = self.array.shape[0]
        first, step = self.array.data.ptr, self.array.strides[0]
        found: np.ndarray[Any, Any] = np.arange(models, dtype=np.int64) * step + first
        return found


class Launches:
    """A step of ``models`` models as launches, with at most ``products`` matrix products.

    The values of fields, in calls and in tables: a number, an array of the card (its address) or None, alike for all
    models; numbers (models,) of NumPy, or ``Each``, for one of its own for each.
    """

    def __init__(self, device: Device, models: int, products: int) -> None:
        self.device, self.models = device, models
        rows = 1 + 3 * products
        # the numbers of the models, then their addresses in the products, a row each
        self._lists = np.zeros((rows, models), np.int64)
        self._lists[0] = np.arange(models)
        self._on_card = device.view(device.zeros(rows * models, INT64), 0, (rows, models), (models, 1))
        self._used = 1
        self._starts: list[Start] = []
        self._kept: list[Array] = []
        self._live: list[int] = []
        # by the length of the list and their steps
        self._graphs: dict[tuple[int, int], Run] = {}
        # the steps made by lists of a length, the latest last; whether the kernels have run, which a capture needs
        self._made: dict[int, int] = {}
        self._warm = False

    # what a step consists of

    def room(self, *shape: int, dtype: Any) -> Array:
        """Zeros of that shape for each model, (models, \\*shape); what models have begins at multiples of 256 bytes."""
        each = int(np.prod(shape)) if shape else 1
        stride = -(-each // 64) * 64 if shape else 1
        strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
        flat = self.device.zeros(self.models * stride, dtype)
        return self.device.view(flat, 0, (self.models, *shape), (stride, *strides))

    def table(self, struct: str, rows: Sequence[dict[str, Any]]) -> Each:
        """A table of structures for each model."""
        table = np.zeros((self.models, len(rows)), sources.layout(MODULE, struct))
        for index, row in enumerate(rows):
            for name, value in row.items():
                table[name][:, index] = self._entries(value)
        return self.upload(table)

    def upload(self, table: np.ndarray[Any, Any]) -> Each:
        """A structured array with the axis of models in front, on the card."""
        words = table.nbytes // (8 * self.models)
        return Each(self.device.view(self.device.upload(table), 0, (self.models, max(words, 1)), (words, 1)))

    def kernel(self, name: str, struct: str, blocks: int, **fields: Any) -> None:
        """A launch of a kernel over ``blocks`` blocks a model."""
        calls = self.table(struct, [fields])
        fleet = np.zeros((), sources.layout(MODULE, "Fleet"))
        fleet["calls"], fleet["live"] = calls.array.data.ptr, self._on_card.data.ptr
        self._kept.append(calls.array)
        kernel, arguments = self.device.kernel(MODULE, name), (fleet,)

        def start(count: int) -> None:
            kernel((blocks, count), (THREADS,), arguments)

        self._starts.append(start)

    def product(
        self, out: Array, a: Array, b: Array, *, a_transposed: bool = False, b_transposed: bool = False
    ) -> None:
        """out (models, R, C) = a (models, R, I) @ b (models, I, C), or of the transposed; rows lie without gaps."""
        wanted, left, right = matrix(out[0]), matrix(a[0], a_transposed), matrix(b[0], b_transposed)
        # column-major: the transposed of all
        first, self._used = self._used, self._used + 3
        for row, array in enumerate((b, a, out), first):
            self._lists[row] = Each(array).addresses
            self._kept.append(array)
        self._starts.append(
            gemm_of_many(
                self.device, wanted.columns, wanted.rows, left.columns, right.factor()[1:], left.factor()[1:],
                wanted.pitch, [self._on_card[row] for row in range(first, first + 3)],
            )
        )  # fmt: skip

    def _entries(self, value: Any) -> Any:
        if value is None:
            return 0
        if isinstance(value, Each):
            self._kept.append(value.array)
            return value.addresses
        if hasattr(value, "__cuda_array_interface__"):
            self._kept.append(value)
            return value.data.ptr
        return value

    # running

    def run(self, live: list[int], steps: int) -> None:
        """``steps`` steps of the models ``live``."""
        if live != self._live:
            self._take_part(live)
        count, eager = len(live), steps
        once = self.device.on_card(_once(self._starts, count))
        if self.device.captures and self._count(count, steps) >= WORTH_A_GRAPH:
            eager = 0 if self._warm else 1
        for _ in range(eager):
            once()
        self._warm, steps = True, steps - eager
        for size in (STEPS_A_GRAPH, 1):
            whole, steps = divmod(steps, size)
            if whole and (count, size) not in self._graphs:
                self._graphs[count, size] = self.device.capture(once, size)
            for _ in range(whole):
                self._graphs[count, size]()

    def _take_part(self, live: list[int]) -> None:
        self._live = live
        # what was started before reads its own list: the copy waits for it
        lists = np.zeros_like(self._lists)
        lists[:, : len(live)] = self._lists[:, live]
        self.device.copy_into(self._on_card, lists)

    def _count(self, length: int, steps: int) -> int:
        """The steps made by lists of a length, with these; what was last made long ago is forgotten."""
        self._made[length] = made = self._made.pop(length, 0) + steps
        for old in list(self._made)[:-KEPT_LENGTHS]:
            del self._made[old]
            for size in (STEPS_A_GRAPH, 1):
                self._graphs.pop((old, size), None)
        return made


def _once(starts: Sequence[Start], count: int) -> Run:
    """A step of ``count`` models. Not a method: a graph holds on to it, and would be in a ring with its owner."""

    def once() -> None:
        for start in starts:
            start(count)

    return once
