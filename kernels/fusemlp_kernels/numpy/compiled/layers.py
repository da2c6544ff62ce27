"""Rows of the batch through a layer and back: products, activations and dropout; and rows that are normalised, or
multiplied by the factors that members who share weights have of their own."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels import contract as c
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.compiler import (
    ELEMENTWISE,
    EXACT,
    block,
    call_function,
    clear,
    copy,
    elements,
    part,
    prefetch,
)
from fusemlp_kernels.numpy.compiled.pointwise_numba import activate, multiply_by_derivative
from fusemlp_kernels.numpy.compiled.random import drop, mask
from fusemlp_kernels.numpy.compiled.vectors import sum_of, sum_of_products


@register_jitable(**EXACT)
def batch_rows(head: Any, counters: Any) -> int:
    """The number of rows of the batch."""
    return head.batch if head.batch != t.COUNTED else counters[c.ROW_COUNT]


@register_jitable(**EXACT)
def shard_rows(call: Any, head: Any, counters: Any) -> int:
    """The number of rows of the batch that a call has: all, or those of its shard."""
    whole = batch_rows(head, counters)
    return max(0, min(head.shard_rows, whole - call.shard)) if head.shard_rows else whole


@register_jitable(**EXACT)
def slope_of(call: Any, like: Any) -> float:
    """The slope of a call's activation."""
    if call.slope:
        return float(elements(like, call.slope)[0])
    return call.fixed_slope


@register_jitable(**EXACT)
def lanes_of(head: Any, task: int) -> int:
    """The address of a task's memory for random words."""
    return head.lanes + 8 * head.lanes_row * task


# Rows of at least this many bytes are copied by a loop: memcpy takes a tenth longer for a batch that no cache holds.
LONG = 2048


@register_jitable(**EXACT)
def gather(call: Any, like: Any, rows: Any, first: int, count: int, following: Any, left: int) -> None:
    """Rows of ``out = x[rows]``, flat (M, K); zeros where a row is -1. ``following``: the rows of the next batch, of
    which the first ``left`` are asked for."""
    columns, size = call.k, like.itemsize
    x, out = call.x, call.out
    for i in range(first, first + count):
        row = elements(like, out + size * i * columns)
        if rows[i] < 0:
            clear(row, columns)
        elif size * columns >= LONG:
            source = elements(like, x + size * rows[i] * columns)
            for j in range(columns):
                row[j] = source[j]
        else:
            copy(like, out + size * i * columns, x + size * rows[i] * columns, columns)
        if i < left and following[i] >= 0:
            at = x + size * following[i] * columns
            for line in range(0, size * columns, t.LINE):
                prefetch(at + line)


@register_jitable(**EXACT)
def product(call: Any, head: Any, like: Any, first: int, count: int, room: int) -> None:
    """The product of a layer, or of the gradient by its inputs, for rows of the batch."""
    inputs, outputs, size = call.k, call.n, like.itemsize
    if call.kind == t.Kind.BACKWARD:
        call_function(
            head.product, call.dz + size * first * outputs, outputs, 1, call.w, t.PANEL, inputs,
            outputs, head.zeros, 0, 1.0 / (1.0 - call.rate), 0.0, call.out + size * first * inputs,
            inputs, count, inputs, room,
        )  # fmt: skip
        return
    x, z = call.x + size * first * inputs, call.z + size * first * outputs
    if call.panels:
        call_function(
            head.product, x, inputs, 1, call.panels, t.PANEL * inputs, t.PANEL, inputs, call.b, 1, 1.0,
            0.0, z, outputs, count, outputs, room,
        )  # fmt: skip
    else:
        call_function(head.dots, x, call.w, inputs, call.b, z, count, outputs)


@register_jitable(**EXACT)
def activate_rows(call: Any, like: Any, first: int, count: int, batch_index: int, lanes: int) -> None:
    """The output of a layer from its pre-activation; lanes is an address."""
    outputs = call.n
    y, z = block(like, call.y, first, outputs), block(like, call.z, first, outputs)
    if call.activation != t.IDENTITY:
        activate(call.activation, y, z, count * outputs, slope_of(call, like))
    if call.keep:
        keep = elements(np.uint8, call.keep + first * outputs)
        drop(call, y, keep, lanes, call.shard + first, count, batch_index)


