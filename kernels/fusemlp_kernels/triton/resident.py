"""Many whole training steps in one launch: a program trains one model, from its first step to its last.

A step is a table of phases, which the binder writes from the calls of the step's program. Between two barriers no
thread reads an element that another writes; only a tile reads and writes its own. The forward pass of a layer, the
loss, the gradient of a layer, the update, and the clock each lie between two barriers, and ``dz`` has its own memory.
Plain loads read the values that a launch has written.

The kernel is not specialised on a network: it reads widths, activations and places from tables, so that all its
variants can be compiled ahead. Numbers that may differ from model to model (seed, rates, the optimizer's and the
loss's numbers, the number of steps) stand in tables with a row a model.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import BATCH_INDEX
from fusemlp_kernels.triton.gradients import input_gradient, whole
from fusemlp_kernels.triton.linear import affine_tile, affine_tile_of_parts, store_outputs
from fusemlp_kernels.triton.loss import gradient_scale, ignored_label, loss_of_rows, normaliser_of, record_loss
from fusemlp_kernels.triton.pointwise_triton import PRELU, needs_z
from fusemlp_kernels.triton.resident_tables import (
    ACTIVATION,
    BACKWARD,
    COUNTERS,
    DRAW_COLUMNS,
    DRAW_LAYER,
    DZ,
    ELEMENTWISE,
    ENTROPY,
    FIXED_SLOPE,
    FORWARD,
    GRADIENTS,
    KEEP_SCALE,
    KEPT_SHARE,
    KEY0,
    KEY1,
    LAYER_COLUMNS,
    LAYER_K,
    LAYER_N,
    LIVE_COLUMNS,
    MEASURE,
    MEASURES,
    NORMALISER,
    PENALTY,
    PITCH,
    PULL,
    RATIO,
    SETTING_COLUMNS,
    SHARE_COLUMNS,
    SLOPE,
    STATS,
    STEPS,
    STRENGTH,
    SWEEP,
    THRESHOLD,
    UPDATE,
    W_ROW,
    W_TASK,
    X_ROW,
    B,
    W,
    Y,
    Z,
    batch_of,
    input_of,
    model_of,
    number,
    phase_of,
    rows_of,
)
from fusemlp_kernels.triton.resident_update import gradients_of_layer, tick, update_from_memory
from fusemlp_kernels.triton.tiles import masked_width

# Rows whose weights are added at a time: at most the threads of one warp, so that the warps exchange nothing.
CHUNK: tl.constexpr = tl.constexpr(32)


@triton.jit
def slope_of(row, shares, params):
    """Return the slope below zero: prelu's own, else that of the table."""
    learned = number(row, ACTIVATION) == PRELU
    fixed = tl.load(shares + FIXED_SLOPE)
    return tl.load(params + tl.load(row + SLOPE), mask=learned, other=fixed)


