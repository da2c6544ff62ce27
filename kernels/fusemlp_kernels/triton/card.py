"""Many whole training steps of one model in one launch on the whole card: all programs share each phase of a step.

The tiles of a phase are dealt to the programs in turn. Between two phases they meet, which a cooperative launch allows:
all of them run at a time. A program loads what others have stored from the L2 cache (``.cg``), because the L1 cache of
a multiprocessor may hold older values. The last program has no tiles: after the loss it adds up the losses and advances
the clock, beside the others, which have read it when the step began. dz of the layer below the outputs comes with the
loss: each program computes the outputs of its rows itself. The phases are those of ``resident_layers``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import BATCH_INDEX, ROW_COUNT, ROW_OFFSET
from fusemlp_kernels.triton.loss import PARTIALS, account, ignored_label, normaliser_of, record_loss, sums_of_all
from fusemlp_kernels.triton.resident import tick
from fusemlp_kernels.triton.resident_layers import (
    CHUNK,
    HYPER,
    LAYER_COLUMNS,
    LAYER_K,
    LAYER_N,
    STEPS,
    backward,
    forward,
    gradient_at,
    gradients_of_layer,
    number,
    output_tile,
    rows_of,
)
from fusemlp_kernels.triton.tiles import kernel

# Elements of a bias at a time, no fewer than threads: of fewer Triton may load one twice, in two layouts, and the later
# load would see what a thread has stored.
VECTOR: tl.constexpr = tl.constexpr(256)
# Numbers of the clock that a program copies.
CLOCK: tl.constexpr = tl.constexpr(triton.next_power_of_2(HYPER.value))


@triton.jit
def wait(arrived, goal):
    """Wait until ``arrived`` has come to ``goal``; then see what those that arrived have stored, in the L2 cache."""
    while tl.atomic_add(arrived, 0, sem="acquire", scope="gpu") < goal:
        pass
    tl.debug_barrier()


@triton.jit
def meet(arrived, goal):
    """Arrive, and wait for the others."""
    tl.debug_barrier()
    tl.atomic_add(arrived, 1, sem="release", scope="gpu")
    wait(arrived, goal)


@triton.jit(noinline=True)
def loss_and_gradient(
    compute, weights, params, batch, layers, draws, shares, labels, target, weight, class_weight, settings, hyper,
    partials, copies, count, batch_index, depth, lowest, label_step, target_row, target_col, weight_step, ignored_low,
    ignored_high, place, workers,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, OUTPUTS: tl.constexpr, SPLIT: tl.constexpr,
    PRODUCT: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Compute the outputs and dz of this program's rows, and its tiles of dz of the layer below; store the sums of the
    losses by BM rows."""
    index = depth - 1
    row = layers + index * LAYER_COLUMNS
    ignored, N = ignored_label(ignored_low, ignored_high), number(row, LAYER_N)
    normaliser = normaliser_of(
        batch, count, labels, label_step, weight, weight_step, class_weight, ignored, N, settings, 1, CHUNK
    )
    wide = tl.where(lowest < index, tl.cdiv(number(row, LAYER_K), BN), 1)
    tiles = tl.cdiv(count, BM) * wide
    stored, pitch = gradient_at(compute, layers, index, 0)
    for tile in range(place, tiles, workers):
        block = tile // wide
        # programs with the same rows: one stores dz for all, the others for themselves
        first = tile == block * wide
        dz = tl.where(first, stored, copies + place * BM * OUTPUTS - block * BM * OUTPUTS)
        dz_row = tl.where(first, pitch, OUTPUTS)
        loss, right, scored, below = output_tile(
            compute, weights, params, batch, layers, shares, labels, target, weight, class_weight, settings, hyper,
            normaliser, dz, dz_row, batch_index, layers, count, depth, 0, 0, 0, label_step, target_row, target_col,
            weight_step, ignored_low, ignored_high, block * BM, BM, OUTPUTS, BK, SPLIT, PRODUCT, CROSS_ENTROPY, ".cg",
        )  # fmt: skip
        if first:
            sums = partials + block * PARTIALS
            tl.store(sums, loss.to(tl.float64))
            tl.store(sums + 1, right.to(tl.float64))
            tl.store(sums + 2, scored.to(tl.float64))
            tl.store(sums + 3, below.to(tl.float64))
        tl.debug_barrier()
        if lowest < index:
            backward(
                compute, weights, params, layers, draws, shares, params, dz, dz_row, batch_index, layers, count, depth,
                0, 0, index - 1, tile, tiles, BM, OUTPUTS, BN, SPLIT, PRODUCT, 1, ".cg",
            )  # fmt: skip
        tl.debug_barrier()


