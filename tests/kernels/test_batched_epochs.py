"""Steps that are made together without a compiler: several epochs in a launch, and ridges."""

from __future__ import annotations

import numpy as np
import pytest
from devices import UNCOMPILED, Variant
from fleet_cases import Fleet, Model, Shape, varied

from fusemlp_kernels.contract import (
    BATCH_LOSSES,
    LAST_LOSS,
    LOSS_SUM,
    NORM_SUM,
    PENALTIES,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_TOTAL,
    STATS,
    LossSpec,
    Ridge,
    UpdateRule,
)
from fusemlp_kernels.errors import ArgumentError

FP64 = Variant(UNCOMPILED, "fp64")
SGD = UpdateRule("sgd")
ENTROPY = LossSpec("cross_entropy", accuracy=True)


def bound(fleet, **more):
    return FP64.backend().bind("train_fleet", **{**fleet.operands(), **more})


def test_epochs_one_behind_the_other_are_so_many_launches():
    models = varied(Model(UpdateRule("adam"), ENTROPY, rate=0.2), 3)
    shape = Shape(weighted=True)
    by_epoch, at_once = Fleet(FP64, shape, models), Fleet(FP64, shape, models)
    totals = at_once.counters[:, ROW_TOTAL].tolist()
    epochs = 3
    orders = np.random.default_rng(0).integers(0, shape.data, (3, epochs, max(totals)))
    at_once.rows = np.zeros((3, epochs * max(totals)), np.int64)
    for index, total in enumerate(totals):
        at_once.rows[index, : epochs * total] = orders[index, :, :total].ravel()
    history = np.full((3, epochs, STATS), np.nan)
    run, run_epoch = bound(at_once, history=history), bound(by_epoch)
    steps, seen = [-(-total // shape.batch) for total in totals], []
    for epoch in range(epochs):
        for index, total in enumerate(totals):
            by_epoch.rows[index, :total] = orders[index, epoch, :total]
        run_epoch(steps)
        if epoch == 0:
            # cut anywhere
            run([2, 2, 2])
            run([steps[0] - 2, steps[1] - 1, 0])
        seen.append(np.array(by_epoch.stats))
        by_epoch.stats[:, LOSS_SUM:] = 0.0
    run([steps[0] * 2, steps[1] * 2 - 1, steps[2] * 3 - 2])
    assert history.tobytes() == np.stack(seen, axis=1).tobytes()
    for name, array in by_epoch.everything().items():
        assert at_once.everything()[name].tobytes() == array.tobytes(), name
    assert not at_once.counters[:, ROW_OFFSET].any()
    assert at_once.counters[:, ROW_COUNT].tolist() == [min(total, shape.batch) for total in totals]


LOSSES = {
    "cross_entropy": (ENTROPY, ("tanh", "identity")),
    "mse": (LossSpec("mse"), ("tanh", "sigmoid")),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", LOSSES)
def test_a_ridge_is_added_and_divides(kind, weighted):
    """One step of gradient descent without weight decay shows the gradient."""
    loss, activations = LOSSES[kind]
    shape = Shape(weighted=weighted, activations=activations)
    models = [Model(SGD, loss, seed=seed, lr_factor=1.0) for seed in range(3)]
    usual = 1.0 if kind == "cross_entropy" else float(shape.sizes[-1])
    plain, ridged = Fleet(FP64, shape, models), Fleet(FP64, shape, models)
    ridges = [Ridge(), Ridge(0.7), Ridge(0.2, divisor=2.0 * usual)]
    before = plain.params.copy()
    bound(plain)([1, 1, 1])
    bound(ridged, ridges=ridges)([1, 1, 1])
    rate = models[0].rates[0]
    for index, ridge in enumerate(ridges):
        factor = 1.0 if ridge.divisor is None else usual / ridge.divisor
        rows = plain.rows[index, : shape.batch]
        shares = float(plain.weight[rows].sum()) if weighted else float(shape.batch)
        squares = 0.0
        for name in plain.places:
            old, step = plain.tensor(before[index], name), plain.tensor(plain.params[index], name)
            gradient = (old - step) / rate * factor
            if name[0] == "w":
                gradient = gradient + ridge.strength / shares * old
                squares += float(np.square(old).sum())
            # some roundings of numbers of about one, magnified by the division by the rate
            np.testing.assert_allclose(
                (old - ridged.tensor(ridged.params[index], name)) / rate, gradient, rtol=0, atol=100 * 2.0**-53 / rate
            )
        now, was = ridged.stats[index], plain.stats[index]
        assert now[LAST_LOSS] == pytest.approx(was[LAST_LOSS] * factor, rel=1e-14)
        assert now[BATCH_LOSSES] == pytest.approx(was[LAST_LOSS] * factor * shape.batch, rel=1e-14)
        assert now[LOSS_SUM] == pytest.approx(was[LOSS_SUM], rel=1e-14)
        assert now[NORM_SUM] == pytest.approx(was[NORM_SUM] / factor, rel=1e-14)
        assert now[PENALTIES] == pytest.approx(0.5 * ridge.strength / shares * squares * shape.batch, rel=1e-14)


def test_the_steps_of_each_model_are_asked_for():
    fleet = Fleet(FP64, Shape(), varied(Model(SGD, ENTROPY), 2))
    with pytest.raises(ArgumentError, match="steps of each of 2 models, got 1 numbers"):
        fleet.run([1])
