"""Several epochs in a launch of several models, and the ridge of each model: the oracle's steps, and what is summed
over them."""

from dataclasses import replace

import numpy as np
import pytest
from fleet_cases import GAP_VALUE, Fleet, Oracle, varied
from test_train_fleet import CASES, EVERY, FIRST, RULES, case

from fusemlp_kernels.contract import (
    BATCH_INDEX,
    LAST_LOSS,
    LOSS_SUM,
    PENALTIES,
    ROW_COUNT,
    ROW_OFFSET,
    Ridge,
)

# The last batch of each epoch is short.
EPOCHS, BATCHES = 3, 2
# Of one model each: none, with the usual divisor, with another.
RIDGES = (None, Ridge(0.3), Ridge(0.1, 2.5))


def with_ridges(model):
    """Models with numbers of their own, the first without a ridge."""
    models = zip(varied(model, len(RIDGES)), RIDGES, strict=True)
    return [replace(one, loss=replace(one.loss, reduction="mean"), ridge=ridge) for one, ridge in models]


@pytest.mark.parametrize("variant", FIRST)
def test_steps_through_three_epochs_are_the_oracles_and_each_has_its_account(variant):
    shape, model = case(1)
    fleet = Fleet(variant, shape, varied(replace(model, rows=9), 2), epochs=EPOCHS)
    assert [model.rows for model in fleet.models] == [9, 8]
    for step in range(EPOCHS * BATCHES):
        epoch, batch = divmod(step, BATCHES)
        for index, one in enumerate(fleet.models):
            walk = epoch * one.rows + batch * shape.batch, min(shape.batch, one.rows - batch * shape.batch)
            assert tuple(fleet.counters[index, [ROW_OFFSET, ROW_COUNT]]) == walk
        steps = [Oracle(fleet, index) for index in range(2)]
        fleet.run([1, 1])
        for one in steps:
            one.check()
        # the epochs that have not ended have no account yet
        assert (fleet.epoch_stats[:, (step + 1) // BATCHES :] == GAP_VALUE).all()
    # behind the last comes the first
    assert fleet.counters[:, [ROW_OFFSET, ROW_COUNT]].tolist() == [[0, 5], [0, 5]]
    first = np.array(fleet.epoch_stats)
    fleet.run([BATCHES + 1] * 2)
    changed = (fleet.epoch_stats != first).any(axis=2)
    assert changed.tolist() == [[True, False, False]] * 2


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.parametrize(("number", "accounts"), [(2, None), (8, 1)], ids=["in the epilogue", "through memory"])
def test_launches_of_any_length_give_the_bits_of_launches_of_an_epoch(variant, number, accounts):
    shape, model = case(number)
    models = [replace(one, ridge=ridge) for one, ridge in zip(varied(model, 2), RIDGES[1:], strict=True)]
    models = [replace(one, rows=rows) for one, rows in zip(models, (9, 8), strict=True)]
    whole, cut = Fleet(variant, shape, models, epochs=EPOCHS), Fleet(variant, shape, models, epochs=EPOCHS)
    steps = EPOCHS * BATCHES
    whole.run([steps, steps])
    for part in ([3, 1], [0, 2], [3, 3]):
        cut.run(part)
    found = whole.everything()
    for name, array in cut.everything().items():
        assert array.tobytes() == found[name].tobytes(), name
    alone = Fleet(variant, shape, models[1:2], "train_resident", EPOCHS)
    alone.run(steps)
    for name in ("params", "stats", "hyper", "epoch_stats"):
        assert found[name][1].tobytes() == alone.everything()[name][0].tobytes(), name
    single = Fleet(variant, shape, models, epochs=accounts)
    for epoch in range(EPOCHS):
        for index, one in enumerate(models):
            single.rows[index, : one.rows] = whole.rows[index, epoch * one.rows :][: one.rows]
        single.run([BATCHES] * 2)
        account = single.stats if accounts is None else single.epoch_stats[:, 0]
        assert account.tobytes() == found["epoch_stats"][:, epoch].tobytes()
        single.stats[:, LOSS_SUM:] = 0.0
    for name in ("params", "stats", "hyper", "counters"):
        assert single.everything()[name].tobytes() == found[name].tobytes(), name


@pytest.mark.parametrize("variant", EVERY)
@pytest.mark.parametrize("number", range(len(CASES) - 1))
def test_steps_with_ridges_and_divisors_are_the_oracles(variant, number):
    shape, model = case(number)
    models = with_ridges(replace(model, rows=shape.batch + 4))
    models = models if variant.precision == "fp32" else models[2:3]
    fleet = Fleet(variant, shape, models)
    for _ in range(2):
        steps = [Oracle(fleet, index) for index in range(len(models))]
        fleet.run([1] * len(models))
        for step in steps:
            step.check()
    fleet.check_gaps()
    penalised = [one.ridge is not None and one.ridge.strength > 0.0 for one in models]
    assert ((fleet.stats[:, PENALTIES] > 0.0) == penalised).all()


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.parametrize("number", [1, 8])
def test_a_model_without_a_ridge_has_the_bits_that_it_has_alone(variant, number):
    shape, model = case(number)
    models = with_ridges(model)
    alone, fleet = Fleet(variant, shape, models[:1]), Fleet(variant, shape, models)
    alone.run([2])
    fleet.run([2] * 3)
    found = fleet.everything()
    for name, array in alone.everything().items():
        assert array[0].tobytes() == found[name][0].tobytes(), name
    assert len({row.tobytes() for row in fleet.params}) == 3


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.parametrize("number", [1, 5])
def test_a_batch_that_weighs_nothing_has_no_penalty(variant, number):
    shape, model = case(number)
    plain = replace(model, rule=RULES["sgd"], decay=0.0, ridge=Ridge(0.3, 2.0))
    fleet = Fleet(variant, shape, [plain])
    fleet.weight[...] = 0.0
    before = fleet.everything()
    step = Oracle(fleet, 0)
    fleet.run([1])
    step.check()
    assert fleet.stats.tolist()[0][LAST_LOSS : LOSS_SUM + 1] == [0.0, 0.0] and fleet.stats[0, PENALTIES] == 0.0
    assert fleet.params.tobytes() == before["params"].tobytes()
    # what weighs something again is pulled again
    fleet.weight[...] = 1.0
    step = Oracle(fleet, 0)
    fleet.run([1])
    step.check()
    assert fleet.stats[0, PENALTIES] > 0.0 and fleet.counters[0, BATCH_INDEX] == 2


@pytest.mark.parametrize("variant", FIRST)
@pytest.mark.parametrize("number", [1, 5])
def test_a_weight_that_is_nan_reaches_its_model_and_no_padding(variant, number):
    shape, model = case(number)
    fleet = Fleet(variant, shape, [replace(model, ridge=Ridge(0.3))])
    fleet.weight[fleet.rows[0, 0]] = np.nan
    fleet.run([2])
    assert np.isnan(fleet.stats[0, LAST_LOSS]) and np.isnan(fleet.tensor(fleet.params[0], "w0")).all()
    fleet.check_gaps()
