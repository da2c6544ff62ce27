"""exp, tanh, sigmoid and log1p as a few products, sums and shifts, which the compiler turns into vector code.

Argument reduction by the logarithm of two in two parts (Cody and Waite, "Software manual for the elementary functions",
1980), then the Taylor series of exp(r) - 1 for abs(r) <= log(2) / 2, to the degree where what is left out is below half
a unit in the last place. Errors stay within two units (log1p: three), at NaN NaN comes out, and overflow gives an
infinity.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from fusemlp_kernels.numpy.compiled.options import ELEMENTWISE

_OPTIONS: Any = ELEMENTWISE


def _parts(v: Any) -> Any:
    """(p, s, t) with exp(v) = (1 + p) * s * t; s and t are powers of two, since one would overflow at the ends."""
    raise AssertionError("compiled code only")


def _reduction(
    real: Any, integer: Any, bits: int, bias: int, degree: int, low: float, high: float, coarse: float, fine: float
) -> Any:
    """``_parts`` for one type: ``coarse + fine`` is log(2), and multiples of ``coarse`` are exact."""
    low_end, high_end = real(low), real(high)
    per_power, half, zero = real(1.0 / math.log(2.0)), real(0.5), real(0.0)
    coarse_part, fine_part = real(coarse), real(fine)
    taylor = tuple(real(1.0 / math.factorial(power)) for power in range(degree, 0, -1))
    one, shift, offset = integer(1), integer(bits), integer(bias)

    def parts(v: Any) -> Any:
        # the comparisons are false for NaN, which therefore stays
        c = low_end if v < low_end else (high_end if v > high_end else v)
        k = np.floor(c * per_power + half)
        r = (c - k * coarse_part) - k * fine_part
        p = zero
        for factor in taylor:
            p = p * r + factor
        n = integer(k if k == k else zero)
        first = n >> one
        return p * r, integer((first + offset) << shift).view(real), integer((n - first + offset) << shift).view(real)

    return parts


@overload(_parts, jit_options=_OPTIONS)
def _parts_of(v: Any) -> Any:
    if v == types.float32:
        return _reduction(np.float32, np.int32, 23, 127, 7, -104.0, 89.0, 0.693359375, -2.1219444005469057e-4)
    return _reduction(np.float64, np.int64, 52, 1023, 13, -746.0, 710.0, 0.6931471803691238, 1.9082149292705877e-10)


@register_jitable(**ELEMENTWISE)
def exp(v: Any) -> Any:
    """exp(v), in the type of v."""
    p, s, t = _parts(v)
    return ((p + type(v)(1.0)) * s) * t


@register_jitable(**ELEMENTWISE)
def tanh(v: Any) -> Any:
    """tanh(v) = (exp(2 v) - 1) / (exp(2 v) + 1), from exp(2 v) - 1, which is accurate near zero too."""
    real = type(v)
    limit = real(44.0)
    c = v + v
    c = -limit if c < -limit else (limit if c > limit else c)
    p, s, t = _parts(c)
    scale = s * t
    e = p * scale + (scale - real(1.0))
    return e / (e + real(2.0))


@register_jitable(**ELEMENTWISE)
def sigmoid(v: Any) -> Any:
    """1 / (1 + exp(-v)); where the exponential overflows it is zero."""
    one = type(v)(1.0)
    return one / (one + exp(-v))


def _series(v: Any) -> Any:
    """log(1 + v) for 0 <= v <= 1."""
    raise AssertionError("compiled code only")


def _logarithm(real: Any, terms: int) -> Any:
    """``_series`` for one type: 2 atanh(s), s = v / (2 + v) <= 1/3, as a series in s squared."""
    factors = tuple(real(2.0 / (2 * power + 1)) for power in range(terms - 1, -1, -1))
    two, zero = real(2.0), real(0.0)

    def series(v: Any) -> Any:
        s = v / (two + v)
        square = s * s
        p = zero
        for factor in factors:
            p = p * square + factor
        return p * s

    return series


@overload(_series, jit_options=_OPTIONS)
def _series_of(v: Any) -> Any:
    return _logarithm(np.float32, 8) if v == types.float32 else _logarithm(np.float64, 17)


@register_jitable(**ELEMENTWISE)
def log1p(v: Any) -> Any:
    """log(1 + v) for 0 <= v <= 1, in the type of v."""
    return _series(v)
