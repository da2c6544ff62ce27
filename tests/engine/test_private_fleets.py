"""Private fleets: models with their own noise, equal to engines trained alone, and what all of them spend."""

import numpy as np
import pytest
from devices import GPU, INTERPRETER, places, usable

import fusemlp
from fusemlp import DPSGD, MLP, SGD, ArgumentError, Engine, Fleet, ReduceOnPlateau
from fusemlp.describe.privacy import Accountant
from fusemlp.fleet import candidates as module
from fusemlp.fleet.results import Kept
from make import assert_same, assert_same_state

pytest.importorskip("dp_accounting")

SEED = 11
random = np.random.default_rng(1)
X = random.standard_normal((60, 6)).astype(np.float32)
y = (X @ random.standard_normal((6, 3))).argmax(axis=1)
NET, RULE = MLP([6, 8, 3], dropout=0.2), SGD(0.1, momentum=0.9)
VARY = [{"seed": 1}, {"seed": 1, "batch_size": 30}, {"lr": 0.3}]


def fleet(vary=VARY, **options):
    options = {"backend": "numpy", "privacy": DPSGD(1.5, seed=SEED), **options}
    return Fleet(NET, optimizer=RULE, batch_size=12, vary=vary, **options)


def alone(index, **options):
    """An engine like that of a model."""
    one = VARY[index]
    rule = SGD(one.get("lr", 0.1), momentum=0.9)
    options = {"backend": "numpy", "privacy": DPSGD(1.5, seed=SEED + index), **options}
    return Engine(NET, optimizer=rule, batch_size=one.get("batch_size", 12), seed=one.get("seed", 0), **options)


@pytest.mark.parametrize("plan", ["auto", "eager"])
def test_each_model_is_an_engine_trained_alone(plan):
    many = fleet(plan=plan)
    data = {"validation_data": (X[40:], y[40:]), "early_stopping": 2}
    results = many.fit(X[:40], y[:40], epochs=4, **data)
    results = many.fit(X, y, epochs=3, **data)
    for index, member in enumerate(results.members):
        engine = alone(index, plan=plan)
        engine.fit(X[:40], y[:40], epochs=4, **data)
        engine.fit(X, y, epochs=3, **data)
        assert_same_state(member.engine, engine)
        assert member.history.history == engine.history.history
        assert member.engine.privacy_spent() == engine.privacy_spent()
    assert "epsilon" in results.table() and results.best() in results.members


@pytest.mark.parametrize("device", places(INTERPRETER, GPU))
def test_on_a_card_models_train_one_after_another(device):
    with usable(device):
        many = fleet(VARY[:2], backend=device.backend)
        results = many.fit(X[:30], y[:30], epochs=1)
        for index, member in enumerate(results.members):
            engine = alone(index, backend=device.backend)
            engine.fit(X[:30], y[:30], epochs=1)
            assert_same(member.engine.memory.snapshot(), engine.memory.snapshot())
            assert member.history.history == engine.history.history
            assert member.engine.plan != "resident"


def test_seeds_of_the_system_differ():
    engines = fleet([{}, {}], privacy=DPSGD(1.5)).engines
    assert engines[0].ledger.seed != engines[1].ledger.seed


def test_all_models_spend_more_than_each(tmp_path):
    many = fleet()
    with pytest.raises(ArgumentError, match="privacy: it has not trained privately"):
        fleet(privacy=None).fit(X, y, epochs=1).privacy_spent()
    results = many.fit(X, y, epochs=2)
    spent = results.privacy_spent()
    assert spent["steps"] == 10 + 4 + 10 and spent["delta"] == 1e-2
    assert spent["epsilon"] == Accountant(1.5).epsilon([(0.2, 20), (0.5, 4)], 1e-2)
    assert spent["epsilon"] > max(member.engine.privacy_spent()["epsilon"] for member in results.members)
    # a model's checkpoint is that of an engine
    results.engine(1).save_checkpoint(tmp_path / "model.safetensors")
    again = fusemlp.load_checkpoint(tmp_path / "model.safetensors")
    again.fit(X, y, epochs=1)
    assert again.ledger.steps(again.update_count) == [(0.5, 6)]


def test_models_of_a_fleet_in_parts_keep_their_account():
    one = fleet([{}])
    most = 2 * module.engine_bytes(one.engines[0]) + module.kept_bytes(one.candidates * 3, "fp32")
    results, whole = fleet(memory=most).fit(X, y, epochs=2), fleet().fit(X, y, epochs=2)
    assert isinstance(results.members[0].held, Kept)
    assert results.privacy_spent() == whole.privacy_spent()
    engine = results.engine(1)
    assert engine.ledger.steps(engine.update_count) == [(0.5, 4)] and engine.privacy.seed is None
    np.testing.assert_array_equal(engine.state_dict()["0.weight"], whole.engine(1).state_dict()["0.weight"])


def test_choices_by_private_rows_are_refused():
    many, plateau = fleet(), fleet([{}, {"lr": ReduceOnPlateau(0.1)}])
    validated = {"validation_data": (X, y)}
    for call, said in (
        (lambda: many.fit(X, y, epochs=1, early_stopping=1, monitor="loss"), "monitor: 'loss' is of the private rows"),
        (lambda: plateau.fit(X, y, epochs=1), "monitor: 'loss' is of the private rows"),
        (lambda: many.fit(X, y, epochs=1).best(), "metric: 'loss' is of the private rows"),
        (lambda: many.fit(X, y, epochs=1, **validated).best("accuracy"), "metric: 'accuracy' is of the private rows"),
    ):
        with pytest.raises(ArgumentError, match=said):
            call()
    assert repr(many.fit(X, y, epochs=1)) == "FleetResults(3 trained)"
