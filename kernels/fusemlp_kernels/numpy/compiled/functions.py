"""Functions of ``pointwise.FUNCTIONS`` as a few products, sums and shifts, which the compiler turns into vector code.

Argument reduction by the logarithm of two in two parts (Cody and Waite, "Software manual for the elementary functions",
1980), then a polynomial for exp(r) - 1, abs(r) <= log(2) / 2, whose first term is r and whose other coefficients were
found for it by Remez' algorithm in 50 digits; its relative error is at most 1.4e-8 in float32 (degree 6), 1.9e-17 in
float64 (degree 11). Errors stay within three units (exp: one), at NaN NaN comes out, and overflow gives an
infinity.

The normal distribution is Phi(-a) = exp(-a a / 2) R(a) for a >= 0, the way of W. J. Cody, "Rational Chebyshev
approximations for the error function", Mathematics of Computation 23, 1969; but with one quotient of polynomials R for
all a, whose coefficients were found for it by Remez' algorithm in 60 digits. Its relative error is at most 6.3e-9 in
float32 (degrees 4 and 5, a <= 15), 5.2e-17 in float64 (9 and 10, a <= 39); beyond these ends the exponential is zero.
All coefficients are positive: nothing cancels. The values have an error of two units in the last place of 1, and the
tail a relative one that grows with the square of a, by the rounding of the exponent.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from fusemlp_kernels.numpy.compiled.compiler import ELEMENT

# exp(r) - 1, from the highest power of r down to the first.
_SINGLE = (0.00138824805591, 0.00836664695538, 0.04166720420567, 0.16666542683261, 0.49999998131976, 1.0)
_DOUBLE = (
    2.505379665857375e-08, 2.762629923360677e-07, 2.7557408170721776e-06, 2.4801504649066906e-05,
    0.00019841269717652267, 0.00138888889320530971, 0.00833333333339039377, 0.0416666666665753813,
    0.166666666666665878, 0.500000000000000528, 1.0,
)  # fmt: skip


def of_type(choose: Callable[[Any], Callable[..., Any]]) -> Any:
    """Decorate ``choose(real)`` to be the function of a number v that it returns for the type of v."""

    def function(v: Any) -> Any:
        raise AssertionError("compiled code only")

    @overload(function, jit_options=ELEMENT)
    def of(v: Any) -> Any:
        return choose(np.float32 if v == types.float32 else np.float64)

    return function


@of_type
def _parts(real: Any) -> Any:
    """(p, s) with exp(v) = 2 (1 + p) s; s is half a power of two, which would overflow before exp(v) does.

    For NaN, and between the ends of ``_clamped``: at the upper one s is an infinity, at the lower one zero. Adding
    1.5 * 2**bits rounds to an integer, which is then in the lowest bits of the sum (Muller, "Elementary functions",
    2016, section 11.2.1); the others are shifted out.
    """
    single = real is np.float32
    integer: Any = np.int32 if single else np.int64
    bits, bias = (23, 127) if single else (52, 1023)
    per_power, rounder = real(1.0 / math.log(2.0)), real(1.5 * 2.0**bits)
    # their sum is log(2), and multiples of the first are exact
    halves = (0.693359375, -2.1219444005469057e-4) if single else (0.6931471803691238, 1.9082149292705877e-10)
    coarse_part, fine_part = map(real, halves)
    last, *others = map(real, _SINGLE if single else _DOUBLE)
    rest = tuple(others)
    shift, offset = integer(bits), integer((bias - 1) << bits)

    def parts(v: Any) -> Any:
        rounded = v * per_power + rounder
        k = rounded - rounder
        r = (v - k * coarse_part) - k * fine_part
        p = last
        for factor in rest:
            p = p * r + factor
        return p * r, integer((real(rounded).view(integer) << shift) + offset).view(real)

    return parts


# Below the first, exp(v) is less than the normal numbers; above the second, it overflows.
LOWEST, _HIGHEST = {"float32": -87.5, "float64": -708.5}, {"float32": 89.5, "float64": 710.5}


@of_type
def _clamped(real: Any) -> Any:
    """v between the ends of its type, or NaN."""
    low, high = (real(ends[real.__name__]) for ends in (LOWEST, _HIGHEST))

    def clamped(v: Any) -> Any:
        # the comparisons are false for NaN, which therefore stays
        return low if v < low else (high if v > high else v)

    return clamped


@register_jitable(**ELEMENT)
def half_exp_within(v: Any) -> Any:
    """exp(v) / 2, in the type of v, from ``LOWEST`` to zero; or NaN."""
    p, s = _parts(v)
    return (p + type(v)(1.0)) * s


@register_jitable(**ELEMENT)
def exp(v: Any) -> Any:
    """exp(v), in the type of v."""
    return half_exp_within(_clamped(v)) * type(v)(2.0)


@register_jitable(**ELEMENT)
def tanh(v: Any) -> Any:
    """tanh(abs(v)) = -e / (e + 1) with e = (exp(-2 abs(v)) - 1) / 2, which is accurate near zero too."""
    real = type(v)
    a, limit = abs(v), real(22.0)
    a = limit if a > limit else a
    p, s = _parts(real(-2.0) * a)
    e = p * s + (s - real(0.5))
    return math.copysign(e / (e + real(1.0)), v)


@register_jitable(**ELEMENT)
def sigmoid(v: Any) -> Any:
    """1 / (1 + exp(-v)); where the exponential overflows it is zero."""
    half = type(v)(0.5)
    return half / (half + half_exp_within(_clamped(-v)))


def logarithm(real: Any, terms: int) -> Any:
    """Return log(1 + v) for one type: 2 atanh(s), s = v / (2 + v), as a series in s squared.

    The high terms and the low ones are two loops: one of them all is too long for the compiler to unroll.
    """
    factors = tuple(real(2.0 / (2 * power + 1)) for power in range(terms - 1, -1, -1))
    high, low = factors[: terms // 2], factors[terms // 2 :]
    two, zero = real(2.0), real(0.0)

    def series(v: Any) -> Any:
        s = v / (two + v)
        square = s * s
        p = zero
        for factor in high:
            p = p * square + factor
        for factor in low:
            p = p * square + factor
        return p * s

    return series


@of_type
def log1p(real: Any) -> Any:
    """log(1 + v) for -0.3 <= v <= 1, in the type of v."""
    return logarithm(real, 8 if real is np.float32 else 17)


@of_type
def log(real: Any) -> Any:
    """log(v) of a positive normal number, in the type of v; NaN for NaN and infinity.

    v = 2**k (1 + m), with sqrt(1/2) <= 1 + m < sqrt(2).
    """
    single = real is np.float32
    integer: Any = np.int32 if single else np.int64
    bits = integer(23 if single else 52)
    root = integer(real(math.sqrt(0.5)).view(integer))
    two = real(math.log(2.0))

    def of(v: Any) -> Any:
        places = integer(real(v).view(integer))
        power = (places - root) >> bits
        m = integer(places - (power << bits)).view(real) - real(1.0)
        return real(power) * two + log1p(m) + (v - v)

    return of


@register_jitable(**ELEMENT)
def maximum(v: Any, other: Any) -> Any:
    """The larger one; NaN where v is."""
    return other if v < other else v


@register_jitable(**ELEMENT)
def minimum(v: Any, other: Any) -> Any:
    """The smaller one; NaN where v is."""
    return other if v > other else v


@register_jitable(**ELEMENT)
def sign(v: Any) -> Any:
    """1, 0, -1 or NaN, in the type of v."""
    zero, one = type(v)(0.0), type(v)(1.0)
    return one if v > zero else (-one if v < zero else v)


@register_jitable(**ELEMENT)
def step(v: Any, below: Any) -> Any:
    """1 above zero, ``below`` elsewhere, and NaN for NaN, in the type of v."""
    zero, one = type(v)(0.0), type(v)(1.0)
    return one if v > zero else (below if v <= zero else v)


# The coefficients of 2 R from the highest power of a down.
_NORMAL_SINGLE = (
    (0.008306401047, 0.08176185861, 0.3679370976, 0.87856527, 1.000000006),
    (0.01041041819, 0.10247941, 0.471407142, 1.205545832, 1.676450277, 1.0),
)
_NORMAL_DOUBLE = (
    (
        2.7717244317244824e-06, 7.451531616360891e-05, 0.0009809097042331833, 0.008179132339976048,
        0.047247169795354704, 0.19540609897938027, 0.5786813287354142, 1.188114422385208, 1.5497625135384916, 1.0,
    ),
    (
        3.473841415033371e-06, 9.339109919225127e-05, 0.0012328618413596634, 0.010344413280676682,
        0.06043798659490269, 0.25496945464863197, 0.7820612425990161, 1.7144137315821375, 2.5612657772165086,
        2.3476470743413467, 1.0,
    ),
)  # fmt: skip
_DENSITY = 2.0 / math.sqrt(2.0 * math.pi)


@of_type
def _halves(real: Any) -> Any:
    """(Phi(-abs(v)), exp(-v v / 2) / 2)."""
    above, below = _NORMAL_SINGLE if real is np.float32 else _NORMAL_DOUBLE
    # the exponential of the lowest exponent is zero
    limit, half = real(math.sqrt(-2.0 * LOWEST[real.__name__])), real(0.5)
    (p_first, *p_others), (q_first, *q_others) = ([real(c) for c in part] for part in (above, below))
    p_rest, q_rest = tuple(p_others), tuple(q_others)

    def halves(v: Any) -> Any:
        a = abs(v)
        # the comparison is false for NaN, which therefore stays
        a = limit if a > limit else a
        p, q = p_first, q_first
        for factor in p_rest:
            p = p * a + factor
        for factor in q_rest:
            q = q * a + factor
        e = half_exp_within(-half * a * a)
        return e * (p / q), e

    return halves


@register_jitable(**ELEMENT)
def normal_cdf(v: Any) -> Any:
    """Phi(v), in the type of v."""
    real = type(v)
    tail, _ = _halves(v)
    return real(1.0) - tail if v > real(0.0) else tail


@register_jitable(**ELEMENT)
def normal_pdf(v: Any) -> Any:
    """The normal density, in the type of v."""
    _, e = _halves(v)
    return type(v)(_DENSITY) * e
