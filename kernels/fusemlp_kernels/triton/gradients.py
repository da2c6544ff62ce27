"""The backward pass: the gradient by a layer's input, and those by all parameters in one grouped launch."""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import ACCUMULATE, BATCH_INDEX, advance_clock, is_last, sum_of
from fusemlp_kernels.triton.functions import keep_mask
from fusemlp_kernels.triton.pointwise_triton import PRELU, by_slope_prelu, derivative, needs_z, stored_update
from fusemlp_kernels.triton.tiles import (
    batch_rows,
    column_step,
    described_product,
    kernel,
    masked_width,
    part_of,
    product,
    row_pitch,
    this_batch,
    tile_of,
    whole_sum,
)

# The constants with the rows and columns of a tensor descriptor's blocks, by the matrix.
INPUT_BLOCKS = {"dz": ("BM", "BN"), "w": ("BN", "BK")}


@triton.jit
def input_sums_of_parts(
    dz, w, at_m, at_k, M, N, K, dz_row, w_row,
    BN: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr, CACHE: tl.constexpr,
):  # fmt: skip
    """Return the tile at ``at_m``, ``at_k`` of dz @ w, aligned matrices, with the reduction in parts; see
    ``linear.affine_tile_of_parts``."""
    at_n = tl.arange(0, SPLIT)[:, None] * BN + tl.arange(0, BN)[None, :]
    width, pitch = masked_width(N, True), row_pitch(w_row, True)
    inside_m, stored_k = at_m < M, at_k < masked_width(K, True)
    dz_at = dz + (at_m.to(tl.int64) * row_pitch(dz_row, True))[None, :, None] + at_n[:, None, :]
    w_at = w + (at_n.to(tl.int64) * pitch)[:, :, None] + at_k[None, None, :]
    acc = tl.zeros((SPLIT, at_m.shape[0], at_k.shape[0]), tl.float32)
    rest = tl.zeros((SPLIT, at_m.shape[0], at_k.shape[0]), tl.float32)
    for start in range(0, N, SPLIT * BN):
        dz_tile = tl.load(
            dz_at, mask=inside_m[None, :, None] & (at_n < width - start)[:, None, :], other=0.0, cache_modifier=CACHE
        )
        w_tile = tl.load(
            w_at, mask=(at_n < N - start)[:, :, None] & stored_k[None, None, :], other=0.0, cache_modifier=CACHE
        )
        acc, rest = product(dz_tile, w_tile, acc, rest, PRODUCT)
        dz_at += SPLIT * BN
        w_at += SPLIT * BN * pitch
    return tl.sum(whole_sum(acc, rest, PRODUCT), axis=0)


