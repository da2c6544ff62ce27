"""Members that share weights: their own factors and biases around a product, and sums over each member's rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.layers import block, clear, lanes_of, slope_of
from fusemlp_kernels.numpy.compiled.options import ELEMENTWISE, EXACT
from fusemlp_kernels.numpy.compiled.philox import drop
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
    call: Any, head: Any, like: Any, rows: Any, first: int, count: int, batch_index: int, task: int
) -> None:  # fmt: skip
    """Rows of ``y = dropout(act(x * s + b)) * r``; zeros where there is no x."""
    columns, members, size = call.n, call.members, like.itemsize
    lanes = lanes_of(head, task)
    z = block(like, call.z, 2 * task, columns)
    for i in range(first, first + count):
        y = block(like, call.out, i, columns)
        if rows[i] < 0:
            clear(y, columns)
            continue
        x, member = call.x + size * rows[i] * columns, i % members
        if call.by_s:
            s, b = block(like, call.by_s, member, columns), block(like, call.b, member, columns)
            activated(y, z, elements(like, x), s, b, columns, call.activation, slope_of(call, like))
            if call.keep:
                drop(call, y, elements(np.uint8, call.keep + i * columns), lanes, i, 1, batch_index)
            if call.by_r:
                scale(y, y, block(like, call.by_r, member, columns), columns)
        else:
            scale(y, elements(like, x), block(like, call.by_r, member, columns), columns)


@register_jitable(**EXACT)
def backward_rows(
    call: Any, like: Any, rows: Any, first: int, count: int, task: int
) -> None:  # fmt: skip
    """Rows of the gradient by x, and this task's sums for r, s and b."""
    columns, members, size = call.n, call.members, like.itemsize
    every = members * columns
    z, h = block(like, call.z, 2 * task, columns), block(like, call.z, 2 * task + 1, columns)
    by_r, by_s = block(like, call.sum_r, task, every), block(like, call.sum_s, task, every)
    by_b = block(like, call.sum_b, task, every)
    if call.by_r:
        clear(by_r, every)
    if call.by_s:
        clear(by_s, every)
        clear(by_b, every)
    for i in range(first, first + count):
        if rows[i] < 0:
            continue
        dy, member = block(like, call.dz, i, columns), i % members
        x = elements(like, call.x + size * rows[i] * columns)
        if call.by_s:
            s, b = block(like, call.by_s, member, columns), block(like, call.b, member, columns)
            slope = slope_of(call, like)
            activated(h, z, x, s, b, columns, call.activation, slope)
            dz = block(like, call.out, i, columns)
            if call.keep:
                # the mask is of h too: without it the sum for r would have what was dropped
                for j in range(columns):
                    dz[j] = dy[j]
                kept(dz, elements(np.uint8, call.keep + i * columns), columns, 1.0 / (1.0 - call.rate))
                dy = dz
            if call.by_r:
                add_products(part(by_r, member * columns), dy, h, columns)
                scale(dz, dy, block(like, call.by_r, member, columns), columns)
            elif not call.keep:
                for j in range(columns):
                    dz[j] = dy[j]
            sum_s, sum_b = part(by_s, member * columns), part(by_b, member * columns)
            derive(dz, h, z, x, s, sum_s, sum_b, columns, call.activation, slope)
        else:
            add_products(part(by_r, member * columns), dy, x, columns)


@register_jitable(**EXACT)
def heads(call: Any, head: Any, like: Any, first: int, count: int) -> None:
    """The outputs of each member by its own rows of the weights, which lie in panels."""
    inputs, outputs, members, size = call.k, call.n, call.members, like.itemsize
    for member in range(members):
        at, end = member * outputs, (member + 1) * outputs
        while at < end:
            stop = min(end, (at // t.PANEL + 1) * t.PANEL)
            call_function(
                head.product, call.x + size * (first + member) * inputs, members * inputs, 1,
                call.panels + size * (at // t.PANEL * t.PANEL * inputs + at % t.PANEL), t.PANEL * inputs, t.PANEL,
                inputs, call.b + size * at, 1, 1.0, 0.0,
                call.z + size * ((first + member) * outputs + at - member * outputs), members * outputs,
                count // members, stop - at,
            )  # fmt: skip
            at = stop


@register_jitable(**EXACT)
def heads_backward(call: Any, head: Any, like: Any, first: int, count: int) -> None:
    """The gradient by the inputs of each member's outputs."""
    inputs, outputs, members, size = call.k, call.n, call.members, like.itemsize
    for member in range(members):
        call_function(
            head.product, call.dz + size * (first + member) * outputs, members * outputs, 1,
            call.w + size * member * outputs * inputs, t.PANEL, inputs, outputs, head.zeros, 0, 1.0, 0.0,
            call.out + size * (first + member) * inputs, members * inputs, count // members, inputs,
        )  # fmt: skip
