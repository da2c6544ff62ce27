"""The tables of a launch of many steps, and the phases of its layers: forward, loss, backward, gradients.

A program of ``train_resident`` has a model to itself. On the whole card ``workers`` programs share a model: each takes
the tiles of a phase from its ``place`` on, every ``workers``-th, and reads what others have stored with ``CACHE``. A
phase with ``arrived`` waits until that has come to ``goal``, when its numbers are under way.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels import contract
from fusemlp_kernels.triton.clock import BATCH_INDEX, CODE, ROW_COUNT, ROW_OFFSET, RULE_FIELDS
from fusemlp_kernels.triton.functions import keep_mask
from fusemlp_kernels.triton.gradients import (
    TENSOR_FIELDS,
    column_sums,
    input_gradient,
    stored_gradient,
    whole,
)
from fusemlp_kernels.triton.linear import affine_tile, affine_tile_of_parts, store_outputs
from fusemlp_kernels.triton.loss import (
    PARTIALS,
    SETTING_FIELDS,
    gradient_scale,
    ignored_label,
    loss_of_rows,
    normaliser_of,
)
from fusemlp_kernels.triton.pointwise_triton import PRELU, RULES, derivative, needs_z, stored_update
from fusemlp_kernels.triton.tiles import batch_rows, masked_width, part_of, product, row_pitch, whole_sum

# A row of the table of layers, int64: widths; the first element and the row pitch of the input (the first layer's
# counts from ``compute``, the others' from the model's workspace); the first element of each parameter in the arenas
# (no slope: -1), and its row in the table of tensors (-1: frozen); the first element in the workspace of the output, of
# the values that give its derivative, and of dz, and their row pitch.
LAYER_FIELDS = (
    "N", "K", "x", "x_row", "w", "w_row", "b", "slope", "w_task", "b_task", "slope_task", "activation",
    "y", "z", "dz", "pitch",
)  # fmt: skip
(
    LAYER_N, LAYER_K, X, X_ROW, W, W_ROW, B, SLOPE, W_TASK, B_TASK, SLOPE_TASK, ACTIVATION, Y, Z, DZ, PITCH,
) = (tl.constexpr(place) for place in range(len(LAYER_FIELDS)))  # fmt: skip
LAYER_COLUMNS: tl.constexpr = tl.constexpr(len(LAYER_FIELDS))
# The phases of a step, a byte each, in words of 64 bits, which are arguments: no phase waits for its row of a table.
# A byte has the kind, and from this bit on the layer.
PHASES = ("measure", "forward", "entropy", "elementwise", "backward", "gradients", "update", "tick")
MEASURE, FORWARD, ENTROPY, ELEMENTWISE, BACKWARD, GRADIENTS, UPDATE, TICK = (
    tl.constexpr(place) for place in range(len(PHASES))
)
PHASE_LAYER: tl.constexpr = tl.constexpr(4)
PHASE_WORDS, PHASE_LAYERS = 4, 16
LAYERS: tl.constexpr = tl.constexpr(PHASE_LAYERS)
# By model and layer: the numbers of the dropout, int64 (threshold 0: none), and factors, float32.
DRAW_FIELDS = ("layer", "key0", "key1", "threshold")
DRAW_LAYER, KEY0, KEY1, THRESHOLD = (tl.constexpr(place) for place in range(len(DRAW_FIELDS)))
DRAW_COLUMNS: tl.constexpr = tl.constexpr(len(DRAW_FIELDS))
SHARE_FIELDS = ("keep_scale", "kept_share", "slope")
KEEP_SCALE, KEPT_SHARE, FIXED_SLOPE = (tl.constexpr(place) for place in range(len(SHARE_FIELDS)))
SHARE_COLUMNS: tl.constexpr = tl.constexpr(len(SHARE_FIELDS))
# By model, float64: the divisor of its ridge over the usual one, and the ridge's strength times the usual one; then of
# the batch the divisor of its loss, the factor of the trained weights in their gradients, and the penalty.
MEASURE_FIELDS = ("ratio", "strength", "normaliser", "pull", "penalty")
RATIO, STRENGTH, NORMALISER, PULL, PENALTY = (tl.constexpr(place) for place in range(len(MEASURE_FIELDS)))
MEASURES: tl.constexpr = tl.constexpr(len(MEASURE_FIELDS))
# A trained tensor's stretch of the arenas, int64: offset and size.
SEGMENT_COLUMNS: tl.constexpr = tl.constexpr(2)
# An entry of the list of models that train in this launch, int64: the model, its steps, and its epochs with sums.
LIVE_FIELDS = ("model", "steps", "epochs")
_, STEPS, EPOCHS = (tl.constexpr(place) for place in range(len(LIVE_FIELDS)))
LIVE_COLUMNS: tl.constexpr = tl.constexpr(len(LIVE_FIELDS))
RULE_COLUMNS: tl.constexpr = tl.constexpr(len(RULE_FIELDS))
SETTING_COLUMNS: tl.constexpr = tl.constexpr(len(SETTING_FIELDS))
# The threads of a program on the whole card, at most. Of fewer elements Triton may load one twice, in two layouts, and
# the later load would see what a thread has stored.
THREADS: tl.constexpr = tl.constexpr(256)
# Elements of the arenas in one step of a sweep.
SWEEP: tl.constexpr = tl.constexpr(1024)
# Numbers of a model in the arrays of the contract.
COUNTERS: tl.constexpr = tl.constexpr(contract.COUNTERS)
HYPER: tl.constexpr = tl.constexpr(contract.HYPER)
STATS: tl.constexpr = tl.constexpr(contract.STATS)
STATS_BLOCK: tl.constexpr = tl.constexpr(triton.next_power_of_2(contract.STATS))
BATCH_LOSSES: tl.constexpr = tl.constexpr(contract.BATCH_LOSSES)
PENALTIES: tl.constexpr = tl.constexpr(contract.PENALTIES)


@triton.jit
def number(row, FIELD: tl.constexpr):
    """Return a field of a table's row, int32."""
    return tl.load(row + FIELD).to(tl.int32)


