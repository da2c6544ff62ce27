"""The optimizer over the flat arenas in one launch, for stored gradients."""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import (
    ACCUMULATE,
    BATCH_INDEX,
    CLIP_NORM,
    LOSS_SCALE,
    SCALED,
    UPDATE_COUNT,
    advance_clock,
    is_last,
    leave_out_padding,
    sum_of,
)
from fusemlp_kernels.triton.gradients import FIELDS, FIRST_TILE, TASK_N, TENSOR_FIELDS, P, square_sum, task_of
from fusemlp_kernels.triton.pointwise_triton import stored_update
from fusemlp_kernels.triton.privacy import with_noise

# Rows of a batch that are counted at a time.
COUNTED: tl.constexpr = tl.constexpr(256)


@triton.jit(do_not_specialize=["size", "programs"])
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


@triton.jit(do_not_specialize=["tasks", "programs", "parts", "part", "shadowed", "key0", "key1"])
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
