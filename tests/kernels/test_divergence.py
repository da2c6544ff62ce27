"""``divergence``, and gradients of two batches, against their definitions."""

from __future__ import annotations

import numpy as np
import pytest
from devices import INTERPRETER, STAND_IN, VARIANT_PARAMETERS, marks_of, usable
from memory import place
from tolerance import assert_within, bound

from fusemlp_kernels import reference
from fusemlp_kernels.contract import (
    BATCH_INDEX,
    BATCH_LOSSES,
    COUNTERS,
    HYPER,
    LAST_LOSS,
    LOSS_SCALE,
    LOSS_SUM,
    ROW_COUNT,
    ROW_OFFSET,
    STATS,
    LossSpec,
    UpdateRule,
)
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.registry import backend

# rows and columns, those of tiles, warps and blocks; the layout of matrices on a device
CASES = (
    *(((1, 1), "mean", 0.1, "plain"), ((5, 3), "sum", 0.1, "transposed"), ((5, 3), "mean", 30.0, "owned")),
    *(((34, 10), "mean", 30.0, "owned"), ((3, 200), "sum", 30.0, "plain"), ((3, 200), "mean", 0.1, "owned")),
    *(((3, 1100), "mean", 0.1, "stepped"), ((3, 1100), "sum", 30.0, "owned"), ((1500, 3), "mean", 1.0, "plain")),
)


@pytest.mark.parametrize(("shape", "reduction", "scale", "layout"), CASES)
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_it_is_that_of_the_definition(variant, shape, reduction, scale, layout):
    rng, (rows, columns) = np.random.default_rng(2), shape
    if variant.device is INTERPRETER:
        rows = min(rows, 34)
    shape = rows, columns
    layout = "plain" if variant.device.on_host else layout
    z, other, before = (variant.rounded(one) for one in rng.normal(size=(3, *shape)) * [[[scale]], [[scale]], [[1.0]]])
    z, other, before = (place(one, layout) for one in (z, other, before))
    weight, picked = rng.uniform(0.2, 2.0, rows + 2).astype(variant.real), rng.permutation(rows + 2)[:rows]
    counters, stats, strength = np.zeros(COUNTERS, np.int64), np.zeros(STATS), 6.0
    # the last row is padding
    counters[ROW_COUNT] = count = max(1, rows - 1)
    stats[[LAST_LOSS, LOSS_SUM]] = 1.0, 2.0
    dz, dother = place(before, layout), place(variant.rounded(np.full(shape, 0.5)), layout)
    # the rows of another batch come first
    counters[ROW_OFFSET] = rows
    given = {"z": z, "other": other, "loss": LossSpec("cross_entropy", reduction), "counters": counters}
    given |= {"weight": weight, "strength": strength, "rows": np.concatenate([np.zeros(rows, np.int64), picked])}
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
    tiny = 2.0 * np.finfo(variant.real).tiny
    p, q, apart = np.exp(log_p), np.exp(log_q), np.abs(log_p - log_q) + 1.0
    spread = (p * apart).sum(axis=1, keepdims=True)
    shares = strength * own[:, None] / (1.0 if reduction == "sum" else own.sum())
    wanted = np.zeros(shape)
    wanted[:count] = strength * by_other
    limit = np.zeros(shape)
    limit[:count] = 4.0 * relative * shares * (p + q) + tiny * (1.0 + shares)
    assert_within(dother, wanted, variant.result_bound(limit, wanted))
    assert not dother[count:].any() and np.array_equal(dz[count:], before[count:])
    wanted = before.astype(np.float64)
    wanted[:count] += strength * by_z
    limit[:count] = 4.0 * relative * shares * p * (apart + spread) + 2.0 * variant.unit * np.abs(wanted[:count])
    limit[:count] += tiny * (1.0 + shares) * (apart + spread)
    assert_within(dz, wanted, variant.result_bound(limit, wanted))
    error = float(4.0 * relative * (shares * spread).sum())
    normaliser = 1.0 if reduction == "sum" else float(own.sum())
    assert stats[LAST_LOSS] - 1.0 == pytest.approx(strength * value, abs=error)
    assert stats[LOSS_SUM] - 2.0 == pytest.approx(strength * value * normaliser, abs=error * normaliser)
    if variant.device.on_host:
        # elsewhere a resident loop keeps it, and none has this op
        assert stats[BATCH_LOSSES] == pytest.approx(strength * value * count, abs=error * count)

    alone = place(variant.rounded(np.full(shape, 0.5)), layout)
    variant.bind("divergence", dother=alone, **given)()
    assert np.array_equal(alone, dother)
    if not variant.device.on_host:
        hyper = np.zeros(HYPER)
        hyper[LOSS_SCALE] = 4.0
        variant.bind("divergence", dother=alone, hyper=hyper, **given)()
        once = dother.astype(np.float64)
        limit = variant.result_bound(tiny + 8.0 * variant.unit * np.abs(once), 4.0 * once)
        assert_within(alone, 4.0 * once, limit + 4.0 * variant.result_bound(0.0, once))


