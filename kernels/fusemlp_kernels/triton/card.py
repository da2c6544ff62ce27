"""Many whole training steps of one model in one launch on the whole card: all programs share each phase of a step.

The tiles of a phase are dealt to the programs in turn; of the gradients each program has a stretch. Between two phases
they meet, which a cooperative launch allows: all of them run at a time. A program arrives, loads the numbers of its
next phase, and waits. It loads what others have stored from the L2 cache (``.cg``), because the L1 cache of a
multiprocessor may hold older values. The last program has no tiles: after the loss it adds up the losses and advances
the clock, while the others, which have read it when the step began, go on. dz of the layer below the outputs comes with
the loss: each program computes the outputs of its rows itself. The phases are those of ``resident_layers``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import BATCH_INDEX, ROW_COUNT, ROW_OFFSET
from fusemlp_kernels.triton.loss import account, ignored_label, normaliser_of, record_loss, sums_of_all
from fusemlp_kernels.triton.resident import tick
from fusemlp_kernels.triton.resident_layers import (
    CHUNK,
    HYPER,
    LAYER_COLUMNS,
    LAYER_N,
    LAYERS,
    STEPS,
    arrive,
    backward,
    ends_of_layers,
    forward,
    gradients_of_layer,
    loss_and_gradient,
    number,
    rows_of,
    wait,
)
from fusemlp_kernels.triton.tiles import kernel

# Elements of a bias at a time.
VECTOR: tl.constexpr = tl.constexpr(32)
# Numbers of the clock that a program copies.
CLOCK: tl.constexpr = tl.constexpr(triton.next_power_of_2(HYPER.value))


@triton.jit
def meet(arrived, goal):
    """Arrive, and wait for the others."""
    arrive(arrived)
    wait(arrived, goal)


@triton.jit(noinline=True)
def begin_step(hyper, counters, numbers, M):
    """Copy ``hyper`` to ``numbers``, since the clock changes it before the step ends; return the number of the batch's
    rows, the batch's index, and the place of its first row. A function of its own: its addresses take no registers."""
    at = tl.arange(0, CLOCK)
    copied = tl.load(hyper + at, mask=at < HYPER, cache_modifier=".cg")
    count = tl.minimum(tl.load(counters + ROW_COUNT, cache_modifier=".cg"), M).to(tl.int32)
    batch_index = tl.load(counters + BATCH_INDEX, cache_modifier=".cg")
    offset = tl.load(counters + ROW_OFFSET, cache_modifier=".cg")
    tl.store(numbers + at, copied, mask=at < HYPER)
    return count, batch_index, offset


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
    M, depth, lowest, rates_size, label_step, target_row, target_col, weight_step, ignored_low, ignored_high, shadowed,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WN: tl.constexpr, WK: tl.constexpr, BO: tl.constexpr,
    OUTPUTS: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """The steps of the model, in all programs of the launch; arguments as in ``resident_kernel``.

    dz goes back to layer ``lowest``. ``copies``: each program's copy of ``hyper``. ``arrived`` (1,) int64 counts the
    arrivals at meetings, in all launches.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    keeper = programs - 1
    workers = tl.maximum(keeper, 1)
    numbers = copies + program * HYPER
    # of the workers at the meetings of a step (one of them before the loss), and of all at its end
    arrivals = workers * (tl.maximum(depth, 2) + tl.maximum(depth - 2 - lowest, 0)) + programs
    # the arrivals of earlier launches; some of this one may have come
    start = tl.atomic_add(arrived, 0, sem="relaxed", scope="gpu") // arrivals * arrivals
    # this program's tiles of the gradients
    ends = ends_of_layers(layers, depth, WN, WK, VECTOR)
    total = tl.max(ends)
    begin, end = program * total // workers, (program + 1) * total // workers
    for _ in range(number(live, STEPS)):
        count, batch_index, offset = begin_step(hyper, counters, numbers, M)
        batch = rows + offset
        if program < workers:
            inside = 0
            for index in range(depth - 1):
                if index > 0:
                    inside += workers
                    meet(arrived, start + inside)
                forward(
                    compute, weights, parameters, batch, layers, draws, shares, batch_index, live, count, depth, 0, 0,
                    0, index, program, workers, BM, BN, BK, SPLIT, PRODUCT, 1, ".cg",
                )  # fmt: skip
            inside += workers
            arrive(arrived)
            loss_and_gradient(
                compute, weights, parameters, batch, layers, draws, shares, labels, target, weight, class_weight,
                settings, numbers, partials, arrived, start + inside, count, batch_index, depth, lowest, label_step,
                target_row, target_col, weight_step, ignored_low, ignored_high, program, workers,
                BO, BN, BK, OUTPUTS, SPLIT, PRODUCT, CROSS_ENTROPY,
            )  # fmt: skip
            for above in range(depth - 2, lowest, -1):
                inside += workers
                arrive(arrived)
                backward(
                    compute, weights, parameters, layers, draws, shares, parameters, arrived, start + inside,
                    batch_index, live, count, depth, 0, 0, above - 1, program, workers, BM, BK, BN, SPLIT, PRODUCT, 1,
                    ".cg",
                )  # fmt: skip
            inside += workers
            arrive(arrived)
            # one layer at least, which waits
            lower = tl.minimum(tl.sum((ends <= begin).to(tl.int32)), depth - 1)
            for index in range(lower, tl.maximum(tl.sum((ends < end).to(tl.int32)), lower) + 1):
                before = tl.max(tl.where(tl.arange(0, LAYERS) < index, ends, 0))
                gradients_of_layer(
                    compute, weights, parameters, parameters, first, second, batch, layers, parameters, batch_index,
                    numbers, rules, tensors, measured, live, count, depth, 0, 0, 0, 0, index, 0, shadowed,
                    begin - before, end - before, arrived, start + inside, WN, WK, SPLIT * BK, VECTOR, PRODUCT, 1,
                    ".cg",
                )  # fmt: skip
        if program == keeper:
            wait(arrived, start + workers * tl.maximum(depth, 2))
            keep(
                rows, labels, weight, class_weight, measured, layers, settings, rules, counters, hyper, rates, stats,
                epoch_stats, live, partials, M, depth, rates_size, label_step, weight_step, ignored_low,
                ignored_high, BO,
            )  # fmt: skip
            wait(arrived, start + arrivals - programs)
        start += arrivals
        meet(arrived, start)