@triton.jit(noinline=True)
def keep(
    rows, labels, weight, class_weight, measured, layers, settings, rules, counters, hyper, rates, stats, epoch_stats,
    live, partials, M, depth, rates_size, label_step, weight_step, ignored_low, ignored_high, BM: tl.constexpr,
):  # fmt: skip
    """Add up the losses of all rows, and advance the clock."""
    before, outputs = account(stats, settings), number(layers + (depth - 1) * LAYER_COLUMNS, LAYER_N)
    count = rows_of(counters, 0, M)
    total, right, scored, _ = sums_of_all(partials, tl.cdiv(count, BM), 128)
    normaliser = normaliser_of(
        rows + tl.load(counters + ROW_OFFSET), count, labels, label_step, weight, weight_step, class_weight,
        ignored_label(ignored_low, ignored_high), outputs, settings, 1, CHUNK,
    )  # fmt: skip
    record_loss(total, right, scored, stats, before, normaliser)
    # all threads see the loss
    tl.debug_barrier()
    tick(counters, hyper, rates, stats, epoch_stats, rules, live, measured, M, rates_size)


@kernel(numbers_from="M")
def card_kernel(
    compute, weights, parameters, first, second, rows, labels, target, weight, class_weight, measured, layers, draws,
    shares, settings, rules, tensors, counters, hyper, rates, stats, epoch_stats, live, partials, arrived, copies,
    hyper_copies,
    M, depth, lowest, rates_size, label_step, target_row, target_col, weight_step, ignored_low, ignored_high, shadowed,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr, BO: tl.constexpr,
    OUTPUTS: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """The steps of the model, in all programs of the launch; arguments as in ``resident_kernel``.

    dz goes back to layer ``lowest``. ``copies``: each program's dz of BO rows. ``hyper_copies``: its copy of ``hyper``.
    ``arrived`` (1,) int64 counts the arrivals at meetings, in all launches.
    """
    program, programs, at = tl.program_id(0), tl.num_programs(0), tl.arange(0, CLOCK)
    keeper = programs - 1
    workers = tl.maximum(keeper, 1)
    numbers = hyper_copies + program * HYPER
    # of the workers at the meetings of a step, and of all at its end
    inside = workers * (depth + tl.maximum(depth - 2 - lowest, 0))
    arrivals = inside + programs
    # the arrivals of earlier launches; some of this one may have come
    start = tl.atomic_add(arrived, 0, sem="relaxed", scope="gpu") // arrivals * arrivals
    for _ in range(number(live, STEPS)):
        copied = tl.load(hyper + at, mask=at < HYPER, cache_modifier=".cg")
        count = tl.minimum(tl.load(counters + ROW_COUNT, cache_modifier=".cg"), M).to(tl.int32)
        batch_index = tl.load(counters + BATCH_INDEX, cache_modifier=".cg")
        batch = rows + tl.load(counters + ROW_OFFSET, cache_modifier=".cg")
        if program < workers:
            tl.store(numbers + at, copied, mask=at < HYPER)
            goal = start
            for index in range(depth - 1):
                forward(
                    compute, weights, parameters, batch, layers, draws, shares, batch_index, live, count, depth, 0, 0,
                    0, index, program, workers, BM, BN, BK, SPLIT, PRODUCT, 1, ".cg",
                )  # fmt: skip
                goal += workers
                meet(arrived, goal)
            loss_and_gradient(
                compute, weights, parameters, batch, layers, draws, shares, labels, target, weight, class_weight,
                settings, numbers, partials, copies, count, batch_index, depth, lowest, label_step, target_row,
                target_col, weight_step, ignored_low, ignored_high, program, workers,
                BO, BN, BK, OUTPUTS, SPLIT, PRODUCT, CROSS_ENTROPY,
            )  # fmt: skip
            goal += workers
            meet(arrived, goal)
            for above in range(depth - 2, lowest, -1):
                dz, dz_row = gradient_at(compute, layers, above, 0)
                backward(
                    compute, weights, parameters, layers, draws, shares, parameters, dz, dz_row, batch_index, live,
                    count, depth, 0, 0, above - 1, program, workers, BM, BK, BN, SPLIT, PRODUCT, 1, ".cg",
                )  # fmt: skip
                goal += workers
                meet(arrived, goal)
            dealt = 0
            for index in range(depth):
                dealt = gradients_of_layer(
                    compute, weights, parameters, parameters, first, second, batch, layers, parameters, batch_index,
                    numbers, rules, tensors, measured, live, count, depth, 0, 0, 0, 0, index, 0, shadowed, dealt,
                    program, workers, WN, WK, SPLIT * BK, VECTOR, PRODUCT, 1, ".cg",
                )  # fmt: skip
        if program == keeper:
            wait(arrived, start + workers * depth)
            keep(
                rows, labels, weight, class_weight, measured, layers, settings, rules, counters, hyper, rates, stats,
                epoch_stats, live, partials, M, depth, rates_size, label_step, weight_step, ignored_low,
                ignored_high, BO,
            )  # fmt: skip
            wait(arrived, start + inside)
        start += arrivals
        meet(arrived, start)
