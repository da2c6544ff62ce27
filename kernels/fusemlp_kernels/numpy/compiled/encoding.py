"""Rows of inputs as sines and cosines of octaves, and the gradient by the inputs.

With t = 2**k x, which is exact, the rest r of t by the period 2 is exact too, and so is its way to the nearest zero of
the sine, at most 1/2; that to the zero of the cosine is rounded where the cosine is flat. There sin(pi s) = s p(s s),
with p found by Remez' algorithm in 50 digits: its relative error is at most 5.4e-9 in float32 (five terms), 2.6e-19 in
float64 (nine). With u the unit of rounding, the roundings of p add up to 9.2 u, and half of that reaches the wave,
beside one of its own and 0.6 u of the argument: a wave is within 6 u of the true one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from fusemlp_kernels.numpy.compiled.compiler import ELEMENT, ELEMENTWISE, EXACT, block, clear

# sin(pi s) / s by powers of s s, from the highest one down.
_SINGLE = (0.0775603869352, -0.5982421263871, 2.5500697262913, -5.1677096847986, 3.1415926368954)
_DOUBLE = (
    7.6947272216022183e-07, -2.1903185413581440e-05, 4.6629968987877281e-04, -7.3704304787633087e-03,
    8.2145886569892886e-02, -5.9926452931873826e-01, 2.5501640398772939e+00, -5.1677127800499695e+00,
    3.1415926535897932e+00,
)  # fmt: skip


def _sine(s: Any) -> Any:
    """sin(pi s) for s from -1/2 to 1/2."""
    raise AssertionError("compiled code only")


@overload(_sine, jit_options=ELEMENT)
def _sine_of(s: Any) -> Any:
    real = np.float32 if s == types.float32 else np.float64
    last, *others = map(real, _SINGLE if real is np.float32 else _DOUBLE)
    rest = tuple(others)

    def sine(s: Any) -> Any:
        z = s * s
        p = last
        for factor in rest:
            p = p * z + factor
        return p * s

    return sine


@register_jitable(**ELEMENTWISE)
def _waves(y: Any, columns: int) -> None:
    """Of t in each column: sin(pi t) in the even ones, cos(pi t) in the odd ones."""
    real = y.dtype.type
    half, one, two = real(0.5), real(1.0), real(2.0)
    for j in range(np.uintp(columns)):
        t = y[j]
        r = t - two * np.rint(half * t)
        a = abs(r)
        near = math.copysign(a if a <= half else one - a, r)
        y[j] = _sine(half - a if j & 1 else near)


@register_jitable(**EXACT)
def _spread(y: Any, x: Any, inputs: int, octaves: int) -> None:
    """2**k x for each input and octave, twice."""
    at = 0
    for i in range(inputs):
        t = x[i]
        for _ in range(octaves):
            y[at], y[at + 1] = t, t
            t += t
            at += 2


@register_jitable(**EXACT)
def encode_rows(call: Any, like: Any, rows: Any, first: int, count: int, task: int) -> None:
    """Rows of the waves of inputs, or with dz of the gradient by the inputs; a row that is not there is zeros."""
    inputs, octaves, real = call.k, call.octaves, like.dtype.type
    waves = 2 * inputs * octaves
    before, size = call.n - waves, like.itemsize
    for i in range(first, first + count):
        # without its gradient the waves go where they belong
        y = block(like, call.z if call.dz else call.out + size * (i * call.n + before), task if call.dz else 0, waves)
        if rows[i] < 0:
            for j in range(waves):
                y[j] = 0
        else:
            _spread(y, block(like, call.x, rows[i], inputs), inputs, octaves)
        _waves(y, waves)
        if call.dz:
            dy, dx = block(like, call.dz, i, call.n), block(like, call.out, i, inputs)
            for j in range(inputs):
                total, factor = dy[j] if before else real(0.0), real(math.pi)
                for k in range(j * octaves, (j + 1) * octaves):
                    by_sine, by_cosine = dy[before + 2 * k], dy[before + 2 * k + 1]
                    total += factor * (y[2 * k + 1] * by_sine - y[2 * k] * by_cosine)
                    factor += factor
                dx[j] = total
        elif before and rows[i] < 0:
            clear(block(like, call.out, i, call.n), before)
        elif before:
            x, out = block(like, call.x, rows[i], inputs), block(like, call.out, i, call.n)
            for j in range(before):
                out[j] = x[j]
