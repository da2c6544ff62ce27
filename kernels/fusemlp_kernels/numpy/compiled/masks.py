"""Dropout: the masks of ``philox.dropout_keep``, computed where they are applied."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.views import elements, part
from fusemlp_kernels.philox import KEY_STEPS, LANES, MULTIPLIERS, ROUNDS, WORD

# Mixed with a signed integer, an unsigned one would become a float.
_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_STEP0, _STEP1 = np.uint64(KEY_STEPS[0]), np.uint64(KEY_STEPS[1])
_WORD, _HALF = np.uint64(WORD), np.uint64(32)


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
