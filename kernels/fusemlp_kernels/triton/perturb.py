"""Inputs that raise the loss, within a norm and bounds; ``reference.perturb`` defines them."""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels import philox as definition
from fusemlp_kernels.triton.clock import BATCH_INDEX
from fusemlp_kernels.triton.dropout import philox
from fusemlp_kernels.triton.functions import maximum, minimum, sign
from fusemlp_kernels.triton.tiles import this_batch

START: tl.constexpr = tl.constexpr(definition.START)


@triton.jit
def uniform(row, first_column, batch_index, key0, key1, COLS: tl.constexpr):
    """Return the numbers of ``philox.uniform`` for columns of a row, (COLS,); ``first_column`` is a multiple of 4."""
    zero = tl.zeros((COLS // 4,), tl.uint32)
    w0, w1, w2, w3 = philox(
        zero + (first_column // 4 + tl.arange(0, COLS // 4)).to(tl.uint32),
        zero + row.to(tl.uint32),
        zero + START,
        zero + batch_index.to(tl.uint32),
        zero + key0.to(tl.uint32, bitcast=True),
        zero + key1.to(tl.uint32, bitcast=True),
    )
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (COLS,))
    # exact in float32
    highest = (words >> 9).to(tl.int32, bitcast=True).to(tl.float32)
    return highest * 2.384185791015625e-07 + (1.1920928955078125e-07 - 1.0)


@triton.jit
def displacement(
    x, dx, adv, at, inside, x_col, dx_col, adv_col, row, batch_index, factor, eps, moves, euclid, drawn, key0, key1,
    start, COLS: tl.constexpr,
):  # fmt: skip
    """Return x and what is added to it, before it is brought back, for columns ``at`` of a row."""
    own = tl.load(x + at * x_col, mask=inside, other=0.0).to(tl.float32)
    d = tl.zeros((COLS,), tl.float32)
    if moves != 0:
        g = tl.load(dx + at * dx_col, mask=inside, other=0.0).to(tl.float32)
        step = factor.to(tl.float32) * sign(g)
        if euclid != 0:
            # the factor of a tiny gradient is no float32
            step = (factor * g.to(tl.float64)).to(tl.float32)
        d = tl.load(adv + at * adv_col, mask=inside, other=0.0).to(tl.float32) - own + step
    if drawn != 0:
        d = eps * uniform(row, start, batch_index, key0, key1, COLS)
    return own, tl.where(inside, d, 0.0)


@triton.jit(
    do_not_specialize=[
        "K", "x_row", "x_col", "dx_row", "dx_col", "adv_row", "adv_col", "gather", "moves", "euclid", "drawn",
        "key0", "key1",
    ]
)  # fmt: skip
def perturb_kernel(
    x, dx, adv, rows, counters, K, x_row, x_col, dx_row, dx_col, adv_row, adv_col, gather, moves, euclid, drawn,
    key0, key1, length, eps, low, high, BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of adv (M, K), one a program; with ``moves`` a step along dx, with ``drawn`` a random start. Norms are
    taken in float64, where no square of a float32 underflows."""
    row = tl.program_id(0)
    batch_index = tl.load(counters + BATCH_INDEX)
    source = row.to(tl.int64)
    if gather != 0:
        source = tl.load(this_batch(rows, counters, gather) + row)
    live = source >= 0
    width = tl.where(live, K, 0)
    x += tl.where(live, source, 0) * x_row
    dx += row.to(tl.int64) * dx_row
    adv += row.to(tl.int64) * adv_row
    x_col = x_col.to(tl.int64)
    dx_col = dx_col.to(tl.int64)
    adv_col = adv_col.to(tl.int64)
    factor = tl.full((), 1.0, tl.float64) * length
    share = tl.full((), 1.0, tl.float32)
    if euclid != 0:
        if moves != 0:
            squares = tl.zeros((BLOCK,), tl.float64)
            for start in range(0, K, BLOCK):
                at = start + tl.arange(0, BLOCK)
                g = tl.load(dx + at * dx_col, mask=at < width, other=0.0).to(tl.float64)
                squares += g * g
            norm = tl.sqrt(tl.sum(squares, axis=0))
            factor = tl.where(norm == 0.0, 0.0, length / tl.where(norm == 0.0, 1.0, norm))
        squares = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, K, BLOCK):
            at = start + tl.arange(0, BLOCK)
            _, d = displacement(
                x, dx, adv, at, at < width, x_col, dx_col, adv_col, row, batch_index, factor, eps, moves, euclid,
                drawn, key0, key1, start, BLOCK,
            )  # fmt: skip
            squares += d.to(tl.float64) * d.to(tl.float64)
        norm = tl.sqrt(tl.sum(squares, axis=0))
        # a NaN stays
        share = tl.where(norm <= eps, 1.0, eps / norm).to(tl.float32)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        own, d = displacement(
            x, dx, adv, at, at < width, x_col, dx_col, adv_col, row, batch_index, factor, eps, moves, euclid,
            drawn, key0, key1, start, BLOCK,
        )  # fmt: skip
        if euclid == 0:
            d = minimum(maximum(d, -eps), eps)
        moved = minimum(maximum(own + share * d, low), high)
        moved = tl.where(live, moved, 0.0)
        tl.store(adv + at * adv_col, moved.to(adv.dtype.element_ty), mask=at < K)