@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_nan_stays_in_its_row_and_rows_without_weight_give_zero(variant):
    z, other = variant.rounded(np.zeros((3, 4))), variant.rounded(np.ones((3, 4)))
    z[1, 2] = np.nan
    counters, dother = np.zeros(COUNTERS, np.int64), variant.rounded(np.zeros((3, 4)))
    counters[ROW_COUNT] = 3
    given = {"z": z, "other": other, "loss": LossSpec("cross_entropy"), "counters": counters, "strength": 1.0}
    variant.bind("divergence", dother=dother, **given)()
    assert np.array_equal(np.isnan(dother).any(axis=1), [False, True, False])
    z[1, 2] = 5.0
    weight, stats = np.zeros(3, variant.real), np.zeros(STATS)
    dz = np.zeros_like(dother)
    variant.bind("divergence", dother=dother, dz=dz, weight=weight, stats=stats, **given)()
    assert not dother.any() and not dz.any() and not stats.any()


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(3, 40), (300, 5)])
@pytest.mark.parametrize("variant", VARIANT_PARAMETERS)
def test_gradients_of_two_batches_are_added(variant, rows, columns, accumulate):
    rng = np.random.default_rng(5)
    data, picked = variant.rounded(rng.normal(size=(rows + 4, columns))), rng.permutation(rows + 4)[:rows]
    dz, dz2 = (variant.rounded(one) for one in rng.normal(size=(2, rows, 7)))
    x2 = variant.rounded(rng.normal(size=(rows, columns)))
    dslope, dslope2 = rng.normal(size=(2, 1)).astype(variant.real)
    counters = np.zeros(COUNTERS, np.int64)
    # of two batches that accumulate the second
    counters[[ROW_COUNT, BATCH_INDEX]] = rows, 1
    before = 0.5 if accumulate > 1 else 0.0
    dw, db, grad = (np.full(size, 0.5, variant.real) for size in ((7, columns), 7, 1))
    layer = {"dz": dz, "x": data, "rows": picked, "gathered": data[picked], "dz2": dz2, "x2": x2, "dw": dw, "db": db}
    if variant.traits.gathers_in_load:
        del layer["gathered"]
    slope = {"dslope": dslope, "dslope2": dslope2, "grad": grad}
    given = {"layers": (layer,), "slopes": (slope,), "rule": UpdateRule("sgd", accumulate=accumulate)}
    norm = np.zeros(1) if variant.traits.norms_gradients else None
    given |= {} if norm is None else {"norm": norm}
    variant.bind("grad_weight", **given, counters=counters)()
    both, inputs = (np.concatenate(pair).astype(np.float64) for pair in ((dz, dz2), (data[picked], x2)))
    magnitude = np.abs(both).T @ np.abs(inputs) + before
    assert_within(dw, both.T @ inputs + before, bound(2 * rows, magnitude, variant.unit, products=variant.products))
    assert_within(db, both.sum(axis=0) + before, bound(2 * rows, np.abs(both).sum(axis=0) + before, variant.unit))
    limit = 4.0 * variant.unit * (np.abs(dslope) + np.abs(dslope2) + before)
    assert_within(grad, dslope.astype(np.float64) + dslope2 + before, limit)
    if norm is not None:
        stored = np.concatenate([one.ravel().astype(np.float64) for one in (dw, db, grad)])
        assert norm[0] == pytest.approx(np.sqrt((stored**2).sum()), rel=2.0 * np.sqrt(stored.size) * variant.unit)


@pytest.mark.parametrize(
    "device", [pytest.param(device, id=device.name, marks=marks_of(device)) for device in (INTERPRETER, STAND_IN)]
)
def test_other_backends_say_where_they_take_a_second_batch(device):
    with usable(device):
        other = backend(device.backend, None, "fp32")
        layer = {name: other.view(other.allocate(4, "real"), 0, (2, 2), 2) for name in ("dz", "x", "dz2", "x2", "dw")}
        common = {"rule": UpdateRule("sgd"), "counters": other.allocate(COUNTERS, "int64")}
        alone = {name: layer[name] for name in ("dz", "x", "dw")}
        for layers in (({**layer, "db": None}, {**alone, "db": None}), ({**alone, "db": None, "dz2": layer["dz2"]},)):
            with pytest.raises(ArgumentError, match="dz2: expected a second batch of all layers and slopes"):
                other.bind("grad_weight", layers=layers, **common)
        clock = {
            "hyper": other.allocate(HYPER, "float64"),
            "rates": other.view(other.allocate(4, "float64"), 0, (1, 4), 4),
        }
        updated = {**layer, "w": layer["dw"], "b": None}
        del updated["dw"]
        with pytest.raises(ArgumentError, match="dz2: this backend takes a second batch in grad_weight; use it"):
            other.bind("grad_weight_update", layers=(updated,), **common, **clock)
