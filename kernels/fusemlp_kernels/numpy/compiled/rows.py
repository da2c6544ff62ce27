"""The order of the rows in an epoch: ``philox.row_order``, compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.masks import words
from fusemlp_kernels.numpy.compiled.options import EXACT, kept
from fusemlp_kernels.philox import FEISTEL_ROUNDS, ROW_ORDER, WORD

_WORD, _HALF, _ROW_ORDER = np.uint64(WORD), np.uint64(32), np.uint64(ROW_ORDER)


@register_jitable(**EXACT)
def _permute(left: Any, right: Any, a: int, table: Any) -> None:
    """The Feistel network, for a indices at once: ``a * left + right``, both (a,) int64, in place."""
    halves = np.uintp(a)
    for i in range(FEISTEL_ROUNDS):
        values = table[i]
        # a round for all of them: lookups side by side, in vector registers
        for j in range(halves):
            moved = left[j] + values[right[j]]
            left[j] = right[j]
            right[j] = moved - a if moved >= a else moved


@register_jitable(**EXACT)
def _walk(left: int, right: int, a: int, n: int, table: Any) -> int:
    """An index outside range(n), permuted until it is inside."""
    index = n
    while index >= n:
        for i in range(FEISTEL_ROUNDS):
            moved = left + table[i, right]
            left, right = right, moved - a if moved >= a else moved
        index = a * left + right
    return index


def row_order(order: Any, a: int, low: Any, high: Any, epoch: Any) -> None:
    """Write the permutation into order (n,) int64; ``a`` is ``philox.radix(n)``, low and high are the key."""
    n = len(order)
    k0, k1 = np.uint64(low), np.uint64(high)
    counter = np.uint64(epoch) & _WORD
    table = np.empty((FEISTEL_ROUNDS, a), np.int64)
    for i in range(FEISTEL_ROUNDS):
        for half in range(a):
            first, _ = words(np.uint64(half), np.uint64(i), _ROW_ORDER, counter, k0, k1)
            table[i, half] = np.int64(((first & _WORD) * np.uint64(a)) >> _HALF)
    left, right = np.empty(a, np.int64), np.empty(a, np.int64)
    # the positions that have one left half in common lie side by side: no division is needed
    for start in range(0, n, a):
        for j in range(a):
            left[j], right[j] = start // a, j
        _permute(left, right, a, table)
        for j in range(min(a, n - start)):
            index = a * left[j] + right[j]
            order[start + j] = index if index < n else _walk(left[j], right[j], a, n, table)


@functools.cache
def compiled_row_order() -> Callable[..., object]:
    """The function, compiled or read from the disk."""
    return kept(row_order)
