"""Losses with their gradients: in the epilogue of the output layer, or from logits in memory; ``reference`` defines
them.

A program owns whole rows. The last program takes the sums over the batch, in a fixed order. Each program computes the
normaliser for itself, since every dz needs it before any program has ended; so ``loss_grad_kernel`` has no more
programs than run at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels import contract
from fusemlp_kernels.triton.clock import LOSS_SCALE, ROW_COUNT, is_last
from fusemlp_kernels.triton.linear import affine_tile, affine_tile_of_parts
from fusemlp_kernels.triton.pointwise_triton import (
    BINARY_CROSS_ENTROPY,
    PRELU,
    activate,
    by_slope_prelu,
    derivative,
    element_loss,
    needs_z,
)
from fusemlp_kernels.triton.tiles import column_step, kernel, masked_width, row_pitch, this_batch

LAST_LOSS: tl.constexpr = tl.constexpr(contract.LAST_LOSS)
LOSS_SUM: tl.constexpr = tl.constexpr(contract.LOSS_SUM)
NORM_SUM: tl.constexpr = tl.constexpr(contract.NORM_SUM)
CORRECT: tl.constexpr = tl.constexpr(contract.CORRECT)
SCORED: tl.constexpr = tl.constexpr(contract.SCORED)
# The results of each program for the sums: loss, right answers, answers asked for, prelu's gradient.
PARTIALS: tl.constexpr = tl.constexpr(4)
# Rows whose weights are added at a time; without a product, more.
CHUNK: tl.constexpr = tl.constexpr(256)
LONG_CHUNK: tl.constexpr = tl.constexpr(1024)

# The fields of a loss's settings on the device, float32. "mean" is 0 for the reduction "sum", 1 for "mean", and for
# "rows" minus the divisor of a row's own loss.
SETTING_FIELDS = (
    "kind", "mean", "smoothing", "soft", "option", "accuracy", "ignores", "weighted", "classes",
)  # fmt: skip
KIND, MEAN, SMOOTHING, SOFT, OPTION, ACCURACY, IGNORES, WEIGHTED, CLASSES = (
    tl.constexpr(place) for place in range(len(SETTING_FIELDS))
)


@triton.jit
def row_weights(at, rows, count, labels, label_step, weight, weight_step, class_weight, ignored, N, settings, gather):
    """Return for the batch's rows ``at``, (R,) each: their weights, zero for a row that does not count; their labels;
    whether they count; and their shares in the normaliser."""
    inside = at < count
    source = at.to(tl.int64)
    if gather != 0:
        source = tl.load(rows + at, mask=inside, other=0)
    weights = tl.where(inside, 1.0, 0.0)
    if tl.load(settings + WEIGHTED) != 0.0:
        weights = tl.load(weight + source * weight_step, mask=inside, other=0.0)
    label = tl.zeros_like(source)
    counts = inside
    shares = weights
    if (tl.load(settings + KIND) == 0.0) & (tl.load(settings + SOFT) == 0.0):
        label = tl.load(labels + source * label_step, mask=inside, other=0)
        counts = inside & (label >= 0) & (label < N)
        if tl.load(settings + IGNORES) != 0.0:
            counts = counts & (label != ignored)
        weights = tl.where(counts, weights, 0.0)
        shares = weights
        if tl.load(settings + CLASSES) != 0.0:
            shares = weights * tl.load(class_weight + label, mask=counts, other=0.0)
    return weights, label, counts, shares


@triton.jit
def normaliser_of(
    rows, count, labels, label_step, weight, weight_step, class_weight, ignored, N, settings, gather,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Return the divisor of "mean", float64: the sum of the shares, times N for the element-wise losses. ``CHUNK`` rows
    are added at a time; rows without weights, all of which count, are as many as their shares."""
    total = count.to(tl.float64)
    if tl.load(settings + WEIGHTED) + tl.load(settings + CLASSES) + tl.load(settings + IGNORES) != 0.0:
        sums = tl.zeros((CHUNK,), tl.float32)
        for start in range(0, count, CHUNK):
            at = start + tl.arange(0, CHUNK)
            _, _, _, shares = row_weights(
                at, rows, count, labels, label_step, weight, weight_step, class_weight, ignored, N, settings, gather
            )
            sums += shares
        total = tl.sum(sums.to(tl.float64), axis=0)
    if tl.load(settings + KIND) != 0.0:
        total = total * N
    return total