@triton.jit
def phase_of(place, order0, order1, order2, order3):
    """Return the kind of a step's phase, and its layer, int32."""
    word = tl.where(place < 16, tl.where(place < 8, order0, order1), tl.where(place < 24, order2, order3))
    phase = (word >> (place % 8 * 8)).to(tl.int32)
    return phase & 15, (phase >> PHASE_LAYER) & 15


@triton.jit
def rows_of(counters, model, M):
    """Return the number of rows of the model's batch, int32."""
    return tl.minimum(tl.load(counters + model * COUNTERS + ROW_COUNT), M).to(tl.int32)


@triton.jit
def batch_at(rows, counters, entry, M, rows_size, CACHE: tl.constexpr):
    """Return the model of an ``entry`` of the list of those that train, the number of rows of its batch, the first of
    their numbers, and the batch's index. Each phase asks again, so that no register holds them through other phases.
    On the whole card they are known: the model is 0, and the others stand in the places of M, rows and counters."""
    if CACHE is None:
        model = tl.load(entry)
        clock = counters + model * COUNTERS
        first = rows + model * rows_size + tl.load(clock + ROW_OFFSET)
        return model, rows_of(counters, model, M), first, tl.load(clock + BATCH_INDEX)
    else:
        return 0, M, rows, counters


@triton.jit
def input_of(compute, row, index, work):
    """Return a layer's input, the data or the output of the layer before, and its row pitch."""
    x = compute + whole(tl.load(row + X) + tl.where(index == 0, 0, work), True)
    return x, number(row, X_ROW)


# Rows whose weights are added at a time: at most the threads of one warp, so that the warps exchange nothing.
CHUNK: tl.constexpr = tl.constexpr(32)


@triton.jit
def slope_of(row, shares, params, CACHE: tl.constexpr):
    """Return the slope below zero: prelu's own, else that of the table, as all are on the whole card."""
    if CACHE is None:
        learned = number(row, ACTIVATION) == PRELU
        fixed = tl.load(shares + FIXED_SLOPE)
        return tl.load(params + tl.load(row + SLOPE), mask=learned, other=fixed)
    else:
        return tl.load(shares + FIXED_SLOPE)


