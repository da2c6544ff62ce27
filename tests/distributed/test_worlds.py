"""Several processes train one model: the same bits on 1, 2, 4 and 8, those of one process but for rounding."""

import numpy as np
import pytest
import worlds
from cases import CASES, WHOLE_IN, main, trained

from make import assert_same

pytest.importorskip("torch")
EXACT = [name for name in CASES if name.endswith("fp64")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return worlds.Worlds(tmp_path_factory.mktemp("worlds"), (1, 2, 3, 4, 8), main)


@pytest.mark.parametrize(("count", "name"), [(count, name) for count in (2, 4, 8) for name in WHOLE_IN[count]])
def test_the_bits_do_not_depend_on_the_number_of_ranks(found, count, name):
    one = found.of(1, name)
    assert_same(found.of(count, name), one)
    assert np.isfinite(one["params"]).all() and one["params"].any()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize(("count", "kind"), [(2, ""), (2, ", fast"), (3, ", fast")])
def test_several_processes_train_as_one_does(found, name, count, kind):
    found.assert_close(count, f"{name}{kind}", trained(CASES[name]), rtol=1e-9, atol=1e-9)


def test_torch_trains_to_the_same_parameters(found):
    made = CASES["momentum fp64"].engine()
    made.memory.params[:] = found.of(2, "momentum fp64")["params"]
    own = np.concatenate([array.ravel() for array in made.state_dict().values()])
    np.testing.assert_allclose(own, found.of(2, "torch")["params"], rtol=1e-9, atol=1e-9)


def test_early_stopping_ends_all_ranks_alike(found):
    epochs = {count: len(found.of(count, "early stopping")["history val_loss"]) for count in (1, 2, 4)}
    assert len(set(epochs.values())) == 1 and epochs[1] < 60


SAID = {
    "seed": "distributed: seed differs: rank 0 has 0, rank 1 has 1; give all ranks the same",
    "loss": "distributed: loss differs: rank 0 has {'kind': 'mae'",
    "reduce": "distributed: reduce differs: rank 0 has ordered, 2 ranks, rank 1 has fast, 2 ranks",
    "data": "distributed: X differs: rank 0 has float32 (123, 9) of digest",
    "codes": "distributed: X differs: rank 0 has float32 (123, 3) of digest",
    "epochs": "distributed: epochs differs: rank 0 has 1, rank 1 has 2; give",
    "step": "step: a distributed engine trains in fit",
    "adversarial": "adversarial: it trains in one process so far",
    "plan": "plan: a distributed step is two launches",
}


@pytest.mark.parametrize("name", SAID)
def test_what_differs_or_cannot_be_is_named_on_every_rank(found, name):
    first, second = found.said(2, name)
    assert first == second and first.startswith(SAID[name])


def test_all_ranks_end_when_a_callback_on_one_stops(found):
    assert found.said(2, "stopped") == ["2", "2"]
