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

from fusemlp_kernels.triton.clock import (
    ACCUMULATE,
    BATCH_INDEX,
    CLIP_NORM,
    CODE,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_STEP,
    ROW_TOTAL,
    advance_clock,
)
from fusemlp_kernels.triton.gradients import TENSOR_FIELDS, square_sum, whole
from fusemlp_kernels.triton.loss import LAST_LOSS, LOSS_SUM, account, record_loss
from fusemlp_kernels.triton.resident_layers import (
    BACKWARD,
    BATCH_LOSSES,
    COUNTERS,
    ELEMENTWISE,
    ENTROPY,
    EPOCHS,
    FORWARD,
    GRADIENTS,
    HYPER,
    LIVE_COLUMNS,
    MEASURE,
    MEASURES,
    NORMALISER,
    PENALTIES,
    PENALTY,
    RULE_COLUMNS,
    SEGMENT_COLUMNS,
    SETTING_COLUMNS,
    STATS,
    STATS_BLOCK,
    STEPS,
    SWEEP,
    UPDATE,
    backward,
    forward,
    gradient_at,
    gradients_of_layer,
    measure,
    number,
    output_tile,
    phase_of,
    rows_of,
    update_elements,
)
from fusemlp_kernels.triton.tiles import kernel
from fusemlp_kernels.triton.update import clip_factor


@triton.jit
def is_due(counters, rule):
    """Return whether this batch is the last that an update accumulates."""
    return (tl.load(counters + BATCH_INDEX) + 1) % tl.load(rule + ACCUMULATE).to(tl.int64) == 0


@triton.jit(noinline=True)
def update_from_memory(
    weights, params, grads, first, second, average, segments, counters, hyper, rules, tensors, entry, trained, size,
    shadowed,
):  # fmt: skip
    """Update all tensors by the mean of the accumulated gradients, clipped by their global norm, if this batch is the
    last that the update accumulates."""
    model = tl.load(entry)
    arena = whole(model * size, True)
    weights += arena
    params += arena
    grads += arena
    first += arena
    second += arena
    average += arena
    hyper += model * HYPER
    rule = rules + model * RULE_COLUMNS
    tensors += model * trained * TENSOR_FIELDS
    code = number(rule, CODE)
    factor = 1.0 / tl.load(rule + ACCUMULATE)
    limit = tl.load(rule + CLIP_NORM)
    updated = tl.where(is_due(counters + model * COUNTERS, rule), trained, 0)
    if limit < float("inf"):
        squares = tl.full((), 0.0, tl.float64)
        for task in range(updated):
            start, length = tl.load(segments + task * SEGMENT_COLUMNS), number(segments + task * SEGMENT_COLUMNS, 1)
            for done in range(0, length, SWEEP):
                at = done + tl.arange(0, SWEEP)
                squares += square_sum(tl.load(grads + start + at, mask=at < length, other=0.0))
        factor = factor * clip_factor(tl.sqrt(squares) * factor, limit)
    for task in range(updated):
        start, length = tl.load(segments + task * SEGMENT_COLUMNS), number(segments + task * SEGMENT_COLUMNS, 1)
        for done in range(0, length, SWEEP):
            at = done + tl.arange(0, SWEEP)
            g = tl.load(grads + start + at, mask=at < length, other=0.0)
            # a factor that is NaN must not get into the padding
            g = tl.where(g == 0.0, 0.0, g * factor.to(tl.float32))
            update_elements(
                g, start + at, at < length, 0.0, weights, params, first, second, average, hyper, rule, tensors, task,
                code, shadowed,
            )  # fmt: skip


@triton.jit(noinline=True)
def tick(counters, hyper, rates, stats, epoch_stats, rules, entry, measured, M, rates_size):
    """Add the batch to the model's sums and advance its clock; after an epoch store the epoch's sums.

    ``advance_clock`` knows one epoch only; with more, this corrects its next rows.
    """
    model, epochs = tl.load(entry), number(entry, EPOCHS)
    count = rows_of(counters, model, M)
    counters += model * COUNTERS
    stats += model * STATS
    rule = rules + model * RULE_COLUMNS
    due = is_due(counters, rule)
    step, total = tl.load(counters + ROW_STEP).to(tl.int32), tl.load(counters + ROW_TOTAL).to(tl.int32)
    offset = tl.load(counters + ROW_OFFSET).to(tl.int32)
    epoch = offset // tl.maximum(total, 1)
    inside = offset - epoch * total + step
    ends = (step != 0) & (inside >= total)
    closes = ends & (epoch < epochs)
    at = tl.arange(0, STATS_BLOCK)
    account = tl.load(stats + at, mask=at < STATS, other=0.0)
    account += tl.where(at == BATCH_LOSSES, tl.load(stats + LAST_LOSS) * count, 0.0)
    account += tl.where(at == PENALTIES, tl.load(measured + model * MEASURES + PENALTY) * count, 0.0)
    # all threads must read this batch's counters before one of them writes the next ones
    tl.debug_barrier()
    advance_clock(counters, hyper + model * HYPER, rates + model * rates_size, rule, due, False)
    tl.store(epoch_stats + (model * epochs + epoch) * STATS + at, account, mask=tl.where(closes, at < STATS, False))
    tl.store(stats + at, tl.where(closes, 0.0, account), mask=(at >= LOSS_SUM) & (at < STATS))
    if (epochs > 1) & (step != 0):
        epoch = tl.where(ends, tl.where(epoch + 1 < epochs, epoch + 1, 0), epoch)
        inside = tl.where(ends, 0, inside)
        tl.debug_barrier()
        tl.store(counters + ROW_OFFSET, (epoch * total + inside).to(tl.int64))
        tl.store(counters + ROW_COUNT, tl.minimum(total - inside, step).to(tl.int64))


