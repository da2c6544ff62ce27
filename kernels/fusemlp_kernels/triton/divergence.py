"""The divergence between the probabilities of two batches of logits, with both gradients; ``reference.divergence``
defines it.

Sums over the batch and the normaliser are taken as for a loss, see ``loss``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import ROW_COUNT, is_last, sum_of
from fusemlp_kernels.triton.loss import CHUNK, LAST_LOSS, LOSS_SUM, MEAN, normaliser_of, row_weights, stored_scale
from fusemlp_kernels.triton.tiles import column_step, masked_width, row_pitch, this_batch


@triton.jit
def more_exponentials(tile, largest, total):
    """Return the largest value of each row and the sum of its exponentials, divided by that of the largest, after
    another tile; -inf stands for no value."""
    grown = tl.maximum(largest, tl.max(tile, axis=1))
    shift = tl.where(grown == float("-inf"), 0.0, grown)
    return grown, total * tl.exp(largest - shift) + tl.sum(tl.exp(tile - shift[:, None]), axis=1)


@triton.jit(
    do_not_specialize=[
        "M", "N", "z_row", "z_col", "other_row", "other_col", "dother_row", "dother_col", "dz_row", "dz_col",
        "weight_step", "gather", "adds", "recorded", "scaled", "programs",
    ]
)  # fmt: skip
def divergence_kernel(
    z, other, dother, dz, rows, weight, stats, settings, hyper, counters, partials, ticket,
    M, N, z_row, z_col, other_row, other_col, dother_row, dother_col, dz_row, dz_col, weight_step, strength,
    gather, adds, recorded, scaled, programs,
    BM: tl.constexpr, BN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """dother (M, N) = strength * weight * (q - p), p = softmax(z), q = softmax(other), N in steps of BN.

    With ``adds`` the gradient by z is added to dz (M, N), with ``recorded`` the divergence to ``stats``. ``settings``
    are those of a cross-entropy without classes.
    """
    program = tl.program_id(0)
    at_m = program * BM + tl.arange(0, BM)
    count = tl.minimum(tl.load(counters + ROW_COUNT), M).to(tl.int32)
    rows = this_batch(rows, counters, gather)
    # without classes nothing is read through the row numbers and settings that stand for labels and class weights
    normaliser = normaliser_of(rows, count, rows, 0, weight, weight_step, settings, 0, N, settings, gather, CHUNK)
    weights, _, _, _ = row_weights(at_m, rows, count, rows, 0, weight, weight_step, settings, 0, N, settings, gather)
    factor = (weights * (strength * stored_scale(hyper, normaliser, settings, scaled)))[:, None]
    valid = at_m < count
    far = at_m.to(tl.int64)[:, None]
    z_rows, other_rows = z + far * row_pitch(z_row, ALIGNED), other + far * row_pitch(other_row, ALIGNED)
    dother_rows, dz_rows = dother + far * row_pitch(dother_row, ALIGNED), dz + far * row_pitch(dz_row, ALIGNED)
    z_step, other_step = column_step(z_col, ALIGNED), column_step(other_col, ALIGNED)
    dother_step, dz_step = column_step(dother_col, ALIGNED), column_step(dz_col, ALIGNED)
    z_most = tl.full((BM,), float("-inf"), tl.float32)
    other_most = tl.full((BM,), float("-inf"), tl.float32)
    z_total = tl.zeros((BM,), tl.float32)
    other_total = tl.zeros((BM,), tl.float32)
    for start in range(0, N, BN):
        at_n = start + tl.arange(0, BN)[None, :]
        inside = valid[:, None] & (at_n < N)
        own = tl.load(z_rows + at_n * z_step, mask=inside, other=float("-inf")).to(tl.float32)
        moved = tl.load(other_rows + at_n * other_step, mask=inside, other=float("-inf")).to(tl.float32)
        z_most, z_total = more_exponentials(own, z_most, z_total)
        other_most, other_total = more_exponentials(moved, other_most, other_total)
    z_total, other_total = tl.where(valid, z_total, 1.0), tl.where(valid, other_total, 1.0)
    z_most, other_most = tl.where(valid, z_most, 0.0), tl.where(valid, other_most, 0.0)
    # log(p / q) = (z - its largest) - (other - its largest) - apart
    apart = (tl.log(z_total) - tl.log(other_total))[:, None]
    values = tl.zeros((BM,), tl.float32)
    if (adds != 0) | (recorded != 0):
        for start in range(0, N, BN):
            at_n = start + tl.arange(0, BN)[None, :]
            inside = valid[:, None] & (at_n < N)
            own = tl.load(z_rows + at_n * z_step, mask=inside, other=0.0).to(tl.float32) - z_most[:, None]
            moved = tl.load(other_rows + at_n * other_step, mask=inside, other=0.0).to(tl.float32)
            ratio = own - (moved - other_most[:, None]) - apart
            values += tl.sum(tl.where(inside, tl.exp(own) / z_total[:, None] * ratio, 0.0), axis=1)
    for start in range(0, N, BN):
        at_n = start + tl.arange(0, BN)[None, :]
        inside = valid[:, None] & (at_n < N)
        stored = (at_m < M)[:, None] & (at_n < masked_width(N, ALIGNED))
        own = tl.load(z_rows + at_n * z_step, mask=inside, other=0.0).to(tl.float32) - z_most[:, None]
        moved = tl.load(other_rows + at_n * other_step, mask=inside, other=0.0).to(tl.float32) - other_most[:, None]
        p = tl.exp(own) / z_total[:, None]
        result = tl.where(inside, factor * (tl.exp(moved) / other_total[:, None] - p), 0.0)
        tl.store(dother_rows + at_n * dother_step, result.to(dother.dtype.element_ty), mask=stored)
        if adds != 0:
            by_z = tl.where(inside, factor * p * (own - moved - apart - values[:, None]), 0.0)
            dz_at = dz_rows + at_n * dz_step
            by_z += tl.load(dz_at, mask=stored, other=0.0).to(tl.float32)
            tl.store(dz_at, by_z.to(dz.dtype.element_ty), mask=stored)
    if recorded != 0:
        tl.store(partials + program, tl.sum(tl.where(valid, weights * values, 0.0)).to(tl.float64))
        if is_last(ticket, programs):
            total = sum_of(partials, programs, 1, 128) * strength
            mean = tl.load(settings + MEAN) != 0.0
            divisor = tl.where(mean & (normaliser != 0.0), normaliser, 1.0)
            total = tl.where(mean & (normaliser == 0.0), 0.0, total)
            tl.store(stats + LAST_LOSS, tl.load(stats + LAST_LOSS) + total / divisor)
            tl.store(stats + LOSS_SUM, tl.load(stats + LOSS_SUM) + total)
