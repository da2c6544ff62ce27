"""The order of the rows in an epoch: ``philox.row_order``, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.masks import words
from fusemlp_kernels.numpy.compiled.options import EXACT, contents, kept
from fusemlp_kernels.philox import FEISTEL_ROUNDS, ROW_ORDER, WORD

_WORD, _HALF, _ROW_ORDER = np.uint64(WORD), np.uint64(32), np.uint64(ROW_ORDER)


@register_jitable(**EXACT)
def _permuted(index: int, a: int, table: Any) -> int:
    left, right = index // a, index % a
    for i in range(FEISTEL_ROUNDS):
        moved = left + table[i, right]
        left, right = right, moved - a if moved >= a else moved
    return a * left + right


def _make(version: int) -> Callable[..., int]:
    def run(order: Any, a: int, low: Any, high: Any, epoch: Any) -> int:
        """Write the permutation into order (n,) int64; ``a`` is ``philox.radix(n)``, low and high are the key."""
        n = len(order)
        k0, k1 = np.uint64(low), np.uint64(high)
        counter = np.uint64(epoch) & _WORD
        table = np.empty((FEISTEL_ROUNDS, a), np.int64)
        for i in range(FEISTEL_ROUNDS):
            for half in range(a):
                first, _ = words(np.uint64(half), np.uint64(i), _ROW_ORDER, counter, k0, k1)
                table[i, half] = np.int64(((first & _WORD) * np.uint64(a)) >> _HALF)
        for position in range(n):
            index = _permuted(position, a, table)
            while index >= n:
                index = _permuted(index, a, table)
            order[position] = index
        return version

    return run


def compiled_row_order() -> Callable[..., int]:
    """The function, compiled or read from the disk."""
    return kept(_make(contents()))
