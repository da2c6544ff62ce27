"""The optimizer over the flat arenas in one launch, for stored gradients; and private training, which clips rows of
``dz`` by the norms of their gradients and adds noise to the update."""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import (
    ACCUMULATE,
    BATCH_INDEX,
    CLIP_NORM,
    LOSS_SCALE,
    ROW_COUNT,
    SCALED,
    UPDATE_COUNT,
    advance_clock,
    is_last,
    leave_out_padding,
    sum_of,
)
from fusemlp_kernels.triton.functions import normal
from fusemlp_kernels.triton.gradients import (
    BIAS,
    DZ,
    DZ_COL,
    DZ_ROW,
    FIELDS,
    FIRST_TILE,
    GATHER,
    KIND,
    P_ROW,
    TASK_K,
    TASK_N,
    TENSOR_FIELDS,
    X_COL,
    X_ROW,
    P,
    X,
    square_sum,
    task_of,
)
from fusemlp_kernels.triton.pointwise_triton import stored_update
from fusemlp_kernels.triton.tiles import batch_rows, kernel, this_batch

# Rows of a batch that are counted at a time.
COUNTED: tl.constexpr = tl.constexpr(256)


@kernel(numbers_from="size")
def norm_kernel(grads, norm, partials, ticket, size, programs, BLOCK: tl.constexpr):
    """norm (1,) float64 = the Euclidean norm of grads (size,)."""
    program = tl.program_id(0)
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(partials + program, square_sum(tl.load(grads + at, mask=at < size, other=0.0)))
    if is_last(ticket, programs):
        tl.store(norm, tl.sqrt(sum_of(partials, programs, 1, 128)))


@triton.jit
def clip_factor(norm, limit):
    """Return the factor that keeps a gradient of this norm within ``limit``, as ``reference.clip_factor``; a NaN stays
    NaN."""
    factor = limit / (norm + 1e-6)
    return tl.where(factor > 1.0, 1.0, factor)


@triton.jit
def row_squares(base, sources, at_m, inside, width, row, col, BM: tl.constexpr, BK: tl.constexpr):
    """Return the squares of rows ``sources`` of a matrix of ``width`` columns, (BM,) float64."""
    sums = tl.zeros((BM, BK), tl.float64)
    for start in range(0, width, BK):
        at = start + tl.arange(0, BK)
        place = base + sources[:, None] * row + at.to(tl.int64)[None, :] * col
        v = tl.load(place, mask=inside[:, None] & (at < width)[None, :], other=0.0).to(tl.float64)
        sums += v * v
    return tl.sum(sums, axis=1)


