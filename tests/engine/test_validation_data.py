"""Validation rows that a fit binds once give the same scores as ``evaluate``."""

import gc
import weakref

import numpy as np
import pytest

from fusemlp import MLP, Engine, Fleet
from fusemlp.runtime import forward as forward_module
from fusemlp.training import validation as module

RNG = np.random.default_rng(9)
X = RNG.standard_normal((90, 5)).astype(np.float32)
WEIGHTS = RNG.uniform(0.1, 1.0, 90).astype(np.float32)
TARGETS = {
    "cross_entropy": RNG.integers(0, 3, 90),
    "binary_cross_entropy": RNG.integers(0, 2, (90, 3)),
    "mse": RNG.standard_normal((90, 3)),
    "poisson": RNG.poisson(2.0, (90, 3)),
}
LABELS = TARGETS["cross_entropy"]
TRAINED, HELD_OUT = np.arange(50), np.arange(50, 90)


def make(loss="cross_entropy", seed=3, hidden=8):
    return Engine(MLP([5, hidden, 3], activation="tanh"), loss, batch_size=10, seed=seed, backend="numpy")


class Asking:
    """A callback that scores the held-out rows after each epoch, with other rows before and after."""

    def __init__(self, target, weight):
        self.target, self.weight, self.said = target, weight, []

    def on_epoch_end(self, engine, epoch, logs):
        engine.evaluate(X[:20], self.target[:20])
        said = engine.evaluate(X[HELD_OUT], self.target[HELD_OUT], self.weight)
        self.said.append({f"val_{name}": value for name, value in said.items()})
        engine.predict(X[3:70])


@pytest.fixture(params=["one batch", "several batches"])
def batches(request, monkeypatch):
    if request.param == "several batches":
        # a forward pass takes 16 rows at a time
        monkeypatch.setattr(forward_module, "LARGEST", 1)


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", TARGETS)
def test_a_fit_says_what_evaluate_says(loss, weighted):
    target, weight = TARGETS[loss], WEIGHTS[HELD_OUT] if weighted else None
    asking, held_out = Asking(target, weight), (X[HELD_OUT], target[HELD_OUT], weight)
    history = make(loss).fit(X[TRAINED], target[TRAINED], epochs=3, validation_data=held_out, callbacks=[asking])
    for epoch, said in enumerate(asking.said):
        assert said == {name: history.history[name][epoch] for name in said}


@pytest.fixture
def made(monkeypatch):
    """Record the evaluations."""
    found = []
    begin = forward_module.Evaluation.__init__

    def counted(self, *arguments, **options):
        found.append(arguments[0].net)
        begin(self, *arguments, **options)

    monkeypatch.setattr(forward_module.Evaluation, "__init__", counted)
    return found


FIT = {"epochs": 4, "early_stopping": 2}


def assert_as_alone(member, rows):
    """Assert that a model validated on these rows has the history of an engine trained alone."""
    engine = make(seed=member.parameters["seed"], hidden=member.parameters["hidden"])
    history = engine.fit(X[TRAINED], LABELS[TRAINED], validation_data=(X[rows], LABELS[rows]), **FIT)
    assert (member.history.history, member.history.best_epoch) == (history.history, history.best_epoch)


def fleet(seeds, hidden):
    vary = {"hidden": hidden, "seed": seeds}
    return Fleet(MLP([5, 8, 3], activation="tanh"), vary=vary, batch_size=10, backend="numpy")


@pytest.mark.usefixtures("batches")
@pytest.mark.parametrize("kinds", [1, 8])
def test_a_fleet_has_them_in_common(made, monkeypatch, kinds):
    monkeypatch.setattr(module, "KINDS", kinds)
    held_out = (X[HELD_OUT], LABELS[HELD_OUT])
    results = fleet([0, 1, 2], [8, 4]).fit(X[TRAINED], LABELS[TRAINED], validation_data=held_out, jobs=1, **FIT)
    # models of another kind than the first find room for one in common, or have one each
    assert len(made) == (2 if kinds == 8 else 4)
    for member in results.members:
        assert_as_alone(member, HELD_OUT)


def test_models_with_a_fold_in_common(made):
    folds = [np.arange(50, 70), np.arange(60, 90)] * 2
    results = fleet([0, 1, 2, 3], [8]).fit(X, LABELS, rows=[TRAINED] * 4, validation_rows=folds, jobs=1, **FIT)
    assert len(made) == 2
    for member, rows in zip(results.members, folds, strict=True):
        assert_as_alone(member, rows)


def test_what_is_in_common_holds_on_to_no_engine():
    first, second = make(seed=0), make(seed=1)
    evaluate = first.inference.evaluation(first.inputs.examples(X, LABELS, None), apart=True)
    assert evaluate(first.memory) == first.evaluate(X, LABELS)
    assert evaluate(second.memory) == second.evaluate(X, LABELS)
    memory = weakref.ref(first.memory)
    del first
    gc.collect()
    assert memory() is None
