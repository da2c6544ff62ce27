"""Ops over rows, without a product: rows normalised, with factors, activation and dropout, and back; the sum of two
matrices; inputs as sines and cosines of octaves, and back; and inputs that raise the loss, within a norm and bounds.
``reference`` defines them.

A program reads its rows once for each sum over them. The way back through factors, activation and dropout is that of a
single member (``members.grad_affine_members_kernel``).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl

from fusemlp_kernels.checks import binds
from fusemlp_kernels.philox import seed_key
from fusemlp_kernels.triton import configs
from fusemlp_kernels.triton.clock import BATCH_INDEX
from fusemlp_kernels.triton.functions import keep_mask, maximum, minimum, sign, uniform
from fusemlp_kernels.triton.launch import Run, Tensor, TritonDevice, in_sequence, signed
from fusemlp_kernels.triton.layers import NOT_IN_LOAD, are_aligned, arguments_of
from fusemlp_kernels.triton.members import batch_tile, bind_grad_affine_members
from fusemlp_kernels.triton.pointwise_triton import activate
from fusemlp_kernels.triton.tiles import batch_rows, column_step, kernel, masked_width, row_pitch, this_batch, tile_of

# The kind of a norm that centres its rows; 2 for one that does not, 0 for none.
LAYER_NORM: tl.constexpr = tl.constexpr(1)


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


@kernel(numbers_from="M")
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


@kernel(numbers_from="M")
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


@kernel(numbers_from="M")
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


@kernel(numbers_from="M")
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


@kernel(numbers_from="M")
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


@kernel(numbers_from="K")
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


def _launch_rows(
    device: TritonDevice, call: SimpleNamespace, kernel: Any, width: int, *matrices: Tensor, **others: Any
) -> Run:
    """A kernel over the rows of matrices; with ``norm_kind`` a program has whole rows."""
    tile = configs.row_tile(width)
    constants = {"BM": tile.rows, "BK": tile.columns, "ALIGNED": are_aligned(*matrices)}
    programs = tile.count(call.M, 1 if "norm_kind" in others else width)
    return device.launch(kernel, programs, arguments_of(device, kernel, call, **others), constants, tile)


def _norm(call: SimpleNamespace) -> dict[str, Any]:
    """The kernels' arguments for a norm."""
    return {"norm_kind": 0, "eps": 0.0} if call.eps is None else {"norm_kind": 2 - call.centred, "eps": call.eps}


@binds("normalise", without=NOT_IN_LOAD)
def bind_normalise(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``normalise``."""
    g, b = _factors(device, call)
    return _launch_rows(device, call, normalise_kernel, call.K, call.x, call.y, g=g, b=b, **_norm(call))


def _factors(device: TritonDevice, call: SimpleNamespace) -> tuple[Tensor, Tensor]:
    """g and b (K,): ones and zeros where they are left out."""
    g = device.matrix(1, call.K, "real").fill_(1.0)[0] if call.g is None else call.g
    return g, device.matrix(1, call.K, "real")[0] if call.b is None else call.b


@binds("grad_normalise", without=NOT_IN_LOAD)
def bind_grad_normalise(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``grad_normalise``: the rows normalised once more, the gradient by them as by ``affine_members``
    of one member, and in its place that by x."""
    g, b = _factors(device, call)
    sums = {f"d{name}": row[None] for name, row in (("s", call.dg), ("b", call.db)) if row is not None}
    n = call.x if call.eps is None else device.matrix(call.M, call.K, "compute")
    by_n: Run = bind_grad_affine_members(
        device, dy=call.dy, x=n, dx=call.dx, s=g[None], b=b[None], **sums, rule=call.rule, counters=call.counters,
        activation=call.activation, slope=call.slope, dropout=call.dropout,
    )  # fmt: skip
    if call.eps is None:
        return by_n
    again = bind_normalise(device, x=call.x, y=n, eps=call.eps, centred=call.centred)
    by_x = _launch_rows(device, call, grad_normalise_kernel, call.K, call.x, call.dx, **_norm(call))
    return in_sequence([again, by_n, by_x])


@binds("add")
def bind_add(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``add``."""
    matrices = call.a, call.b, call.y
    return _launch_rows(device, call, add_kernel, call.K, *matrices, x=call.a, other=call.b)


@binds("encode")
def bind_encode(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``encode``."""
    sizes = {"inputs": call.x, "before": call.K * call.inputs}
    if call.dy is None:
        return _launch_rows(device, call, encode_kernel, call.N, call.y, **sizes)
    return _launch_rows(device, call, grad_encode_kernel, call.K, call.dy, call.dx, **sizes)


@binds("perturb")
def bind_perturb(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``perturb``."""
    change, moves = call.change, call.start is None
    key0, key1 = seed_key(change.seed or 0)
    arguments = arguments_of(
        device, perturb_kernel, call, adv=call.adv if moves else call.start, moves=int(moves),
        euclid=int(change.norm == "2"), drawn=int(not moves and change.seed is not None), length=change.step,
        eps=change.eps, low=change.low, high=change.high,
    )  # fmt: skip
    arguments |= {"key0": signed(key0), "key1": signed(key1)}
    return device.launch(perturb_kernel, call.M, arguments, {"BLOCK": configs.SWEEP.columns}, configs.SWEEP)
