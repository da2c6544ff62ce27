"""The order of the rows in an epoch: ``philox.row_order``, compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.cache import kept
from fusemlp_kernels.numpy.compiled.masks import words
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.philox import FEISTEL_ROUNDS, ROW_ORDER, WORD

_WORD, _HALF, _ROW_ORDER = np.uint64(WORD), np.uint64(32), np.uint64(ROW_ORDER)


@register_jitable(**EXACT)
def _permute(halves: Any, a: int, table: Any) -> None:
    """The Feistel network, for a indices at once: ``a * halves[0] + halves[1]``, in place."""
    count = np.uintp(a)
    for i in range(FEISTEL_ROUNDS):
        # a round for all of them: lookups side by side, in vector registers
        for j in range(count):
            moved = halves[0, j] + table[i, halves[1, j]]
            halves[0, j] = halves[1, j]
            halves[1, j] = moved - a if moved >= a else moved


def row_order(order: Any, table: Any, halves: Any, low: Any, high: Any, epoch: Any) -> None:
    """Write the permutation into order (n,) int64; low and high are the key.

    table (FEISTEL_ROUNDS, a) and halves (2, a), a = ``philox.radix(n)``, are memory of any contents.
    """
    n, a = order.size, halves.shape[1]
    k0, k1 = np.uint64(low), np.uint64(high)
    counter = np.uint64(epoch) & _WORD
    for i in range(FEISTEL_ROUNDS):
        for half in range(a):
            first, _ = words(np.uint64(half), np.uint64(i), _ROW_ORDER, counter, k0, k1)
            table[i, half] = np.int64(((first & _WORD) * np.uint64(a)) >> _HALF)
    # the positions that have one left half in common lie side by side: no division is needed
    for block in range((n + a - 1) // a):
        for j in range(a):
            halves[0, j], halves[1, j] = block, j
        _permute(halves, a, table)
        start = block * a
        for j in range(a if a < n - start else n - start):
            left, right = halves[0, j], halves[1, j]
            index = a * left + right
            # one outside is permuted until it is inside
            while index >= n:
                for i in range(FEISTEL_ROUNDS):
                    moved = left + table[i, right]
                    left, right = right, moved - a if moved >= a else moved
                index = a * left + right
            order[start + j] = index


@functools.cache
def compiled_row_order() -> Callable[..., object]:
    """The function, compiled or read from the disk."""
    return kept(row_order)
