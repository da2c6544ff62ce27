"""Many whole training steps of one model in one launch on the whole card: all programs share each phase of a step.

The tiles of a phase are dealt to the programs in turn. Between two phases all programs meet, which a cooperative launch
allows: all of them run at a time. A program loads what others have stored from the L2 cache (``.cg``), because the L1
cache of a multiprocessor may hold older values. The last program, which has the fewest tiles, keeps the clock and the
sums of the losses; the others copy the clock when a step begins. The tables are those of ``resident_layers``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import BATCH_INDEX, CODE, ROW_OFFSET, sum_of
from fusemlp_kernels.triton.functions import keep_mask
from fusemlp_kernels.triton.gradients import whole
from fusemlp_kernels.triton.linear import store_outputs
from fusemlp_kernels.triton.loss import (
    PARTIALS,
    gradient_scale,
    ignored_label,
    loss_of_rows,
    normaliser_of,
    record_loss,
)
from fusemlp_kernels.triton.pointwise_triton import derivative, needs_z
from fusemlp_kernels.triton.resident import tick
from fusemlp_kernels.triton.resident_layers import (
    ACTIVATION,
    B_TASK,
    CHUNK,
    COUNTERS,
    DRAW_COLUMNS,
    DRAW_LAYER,
    DZ,
    FIXED_SLOPE,
    HYPER,
    KEEP_SCALE,
    KEPT_SHARE,
    KEY0,
    KEY1,
    LAYER_COLUMNS,
    LAYER_K,
    LAYER_N,
    LIVE_COLUMNS,
    PITCH,
    SHARE_COLUMNS,
    STEPS,
    THRESHOLD,
    W_ROW,
    W_TASK,
    X_ROW,
    B,
    W,
    X,
    Y,
    Z,
    number,
    rows_of,
    update_elements,
)
from fusemlp_kernels.triton.tiles import batch_rows, kernel, masked_width, product, row_pitch, whole_sum

# Numbers of the clock that a program copies at a time.
CLOCK: tl.constexpr = tl.constexpr(triton.next_power_of_2(max(COUNTERS.value, HYPER.value)))


@triton.jit
def meet(arrived, goal):
    """Wait until all programs are here, which is when ``arrived`` has come to ``goal``: each then sees what the others
    have stored, in the L2 cache. Return the goal of the next meeting."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release", scope="gpu")
    while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < goal:
        pass
    tl.debug_barrier()
    return goal + tl.num_programs(0)