@triton.jit(noinline=True)
def forward(
    compute, weights, params, rows, layers, draws, shares, counters, live, M, depth, work_size, size, rows_size, index,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Compute a hidden layer's outputs."""
    model = model_of(live)
    count, batch_index = rows_of(counters, model, M), tl.load(counters + model * COUNTERS + BATCH_INDEX)
    rows = batch_of(rows, counters, model, rows_size)
    work, arena = model * work_size, whole(model * size, True)
    weights += arena
    params += arena
    row = layers + index * LAYER_COLUMNS
    draw, share = draws + (model * depth + index) * DRAW_COLUMNS, shares + (model * depth + index) * SHARE_COLUMNS
    N, K, pitch, activation = number(row, LAYER_N), number(row, LAYER_K), number(row, PITCH), number(row, ACTIVATION)
    x, x_row, w_row = input_of(compute, row, index, work), number(row, X_ROW), number(row, W_ROW)
    w, b = weights + whole(tl.load(row + W), True), params + tl.load(row + B)
    y, z = compute + whole(work + tl.load(row + Y), True), compute + whole(work + tl.load(row + Z), True)
    slope = slope_of(row, share, params)
    layer, key0, key1 = number(draw, DRAW_LAYER), number(draw, KEY0), number(draw, KEY1)
    threshold, keep_scale = number(draw, THRESHOLD), tl.load(share + KEEP_SCALE)
    store_z = needs_z(activation)
    gather = tl.where(index == 0, 1, 0)
    for first in range(0, count, BM):
        for col in range(0, N, BN):
            acc = affine_tile_of_parts(
                x, w, b, rows, first, col, count, N, K, x_row, w_row, 1, gather, BM, BN, BK, SPLIT, PRODUCT
            )
            store_outputs(
                acc, y, z, first, col, batch_index, count, N, pitch, 1, pitch, 1, activation, slope, store_z,
                layer, key0, key1, threshold, keep_scale, BM, BN, True, PARTS,
            )  # fmt: skip


@triton.jit
def squares_of_weights(params, layers, depth):
    """Return the sum of the squares of all trained weight matrices, float64."""
    squares = tl.zeros((SWEEP,), tl.float32)
    for index in range(depth):
        row = layers + index * LAYER_COLUMNS
        # between the rows lie zeros
        length = tl.where(number(row, W_TASK) >= 0, number(row, LAYER_N) * number(row, W_ROW), 0)
        w = params + whole(tl.load(row + W), True)
        for done in range(0, length, SWEEP):
            at = done + tl.arange(0, SWEEP)
            p = tl.load(w + at, mask=at < length, other=0.0)
            squares += p * p
    return tl.sum(squares.to(tl.float64), axis=0)


@triton.jit(noinline=True)
def measure(
    measured, params, rows, labels, weight, class_weight, layers, settings, counters, live, M, depth, size, rows_size,
    label_step, weight_step, ignored_low, ignored_high,
):  # fmt: skip
    """Store the divisor of the loss of the model's batch, and its ridge, in ``measured``."""
    model = model_of(live)
    outputs = number(layers + (depth - 1) * LAYER_COLUMNS, LAYER_N)
    found = normaliser_of(
        batch_of(rows, counters, model, rows_size), rows_of(counters, model, M), labels, label_step, weight,
        weight_step, class_weight, ignored_label(ignored_low, ignored_high), outputs,
        settings + model * SETTING_COLUMNS, 1, CHUNK,
    )  # fmt: skip
    row = measured + model * MEASURES
    tl.store(row + NORMALISER, found * tl.load(row + RATIO))
    strength = tl.load(row + STRENGTH)
    if strength != 0.0:
        # false for NaN, which would get into the padding of the weights
        exists = (found < 0.0) | (found > 0.0)
        pull = tl.where(exists, strength / tl.where(exists, found, 1.0), 0.0)
        squares = squares_of_weights(params + whole(model * size, True), layers, depth)
        tl.store(row + PULL, pull)
        tl.store(row + PENALTY, 0.5 * pull * squares)


@triton.jit(noinline=True)
def output_tile(
    compute, weights, params, rows, layers, shares, labels, target, weight, class_weight, settings, hyper, counters,
    live, measured, M, depth, work_size, size, rows_size, label_step, target_row, target_col, weight_step,
    ignored_low, ignored_high, first,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Compute the output layer and dz of the batch's rows from ``first`` on; BN >= N. Return the sum of the losses, the
    right answers, the answers asked for, and prelu's gradient."""
    model, index = model_of(live), depth - 1
    count = rows_of(counters, model, M)
    rows = batch_of(rows, counters, model, rows_size)
    work, arena = model * work_size, whole(model * size, True)
    weights += arena
    params += arena
    settings += model * SETTING_COLUMNS
    row = layers + index * LAYER_COLUMNS
    N, K, pitch, activation = number(row, LAYER_N), number(row, LAYER_K), number(row, PITCH), number(row, ACTIVATION)
    x, x_row, w_row = input_of(compute, row, index, work), number(row, X_ROW), number(row, W_ROW)
    w, b = weights + whole(tl.load(row + W), True), params + tl.load(row + B)
    gather = tl.where(index == 0, 1, 0)
    z = affine_tile(x, w, b, rows, first, 0, count, N, K, x_row, 1, w_row, 1, 1, gather, BM, BN, BK, PRODUCT, True)
    slope = slope_of(row, shares + (model * depth + index) * SHARE_COLUMNS, params)
    scale = gradient_scale(hyper, tl.load(measured + model * MEASURES + NORMALISER), settings, 0)
    at_m, at_n = first + tl.arange(0, BM), tl.arange(0, BN)
    result, loss, right, scored, below = loss_of_rows(
        z, at_m, at_n, count, scale, rows, labels, label_step, target, target_row, target_col, weight,
        weight_step, class_weight, ignored_label(ignored_low, ignored_high), N, settings, 1, activation, slope,
        BM, CROSS_ENTROPY,
    )  # fmt: skip
    dz = compute + whole(work + tl.load(row + DZ), True)
    dz_at = dz + at_m.to(tl.int64)[:, None] * (pitch // 8 * 8) + at_n[None, :]
    stored = (at_m < count)[:, None] & (at_n < masked_width(N, True))[None, :]
    tl.store(dz_at, result.to(dz.dtype.element_ty), mask=stored)
    return loss, right, scored, below


@triton.jit(noinline=True)
def output_and_loss(
    compute, weights, params, rows, layers, shares, slopes, labels, target, weight, class_weight, settings, hyper,
    stats, counters, live, measured, M, depth, work_size, size, rows_size, label_step, target_row, target_col,
    weight_step, ignored_low, ignored_high,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Compute the output layer and dz, and add the loss to ``stats``."""
    total, right, scored = tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    below = tl.full((), 0.0, tl.float32)
    for first in range(0, rows_of(counters, model_of(live), M), BM):
        loss, hits, asked, part = output_tile(
            compute, weights, params, rows, layers, shares, labels, target, weight, class_weight, settings, hyper,
            counters, live, measured, M, depth, work_size, size, rows_size, label_step, target_row, target_col,
            weight_step, ignored_low, ignored_high, first, BM, BN, BK, PRODUCT, CROSS_ENTROPY,
        )  # fmt: skip
        total += loss.to(tl.float64)
        right += hits
        scored += asked
        below += part
    model = model_of(live)
    tl.store(slopes + model * depth + depth - 1, below)
    record_loss(
        total, right.to(tl.float64), scored.to(tl.float64), stats + model * STATS, settings + model * SETTING_COLUMNS,
        tl.load(measured + model * MEASURES + NORMALISER),
    )  # fmt: skip


@triton.jit(noinline=True)
def backward(
    compute, weights, params, layers, draws, shares, slopes, counters, live, M, depth, work_size, size, index,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Compute dz of layer ``index`` from dz of the layer above it, and the gradient by its slope."""
    model = model_of(live)
    count, batch_index = rows_of(counters, model, M), tl.load(counters + model * COUNTERS + BATCH_INDEX)
    work, arena = model * work_size, whole(model * size, True)
    weights += arena
    params += arena
    slopes += model * depth
    row = layers + index * LAYER_COLUMNS
    above = row + LAYER_COLUMNS
    draw, share = draws + (model * depth + index) * DRAW_COLUMNS, shares + (model * depth + index) * SHARE_COLUMNS
    N, K, pitch, activation = number(above, LAYER_N), number(row, LAYER_N), number(row, PITCH), number(row, ACTIVATION)
    dz, dz_row = compute + whole(work + tl.load(above + DZ), True), number(above, PITCH)
    w, w_row = weights + whole(tl.load(above + W), True), number(above, W_ROW)
    y, out = compute + whole(work + tl.load(row + Z), True), compute + whole(work + tl.load(row + DZ), True)
    slope = slope_of(row, share, params)
    layer, key0, key1 = number(draw, DRAW_LAYER), number(draw, KEY0), number(draw, KEY1)
    threshold, keep_scale = number(draw, THRESHOLD), tl.load(share + KEEP_SCALE)
    kept_share = tl.load(share + KEPT_SHARE)
    below = tl.full((), 0.0, tl.float32)
    for tile_m in range(tl.cdiv(count, BM)):
        for tile_k in range(tl.cdiv(K, BK)):
            below += input_gradient(
                dz, w, y, out, tile_m, tile_k, batch_index, count, N, K, dz_row, 1, w_row, 1, pitch, 1, pitch, 1,
                activation, slope, layer, key0, key1, threshold, keep_scale, kept_share,
                BM, BN, BK, PRODUCT, True, PARTS, 1,
            )  # fmt: skip
    tl.store(slopes + index, below)


NUMBERS = [
    "M", "phases", "order0", "order1", "order2", "order3", "depth", "trained", "work_size", "size", "rows_size",
    "rates_size", "label_step", "target_row", "target_col", "weight_step", "ignored_low", "ignored_high", "stored",
    "shadowed",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS)
def resident_kernel(
    compute, weights, parameters, grads, first, second, average, rows, labels, target, weight, class_weight, slopes,
    measured, layers, draws, shares, settings, rules, tensors, segments, counters, hyper, rates, stats, epoch_stats,
    live, M, phases, order0: tl.int64, order1: tl.int64, order2: tl.int64, order3: tl.int64, depth, trained, work_size,
    size, rows_size, rates_size, label_step, target_row, target_col, weight_step, ignored_low, ignored_high, stored,
    shadowed,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr,
    BO: tl.constexpr, OUTPUTS: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The steps that ``live`` names, a program for each of its entries.

    ``compute``: the workspaces, ``work_size`` elements a model; ``weights``: the weights of the products, which are the
    parameters, or with ``shadowed`` the parameters rounded. Arenas have ``size`` elements a model, ``rows``
    ``rows_size``, ``rates`` ``rates_size``. ``order0`` to ``order3``: the ``phases`` of a step. ``stored``: gradients
    go through memory. ``epoch_stats``: the sums of each epoch; ``live`` has the number of epochs.
    """
    for _ in range(number(live + tl.program_id(0) * LIVE_COLUMNS, STEPS)):
        for place in range(phases):
            kind, index = phase_of(place, order0, order1, order2, order3)
            if kind == MEASURE:
                measure(
                    measured, parameters, rows, labels, weight, class_weight, layers, settings, counters, live, M,
                    depth, size, rows_size, label_step, weight_step, ignored_low, ignored_high,
                )  # fmt: skip
            elif kind == FORWARD:
                forward(
                    compute, weights, parameters, rows, layers, draws, shares, counters, live, M, depth, work_size,
                    size, rows_size, index, BM, BN, BK, SPLIT, PRODUCT, PARTS,
                )  # fmt: skip
            elif kind == ENTROPY:
                output_and_loss(
                    compute, weights, parameters, rows, layers, shares, slopes, labels, target, weight, class_weight,
                    settings, hyper, stats, counters, live, measured, M, depth, work_size, size, rows_size, label_step,
                    target_row, target_col, weight_step, ignored_low, ignored_high, BO, OUTPUTS, BK, PRODUCT, True,
                )  # fmt: skip
            elif kind == ELEMENTWISE:
                output_and_loss(
                    compute, weights, parameters, rows, layers, shares, slopes, labels, target, weight, class_weight,
                    settings, hyper, stats, counters, live, measured, M, depth, work_size, size, rows_size, label_step,
                    target_row, target_col, weight_step, ignored_low, ignored_high, BO, OUTPUTS, BK, PRODUCT, False,
                )  # fmt: skip
            elif kind == BACKWARD:
                backward(
                    compute, weights, parameters, layers, draws, shares, slopes, counters, live, M, depth, work_size,
                    size, index, BM, BN, BK, PRODUCT, PARTS,
                )  # fmt: skip
            elif kind == GRADIENTS:
                gradients_of_layer(
                    compute, weights, parameters, grads, first, second, rows, layers, slopes, counters, hyper, rules,
                    tensors, live, measured, M, depth, trained, work_size, size, rows_size, index, stored, shadowed,
                    WN, WK, BM, OUTPUTS, PRODUCT, PARTS,
                )  # fmt: skip
            elif kind == UPDATE:
                update_from_memory(
                    weights, parameters, grads, first, second, average, segments, counters, hyper, rules, tensors,
                    live, trained, size, shadowed,
                )  # fmt: skip
            else:
                tick(counters, hyper, rates, stats, epoch_stats, rules, live, measured, M, rates_size)
            tl.debug_barrier()
