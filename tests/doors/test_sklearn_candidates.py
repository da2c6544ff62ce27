"""Models of a search that train before their fits: which do, in which launches, and that each is the one fitted alone.

Launches of several models run in Triton's interpreter on a machine without a card.
"""

import signal
import threading
import warnings
import weakref

import numpy as np
import pytest
from devices import GPU, INTERPRETER, marks_of, usable
from sklearn.base import clone
from sklearn.datasets import load_wine
from sklearn.exceptions import FitFailedWarning
from sklearn.feature_selection import SelectFromModel
from sklearn.model_selection import check_cv
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

from fusemlp import Callback, Engine
from fusemlp.fleet.launches import LaunchGroup
from fusemlp.runtime.programs import BoundProgram
from fusemlp.sklearn import FleetSearchCV, MLPClassifier, MLPRegressor
from fusemlp.sklearn.search import Candidates
from fusemlp.sklearn.solvers import SklearnPolicy

X, Y = load_wine(return_X_y=True)
# few steps, since one of a model takes the interpreter a tenth of a second
ROWS = np.random.default_rng(0).permutation(len(X))[:24]
X, Y = ((X - X.mean(axis=0)) / X.std(axis=0))[ROWS].astype(np.float32), Y[ROWS]
MODEL = MLPClassifier(4, batch_size=12, max_iter=2, learning_rate_init=0.02, random_state=0)
# After some dozens of steps of sums of at most 16 products of order one: a thousand roundings of float32.
NEAR = 1000 * 2.0**-24

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@pytest.fixture(params=[pytest.param(one, id=one.name, marks=marks_of(one)) for one in (INTERPRETER, GPU)])
def backend(request, monkeypatch):
    # the interpreter's plan "auto" is not the resident one, which is the slowest there
    monkeypatch.setattr("fusemlp.runtime.session.choose_plan", lambda *_, **__: ("resident", ""))
    with usable(request.param):
        yield request.param.backend


class Launches:
    """The models of each common launch that was bound, and the steps of each launch; ``before`` one it is called."""

    def __init__(self, monkeypatch, before=lambda arrays: None):
        self.sizes = []
        self.steps = []
        bind = LaunchGroup.bind

        def seen(group, programs, data):
            self.sizes.append(len(group.engines))
            run, arrays = bind(group, programs, data), [weakref.ref(array) for array in data.values()]

            def counted(steps):
                before(arrays)
                self.steps.append(list(steps))
                return run(steps)

            return counted

        monkeypatch.setattr(LaunchGroup, "bind", seen)


@pytest.fixture
def launches(monkeypatch):
    return Launches(monkeypatch)


class Taken:
    """The number of fits that were set up and trained before scikit-learn asked for them."""

    def __init__(self, monkeypatch):
        self.taken, finish = 0, Candidates._finish

        def counted(*given, **options):
            self.taken += 1
            return finish(*given, **options)

        monkeypatch.setattr(Candidates, "_finish", counted)


class Kept:
    """A scorer that keeps the fitted models, by what makes them different."""

    def __init__(self):
        self.models = {}

    def __call__(self, model, X, y):
        last = model[-1] if isinstance(model, Pipeline) else model
        options = {
            name: repr(value)
            for name, value in model.get_params().items()
            if isinstance(value, int | float | str | tuple) and not name.endswith(("backend", "memory"))
        }
        key = (float(np.asarray(X).sum()), *sorted(options.items()))
        losses = [*getattr(last, "loss_curve_", []), *(getattr(last, "validation_loss_curve_", None) or [])]
        self.models[key] = (last.coefs_, losses, last.n_iter_)
        return model.score(X, y)


def searched(backend, model, grid, data=(X, Y), **options):
    kept = Kept()
    estimator = model.set_params(**{"mlp__backend" if isinstance(model, Pipeline) else "backend": backend})
    search = FleetSearchCV(estimator, grid, cv=2, scoring=kept, refit=False, **options).fit(*data)
    return search, kept.models


def assert_near(mine, its):
    assert mine.keys() == its.keys() and mine
    for key, (coefs, losses, count) in mine.items():
        assert count == its[key][2], key
        np.testing.assert_allclose(losses, its[key][1], rtol=NEAR)
        for one, other in zip(coefs, its[key][0], strict=True):
            np.testing.assert_allclose(one, other, atol=NEAR)