@triton.jit
def tile_product(
    a, b, rows, at_m, at_n, M, N, K, a_row, b_row, gather,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Return the tile at ``at_m``, ``at_n`` of a (M, K) @ b (K, N), float32. ``A_TURNED``, ``B_TURNED``: in memory lies
    the transposed matrix. ``gather``: the rows of the batch are x[rows]; x is a, or b of ``A_TURNED``.

    The reduction is cut into SPLIT parts, which take BK elements each at a time; see ``linear.affine_tile_of_parts``.
    """
    a_row, b_row = row_pitch(a_row, True), row_pitch(b_row, True)
    acc = tl.zeros((SPLIT, at_m.shape[0], at_n.shape[0]), tl.float32)
    rest = tl.zeros((SPLIT, at_m.shape[0], at_n.shape[0]), tl.float32)
    if not A_TURNED:
        source = batch_rows(rows, at_m, M, gather)
        a_at, is_row = a + (tl.where(source >= 0, source, 0) * a_row)[None, :, None], (source >= 0)[None, :, None]
    # one stage where the reduction goes along the batch: copies of its numbers have 4 bytes, and no ``.cg``
    for start in tl.range(0, K, SPLIT * BK, num_stages=1 if A_TURNED else None):
        at_k = start + tl.arange(0, SPLIT)[:, None] * BK + tl.arange(0, BK)[None, :]
        far = at_k.to(tl.int64)
        if A_TURNED:
            inside = (at_k < K)[:, :, None] & (at_m < masked_width(M, True))[None, None, :]
            a_tile = tl.load(
                a + (far * a_row)[:, :, None] + at_m[None, None, :], mask=inside, other=0.0, cache_modifier=".cg"
            )
            a_tile = tl.permute(a_tile, (0, 2, 1))
            far = batch_rows(rows, at_k, K, gather)
        else:
            inside = is_row & (at_k < masked_width(K, True))[:, None, :]
            a_tile = tl.load(a_at + at_k[:, None, :], mask=inside, other=0.0, cache_modifier=".cg")
        if B_TURNED:
            inside = (at_k < masked_width(K, True))[:, :, None] & (at_n < N)[None, None, :]
            b_at = b + (at_n.to(tl.int64) * b_row)[None, None, :] + at_k[:, :, None]
        else:
            inside = ((at_k < K) & (far >= 0))[:, :, None] & (at_n < masked_width(N, True))[None, None, :]
            b_at = b + (tl.where(far >= 0, far, 0) * b_row)[:, :, None] + at_n[None, None, :]
        b_tile = tl.load(b_at, mask=inside, other=0.0, cache_modifier=".cg")
        acc, rest = product(a_tile, b_tile, acc, rest, PRODUCT)
    return tl.sum(whole_sum(acc, rest, PRODUCT), axis=0)


@triton.jit
def layer_at(compute, layers, index):
    """Return of a layer its row of the table, its widths, its activation, and its input with its row pitch."""
    row = layers + index * LAYER_COLUMNS
    x = compute + whole(tl.load(row + X), True)
    return row, number(row, LAYER_N), number(row, LAYER_K), number(row, ACTIVATION), x, number(row, X_ROW)


@triton.jit
def affine(
    x, weights, params, rows, row, at_m, at_n, count, N, K, x_row, index,
    BK: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Return the tile at ``at_m``, ``at_n`` of x @ w.T + b of a layer."""
    w, b, w_row = weights + whole(tl.load(row + W), True), params + tl.load(row + B), number(row, W_ROW)
    gather = tl.where(index == 0, 1, 0)
    z = tile_product(x, w, rows, at_m, at_n, count, N, K, x_row, w_row, gather, False, True, BK, SPLIT, PRODUCT)
    return z + tl.load(b + at_n, mask=at_n < N, other=0.0, cache_modifier=".cg")[None, :]


@triton.jit(noinline=True)
def forward(
    compute, weights, params, rows, layers, draws, shares, counters, M, index,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Compute this program's tiles of a hidden layer's outputs."""
    count, batch_index = rows_of(counters, 0, M), tl.load(counters + BATCH_INDEX)
    rows += tl.load(counters + ROW_OFFSET)
    row, N, K, activation, x, x_row = layer_at(compute, layers, index)
    draw, share, pitch = draws + index * DRAW_COLUMNS, shares + index * SHARE_COLUMNS, number(row, PITCH)
    y, z = compute + whole(tl.load(row + Y), True), compute + whole(tl.load(row + Z), True)
    wide = tl.cdiv(N, BN)
    for tile in range(tl.program_id(0), tl.cdiv(count, BM) * wide, tl.num_programs(0)):
        first, col = tile // wide * BM, tile % wide * BN
        at_m, at_n = first + tl.arange(0, BM), col + tl.arange(0, BN)
        acc = affine(x, weights, params, rows, row, at_m, at_n, count, N, K, x_row, index, BK, SPLIT, PRODUCT)
        store_outputs(
            acc, y, z, first, col, batch_index, count, N, pitch, 1, pitch, 1, activation, tl.load(share + FIXED_SLOPE),
            needs_z(activation), number(draw, DRAW_LAYER), number(draw, KEY0), number(draw, KEY1),
            number(draw, THRESHOLD), tl.load(share + KEEP_SCALE), BM, BN, True, 1,
        )  # fmt: skip


@triton.jit(noinline=True)
def output_and_loss(
    compute, weights, params, rows, layers, shares, labels, target, weight, class_weight, settings, hyper, counters,
    partials, M, index, label_step, target_row, target_col, weight_step, ignored_low, ignored_high,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Compute the output layer and dz of this program's rows, and store the sums of their losses; BN >= N."""
    count = rows_of(counters, 0, M)
    rows += tl.load(counters + ROW_OFFSET)
    row, N, K, activation, x, x_row = layer_at(compute, layers, index)
    dz, pitch = compute + whole(tl.load(row + DZ), True), row_pitch(number(row, PITCH), True)
    slope, ignored = tl.load(shares + index * SHARE_COLUMNS + FIXED_SLOPE), ignored_label(ignored_low, ignored_high)
    normaliser = normaliser_of(
        rows, count, labels, label_step, weight, weight_step, class_weight, ignored, N, settings, 1, CHUNK
    )
    scale = gradient_scale(hyper, normaliser, settings, 0)
    total, right, scored = tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    at_n = tl.arange(0, BN)
    for tile in range(tl.program_id(0), tl.cdiv(count, BM), tl.num_programs(0)):
        at_m = tile * BM + tl.arange(0, BM)
        z = affine(x, weights, params, rows, row, at_m, at_n, count, N, K, x_row, index, BK, SPLIT, PRODUCT)
        result, loss, hits, asked, _ = loss_of_rows(
            z, at_m, at_n, count, scale, rows, labels, label_step, target, target_row, target_col, weight,
            weight_step, class_weight, ignored, N, settings, 1, activation, slope, BM, CROSS_ENTROPY,
        )  # fmt: skip
        stored = (at_m < count)[:, None] & (at_n < masked_width(N, True))[None, :]
        place = at_m.to(tl.int64)[:, None] * pitch + at_n[None, :]
        tl.store(dz + place, result.to(dz.dtype.element_ty), mask=stored)
        total += loss.to(tl.float64)
        right += hits
        scored += asked
    partials += tl.program_id(0) * PARTIALS
    tl.store(partials, total)
    tl.store(partials + 1, right.to(tl.float64))
    tl.store(partials + 2, scored.to(tl.float64))
    tl.store(partials + 3, normaliser)


@triton.jit(noinline=True)
def backward(
    compute, weights, layers, draws, shares, counters, M, index,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Compute this program's tiles of dz of layer ``index`` from dz of the layer above it."""
    count, batch_index = rows_of(counters, 0, M), tl.load(counters + BATCH_INDEX)
    above, K, N, _, _, _ = layer_at(compute, layers, index + 1)
    row, draw, share = layers + index * LAYER_COLUMNS, draws + index * DRAW_COLUMNS, shares + index * SHARE_COLUMNS
    dz, w = compute + whole(tl.load(above + DZ), True), weights + whole(tl.load(above + W), True)
    dz_row, w_row, wide = number(above, PITCH), number(above, W_ROW), tl.cdiv(N, BN)
    y, out = compute + whole(tl.load(row + Z), True), compute + whole(tl.load(row + DZ), True)
    activation, threshold, pitch = number(row, ACTIVATION), number(draw, THRESHOLD), row_pitch(number(row, PITCH), True)
    for tile in range(tl.program_id(0), tl.cdiv(count, BM) * wide, tl.num_programs(0)):
        first, col = tile // wide * BM, tile % wide * BN
        at_m, at_n = first + tl.arange(0, BM), col + tl.arange(0, BN)
        g = tile_product(dz, w, dz, at_m, at_n, count, N, K, dz_row, w_row, 0, False, False, BK, SPLIT, PRODUCT)
        if threshold > 0:
            layer, key0, key1 = number(draw, DRAW_LAYER), number(draw, KEY0), number(draw, KEY1)
            keep = keep_mask(first, col, batch_index, layer, key0, key1, threshold, BM, BN)
            g = tl.where(keep, g * tl.load(share + KEEP_SCALE), 0.0)
        stored = (at_m < count)[:, None] & (at_n < masked_width(N, True))[None, :]
        place = at_m.to(tl.int64)[:, None] * pitch + at_n[None, :]
        v = tl.load(y + place, mask=stored, other=0.0, cache_modifier=".cg").to(tl.float32)
        v = tl.where(needs_z(activation) == 0, v * tl.load(share + KEPT_SHARE), v)
        result = g * derivative(v, activation, tl.load(share + FIXED_SLOPE))
        tl.store(out + place, tl.where((at_n < N)[None, :], result, 0.0).to(out.dtype.element_ty), mask=stored)


@triton.jit
def own_tile(dealt):
    """Return the first tile of this program among those of a tensor, after ``dealt`` tiles of others."""
    programs = tl.num_programs(0)
    return (tl.program_id(0) + programs - dealt % programs) % programs


@triton.jit(noinline=True)
def update_layers(
    compute, weights, params, first, second, rows, layers, counters, hyper, rule, tensors, M, depth, shadowed,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Update this program's tiles of all weights and biases by their gradients."""
    count, code = rows_of(counters, 0, M), number(rule, CODE)
    rows += tl.load(counters + ROW_OFFSET)
    dealt = 0
    for index in range(depth):
        row, N, K, _, x, x_row = layer_at(compute, layers, index)
        dz, dz_row = compute + whole(tl.load(row + DZ), True), row_pitch(number(row, PITCH), True)
        gather, task, wide = tl.where(index == 0, 1, 0), number(row, W_TASK), tl.cdiv(K, BN)
        w, tiles = whole(tl.load(row + W), True), tl.where(task >= 0, tl.cdiv(N, BM) * wide, 0)
        for tile in range(own_tile(dealt), tiles, tl.num_programs(0)):
            at_m, at_n = tile // wide * BM + tl.arange(0, BM), tile % wide * BN + tl.arange(0, BN)
            g = tile_product(
                dz, x, rows, at_m, at_n, N, K, count, dz_row, x_row, gather, True, False, BK, SPLIT, PRODUCT
            )
            at = w + at_m.to(tl.int64)[:, None] * row_pitch(number(row, W_ROW), True) + at_n[None, :]
            mask = (at_m < N)[:, None] & (at_n < masked_width(K, True))[None, :]
            # 0 * NaN is NaN, and a NaN in the padding would stay there
            g = tl.where((at_n < K)[None, :], g, 0.0)
            update_elements(
                g, at, mask, 0.0, weights, params, first, second, second, hyper, rule, tensors, task, code, shadowed
            )
        dealt += tiles
        task = number(row, B_TASK)
        tiles = tl.where(task >= 0, tl.cdiv(N, BM), 0)
        for tile in range(own_tile(dealt), tiles, tl.num_programs(0)):
            at_n = tile * BM + tl.arange(0, BM)
            sums = tl.zeros((SPLIT * BK, BM), tl.float32)
            for start in range(0, count, SPLIT * BK):
                at_b = start + tl.arange(0, SPLIT * BK)
                inside = (at_b < count)[:, None] & (at_n < masked_width(N, True))[None, :]
                place = at_b.to(tl.int64)[:, None] * dz_row + at_n[None, :]
                sums += tl.load(dz + place, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
            at = tl.load(row + B) + at_n
            update_elements(
                tl.sum(sums, axis=0), at, at_n < N, 0.0, weights, params, first, second, second, hyper, rule, tensors,
                task, code, 0,
            )  # fmt: skip
        dealt += tiles


@kernel(numbers_from="M")
def card_kernel(
    compute, weights, parameters, first, second, rows, labels, target, weight, class_weight, measured, layers, draws,
    shares, settings, rules, tensors, counters, hyper, rates, stats, epoch_stats, live, partials, arrived, clocks,
    clock_numbers,
    M, depth, lowest, rates_size, label_step, target_row, target_col, weight_step, ignored_low, ignored_high, shadowed,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr, BO: tl.constexpr,
    OUTPUTS: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """The steps of the model, in all programs of the launch; arguments as in ``resident_kernel``.

    dz goes back to layer ``lowest``. ``clocks``, ``clock_numbers``: each program's copies of ``counters``, ``hyper``.
    ``arrived`` (1,) int64 counts the arrivals at meetings, in all launches.
    """
    program, programs, at = tl.program_id(0), tl.num_programs(0), tl.arange(0, CLOCK)
    keeper = programs - 1
    # the arrivals of earlier launches, and of some programs of this one
    goal = (tl.atomic_add(arrived, 0, sem="relaxed", scope="gpu") // programs + 1) * programs
    clock = tl.where(program == keeper, counters, clocks + program * COUNTERS)
    numbers = tl.where(program == keeper, hyper, clock_numbers + program * HYPER)
    for _ in range(number(live, STEPS)):
        if program < keeper:
            copied = tl.load(counters + at, mask=at < COUNTERS, cache_modifier=".cg")
            tl.store(clock + at, copied, mask=at < COUNTERS)
            tl.store(numbers + at, tl.load(hyper + at, mask=at < HYPER, cache_modifier=".cg"), mask=at < HYPER)
        tl.debug_barrier()
        for index in range(depth - 1):
            forward(
                compute, weights, parameters, rows, layers, draws, shares, clock, M, index, BM, BN, BK, SPLIT, PRODUCT
            )
            goal = meet(arrived, goal)
        output_and_loss(
            compute, weights, parameters, rows, layers, shares, labels, target, weight, class_weight, settings,
            numbers, clock, partials, M, depth - 1, label_step, target_row, target_col, weight_step, ignored_low,
            ignored_high, BO, OUTPUTS, BK, SPLIT, PRODUCT, CROSS_ENTROPY,
        )  # fmt: skip
        goal = meet(arrived, goal)
        for above in range(depth - 1, lowest, -1):
            backward(compute, weights, layers, draws, shares, clock, M, above - 1, BM, BN, BK, SPLIT, PRODUCT)
            goal = meet(arrived, goal)
        update_layers(
            compute, weights, parameters, first, second, rows, layers, clock, numbers, rules, tensors, M, depth,
            shadowed, WN, WK, BK, SPLIT, PRODUCT,
        )  # fmt: skip
        if program == keeper:
            record_loss(
                sum_of(partials, programs, PARTIALS, 128), sum_of(partials + 1, programs, PARTIALS, 128),
                sum_of(partials + 2, programs, PARTIALS, 128), stats, settings,
                tl.load(partials + 3, cache_modifier=".cg"),
            )  # fmt: skip
            # all threads have read the clock of this step, and see the loss
            tl.debug_barrier()
            # it counts its row of ``live`` by the program
            own = live - program * LIVE_COLUMNS
            tick(counters, hyper, rates, stats, epoch_stats, rules, own, measured, M, rates_size)
        goal = meet(arrived, goal)