@triton.jit
def arrive(arrived):
    """Count this program among those that have ended a phase on the whole card."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release", scope="gpu")


@triton.jit
def wait(arrived, goal):
    """Wait until ``arrived`` has come to ``goal``; then see what those that arrived have stored, in the L2 cache."""
    while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < goal:
        pass
    tl.debug_barrier()


@triton.jit(noinline=True)
def forward(
    compute, weights, params, rows, layers, draws, shares, counters, entry, M, depth, work_size, size, rows_size, index,
    place, workers,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr,
    PARTS: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Compute this program's tiles of a hidden layer's outputs."""
    model, count, batch, batch_index = batch_at(rows, counters, entry, M, rows_size, CACHE)
    work, arena = model * work_size, whole(model * size, True)
    weights += arena
    params += arena
    row = layers + index * LAYER_COLUMNS
    draw, share = draws + (model * depth + index) * DRAW_COLUMNS, shares + (model * depth + index) * SHARE_COLUMNS
    N, K, pitch, activation = number(row, LAYER_N), number(row, LAYER_K), number(row, PITCH), number(row, ACTIVATION)
    x, x_row = input_of(compute, row, index, work)
    w, w_row, b = weights + whole(tl.load(row + W), True), number(row, W_ROW), params + tl.load(row + B)
    y, z = compute + whole(work + tl.load(row + Y), True), compute + whole(work + tl.load(row + Z), True)
    slope = slope_of(row, share, params, CACHE)
    layer, key0, key1 = number(draw, DRAW_LAYER), number(draw, KEY0), number(draw, KEY1)
    threshold, keep_scale = number(draw, THRESHOLD), tl.load(share + KEEP_SCALE)
    store_z, wide = needs_z(activation), tl.cdiv(N, BN)
    gather = tl.where(index == 0, 1, 0)
    for tile in range(place, tl.cdiv(count, BM) * wide, workers):
        first, col = tile // wide * BM, tile % wide * BN
        acc = affine_tile_of_parts(
            x, w, b, batch, first, col, count, N, K, x_row, w_row, 1, gather, BM, BN, BK, SPLIT, PRODUCT, CACHE
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
    measured, params, rows, labels, weight, class_weight, layers, settings, counters, entry, M, depth, size, rows_size,
    label_step, weight_step, ignored_low, ignored_high,
):  # fmt: skip
    """Store the divisor of the loss of the model's batch, and its ridge, in ``measured``."""
    model, count, batch, _ = batch_at(rows, counters, entry, M, rows_size, None)
    outputs = number(layers + (depth - 1) * LAYER_COLUMNS, LAYER_N)
    found = normaliser_of(
        batch, count, labels, label_step, weight, weight_step, class_weight, ignored_label(ignored_low, ignored_high),
        outputs, settings + model * SETTING_COLUMNS, 1, CHUNK,
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
    compute, weights, params, rows, layers, shares, labels, target, weight, class_weight, settings, hyper, normaliser,
    dz, dz_row, counters, entry, M, depth, work_size, size, rows_size, label_step, target_row, target_col, weight_step,
    ignored_low, ignored_high, first,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Compute the output layer and ``dz`` of the batch's rows from ``first`` on; BN >= N. Return the sum of the losses,
    the right answers, the answers asked for, and prelu's gradient."""
    model, count, batch, _ = batch_at(rows, counters, entry, M, rows_size, None)
    index, work, arena = depth - 1, model * work_size, whole(model * size, True)
    weights += arena
    params += arena
    settings += model * SETTING_COLUMNS
    row = layers + index * LAYER_COLUMNS
    N, K, activation = number(row, LAYER_N), number(row, LAYER_K), number(row, ACTIVATION)
    x, x_row = input_of(compute, row, index, work)
    w, w_row, b = weights + whole(tl.load(row + W), True), number(row, W_ROW), params + tl.load(row + B)
    slope = slope_of(row, shares + (model * depth + index) * SHARE_COLUMNS, params, None)
    scale = gradient_scale(hyper, normaliser, settings, 0)
    gather = tl.where(index == 0, 1, 0)
    z = affine_tile(x, w, b, batch, first, 0, count, N, K, x_row, 1, w_row, 1, 1, gather, BM, BN, BK, PRODUCT, True)
    at_m, at_n = first + tl.arange(0, BM), tl.arange(0, BN)
    result, loss, right, scored, below = loss_of_rows(
        z, at_m, at_n, count, scale, batch, labels, label_step, target, target_row, target_col, weight,
        weight_step, class_weight, ignored_label(ignored_low, ignored_high), N, settings, 1, activation, slope,
        BM, CROSS_ENTROPY,
    )  # fmt: skip
    dz_at = dz + at_m.to(tl.int64)[:, None] * row_pitch(dz_row, True) + at_n[None, :]
    stored = (at_m < count)[:, None] & (at_n < masked_width(N, True))[None, :]
    tl.store(dz_at, result.to(dz.dtype.element_ty), mask=stored)
    return loss, right, scored, below


@triton.jit
def gradient_at(compute, layers, index, work):
    """Return dz of a layer, and its row pitch."""
    row = layers + index * LAYER_COLUMNS
    return compute + whole(work + tl.load(row + DZ), True), number(row, PITCH)


@triton.jit(noinline=True)
def loss_and_gradient(
    compute, weights, params, batch, layers, draws, shares, labels, target, weight, class_weight, settings, hyper,
    partials, arrived, goal, count, batch_index, depth, lowest, label_step, target_row, target_col, weight_step,
    ignored_low, ignored_high, place, workers,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OUTPUTS: tl.constexpr, SPLIT: tl.constexpr,
    PRODUCT: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Compute the outputs and dz of this program's rows, and its tiles of dz of the layer below; store the sums of the
    losses by BM rows. Of programs with the same rows, which compute dz each for itself, one stores it for all."""
    index, lower = depth - 1, tl.maximum(depth - 2, 0)
    row, under = layers + index * LAYER_COLUMNS, layers + lower * LAYER_COLUMNS
    draw, share = draws + lower * DRAW_COLUMNS, shares + lower * SHARE_COLUMNS
    N, K, activation = number(row, LAYER_N), number(row, LAYER_K), number(row, ACTIVATION)
    x, x_row = input_of(compute, row, index, 0)
    w, w_row, b = weights + whole(tl.load(row + W), True), number(row, W_ROW), params + tl.load(row + B)
    y = compute + whole(tl.load(under + Z), True)
    out, out_row = gradient_at(compute, layers, lower, 0)
    dz, pitch = gradient_at(compute, layers, index, 0)
    slope, blocks = tl.load(shares + index * SHARE_COLUMNS + FIXED_SLOPE), tl.cdiv(count, BM)
    ignored = ignored_label(ignored_low, ignored_high)
    normaliser = normaliser_of(
        batch, count, labels, label_step, weight, weight_step, class_weight, ignored, N, settings, 1, CHUNK
    )
    scale = gradient_scale(hyper, normaliser, settings, 0)
    back = lowest < index
    wide, width = tl.where(back, tl.cdiv(K, BN), 1), tl.where(back, masked_width(K, True), 0)
    at_n = tl.arange(0, OUTPUTS)
    wait(arrived, goal)
    for tile in range(place, blocks * wide, workers):
        block, col = tile % blocks, tile // blocks * BN
        at_m, at_k = block * BM + tl.arange(0, BM), col + tl.arange(0, BN)
        far, inside = at_m.to(tl.int64)[:, None], (at_m < count)[:, None]
        near, stored = far * row_pitch(out_row, True) + at_k[None, :], inside & (at_k < width)[None, :]
        z = affine_tile_of_parts(
            x, w, b, batch, block * BM, 0, count, N, K, x_row, w_row, 1, tl.where(index == 0, 1, 0), BM, OUTPUTS, BK,
            SPLIT, PRODUCT, ".cg",
        )  # fmt: skip
        v = tl.load(y + near, mask=stored, other=0.0, cache_modifier=".cg").to(tl.float32)
        w_at = w + at_n.to(tl.int64)[:, None] * row_pitch(w_row, True) + at_k[None, :]
        w_tile = tl.load(w_at, mask=(at_n < N)[:, None] & (at_k < width)[None, :], other=0.0, cache_modifier=".cg")
        layer, key0, key1 = number(draw, DRAW_LAYER), number(draw, KEY0), number(draw, KEY1)
        threshold, keep_scale = number(draw, THRESHOLD), tl.load(share + KEEP_SCALE)
        formula, kept_share = number(under, ACTIVATION), tl.load(share + KEPT_SHARE)
        slope_under = tl.load(share + FIXED_SLOPE)
        result, loss, right, scored, below = loss_of_rows(
            z, at_m, at_n, count, scale, batch, labels, label_step, target, target_row, target_col, weight,
            weight_step, class_weight, ignored, N, settings, 1, activation, slope, BM, CROSS_ENTROPY,
        )  # fmt: skip
        # a sum of one number: without it Triton computes dz twice, in two layouts
        result = tl.sum(result.to(compute.dtype.element_ty)[:, :, None], axis=2)
        first = col == 0
        dz_at = dz + far * row_pitch(pitch, True) + at_n[None, :]
        tl.store(dz_at, result, mask=inside & (at_n < tl.where(first, masked_width(N, True), 0))[None, :])
        sums = partials + block * PARTIALS
        tl.store(sums, loss.to(tl.float64), mask=first)
        tl.store(sums + 1, right.to(tl.float64), mask=first)
        tl.store(sums + 2, scored.to(tl.float64), mask=first)
        tl.store(sums + 3, below.to(tl.float64), mask=first)
        zero = tl.zeros((BM, BN), tl.float32)
        acc, rest = product(result, w_tile, zero, zero, PRODUCT)
        g = whole_sum(acc, rest, PRODUCT)
        if threshold > 0:
            kept = keep_mask(block * BM, col, batch_index, layer, key0, key1, threshold, BM, BN)
            g = tl.where(kept, g * keep_scale, 0.0)
        if needs_z(formula) == 0:
            v = v * kept_share
        g = tl.where((at_k < K)[None, :], g * derivative(v, formula, slope_under), 0.0)
        tl.store(out + near, g.to(compute.dtype.element_ty), mask=stored)


@triton.jit(noinline=True)
def backward(
    compute, weights, params, layers, draws, shares, slopes, arrived, goal, counters, entry, M, depth, work_size, size,
    index, place, workers,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr,
    PARTS: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Compute this program's tiles of dz of layer ``index`` from that of the layer above it, and the gradient by its
    slope; BN goes along the reduction."""
    model, count, _, batch_index = batch_at(layers, counters, entry, M, 0, CACHE)
    work, arena = model * work_size, whole(model * size, True)
    row = layers + index * LAYER_COLUMNS
    above = row + LAYER_COLUMNS
    draw, share = draws + (model * depth + index) * DRAW_COLUMNS, shares + (model * depth + index) * SHARE_COLUMNS
    N, K, pitch, activation = number(above, LAYER_N), number(row, LAYER_N), number(row, PITCH), number(row, ACTIVATION)
    w, w_row = weights + arena + whole(tl.load(above + W), True), number(above, W_ROW)
    dz, dz_row = gradient_at(compute, layers, index + 1, work)
    y = compute + whole(work + tl.load(row + Z), True)
    out, _ = gradient_at(compute, layers, index, work)
    slope = slope_of(row, share, params + arena, CACHE)
    layer, key0, key1 = number(draw, DRAW_LAYER), number(draw, KEY0), number(draw, KEY1)
    threshold, keep_scale = number(draw, THRESHOLD), tl.load(share + KEEP_SCALE)
    kept_share, wide = tl.load(share + KEPT_SHARE), tl.cdiv(K, BK)
    below = tl.full((), 0.0, tl.float32)
    if CACHE is not None:
        wait(arrived, goal)
    for tile in range(place, tl.cdiv(count, BM) * wide, workers):
        below += input_gradient(
            dz, w, y, out, tile // wide, tile % wide, batch_index, count, N, K, dz_row, 1, w_row, 1, pitch, 1, pitch, 1,
            activation, slope, layer, key0, key1, threshold, keep_scale, kept_share,
            BM, BN, BK, PRODUCT, True, PARTS, SPLIT, False, CACHE,
        )  # fmt: skip
    if CACHE is None:
        tl.store(slopes + model * depth + index, below)


@triton.jit
def update_elements(
    g, at, mask, pull, weights, params, first, second, average, hyper, rule, tensors, task, code, shadowed,
):  # fmt: skip
    """Update the elements ``at`` of the arenas. A ridge pulls as a coupled weight decay does; with a decoupled one the
    gradients contain it already."""
    factor = tl.load(tensors + task * TENSOR_FIELDS)
    decay = tl.load(tensors + task * TENSOR_FIELDS + 1) + pull
    p, s0, s1, a, shadow = params + at, first + at, second + at, average + at, weights + at
    for each in tl.static_range(RULES):
        if code == each:
            stored_update(g, p, s0, s1, a, shadow, mask, hyper, rule, factor, decay, shadowed, each)
    if (code < 0) | (code >= RULES):
        stored_update(g, p, s0, s1, a, shadow, mask, hyper, rule, factor, decay, shadowed, -1)


@triton.jit
def finish_gradient(
    g, at, mask, pull, weights, params, grads, first, second, counters, hyper, rule, tensors, task, code, stored,
    shadowed,
):  # fmt: skip
    """Update the elements ``at`` by their gradient, or with ``stored`` store the gradient, with ``pull`` times the
    parameters added."""
    if stored != 0:
        g = tl.where(mask, g, 0.0)
        if pull != 0.0:
            g += pull.to(tl.float32) * tl.load(params + at, mask=mask, other=0.0)
        stored_gradient(g, grads + at, mask, counters, rule)
    else:
        # no average: its gradients are stored
        update_elements(
            g, at, mask, pull, weights, params, first, second, second, hyper, rule, tensors, task, code, shadowed
        )


@triton.jit
def weight_tile(
    dz, x, batch, at_n, at_k, count, N, K, dz_row, x_row, gather,
    BM: tl.constexpr, PRODUCT: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Return the tile at ``at_n``, ``at_k`` of dz.T @ x, over the batch's rows."""
    inside_n, inside_k = at_n < masked_width(N, True), at_k < masked_width(K, True)
    acc = tl.zeros((at_n.shape[0], at_k.shape[0]), tl.float32)
    rest = tl.zeros((at_n.shape[0], at_k.shape[0]), tl.float32)
    # one stage: a batch has few tiles of rows, and often one
    for start in tl.range(0, count, BM, num_stages=1):
        at_b = start + tl.arange(0, BM)
        source = batch_rows(batch, at_b, count, gather)
        x_at = x + tl.where(source >= 0, source, 0)[:, None] * x_row + at_k[None, :]
        x_tile = tl.load(x_at, mask=(source >= 0)[:, None] & inside_k[None, :], other=0.0, cache_modifier=CACHE)
        dz_at = dz + at_b.to(tl.int64)[:, None] * dz_row + at_n[None, :]
        dz_tile = tl.load(dz_at, mask=(at_b < count)[:, None] & inside_n[None, :], other=0.0, cache_modifier=CACHE)
        acc, rest = product(tl.trans(dz_tile), x_tile, acc, rest, PRODUCT)
    return whole_sum(acc, rest, PRODUCT)


@triton.jit
def ends_of_layers(layers, depth, BN: tl.constexpr, BK: tl.constexpr, VECTOR: tl.constexpr):
    """Return the tiles of ``gradients_of_layer`` up to the end of each layer, (LAYERS,) int32."""
    at = tl.arange(0, LAYERS)
    row, inside = layers + at * LAYER_COLUMNS, at < depth
    N, K = tl.load(row + LAYER_N, mask=inside, other=0), tl.load(row + LAYER_K, mask=inside, other=0)
    of_weights = tl.where(tl.load(row + W_TASK, mask=inside, other=-1) >= 0, tl.cdiv(N, BN) * tl.cdiv(K, BK), 0)
    of_bias = tl.where(tl.load(row + B_TASK, mask=inside, other=-1) >= 0, tl.cdiv(N, VECTOR), 0)
    tiles = (of_weights + of_bias).to(tl.int32)
    return tl.sum(tl.where(at[None, :] <= at[:, None], tiles[None, :], 0), axis=1)


@triton.jit(noinline=True)
def gradients_of_layer(
    compute, weights, params, grads, first, second, rows, layers, slopes, counters, hyper, rules, tensors, measured,
    entry, M, depth, trained, work_size, size, rows_size, index, stored, shadowed, begin, end, arrived, goal,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, VECTOR: tl.constexpr, PRODUCT: tl.constexpr,
    PARTS: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Compute the tiles from ``begin`` to ``end`` of the gradients by a layer's weights, bias and slope; update by
    them, or store them."""
    model, count, batch, _ = batch_at(rows, counters, entry, M, rows_size, CACHE)
    work, arena = model * work_size, whole(model * size, True)
    weights += arena
    params += arena
    grads += arena
    first += arena
    second += arena
    slopes += model * depth
    counters += model * COUNTERS
    hyper += model * HYPER
    rule = rules + model * RULE_COLUMNS
    tensors += model * trained * TENSOR_FIELDS
    code = number(rule, CODE)
    row = layers + index * LAYER_COLUMNS
    N, K, w_row = number(row, LAYER_N), number(row, LAYER_K), row_pitch(number(row, W_ROW), True)
    x, x_row = input_of(compute, row, index, work)
    dz, dz_row = gradient_at(compute, layers, index, work)
    x_row, dz_row = row_pitch(x_row, True), row_pitch(dz_row, True)
    gather = tl.where(index == 0, 1, 0)
    task, wide = number(row, W_TASK), tl.cdiv(K, BK)
    w = whole(tl.load(row + W), True)
    pull = tl.load(measured + model * MEASURES + PULL)
    tiles = tl.where(task >= 0, tl.cdiv(N, BN) * wide, 0)
    if CACHE is not None:
        wait(arrived, goal)
    for tile in range(tl.maximum(begin, 0), tl.minimum(end, tiles)):
        at_n, col = tile // wide * BN + tl.arange(0, BN), tile % wide * BK
        acc = weight_tile(
            dz, x, batch, at_n, col + tl.arange(0, BK), count, N, K, dz_row, x_row, gather, BM, PRODUCT, CACHE
        )
        for piece in tl.static_range(PARTS):
            near = col + piece * (BK // PARTS) + tl.arange(0, BK // PARTS)[None, :]
            mask = (at_n < N)[:, None] & (near < masked_width(K, True))
            # 0 * NaN is NaN, and a NaN in the padding would stay there
            g = tl.where(near < K, part_of(acc, piece, PARTS, BN, BK), 0.0)
            finish_gradient(
                g, w + at_n.to(tl.int64)[:, None] * w_row + near, mask, pull, weights, params, grads, first,
                second, counters, hyper, rule, tensors, task, code, stored, shadowed,
            )  # fmt: skip
    dealt = tiles
    # the bias, then the slope if there is one to train
    for vector in range(tl.where(number(row, SLOPE_TASK) >= 0, 2, 1)):
        task = tl.where(vector == 0, number(row, B_TASK), number(row, SLOPE_TASK))
        length = tl.where(vector == 0, N, 1)
        start = tl.where(vector == 0, tl.load(row + B), tl.load(row + SLOPE))
        tiles = tl.where(task >= 0, tl.cdiv(length, VECTOR), 0)
        for tile in range(tl.maximum(begin - dealt, 0), tl.minimum(end - dealt, tiles)):
            at = tile * VECTOR + tl.arange(0, VECTOR)
            mask = at < length
            if vector == 0:
                g = column_sums(dz, at, 0, count, N, dz_row, 1, VECTOR, BM, CACHE)
            else:
                g = tl.load(slopes + index + at, mask=mask, other=0.0)
            if CACHE is not None:
                copy = tl.arange(0, THREADS // VECTOR)[:, None]
                at, mask, g = at[None, :] + 0 * copy, mask[None, :] & (copy == 0), g[None, :] + 0.0 * copy
            finish_gradient(
                g, start + at, mask, 0.0, weights, params, grads, first, second, counters, hyper, rule, tensors, task,
                code, stored, 0,
            )  # fmt: skip
        dealt += tiles
