"""What is CuPy's own about ``train_fleet``: launches, graphs, long batches, wide outputs, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from devices import CUPY_GPU, STAND_IN, Variant, marks_of
from fleet_cases import Fleet, Oracle, varied
from memory import place
from test_train_fleet import case

from fusemlp_kernels.contract import BATCH_INDEX, Ridge
from fusemlp_kernels.errors import ArgumentError, DTypeError

ON_HOST = pytest.mark.parametrize(
    "variant", [pytest.param(Variant(STAND_IN, "fp32"), id=STAND_IN.name, marks=marks_of(STAND_IN))]
)
EVERYWHERE = pytest.mark.parametrize(
    "variant",
    [pytest.param(Variant(device, "fp32"), id=device.name, marks=marks_of(device)) for device in (STAND_IN, CUPY_GPU)],
)


@ON_HOST
@pytest.mark.parametrize("number", [1, 8], ids=["momentum", "accumulated and clipped"])
def test_a_step_has_as_many_launches_for_seventeen_models_as_for_one(variant, number, monkeypatch):
    from cupy_standin import cublas, kernels

    class Counted:
        def __init__(self, streams):
            self.streams, self.count = streams, 0

        def __getattr__(self, name):
            return getattr(self.streams, name)

        def start(self, work):
            self.count += 1
            self.streams.start(work)

    shape, model = case(number)
    fleets = [Fleet(variant, shape, varied(model, count)) for count in (1, 17)]
    counted = Counted(kernels.streams)
    monkeypatch.setattr(kernels, "streams", counted)
    monkeypatch.setattr(cublas, "streams", counted)
    launches = []
    for fleet in fleets:
        before = counted.count
        fleet.run([1] * len(fleet.models))
        launches.append(counted.count - before)
    # forward with the gather, back, column sums and the product of each trained weight, the update; what accumulates
    # is added up, and what is clipped has a norm
    weights = sum(name[0] == "w" and name not in shape.frozen for name in fleets[0].places)
    backward = 2 if weights == 2 else 0
    assert launches == [1 + 2 * 2 + backward + 1 + weights + 1 + (2 if number == 8 else 0)] * 2


@EVERYWHERE
def test_graphs_make_the_steps_of_launches(variant, monkeypatch):
    """A graph is captured when many steps of as many models have been made, and serves any of so many."""
    shape, model = case(4)
    models = varied(model, 3)
    whole, single = Fleet(variant, shape, models), Fleet(variant, shape, models)
    kind = type(variant.backend()._device)
    capture, captured = kind.capture, []

    def counted(device, run, times):
        captured.append(times)
        return capture(device, run, times)

    monkeypatch.setattr(kind, "capture", counted)
    parts = [45, 45, 45], [20, 20, 0], [0, 33, 33], [40, 40, 0], [1, 1, 1]
    for steps in parts:
        whole.run(steps)
    # what three models did, then two
    assert captured == [8, 1, 8, 1]
    from fusemlp_kernels.cupy import models as launching

    monkeypatch.setattr(launching, "WORTH_A_GRAPH", 1000)
    for steps in parts:
        single.run(steps)
    assert captured == [8, 1, 8, 1]
    assert whole.counters[:, BATCH_INDEX].tolist() == [106, 139, 79]
    found = whole.everything()
    for name, array in single.everything().items():
        assert array.tobytes() == found[name].tobytes(), name
    # of lengths that are not kept the graphs are gone
    monkeypatch.setattr(launching, "KEPT_LENGTHS", 1)
    monkeypatch.setattr(launching, "WORTH_A_GRAPH", 32)
    whole.run([1, 1, 0])
    whole.run([40, 40, 40])
    assert captured == [8, 1, 8, 1, 8]


@EVERYWHERE
@pytest.mark.parametrize(
    "changes",
    [
        # the normaliser has a launch of its own, and the sums of the columns are taken in parts
        {"batch": 1100, "data": 1500, "sizes": (3, 4, 35)},
        # a row of logits has a block
        {"batch": 3, "sizes": (5, 6, 1030)},
    ],
    ids=["long batch", "wide output"],
)
def test_large_models_make_the_oracles_steps(variant, changes):
    shape, model = case(1, **changes)
    fleet = Fleet(variant, shape, varied(replace(model, rows=shape.batch + 300 % shape.batch), 2))
    for steps in ([1, 1], [0, 1]):
        pending = [Oracle(fleet, index) for index, count in enumerate(steps) if count]
        fleet.run(steps)
        for step in pending:
            step.check()
    fleet.check_gaps()


@EVERYWHERE
def test_rows_behind_a_short_batch_are_not_looked_at(variant):
    """There may be another epoch's, or nothing that names a row."""
    shape, model = case(1)
    models = [replace(one, rows=7) for one in varied(model, 2)]
    fleet, other = Fleet(variant, shape, models), Fleet(variant, shape, models)
    fleet.x[16] = np.nan
    fleet.rows[fleet.rows == 16] = 3
    other.rows[other.rows == 16] = 3
    fleet.rows[:, 7:] = 16
    for one in (fleet, other):
        one.run([2, 2])
    found = fleet.everything()
    for name, array in other.everything().items():
        assert array.tobytes() == found[name].tobytes(), name


@ON_HOST
def test_what_cupy_has_no_fleets_for_says_so(variant):
    shape, model = case(2)
    fleet = Fleet(variant, shape, varied(model, 2))
    given = fleet.operands()
    with pytest.raises(ArgumentError, match="shadow: the cupy backend trains fleets in fp32 and tf32"):
        variant.bind("train_fleet", **given, shadow=fleet.shadow)
    with pytest.raises(ArgumentError, match="ridges: expected one for each of the 2 models, got 1"):
        variant.bind("train_fleet", **given, ridges=[Ridge()])
    with pytest.raises(DTypeError, match="rows: expected int64"):
        variant.bind("train_fleet", **{**given, "rows": fleet.rows.astype(np.float32)})
    apart = place(np.zeros((2, 2 * fleet.size)), "plain", np.float32)[:, : fleet.size]
    with pytest.raises(ArgumentError, match="gradients: expected a contiguous array with the axis of models in front"):
        variant.bind("train_fleet", **{**given, "gradients": apart})


@EVERYWHERE
def test_a_pull_that_is_nan_leaves_zeros_between_the_rows(variant):
    """Where a row weighs NaN so does the batch, and the penalty is over it."""
    shape, model = case(1)
    models = varied(model, 2)
    fleet = Fleet(variant, shape, models)
    fleet.weight[fleet.rows[0, 0]] = np.nan
    run = variant.bind("train_fleet", **fleet.operands(), ridges=[Ridge(0.3), Ridge()])
    run([1, 0])
    assert np.isnan(fleet.tensor(fleet.params[0], "w0")).all() and np.isfinite(fleet.params[1]).all()
    fleet.check_gaps()