@triton.jit(noinline=True)
def output_and_loss(
    compute, weights, params, rows, layers, shares, slopes, labels, target, weight, class_weight, settings, hyper,
    stats, measured, counters, entry, M, depth, work_size, size, rows_size, label_step, target_row, target_col,
    weight_step, ignored_low, ignored_high,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Compute the output layer and dz, and add the loss to ``stats``."""
    total, right, scored = tl.full((), 0.0, tl.float64), tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    below = tl.full((), 0.0, tl.float32)
    model = tl.load(entry)
    normaliser = tl.load(measured + model * MEASURES + NORMALISER)
    for first in range(0, rows_of(counters, model, M), BM):
        dz, dz_row = gradient_at(compute, layers, depth - 1, model * work_size)
        loss, hits, asked, part = output_tile(
            compute, weights, params, rows, layers, shares, labels, target, weight, class_weight, settings, hyper,
            normaliser, dz, dz_row, counters, entry, M, depth, work_size, size, rows_size, label_step, target_row,
            target_col, weight_step, ignored_low, ignored_high, first, BM, BN, BK, PRODUCT, CROSS_ENTROPY,
        )  # fmt: skip
        total += loss.to(tl.float64)
        right += hits
        scored += asked
        below += part
    tl.store(slopes + model * depth + depth - 1, below)
    sums = stats + model * STATS
    record_loss(
        total, right.to(tl.float64), scored.to(tl.float64), sums, account(sums, settings + model * SETTING_COLUMNS),
        normaliser,
    )  # fmt: skip


@kernel(numbers_from="M")
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
    entry = live + tl.program_id(0) * LIVE_COLUMNS
    for _ in range(number(entry, STEPS)):
        for place in range(phases):
            kind, index = phase_of(place, order0, order1, order2, order3)
            if kind == MEASURE:
                measure(
                    measured, parameters, rows, labels, weight, class_weight, layers, settings, counters, entry, M,
                    depth, size, rows_size, label_step, weight_step, ignored_low, ignored_high,
                )  # fmt: skip
            elif kind == FORWARD:
                forward(
                    compute, weights, parameters, rows, layers, draws, shares, counters, entry, M, depth, work_size,
                    size, rows_size, index, 0, 1, BM, BN, BK, SPLIT, PRODUCT, PARTS, None,
                )  # fmt: skip
            elif kind == ENTROPY:
                output_and_loss(
                    compute, weights, parameters, rows, layers, shares, slopes, labels, target, weight, class_weight,
                    settings, hyper, stats, measured, counters, entry, M, depth, work_size, size, rows_size, label_step,
                    target_row, target_col, weight_step, ignored_low, ignored_high, BO, OUTPUTS, BK, PRODUCT,
                    True,
                )  # fmt: skip
            elif kind == ELEMENTWISE:
                output_and_loss(
                    compute, weights, parameters, rows, layers, shares, slopes, labels, target, weight, class_weight,
                    settings, hyper, stats, measured, counters, entry, M, depth, work_size, size, rows_size, label_step,
                    target_row, target_col, weight_step, ignored_low, ignored_high, BO, OUTPUTS, BK, PRODUCT,
                    False,
                )  # fmt: skip
            elif kind == BACKWARD:
                backward(
                    compute, weights, parameters, layers, draws, shares, slopes, compute, 0, counters, entry, M, depth,
                    work_size, size, index, 0, 1, BM, BN, BK, 1, PRODUCT, PARTS, None,
                )  # fmt: skip
            elif kind == GRADIENTS:
                gradients_of_layer(
                    compute, weights, parameters, grads, first, second, rows, layers, slopes, counters, hyper, rules,
                    tensors, measured, entry, M, depth, trained, work_size, size, rows_size, index, stored, shadowed,
                    0, 1 << 30, counters, 0, WN, WK, BM, OUTPUTS, PRODUCT, PARTS, None,
                )  # fmt: skip
            elif kind == UPDATE:
                update_from_memory(
                    weights, parameters, grads, first, second, average, segments, counters, hyper, rules, tensors,
                    entry, trained, size, shadowed,
                )  # fmt: skip
            else:
                tick(counters, hyper, rates, stats, epoch_stats, rules, entry, measured, M, rates_size)
            tl.debug_barrier()
