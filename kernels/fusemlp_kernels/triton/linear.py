"""A layer forward in one kernel: matrix product, bias, activation, dropout."""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import BATCH_INDEX
from fusemlp_kernels.triton.functions import keep_mask
from fusemlp_kernels.triton.pointwise_triton import PRELU, activate
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


@triton.jit
def affine_tile(
    x, w, b, rows, row, col, M, N, K, x_row, x_col, w_row, w_col, b_step, gather,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """z = x[rows] @ w.T + b for the rows from ``row`` and the columns from ``col`` on, (BM, BN) float32.

    Zero in the columns from N on.
    """
    at_m = row + tl.arange(0, BM)
    at_n = col + tl.arange(0, BN)
    at_k = tl.arange(0, BK)
    source = batch_rows(rows, at_m, M, gather)
    wanted = source >= 0
    named = at_n < N
    width = masked_width(K, ALIGNED)
    step_x, step_w = column_step(x_col, ALIGNED), column_step(w_col, ALIGNED)
    x_at = x + tl.where(wanted, source, 0)[:, None] * row_pitch(x_row, ALIGNED) + at_k[None, :] * step_x
    w_at = w + at_n.to(tl.int64)[None, :] * row_pitch(w_row, ALIGNED) + at_k[:, None] * step_w
    z = tl.zeros((BM, BN), tl.float32)
    rest = tl.zeros((BM, BN), tl.float32)
    for start in range(0, width, BK):
        inside = at_k < width - start
        x_tile = tl.load(x_at, mask=wanted[:, None] & inside[None, :], other=0.0)
        w_tile = tl.load(w_at, mask=named[None, :] & inside[:, None], other=0.0)
        z, rest = product(x_tile, w_tile, z, rest, PRODUCT)
        x_at += BK * step_x
        w_at += BK * step_w
    bias = tl.load(b + at_n * b_step, mask=named, other=0.0)
    return whole_sum(z, rest, PRODUCT) + bias[None, :]


@triton.jit
def affine_tile_of_parts(
    x, w, b, rows, row, col, M, N, K, x_row, w_row, b_step, gather,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, PRODUCT: tl.constexpr,
    CACHE: tl.constexpr = None,
):  # fmt: skip
    """``affine_tile`` of aligned matrices, with the reduction cut into SPLIT parts, which take BK elements each at a
    time; the sums of the parts are added in a fixed order. ``CACHE``: ".cg" reads what other programs of the launch
    have stored.

    Triton gives each part to warps of its own, so that the reduction has fewer steps one after another.
    """
    at_m = row + tl.arange(0, BM)
    at_n = col + tl.arange(0, BN)
    at_k = tl.arange(0, SPLIT)[:, None] * BK + tl.arange(0, BK)[None, :]
    source = batch_rows(rows, at_m, M, gather)
    wanted = source >= 0
    named = at_n < N
    width = masked_width(K, True)
    x_at = x + (tl.where(wanted, source, 0) * row_pitch(x_row, True))[None, :, None] + at_k[:, None, :]
    w_at = w + (at_n.to(tl.int64) * row_pitch(w_row, True))[None, None, :] + at_k[:, :, None]
    # few numbers, which load during the product
    bias = tl.load(b + at_n * b_step, mask=named, other=0.0, cache_modifier=CACHE)
    z = tl.zeros((SPLIT, BM, BN), tl.float32)
    rest = tl.zeros((SPLIT, BM, BN), tl.float32)
    for start in range(0, width, SPLIT * BK):
        inside = at_k < width - start
        x_tile = tl.load(x_at, mask=wanted[None, :, None] & inside[:, None, :], other=0.0, cache_modifier=CACHE)
        w_tile = tl.load(w_at, mask=named[None, None, :] & inside[:, :, None], other=0.0, cache_modifier=CACHE)
        z, rest = product(x_tile, w_tile, z, rest, PRODUCT)
        x_at += SPLIT * BK
        w_at += SPLIT * BK
    return tl.sum(whole_sum(z, rest, PRODUCT), axis=0) + bias[None, :]


# The constants with the rows and columns of a tensor descriptor's blocks, by the matrix.
BLOCKS = {"x": ("BM", "BK"), "w": ("BN", "BK")}


@triton.jit
def described_tile(
    x, w, b, row, col, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr
):  # fmt: skip
    """``affine_tile`` of tensor descriptors x and w, with blocks of (BM, BK) and (BN, BK); rows are those of x."""
    at_n = col + tl.arange(0, BN)
    bias = tl.load(b + at_n, mask=at_n < N, other=0.0)
    return described_product(x, w, row, col, 0, K, False, True, BM, BN, BK, PRODUCT) + bias[None, :]


@triton.jit
def store_outputs(
    acc, y, z, row, col, batch_index, M, N, y_row, y_col, z_row, z_col, activation, slope, store_z,
    layer, key0, key1, threshold, keep_scale,
    BM: tl.constexpr, BN: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Activate, drop and store the tile (BM, BN) of pre-activations from ``row`` and ``col`` on; see
    ``linear_kernel``."""
    at_m = row + tl.arange(0, BM)
    far = at_m.to(tl.int64)[:, None]
    y_rows, z_rows = y + far * row_pitch(y_row, ALIGNED), z + far * row_pitch(z_row, ALIGNED)
    y_step, z_step = column_step(y_col, ALIGNED), column_step(z_col, ALIGNED)
    for piece in tl.static_range(PARTS):
        first = col + piece * (BN // PARTS)
        at_n = first + tl.arange(0, BN // PARTS)
        out = part_of(acc, piece, PARTS, BM, BN)
        stored = (at_m < M)[:, None] & (at_n < masked_width(N, ALIGNED))[None, :]
        if store_z != 0:
            tl.store(z_rows + at_n[None, :] * z_step, out.to(z.dtype.element_ty), mask=stored)
        # sigmoid(0) is not 0: the columns after the last are cleared after the activation
        out = tl.where((at_n < N)[None, :], activate(out, activation, slope), 0.0)
        if threshold > 0:
            keep = keep_mask(row, first, batch_index, layer, key0, key1, threshold, BM, BN // PARTS)
            out = tl.where(keep, out * keep_scale, 0.0)
        tl.store(y_rows + at_n[None, :] * y_step, out.to(y.dtype.element_ty), mask=stored)


@kernel(numbers_from="M")
def linear_kernel(
    x, w, b, y, z, rows, slope_param, counters,
    M, N, K, x_row, x_col, w_row, w_col, b_step, y_row, y_col, z_row, z_col,
    gather, activation, slope, store_z, layer, key0, key1, threshold, keep_scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr, ALIGNED: tl.constexpr,
    PARTS: tl.constexpr, SPLIT: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """y (M, N) = dropout(activation(x[rows] @ w.T + b)), one program for each tile; z (M, N) where ``store_z``.

    ``gather``: the batch is x[rows], else x. ``slope`` is the activation's; prelu's is read from ``slope_param``.
    ``DESCRIBED``: x and w are tensor descriptors. ``threshold`` 0: no dropout. Numbers that differ from network to
    network are run-time values.
    """
    rows = this_batch(rows, counters, gather)
    slope = tl.load(slope_param, mask=activation == PRELU, other=slope)
    batch_index = tl.load(counters + BATCH_INDEX, mask=threshold > 0, other=0)
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BN)
    row, col = tile_m * BM, tile_n * BN
    if DESCRIBED:
        acc = described_tile(x, w, b, row, col, N, K, BM, BN, BK, PRODUCT)
    elif SPLIT > 1:
        acc = affine_tile_of_parts(
            x, w, b, rows, row, col, M, N, K, x_row, w_row, b_step, gather, BM, BN, BK, SPLIT, PRODUCT
        )
    else:
        acc = affine_tile(
            x, w, b, rows, row, col, M, N, K, x_row, x_col, w_row, w_col, b_step, gather, BM, BN, BK, PRODUCT, ALIGNED
        )
    store_outputs(
        acc, y, z, row, col, batch_index, M, N, y_row, y_col, z_row, z_col, activation, slope, store_z,
        layer, key0, key1, threshold, keep_scale, BM, BN, ALIGNED, PARTS,
    )  # fmt: skip
