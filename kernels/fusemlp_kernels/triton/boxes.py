"""Training with intervals: boxes of a layer's values by centre and radius, and their gradients. ``reference.box`` and
``reference.worst_logits`` define them (Gowal et al., "On the effectiveness of interval bound propagation for training
verifiably robust models", 2018).

A program works on one row of matrices of any strides.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import UPDATE_COUNT
from fusemlp_kernels.triton.functions import maximum, minimum
from fusemlp_kernels.triton.pointwise_triton import PRELU, activate, derivative
from fusemlp_kernels.triton.tiles import this_batch

# The fields of a ``Ramp``, float64.
EPS, KAPPA, WARMUP, RAMP, FIRST, UPDATES = (tl.constexpr(place) for place in range(6))


@triton.jit
def reached(ramp, counters):
    """Return the share of the radius, and of the weight of the worst case, that is reached."""
    done = tl.load(counters + UPDATE_COUNT) - tl.load(ramp + FIRST)
    risen = done / tl.load(ramp + UPDATES) - tl.load(ramp + WARMUP)
    length = tl.load(ramp + RAMP)
    rising = tl.minimum(tl.maximum(risen / tl.where(length == 0.0, 1.0, length), 0.0), 1.0)
    return tl.where(length == 0.0, tl.where(risen >= 0.0, 1.0, 0.0), rising)


@triton.jit
def source_of(row, rows, counters, gather):
    """Return the row of the data that a row of the batch is; -1 is padding."""
    source = row.to(tl.int64)
    if gather != 0:
        source = tl.load(this_batch(rows, counters, gather) + row)
    return source


@triton.jit
def cells(matrix, row, at, row_step, col_step):
    """Return the places of columns ``at`` of a row."""
    return matrix + row.to(tl.int64) * row_step + at.to(tl.int64) * col_step


@triton.jit(
    do_not_specialize=[
        "K", "x_row", "x_col", "centre_row", "centre_col", "radius_row", "radius_col", "reach_step", "least_step",
        "most_step", "gather", "above", "below",
    ]
)  # fmt: skip
def ball_kernel(
    x, centre, radius, reach, least, most, rows, counters, ramp, K, x_row, x_col, centre_row, centre_col, radius_row,
    radius_col, reach_step, least_step, most_step, gather, above, below, BLOCK: tl.constexpr,
):  # fmt: skip
    """The box of the inputs near a row, (M, K), with ``above`` within ``least``, with ``below`` within ``most``."""
    row = tl.program_id(0)
    source = source_of(row, rows, counters, gather)
    width = tl.where(source >= 0, K, 0)
    size = (tl.load(ramp + EPS) * reached(ramp, counters)).to(tl.float32)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        known = at < width
        own = tl.load(cells(x, tl.maximum(source, 0), at, x_row, x_col), mask=known, other=0.0).to(tl.float32)
        spread = size * tl.load(reach + at.to(tl.int64) * reach_step, mask=known, other=0.0)
        low, high = own - spread, own + spread
        if above != 0:
            end = tl.load(least + at.to(tl.int64) * least_step, mask=known, other=0.0)
            low, high = maximum(low, end), maximum(high, end)
        if below != 0:
            end = tl.load(most + at.to(tl.int64) * most_step, mask=known, other=0.0)
            low, high = minimum(low, end), minimum(high, end)
        middle, half = 0.5 * low + 0.5 * high, 0.5 * high - 0.5 * low
        there = cells(centre, row, at, centre_row, centre_col)
        tl.store(there, middle.to(centre.dtype.element_ty), mask=at < K)
        there = cells(radius, row, at, radius_row, radius_col)
        tl.store(there, half.to(radius.dtype.element_ty), mask=at < K)


@triton.jit(
    do_not_specialize=[
        "N", "zc_row", "zc_col", "zr_row", "zr_col", "lower_row", "lower_col", "upper_row", "upper_col", "centre_row",
        "centre_col", "radius_row", "radius_col", "activation",
    ]
)  # fmt: skip
def box_kernel(
    zc, zr, lower, upper, centre, radius, slope_param, N, zc_row, zc_col, zr_row, zr_col, lower_row, lower_col,
    upper_row, upper_col, centre_row, centre_col, radius_row, radius_col, activation, slope,
    BACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Boxes of outputs (M, N) from those of pre-activations; with ``BACK`` the gradients by zc and zr in place of those
    by centre and radius, and the derivatives are read from ``lower`` and ``upper``."""
    row = tl.program_id(0)
    slope = tl.load(slope_param, mask=activation == PRELU, other=slope)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < N
        lower_at, upper_at = cells(lower, row, at, lower_row, lower_col), cells(upper, row, at, upper_row, upper_col)
        centre_at = cells(centre, row, at, centre_row, centre_col)
        radius_at = cells(radius, row, at, radius_row, radius_col)
        if BACK:
            low = tl.load(lower_at, mask=inside, other=0.0).to(tl.float32)
            high = tl.load(upper_at, mask=inside, other=0.0).to(tl.float32)
            by_centre = 0.5 * tl.load(centre_at, mask=inside, other=0.0).to(tl.float32)
            by_radius = 0.5 * tl.load(radius_at, mask=inside, other=0.0).to(tl.float32)
            by_low = (by_centre - by_radius) * derivative(low, activation, slope)
            by_high = (by_centre + by_radius) * derivative(high, activation, slope)
            middle, half = by_high + by_low, by_high - by_low
        else:
            zc_at, zr_at = cells(zc, row, at, zc_row, zc_col), cells(zr, row, at, zr_row, zr_col)
            z = tl.load(zc_at, mask=inside, other=0.0).to(tl.float32)
            spread = tl.load(zr_at, mask=inside, other=0.0).to(tl.float32)
            least, most = z - spread, z + spread
            tl.store(zc_at, least.to(zc.dtype.element_ty), mask=inside)
            tl.store(zr_at, most.to(zr.dtype.element_ty), mask=inside)
            low, high = activate(least, activation, slope), activate(most, activation, slope)
            tl.store(lower_at, low.to(lower.dtype.element_ty), mask=inside)
            tl.store(upper_at, high.to(upper.dtype.element_ty), mask=inside)
            middle, half = 0.5 * low + 0.5 * high, 0.5 * high - 0.5 * low
        tl.store(centre_at, middle.to(centre.dtype.element_ty), mask=inside)
        tl.store(radius_at, half.to(radius.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "N", "zc_row", "zc_col", "zr_row", "zr_col", "dzc_row", "dzc_col", "dzr_row", "dzr_col", "dz_row", "dz_col",
        "label_step", "gather",
    ]
)  # fmt: skip
def worst_kernel(
    zc, zr, dzc, dzr, dz, labels, rows, counters, ramp, N, zc_row, zc_col, zr_row, zr_col, dzc_row, dzc_col, dzr_row,
    dzr_col, dz_row, dz_col, label_step, gather, BACK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """In dzc (M, N) the logits that are worst for the label of each row; with ``BACK`` dzc and dzr by the gradient in
    dzc, and dz shrunk to the share of the plain loss."""
    row = tl.program_id(0)
    source = source_of(row, rows, counters, gather)
    label = tl.load(labels + source * label_step, mask=source >= 0, other=-1)
    own = 1.0 - (1.0 - tl.load(ramp + KAPPA)) * reached(ramp, counters)
    for start in range(0, N, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < N
        dzc_at = cells(dzc, row, at, dzc_row, dzc_col)
        if BACK:
            d = tl.load(dzc_at, mask=inside, other=0.0).to(tl.float32)
            # an infinity without a share is no NaN
            by_centre = tl.where(own < 1.0, (1.0 - own).to(tl.float32) * d, 0.0)
            by_radius = tl.where(at == label, -by_centre, by_centre)
            tl.store(dzc_at, by_centre.to(dzc.dtype.element_ty), mask=inside)
            there = cells(dzr, row, at, dzr_row, dzr_col)
            tl.store(there, by_radius.to(dzr.dtype.element_ty), mask=inside)
            there = cells(dz, row, at, dz_row, dz_col)
            plain = own.to(tl.float32) * tl.load(there, mask=inside, other=0.0).to(tl.float32)
            tl.store(there, plain.to(dz.dtype.element_ty), mask=inside)
        else:
            z = tl.load(cells(zc, row, at, zc_row, zc_col), mask=inside, other=0.0).to(tl.float32)
            spread = tl.load(cells(zr, row, at, zr_row, zr_col), mask=inside, other=0.0).to(tl.float32)
            worst = tl.where(at == label, z - spread, z + spread)
            tl.store(dzc_at, worst.to(dzc.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["K", "source_row", "source_col", "signs_row", "signs_col", "turned_row", "turned_col"])
def turn_kernel(
    source, signs, turned, K, source_row, source_col, signs_row, signs_col, turned_row, turned_col, BLOCK: tl.constexpr
):
    """``turned`` (N, K) = ``source``, with another sign where that of ``signs`` is not above 0."""
    row = tl.program_id(0)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(cells(source, row, at, source_row, source_col), mask=at < K, other=0.0)
        above = tl.load(cells(signs, row, at, signs_row, signs_col), mask=at < K, other=0.0) > 0.0
        # the magnitude of 0 is no -0
        there = cells(turned, row, at, turned_row, turned_col)
        tl.store(there, tl.where(above, value, 0.0 - value), mask=at < K)
