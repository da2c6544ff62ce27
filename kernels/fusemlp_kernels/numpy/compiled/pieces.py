"""Pieces of a tensor: their gradient, the penalty, noise and update after it, and the weights in panels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.contract import BATCH_INDEX, LEARNING_RATE, UPDATE_COUNT
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.calls import lanes_of, shard_rows
from fusemlp_kernels.numpy.compiled.noise import WORDS, add_noise
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.pointwise_numba import update_average
from fusemlp_kernels.numpy.compiled.products import column_sums
from fusemlp_kernels.numpy.compiled.updates import penalise, squares, update_part
from fusemlp_kernels.numpy.compiled.views import call as call_function
from fusemlp_kernels.numpy.compiled.views import elements


@register_jitable(**EXACT)
def _add_products(
    call: Any, integers: Any, like: Any, dz: int, x: int, count: int, piece: Any, alpha: float, beta: float
) -> None:  # fmt: skip
    """A piece of ``out = alpha * dz.T @ x + beta * out``, DEPTH rows of the batch at a time; dz and x are addresses."""
    size, outputs, inputs, top, left = like.itemsize, call[t.N], call[t.K], piece[t.TOP], piece[t.LEFT]
    for first in range(0, max(count, 1), t.DEPTH):
        call_function(
            integers[t.AT_PRODUCT], dz + size * (first * outputs + top), 1, outputs,
            x + size * (first * inputs + left), t.PANEL, inputs, min(t.DEPTH, count - first),
            integers[t.AT_ZEROS], 0, alpha, beta,
            call[t.OUT] + size * (top * inputs + left), inputs, piece[t.BOTTOM] - top, piece[t.RIGHT] - left,
        )  # fmt: skip
        beta = 1.0


@register_jitable(**EXACT)
def _gradient(call: Any, integers: Any, like: Any, counters: Any, tensor_factors: Any, hyper: Any, piece: Any) -> None:
    """A piece of the gradient by a weight matrix, a bias or a slope; with DESCENDS straight into the parameter."""
    size, outputs = like.itemsize, call[t.N]
    count = shard_rows(call, integers, counters)
    alpha, beta = 1.0, 0.0 if counters[BATCH_INDEX] % integers[t.ACCUMULATE] == 0 else 1.0
    if call[t.DESCENDS]:
        start = call[t.FIRST] * t.TENSOR_FACTORS
        alpha = -hyper[LEARNING_RATE] * tensor_factors[start + t.LR_FACTOR]
        beta = 1.0 + alpha * tensor_factors[start + t.DECAY]
    top, left = piece[t.TOP], piece[t.LEFT]
    if call[t.KIND_OF_ROW] == t.WEIGHT and call[t.MEMBERS]:
        # the rows of the weights of one member after another, each by its own rows of the batch
        inputs, members = call[t.K], call[t.MEMBERS]
        own = outputs // members
        while top < piece[t.BOTTOM]:
            member = top // own
            stop = min(piece[t.BOTTOM], (member + 1) * own)
            call_function(
                integers[t.AT_PRODUCT], call[t.DZ] + size * top, 1, outputs,
                call[t.X] + size * (member * inputs + left), t.PANEL, members * inputs, count // members,
                integers[t.AT_ZEROS], 0, alpha, beta,
                call[t.OUT] + size * (top * inputs + left), inputs, stop - top, piece[t.RIGHT] - left,
            )  # fmt: skip
            top = stop
    elif call[t.KIND_OF_ROW] == t.WEIGHT:
        _add_products(call, integers, like, call[t.DZ], call[t.X], count, piece, alpha, beta)
    else:
        # a bias, or a slope, whose gradient is one number already
        rows = count if call[t.KIND_OF_ROW] == t.BIAS else 1
        if call[t.MEMBERS]:
            rows = count // call[t.MEMBERS]
        if call[t.PARTS]:
            rows = integers[t.BLOCKS]
        column_sums(
            like, call[t.OUT] + size * left, call[t.DZ] + size * left, call[t.SUMS] + size * left, rows, outputs,
            piece[t.RIGHT] - left, alpha, beta,
        )  # fmt: skip


@register_jitable(**EXACT)
def _pack(call: Any, w: int, integers: Any, piece: Any) -> None:
    """A piece of the weights at an address into its panel."""
    call_function(
        integers[t.AT_PACK], w, call[t.K], call[t.PANELS], piece[t.TOP], piece[t.BOTTOM], piece[t.LEFT], piece[t.RIGHT]
    )


@register_jitable(**EXACT)
def _update(
    call: Any, integers: Any, factors: Any, like: Any, counters: Any, hyper: Any, tensor_factors: Any, grads: Any,
    at: int, tensor: int, first: int, width: int, scale: float, task: int,
) -> None:  # fmt: skip
    """Update elements of a tensor from ``first`` on, which lie ``at`` bytes into their arrays, by grads times scale."""
    if integers[t.NOISY]:
        lanes = lanes_of(integers, task)
        add_noise(
            grads, elements(np.uint64, lanes), elements(np.float64, lanes + 8 * WORDS), first, width, tensor,
            counters[UPDATE_COUNT], integers[t.NOISE_LOW], integers[t.NOISE_HIGH], factors[t.DEVIATION],
            factors[t.SHARED_BY],
        )  # fmt: skip
    params = elements(like, call[t.PARAM] + at)
    update_part(
        params, grads, elements(like, call[t.STATE0] + at), elements(like, call[t.STATE1] + at), width, tensor_factors,
        tensor, integers, factors, hyper, scale,
    )  # fmt: skip
    if call[t.AVERAGE]:
        update_average(params, elements(like, call[t.AVERAGE] + at), width, hyper)


@register_jitable(**EXACT)
def _after_gradient(
    call: Any, numbers: Any, integers: Any, factors: Any, like: Any, counters: Any, hyper: Any, tensor_factors: Any,
    piece: Any, task: int,
) -> float:  # fmt: skip
    """Penalty, noise and update of a piece, and its panels for the next step; the sum of squares of a penalty."""
    left, width = piece[t.LEFT], piece[t.RIGHT] - piece[t.LEFT]
    inputs, top, bottom = call[t.K], piece[t.TOP], piece[t.BOTTOM]
    if call[t.KIND_OF_ROW] != t.WEIGHT:
        inputs, top, bottom = 0, 0, 1
    elif width == inputs:
        # whole rows lie together
        width, bottom = width * (bottom - top), top + 1
    total = 0.0
    for row in range(top, bottom):
        first = row * inputs + left
        at = like.itemsize * first
        if call[t.PULLS]:
            shares = elements(factors, integers[t.AT_PARTIALS])[t.SHARES_PART]
            if shares != 0.0:
                pull, w = numbers[t.STRENGTH] / shares, elements(like, call[t.W] + at)
                total += pull * penalise(w, elements(like, call[t.OUT] + at), width, pull)
        if call[t.PARAM]:
            grads = elements(like, call[t.OUT] + at)
            _update(
                call, integers, factors, like, counters, hyper, tensor_factors, grads, at, call[t.FIRST], first, width,
                1.0, task,
            )  # fmt: skip
    if call[t.PANELS] and integers[t.STEP] + 1 < integers[t.STEPS]:
        _pack(call, call[t.W], integers, piece)
    return total


@register_jitable(**EXACT)
def by_piece(
    call: Any, numbers: Any, integers: Any, factors: Any, like: Any, counters: Any, hyper: Any, tensors: Any,
    tensor_factors: Any, piece: Any, task: int,
) -> float:  # fmt: skip
    """A piece of a tensor; what it adds to the sums of its phase."""
    kind = call[t.KIND_OF_ROW]
    if kind in (t.NORM, t.UPDATE):
        at = like.itemsize * (tensors[piece[t.TOP] * t.TENSOR_COLUMNS + t.OFFSET] + piece[t.LEFT])
        grads, width = elements(like, call[t.DZ] + at), piece[t.RIGHT] - piece[t.LEFT]
        if kind == t.NORM:
            return squares(grads, width, 1.0)
        _update(
            call, integers, factors, like, counters, hyper, tensor_factors, grads, at, piece[t.TOP], piece[t.LEFT],
            width, factors[t.SCALE], task,
        )  # fmt: skip
        return 0.0
    if kind == t.PACK:
        _pack(call, call[t.W], integers, piece)
        return 0.0
    _gradient(call, integers, like, counters, tensor_factors, hyper, piece)
    return _after_gradient(call, numbers, integers, factors, like, counters, hyper, tensor_factors, piece, task)