@register_jitable(**EXACT)
def derive(call: Any, like: Any, partials: Any, y: Any, z: Any, dz: Any, count: int, undo_scale: float) -> None:
    """The gradient by ``count`` pre-activations from that by the outputs, in dz, and that by prelu's slope."""
    if call.activation != t.IDENTITY:
        slope = slope_of(call, like)
        dslope = multiply_by_derivative(call.activation, dz, y, z, count, slope, undo_scale)
        if call.dslope:
            partials[call.slope_part] = dslope


@register_jitable(**EXACT)
def derive_rows(call: Any, like: Any, partials: Any, first: int, count: int) -> None:
    """dz of the layer before, from its product."""
    inputs = call.k
    out = block(like, call.out, first, inputs)
    if call.keep:
        mask(out, elements(np.uint8, call.keep + first * inputs), count * inputs)
    y, z = block(like, call.y, first, inputs), block(like, call.z, first, inputs)
    derive(call, like, partials, y, z, out, count * inputs, 1.0 - call.rate)


@register_jitable(**ELEMENTWISE)
def _affine(y: Any, z: Any, x: Any, s: Any, b: Any, count: int) -> None:
    """``x * s + b``, in y and in z."""
    for j in range(np.uintp(count)):
        value = x[j] * s[j] + b[j]
        y[j] = value
        z[j] = value


@register_jitable(**ELEMENTWISE)
def _scale(y: Any, x: Any, r: Any, count: int) -> None:
    """``y = x * r``; y may be x."""
    for j in range(np.uintp(count)):
        y[j] = x[j] * r[j]


@register_jitable(**ELEMENTWISE)
def _shift_and_scale(out: Any, values: Any, shift: Any, factor: Any, columns: int) -> None:
    """``out = (values - shift) * factor``; out may be values."""
    for j in range(np.uintp(columns)):
        out[j] = (values[j] - shift) * factor


@register_jitable(**ELEMENTWISE)
def _without_direction(d: Any, n: Any, share: Any, columns: int) -> None:
    for j in range(np.uintp(columns)):
        d[j] -= n[j] * share


@register_jitable(**ELEMENTWISE)
def _mask_and_scale(values: Any, keep: Any, count: int, factor: float) -> None:
    """Values grow by ``factor`` where ``keep`` is set, and become zero elsewhere."""
    real = values.dtype.type
    grown, zero = real(factor), real(0.0)
    for j in range(np.uintp(count)):
        values[j] = values[j] * grown if keep[j] else zero


@register_jitable(**ELEMENTWISE)
def _add_products(sums: Any, a: Any, b: Any, count: int) -> None:
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
def _normalised(call: Any, n: Any, x: Any) -> Any:
    """A row x normalised, in n; what its differences from their mean were multiplied by."""
    real, columns = x.dtype.type, call.n
    mean = sum_of(x, columns) / real(columns) if call.centred else real(0.0)
    _shift_and_scale(n, x, mean, real(1.0), columns)
    factor = real(1.0) / real(math.sqrt(sum_of_products(n, n, columns) / real(columns) + real(call.norm)))
    _shift_and_scale(n, n, real(0.0), factor, columns)
    return factor


@register_jitable(**EXACT)
def _forward(call: Any, like: Any, member: int, x: Any, n: Any, z: Any, h: Any, activates: bool) -> Any:
    """A row of x normalised in n, its pre-activation in z, and if it ``activates`` act(z) in h; the factor of n."""
    columns, factor = call.n, like.dtype.type(1.0)
    if call.norm:
        factor = _normalised(call, n, x)
    if call.by_s:
        s, b = block(like, call.by_s, member, columns), block(like, call.b, member, columns)
        _affine(h, z, n if call.norm else x, s, b, columns)
    else:
        for j in range(columns):
            h[j] = x[j]
            z[j] = x[j]
    if call.activation != t.IDENTITY and activates:
        activate(call.activation, h, z, columns, slope_of(call, like))
    return factor