ALPHAS = {"alpha": [0.0, 0.1]}
# The model, the grid, and the number of fits that take over; the others train when they are asked for.
FITS = {
    "plain": ({}, ALPHAS, 6),
    "a random state": ({"random_state": np.random.RandomState(3)}, ALPHAS, 6),
    "early stopping": ({"early_stopping": True, "validation_fraction": 0.4}, {"hidden_layer_sizes": [3, (4, 3)]}, 6),
    "L-BFGS": ({}, {"solver": ["adam", "lbfgs"]}, 3),
    "callbacks": ({"callbacks": [Callback()]}, ALPHAS, 0),
    "verbose": ({"verbose": True}, ALPHAS, 0),
    "warm start": ({"warm_start": True}, ALPHAS, 0),
    "one that fails": ({"learning_rate_init": np.float32(0.01)}, {"activation": ["nonsense", "tanh"]}, 3),
}


@pytest.mark.parametrize(("changes", "grid", "taken"), FITS.values(), ids=FITS)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.FitFailedWarning", "ignore:One or more of the test scores")
def test_which_fits_take_a_trained_model_over(changes, grid, taken, monkeypatch):
    counted = Taken(monkeypatch)
    model = MLPClassifier(4, batch_size=8, max_iter=2, backend="numpy").set_params(**{"random_state": 0, **changes})
    FleetSearchCV(model, grid, cv=3, n_jobs=2, refit=False).fit(X, Y)
    assert counted.taken == taken
    alone = Taken(monkeypatch)
    FleetSearchCV(model, grid, cv=3, n_jobs=1, refit=False).fit(X, Y)
    assert alone.taken == 0


@pytest.mark.parametrize("taken", [4, 0], ids=["ahead", "when asked for"])
def test_each_fit_is_set_up_once(taken, monkeypatch):
    calls = []
    step = FunctionTransformer(lambda rows: calls.append(len(rows)) or rows)
    pipeline = Pipeline([("step", step), ("mlp", MODEL)])
    counted = Taken(monkeypatch)
    options = {"n_jobs": 2 if taken else 1, "scoring": lambda model, X, y: 1.0, "refit": False}
    FleetSearchCV(pipeline, {"mlp__alpha": [0.0, 0.1]}, cv=2, **options).fit(X, Y)
    assert (len(calls), counted.taken) == (4, taken)


def test_memory_of_forgotten_fits_is_used_again(monkeypatch):
    made, start = [], Engine.__init__
    monkeypatch.setattr(Engine, "__init__", lambda engine, *given, **named: made.append(start(engine, *given, **named)))
    grid = {"alpha": np.linspace(0.0, 0.1, 5), "learning_rate_init": [0.01, 0.02]}
    FleetSearchCV(MODEL.set_params(backend="numpy"), grid, cv=3, n_jobs=2, refit=False).fit(X, Y)
    # four train, and one is scored
    assert len(made) <= 6


def test_a_fit_that_is_kept_goes_on_by_itself():
    kept = []
    model = MODEL.set_params(backend="numpy")
    grid = {"alpha": [0.0, 0.1, 0.2], "learning_rate_init": [0.01, 0.02]}

    def scoring(fitted, *rows):
        kept.append(fitted)
        return 0.0

    search = FleetSearchCV(model, grid, cv=3, n_jobs=2, scoring=scoring, refit=False).fit(X, Y)
    folds = [train for train, _ in check_cv(3, Y, classifier=True).split(X, Y)]
    tries = [(parameters, rows) for parameters in search.cv_results_["params"] for rows in folds]
    for fitted, (parameters, rows) in zip(kept, tries, strict=True):
        alone = clone(model).set_params(**parameters).fit(X[rows], Y[rows])
        for mine, its in zip(fitted.partial_fit(X, Y).coefs_, alone.partial_fit(X, Y).coefs_, strict=True):
            assert np.array_equal(mine, its)


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [
        ([{"alpha": [0.0]}, {"alpha": [0.1], "learning_rate_init": [0.03]}], [4]),
        ({"hidden_layer_sizes": [4, (6, 5)], "alpha": [0.1]}, [2, 2]),
        ({"batch_size": [12, 8], "solver": ["sgd"], "learning_rate": ["invscaling"]}, [2, 2]),
        ({"learning_rate": ["adaptive"], "solver": ["sgd"], "n_iter_no_change": [1], "tol": [0.0, 10.0]}, [4]),
        ({"early_stopping": [True], "validation_fraction": [0.3], "batch_size": [4], "n_iter_no_change": [1, 9]}, [4]),
        # another optimizer has other states; L-BFGS has no launch at all
        ({"solver": ["adam", "sgd", "lbfgs"]}, [2, 2]),
    ],
    ids=["numbers", "widths", "batches", "adaptive", "early stopping", "solvers"],
)
def test_models_of_one_shape_share_launches(backend, grid, sizes, launches):
    _, found = searched(backend, MODEL, grid)
    assert sorted(launches.sizes) == sizes
    assert_near(found, searched("numpy", MODEL, grid)[1])