@triton.jit
def elementwise_tile(z, t, weights, scale, inside, activation, slope, settings):
    """Return the outputs y of a tile of pre-activations z, the loss, dz, and prelu's gradient."""
    y = activate(z, activation, slope)
    value, by_y = element_loss(y, t, tl.load(settings + KIND), tl.load(settings + OPTION))
    loss = tl.sum(tl.where(inside, value * weights[:, None], 0.0))
    by_y = tl.where(inside, by_y * (weights * scale)[:, None], 0.0)
    v = y
    if needs_z(activation):
        v = z
    below = 0.0
    if activation == PRELU:
        below = tl.sum(by_y * by_slope_prelu(z))
    return y, loss, tl.where(inside, by_y * derivative(v, activation, slope), 0.0), below


@triton.jit
def first_of(values, largest, at, N):
    """Return the first column that holds the largest value of its row, (R,)."""
    return tl.min(tl.where(values == largest[:, None], at[None, :], N), axis=1)


@triton.jit
def wanted(weights, label, at_n, inside, targets, class_weight, N, settings):
    """Return the target weights q of a cross-entropy, (R, C): row weight x class weight x smoothed target."""
    eps = tl.load(settings + SMOOTHING)
    if tl.load(settings + SOFT) != 0.0:
        t = targets
    else:
        t = tl.where(label[:, None] == at_n[None, :], 1.0, 0.0)
    q = t * (1.0 - eps) + eps / N
    if tl.load(settings + CLASSES) != 0.0:
        q = q * tl.load(class_weight + at_n, mask=at_n < N, other=0.0)[None, :]
    return tl.where(inside, q * weights[:, None], 0.0)


@triton.jit
def account(stats, settings):
    """Return what ``record_loss`` adds to, and the settings that say how; they load while the kernel goes on."""
    mean, counting = tl.load(settings + MEAN), tl.load(settings + ACCURACY)
    losses, norms = tl.load(stats + LOSS_SUM), tl.load(stats + NORM_SUM)
    return mean, counting, losses, norms, tl.load(stats + CORRECT), tl.load(stats + SCORED)


@triton.jit
def record_loss(total, right, scored, stats, before, normaliser):
    """Add to ``stats`` a batch's sum of losses, its right answers, and the number of answers asked for, all float64;
    ``before`` is the ``account``."""
    mean, counting, losses, norms, correct, asked = before
    divisor = tl.where((mean != 0.0) & (normaliser != 0.0), normaliser, 1.0)
    total = tl.where((mean != 0.0) & (normaliser == 0.0), 0.0, total)
    tl.store(stats + LAST_LOSS, total / divisor)
    tl.store(stats + LOSS_SUM, losses + total)
    if mean != 0.0:
        tl.store(stats + NORM_SUM, norms + normaliser)
    if counting != 0.0:
        tl.store(stats + CORRECT, correct + right)
        tl.store(stats + SCORED, asked + scored)


@triton.jit
def add_all(a, b, c, d, e, f, g, h):
    """Add four numbers to four others."""
    return a + e, b + f, c + g, d + h


@triton.jit
def sums_of_all(partials, programs, BLOCK: tl.constexpr):
    """Return the sums of the ``PARTIALS`` of all programs; each has the order of ``clock.sum_of``."""
    loss, right = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    scored, below = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, programs, BLOCK):
        at = start + tl.arange(0, BLOCK)
        place, inside = partials + at * PARTIALS, at < programs
        loss += tl.load(place, mask=inside, other=0.0, cache_modifier=".cg")
        right += tl.load(place + 1, mask=inside, other=0.0, cache_modifier=".cg")
        scored += tl.load(place + 2, mask=inside, other=0.0, cache_modifier=".cg")
        below += tl.load(place + 3, mask=inside, other=0.0, cache_modifier=".cg")
    return tl.reduce((loss, right, scored, below), 0, add_all)


