"""Dropout: the masks of ``philox.dropout_keep``, computed where they are applied."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.philox import KEY_STEPS, LANES, MULTIPLIERS, ROUNDS, WORD

# Mixed with a signed integer, an unsigned one would become a float.
_M0, _M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
_STEP0, _STEP1 = np.uint64(KEY_STEPS[0]), np.uint64(KEY_STEPS[1])
_WORD, _HALF, _LANE, _LANE_BITS = np.uint64(WORD), np.uint64(32), np.uint64(0xFFFF), np.uint64(16)


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
def drop(
    y: Any, keep: Any, rows: int, columns: int, scale: float, threshold: int, low: int, high: int, layer: int,
    batch_index: int,
) -> None:  # fmt: skip
    """``y = y * keep * scale``, the mask of this batch written into keep; both flat, (rows, columns)."""
    real = y.dtype.type
    factor, zero = real(scale), real(0.0)
    least = np.uint64(threshold)
    k0, k1 = np.uint64(low), np.uint64(high)
    c2, c3 = np.uint64(layer) & _WORD, np.uint64(batch_index) & _WORD
    for i in range(rows):
        start = i * columns
        for first in range(0, columns, LANES):
            pair0, pair1 = words(np.uint64(first // LANES), np.uint64(i), c2, c3, k0, k1)
            for lane in range(min(LANES, columns - first)):
                word = pair0 if lane < 4 else pair1
                kept = ((word >> (_LANE_BITS * np.uint64(lane & 3))) & _LANE) >= least
                at = start + first + lane
                keep[at] = kept
                y[at] = y[at] * factor if kept else zero


@register_jitable(**EXACT)
def mask(d: Any, keep: Any) -> None:
    """``d = d where keep, else 0``: a dropped NaN or infinity is zero too."""
    zero = d.dtype.type(0.0)
    for i in range(d.size):
        d[i] = d[i] if keep[i] else zero