def test_a_whole_search_is_one_launch(backend, launches):
    """Nothing runs between the epochs: 2 epochs of 2 batches."""
    searched(backend, MODEL, {"alpha": [0.0, 0.1], "batch_size": [8]})
    assert launches.steps == [[4] * 4]


def test_who_has_converged_leaves_the_launch(backend, launches):
    searched(backend, MODEL, {"tol": [1e-4, 10.0], "n_iter_no_change": [1], "max_iter": [5]})
    assert launches.sizes == [4]
    # nothing gets better by 10: two epochs more than the first
    assert [sum(count > 0 for count in steps) for steps in launches.steps] == [4, 4, 2]


def test_a_pipeline_and_regressors(backend, launches):
    model = MLPRegressor(hidden_layer_sizes=5, batch_size=12, max_iter=2, random_state=0)
    pipeline = Pipeline([("scale", StandardScaler()), ("mlp", model)])
    values = np.stack([Y - 1.0, X[:, 0]], axis=1).astype(np.float32)
    grid = {"mlp__alpha": [0.1], "scale__with_std": [True, False]}
    _, found = searched(backend, pipeline, grid, (X, values))
    assert launches.sizes == [4]
    assert_near(found, searched("numpy", pipeline, grid, (X, values))[1])


@pytest.mark.parametrize("n_jobs", [1, 2, None])
def test_as_many_at_once_as_are_asked_for(backend, n_jobs, launches):
    search, _ = searched(backend, MODEL, {"alpha": [0.0, 0.1], "max_iter": [1]}, n_jobs=n_jobs)
    assert launches.sizes == {1: [], 2: [2] * 2, None: [4]}[n_jobs]
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_both_kinds_of_backends_in_one_search(backend, launches, monkeypatch):
    counted = Taken(monkeypatch)
    search = FleetSearchCV(MODEL, {"backend": ["numpy", backend]}, cv=2, refit=False).fit(X, Y)
    assert launches.sizes == [2] and counted.taken == 4
    first, second = search.cv_results_["mean_test_score"]
    assert first == second


def test_a_model_that_cannot_be_fitted_harms_no_other(backend):
    grid = {"learning_rate_init": [0.02, 1e30], "solver": ["sgd"], "activation": ["relu", "nonsense"]}
    with pytest.warns(FitFailedWarning):
        search, _ = searched(backend, MODEL, grid, error_score=-7.0)
    scores = dict(zip(map(repr, search.cv_results_["params"]), search.cv_results_["mean_test_score"], strict=True))
    sound = [score for name, score in scores.items() if "nonsense" not in name and "1e+30" not in name]
    assert len(sound) == 1 and sound[0] >= 0.0
    assert sum(score == -7.0 for score in scores.values()) == 3


def test_a_model_whose_held_out_loss_is_not_finite_has_no_fit(backend, launches):
    # one update, which leaves finite parameters
    stopping = {"early_stopping": True, "validation_fraction": 0.4}
    model = MLPRegressor(hidden_layer_sizes=4, max_iter=1, solver="sgd", random_state=0, **stopping)
    grid = {"learning_rate_init": [0.01, 1e30]}
    with pytest.warns(FitFailedWarning, match="DivergenceError: val_loss: it became NaN or infinite in epoch 1"):
        search, _ = searched(backend, model, grid, (X, Y.astype(np.float32)), error_score=-7.0)
    assert launches.sizes == [4]
    sound, diverged = search.cv_results_["mean_test_score"]
    assert np.isfinite(sound) and diverged == -7.0


def test_a_launch_that_fails_is_the_error_of_its_models(backend, monkeypatch):
    def broken(*_):
        raise MemoryError("no room for the fleet")

    monkeypatch.setattr(LaunchGroup, "bind", broken)
    with pytest.raises(MemoryError, match="no room for the fleet"):
        searched(backend, MODEL, {"alpha": [0.0, 0.1]}, error_score="raise")


