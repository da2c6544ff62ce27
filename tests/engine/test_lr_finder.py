"""The sweep of the learning rate: a curve and a suggestion, from a copy of the engine."""

import numpy as np
import pytest
from sklearn.datasets import load_iris

import fusemlp
from fusemlp import MLP, ArgumentError, ShapeError, lr_find
from fusemlp.training.lr_finder import steepest
from make import assert_same_state

X, Y = load_iris(return_X_y=True)
X = (X - X.mean(axis=0)) / X.std(axis=0)


def make(**options):
    return fusemlp.Engine(MLP([4, 16, 3]), **{"seed": 1, **options})


def test_the_engine_stays_as_it_is():
    engine, other = make(), make()
    for one in (engine, other):
        one.fit(X, Y, epochs=1)
    engine.lr_find(X, Y, steps=40)
    assert_same_state(engine, other)
    assert engine.fit(X, Y, epochs=1).history == other.fit(X, Y, epochs=1).history


def test_a_class_with_a_constructor_of_its_own():
    class Iris(fusemlp.Engine):
        def __init__(self, width):
            super().__init__(MLP([4, width, 3]), seed=1)

    assert Iris(16).lr_find(X, Y, steps=40) == make().lr_find(X, Y, steps=40)


def test_curve_and_suggestion():
    found = lr_find(make(), X, Y, steps=100)
    assert np.allclose(np.diff(np.log(found.rates)), np.log(1e7) / 99)
    assert found.rates[0] == pytest.approx(1e-6)
    assert len(found.losses) == len(found.rates)
    assert found.complete == (len(found.rates) == 100)
    # Between the flat part and the blow-up.
    assert found.suggestion in found.rates
    assert 1e-4 < found.suggestion < 1.0
    assert found == make().lr_find(X, Y, steps=100)


def test_the_engines_own_rate_and_schedule_do_not_matter():
    rates = (0.5, fusemlp.Cosine(0.1, warmup=10))
    constant, cosine = (make(optimizer=fusemlp.Adam(rate)).lr_find(X, Y) for rate in rates)
    assert constant == cosine


def test_it_begins_at_the_engines_parameters():
    engine = make(precision="fp64")
    found = engine.lr_find(X, Y, steps=20, start=1e-12, end=1e-11)
    rows = np.random.default_rng(engine.seed).permutation(len(X))[: engine.batch_size]
    assert found.losses[0] == pytest.approx(engine.evaluate(X[rows], Y[rows])["loss"], rel=1e-9)


def test_a_rate_for_each_update_of_several_batches():
    found = make(optimizer=fusemlp.SGD(0.1, accumulate=3)).lr_find(X, Y, steps=30, end=1e-2)
    assert np.allclose(np.diff(np.log(found.rates)), np.log(1e4) / 29)
    assert found.complete


def test_weights_count():
    weights = np.where(Y == 0, 5.0, 0.5)
    assert make().lr_find(X, Y, sample_weight=weights).losses != make().lr_find(X, Y).losses
    # few rows make a smaller batch
    assert make(batch_size=512).lr_find(X, Y, steps=20).rates


def test_the_steepest_place_of_a_curve():
    rates = np.geomspace(1e-5, 1.0, 101)
    losses = 1.0 / (1.0 + np.exp(4.0 * (np.log10(rates) + 2.0)))
    assert steepest(rates.tolist(), losses.tolist()) == pytest.approx(1e-2, rel=1e-9)


def test_the_plot(tmp_path):
    found = make().lr_find(X, Y, steps=50)
    figure = found.plot()
    assert list(figure.axes[0].get_lines()[0].get_xdata()) == list(found.rates)
    assert list(tmp_path.iterdir()) == []
    for name, start in {"a.png": b"\x89PNG", "b.svg": b"<?xml", "c.PDF": b"%PDF"}.items():
        found.plot(tmp_path / name, title="iris")
        assert (tmp_path / name).read_bytes().startswith(start)


REFUSED = {
    "start": ({"start": 0.0}, ArgumentError, "start: expected a finite number above 0"),
    "end": ({"start": 0.1, "end": 0.1}, ArgumentError, "end: expected .* above 0.1"),
    "steps": ({"steps": 5}, ArgumentError, "steps: expected .* at least 20, got 5"),
    "X": ({"X": X[:, :2]}, ShapeError, "X: "),
    "NaN": ({"X": X * np.nan}, fusemlp.DataError, "X: "),
    "y": ({"y": Y[:5]}, ShapeError, "y: "),
    "weights": ({"sample_weight": [1.0]}, ShapeError, "sample_weight: "),
    "too high": ({"start": 1e9, "end": 1e12}, fusemlp.DivergenceError, "blew up after . updates.*begin lower, with st"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_changes_nothing(case):
    options, kind, words = REFUSED[case]
    engine = make(optimizer="sgd")
    with pytest.raises(kind, match=words):
        engine.lr_find(**{"X": X, "y": Y, **options})
    assert_same_state(engine, make(optimizer="sgd"))
    with pytest.raises(fusemlp.ArgumentTypeError, match="engine: expected an Engine, got MLP"):
        lr_find(MLP([4, 3]), X, Y)
