"""``divergence``, and gradients of two batches, against their definitions; on the backend that has them."""

from __future__ import annotations

import numpy as np
import pytest
from devices import INTERPRETER, STAND_IN, VARIANT_PARAMETERS, marks_of, usable
from tolerance import assert_within

from fusemlp_kernels import reference
from fusemlp_kernels.contract import BATCH_LOSSES, COUNTERS, LAST_LOSS, LOSS_SUM, ROW_COUNT, STATS, LossSpec, UpdateRule
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError
from fusemlp_kernels.registry import backend

VARIANTS = [one for one in VARIANT_PARAMETERS if one.values[0].device.backend == "numpy"]


@pytest.mark.parametrize("scale", [0.1, 30.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (70, 10), (3, 200)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_that_of_the_definition(variant, shape, reduction, scale):
    rng, (rows, columns) = np.random.default_rng(2), shape
    z, other, before = (variant.rounded(one) for one in rng.normal(size=(3, *shape)) * [[[scale]], [[scale]], [[1.0]]])
    weight, picked = variant.rounded(rng.uniform(0.2, 2.0, rows + 2)), rng.permutation(rows + 2)[:rows]
    counters, stats, strength = np.zeros(COUNTERS, np.int64), np.zeros(STATS), 6.0
    # the last row is padding
    counters[ROW_COUNT] = count = max(1, rows - 1)
    stats[[LAST_LOSS, LOSS_SUM]] = 1.0, 2.0
    dz, dother = before.copy(), variant.rounded(np.full(shape, 0.5))
    given = {"z": z, "other": other, "loss": LossSpec("cross_entropy", reduction), "counters": counters}
    given |= {"weight": weight, "rows": picked, "strength": strength}
    variant.bind("divergence", dother=dother, dz=dz, stats=stats, **given)()

    own = weight.astype(np.float64)[picked[:count]]
    value, by_z, by_other = reference.divergence(
        *(one[:count].astype(np.float64) for one in (z, other)), own, reduction
    )
    # sums of exponentials of numbers up to ``far`` from the largest, each rounded; logarithms in float64
    far = max(np.ptp(one, axis=1).max() for one in (z, other))
    relative = (columns + 12.0 + far) * variant.unit
    exact = (one[:count].astype(np.float64) for one in (z, other))
    log_p, log_q = (one - np.logaddexp.reduce(one, axis=1, keepdims=True) for one in exact)
    # exponentials are cut off at the least of which the half is normal
    tiny = 2.0 * np.finfo(z.dtype).tiny
    p, q, apart = np.exp(log_p), np.exp(log_q), np.abs(log_p - log_q) + 1.0
    spread = (p * apart).sum(axis=1, keepdims=True)
    shares = strength * own[:, None] / (1.0 if reduction == "sum" else own.sum())
    wanted = np.zeros(shape)
    wanted[:count] = strength * by_other
    bound = np.zeros(shape)
    bound[:count] = 4.0 * relative * shares * (p + q) + tiny * (1.0 + shares)
    assert_within(dother, wanted, bound)
    wanted = before.astype(np.float64)
    wanted[:count] += strength * by_z
    bound[:count] = 4.0 * relative * shares * p * (apart + spread) + 2.0 * variant.unit * np.abs(wanted[:count])
    bound[:count] += tiny * (1.0 + shares) * (apart + spread)
    assert_within(dz, wanted, bound)
    error = float(4.0 * relative * (shares * spread).sum())
    normaliser = 1.0 if reduction == "sum" else float(own.sum())
    assert stats[LAST_LOSS] - 1.0 == pytest.approx(strength * value, abs=error)
    assert stats[LOSS_SUM] - 2.0 == pytest.approx(strength * value * normaliser, abs=error * normaliser)
    assert stats[BATCH_LOSSES] == pytest.approx(strength * value * count, abs=error * count)

    alone = variant.rounded(np.full(shape, 0.5))
    variant.bind("divergence", dother=alone, **given)()
    assert np.array_equal(alone, dother)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nan_stays_in_its_row_and_rows_without_weight_give_zero(variant):
    z, other = variant.rounded(np.zeros((3, 4))), variant.rounded(np.ones((3, 4)))
    z[1, 2] = np.nan
    counters, dother = np.zeros(COUNTERS, np.int64), variant.rounded(np.zeros((3, 4)))
    counters[ROW_COUNT] = 3
    given = {"z": z, "other": other, "loss": LossSpec("cross_entropy"), "counters": counters, "strength": 1.0}
    variant.bind("divergence", dother=dother, **given)()
    assert np.array_equal(np.isnan(dother).any(axis=1), [False, True, False])
    z[1, 2] = 5.0
    weight, stats = variant.rounded(np.zeros(3)), np.zeros(STATS)
    dz = np.zeros_like(dother)
    variant.bind("divergence", dother=dother, dz=dz, weight=weight, stats=stats, **given)()
    assert not dother.any() and not dz.any() and not stats.any()


@pytest.mark.parametrize("rows", [3, 600])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_of_two_batches_are_added(variant, rows):
    rng = np.random.default_rng(5)
    dz, dz2 = (variant.rounded(one) for one in rng.normal(size=(2, rows, 7)))
    x, x2 = (variant.rounded(one) for one in rng.normal(size=(2, rows, 40)))
    dslope, dslope2 = (variant.rounded(one) for one in rng.normal(size=(2, 1)))
    counters = np.zeros(COUNTERS, np.int64)
    counters[ROW_COUNT] = rows
    dw, db, grad = (variant.rounded(np.full(size, 0.5)) for size in ((7, 40), 7, 1))
    layer = {"dz": dz, "x": x, "dz2": dz2, "x2": x2, "dw": dw, "db": db}
    slope = {"dslope": dslope, "dslope2": dslope2, "grad": grad}
    variant.bind("grad_weight", layers=(layer,), slopes=(slope,), rule=UpdateRule("sgd"), counters=counters)()
    both, inputs = (np.concatenate(pair).astype(np.float64) for pair in ((dz, dz2), (x, x2)))
    size = (2.0 * np.sqrt(2 * rows) + 4.0) * variant.unit
    assert_within(dw, both.T @ inputs, size * (np.abs(both).T @ np.abs(inputs)))
    assert_within(db, both.sum(axis=0), size * np.abs(both).sum(axis=0))
    assert_within(grad, dslope.astype(np.float64) + dslope2, size * (np.abs(dslope) + np.abs(dslope2)))


@pytest.mark.parametrize(
    "device", [pytest.param(device, id=device.name, marks=marks_of(device)) for device in (INTERPRETER, STAND_IN)]
)
def test_other_backends_refuse_both(device):
    with usable(device):
        other = backend(device.backend, None, "fp32")
        with pytest.raises(BackendUnavailableError, match="divergence': it is bound by the numpy backend alone"):
            other.bind("divergence")
        layer = {name: other.view(other.allocate(4, "real"), 0, (2, 2), 2) for name in ("dz", "x", "dz2", "x2", "dw")}
        with pytest.raises(ArgumentError, match="dz2: this backend takes one batch, and the numpy backend a second"):
            other.bind(
                "grad_weight", layers=({**layer, "db": None},), rule=UpdateRule("sgd"),
                counters=other.allocate(COUNTERS, "int64"),
            )  # fmt: skip
