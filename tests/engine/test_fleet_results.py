"""The results of a fleet: printed text, and errors for wrong requests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fusemlp import MLP, SGD, ArgumentError, ArgumentTypeError, Fleet
from fusemlp.fleet.results import FleetResults, Member
from fusemlp.training.history import History

random = np.random.default_rng(2)
X = random.standard_normal((40, 4))
y = np.arange(40) % 3


@pytest.fixture(scope="module")
def results() -> FleetResults:
    fleet = Fleet(MLP([4, 5, 3]), optimizer=SGD(0.1), vary={"lr": [0.1, 1e30], "seed": range(2)}, backend="numpy")
    return fleet.fit(X, y, epochs=3)


def test_a_model_and_the_results_are_short_in_print(results: FleetResults) -> None:
    best = results.best()
    loss, accuracy = (f"{best.scores[name]:.5g}" for name in ("loss", "accuracy"))
    said = f"Member({best.index}: {best.parameters}, trained, epochs=3, loss={loss}, accuracy={accuracy})"
    assert repr(best) == said
    assert repr(results) == f"FleetResults(2 diverged, 2 trained; best: {said})"
    failed = results.members[3]
    assert repr(failed) == "Member(3: {'lr': 1e+30, 'seed': 1}, diverged, epochs=0)"
    assert repr(FleetResults((failed,))) == "FleetResults(1 diverged)"


def member(index: int, lr: float, seed: int, loss: float) -> Member:
    status, scores = ("diverged", {}) if math.isnan(loss) else ("trained", {"loss": loss})
    return Member(index, {"lr": lr, "seed": seed}, None, History(), status, "", scores)  # type: ignore[arg-type]


def test_a_lucky_seed_does_not_decide() -> None:
    # 0.1 has the best model of all, 0.2 the better mean, and one of 0.3 diverged
    losses = [[0.1, 0.9, 0.8], [0.5, 0.4, 0.45], [0.2, 0.2, math.nan]]
    members = [
        member(3 * row + seed, lr, seed, losses[row][seed])
        for row, lr in enumerate((0.1, 0.2, 0.3))
        for seed in range(3)
    ]
    results = FleetResults(tuple(members))
    assert results.ranked()[0].index == 0
    assert results.best().index == 4
    first = results.combinations()[0]
    assert first.parameters == {"lr": 0.2} and [one.index for one in first.members] == [4, 5, 3]
    assert first.mean("loss") == pytest.approx(0.45, rel=1e-15)
    assert [line.split() for line in results.table(means=True).splitlines()] == [
        ["model", "lr", "loss", "spread", "seeds", "epochs", "status"],
        ["4", "0.2", "0.45", "0.05", "3", "0", "trained"],
        ["0", "0.1", "0.6", "0.43589", "3", "0", "trained"],
        ["6", "0.3", "0.2", "0", "2", "0", "1", "diverged"],
    ]
    # Seeds alone are models of an ensemble: each has its row.
    alone = FleetResults(tuple(replace(one, parameters={"seed": one.index}) for one in members))
    assert alone.best().index == 0
    assert alone.table(means=True) == alone.table()


def test_a_table_of_models_with_different_parameters() -> None:
    fleet = Fleet(MLP([4, 5, 3]), vary=[{"lr": 0.1}, {"seed": 3}, {}], backend="numpy")
    lines = fleet.fit(X, y, epochs=1).table().splitlines()
    assert lines[0].split() == ["model", "lr", "seed", "loss", "accuracy", "epochs", "status"]
    assert sorted(" ".join(line.split()[:3]) for line in lines[1:]) == ["0 0.1 -", "1 - 3", "2 - -"]


@pytest.mark.parametrize(
    ("ask", "error", "message"),
    [
        (lambda results: results.table(limit=-1), ArgumentError, "^limit: expected a whole number of at least 0"),
        (lambda results: results.engine("0"), ArgumentTypeError, "^index: expected the number of a model, got '0'"),
        (lambda results: results.engine(1.0), ArgumentTypeError, "^index: expected the number of a model, got 1.0"),
        (lambda results: results.engine(True), ArgumentTypeError, "^index: expected the number of a model, got True"),
    ],
)
def test_a_wrong_question(
    results: FleetResults, ask: Callable[[FleetResults], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ask(results)
    assert results.engine(np.int64(-1)) is results.engine(3)


def test_a_training_that_was_cut_off_leaves_no_results_of_an_earlier_one() -> None:
    fleet = Fleet(MLP([4, 5, 3]), vary={"seed": range(2)}, backend="numpy")
    fleet.fit(X, y, epochs=1)
    with pytest.raises(ArgumentError, match=r"^epochs:"):
        fleet.fit(X, y, epochs=0)
    # nothing has changed
    assert fleet.results is not None

    def stop(member: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fleet.fit(X, y, epochs=1, callback=stop)
    assert fleet.results is None
    with pytest.raises(ArgumentError, match=r"^predict: the models are not trained, or not to the end"):
        fleet.predict(X)