@kernel(numbers_from="M")
def clip_examples_kernel(
    compute, rows, table, limit, counters, M, tasks,
    BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Scale BM rows of every dz so that no row's gradient has a norm above ``limit`` (1,) float64.

    ``table`` has a task for each layer, with the fields of ``gradients.TASK_FIELDS``: K is 0 where the weights are not
    trained, the kind BIAS where the bias is.
    """
    at_m = tl.program_id(0) * BM + tl.arange(0, BM)
    count = tl.minimum(tl.load(counters + ROW_COUNT), M).to(tl.int32)
    inside = at_m < count
    far = at_m.to(tl.int64)
    squares = tl.zeros((BM,), tl.float64)
    for task in range(tasks):
        row = table + task * FIELDS
        N, K, gather = tl.load(row + TASK_N).to(tl.int32), tl.load(row + TASK_K).to(tl.int32), tl.load(row + GATHER)
        sources = batch_rows(this_batch(rows, counters, gather), at_m, count, gather)
        dz, x = compute + tl.load(row + DZ), compute + tl.load(row + X)
        by_dz = row_squares(dz, far, at_m, inside, N, tl.load(row + DZ_ROW), tl.load(row + DZ_COL), BM, BK)
        by_x = row_squares(x, sources, at_m, sources >= 0, K, tl.load(row + X_ROW), tl.load(row + X_COL), BM, BK)
        squares += by_dz * (by_x + tl.where(tl.load(row + KIND) == BIAS, 1.0, 0.0))
    largest = tl.load(limit)
    clipped = inside & ((squares <= largest * largest) == 0)
    # a NaN stays
    factor = (largest / tl.sqrt(tl.where(clipped, squares, 1.0))).to(tl.float32)
    for task in range(tasks):
        row = table + task * FIELDS
        dz, N = compute + tl.load(row + DZ) + far * tl.load(row + DZ_ROW), tl.load(row + TASK_N).to(tl.int32)
        col = tl.load(row + DZ_COL)
        for start in range(0, N, BK):
            at = start + tl.arange(0, BK)
            place, stored = dz[:, None] + at.to(tl.int64)[None, :] * col, clipped[:, None] & (at < N)[None, :]
            scaled = tl.load(place, mask=stored, other=0.0).to(tl.float32) * factor[:, None]
            tl.store(place, scaled.to(compute.dtype.element_ty), mask=stored)


@triton.jit
def with_noise(g, first, row, task, noise, update, key0, key1, BLOCK: tl.constexpr):
    """Return (g + deviation * z) / divisor for elements of a segment from ``first`` on; zeros between its rows.

    ``row``: the segment's row of the table, with the width of its matrix in K and the pitch in P_ROW.
    """
    columns, pitch = tl.load(row + TASK_K), tl.load(row + P_ROW)
    # one division of 64 bits; those of the elements have 32
    top = first // pitch
    inside = (first - top * pitch).to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
    down = inside // pitch.to(tl.uint32)
    column = inside - down * pitch.to(tl.uint32)
    element = (top + down.to(tl.int64)) * columns + column.to(tl.int64)
    z = normal(element, task, update, key0, key1)
    noisy = (g.to(tl.float64) + tl.load(noise) * z) * (1.0 / tl.load(noise + 1))
    return tl.where(column.to(tl.int64) < columns, noisy, 0.0).to(tl.float32)


@kernel(numbers_from="tasks")
def update_kernel(
    parameters, grads, first, second, average, shadow, norm, table, tensors, hyper, rates, rule, counters, ticket,
    noise, rows, tasks, programs, parts, part, shadowed, key0, key1,
    BLOCK: tl.constexpr, RULE: tl.constexpr, TASKS: tl.constexpr, NOISY: tl.constexpr, MANY: tl.constexpr,
):  # fmt: skip
    """Update each segment of the arenas by its rule, to the mean of the accumulated gradients, clipped.

    The gradient is the sum of ``parts`` arenas, ``part`` elements apart, in order; of ``MANY`` at a time, if there are
    more. Under loss scaling a norm that is
    not finite skips the update: only the counters and the scale change. ``NOISY``: ``noise`` (2,) float64 has the
    deviation and the divisor, and the next batch is counted in ``rows``.
    """
    program = tl.program_id(0)
    task = task_of(table, tasks, program, TASKS)
    row = table + task * FIELDS
    every = tl.load(rule + ACCUMULATE)
    limit = tl.load(rule + CLIP_NORM)
    scaled = tl.load(rule + SCALED) != 0.0
    batch = tl.load(counters + BATCH_INDEX) + 1
    due = batch % every.to(tl.int64) == 0
    factor = 1.0 / every
    if scaled:
        factor = factor / tl.load(hyper + LOSS_SCALE)
    length = tl.load(norm)
    sound = (scaled == 0) | (tl.abs(length) < float("inf"))
    if limit < float("inf"):
        factor = factor * clip_factor(length * factor, limit)
    applied = due & sound
    if applied:
        start = (program - tl.load(row + FIRST_TILE)).to(tl.int64) * BLOCK
        at = start + tl.arange(0, BLOCK)
        mask = at < tl.load(row + TASK_N)
        at += tl.load(row + P)
        g = tl.load(grads + at, mask=mask, other=0.0)
        if MANY == 1:
            for index in range(1, parts):
                g += tl.load(grads + index * part.to(tl.int64) + at, mask=mask, other=0.0)
        else:
            sums = tl.zeros((MANY, BLOCK), tl.float32)
            for begin in range(0, parts, MANY):
                index = begin + tl.arange(0, MANY)
                there = grads + index[:, None] * part.to(tl.int64) + at[None, :]
                sums += tl.load(there, mask=(index < parts)[:, None] & mask[None, :], other=0.0)
            g = tl.sum(sums, axis=0)
        # a factor that is NaN must not get into the padding
        g = tl.where(g == 0.0, 0.0, g * factor.to(tl.float32))
        if NOISY:
            g = with_noise(g, start, row, task, noise, tl.load(counters + UPDATE_COUNT), key0, key1, BLOCK)
        stored_update(
            g, parameters + at, first + at, second + at, average + at, shadow + at, mask, hyper, rule,
            tl.load(tensors + task * TENSOR_FIELDS), tl.load(tensors + task * TENSOR_FIELDS + 1), shadowed, RULE,
        )  # fmt: skip
    if is_last(ticket, programs):
        advance_clock(counters, hyper, rates, rule, applied, due & (sound == 0))
        if NOISY:
            leave_out_padding(counters, rows, COUNTED)
