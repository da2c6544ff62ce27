"""Members that share weights: their own factors and biases around a product, and sums over each member's rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.calls import block, clear, lanes_of, slope_of
from fusemlp_kernels.numpy.compiled.masks import drop
from fusemlp_kernels.numpy.compiled.options import ELEMENTWISE, EXACT
from fusemlp_kernels.numpy.compiled.pointwise_numba import activate, multiply_by_derivative
from fusemlp_kernels.numpy.compiled.views import call as call_function
from fusemlp_kernels.numpy.compiled.views import elements, part


@register_jitable(**ELEMENTWISE)
def _affine(y: Any, z: Any, x: Any, s: Any, b: Any, count: int) -> None:
    """``x * s + b``, in y and in z."""
    for j in range(np.uintp(count)):
        value = x[j] * s[j] + b[j]
        y[j] = value
        z[j] = value


@register_jitable(**ELEMENTWISE)
def scale(y: Any, x: Any, r: Any, count: int) -> None:
    """``y = x * r``; y may be x."""
    for j in range(np.uintp(count)):
        y[j] = x[j] * r[j]


@register_jitable(**EXACT)
def activated(y: Any, z: Any, x: Any, s: Any, b: Any, count: int, activation: int, slope: float) -> None:
    """``y = act(z)`` with ``z = x * s + b``."""
    _affine(y, z, x, s, b, count)
    activate(activation, y, z, count, slope)


@register_jitable(**ELEMENTWISE)
def kept(values: Any, keep: Any, count: int, factor: float) -> None:
    """Values grow by ``factor`` where ``keep`` is set, and become zero elsewhere."""
    real = values.dtype.type
    grown, zero = real(factor), real(0.0)
    for j in range(np.uintp(count)):
        values[j] = values[j] * grown if keep[j] else zero


@register_jitable(**ELEMENTWISE)
def add_products(sums: Any, a: Any, b: Any, count: int) -> None:
    """``sums += a * b``."""
    for j in range(np.uintp(count)):
        sums[j] += a[j] * b[j]


@register_jitable(**ELEMENTWISE)
def _sum_and_scale(dz: Any, x: Any, s: Any, by_s: Any, by_b: Any, count: int) -> None:
    for j in range(np.uintp(count)):
        by_s[j] += dz[j] * x[j]
        by_b[j] += dz[j]
        dz[j] = dz[j] * s[j]


@register_jitable(**EXACT)
def derive(
    dz: Any, h: Any, z: Any, x: Any, s: Any, by_s: Any, by_b: Any, count: int, activation: int, slope: float
) -> None:  # fmt: skip
    """From the gradient by h = act(z), in dz, to that by x, in its place; the sums by s and b grow."""
    multiply_by_derivative(activation, dz, h, z, count, slope, 1.0)
    _sum_and_scale(dz, x, s, by_s, by_b, count)


@register_jitable(**EXACT)
def affine_rows(
    call: Any, numbers: Any, integers: Any, like: Any, rows: Any, first: int, count: int, batch_index: int, task: int
) -> None:  # fmt: skip
    """Rows of ``y = dropout(act(x * s + b)) * r``; zeros where there is no x."""
    columns, members, size = call[t.N], call[t.MEMBERS], like.itemsize
    lanes = lanes_of(integers, task)
    z = block(like, call[t.Z], 2 * task, columns)
    for i in range(first, first + count):
        y = block(like, call[t.OUT], i, columns)
        if rows[i] < 0:
            clear(y, columns)
            continue
        x, own = call[t.X] + size * rows[i] * columns, i % members
        if call[t.BY_S]:
            s, b = block(like, call[t.BY_S], own, columns), block(like, call[t.B], own, columns)
            activated(y, z, elements(like, x), s, b, columns, call[t.ACTIVATION], slope_of(call, numbers, like))
            if call[t.KEEP]:
                drop(call, numbers, y, elements(np.uint8, call[t.KEEP] + i * columns), lanes, i, 1, batch_index)
            if call[t.BY_R]:
                scale(y, y, block(like, call[t.BY_R], own, columns), columns)
        else:
            scale(y, elements(like, x), block(like, call[t.BY_R], own, columns), columns)


@register_jitable(**EXACT)
def backward_rows(
    call: Any, numbers: Any, like: Any, rows: Any, first: int, count: int, task: int
) -> None:  # fmt: skip
    """Rows of the gradient by x, and this task's sums for r, s and b."""
    columns, members, size = call[t.N], call[t.MEMBERS], like.itemsize
    every = members * columns
    z, h = block(like, call[t.Z], 2 * task, columns), block(like, call[t.Z], 2 * task + 1, columns)
    by_r, by_s = block(like, call[t.SUM_R], task, every), block(like, call[t.SUM_S], task, every)
    by_b = block(like, call[t.SUM_B], task, every)
    if call[t.BY_R]:
        clear(by_r, every)
    if call[t.BY_S]:
        clear(by_s, every)
        clear(by_b, every)
    for i in range(first, first + count):
        if rows[i] < 0:
            continue
        dy, own = block(like, call[t.DZ], i, columns), i % members
        x = elements(like, call[t.X] + size * rows[i] * columns)
        if call[t.BY_S]:
            s, b = block(like, call[t.BY_S], own, columns), block(like, call[t.B], own, columns)
            slope = slope_of(call, numbers, like)
            activated(h, z, x, s, b, columns, call[t.ACTIVATION], slope)
            dz = block(like, call[t.OUT], i, columns)
            if call[t.KEEP]:
                # the mask is of h too: without it the sum for r would have what was dropped
                for j in range(columns):
                    dz[j] = dy[j]
                kept(dz, elements(np.uint8, call[t.KEEP] + i * columns), columns, 1.0 / (1.0 - numbers[t.RATE]))
                dy = dz
            if call[t.BY_R]:
                add_products(part(by_r, own * columns), dy, h, columns)
                scale(dz, dy, block(like, call[t.BY_R], own, columns), columns)
            elif not call[t.KEEP]:
                for j in range(columns):
                    dz[j] = dy[j]
            derive(
                dz, h, z, x, s, part(by_s, own * columns), part(by_b, own * columns), columns, call[t.ACTIVATION], slope
            )  # fmt: skip
        else:
            add_products(part(by_r, own * columns), dy, x, columns)


