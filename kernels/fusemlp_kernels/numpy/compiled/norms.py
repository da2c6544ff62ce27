"""Rows of the batch normalised, with their factors, activation and dropout, and back; and the sum of two matrices."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.compiler import ELEMENTWISE, EXACT, block, clear, elements
from fusemlp_kernels.numpy.compiled.layers import affine, derive_affine, lanes_of, mask_and_scale, slope_of
from fusemlp_kernels.numpy.compiled.pointwise_numba import activate, multiply_by_derivative
from fusemlp_kernels.numpy.compiled.random import drop
from fusemlp_kernels.numpy.compiled.sums import sum_of, sum_of_products


@register_jitable(**ELEMENTWISE)
def _shift_and_scale(out: Any, values: Any, shift: Any, factor: Any, columns: int) -> None:
    """``out = (values - shift) * factor``; out may be values."""
    for j in range(np.uintp(columns)):
        out[j] = (values[j] - shift) * factor


@register_jitable(**ELEMENTWISE)
def _without_direction(d: Any, n: Any, share: Any, columns: int) -> None:
    for j in range(np.uintp(columns)):
        d[j] -= n[j] * share


@register_jitable(**EXACT)
def _normalised(call: Any, n: Any, x: Any) -> Any:
    """A row x normalised, in n; what its differences from their mean were multiplied by."""
    real, columns = x.dtype.type, call.n
    mean = sum_of(x, columns) / real(columns) if call.norm == t.LAYER_NORM else real(0.0)
    _shift_and_scale(n, x, mean, real(1.0), columns)
    factor = real(1.0) / real(math.sqrt(sum_of_products(n, n, columns) / real(columns) + real(call.option)))
    _shift_and_scale(n, n, real(0.0), factor, columns)
    return factor


@register_jitable(**EXACT)
def _forward(call: Any, like: Any, n: Any, z: Any, y: Any, x: Any) -> Any:
    """A row normalised in n, its pre-activation in z, its output in y; the factor of ``_normalised``."""
    factor = like.dtype.type(1.0)
    if call.norm:
        factor = _normalised(call, n, x)
        affine(y, z, n, elements(like, call.by_s), elements(like, call.b), call.n)
    else:
        for j in range(call.n):
            y[j] = x[j]
            z[j] = x[j]
    if call.activation != t.IDENTITY:
        activate(call.activation, y, z, call.n, slope_of(call, like))
    return factor


@register_jitable(**EXACT)
def normalise_rows(call: Any, head: Any, like: Any, first: int, count: int, batch_index: int, task: int) -> None:
    """Rows of ``y = dropout(act(n * g + b))``."""
    columns = call.n
    n, z = block(like, call.z, 3 * task, columns), block(like, call.z, 3 * task + 1, columns)
    for i in range(first, first + count):
        y = block(like, call.out, i, columns)
        _forward(call, like, n, z, y, block(like, call.x, i, columns))
        if call.keep:
            drop(
                call,
                y,
                elements(np.uint8, call.keep + i * columns),
                lanes_of(head, task),
                call.shard + i,
                1,
                batch_index,
            )


@register_jitable(**EXACT)
def grad_normalise_rows(call: Any, like: Any, first: int, count: int, task: int) -> None:
    """Rows of the gradient by x, and this task's sums for g and b."""
    columns = call.n
    n, z = block(like, call.z, 3 * task, columns), block(like, call.z, 3 * task + 1, columns)
    h = block(like, call.z, 3 * task + 2, columns)
    by_g, by_b = block(like, call.sum_s, task, columns), block(like, call.sum_b, task, columns)
    if call.norm:
        clear(by_g, columns)
        clear(by_b, columns)
    for i in range(first, first + count):
        factor = _forward(call, like, n, z, h, block(like, call.x, i, columns))
        dy, d = block(like, call.dz, i, columns), block(like, call.out, i, columns)
        for j in range(columns):
            d[j] = dy[j]
        if call.keep:
            mask_and_scale(d, elements(np.uint8, call.keep + i * columns), columns, 1.0 / (1.0 - call.rate))
        slope = slope_of(call, like)
        if call.norm:
            width, g = like.dtype.type(columns), elements(like, call.by_s)
            derive_affine(d, h, z, n, g, by_g, by_b, columns, call.activation, slope)
            _without_direction(d, n, sum_of_products(d, n, columns) / width, columns)
            mean = sum_of(d, columns) / width if call.norm == t.LAYER_NORM else like.dtype.type(0.0)
            _shift_and_scale(d, d, mean, factor, columns)
        elif call.activation != t.IDENTITY:
            multiply_by_derivative(call.activation, d, h, z, columns, slope, 1.0)


@register_jitable(**ELEMENTWISE)
def add_rows(call: Any, like: Any, first: int, count: int) -> None:
    """Rows of ``out = x + y``."""
    a, b = block(like, call.x, first, call.n), block(like, call.y, first, call.n)
    out = block(like, call.out, first, call.n)
    for j in range(np.uintp(count * call.n)):
        out[j] = a[j] + b[j]
