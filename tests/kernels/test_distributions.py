"""Losses of NumPy alone, of several outputs a target or with missing ones, against the oracle and differences."""

from dataclasses import replace

import numpy as np
import pytest
import tolerance as tol

from fusemlp_kernels import reference
from fusemlp_kernels.checks import checked
from fusemlp_kernels.contract import COUNTERS, DISTRIBUTIONS, LAST_LOSS, LOSS_SUM, NORM_SUM, ROW_COUNT, STATS, LossSpec
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError
from fusemlp_kernels.numpy.launches import one_thread
from fusemlp_kernels.pointwise import LOSSES
from fusemlp_kernels.registry import backend

ROWS, PADDING = 53, 3
LEVELS = (0.05, 0.25, 0.5, 0.9)
# of each loss the outputs of a row
CASES = {
    "gaussian": (LossSpec("gaussian"), 6),
    "gaussian missing": (LossSpec("gaussian", missing=True), 6),
    "gaussian floor": (LossSpec("gaussian", eps=0.3), 2),
    "quantiles": (LossSpec("quantiles", quantiles=LEVELS), 4),
    "quantiles below": (LossSpec("quantiles", quantiles=(0.6, 0.9)), 2),
    "quantiles above": (LossSpec("quantiles", quantiles=(0.1, 0.2, 0.4)), 3),
    **{f"{kind} missing": (LossSpec(kind, missing=True, delta=0.7, quantile=0.8), 5) for kind in LOSSES},
}


def data_of(name, real, seed=0):
    """Return outputs (ROWS, N), targets, and weights of the rows, some 0."""
    spec, width = CASES[name]
    random = np.random.default_rng(seed)
    shape = ROWS, 1 if spec.kind == "quantiles" else width // spec.width
    z, target = random.normal(size=(ROWS, width)) * 2, random.normal(size=shape)
    if spec.kind == "poisson":
        target = random.poisson(2, shape).astype(float)
    if spec.missing:
        target[random.uniform(size=shape) < 0.3] = np.nan
    weight = random.uniform(0.5, 2, ROWS) * (random.uniform(size=ROWS) < 0.8)
    return z.astype(real), target.astype(real), weight.astype(real)


def computed(spec, z, target, weight, precision):
    """Return the statistics and dz of a batch whose last rows are padding, which is NaN."""
    counters, stats, dz = np.zeros(COUNTERS, np.int64), np.zeros(STATS), np.empty_like(z)
    counters[ROW_COUNT], z, target = len(z) - PADDING, z.copy(), target.copy()
    z[-PADDING:] = target[-PADDING:] = np.nan
    operands = {"target": target, "weight": weight, "counters": counters, "stats": stats, "loss": spec}
    backend("numpy", None, precision).bind("loss_grad", z=z, dz=dz, **operands)()
    return stats, dz


def quantiles_of(spec, z):
    """Return the quantiles (M, N) of outputs, each a step from its neighbour."""
    middle, steps = int(np.argmin(abs(np.array(spec.quantiles) - 0.5))), reference.softplus(z)
    below = [z[:, middle] - steps[:, at:middle].sum(axis=1) for at in range(middle)]
    above = [z[:, middle] + steps[:, middle + 1 : at + 1].sum(axis=1) for at in range(middle, z.shape[1])]
    return np.column_stack([*below, *above])


def bounds(spec, z, target, u):
    """Return the errors of the losses (M, targets) and slopes (M, N) of each row."""
    function = 2.0 * tol.FUNCTION_ULPS * u
    steps = reference.softplus(z)
    if spec.kind == "quantiles":
        # a quantile adds up the middle output and the steps before it, each of which is rounded
        error = (function * (1.0 + steps) + tol.growth(z.shape[1]) * u * (np.abs(z) + steps)).sum(1, keepdims=True)
        error = error + u * np.abs(target)
        away = np.abs(quantiles_of(spec, z) - target)
        # at a quantile that meets the target the slope is of either side
        slope = (away <= error).sum(1, keepdims=True) + (function + tol.growth(z.shape[1]) * u) * z.shape[1]
        return z.shape[1] * (error + 4.0 * u * away.max(1, keepdims=True)), slope
    count = z.shape[1] // 2
    std, r = steps[:, count:], np.abs(z[:, :count] - target)
    relative = (function * (1.0 + std) / std + 4.0 * u) * 2.0 + 2.0 * u
    weight = 1.0 / np.maximum(std**2, spec.eps)
    loss = r**2 * weight * (relative + 4.0 * u) + relative + function * (1.0 + np.abs(np.log(weight)))
    by_mean = r * weight * (relative + 4.0 * u)
    by_raw = (weight + (r * weight) ** 2) * std * (3.0 * relative + function + 8.0 * u)
    return np.nan_to_num(loss), np.nan_to_num(np.hstack([by_mean, by_raw]))


