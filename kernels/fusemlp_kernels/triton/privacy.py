"""Private training: rows of ``dz`` clipped by the norms of their gradients, and the noise of ``philox.normal``."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fusemlp_kernels import philox
from fusemlp_kernels.triton.clock import ROW_COUNT
from fusemlp_kernels.triton.dropout import philox as philox_words
from fusemlp_kernels.triton.gradients import (
    BIAS,
    DZ,
    DZ_COL,
    DZ_ROW,
    FIELDS,
    GATHER,
    KIND,
    P_ROW,
    TASK_K,
    TASK_N,
    X_COL,
    X_ROW,
    X,
)
from fusemlp_kernels.triton.tiles import batch_rows, this_batch

NORMALS: tl.constexpr = tl.constexpr(philox.NORMALS)
UNIT: tl.constexpr = tl.constexpr(2.0**-32)
HALF_PI: tl.constexpr = tl.constexpr(0.5 * math.pi)
COSINE: tl.constexpr = tl.constexpr(philox.COSINE)
SINE: tl.constexpr = tl.constexpr(philox.SINE)
COSINES: tl.constexpr = tl.constexpr(len(philox.COSINE))
SINES: tl.constexpr = tl.constexpr(len(philox.SINE))


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


@triton.jit(do_not_specialize=["M", "tasks"])
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
def normal(element, tensor, update, key0, key1):
    """Return the numbers of ``philox.normal`` for elements (int64) of a tensor, float64.

    A turn by a quadrant's half leaves angles up to pi / 4.
    """
    zero = tl.zeros_like(element).to(tl.uint32)
    w0, w1, w2, w3 = philox_words(
        (element % NORMALS // 4).to(tl.uint32),
        (element // NORMALS).to(tl.uint32),
        # 2**32 - 2 - tensor, modulo 2**32
        zero + (-2 - tensor).to(tl.uint32),
        zero + update.to(tl.uint32),
        zero + key0.to(tl.uint32, bitcast=True),
        zero + key1.to(tl.uint32, bitcast=True),
    )
    second, odd = element % 4 >= 2, element % 2 == 1
    angle = tl.where(second, w3, w1)
    length = tl.sqrt(-tl.log((tl.where(second, w2, w0).to(tl.float64) + 0.5) * UNIT))
    t = ((angle.to(tl.float64) + 0.5) * UNIT - 0.5) * HALF_PI
    square = t * t
    cosine, sine = tl.zeros_like(t), tl.zeros_like(t)
    for i in tl.static_range(COSINES):
        cosine = cosine * square + COSINE[i]
    for i in tl.static_range(SINES):
        sine = sine * square + SINE[i]
    sine = sine * t
    z = length * (cosine + tl.where(odd, sine, -sine))
    return tl.where(tl.where(odd, angle & 2, angle & 1) != 0, -z, z)


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
