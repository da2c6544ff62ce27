"""Inputs that raise the loss, within a norm and bounds: the rows of ``perturb``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.compiler import ELEMENTWISE, EXACT, block, clear, copy, elements
from fusemlp_kernels.numpy.compiled.functions import maximum, minimum, sign
from fusemlp_kernels.numpy.compiled.random import draw
from fusemlp_kernels.numpy.compiled.sums import sum_of_squares
from fusemlp_kernels.philox import START, WORD

_WORD, _RANDOM, _LOWEST = np.uint64(WORD), np.uint64(START), np.uint32(9)


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
