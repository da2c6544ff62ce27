"""Rows of the batch through a layer and back: the memory that a call names, products, activations and dropout."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.contract import ROW_COUNT
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.philox import drop, mask
from fusemlp_kernels.numpy.compiled.pointwise_numba import activate, multiply_by_derivative
from fusemlp_kernels.numpy.compiled.tiles import copy, prefetch
from fusemlp_kernels.numpy.compiled.views import call as call_function
from fusemlp_kernels.numpy.compiled.views import elements


@register_jitable(**EXACT)
def batch_rows(head: Any, counters: Any) -> int:
    """The number of rows of the batch."""
    return head.batch if head.batch != t.COUNTED else counters[ROW_COUNT]


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


@register_jitable(**EXACT)
def block(like: Any, address: int, first: int, columns: int) -> Any:
    """The rows of an array from ``first`` on."""
    return elements(like, address + like.itemsize * first * columns)


@register_jitable(**EXACT)
def clear(values: Any, count: int) -> None:
    """Zeros."""
    for j in range(np.uintp(count)):
        values[j] = 0


# Rows of at least this many bytes are copied by a loop: memcpy takes a tenth longer for a batch that no cache holds.
LONG = 2048
LINE = 64


@register_jitable(**EXACT)
def gather(
    call: Any, like: Any, rows: Any, first: int, count: int, following: Any, left: int
) -> None:  # fmt: skip
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
            for line in range(0, size * columns, LINE):
                prefetch(at + line)


@register_jitable(**EXACT)
def product(call: Any, head: Any, like: Any, first: int, count: int) -> None:
    """The product of a layer, or of the gradient by its inputs, for rows of the batch."""
    inputs, outputs, size = call.k, call.n, like.itemsize
    if call.kind == t.BACKWARD:
        call_function(
            head.product, call.dz + size * first * outputs, outputs, 1, call.w, t.PANEL, inputs,
            outputs, head.zeros, 0, 1.0 / (1.0 - call.rate), 0.0, call.out + size * first * inputs,
            inputs, count, inputs,
        )  # fmt: skip
        return
    x, z = call.x + size * first * inputs, call.z + size * first * outputs
    if call.panels:
        call_function(
            head.product, x, inputs, 1, call.panels, t.PANEL * inputs, t.PANEL, inputs, call.b, 1, 1.0,
            0.0, z, outputs, count, outputs,
        )  # fmt: skip
    else:
        call_function(head.dots, x, call.w, inputs, call.b, z, count, outputs)


@register_jitable(**EXACT)
def activate_rows(
    call: Any, like: Any, first: int, count: int, batch_index: int, lanes: int
) -> None:  # fmt: skip
    """The output of a layer from its pre-activation; lanes is an address."""
    outputs = call.n
    y, z = block(like, call.y, first, outputs), block(like, call.z, first, outputs)
    if call.activation != t.IDENTITY:
        activate(call.activation, y, z, count * outputs, slope_of(call, like))
    if call.keep:
        keep = elements(np.uint8, call.keep + first * outputs)
        drop(call, y, keep, lanes, call.shard + first, count, batch_index)


@register_jitable(**EXACT)
def derive(
    call: Any, like: Any, partials: Any, y: Any, z: Any, dz: Any, count: int, undo_scale: float
) -> None:  # fmt: skip
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
