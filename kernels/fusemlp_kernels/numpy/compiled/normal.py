"""The normal distribution, as products and sums and one quotient, which the compiler turns into vector code.

Phi(-a) = exp(-a a / 2) R(a) for a >= 0, the way of W. J. Cody, "Rational Chebyshev approximations for the error
function", Mathematics of Computation 23, 1969; but with one quotient of polynomials R for all a, whose coefficients
were found for it by Remez' algorithm in 60 digits. Its relative error is at most 6.3e-9 in float32 (degrees 4 and 5,
a <= 15), 5.2e-17 in float64 (9 and 10, a <= 39); beyond these ends the exponential is zero. All coefficients
are positive: nothing cancels. The values have an error of two units in the last place of 1, and the tail a
relative one that grows with the square of a, by the rounding of the exponent.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from fusemlp_kernels.numpy.compiled.functions import LOWEST, half_exp_within
from fusemlp_kernels.numpy.compiled.options import ELEMENT

_OPTIONS: Any = ELEMENT
# The coefficients of 2 R from the highest power of a down.
_SINGLE = (
    (0.008306401047, 0.08176185861, 0.3679370976, 0.87856527, 1.000000006),
    (0.01041041819, 0.10247941, 0.471407142, 1.205545832, 1.676450277, 1.0),
)
_DOUBLE = (
    (
        2.7717244317244824e-06,
        7.451531616360891e-05,
        0.0009809097042331833,
        0.008179132339976048,
        0.047247169795354704,
        0.19540609897938027,
        0.5786813287354142,
        1.188114422385208,
        1.5497625135384916,
        1.0,
    ),
    (
        3.473841415033371e-06,
        9.339109919225127e-05,
        0.0012328618413596634,
        0.010344413280676682,
        0.06043798659490269,
        0.25496945464863197,
        0.7820612425990161,
        1.7144137315821375,
        2.5612657772165086,
        2.3476470743413467,
        1.0,
    ),
)
_DENSITY = 2.0 / math.sqrt(2.0 * math.pi)


def _halves(v: Any) -> Any:
    """(Phi(-abs(v)), exp(-v v / 2) / 2)."""
    raise AssertionError("compiled code only")


def _quotient(real: Any, above: tuple[float, ...], below: tuple[float, ...]) -> Any:
    """``_halves`` for one type."""
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


@overload(_halves, jit_options=_OPTIONS)
def _halves_of(v: Any) -> Any:
    return _quotient(np.float32, *_SINGLE) if v == types.float32 else _quotient(np.float64, *_DOUBLE)


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
