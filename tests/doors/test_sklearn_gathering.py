"""Searches in which one launch trains many models: it holds all candidates and folds of a shape, and each model equals
the one that is fitted alone.

On a machine without a card the kernels run as C++ on the host, or in Triton's interpreter.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator

import numpy as np
import pytest
from devices import CUPY_GPU, GPU, INTERPRETER, STAND_IN, UNCOMPILED, marks_of, usable
from sklearn.datasets import load_wine
from sklearn.exceptions import ConvergenceWarning, FitFailedWarning
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from fusemlp import Callback
from fusemlp.sklearn import FleetSearchCV, MLPClassifier, MLPRegressor

X, Y = load_wine(return_X_y=True)
ROWS = np.random.default_rng(0).permutation(len(X))[:60]
X, Y = ((X - X.mean(axis=0)) / X.std(axis=0))[ROWS].astype(np.float32), Y[ROWS]
MODEL = MLPClassifier(5, batch_size=16, max_iter=4, learning_rate_init=0.02, random_state=0)
# After some dozens of steps of sums of at most 16 products of order one: a thousand roundings of float32.
NEAR = 1000 * 2.0**-24

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(
    params=[pytest.param(one, id=one.name, marks=marks_of(one)) for one in (UNCOMPILED, STAND_IN, CUPY_GPU, GPU)]
)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with usable(request.param):
        yield request.param.backend


class Launches:
    """Record the models of each bound common launch, and the steps of each launch."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import fusemlp.fleet.launches

        self.sizes: list[int] = []
        self.steps: list[list[int]] = []
        bind = fusemlp.fleet.launches.bind_fleet

        def seen(group, *rest):
            self.sizes.append(len(group.engines))
            run = bind(group, *rest)

            def counted(steps):
                self.steps.append(list(steps))
                return run(steps)

            return counted

        monkeypatch.setattr("fusemlp.sklearn.gathering.bind_fleet", seen)


class Kept:
    """A scorer that keeps the fitted models by their parameters."""

    def __init__(self) -> None:
        self.models: dict[tuple, object] = {}

    def __call__(self, model, X, y):
        last = model[-1] if isinstance(model, Pipeline) else model
        plain = (int, float, str, tuple, type(None))
        options = {
            name: repr(value)
            for name, value in model.get_params().items()
            if isinstance(value, plain) and not name.endswith(("backend", "memory"))
        }
        key = (float(np.asarray(X).sum()), *sorted(options.items()))
        self.models[key] = (last.coefs_, getattr(last, "loss_curve_", []), last.n_iter_)
        return model.score(X, y)


def searched(backend: str, model, grid, data=(X, Y), **options):
    kept = Kept()
    estimator = model.set_params(**{"mlp__backend" if isinstance(model, Pipeline) else "backend": backend})
    search = FleetSearchCV(estimator, grid, cv=3, scoring=kept, refit=False, **options).fit(*data)
    return search, kept.models


def assert_near(mine, its) -> None:
    assert mine.keys() == its.keys() and mine
    for key, (coefs, losses, count) in mine.items():
        assert count == its[key][2], key
        np.testing.assert_allclose(losses, its[key][1], rtol=NEAR)
        for one, other in zip(coefs, its[key][0], strict=True):
            np.testing.assert_allclose(one, other, atol=NEAR)


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [
        ({"alpha": [0.0, 0.1], "learning_rate_init": [0.01, 0.03]}, [12]),
        ({"hidden_layer_sizes": [4, (6, 5)], "alpha": [0.1]}, [3, 3]),
        ({"batch_size": [16, 20], "solver": ["sgd"], "learning_rate": ["invscaling"]}, [3, 3]),
        ({"learning_rate": ["adaptive"], "solver": ["sgd"], "n_iter_no_change": [1], "tol": [0.0, 10.0]}, [6]),
        ({"early_stopping": [True], "n_iter_no_change": [1, 9]}, [6]),
        # Another optimizer has other states; L-BFGS has no launch.
        ({"solver": ["adam", "sgd", "lbfgs"]}, [3, 3]),
    ],
    ids=["numbers", "widths", "batches", "adaptive", "early stopping", "solvers"],
)
def test_models_of_one_shape_share_launches(backend, grid, sizes, monkeypatch):
    launches = Launches(monkeypatch)
    _, found = searched(backend, MODEL, grid)
    assert sorted(launches.sizes) == sizes
    monkeypatch.undo()
    assert_near(found, searched("numpy", MODEL, grid)[1])


def test_a_whole_search_is_one_launch(backend, monkeypatch):
    """No code runs between the epochs: 4 epochs of 3 batches."""
    launches = Launches(monkeypatch)
    searched(backend, MODEL, {"alpha": [0.0, 0.1]})
    assert launches.steps == [[12] * 6]


@pytest.mark.parametrize("device", [pytest.param(INTERPRETER, id=INTERPRETER.name, marks=marks_of(INTERPRETER))])
def test_triton_interpreted(device, monkeypatch):
    """Its plan "auto" is not the resident one, which is the slowest there."""
    monkeypatch.setattr("fusemlp.sklearn.model.choose_plan", lambda *_, **__: ("resident", ""))
    launches = Launches(monkeypatch)
    model, grid = MLPClassifier(4, batch_size=20, max_iter=2, random_state=0), {"alpha": [0.0, 1.0]}
    _, found = searched(device.backend, model, grid, (X[:30], Y[:30]))
    assert launches.steps == [[2] * 6]
    monkeypatch.undo()
    assert_near(found, searched("numpy", model, grid, (X[:30], Y[:30]))[1])


