"""Bounds of a layer for inputs of a box, by its centre and radius, and their gradients (Gowal et al., 2018)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.calls import block, clear, slope_of
from fusemlp_kernels.numpy.compiled.functions import maximum, minimum
from fusemlp_kernels.numpy.compiled.options import ELEMENTWISE, EXACT
from fusemlp_kernels.numpy.compiled.pointwise_numba import activate, multiply_by_derivative
from fusemlp_kernels.numpy.compiled.views import elements, part


@register_jitable(**EXACT)
def _reached(numbers: Any, updates: int) -> float:
    """The share of the radius, and of the weight of the worst case, that is reached after this many updates."""
    risen = (updates - numbers[t.BEGUN]) / numbers[t.SPAN] - numbers[t.WARMUP]
    if numbers[t.RAMP] == 0.0:
        return 1.0 if risen >= 0.0 else 0.0
    return min(1.0, max(0.0, risen / numbers[t.RAMP]))


@register_jitable(**EXACT)
def _kappa(numbers: Any, updates: int) -> float:
    """The share of the plain loss."""
    return 1.0 - (1.0 - numbers[t.KAPPA]) * _reached(numbers, updates)


@register_jitable(**ELEMENTWISE)
def _centred(centre: Any, radius: Any, count: int) -> None:
    """Centres and radii of lower and upper ends, in place."""
    half = centre.dtype.type(0.5)
    for i in range(np.uintp(count)):
        low, high = centre[i], radius[i]
        centre[i] = half * low + half * high
        radius[i] = half * high - half * low


@register_jitable(**ELEMENTWISE)
def _ends(centre: Any, radius: Any, x: Any, reach: Any, count: int, eps: float) -> None:
    size = x.dtype.type(eps)
    for i in range(np.uintp(count)):
        centre[i] = x[i] - size * reach[i]
        radius[i] = x[i] + size * reach[i]


@register_jitable(**ELEMENTWISE)
def _within(values: Any, least: Any, most: Any, count: int) -> None:
    for i in range(np.uintp(count)):
        values[i] = minimum(maximum(values[i], least[i]), most[i])


@register_jitable(**EXACT)
def _ball(
    centre: Any, radius: Any, x: Any, reach: Any, least: Any, most: Any, count: int, bounded: bool, numbers: Any,
    updates: int,
) -> None:  # fmt: skip
    """The box of the inputs near a row."""
    _ends(centre, radius, x, reach, count, numbers[t.LARGEST] * _reached(numbers, updates))
    if bounded:
        _within(centre, least, most, count)
        _within(radius, least, most, count)
    _centred(centre, radius, count)


@register_jitable(**ELEMENTWISE)
def ends(zc: Any, zr: Any, low: Any, high: Any, count: int) -> None:
    """The ends of pre-activations, in place of their centres and radii, and in low and high."""
    for i in range(np.uintp(count)):
        least, most = zc[i] - zr[i], zc[i] + zr[i]
        zc[i] = low[i] = least
        zr[i] = high[i] = most


@register_jitable(**ELEMENTWISE)
def centred(centre: Any, radius: Any, low: Any, high: Any, count: int) -> None:
    """Centres and radii of outputs between low and high."""
    half = centre.dtype.type(0.5)
    for i in range(np.uintp(count)):
        centre[i] = half * low[i] + half * high[i]
        radius[i] = half * high[i] - half * low[i]


@register_jitable(**ELEMENTWISE)
def by_ends(dc: Any, dr: Any, count: int) -> None:
    """The gradients by the ends, in place of those by centres and radii."""
    half = dc.dtype.type(0.5)
    for i in range(np.uintp(count)):
        by_centre, by_radius = dc[i], dr[i]
        dc[i] = half * by_centre - half * by_radius
        dr[i] = half * by_centre + half * by_radius


@register_jitable(**ELEMENTWISE)
def by_centre(dlow: Any, dhigh: Any, count: int) -> None:
    """The gradients by centres and radii, in place of those by the ends."""
    for i in range(np.uintp(count)):
        by_low, by_high = dlow[i], dhigh[i]
        dlow[i] = by_high + by_low
        dhigh[i] = by_high - by_low


@register_jitable(**EXACT)
def _worst(zc: Any, zr: Any, out: Any, labels: Any, rows: Any, count: int, columns: int) -> None:
    """The logits of each row that are worst for its label, flat (count, columns)."""
    for i in range(count):
        start, label = i * columns, labels[rows[i]]
        for j in range(columns):
            at = start + j
            out[at] = zc[at] - zr[at] if j == label else zc[at] + zr[at]


@register_jitable(**EXACT)
def _from_worst(
    d: Any, dzc: Any, dzr: Any, dz: Any, labels: Any, rows: Any, count: int, columns: int, own: float
) -> None:  # fmt: skip
    """The gradients by centres and radii from that by the worst logits; ``own``: the share of the plain loss, whose dz
    is shrunk to it."""
    real = d.dtype.type
    for i in range(count):
        start, label = i * columns, labels[rows[i]]
        for j in range(columns):
            at = start + j
            # an infinity without a share is no NaN
            dzc[at] = real(1.0 - own) * d[at] if own < 1.0 else real(0.0)
            dzr[at] = -dzc[at] if j == label else dzc[at]
            dz[at] *= real(own)


@register_jitable(**ELEMENTWISE)
def magnitudes(out: Any, w: Any, count: int) -> None:
    for i in range(np.uintp(count)):
        out[i] = abs(w[i])


@register_jitable(**ELEMENTWISE)
def turn(out: Any, w: Any, count: int) -> None:
    """Elements change their sign where w is not above 0."""
    for i in range(np.uintp(count)):
        out[i] = out[i] if w[i] > 0 else -out[i]


@register_jitable(**EXACT)
def ball_rows(call: Any, numbers: Any, like: Any, rows: Any, first: int, count: int, updates: int) -> None:
    """The boxes of the inputs near rows."""
    columns = call[t.K]
    reach, least, most = elements(like, call[t.W]), elements(like, call[t.B]), elements(like, call[t.SUMS])
    for i in range(first, first + count):
        centre, radius = block(like, call[t.CENTRE], i, columns), block(like, call[t.RADIUS], i, columns)
        if rows[i] < 0:
            clear(centre, columns)
            clear(radius, columns)
            continue
        x = block(like, call[t.X], rows[i], columns)
        _ball(centre, radius, x, reach, least, most, columns, call[t.B] != 0, numbers, updates)


@register_jitable(**EXACT)
def box_rows(call: Any, numbers: Any, like: Any, forward: bool, first: int, count: int) -> None:
    """Boxes of outputs from those of pre-activations, or back."""
    outputs, slope = call[t.N], slope_of(call, numbers, like)
    size = count * outputs
    zc, zr = block(like, call[t.Z], first, outputs), block(like, call[t.Y], first, outputs)
    low, high = block(like, call[t.X], first, outputs), block(like, call[t.DZ], first, outputs)
    centre, radius = block(like, call[t.CENTRE], first, outputs), block(like, call[t.RADIUS], first, outputs)
    if forward:
        ends(zc, zr, low, high, size)
    else:
        by_ends(centre, radius, size)
    if call[t.ACTIVATION] != t.IDENTITY:
        if forward:
            activate(call[t.ACTIVATION], low, zc, size, slope)
            activate(call[t.ACTIVATION], high, zr, size, slope)
        else:
            multiply_by_derivative(call[t.ACTIVATION], centre, low, zc, size, slope, 1.0)
            multiply_by_derivative(call[t.ACTIVATION], radius, high, zr, size, slope, 1.0)
    if forward:
        centred(centre, radius, low, high, size)
    else:
        by_centre(centre, radius, size)


@register_jitable(**EXACT)
def worst_rows(
    call: Any, numbers: Any, like: Any, labels: Any, rows: Any, forward: bool, first: int, count: int, updates: int
) -> None:  # fmt: skip
    """The worst logits of rows, or the gradients through them."""
    outputs, own_rows = call[t.N], part(rows, first)
    if forward:
        zc, zr = block(like, call[t.Z], first, outputs), block(like, call[t.Y], first, outputs)
        _worst(zc, zr, block(like, call[t.OUT], first, outputs), labels, own_rows, count, outputs)
    else:
        dzc, dzr = block(like, call[t.CENTRE], first, outputs), block(like, call[t.RADIUS], first, outputs)
        d, dz = block(like, call[t.X], first, outputs), block(like, call[t.DZ], first, outputs)
        _from_worst(d, dzc, dzr, dz, labels, own_rows, count, outputs, _kappa(numbers, updates))