@triton.jit
def finish_loss(loss, right, scored, below, partials, ticket, stats, dslope, before, normaliser, program, programs):
    """Store this program's sums; the last program adds them up into ``stats``, with the ``account`` of before, and
    ``dslope``."""
    tl.store(partials + program * PARTIALS, loss.to(tl.float64))
    tl.store(partials + program * PARTIALS + 1, right.to(tl.float64))
    tl.store(partials + program * PARTIALS + 2, scored.to(tl.float64))
    tl.store(partials + program * PARTIALS + 3, below.to(tl.float64))
    if is_last(ticket, programs):
        total, hits, asked, slope = sums_of_all(partials, programs, 128)
        record_loss(total, hits, asked, stats, before, normaliser)
        tl.store(dslope, slope.to(tl.float32))


@triton.jit
def gradient_scale(hyper, normaliser, settings, scaled):
    """Return the factor of every dz: 1 / normaliser under "mean", times the loss scale."""
    scale = tl.full((), 1.0, tl.float64)
    if tl.load(settings + MEAN) != 0.0:
        scale = tl.where(normaliser == 0.0, 0.0, 1.0 / tl.where(normaliser == 0.0, 1.0, normaliser))
    if scaled != 0:
        scale = scale * tl.load(hyper + LOSS_SCALE)
    return scale.to(tl.float32)


@triton.jit
def stored_scale(hyper, normaliser, settings, scaled):
    """Return ``gradient_scale``, or the factor under "rows"."""
    each = -tl.load(settings + MEAN).to(tl.float64)
    rows = each > 0.0
    divisor = tl.where(rows & (normaliser != 0.0), each, normaliser)
    return gradient_scale(hyper, divisor, settings, scaled)


@triton.jit
def ignored_label(low, high):
    """Return a 64-bit number from its halves."""
    return (high.to(tl.int64) << 32) + low.to(tl.uint32, bitcast=True).to(tl.int64)


