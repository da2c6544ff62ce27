"""The results of a fleet: printed text, and errors for wrong requests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fusemlp import MLP, SGD, ArgumentError, ArgumentTypeError, Fleet
from fusemlp.fleet.results import FleetResults

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
