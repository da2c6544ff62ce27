"""Pieces of a tensor: their gradient, the penalty, clipping, noise and update after it, and the weights in panels."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels import contract as c
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.columns import gradient_of_columns, sum_columns
from fusemlp_kernels.numpy.compiled.compiler import (
    ELEMENTWISE,
    EXACT,
    call_function,
    elements,
    part,
    tensor_at,
)
from fusemlp_kernels.numpy.compiled.layers import lanes_of, shard_rows
from fusemlp_kernels.numpy.compiled.pointwise_numba import update_average, update_tensor
from fusemlp_kernels.numpy.compiled.random import WORDS, add_noise
from fusemlp_kernels.numpy.compiled.vectors import sum_of_products, sum_of_squares


@register_jitable(**ELEMENTWISE)
def _penalise(p: Any, g: Any, count: int, strength: Any) -> None:
    """Add the gradient of ``strength / 2 * sum(p ** 2)`` to g."""
    for i in range(np.uintp(count)):
        g[i] += strength * p[i]


@register_jitable(**EXACT)
def clip_factor(grads: Any, tensors: int, first: int, end: int, total: float, scale: float, limit: float) -> float:
    """The factor of clipping for the gradients of tensors first to before end, which ``scale`` multiplies already.

    ``total`` is the sum of their squares. The factor is NaN where a gradient is NaN.
    """
    norm = math.sqrt(total)
    if math.isinf(norm):
        # the squares overflowed, perhaps not the norm
        largest = 0.0
        for at in range(first, end):
            tensor = tensor_at(tensors, at)
            for i in range(tensor.offset, tensor.offset + tensor.size):
                largest = max(largest, abs(grads[i]))
        if not math.isinf(largest):
            total = 0.0
            for at in range(first, end):
                tensor = tensor_at(tensors, at)
                total += sum_of_squares(part(grads, tensor.offset), tensor.size, largest)
            norm = largest * math.sqrt(total)
    factor = limit / (norm * scale + 1e-6)
    return 1.0 if factor > 1.0 else factor


@register_jitable(**ELEMENTWISE)
def update_part(p: Any, g: Any, s0: Any, s1: Any, count: int, tensor: Any, rule: Any, hyper: Any, scale: float) -> None:
    """Update a part of a tensor from its gradient times ``scale``; g is written to."""
    if scale != 1.0:
        times = p.dtype.type(scale)
        for i in range(count):
            g[i] *= times
    update_tensor(p, g, s0, s1, count, hyper[c.LEARNING_RATE] * tensor.lr_factor, tensor.decay, rule, hyper)


@register_jitable(**EXACT)
def _add_products(
    call: Any, head: Any, like: Any, dz: int, x: int, count: int, piece: Any, bottom: int, alpha: float, beta: float,
    room: int,
) -> None:  # fmt: skip
    """A piece of ``out = alpha * dz.T @ x + beta * out``, DEPTH rows of the batch at a time; dz and x are addresses."""
    size, outputs, inputs, top, left = like.itemsize, call.n, call.k, piece.top, piece.left
    for first in range(0, max(count, 1), t.DEPTH):
        call_function(
            head.product, dz + size * (first * outputs + top), 1, outputs,
            x + size * (first * inputs + left), t.PANEL, inputs, min(t.DEPTH, count - first),
            head.zeros, 0, alpha, beta,
            call.out + size * (top * inputs + left), inputs, bottom - top, piece.right - left, room,
        )  # fmt: skip
        beta = 1.0


@register_jitable(**EXACT)
def _column_sums(
    like: Any, out: int, values: int, sums: int, rows: int, pitch: int, columns: int, alpha: float, beta: float
) -> None:
    """``out = alpha * values.sum(axis=0) + beta * out``: values (rows, columns) with rows ``pitch`` apart.

    out, values and sums are addresses; sums is scratch (columns,).
    """
    real, size = like.dtype.type, like.itemsize
    a, b = real(alpha), real(beta)
    result, total = elements(like, out), elements(like, sums)
    for j in range(columns):
        total[j] = 0
    for i in range(rows):
        row = elements(like, values + size * i * pitch)
        for j in range(columns):
            total[j] += row[j]
    for j in range(columns):
        result[j] = a * total[j] if beta == 0.0 else a * total[j] + b * result[j]


@register_jitable(**EXACT)
def _gradient(call: Any, head: Any, like: Any, counters: Any, piece: Any, bottom: int, room: int) -> None:
    """A piece of the gradient by a weight matrix, a bias or a slope; with DESCENDS straight into the parameter.

    A piece of a weight matrix goes down to ``bottom``.
    """
    size, outputs = like.itemsize, call.n
    count = shard_rows(call, head, counters)
    alpha, beta = 1.0, 0.0 if counters[c.BATCH_INDEX] % head.accumulate == 0 else 1.0
    if call.descends:
        tensor = tensor_at(head.tensors, call.first)
        alpha = -elements(np.float64, head.hyper)[c.LEARNING_RATE] * tensor.lr_factor
        beta = 1.0 + alpha * tensor.decay
    top, left = piece.top, piece.left
    if call.kind == t.Kind.WEIGHT and call.members:
        # the rows of the weights of one member after another, each by its outputs_each rows of the batch
        inputs, members = call.k, call.members
        outputs_each = outputs // members
        while top < bottom:
            member = top // outputs_each
            stop = min(bottom, (member + 1) * outputs_each)
            call_function(
                head.product, call.dz + size * top, 1, outputs,
                call.x + size * (member * inputs + left), t.PANEL, members * inputs, count // members,
                head.zeros, 0, alpha, beta,
                call.out + size * (top * inputs + left), inputs, stop - top, piece.right - left, room,
            )  # fmt: skip
            top = stop
    elif call.kind == t.Kind.WEIGHT:
        if bottom > top:
            _add_products(call, head, like, call.dz, call.x, count, piece, bottom, alpha, beta, room)
    else:
        # a bias, or a slope, whose gradient is one number already
        rows = count if call.kind == t.Kind.BIAS else 1
        if call.members:
            rows = count // call.members
        if call.parts:
            rows = head.blocks
        _column_sums(
            like, call.out + size * left, call.dz + size * left, call.sums + size * left, rows, outputs,
            piece.right - left, alpha, beta,
        )  # fmt: skip


@register_jitable(**EXACT)
def _pack(call: Any, w: int, head: Any, piece: Any) -> None:
    """A piece of the weights at an address into its panel."""
    call_function(head.pack, w, call.k, call.panels, piece.top, piece.bottom, piece.left, piece.right)


@register_jitable(**EXACT)
def _update(
    call: Any, head: Any, like: Any, counters: Any, grads: Any, at: int, tensor: int, first: int, width: int,
    scale: float, task: int,
) -> None:  # fmt: skip
    """Update elements of a tensor from ``first`` on, which lie ``at`` bytes into their arrays, by grads times scale."""
    if head.noisy:
        lanes = lanes_of(head, task)
        add_noise(
            grads, elements(np.uint64, lanes), elements(np.float64, lanes + 8 * WORDS), first, width, tensor,
            counters[c.UPDATE_COUNT], head.noise_low, head.noise_high, head.deviation, head.shared_by,
        )  # fmt: skip
    params, hyper = elements(like, call.param + at), elements(np.float64, head.hyper)
    update_part(
        params, grads, elements(like, call.state0 + at), elements(like, call.state1 + at), width,
        tensor_at(head.tensors, tensor), head, hyper, scale,
    )  # fmt: skip
    if call.average:
        update_average(params, elements(like, call.average + at), width, hyper)


@register_jitable(**EXACT)
def _after_gradient(call: Any, head: Any, like: Any, counters: Any, piece: Any, task: int) -> float:
    """Penalty, noise and update of a piece, and its panels for the next step; the sum of squares of a penalty."""
    left, width = piece.left, piece.right - piece.left
    inputs, top, bottom = call.k, piece.top, piece.bottom
    if call.kind not in (t.Kind.WEIGHT, t.Kind.CODES):
        inputs, top, bottom = 0, 0, 1
    elif width == inputs:
        # whole rows lie together
        width, bottom = width * (bottom - top), top + 1
    total = 0.0
    for row in range(top, bottom):
        first = row * inputs + left
        at = like.itemsize * first
        if call.pulls:
            shares = elements(np.float64, head.partials)[t.SHARES_PART]
            if shares != 0.0:
                pull, w = call.strength / shares, elements(like, call.w + at)
                _penalise(w, elements(like, call.out + at), width, like.dtype.type(pull))
                total += pull * float(sum_of_products(w, w, width))
        if call.param:
            _update(call, head, like, counters, elements(like, call.out + at), at, call.first, first, width, 1.0, task)
    if call.panels and head.step + 1 < head.steps:
        if call.kind == t.Kind.CODES:
            sum_columns(call, like, piece.top, piece.bottom)
        else:
            _pack(call, call.w, head, piece)
    return total


@register_jitable(**EXACT)
def by_piece(call: Any, head: Any, like: Any, counters: Any, piece: Any, bottom: int, task: int, room: int) -> float:
    """A piece of a tensor; what it adds to the sums of its phase. The gradient by a weight goes down to ``bottom``."""
    if call.kind in (t.Kind.NORM, t.Kind.UPDATE):
        at = like.itemsize * (tensor_at(head.tensors, piece.top).offset + piece.left)
        grads, width = elements(like, call.dz + at), piece.right - piece.left
        if call.kind == t.Kind.NORM:
            return sum_of_squares(grads, width, 1.0)
        _update(call, head, like, counters, grads, at, piece.top, piece.left, width, head.scale, task)
        return 0.0
    if call.kind == t.Kind.PACK:
        _pack(call, call.w, head, piece)
        return 0.0
    if call.kind == t.Kind.SUMS:
        sum_columns(call, like, piece.top, piece.bottom)
        return 0.0
    if call.kind == t.Kind.CODES:
        adds = counters[c.BATCH_INDEX] % head.accumulate != 0
        gradient_of_columns(call, head, like, piece, shard_rows(call, head, counters), adds, task)
    else:
        _gradient(call, head, like, counters, piece, bottom, room)
    return _after_gradient(call, head, like, counters, piece, task)