@register_jitable(**EXACT)
def scale_rows(call: Any, head: Any, like: Any, rows: Any, first: int, count: int, batch_index: int, task: int) -> None:
    """Rows of ``y = dropout(act(n * s + b)) * r``, n being x or normalised; zeros where there is no x."""
    columns = call.n
    n, z = block(like, call.z, 4 * task, columns), block(like, call.z, 4 * task + 1, columns)
    for i in range(first, first + count):
        y, member = block(like, call.out, i, columns), i % call.members if call.members else 0
        if rows[i] < 0:
            clear(y, columns)
            continue
        x = block(like, call.x, rows[i], columns)
        if call.by_r and not call.by_s:
            _scale(y, x, block(like, call.by_r, member, columns), columns)
            continue
        _forward(call, like, member, x, n, z, y, True)
        if call.keep:
            keep = elements(np.uint8, call.keep + i * columns)
            drop(call, y, keep, lanes_of(head, task), call.shard + i, 1, batch_index)
        if call.by_r:
            _scale(y, y, block(like, call.by_r, member, columns), columns)


@register_jitable(**EXACT)
def scale_rows_backward(call: Any, like: Any, rows: Any, first: int, count: int, task: int) -> None:
    """Rows of the gradient by x, and this task's sums for s, b and r."""
    columns = call.n
    every = call.members * columns if call.members else columns
    n, z = block(like, call.z, 4 * task, columns), block(like, call.z, 4 * task + 1, columns)
    h, unread = block(like, call.z, 4 * task + 2, columns), block(like, call.z, 4 * task + 3, columns)
    by_s, by_b = block(like, call.sum_s, task, every), block(like, call.sum_b, task, every)
    by_r = block(like, call.sum_r, task, every)
    if call.by_s:
        clear(by_s, every)
        clear(by_b, every)
    if call.by_r:
        clear(by_r, every)
    for i in range(first, first + count):
        if rows[i] < 0:
            continue
        dy, x = block(like, call.dz, i, columns), block(like, call.x, rows[i], columns)
        member = i % call.members if call.members else 0
        if call.by_r and not call.by_s:
            _add_products(part(by_r, member * columns), dy, x, columns)
            continue
        activates = call.by_r != 0 or call.activation not in t.NEEDS_Z
        factor = _forward(call, like, member, x, n, z, h, activates)
        d = block(like, call.out, i, columns) if call.out else unread
        if call.keep or not call.by_r:
            for j in range(columns):
                d[j] = dy[j]
        if call.keep:
            # the mask is of h too: without it the sum for r would have what was dropped
            _mask_and_scale(d, elements(np.uint8, call.keep + i * columns), columns, 1.0 / (1.0 - call.rate))
            dy = d
        if call.by_r:
            _add_products(part(by_r, member * columns), dy, h, columns)
            _scale(d, dy, block(like, call.by_r, member, columns), columns)
        if call.activation != t.IDENTITY:
            multiply_by_derivative(call.activation, d, h, z, columns, slope_of(call, like), 1.0)
        if call.by_s:
            sum_s, sum_b = part(by_s, member * columns), part(by_b, member * columns)
            s = block(like, call.by_s, member, columns)
            _sum_and_scale(d, n if call.norm else x, s, sum_s, sum_b, columns)
        if call.norm:
            width = like.dtype.type(columns)
            _without_direction(d, n, sum_of_products(d, n, columns) / width, columns)
            mean = sum_of(d, columns) / width if call.centred else like.dtype.type(0.0)
            _shift_and_scale(d, d, mean, factor, columns)


@register_jitable(**ELEMENTWISE)
def add_rows(call: Any, like: Any, first: int, count: int) -> None:
    """Rows of ``out = x + y``."""
    a, b = block(like, call.x, first, call.n), block(like, call.y, first, call.n)
    out = block(like, call.out, first, call.n)
    for j in range(np.uintp(count * call.n)):
        out[j] = a[j] + b[j]


@register_jitable(**EXACT)
def heads(call: Any, head: Any, like: Any, first: int, count: int, room: int) -> None:
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
                count // members, stop - at, room,
            )  # fmt: skip
            at = stop


@register_jitable(**EXACT)
def heads_backward(call: Any, head: Any, like: Any, first: int, count: int, room: int) -> None:
    """The gradient by the inputs of each member's outputs."""
    inputs, outputs, members, size = call.k, call.n, call.members, like.itemsize
    for member in range(members):
        call_function(
            head.product, call.dz + size * (first + member) * outputs, members * outputs, 1,
            call.w + size * member * outputs * inputs, t.PANEL, inputs, outputs, head.zeros, 0, 1.0, 0.0,
            call.out + size * (first + member) * inputs, members * inputs, count // members, inputs, room,
        )  # fmt: skip