@pytest.mark.parametrize("device", [pytest.param(INTERPRETER, id=INTERPRETER.name, marks=marks_of(INTERPRETER))])
@pytest.mark.parametrize("last", [None, 2], ids=["to the end", "cut off in an epoch"])
def test_calls_that_follow_a_loop_have_rows_of_their_own(device, last, monkeypatch):
    """The loop has walked over the rows of whole epochs; the calls of ``partial_fit`` are given those of a batch."""

    class Cut(Callback):
        def on_batch_end(self, engine, batch):
            engine.stop_training = batch + 1 == last

    def fitted(backend):
        model = MLPClassifier(4, batch_size=16, max_iter=2, random_state=0, backend=backend, callbacks=[Cut()])
        model.fit(X[:40], Y[:40])
        assert backend == "numpy" or model._model.engine.plan == "resident"
        return model.set_params(callbacks=None).partial_fit(X[:40], Y[:40])

    expected = fitted("numpy")
    monkeypatch.setattr("fusemlp.runtime.session.choose_plan", lambda *_, **__: ("resident", ""))
    for mine, its in zip(fitted(device.backend).coefs_, expected.coefs_, strict=True):
        np.testing.assert_allclose(mine, its, atol=NEAR)


def test_who_has_converged_leaves_the_launch(backend, monkeypatch):
    launches = Launches(monkeypatch)
    searched(backend, MODEL, {"tol": [1e-4, 10.0], "n_iter_no_change": [1], "max_iter": [6]})
    assert launches.sizes == [6]
    # nothing gets better by 10: two epochs more than the first
    assert [sum(count > 0 for count in steps) for steps in launches.steps][-1] == 3


def test_a_pipeline_and_regressors_and_weights(backend, monkeypatch):
    launches = Launches(monkeypatch)
    pipeline = Pipeline(
        [
            ("scale", StandardScaler()),
            ("mlp", MLPRegressor(hidden_layer_sizes=5, batch_size=16, max_iter=3, random_state=0)),
        ]
    )
    values = np.stack([Y - 1.0, X[:, 0]], axis=1).astype(np.float32)
    grid = {"mlp__alpha": [0.1, 1.0], "scale__with_std": [True, False]}
    _, found = searched(backend, pipeline, grid, (X, values))
    assert launches.sizes == [12]
    monkeypatch.undo()
    assert_near(found, searched("numpy", pipeline, grid, (X, values))[1])


@pytest.mark.parametrize("n_jobs", [1, 2, None])
def test_as_many_at_once_as_are_asked_for(backend, n_jobs, monkeypatch):
    launches = Launches(monkeypatch)
    search = FleetSearchCV(MODEL.set_params(backend=backend), {"alpha": [0.0, 0.1]}, cv=3, n_jobs=n_jobs).fit(X, Y)
    assert max(launches.sizes, default=1) == {1: 1, 2: 2, None: 6}[n_jobs]
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_a_model_that_cannot_be_fitted_harms_no_other(backend):
    grid = {"learning_rate_init": [0.02, 1e30], "solver": ["sgd"], "activation": ["relu", "nonsense"]}
    with pytest.warns(FitFailedWarning):
        search, _ = searched(backend, MODEL, grid, error_score=-7.0)
    scores = dict(zip(map(repr, search.cv_results_["params"]), search.cv_results_["mean_test_score"], strict=True))
    sound = [score for name, score in scores.items() if "nonsense" not in name and "1e+30" not in name]
    assert len(sound) == 1 and sound[0] >= 0.0
    assert sum(score == -7.0 for score in scores.values()) == 3


def test_an_error_that_is_raised_ends_all_threads(backend, monkeypatch):
    # the launches of a card's length take long on what stands in for one
    monkeypatch.setattr("fusemlp.sklearn.gathering.fleet_chunk", lambda *_: 20)
    before = set(threading.enumerate())
    grid = {"activation": ["relu", "nonsense"], "max_iter": [10**5]}
    with pytest.raises(ValueError, match="nonsense"):
        searched(backend, MODEL, grid, error_score="raise")
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)
        assert not thread.is_alive()


def test_a_launch_that_fails_is_the_error_of_its_models(backend, monkeypatch):
    def broken(*_):
        raise MemoryError("no room for the fleet")

    monkeypatch.setattr("fusemlp.sklearn.gathering.bind_fleet", broken)
    with pytest.raises(MemoryError, match="no room for the fleet"):
        searched(backend, MODEL, {"alpha": [0.0, 0.1]}, error_score="raise")


def test_a_step_before_the_model_that_is_a_model(backend, monkeypatch):
    """A shared step is trained in a launch of its own, while those that wait for it let it."""
    from sklearn.feature_selection import SelectFromModel

    launches = Launches(monkeypatch)
    chooser = SelectFromModel(
        MLPClassifier(4, batch_size=16, max_iter=2, random_state=0, backend=backend),
        importance_getter=lambda model: np.abs(model.coefs_[0]).sum(axis=1),
    )
    pipeline = Pipeline([("choose", chooser), ("mlp", MODEL)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        search, _ = searched(backend, pipeline, {"mlp__alpha": [0.0, 0.1]})
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert max(launches.sizes) > 1
