"""Members that share weights: what each has of its own around a product, and an output layer of each.

Row i of a batch belongs to member i % members. A program works for one member: its rows lie ``members`` rows apart.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import triton
import triton.language as tl

from fusemlp_kernels.checks import binds, members_of
from fusemlp_kernels.triton import clock, configs
from fusemlp_kernels.triton.clock import BATCH_INDEX, is_last
from fusemlp_kernels.triton.functions import keep_mask
from fusemlp_kernels.triton.gradients import input_gradient, stored_gradient
from fusemlp_kernels.triton.launch import Run, Tensor, TritonDevice
from fusemlp_kernels.triton.layers import NOT_IN_LOAD, are_aligned, arguments_of
from fusemlp_kernels.triton.linear import affine_tile, store_outputs
from fusemlp_kernels.triton.pointwise_triton import IDENTITY, activate, derivative, needs_z
from fusemlp_kernels.triton.tiles import batch_rows, column_step, kernel, masked_width, row_pitch, this_batch, tile_of


@triton.jit
def own_vector(vectors, member, at_k, stored, row, col, given, absent, ALIGNED: tl.constexpr):
    """Return columns ``at_k`` of a member's row of ``vectors``, float32; ``absent`` where none are ``given``."""
    places = vectors + member.to(tl.int64) * row_pitch(row, ALIGNED) + at_k * column_step(col, ALIGNED)
    return tl.load(places, mask=tl.where(given != 0, stored, False), other=absent)


@triton.jit
def own_rows(first, member, M, members, BM: tl.constexpr):
    """Return the rows of the batch of a member's rows from ``first`` on, and which of them there are."""
    place = first + tl.arange(0, BM)
    live = place < M // members
    return tl.where(live, place, 0) * members + member, live


@triton.jit
def batch_tile(x, sources, at_k, stored, row, col, ALIGNED: tl.constexpr):
    """Return rows ``sources`` of a matrix at columns ``at_k``, (BM, BK) float32; zeros where a source is -1."""
    wanted = sources >= 0
    places = x + tl.where(wanted, sources, 0)[:, None] * row_pitch(row, ALIGNED)
    places += at_k[None, :] * column_step(col, ALIGNED)
    return tl.load(places, mask=wanted[:, None] & stored[None, :], other=0.0).to(tl.float32)


