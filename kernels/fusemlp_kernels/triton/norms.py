"""Rows of the batch normalised, with their factors, activation and dropout, and back; and the sum of two matrices.

A program has whole rows, which it reads once for each sum over them. The way back through factors, activation and
dropout is that of a single member (``members.grad_affine_members_kernel``).
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels import contract
from fusemlp_kernels.triton.clock import BATCH_INDEX
from fusemlp_kernels.triton.dropout import keep_mask
from fusemlp_kernels.triton.members import batch_tile
from fusemlp_kernels.triton.pointwise_triton import activate
from fusemlp_kernels.triton.tiles import column_step, masked_width, row_pitch, tile_of

# Kinds of ``contract.Norm``, from 1 on; 0 for none.
LAYER_NORM: tl.constexpr = tl.constexpr(1 + contract.NORMS.index("layer"))


@triton.jit
def rows_from(first, M, BM: tl.constexpr):
    """Return the rows of the batch from ``first`` on, int64, -1 after the last."""
    at_m = first + tl.arange(0, BM)
    return tl.where(at_m < M, at_m, -1).to(tl.int64)


@triton.jit
def tile_at(x, rows, first, K, row, col, BK: tl.constexpr, ALIGNED: tl.constexpr):
    """Return ``rows`` of a matrix at BK columns from ``first`` on, float32; zeros outside."""
    at_k = first + tl.arange(0, BK)
    return batch_tile(x, rows, at_k, at_k < masked_width(K, ALIGNED), row, col, ALIGNED)


@triton.jit
def store_tile(y, v, rows, first, K, row, col, BK: tl.constexpr, ALIGNED: tl.constexpr):
    """Store what ``tile_at`` loads; zeros after the last column."""
    at_k, live = first + tl.arange(0, BK), rows >= 0
    places = y + tl.where(live, rows, 0)[:, None] * row_pitch(row, ALIGNED)
    places += at_k[None, :] * column_step(col, ALIGNED)
    stored = live[:, None] & (at_k < masked_width(K, ALIGNED))[None, :]
    tl.store(places, tl.where((at_k < K)[None, :], v, 0.0).to(y.dtype.element_ty), mask=stored)


@triton.jit
def centre_and_factor(
    x, rows, K, x_row, x_col, norm_kind, eps, BM: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr
):  # fmt: skip
    """Return, for each of ``rows``, what is taken from x and by what the difference is multiplied, (BM,) float32.

    The squares are those of the differences: the mean of x**2 less the square of the mean would cancel.
    """
    mean, factor = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32) + 1.0
    if norm_kind == LAYER_NORM:
        total = tl.zeros((BM, BK), tl.float32)
        for col in range(0, K, BK):
            total += tile_at(x, rows, col, K, x_row, x_col, BK, ALIGNED)
        mean = tl.sum(total, axis=1) / K
    if norm_kind != 0:
        squares = tl.zeros((BM, BK), tl.float32)
        for col in range(0, K, BK):
            v = tile_at(x, rows, col, K, x_row, x_col, BK, ALIGNED) - mean[:, None]
            squares += tl.where((col + tl.arange(0, BK) < K)[None, :], v * v, 0.0)
        factor = tl.div_rn(factor, tl.sqrt_rn(tl.sum(squares, axis=1) / K + eps))
    return mean, factor


@triton.jit(
    do_not_specialize=[
        "M", "K", "x_row", "x_col", "y_row", "y_col", "g_step", "b_step", "norm_kind", "activation", "layer", "key0",
        "key1", "threshold",
    ]
)  # fmt: skip
def normalise_kernel(
    x, y, g, b, counters, M, K, x_row, x_col, y_row, y_col, g_step, b_step, norm_kind, eps,
    activation, slope, layer, key0, key1, threshold, keep_scale,
    BM: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y (M, K) = dropout(activation(n * g + b)), n being the rows of x normalised; BM whole rows a program."""
    first = tl.program_id(0) * BM
    rows, batch_index = rows_from(first, M, BM), tl.load(counters + BATCH_INDEX)
    mean, factor = centre_and_factor(x, rows, K, x_row, x_col, norm_kind, eps, BM, BK, ALIGNED)
    for col in range(0, K, BK):
        at_k = col + tl.arange(0, BK)
        v = (tile_at(x, rows, col, K, x_row, x_col, BK, ALIGNED) - mean[:, None]) * factor[:, None]
        v = v * tl.load(g + at_k * g_step.to(tl.int64), mask=at_k < K, other=0.0)[None, :]
        v = v + tl.load(b + at_k * b_step.to(tl.int64), mask=at_k < K, other=0.0)[None, :]
        v = activate(v, activation, slope)
        if threshold > 0:
            keep = keep_mask(first, col, batch_index, layer, key0, key1, threshold, BM, BK)
            v = tl.where(keep, v * keep_scale, 0.0)
        store_tile(y, v, rows, col, K, y_row, y_col, BK, ALIGNED)


@triton.jit(do_not_specialize=["M", "K", "x_row", "x_col", "dx_row", "dx_col", "norm_kind"])
def grad_normalise_kernel(
    x, dx, M, K, x_row, x_col, dx_row, dx_col, norm_kind, eps,
    BM: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dx (M, K), the gradient dn by the normalised rows n, becomes that by x; BM whole rows a program.

    It is (dn - mean(dn) - n * mean(dn * n)) * factor (Ba, Kiros and Hinton, 2016), without mean(dn) for "rms".
    """
    rows = rows_from(tl.program_id(0) * BM, M, BM)
    mean, factor = centre_and_factor(x, rows, K, x_row, x_col, norm_kind, eps, BM, BK, ALIGNED)
    total, along_n = tl.zeros((BM, BK), tl.float32), tl.zeros((BM, BK), tl.float32)
    for col in range(0, K, BK):
        n = (tile_at(x, rows, col, K, x_row, x_col, BK, ALIGNED) - mean[:, None]) * factor[:, None]
        dn = tile_at(dx, rows, col, K, dx_row, dx_col, BK, ALIGNED)
        total += dn
        along_n += dn * n
    shift, share = tl.where(norm_kind == LAYER_NORM, tl.sum(total, axis=1) / K, 0.0), tl.sum(along_n, axis=1) / K
    for col in range(0, K, BK):
        n = (tile_at(x, rows, col, K, x_row, x_col, BK, ALIGNED) - mean[:, None]) * factor[:, None]
        dn = tile_at(dx, rows, col, K, dx_row, dx_col, BK, ALIGNED)
        v = (dn - shift[:, None] - n * share[:, None]) * factor[:, None]
        store_tile(dx, v, rows, col, K, dx_row, dx_col, BK, ALIGNED)


@triton.jit(do_not_specialize=["M", "K", "x_row", "x_col", "other_row", "other_col", "y_row", "y_col"])
def add_kernel(
    x, other, y, M, K, x_row, x_col, other_row, other_col, y_row, y_col,
    BM: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y (M, K) = x + other, a tile (BM, BK) a program."""
    tile_m, tile_k = tile_of(tl.program_id(0), M, K, BM, BK)
    rows, col = rows_from(tile_m * BM, M, BM), tile_k * BK
    v = tile_at(x, rows, col, K, x_row, x_col, BK, ALIGNED)
    v += tile_at(other, rows, col, K, other_row, other_col, BK, ALIGNED)
    store_tile(y, v, rows, col, K, y_row, y_col, BK, ALIGNED)
