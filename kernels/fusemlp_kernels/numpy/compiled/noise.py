"""Private training: the norms of the rows' gradients, clipping, and the noise of ``philox.normal``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.functions import logarithm
from fusemlp_kernels.numpy.compiled.options import ELEMENT, ELEMENTWISE, EXACT, REDUCTION
from fusemlp_kernels.numpy.compiled.philox import draw
from fusemlp_kernels.numpy.compiled.views import part
from fusemlp_kernels.philox import COSINE, NORMALS, SINE, WORD

# Random words are in pairs, of two normal numbers.
WORDS = NORMALS // 2
_WORD, _HALF, _MANTISSA = np.uint64(WORD), np.uint64(32), np.uint64(52)
# float64: the bits of 1, those behind its exponent, and those of 2**52, in whose last bits an integer is itself
_ONE, _BEHIND, _WHOLE = np.uint64(1023 << 52), np.uint64((1 << 52) - 1), np.uint64(1075 << 52)
_TO_MANTISSA, _FIRST, _SECOND = np.uint64(20), np.uint64(1), np.uint64(2)
_TO_SIGN, _FROM_SECOND = np.uint64(63), np.uint64(62)
# the bits of the root of 1/2, and those that it lacks to 1
_ROOT = np.uint64(np.float64(math.sqrt(0.5)).view(np.uint64))
_TO_ONE = np.uint64(_ONE - _ROOT)
# log(1 + v) for v from the root of 1/2 to that of 2, less 1: |s| is below 0.172, and the next term below 2**-55 of it
_log_near_one = register_jitable(**ELEMENT)(logarithm(np.float64, 10))


@register_jitable(**REDUCTION)
def _squares(values: Any, count: int) -> float:
    total = 0.0
    for i in range(count):
        total += np.float64(values[i]) * np.float64(values[i])
    return total


@register_jitable(**EXACT)
def add_squares(norms: Any, x: Any, dz: Any, rows: int, inputs: int, outputs: int, biased: int, afresh: int) -> None:
    """Add a layer's part of the squares to norms (rows,) float64: x (rows, inputs), dz (rows, outputs), both flat."""
    for i in range(rows):
        width = _squares(part(x, i * inputs), inputs) + (1.0 if biased else 0.0)
        square = width * _squares(part(dz, i * outputs), outputs)
        norms[i] = square if afresh else norms[i] + square


@register_jitable(**EXACT)
def shrink(norms: Any, dz: Any, rows: int, outputs: int, largest: float) -> None:
    """Clip the rows of dz, flat (rows, outputs), whose gradients have these squares, to the norm ``largest``."""
    for i in range(rows):
        # NaN stays
        if not norms[i] <= largest * largest:
            factor = dz.dtype.type(largest / math.sqrt(norms[i]))
            for j in range(i * outputs, (i + 1) * outputs):
                dz[j] *= factor


@register_jitable(**ELEMENT)
def _fraction(word: Any) -> Any:
    """(word + 0.5) / 2**32: the word becomes a mantissa."""
    return np.uint64((word << _TO_MANTISSA) | _ONE).view(np.float64) - (1.0 - 2.0**-33)


@register_jitable(**ELEMENT)
def _log(v: Any) -> Any:
    """log(v) for a normal number above 0: v is a power of 2 times a number near 1."""
    bits = np.uint64(np.float64(v).view(np.uint64) + _TO_ONE)
    power = np.uint64((bits >> _MANTISSA) | _WHOLE).view(np.float64) - (2.0**52 + 1023.0)
    return power * math.log(2.0) + _log_near_one(np.uint64((bits & _BEHIND) + _ROOT).view(np.float64) - 1.0)


@register_jitable(**ELEMENT)
def _signed(v: Any, sign: Any) -> Any:
    return np.uint64(np.float64(v).view(np.uint64) ^ sign).view(np.float64)


@register_jitable(**ELEMENTWISE)
def _normals(words: Any, numbers: Any) -> None:
    """NORMALS numbers from WORDS pairs of words: a turn by a quadrant's half leaves angles up to pi / 4."""
    two, unit = np.uintp(2), np.uintp(1)
    for i in range(np.uintp(WORDS)):
        pair = words[i]
        angle = pair >> _HALF
        length = math.sqrt(-_log(_fraction(pair & _WORD)))
        t = (_fraction(angle) - 0.5) * (0.5 * math.pi)
        square, cosine, sine = t * t, 0.0, 0.0
        for factor in COSINE:
            cosine = cosine * square + factor
        for factor in SINE:
            sine = sine * square + factor
        sine *= t
        numbers[two * i] = _signed(length * (cosine - sine), (angle & _FIRST) << _TO_SIGN)
        numbers[two * i + unit] = _signed(length * (cosine + sine), (angle & _SECOND) << _FROM_SECOND)


@register_jitable(**ELEMENTWISE)
def _mix(g: Any, numbers: Any, count: int, deviation: float, share: float) -> None:
    real = g.dtype.type
    for i in range(np.uintp(count)):
        g[i] = real((np.float64(g[i]) + deviation * numbers[i]) * share)


@register_jitable(**EXACT)
def add_noise(
    g: Any, words: Any, numbers: Any, first: int, count: int, tensor: int, update: int, low: int, high: int,
    deviation: float, divisor: float,
) -> None:  # fmt: skip
    """``g = (g + deviation * z) / divisor`` for ``count`` elements of a tensor from ``first`` on, in place.

    words (WORDS,) uint64 and numbers (NORMALS,) float64 are memory of any contents; low and high are the key.
    """
    k0, k1 = np.uint64(low), np.uint64(high)
    c2, c3 = np.uint64(WORD - 1 - tensor) & _WORD, np.uint64(update) & _WORD
    at, end = first, first + count
    while at < end:
        chunk = at // NORMALS
        inside = at - chunk * NORMALS
        width = min(NORMALS - inside, end - at)
        draw(words, NORMALS // 4, np.uint64(chunk) & _WORD, c2, c3, k0, k1)
        _normals(words, numbers)
        _mix(part(g, at - first), part(numbers, inside), width, deviation, 1.0 / divisor)
        at += width
