"""Inputs as sines and cosines of octaves, and the gradient by the inputs; ``reference.encode`` defines them."""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.members import batch_tile
from fusemlp_kernels.triton.norms import rows_from, store_tile
from fusemlp_kernels.triton.tiles import batch_rows, this_batch, tile_of


@triton.jit
def waves(t):
    """Return sin(pi t) and cos(pi t), float32, each within 6 * 2**-24 of the true one: see
    ``numpy.compiled.encoding``, whose reduction and polynomial they have."""
    a = tl.abs(t)
    r = a - 2.0 * tl.floor(0.5 * a)
    r = tl.where(r > 1.0, r - 2.0, r)
    a = tl.abs(r)
    near = tl.where(a <= 0.5, a, 1.0 - a)
    return _sine(tl.where((r < 0) != (t < 0), -near, near)), _sine(0.5 - a)


@triton.jit
def _sine(s):
    """Return sin(pi s) for s from -1/2 to 1/2."""
    z = s * s
    p = 0.0775603869352 * z - 0.5982421263871
    p = p * z + 2.5500697262913
    p = p * z - 5.1677096847986
    p = p * z + 3.1415926368954
    return p * s


@triton.jit(
    do_not_specialize=["M", "N", "K", "inputs_row", "inputs_col", "y_row", "y_col", "gather", "octaves", "before"]
)
def encode_kernel(
    inputs, y, rows, counters, M, N, K, inputs_row, inputs_col, y_row, y_col, gather, octaves, before,
    BM: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y (M, N): of the K inputs 2 * octaves waves each, after ``before`` columns of the inputs themselves; a tile
    (BM, BK) a program. ``gather``: the batch is inputs[rows]."""
    tile_m, tile_n = tile_of(tl.program_id(0), M, N, BM, BK)
    own, col = rows_from(tile_m * BM, M, BM), tile_n * BK
    sources = batch_rows(this_batch(rows, counters, gather), tile_m * BM + tl.arange(0, BM), M, gather)
    at_n = col + tl.arange(0, BK)
    wave = at_n - before
    of_wave = wave >= 0
    at_k = tl.where(of_wave, wave // (2 * octaves), at_n)
    x = batch_tile(inputs, sources, at_k, at_n < N, inputs_row, inputs_col, False)
    octave = tl.where(of_wave, wave % (2 * octaves) // 2, 0)
    # the bits of a power of two
    sine, cosine = waves(x * ((octave + 127) << 23).to(tl.float32, bitcast=True)[None, :])
    v = tl.where((wave % 2 == 0)[None, :], sine, cosine)
    store_tile(y, tl.where(of_wave[None, :], v, x), own, col, N, y_row, y_col, BK, ALIGNED)


@triton.jit(
    do_not_specialize=[
        "M", "N", "K", "inputs_row", "inputs_col", "dy_row", "dy_col", "dx_row", "dx_col", "gather", "octaves",
        "before",
    ]
)  # fmt: skip
def grad_encode_kernel(
    inputs, dy, dx, rows, counters, M, N, K, inputs_row, inputs_col, dy_row, dy_col, dx_row, dx_col, gather, octaves,
    before, BM: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dx (M, K), the gradient by the inputs, from dy (M, N), that by y; a tile (BM, BK) a program."""
    tile_m, tile_k = tile_of(tl.program_id(0), M, K, BM, BK)
    own, col = rows_from(tile_m * BM, M, BM), tile_k * BK
    sources = batch_rows(this_batch(rows, counters, gather), tile_m * BM + tl.arange(0, BM), M, gather)
    at_k = col + tl.arange(0, BK)
    t = batch_tile(inputs, sources, at_k, at_k < K, inputs_row, inputs_col, False)
    total = batch_tile(dy, own, at_k, at_k < before, dy_row, dy_col, False)
    factor = tl.full((), 3.141592653589793, tl.float32)
    for octave in range(0, octaves):
        sine, cosine = waves(t)
        at_n = before + 2 * (at_k * octaves + octave)
        by_sine = batch_tile(dy, own, at_n, at_k < K, dy_row, dy_col, False)
        by_cosine = batch_tile(dy, own, at_n + 1, at_k < K, dy_row, dy_col, False)
        total += factor * (cosine * by_sine - sine * by_cosine)
        factor += factor
        t += t
    store_tile(dx, total, own, col, K, dx_row, dx_col, BK, ALIGNED)
