"""Random numbers, compiled: the words and dropout masks of ``philox``, and its order of the rows in an epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.cache import kept
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.views import elements, part
from fusemlp_kernels.philox import FEISTEL_ROUNDS, KEY_STEPS, LANES, MULTIPLIERS, ROUNDS, ROW_ORDER, WORD

# Mixed with a signed integer, an unsigned one would become a float.
_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_STEP0, _STEP1 = np.uint64(KEY_STEPS[0]), np.uint64(KEY_STEPS[1])
_WORD, _HALF, _ROW_ORDER = np.uint64(WORD), np.uint64(32), np.uint64(ROW_ORDER)


@register_jitable(**EXACT)
def words(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """The Philox words of a counter, as ``philox.philox``; all uint64 below 2**32. Two words to a number."""
    for _ in range(ROUNDS):
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c2 = (product1 >> _HALF) ^ c1 ^ k0, (product0 >> _HALF) ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + _STEP0) & _WORD, (k1 + _STEP1) & _WORD
    return c0 | (c1 << _HALF), c2 | (c3 << _HALF)


@register_jitable(**EXACT)
def draw(pairs: Any, blocks: int, row: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> None:
    """The Philox words of the blocks of a row, two numbers a block: side by side in vector registers."""
    two, one = np.uintp(2), np.uintp(1)
    for j in range(np.uintp(blocks)):
        first, second = words(np.uint64(j) & _WORD, row, c2, c3, k0, k1)
        pairs[two * j] = first
        pairs[two * j + one] = second


@register_jitable(**EXACT)
def drop(
    call: Any, y: Any, keep: Any, memory: int, first: int, rows: int, batch_index: int
) -> None:  # fmt: skip
    """``y = y * keep / (1 - rate)``, the mask of this batch written into keep; both flat, (rows, N), and row ``first``
    of the batch the first of them.

    memory: an address, two uint64 of any contents for each 8 columns begun.
    """
    columns = call.n
    pairs, lanes = elements(np.uint64, memory), elements(np.uint16, memory)
    real = y.dtype.type
    factor, zero = real(1.0 / (1.0 - call.rate)), real(0.0)
    least = np.uint32(call.threshold)
    k0, k1 = np.uint64(call.key_low), np.uint64(call.key_high)
    c2, c3 = np.uint64(call.mask_layer) & _WORD, np.uint64(batch_index) & _WORD
    # the first lane is in a number's lowest bits, which are the first in memory (all that numba compiles for)
    blocks = (columns + LANES - 1) // LANES
    for i in range(rows):
        draw(pairs, blocks, np.uint64(first + i) & _WORD, c2, c3, k0, k1)
        start = i * columns
        outputs, kept_row = part(y, start), part(keep, start)
        for j in range(np.uintp(columns)):
            kept = np.uint32(lanes[j]) >= least
            kept_row[j] = kept
            outputs[j] = outputs[j] * factor if kept else zero


@register_jitable(**EXACT)
def mask(d: Any, keep: Any, count: int) -> None:
    """``d = d where keep, else 0``: a dropped NaN or infinity is zero too."""
    zero = d.dtype.type(0.0)
    for i in range(count):
        d[i] = d[i] if keep[i] else zero


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