@kernel(numbers_from="M")
def affine_members_kernel(
    x, y, s, b, r, rows, counters, M, K, members, x_row, x_col, y_row, y_col, s_row, s_col, b_row, b_col, r_row, r_col,
    gather, with_s, with_r, activation, slope, layer, key0, key1, threshold, keep_scale,
    BM: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """y (M, K) = dropout(activation(x * s + b)) * r with s, b and r (members, K), BM rows of a member a program.

    Without ``with_s`` there is neither s nor b, without ``with_r`` no r. ``gather``: the batch is x[rows], else x; y
    is zero where there is no row.
    """
    program, wide = tl.program_id(0), tl.cdiv(K, BK)
    block = program // wide
    member, first = block % members, block // members * BM
    col = (program - block * wide) * BK
    at_k = col + tl.arange(0, BK)
    stored = at_k < masked_width(K, ALIGNED)
    at_m, live = own_rows(first, member, M, members, BM)
    sources = tl.where(live, batch_rows(this_batch(rows, counters, gather), at_m, M, gather), -1)
    v = batch_tile(x, sources, at_k, stored, x_row, x_col, ALIGNED)
    v = v * own_vector(s, member, at_k, stored, s_row, s_col, with_s, 1.0, ALIGNED)[None, :]
    v = v + own_vector(b, member, at_k, stored, b_row, b_col, with_s, 0.0, ALIGNED)[None, :]
    v = activate(v, activation, slope)
    if threshold > 0:
        batch_index = tl.load(counters + BATCH_INDEX)
        # keep_mask counts the rows on from the first
        rows_of_mask = at_m - tl.arange(0, BM)
        keep = keep_mask(rows_of_mask, col, batch_index, layer, key0, key1, threshold, BM, BK)
        v = tl.where(keep, v * keep_scale, 0.0)
    v = v * own_vector(r, member, at_k, stored, r_row, r_col, with_r, 1.0, ALIGNED)[None, :]
    v = tl.where((sources >= 0)[:, None] & (at_k < K)[None, :], v, 0.0)
    places = y + at_m.to(tl.int64)[:, None] * row_pitch(y_row, ALIGNED) + at_k[None, :] * column_step(y_col, ALIGNED)
    tl.store(places, v.to(y.dtype.element_ty), mask=live[:, None] & stored[None, :])


@triton.jit
def sum_of_splits(sums, at_k, splits, step, BM: tl.constexpr, BK: tl.constexpr):
    """Return the sum over the splits of what the programs of this launch have stored at ``sums``, (BK,)."""
    total = tl.zeros((BM, BK), tl.float32)
    for start in range(0, splits, BM):
        at = start + tl.arange(0, BM)
        places = sums + at.to(tl.int64)[:, None] * step + at_k[None, :]
        # see ``clock.sum_of``
        total += tl.load(places, mask=(at < splits)[:, None], other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=0)


@triton.jit
def store_sum(
    gradient, total, member, at_k, inside, row, col, wanted, counters, rule, ALIGNED: tl.constexpr
):  # fmt: skip
    """Store a member's row of a gradient, or add it to that of the batches before, where it is ``wanted``."""
    places = gradient + member.to(tl.int64) * row_pitch(row, ALIGNED) + at_k * column_step(col, ALIGNED)
    stored_gradient(total, places, tl.where(wanted != 0, inside, False), counters, rule)


@kernel(numbers_from="M")
def grad_affine_members_kernel(
    dy, x, dx, s, b, r, ds, db, dr, rows, counters, rule, sums, ticket, M, K, members, dy_row, dy_col, x_row, x_col,
    dx_row, dx_col, s_row, s_col, b_row, b_col, r_row, r_col, ds_row, ds_col, db_row, db_col, dr_row, dr_col,
    gather, with_s, with_r, store_dx, store_ds, store_db, store_dr,
    activation, slope, layer, key0, key1, threshold, keep_scale, splits,
    BM: tl.constexpr, BK: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Back through ``affine_members_kernel``: dx (M, K), and the sums ds, db and dr (members, K) over a member's rows.

    A member's rows are cut into ``splits`` stretches, a program for each and for each BK columns. It stores its sums in
    ``sums`` (splits, 3, members, K rounded up to BK); the last program of a member's columns adds them up in order.
    ``ticket`` has a number for each of these.
    """
    program, wide = tl.program_id(0), tl.cdiv(K, BK)
    block = program // splits
    split = program - block * splits
    member = block // wide
    col = (block - member * wide) * BK
    at_k = col + tl.arange(0, BK)
    stored, named = at_k < masked_width(K, ALIGNED), at_k < K
    own_s = own_vector(s, member, at_k, stored, s_row, s_col, with_s, 1.0, ALIGNED)[None, :]
    own_b = own_vector(b, member, at_k, stored, b_row, b_col, with_s, 0.0, ALIGNED)[None, :]
    own_r = own_vector(r, member, at_k, stored, r_row, r_col, with_r, 1.0, ALIGNED)[None, :]
    batch_index = tl.load(counters + BATCH_INDEX)
    rows = this_batch(rows, counters, gather)
    by_s, by_b = tl.zeros((BM, BK), tl.float32), tl.zeros((BM, BK), tl.float32)
    by_r = tl.zeros((BM, BK), tl.float32)
    length = tl.cdiv(tl.cdiv(M // members, BM), splits) * BM
    for first in range(split * length, tl.minimum((split + 1) * length, M // members), BM):
        at_m, live = own_rows(first, member, M, members, BM)
        sources = tl.where(live, batch_rows(rows, at_m, M, gather), -1)
        inside = (sources >= 0)[:, None] & named[None, :]
        v = batch_tile(x, sources, at_k, stored, x_row, x_col, ALIGNED)
        far = tl.where(sources >= 0, at_m, -1).to(tl.int64)
        g = batch_tile(dy, far, at_k, stored, dy_row, dy_col, ALIGNED)
        if threshold > 0:
            rows_of_mask = at_m - tl.arange(0, BM)
            keep = keep_mask(rows_of_mask, col, batch_index, layer, key0, key1, threshold, BM, BK)
            g = tl.where(keep, g * keep_scale, 0.0)
        z = v * own_s + own_b
        h = activate(z, activation, slope)
        by_r += tl.where(inside, g * h, 0.0)
        if needs_z(activation):
            h = z
        g = tl.where(inside, g * own_r * derivative(h, activation, slope), 0.0)
        by_s += g * v
        by_b += g
        places = dx + at_m.to(tl.int64)[:, None] * row_pitch(dx_row, ALIGNED)
        places += at_k[None, :] * column_step(dx_col, ALIGNED)
        written = tl.where(store_dx != 0, live, False)[:, None] & stored[None, :]
        tl.store(places, (g * own_s).to(dx.dtype.element_ty), mask=written)
    step = members.to(tl.int64) * wide * BK
    sums += member.to(tl.int64) * wide * BK
    here = sums + split.to(tl.int64) * 3 * step + at_k
    tl.store(here, tl.sum(by_s, axis=0))
    tl.store(here + step, tl.sum(by_b, axis=0))
    tl.store(here + 2 * step, tl.sum(by_r, axis=0))
    if is_last(ticket + block, splits):
        total = sum_of_splits(sums, at_k, splits, 3 * step, BM, BK)
        store_sum(ds, total, member, at_k, named, ds_row, ds_col, store_ds, counters, rule, ALIGNED)
        total = sum_of_splits(sums + step, at_k, splits, 3 * step, BM, BK)
        store_sum(db, total, member, at_k, named, db_row, db_col, store_db, counters, rule, ALIGNED)
        total = sum_of_splits(sums + 2 * step, at_k, splits, 3 * step, BM, BK)
        store_sum(dr, total, member, at_k, named, dr_row, dr_col, store_dr, counters, rule, ALIGNED)


@kernel(numbers_from="M")
def linear_members_kernel(
    x, w, b, z, M, N, K, members, x_row, x_col, w_row, w_col, b_step, z_row, z_col,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr, ALIGNED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """z (M * members, N) = x (M * members, K) @ w[m].T + b[m], rows m * N to (m + 1) * N of w and b being those of
    member m; a tile of one member a program."""
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    member = tl.program_id(0) // tiles
    tile_m, tile_n = tile_of(tl.program_id(0) - member * tiles, M, N, BM, BN)
    row, col = tile_m * BM, tile_n * BN
    x_pitch, z_pitch = row_pitch(x_row, ALIGNED), row_pitch(z_row, ALIGNED)
    place = member.to(tl.int64) * N
    acc = affine_tile(
        x + member * x_pitch, w + place * row_pitch(w_row, ALIGNED), b + place * b_step, x, row, col, M, N, K,
        x_pitch * members, x_col, w_row, w_col, b_step, 0, BM, BN, BK, PRODUCT, ALIGNED,
    )  # fmt: skip
    z += member * z_pitch
    store_outputs(
        acc, z, z, row, col, 0, M, N, z_pitch * members, z_col, z_pitch * members, z_col, IDENTITY, 0.0, 0, 0, 0, 0, 0,
        1.0, BM, BN, ALIGNED, PARTS,
    )  # fmt: skip


@kernel(numbers_from="M")
def grad_input_members_kernel(
    dz, w, out, M, N, K, members, dz_row, dz_col, w_row, w_col, out_row, out_col,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr, ALIGNED: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """out (M * members, K) = dz (M * members, N) @ w[m], see ``linear_members_kernel``; BN goes along the reduction."""
    tiles = tl.cdiv(M, BM) * tl.cdiv(K, BK)
    member = tl.program_id(0) // tiles
    tile_m, tile_k = tile_of(tl.program_id(0) - member * tiles, M, K, BM, BK)
    dz_pitch, out_pitch = row_pitch(dz_row, ALIGNED), row_pitch(out_row, ALIGNED)
    out += member * out_pitch
    # the identity's derivative is 1 for any y
    input_gradient(
        dz + member * dz_pitch, w + member.to(tl.int64) * N * row_pitch(w_row, ALIGNED), out, out, tile_m, tile_k, 0,
        M, N, K, dz_pitch * members, dz_col, w_row, w_col, out_pitch * members, out_col, out_pitch * members, out_col,
        IDENTITY, 0.0, 0, 0, 0, 0, 1.0, 1.0, BM, BN, BK, PRODUCT, ALIGNED, PARTS, 1,
    )  # fmt: skip


def _launch_members(
    device: TritonDevice, call: SimpleNamespace, kernel: Any, programs: int, *matrices: Tensor | None, **others: Any
) -> Run:
    """A kernel of ``affine_members`` or of its way back, with the matrices beside x, s, b and r."""
    tile = configs.MEMBERS
    arguments = arguments_of(
        device, kernel, call, members=members_of(call), with_s=int(call.s is not None), with_r=int(call.r is not None),
        **others,
    )  # fmt: skip
    aligned = are_aligned(call.x, call.s, call.b, call.r, *matrices)
    constants = {"BM": tile.rows, "BK": tile.columns, "ALIGNED": aligned}
    return device.launch(kernel, programs, arguments, constants, tile)


@binds("affine_members", without=NOT_IN_LOAD)
def bind_affine_members(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``affine_members``."""
    programs = members_of(call) * configs.MEMBERS.count(call.M // members_of(call), call.K)
    return _launch_members(device, call, affine_members_kernel, programs, call.y)


@binds("grad_affine_members", without=NOT_IN_LOAD)
def bind_grad_affine_members(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``grad_affine_members``."""
    tile, written = configs.MEMBERS, {name: getattr(call, name) for name in ("dx", "ds", "db", "dr")}
    count = members_of(call)
    wide = count * tile.count(1, call.K)
    splits = min(configs.MOST_SPLITS, max(1, tile.count(call.M // count, 1)))
    return _launch_members(
        device, call, grad_affine_members_kernel, wide * splits, call.dy, *written.values(), splits=splits,
        sums=device.zeros(splits * 3 * wide * tile.columns, "real"), ticket=device.zeros(wide, "int32"),
        rule=device.numbers(clock.rule_values(call.rule), "float64"),
        **{f"store_{name}": int(array is not None) for name, array in written.items()},
    )  # fmt: skip


def _heads(
    device: TritonDevice, call: SimpleNamespace, kernel: Any, letters: str, *matrices: Tensor, **out: Any
) -> Run:
    """A product of each member, of one kernel; ``letters``: those of the result's columns and of the reduction."""
    aligned = are_aligned(*matrices)
    count, columns = members_of(call, call.N), getattr(call, letters[0])
    each = call.M // count
    shape = [(each, columns)]
    tile = configs.product_tile(device.arch, "forward", device.precision, shape, aligned=aligned, parts=count)
    constants = {**tile.sides(f"M{letters}"), "PRODUCT": device.product, "ALIGNED": aligned, "PARTS": tile.parts}
    arguments = arguments_of(device, kernel, call, M=each, members=count, **out)
    return device.launch(kernel, count * tile.count(each, columns), arguments, constants, tile)


@binds("linear_members")
def bind_linear_members(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``linear_members``."""
    return _heads(device, call, linear_members_kernel, "NK", call.x, call.w, call.z)


@binds("grad_input_members")
def bind_grad_input_members(device: TritonDevice, call: SimpleNamespace) -> Run:
    """The contract's ``grad_input_members``."""
    return _heads(device, call, grad_input_members_kernel, "KN", call.dz, call.w, call.dx, out=call.dx)
