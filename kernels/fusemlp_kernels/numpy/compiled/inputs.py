"""Rows of the batch before the first layer: inputs as sines and cosines of octaves, and inputs that raise the loss.

Of t = 2**k x, which is exact, the rest r by the period 2 is exact too, and so is its way to the nearest zero of
the sine, at most 1/2; that to the zero of the cosine is rounded where the cosine is flat. There sin(pi s) = s p(s s),
with p found by Remez' algorithm in 50 digits: its relative error is at most 5.4e-9 in float32 (five terms), 2.6e-19 in
float64 (nine). With u the unit of rounding, the roundings of p add up to 9.2 u, and half of that reaches the wave,
beside one of its own and 0.6 u of the argument: a wave is within 6 u of the true one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.compiler import ELEMENTWISE, EXACT, block, clear, copy, elements
from fusemlp_kernels.numpy.compiled.functions import maximum, minimum, of_type, sign
from fusemlp_kernels.numpy.compiled.random import draw
from fusemlp_kernels.numpy.compiled.vectors import sum_of_squares
from fusemlp_kernels.philox import START, WORD

_WORD, _RANDOM, _LOWEST = np.uint64(WORD), np.uint64(START), np.uint32(9)

# sin(pi s) / s by powers of s s, from the highest one down.
_SINGLE = (0.0775603869352, -0.5982421263871, 2.5500697262913, -5.1677096847986, 3.1415926368954)
_DOUBLE = (
    7.6947272216022183e-07, -2.1903185413581440e-05, 4.6629968987877281e-04, -7.3704304787633087e-03,
    8.2145886569892886e-02, -5.9926452931873826e-01, 2.5501640398772939e+00, -5.1677127800499695e+00,
    3.1415926535897932e+00,
)  # fmt: skip


@of_type
def _sine(real: Any) -> Any:
    """sin(pi v) for v from -1/2 to 1/2."""
    last, *others = map(real, _SINGLE if real is np.float32 else _DOUBLE)
    rest = tuple(others)

    def sine(v: Any) -> Any:
        z = v * v
        p = last
        for factor in rest:
            p = p * z + factor
        return p * v

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


@register_jitable(**ELEMENTWISE)
def _by_sign(adv: Any, x: Any, dx: Any, count: int, length: float, eps: float, low: float, high: float) -> None:
    real = x.dtype.type
    step, most, least, lowest, highest = real(length), real(eps), real(-eps), real(low), real(high)
    for i in range(np.uintp(count)):
        d = minimum(maximum(adv[i] - x[i] + step * sign(dx[i]), least), most)
        adv[i] = minimum(maximum(x[i] + d, lowest), highest)


@register_jitable(**ELEMENTWISE)
def _by_gradient(adv: Any, x: Any, dx: Any, count: int, factor: float) -> None:
    """adv becomes what it has moved, and a step; the factor of a tiny gradient is no float32."""
    real = x.dtype.type
    for i in range(np.uintp(count)):
        adv[i] = adv[i] - x[i] + real(factor * np.float64(dx[i]))


@register_jitable(**ELEMENTWISE)
def _moved(adv: Any, x: Any, count: int, factor: float, low: float, high: float) -> None:
    """``x + factor * adv``, within the bounds."""
    real = x.dtype.type
    scale, lowest, highest = real(factor), real(low), real(high)
    for i in range(np.uintp(count)):
        adv[i] = minimum(maximum(x[i] + scale * adv[i], lowest), highest)


@register_jitable(**EXACT)
def _within(adv: Any, x: Any, count: int, eps: float, low: float, high: float) -> None:
    """x moved by adv, shortened to the norm eps."""
    length = math.sqrt(sum_of_squares(adv, count, 1.0))
    # a NaN stays
    _moved(adv, x, count, 1.0 if length <= eps else eps / length, low, high)


@register_jitable(**EXACT)
def _move(call: Any, adv: Any, x: Any, dx: Any) -> None:
    """A step of a row of inputs, projected."""
    count, length, eps, low, high = call.k, call.length, call.largest, call.low, call.high
    if call.round:
        norm = math.sqrt(sum_of_squares(dx, count, 1.0))
        _by_gradient(adv, x, dx, count, length / norm if norm != 0.0 else 0.0)
        _within(adv, x, count, eps, low, high)
    else:
        _by_sign(adv, x, dx, count, length, eps, low, high)


@register_jitable(**ELEMENTWISE)
def _scattered(adv: Any, lanes: Any, count: int, eps: float) -> None:
    """``eps`` times the numbers of ``philox.uniform``."""
    real = adv.dtype.type
    for i in range(np.uintp(count)):
        adv[i] = real(eps) * (real(np.int32(lanes[i] >> _LOWEST)) * real(2.0**-22) + real(2.0**-23 - 1.0))


@register_jitable(**EXACT)
def _start(call: Any, adv: Any, x: Any, memory: int, row: int, batch_index: int) -> None:
    """The random start of a row of inputs; memory: an address, two uint64 of any contents for each four columns
    begun."""
    count, eps, low, high = call.k, call.largest, call.low, call.high
    k0, k1, c3 = np.uint64(call.key_low), np.uint64(call.key_high), np.uint64(batch_index) & _WORD
    draw(elements(np.uint64, memory), (count + 3) // 4, np.uint64(row) & _WORD, _RANDOM, c3, k0, k1)
    _scattered(adv, elements(np.uint32, memory), count, eps)
    if call.round:
        _within(adv, x, count, eps, low, high)
    else:
        _moved(adv, x, count, 1.0, low, high)


@register_jitable(**EXACT)
def perturb_rows(call: Any, like: Any, rows: Any, first: int, count: int, batch_index: int, lanes: int) -> None:
    """Rows of the inputs that an attack moves; lanes is an address."""
    columns, size = call.k, like.itemsize
    for i in range(first, first + count):
        adv = block(like, call.out, i, columns)
        if rows[i] < 0:
            clear(adv, columns)
            continue
        x = block(like, call.x, rows[i], columns)
        if call.dz:
            _move(call, adv, x, block(like, call.dz, i, columns))
        elif call.drawn:
            _start(call, adv, x, lanes, i, batch_index)
        else:
            copy(like, call.out + size * i * columns, call.x + size * rows[i] * columns, columns)