def test_ctrl_c_in_a_launch_of_several_models(backend, monkeypatch):
    Launches(monkeypatch, lambda arrays: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        searched(backend, MODEL, ALPHAS)


def test_the_data_outlives_the_launches(backend, monkeypatch):
    """A kernel that has their address reads other data when their memory is given back."""
    alive = []
    Launches(monkeypatch, lambda arrays: alive.extend(array() is not None for array in arrays))
    searched(backend, MODEL, ALPHAS)
    assert alive and all(alive)


@pytest.mark.filterwarnings("ignore:One or more of the test scores")
def test_a_launch_on_a_thread_that_fails_is_the_error_of_its_model(monkeypatch):
    run, count = BoundProgram.run_many, 0

    def broken(bound, steps):
        nonlocal count
        count += 1
        if count == 2:
            raise MemoryError("no room for this one")
        run(bound, steps)

    monkeypatch.setattr(BoundProgram, "run_many", broken)
    search = FleetSearchCV(MODEL.set_params(backend="numpy"), {"alpha": [0.0, 0.1]}, cv=3, n_jobs=2, refit=False)
    with pytest.warns(FitFailedWarning, match="1 fits failed out of a total of 6"):
        search.fit(X, Y)
    assert sum(np.isnan(search.cv_results_[f"split{fold}_test_score"]).sum() for fold in range(3)) == 1


def test_a_warning_of_another_thread_stays_one(monkeypatch):
    raised, set_up = [], MLPClassifier._set_up

    def warn():
        try:
            warnings.warn("of another thread", stacklevel=1)
        except UserWarning as error:
            raised.append(error)

    def beside(model, *data, **options):
        thread = threading.Thread(target=warn)
        thread.start()
        thread.join()
        return set_up(model, *data, **options)

    monkeypatch.setattr(MLPClassifier, "_set_up", beside)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        FleetSearchCV(MODEL, {"alpha": [0.0, 1.0]}, cv=2).fit(X, Y)
    assert not raised


def test_warnings_are_heard_after_searches_in_threads():
    def search():
        FleetSearchCV(MODEL, {"alpha": [0.0, 0.1, 0.2, 1.0]}, cv=3).fit(X, Y)

    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("ignore")
        threads = [threading.Thread(target=search) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        warnings.simplefilter("always")
        warnings.warn("after them", stacklevel=1)
    assert "after them" in [str(warning.message) for warning in heard]


def test_a_step_before_the_model_that_is_a_model(monkeypatch):
    counted = Taken(monkeypatch)
    chooser = SelectFromModel(
        MLPClassifier(4, batch_size=8, max_iter=2, random_state=0, backend="numpy"),
        importance_getter=lambda model: np.abs(model.coefs_[0]).sum(axis=1),
    )
    pipeline = Pipeline([("choose", chooser), ("mlp", MODEL)])
    search, _ = searched("numpy", pipeline, {"mlp__alpha": [0.0, 0.1]}, n_jobs=2)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert counted.taken == 4


@pytest.mark.parametrize("device", [pytest.param(INTERPRETER, id=INTERPRETER.name, marks=marks_of(INTERPRETER))])
@pytest.mark.parametrize("last", [None, 2], ids=["to the end", "cut off in an epoch"])
def test_calls_that_follow_a_loop_have_rows_of_their_own(device, last, monkeypatch):
    """The loop has walked over the rows of whole epochs; the calls of ``partial_fit`` are given those of a batch."""

    class Cut(Callback):
        def on_batch_end(self, engine, batch):
            engine.stop_training = batch + 1 == last

    def fitted(backend):
        model = MLPClassifier(4, batch_size=12, max_iter=2, random_state=0, backend=backend, callbacks=[Cut()])
        model.fit(X, Y)
        assert backend == "numpy" or model._model.engine.plan == "resident"
        return model.set_params(callbacks=None).partial_fit(X, Y)

    expected = fitted("numpy")
    monkeypatch.setattr("fusemlp.runtime.session.choose_plan", lambda *_, **__: ("resident", ""))
    for mine, its in zip(fitted(device.backend).coefs_, expected.coefs_, strict=True):
        np.testing.assert_allclose(mine, its, atol=NEAR)


def test_no_thread_is_left_and_none_computes_in_python(monkeypatch):
    """Epochs, scores and set-ups are the main thread's."""
    before, seen, end = set(threading.enumerate()), set(), SklearnPolicy.end_epoch

    def watched(policy, *given):
        seen.add(threading.current_thread())
        return end(policy, *given)

    monkeypatch.setattr(SklearnPolicy, "end_epoch", watched)
    FleetSearchCV(MODEL.set_params(backend="numpy"), {"alpha": [0.0, 0.1]}, cv=3, n_jobs=3).fit(X, Y)
    assert seen == {threading.main_thread()}
    assert set(threading.enumerate()) <= before