@pytest.mark.parametrize("precision", ["fp32", "fp64"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "rows"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_it_is_the_oracles(name, weighted, reduction, precision):
    real, u = {"fp32": (np.float32, tol.U32), "fp64": (np.float64, 2.0**-53)}[precision]
    spec = replace(CASES[name][0], reduction=reduction)
    z, target, weight = data_of(name, real)
    weight = weight if weighted else None
    if reduction == "rows" and spec.missing:
        with pytest.raises(ArgumentError, match="loss: missing is for means and sums over elements"):
            computed(spec, z, target, weight, precision)
        return
    stats, dz = computed(spec, z, target, weight, precision)
    assert not dz[-PADDING:].any()
    z, target = (array[:-PADDING].astype(np.float64) for array in (z, target))
    weight = None if weight is None else weight[:-PADDING].astype(np.float64)
    loss, expected = reference.loss_of_output(spec, z, target, weight)
    share = np.ones(len(z)) if weight is None else weight
    there = ~np.isnan(target)
    each = spec.summands(z.shape[1])
    normaliser = (share[:, None] * there).sum() if spec.missing else share.sum() * each
    if spec.kind in DISTRIBUTIONS:
        of_loss, of_slope = bounds(spec, z, target, u)
    else:
        magnitude = 1.0 + np.exp(np.abs(z)) + np.nan_to_num(z - target) ** 2
        of_loss = of_slope = 8.0 * tol.FUNCTION_ULPS * u * magnitude
    scale = 1.0 if reduction == "sum" else 1.0 / normaliser
    by_row = {"rows": 1.0 / each}.get(reduction, scale)
    most = (share[:, None] * of_loss).sum() * scale + abs(loss) * u * tol.growth(z.size)
    assert abs(stats[LAST_LOSS] - loss) <= most
    assert np.all(np.abs(dz[:-PADDING] - expected) <= by_row * share[:, None] * of_slope + 16.0 * u * np.abs(expected))
    if reduction != "sum":
        assert stats[NORM_SUM] == pytest.approx(normaliser, rel=1e-6)
        assert stats[LOSS_SUM] == pytest.approx(loss * normaliser, rel=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_the_oracles_gradient_is_that_of_differences(name):
    spec, _ = CASES[name]
    z, target, weight = data_of(name, np.float64)
    z, target, weight = z[:6], target[:6], weight[:6] + 1
    _, gradient = reference.loss_of_output(spec, z, target, weight)
    differences = np.empty_like(z)
    for place in np.ndindex(*z.shape):
        sides = []
        for step in (1e-6, -1e-6):
            moved = z.copy()
            moved[place] += step
            sides.append(reference.loss_of_output(spec, moved, target, weight)[0])
        differences[place] = (sides[0] - sides[1]) / 2e-6
    # the gradient passes through the floor of the variance, where the loss is flat
    flat = reference.softplus(z) ** 2 < spec.eps if name == "gaussian floor" else np.zeros(z.shape, bool)
    np.testing.assert_allclose(gradient[~flat], differences[~flat], atol=1e-8 * max(1.0, abs(gradient).max()))


@pytest.mark.parametrize("name", CASES)
def test_threads_do_not_change_the_bits_and_nan_goes_through(name):
    spec, _ = CASES[name]
    z, target, weight = data_of(name, np.float32)
    many = computed(spec, *(np.tile(array, (40, 1)) for array in (z, target)), np.tile(weight, 40), "fp32")
    with one_thread():
        alone = computed(spec, *(np.tile(array, (40, 1)) for array in (z, target)), np.tile(weight, 40), "fp32")
    assert all(np.array_equal(one, other) for one, other in zip(many, alone, strict=True))
    # of an output whose target is there, or of a target that may not be missing
    row = np.flatnonzero(~np.isnan(target).any(axis=1) & (weight > 0))[0]
    spoiled = z.copy()
    spoiled[row] = np.nan
    stats, dz = computed(spec, spoiled, target, weight, "fp32")
    assert np.isnan(stats[LAST_LOSS]) and np.isnan(dz[row]).all() and np.isfinite(np.delete(dz, row, axis=0)).all()
    if not spec.missing:
        spoiled = target.copy()
        spoiled[row] = np.nan
        stats, dz = computed(spec, z, spoiled, weight, "fp32")
        assert np.isnan(stats[LAST_LOSS]) and np.isnan(dz[row]).all()


@pytest.mark.parametrize("name", CASES)
def test_a_batch_without_targets_or_weights_gives_zero(name):
    spec, _ = CASES[name]
    z, target, weight = data_of(name, np.float32)
    for missing, share in ((spec.missing, weight), (False, np.zeros_like(weight))):
        known = np.full_like(target, np.nan) if missing else target
        if missing or not share.any():
            stats, dz = computed(spec, z, known, share, "fp32")
            assert stats[LAST_LOSS] == stats[LOSS_SUM] == stats[NORM_SUM] == 0.0 and not dz.any()


@pytest.mark.parametrize("spec", [LossSpec("gaussian"), LossSpec("mse", missing=True)])
def test_other_backends_refuse_it(spec):
    operands = {"z": 0, "dz": 0, "loss": spec, "target": 0, "counters": 0}
    with pytest.raises(BackendUnavailableError, match="loss_grad: loss: only the numpy backend has missing targets"):
        checked("loss_grad", operands, lambda *given, **options: None)