@register_jitable(**EXACT)
def heads(call: Any, integers: Any, like: Any, first: int, count: int) -> None:
    """The outputs of each member by its own rows of the weights, which lie in panels."""
    inputs, outputs, members, size = call[t.K], call[t.N], call[t.MEMBERS], like.itemsize
    for member in range(members):
        at, end = member * outputs, (member + 1) * outputs
        while at < end:
            stop = min(end, (at // t.PANEL + 1) * t.PANEL)
            call_function(
                integers[t.AT_PRODUCT], call[t.X] + size * (first + member) * inputs, members * inputs, 1,
                call[t.PANELS] + size * (at // t.PANEL * t.PANEL * inputs + at % t.PANEL), t.PANEL * inputs, t.PANEL,
                inputs, call[t.B] + size * at, 1, 1.0, 0.0,
                call[t.Z] + size * ((first + member) * outputs + at - member * outputs), members * outputs,
                count // members, stop - at,
            )  # fmt: skip
            at = stop


@register_jitable(**EXACT)
def heads_backward(call: Any, integers: Any, like: Any, first: int, count: int) -> None:
    """The gradient by the inputs of each member's outputs."""
    inputs, outputs, members, size = call[t.K], call[t.N], call[t.MEMBERS], like.itemsize
    for member in range(members):
        call_function(
            integers[t.AT_PRODUCT], call[t.DZ] + size * (first + member) * outputs, members * outputs, 1,
            call[t.W] + size * member * outputs * inputs, t.PANEL, inputs, outputs, integers[t.AT_ZEROS], 0, 1.0, 0.0,
            call[t.OUT] + size * (first + member) * inputs, members * inputs, count // members, inputs,
        )  # fmt: skip