@triton.jit
def loss_of_rows(
    z, at_m, at_n, count, scale, rows, labels, label_step, target, target_row, target_col, weight, weight_step,
    class_weight, ignored, N, settings, gather, activation, slope,
    BM: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """Return for whole rows of pre-activations z (BM, BN), the batch's rows ``at_m``: dz times ``scale``, zero outside
    the outputs; the sum of the losses, the right answers, the answers asked for, and prelu's gradient."""
    weights, label, counts, _ = row_weights(
        at_m, rows, count, labels, label_step, weight, weight_step, class_weight, ignored, N, settings, gather
    )
    inside = (at_m < count)[:, None] & (at_n < N)[None, :]
    named = (at_n < N)[None, :]
    source = at_m.to(tl.int64)
    if gather != 0:
        source = tl.load(rows + at_m, mask=at_m < count, other=0)
    soft = (CROSS_ENTROPY == 0) | (tl.load(settings + SOFT) != 0.0)
    target_at = target + source[:, None] * target_row + at_n.to(tl.int64)[None, :] * target_col
    t = tl.load(target_at, mask=tl.where(soft, inside, False), other=0.0)
    z = tl.where((at_m < count)[:, None], z, 0.0)
    right = tl.zeros((BM,), tl.int32)
    scored = tl.zeros((BM,), tl.int32)
    below = tl.full((), 0.0, tl.float32)
    if CROSS_ENTROPY:
        q = wanted(weights, label, at_n, inside, t, class_weight, N, settings)
        logits = tl.where(named, z, float("-inf"))
        largest = tl.max(logits, axis=1)
        shifted = tl.where(named, z - largest[:, None], 0.0)
        e = tl.where(named, tl.exp(shifted), 0.0)
        total = tl.sum(e, axis=1)
        mass = tl.sum(q, axis=1)
        loss = tl.sum(mass * tl.log(total) - tl.sum(q * shifted, axis=1))
        result = (e * (mass / total)[:, None] - q) * scale
        if tl.load(settings + ACCURACY) != 0.0:
            best = first_of(logits, largest, at_n, N)
            meant = label
            if soft:
                targets = tl.where(named, t, float("-inf"))
                meant = first_of(targets, tl.max(targets, axis=1), at_n, N).to(tl.int64)
            right = tl.where(counts & (best == meant), 1, 0)
            scored = tl.where(counts, 1, 0)
    else:
        y, loss, result, below = elementwise_tile(z, t, weights, scale, inside, activation, slope, settings)
        if tl.load(settings + ACCURACY) != 0.0:
            if tl.load(settings + KIND) == BINARY_CROSS_ENTROPY:
                hit = inside & ((y > 0) == (t > 0.5))
                right = tl.sum(tl.where(hit, 1, 0), axis=1)
                scored = tl.sum(tl.where(inside, 1, 0), axis=1)
            else:
                outputs = tl.where(named, y, float("-inf"))
                targets = tl.where(named, t, float("-inf"))
                best = first_of(outputs, tl.max(outputs, axis=1), at_n, N)
                meant = first_of(targets, tl.max(targets, axis=1), at_n, N)
                right = tl.where(counts & (best == meant), 1, 0)
                scored = tl.where(counts, 1, 0)
    return tl.where(inside, result, 0.0), loss, tl.sum(right), tl.sum(scored), below


@kernel(numbers_from="M")
def linear_loss_grad_kernel(
    x, w, b, dz, x_rows, rows, labels, target, weight, class_weight, slope_param, dslope, stats, settings, hyper,
    counters, partials, ticket,
    M, N, K, x_row, x_col, w_row, w_col, b_step, label_step, target_row, target_col, weight_step, dz_row, dz_col,
    x_gather, gather, activation, slope, ignored_low, ignored_high, store_dz, scaled, programs,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr, ALIGNED: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """z = x @ w.T + b, the loss of its activation, and dz (M, N): the logits stay in registers. BN >= N."""
    program = tl.program_id(0)
    row = program * BM
    # they load during the product
    before, filled = account(stats, settings), tl.load(counters + ROW_COUNT)
    slope = tl.load(slope_param, mask=activation == PRELU, other=slope)
    x_rows = this_batch(x_rows, counters, x_gather)
    if SPLIT > 1:
        z = affine_tile_of_parts(
            x, w, b, x_rows, row, 0, M, N, K, x_row, w_row, b_step, x_gather, BM, BN, BK, SPLIT, PRODUCT
        )
    else:
        z = affine_tile(
            x, w, b, x_rows, row, 0, M, N, K, x_row, x_col, w_row, w_col, b_step, x_gather, BM, BN, BK, PRODUCT, ALIGNED
        )
    at_m, at_n = row + tl.arange(0, BM), tl.arange(0, BN)
    count = tl.minimum(filled, M).to(tl.int32)
    ignored = ignored_label(ignored_low, ignored_high)
    rows = this_batch(rows, counters, gather)
    normaliser = normaliser_of(
        rows, count, labels, label_step, weight, weight_step, class_weight, ignored, N, settings, gather, CHUNK
    )
    scale = stored_scale(hyper, normaliser, settings, scaled)
    result, loss, right, scored, below = loss_of_rows(
        z, at_m, at_n, count, scale, rows, labels, label_step, target, target_row, target_col, weight, weight_step,
        class_weight, ignored, N, settings, gather, activation, slope, BM, CROSS_ENTROPY,
    )  # fmt: skip
    if store_dz != 0:
        step = column_step(dz_col, ALIGNED)
        dz_at = dz + at_m.to(tl.int64)[:, None] * row_pitch(dz_row, ALIGNED) + at_n[None, :] * step
        stored = (at_m < M)[:, None] & (at_n < masked_width(N, ALIGNED))[None, :]
        tl.store(dz_at, result.to(dz.dtype.element_ty), mask=stored)
    finish_loss(loss, right, scored, below, partials, ticket, stats, dslope, before, normaliser, program, programs)


@triton.jit
def later_best(values, best, best_at, at_n, N):
    """Return the largest value of each row so far and its first column, after another tile of columns ``at_n``."""
    largest = tl.max(values, axis=1)
    at = first_of(values, largest, at_n, N)
    return tl.maximum(best, largest), tl.where(largest > best, at, best_at)


@triton.jit
def rows_in_tiles(
    z, dz, at_m, count, scale, rows, labels, target, weight, class_weight, settings,
    M, N, z_row, z_col, label_step, target_row, target_col, weight_step, dz_row, dz_col,
    gather, activation, slope, ignored, store_dz,
    BM: tl.constexpr, BN: tl.constexpr, ALIGNED: tl.constexpr, CROSS_ENTROPY: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """Compute dz of the batch's rows ``at_m``, BN columns at a time. Return the sum of the losses, the right answers,
    the answers asked for, and prelu's gradient.

    The largest logit and the sum of the exponentials are taken in one pass (Milakov and Gimelshein, "Online normalizer
    calculation for softmax", 2018); a second one, over what is in the cache by then, writes dz. Both add tiles, and sum
    over the columns at their end. ``LABELS``: of the target weights of a row only that of its label differs.
    """
    weights, label, counts, shares = row_weights(
        at_m, rows, count, labels, label_step, weight, weight_step, class_weight, ignored, N, settings, gather
    )
    valid = at_m < count
    source = at_m.to(tl.int64)
    if gather != 0:
        source = tl.load(rows + at_m, mask=valid, other=0)
    soft = (CROSS_ENTROPY == 0) | (tl.load(settings + SOFT) != 0.0)
    counting = tl.load(settings + ACCURACY) != 0.0
    z_rows = z + at_m.to(tl.int64)[:, None] * row_pitch(z_row, ALIGNED)
    dz_rows = dz + at_m.to(tl.int64)[:, None] * row_pitch(dz_row, ALIGNED)
    t_rows = target + source[:, None] * target_row
    z_step, dz_step = column_step(z_col, ALIGNED), column_step(dz_col, ALIGNED)
    highest = tl.full((BM,), float("-inf"), tl.float32)
    best = tl.full((BM,), float("-inf"), tl.float32)
    best_at = tl.zeros((BM,), tl.int32)
    meant = tl.full((BM,), float("-inf"), tl.float32)
    meant_at = tl.zeros((BM,), tl.int32)
    totals = tl.zeros((BM, BN), tl.float32)
    # rows that do not count have no share: their dz is zero
    mass = shares
    eps = tl.load(settings + SMOOTHING)
    light = shares * (eps / N)
    heavy = light + shares * (1.0 - eps)
    losses = tl.zeros((BM, BN), tl.float32)
    wide = masked_width(N, ALIGNED)
    hits = tl.zeros((BM,), tl.int32)
    below = tl.full((), 0.0, tl.float32)
    loss = tl.full((), 0.0, tl.float32)
    if CROSS_ENTROPY:
        if not LABELS:
            mass = tl.zeros((BM,), tl.float32)
        for start in range(0, N, BN):
            at_n = start + tl.arange(0, BN)
            inside = valid[:, None] & (at_n < N)[None, :]
            tile = tl.load(z_rows + at_n[None, :] * z_step, mask=valid[:, None] & (at_n < wide)[None, :], other=0.0)
            tile = tile.to(tl.float32)
            if start + BN > N:
                tile = tl.where((at_n < N)[None, :], tile, float("-inf"))
            largest = tl.max(tile, axis=1)
            if counting:
                best_at = tl.where(largest > best, first_of(tile, largest, at_n, N), best_at)
            if not LABELS:
                t_at = t_rows + at_n.to(tl.int64)[None, :] * target_col
                t = tl.load(t_at, mask=tl.where(soft, inside, False), other=0.0)
                mass += tl.sum(wanted(weights, label, at_n, inside, t, class_weight, N, settings), axis=1)
                if counting & soft:
                    meant, meant_at = later_best(tl.where(inside, t, float("-inf")), meant, meant_at, at_n, N)
            best = tl.maximum(best, largest)
            shift = tl.where(best == float("-inf"), 0.0, best)
            totals = totals * tl.exp(highest - shift)[:, None] + tl.exp(tile - shift[:, None])
            highest = best
        total = tl.sum(totals, axis=1)
        share = mass / total
    for start in range(0, N, BN):
        at_n = start + tl.arange(0, BN)
        inside = valid[:, None] & (at_n < N)[None, :]
        if not LABELS:
            t_at = t_rows + at_n.to(tl.int64)[None, :] * target_col
            t = tl.load(t_at, mask=tl.where(soft, inside, False), other=0.0)
        # an element-wise loss has all its masks at the width: a second set would take too many registers
        loaded = valid[:, None] & (at_n < (wide if CROSS_ENTROPY else N))[None, :]
        tile = tl.load(z_rows + at_n[None, :] * z_step, mask=loaded, other=0.0).to(tl.float32)
        if CROSS_ENTROPY:
            shifted = tile - best[:, None]
            if start + BN > N:
                shifted = tl.where((at_n < N)[None, :], shifted, 0.0)
            if LABELS:
                q = tl.where(label[:, None] == at_n[None, :], heavy[:, None], light[:, None])
            else:
                q = wanted(weights, label, at_n, inside, t, class_weight, N, settings)
            losses += q * shifted
            result = (tl.exp(shifted) * share[:, None] - q) * scale
            if start + BN > N:
                result = tl.where((at_n < N)[None, :], result, 0.0)
        else:
            y, part, result, part_below = elementwise_tile(tile, t, weights, scale, inside, activation, slope, settings)
            loss += part
            below += part_below
            if counting:
                best, best_at = later_best(tl.where(inside, y, float("-inf")), best, best_at, at_n, N)
                meant, meant_at = later_best(tl.where(inside, t, float("-inf")), meant, meant_at, at_n, N)
                hits += tl.sum(tl.where(inside & ((y > 0) == (t > 0.5)), 1, 0), axis=1)
        if store_dz != 0:
            stored = (at_m < M)[:, None] & (at_n < wide)[None, :]
            tl.store(dz_rows + at_n[None, :] * dz_step, result.to(dz.dtype.element_ty), mask=stored)
    right = tl.where(counts & (best_at == tl.where(soft, meant_at, label)), 1, 0)
    scored = tl.where(counts, 1, 0)
    if CROSS_ENTROPY:
        loss = tl.sum(mass * tl.log(total) - tl.sum(losses, axis=1))
    else:
        if tl.load(settings + KIND) == BINARY_CROSS_ENTROPY:
            right = hits
            scored = tl.where(valid, N, 0)
    return loss, tl.sum(right), tl.sum(scored), below


@kernel(numbers_from="M")
def loss_grad_kernel(
    z, dz, rows, labels, target, weight, class_weight, slope_param, dslope, stats, settings, hyper, counters, partials,
    ticket,
    M, N, z_row, z_col, label_step, target_row, target_col, weight_step, dz_row, dz_col,
    gather, activation, slope, ignored_low, ignored_high, store_dz, scaled, programs,
    BM: tl.constexpr, BN: tl.constexpr, ALIGNED: tl.constexpr, CROSS_ENTROPY: tl.constexpr, LABELS: tl.constexpr,
):  # fmt: skip
    """The loss and dz (M, N) from z (M, N) in memory, any N, BN columns at a time; dz may be z. A program takes every
    ``programs``-th group of BM rows, so that few programs compute the normaliser."""
    program, before = tl.program_id(0), account(stats, settings)
    count = tl.minimum(tl.load(counters + ROW_COUNT), M).to(tl.int32)
    ignored = ignored_label(ignored_low, ignored_high)
    rows = this_batch(rows, counters, gather)
    normaliser = normaliser_of(
        rows, count, labels, label_step, weight, weight_step, class_weight, ignored, N, settings, gather, LONG_CHUNK
    )
    scale = stored_scale(hyper, normaliser, settings, scaled)
    slope = tl.load(slope_param, mask=activation == PRELU, other=slope)
    loss, below = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    right, scored = tl.full((), 0, tl.int32), tl.full((), 0, tl.int32)
    for group in range(program, tl.cdiv(M, BM), programs):
        part, hits, asked, part_below = rows_in_tiles(
            z, dz, group * BM + tl.arange(0, BM), count, scale, rows, labels, target, weight, class_weight, settings,
            M, N, z_row, z_col, label_step, target_row, target_col, weight_step, dz_row, dz_col,
            gather, activation, slope, ignored, store_dz, BM, BN, ALIGNED, CROSS_ENTROPY, LABELS,
        )  # fmt: skip
        loss += part.to(tl.float64)
        below += part_below.to(tl.float64)
        right += hits
        scored += asked
    finish_loss(loss, right, scored, below, partials, ticket, stats, dslope, before, normaliser, program, programs)