@triton.jit
def input_gradient(
    dz, w, y, out, tile_m, tile_k, batch_index, M, N, K, dz_row, dz_col, w_row, w_col, y_row, y_col, out_row, out_col,
    activation, slope, layer, key0, key1, threshold, keep_scale, kept_share,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr, ALIGNED: tl.constexpr,
    PARTS: tl.constexpr, SPLIT: tl.constexpr, DESCRIBED: tl.constexpr = False, CACHE: tl.constexpr = None,
):  # fmt: skip
    """A tile (BM, BK) of ``out``, see ``grad_input_kernel``, of a batch of M rows; BN goes along the reduction. Returns
    the tile's part of prelu's gradient, float32. ``CACHE`` as in ``linear.affine_tile_of_parts``."""
    at_m = tile_m * BM + tl.arange(0, BM)
    at_k = tile_k * BK + tl.arange(0, BK)
    at_n = tl.arange(0, BN)
    inside_m = at_m < M
    far = at_m.to(tl.int64)
    width, pitch = masked_width(N, ALIGNED), row_pitch(w_row, ALIGNED)
    step = column_step(dz_col, ALIGNED)
    stored_k = at_k < masked_width(K, ALIGNED)
    y_rows, out_rows = y + far[:, None] * row_pitch(y_row, ALIGNED), out + far[:, None] * row_pitch(out_row, ALIGNED)
    y_step, out_step = column_step(y_col, ALIGNED), column_step(out_col, ALIGNED)
    if PARTS == 1:
        # few numbers, which load during the product
        outputs = tl.load(
            y_rows + at_k[None, :] * y_step, mask=inside_m[:, None] & stored_k[None, :], other=0.0, cache_modifier=CACHE
        )
    if DESCRIBED:
        acc = described_product(dz, w, tile_m * BM, tile_k * BK, 0, N, False, False, BM, BK, BN, PRODUCT)
    elif SPLIT > 1:
        acc = input_sums_of_parts(dz, w, at_m, at_k, M, N, K, dz_row, w_row, BN, SPLIT, PRODUCT, CACHE)
    else:
        dz_at = dz + far[:, None] * row_pitch(dz_row, ALIGNED) + at_n[None, :] * step
        w_at = w + at_n.to(tl.int64)[:, None] * pitch + at_k[None, :] * column_step(w_col, ALIGNED)
        acc = tl.zeros((BM, BK), tl.float32)
        rest = tl.zeros((BM, BK), tl.float32)
        for start in range(0, N, BN):
            dz_tile = tl.load(
                dz_at, mask=inside_m[:, None] & (at_n < width - start)[None, :], other=0.0, cache_modifier=CACHE
            )
            w_tile = tl.load(
                w_at, mask=(at_n < N - start)[:, None] & stored_k[None, :], other=0.0, cache_modifier=CACHE
            )
            acc, rest = product(dz_tile, w_tile, acc, rest, PRODUCT)
            dz_at += BN * step
            w_at += BN * pitch
        acc = whole_sum(acc, rest, PRODUCT)
    below = tl.full((), 0.0, tl.float32)
    for piece in tl.static_range(PARTS):
        first = tile_k * BK + piece * (BK // PARTS)
        near = first + tl.arange(0, BK // PARTS)
        stored = inside_m[:, None] & (near < masked_width(K, ALIGNED))[None, :]
        g = part_of(acc, piece, PARTS, BM, BK)
        if threshold > 0:
            keep = keep_mask(tile_m * BM, first, batch_index, layer, key0, key1, threshold, BM, BK // PARTS)
            g = tl.where(keep, g * keep_scale, 0.0)
        if PARTS > 1:
            outputs = tl.load(y_rows + near[None, :] * y_step, mask=stored, other=0.0, cache_modifier=CACHE)
        v = outputs.to(tl.float32)
        if needs_z(activation) == 0:
            v = v * kept_share
        result = tl.where((near < K)[None, :], g * derivative(v, activation, slope), 0.0)
        tl.store(out_rows + near[None, :] * out_step, result.to(out.dtype.element_ty), mask=stored)
        if activation == PRELU:
            inside = inside_m[:, None] & (near < K)[None, :]
            below += tl.sum(tl.where(inside, g * by_slope_prelu(v), 0.0))
    return below


@kernel(numbers_from="M")
def grad_input_kernel(
    dz, w, y, out, slope_param, dslope, partials, ticket, counters,
    M, N, K, dz_row, dz_col, w_row, w_col, y_row, y_col, out_row, out_col,
    activation, slope, layer, key0, key1, threshold, keep_scale, kept_share, programs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr, ALIGNED: tl.constexpr,
    PARTS: tl.constexpr, SPLIT: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """out (M, K) = (dz (M, N) @ w (N, K)) * keep / (1 - p) * activation'; dslope (1,) where it is prelu's.

    The derivative is read from ``y`` (M, K): the pre-activation with ``needs_z``, else the layer's output after
    dropout, which ``kept_share`` = 1 - p undoes. Tiles are BM x BK of ``out``; BN goes along the reduction.
    ``DESCRIBED``: dz and w are tensor descriptors.
    """
    program = tl.program_id(0)
    tile_m, tile_k = tile_of(program, M, K, BM, BK)
    slope = tl.load(slope_param, mask=activation == PRELU, other=slope)
    batch_index = tl.load(counters + BATCH_INDEX, mask=threshold > 0, other=0)
    below = input_gradient(
        dz, w, y, out, tile_m, tile_k, batch_index, M, N, K, dz_row, dz_col, w_row, w_col, y_row, y_col,
        out_row, out_col, activation, slope, layer, key0, key1, threshold, keep_scale, kept_share,
        BM, BN, BK, PRODUCT, ALIGNED, PARTS, SPLIT, DESCRIBED,
    )  # fmt: skip
    if activation == PRELU:
        tl.store(partials + program, below.to(tl.float64))
        if is_last(ticket, programs):
            tl.store(dslope, sum_of(partials, programs, 1, 128).to(tl.float32))


# A row of the table of ``grad_weight``'s tasks, int64. Offsets are in elements, from the two base pointers.
TASK_FIELDS = (
    "first_tile", "kind", "N", "K", "gather", "dz", "dz_row", "dz_col", "x", "x_row", "x_col",
    "p", "p_row", "p_col", "s0", "s0_row", "s0_col", "s1", "s1_row", "s1_col",
    "average", "average_row", "average_col", "shadow", "shadow_row", "shadow_col", "shadowed",
)  # fmt: skip
(
    FIRST_TILE, KIND, TASK_N, TASK_K, GATHER, DZ, DZ_ROW, DZ_COL, X, X_ROW, X_COL,
    P, P_ROW, P_COL, S0, S0_ROW, S0_COL, S1, S1_ROW, S1_COL,
    AVERAGE, AVERAGE_ROW, AVERAGE_COL, SHADOW, SHADOW_ROW, SHADOW_COL, SHADOWED,
) = (tl.constexpr(place) for place in range(len(TASK_FIELDS)))  # fmt: skip
FIELDS: tl.constexpr = tl.constexpr(len(TASK_FIELDS))
WEIGHT: tl.constexpr = tl.constexpr(0)
BIAS: tl.constexpr = tl.constexpr(1)
SLOPE: tl.constexpr = tl.constexpr(2)
SEGMENT: tl.constexpr = tl.constexpr(3)
# The most columns of a bias task: short tasks fill the card between those of weights. And its loads under way.
VECTOR: tl.constexpr = tl.constexpr(64)
BIAS_STAGES: tl.constexpr = tl.constexpr(4)
# The float64 table beside it: a row of (learning-rate factor, weight decay) for each task.
TENSOR_FIELDS: tl.constexpr = tl.constexpr(2)


@triton.jit
def task_of(table, tasks, tile, TASKS: tl.constexpr):
    """Return the task of a tile: the last one that starts at it or before it."""
    at = tl.arange(0, TASKS)
    first = tl.load(table + at * FIELDS + FIRST_TILE, mask=at < tasks, other=1 << 62)
    return tl.sum((first <= tile).to(tl.int32), axis=0) - 1


@triton.jit
def whole(offset, ALIGNED: tl.constexpr):
    """Return an offset that the compiler knows to be a multiple of 16 bytes in every element type."""
    if ALIGNED:
        offset = offset // 8 * 8
    return offset


@triton.jit
def weight_sums(
    dz, x, rows, at_n, at_k, begin, end, N, K, dz_row, dz_col, x_row, x_col, gather,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, PRODUCT: tl.constexpr, ALIGNED: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Return the tile (BN, BK) at ``at_n``, ``at_k`` of dz.T @ x[rows], over the batch's rows from ``begin`` to
    ``end``; STAGES: the loads under way at a time, None for the launch's."""
    at_b = tl.arange(0, BM)
    inside_n = at_n < masked_width(N, ALIGNED)
    inside_k = at_k < masked_width(K, ALIGNED)
    acc = tl.zeros((BN, BK), tl.float32)
    rest = tl.zeros((BN, BK), tl.float32)
    for start in tl.range(begin, end, BM, num_stages=STAGES):
        inside_b = start + at_b < end
        source = batch_rows(rows, start + at_b, end, gather)
        x_at = x + tl.where(source >= 0, source, 0)[:, None] * x_row + at_k[None, :] * x_col
        x_tile = tl.load(x_at, mask=(source >= 0)[:, None] & inside_k[None, :], other=0.0)
        dz_at = dz + (start + at_b).to(tl.int64)[:, None] * dz_row + at_n[None, :] * dz_col
        dz_tile = tl.load(dz_at, mask=inside_b[:, None] & inside_n[None, :], other=0.0)
        acc, rest = product(tl.trans(dz_tile), x_tile, acc, rest, PRODUCT)
    return whole_sum(acc, rest, PRODUCT)


@triton.jit
def column_sums(dz, at_n, begin, end, N, dz_row, dz_col, BN: tl.constexpr, BM: tl.constexpr, CACHE: tl.constexpr):
    """Return the sums of dz's columns ``at_n`` over the batch's rows from ``begin`` to ``end``, (BN,) float32.

    For a batch of few tiles, in ``train_resident``; see ``bias_sums``.
    """
    at_b = tl.arange(0, BM)
    sums = tl.zeros((BN,), tl.float32)
    for start in range(begin, end, BM):
        inside_b = start + at_b < end
        dz_at = dz + (start + at_b).to(tl.int64)[:, None] * dz_row + at_n[None, :] * dz_col
        dz_tile = tl.load(dz_at, mask=inside_b[:, None] & (at_n < N)[None, :], other=0.0, cache_modifier=CACHE)
        sums += tl.sum(dz_tile.to(tl.float32), axis=0)
    return sums


@triton.jit
def bias_sums(
    dz, at_n, begin, end, N, dz_row, dz_col,
    BN: tl.constexpr, BM: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Return the sums of dz's columns ``at_n`` over the batch's rows from ``begin`` to ``end``, (BN,) float32.

    The loop adds tiles, so that no pass waits at a barrier for its sum over rows; one reduction follows.
    """
    at_b = tl.arange(0, BM)
    inside_n = at_n < masked_width(N, ALIGNED)
    dz_at = dz + (begin + at_b).to(tl.int64)[:, None] * dz_row + at_n[None, :] * dz_col
    sums = tl.zeros((BM, BN), tl.float32)
    for start in tl.range(begin, end, BM, num_stages=BIAS_STAGES):
        dz_tile = tl.load(dz_at, mask=(at_b < end - start)[:, None] & inside_n[None, :], other=0.0)
        sums += dz_tile.to(tl.float32)
        dz_at += BM * dz_row
    return tl.sum(sums, axis=0)


@triton.jit
def stored_gradient(g, p_at, mask, counters, rule):
    """Store the gradient, or add it to the stored sum of the batches before; return the stored value."""
    every = tl.load(rule + ACCUMULATE).to(tl.int64)
    adds = tl.load(counters + BATCH_INDEX) % every != 0
    g = g + tl.load(p_at, mask=tl.where(adds, mask, False), other=0.0)
    tl.store(p_at, g, mask=mask)
    return g


@triton.jit
def square_sum(g):
    """Return the sum of squares, float64; elements are divided by the largest first, so that no square overflows."""
    size = tl.abs(g)
    largest = tl.max(size)
    scale = tl.where((largest > 0) & (largest < float("inf")), largest, 1.0)
    part = g / scale
    total = tl.sum(part * part)
    return total.to(tl.float64) * scale.to(tl.float64) * scale.to(tl.float64)


@triton.jit
def finished(
    g, p_at, s0_at, s1_at, average_at, shadow_at, mask, hyper, rule, tensors, task, counters, wants_norm, shadowed,
    UPDATES: tl.constexpr, RULE: tl.constexpr,
):  # fmt: skip
    """Update the parameter by its gradient, or store the gradient. With ``wants_norm`` return the sum of the squares of
    the stored values, float64."""
    squares = tl.full((), 0.0, tl.float64)
    if UPDATES:
        factor = tl.load(tensors + task * TENSOR_FIELDS)
        decay = tl.load(tensors + task * TENSOR_FIELDS + 1)
        stored_update(g, p_at, s0_at, s1_at, average_at, shadow_at, mask, hyper, rule, factor, decay, shadowed, RULE)
    else:
        g = stored_gradient(tl.where(mask, g, 0.0), p_at, mask, counters, rule)
        if wants_norm != 0:
            squares = square_sum(tl.where(mask, g, 0.0))
    return squares


@kernel(numbers_from="M")
def grad_weight_kernel(
    compute, real, rows, table, tensors, hyper, rates, rule, counters, partials, norm, ticket,
    M, tasks, programs, splits, part, wants_norm,
    BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, PRODUCT: tl.constexpr, ALIGNED: tl.constexpr,
    UPDATES: tl.constexpr, RULE: tl.constexpr, TASKS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The gradients of all layers, dw (N, K) = dz.T @ x and db (N,) = sums of dz's columns, in one launch.

    ``UPDATES``: each tile updates its parameters by the optimizer of the code ``RULE``, and the gradient is never
    stored; the last program advances the clock. Else the gradients are stored, or added to the stored ones while
    batches accumulate. With ``wants_norm``, ``norm`` (1,) float64 receives their global norm. With ``splits`` > 1 the
    batch is cut: split s of a tile sums its stretch of the batch and stores it ``s * part`` elements further on.

    ``table`` has a task for each weight matrix, bias and learned slope (``TASK_FIELDS``); its offsets count from
    ``compute`` and ``real``. ``ALIGNED``: the weights, their states and their shadow have one row pitch.
    """
    program = tl.program_id(0)
    tile = program // splits
    split = program - tile * splits
    task = task_of(table, tasks, tile, TASKS)
    row = table + task * FIELDS
    kind = tl.load(row + KIND)
    N = tl.load(row + TASK_N).to(tl.int32)
    K = tl.load(row + TASK_K).to(tl.int32)
    tile = tile - tl.load(row + FIRST_TILE).to(tl.int32)
    length = tl.cdiv(tl.cdiv(M, BM), splits) * BM
    begin = split * length
    end = tl.minimum(M, begin + length)
    shift = split.to(tl.int64) * part
    p = real + whole(tl.load(row + P) + shift, ALIGNED)
    s0 = real + whole(tl.load(row + S0), ALIGNED)
    s1 = real + whole(tl.load(row + S1), ALIGNED)
    average = real + whole(tl.load(row + AVERAGE), ALIGNED)
    shadow = compute + whole(tl.load(row + SHADOW), ALIGNED)
    shadowed = tl.load(row + SHADOWED)
    dz = compute + whole(tl.load(row + DZ), ALIGNED)
    dz_row, dz_col = row_pitch(tl.load(row + DZ_ROW), ALIGNED), column_step(tl.load(row + DZ_COL), ALIGNED)
    squares = tl.full((), 0.0, tl.float64)
    if kind == WEIGHT:
        tile_n, tile_k = tile_of(tile, N, K, BN, BK)
        at_n = tile_n * BN + tl.arange(0, BN)
        at_k = tile_k * BK + tl.arange(0, BK)
        x = compute + whole(tl.load(row + X), ALIGNED)
        x_row, x_col = row_pitch(tl.load(row + X_ROW), ALIGNED), column_step(tl.load(row + X_COL), ALIGNED)
        gather = tl.load(row + GATHER)
        rows = this_batch(rows, counters, gather)
        acc = weight_sums(
            dz, x, rows, at_n, at_k, begin, end, N, K, dz_row, dz_col, x_row, x_col, gather,
            BN, BK, BM, PRODUCT, ALIGNED, None,
        )  # fmt: skip
        far = at_n.to(tl.int64)[:, None]
        pitch = row_pitch(tl.load(row + P_ROW), ALIGNED)
        for piece in tl.static_range(PARTS):
            near = tile_k * BK + piece * (BK // PARTS) + tl.arange(0, BK // PARTS)[None, :]
            stored = (at_n < N)[:, None] & (near < masked_width(K, ALIGNED))
            if ALIGNED:
                # one set of offsets for all five: five sets of addresses would take too many registers
                at_p = far * pitch + near
                at_s0, at_s1, at_average, at_shadow = at_p, at_p, at_p, at_p
            else:
                at_p = far * pitch + near * tl.load(row + P_COL)
                at_s0 = far * tl.load(row + S0_ROW) + near * tl.load(row + S0_COL)
                at_s1 = far * tl.load(row + S1_ROW) + near * tl.load(row + S1_COL)
                at_average = far * tl.load(row + AVERAGE_ROW) + near * tl.load(row + AVERAGE_COL)
                at_shadow = far * tl.load(row + SHADOW_ROW) + near * tl.load(row + SHADOW_COL)
            # 0 * NaN is NaN, and a NaN in the padding would stay there
            g = tl.where(near < K, part_of(acc, piece, PARTS, BN, BK), 0.0)
            squares += finished(
                g, p + at_p, s0 + at_s0, s1 + at_s1, average + at_average, shadow + at_shadow, stored,
                hyper, rule, tensors, task, counters, wants_norm, shadowed, UPDATES, RULE,
            )  # fmt: skip
    else:
        COLUMNS: tl.constexpr = min(BN, VECTOR)
        # not `at_n`: a name in both branches of an `if` must have one type in a kernel
        at = tile * COLUMNS + tl.arange(0, COLUMNS)
        inside = at < N
        element = at.to(tl.int64)
        sums = tl.zeros((COLUMNS,), tl.float32)
        if kind == BIAS:
            # a tile has as many elements as one of dz in a weight task
            sums = bias_sums(dz, at, begin, end, N, dz_row, dz_col, COLUMNS, BM * BN // COLUMNS, ALIGNED)
        else:
            # prelu's: one number, computed by earlier kernels
            sums = tl.load(real + tl.load(row + X) + at, mask=tl.where(split == 0, inside, False), other=0.0)
        squares += finished(
            sums, p + element * tl.load(row + P_ROW), s0 + element * tl.load(row + S0_ROW),
            s1 + element * tl.load(row + S1_ROW), average + element * tl.load(row + AVERAGE_ROW),
            shadow + element * tl.load(row + SHADOW_ROW), inside,
            hyper, rule, tensors, task, counters, wants_norm, shadowed, UPDATES, RULE,
        )  # fmt: skip
    if UPDATES:
        if is_last(ticket, programs):
            advance_clock(counters, hyper, rates, rule, True, False)
    else:
        if wants_norm != 0:
            tl.store(partials + program, squares)
            if is_last(ticket, programs):
                tl.store(norm, tl.sqrt(sum_of(partials, programs, 1, 128)))
