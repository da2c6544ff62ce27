"""Searches: what is refused, what fails alone or ends early, what is fitted once, and what is left as it was."""

import itertools
import signal
import threading
import warnings
import weakref

import numpy as np
import pandas
import pytest
import sklearn
from scipy.sparse import csr_array, csr_matrix
from searches import assert_same, both
from sklearn import preprocessing
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.datasets import load_wine
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning, FitFailedWarning
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, MaxAbsScaler, StandardScaler
from sklearn.svm import SVC

from fusemlp import ArgumentError, ArgumentTypeError, Callback
from fusemlp.runtime.programs import BoundProgram
from fusemlp.sklearn import FleetRandomizedSearchCV, FleetSearchCV, MLPClassifier, MLPRegressor
from fusemlp.sklearn.search import SharedFits, _at_once

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

X, Y = load_wine(return_X_y=True)
SCALED = (X - X.mean(axis=0)) / X.std(axis=0)
CLASSIFIER = MLPClassifier(6, max_iter=5, batch_size=32, learning_rate_init=0.02, random_state=0)
# so large a step leaves no finite weights
DIVERGES = {"solver": ["sgd"], "momentum": [0.0], "learning_rate_init": [1e-3, 1e300]}


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        # Ctrl-C may come while a thread is started
        thread.join(timeout=30)
        assert not thread.is_alive(), thread


@pytest.mark.parametrize(
    ("estimator", "kind", "advice"),
    [
        (SVC(), FleetSearchCV, r"SVC\(\); for other estimators use sklearn\.model_selection\.GridSearchCV$"),
        (SVC(), FleetRandomizedSearchCV, r"use sklearn\.model_selection\.RandomizedSearchCV$"),
        (Pipeline([("scale", StandardScaler()), ("svc", SVC())]), FleetSearchCV, r"got SVC\(\)"),
        (None, FleetSearchCV, "got None"),
    ],
)
def test_other_estimators_are_refused(estimator, kind, advice):
    with pytest.raises(ArgumentTypeError, match=r"^estimator: expected an MLPClassifier or MLPRegressor .*" + advice):
        kind(estimator, {"alpha": [1.0]}).fit(SCALED, Y)


def test_names_are_text():
    with pytest.raises(ArgumentTypeError, match=r"^param_grid: expected the names of parameters, got 1$"):
        FleetSearchCV(CLASSIFIER, {1: [2]}).fit(X, Y)


@pytest.mark.parametrize(
    ("estimator", "space", "message"),
    [
        (CLASSIFIER, {"alhpa": [1.0]}, r"unknown name 'alhpa'; did you mean 'alpha'\?"),
        (CLASSIFIER, [{"alpha": [1.0]}, {"learning_rate_int": [1.0]}], "did you mean 'learning_rate_init'"),
        (Pipeline([("mlp", CLASSIFIER)]), {"mlp__apha": [1.0]}, r"did you mean 'mlp__alpha'\?"),
        (Pipeline([("mlp", CLASSIFIER)]), {"alpha": [1.0]}, r"did you mean 'mlp__alpha'\?"),
        (CLASSIFIER, {"lr": [1.0]}, "'lr' is called 'learning_rate_init' here, as in scikit-learn"),
        (CLASSIFIER, {"weight_decay": [1.0]}, "'weight_decay' is called 'alpha' here"),
        (Pipeline([("mlp", CLASSIFIER)]), {"mlp__hidden": [1]}, "is called 'mlp__hidden_layer_sizes' here"),
        (Pipeline([("mlp", CLASSIFIER)]), {"mlp__epochs": [1]}, "is called 'mlp__max_iter' here"),
        (CLASSIFIER, [], r"there is nothing to try in \[\]; give values"),
    ],
)
@pytest.mark.parametrize("kind", [FleetSearchCV, FleetRandomizedSearchCV])
def test_spaces_that_cannot_be_searched(kind, estimator, space, message):
    name = "param_grid" if kind is FleetSearchCV else "param_distributions"
    with pytest.raises(ArgumentError, match=f"^{name}: .*{message}"):
        kind(estimator, space).fit(SCALED, Y)


@pytest.mark.parametrize("space", [{"alpha": []}, {"alpha": 1.0}, 5])
def test_what_scikit_learn_refuses_it_refuses_here(space):
    with pytest.raises((ValueError, TypeError)):
        FleetSearchCV(CLASSIFIER, space).fit(SCALED, Y)


@pytest.mark.parametrize("error_score", [np.nan, -7.0])
def test_a_model_that_diverges_is_marked_and_the_others_go_on(error_score):
    with pytest.warns((FitFailedWarning, UserWarning)) as record:
        options = {"cv": 3, "error_score": error_score, "return_train_score": True}
        fleet, plain = both(FleetSearchCV, CLASSIFIER, DIVERGES, data=(SCALED, Y), **options)
    assert_same(fleet, plain)
    failed = [str(one.message) for one in record if issubclass(one.category, FitFailedWarning)]
    assert len(failed) == 2 and all("3 fits failed out of a total of 6" in one for one in failed)
    np.testing.assert_array_equal(fleet.cv_results_["mean_test_score"][1], error_score)
    alone = FleetSearchCV(CLASSIFIER, {name: values[:1] for name, values in DIVERGES.items()}, cv=3).fit(SCALED, Y)
    assert fleet.best_score_ == alone.best_score_


def test_all_that_failed_and_errors_that_shall_be_raised():
    grid = DIVERGES | {"learning_rate_init": [1e300]}
    with pytest.raises(ValueError, match=r"All the 2 fits failed"):
        FleetSearchCV(CLASSIFIER, grid, cv=2).fit(SCALED, Y)
    search = FleetSearchCV(CLASSIFIER, DIVERGES, cv=2, error_score="raise")
    with pytest.raises(ValueError, match="non-finite parameter weights"):
        search.fit(SCALED, Y)
    assert search.estimator is CLASSIFIER and not hasattr(search, "cv_results_")


def test_a_score_that_fails_is_marked():
    def score(model, X, y):
        if model.alpha == 1.0:
            raise RuntimeError("this one has no score")
        return model.score(X, y)

    with pytest.warns(UserWarning, match="Scoring failed|non-finite") as record:
        fleet, plain = both(FleetSearchCV, CLASSIFIER, {"alpha": [0.1, 1.0]}, cv=2, scoring=score, data=(SCALED, Y))
    assert_same(fleet, plain)
    assert np.isnan(fleet.cv_results_["mean_test_score"][1])
    assert sum("Scoring failed" in str(one.message) for one in record) == 4


class Counting(TransformerMixin, BaseEstimator):
    """Multiplies by ``factor`` and counts its fits, all of them."""

    fits = 0
    counting = threading.Lock()

    def __init__(self, factor=1.0):
        self.factor = factor

    def fit(self, X, y=None):
        with Counting.counting:
            Counting.fits += 1
        self.mean_ = X.mean(axis=0)
        return self

    def transform(self, X):
        return (X - self.mean_) * self.factor


def test_what_candidates_have_in_common_is_fitted_once_a_fold():
    pipeline = Pipeline([("scale", StandardScaler()), ("count", Counting()), ("pca", PCA(5)), ("mlp", CLASSIFIER)])
    grid = {"count__factor": [1.0, 2.0], "mlp__alpha": [1e-4, 1e-2, 1.0], "pca__n_components": [3, 5]}
    Counting.fits = 0
    fleet = FleetSearchCV(pipeline, grid, cv=3).fit(X, Y)
    # two factors on three folds, and the refit
    assert Counting.fits == 2 * 3 + 1
    again, plain = both(FleetSearchCV, pipeline, grid, cv=3, data=(X, Y))
    assert_same(again, plain)
    assert_same(fleet, plain)
    assert pipeline.memory is None and fleet.estimator is pipeline and fleet.best_estimator_.memory is None


def test_steps_that_cannot_be_compared_are_fitted_each_time():
    pipeline = Pipeline([("double", FunctionTransformer(lambda rows: 2.0 * rows)), ("mlp", CLASSIFIER)])
    assert_same(*both(FleetSearchCV, pipeline, {"mlp__alpha": [1e-4, 1.0]}, cv=2, data=(SCALED, Y)))


def test_steps_may_be_replaced_and_have_other_parameters():
    pipeline = Pipeline([("scale", StandardScaler()), ("mlp", CLASSIFIER)])
    grid = [
        {"scale": [preprocessing.MinMaxScaler()], "scale__clip": [True, False]},
        {"scale": ["passthrough"], "mlp": [CLASSIFIER, MLPClassifier(3, max_iter=4, random_state=1), SVC()]},
    ]
    assert_same(*both(FleetSearchCV, pipeline, grid, cv=2, data=(SCALED, Y)))


def test_a_memory_of_the_users_stays(tmp_path):
    pipeline = Pipeline([("scale", StandardScaler()), ("mlp", CLASSIFIER)], memory=str(tmp_path))
    search = FleetSearchCV(pipeline, {"mlp__alpha": [1e-4, 1.0]}, cv=2).fit(X, Y)
    assert search.best_estimator_.memory == str(tmp_path) and any(tmp_path.iterdir())


def test_a_transformer_that_fails_is_marked_and_the_others_go_on():
    pipeline = Pipeline([("pca", PCA()), ("mlp", CLASSIFIER)])
    grid = {"pca__n_components": [3, 99], "mlp__alpha": [1e-4, 1.0]}
    with pytest.warns((FitFailedWarning, UserWarning), match=r"4 fits failed|non-finite"):
        fleet, plain = both(FleetSearchCV, pipeline, grid, cv=2, data=(SCALED, Y))
    assert_same(fleet, plain)


def test_shared_fits_keep_no_more_than_they_may(monkeypatch):
    monkeypatch.setattr("fusemlp.sklearn.search.LIMIT", 2 * 800)
    calls = []

    def transform(rows, *, label, caller=None):
        calls.append(label)
        return rows * 2.0, label

    cached, rows = SharedFits().cache(transform, ignore=["caller"]), np.ones(100)
    for label in (0, 1, 2, 0, 3, 0, 3):
        # what is ignored makes no difference, not even if it cannot be pickled
        np.testing.assert_array_equal(cached(rows, label=label, caller=threading.Lock())[0], rows * 2.0)
    # three results were too many when 3 came
    assert calls == [0, 1, 2, 3, 0]


def test_filters_of_warnings_are_what_they_were():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        before, content = warnings.filters, list(warnings.filters)
        FleetSearchCV(CLASSIFIER, {"alpha": [0.1, 0.2, 0.3, 0.4]}, cv=5, n_jobs=4).fit(SCALED, Y)
        assert warnings.filters is before and warnings.filters == content


def test_the_configuration_holds_in_every_fit():
    seen = []

    def score(model, X, y):
        seen.append(sklearn.get_config()["working_memory"])
        return 0.0

    with sklearn.config_context(working_memory=77):
        FleetSearchCV(CLASSIFIER, {"alpha": [0.1, 0.2]}, cv=2, scoring=score, n_jobs=2).fit(SCALED, Y)
    assert seen == [77] * 4


def test_targets_that_no_fold_can_be_trained_on_are_marked():
    """A fold of one class alone is scikit-learn's to judge; negative counts under a Poisson loss are refused."""
    y = np.where(np.arange(len(Y)) < 60, -1.0, 1.0)
    model = MLPRegressor("poisson", 4, max_iter=3, random_state=0)
    folds = [(np.arange(60, 178), np.arange(60)), (np.arange(60), np.arange(60, 178))]
    with pytest.warns((FitFailedWarning, UserWarning), match=r"1 fits failed|non-finite"):
        fleet, plain = both(FleetSearchCV, model, {"loss": ["poisson", "huber"]}, cv=folds, data=(SCALED, y))
    assert_same(fleet, plain)
    assert np.isnan(fleet.cv_results_["split1_test_score"]).tolist() == [True, False]


def test_an_error_that_is_raised_ends_the_other_fits_too():
    """The second candidate would train for hours."""
    rows = np.tile(SCALED, (20, 1))
    grid = [{"learning_rate_init": [1e300]}, {"max_iter": [10**6]}]
    model = MLPClassifier(8, solver="sgd", momentum=0.0, batch_size=32, n_iter_no_change=np.inf, random_state=0)
    before = set(threading.enumerate())
    with pytest.raises(ValueError, match="non-finite parameter weights"):
        FleetSearchCV(model.set_params(max_iter=3), grid, cv=2, n_jobs=4, error_score="raise").fit(rows, np.tile(Y, 20))
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=60)
        assert not thread.is_alive()


def doubled(rows):
    return np.multiply(rows, 2.0, out=rows)


def doubled_numbers(rows):
    rows.data *= 2.0
    return rows


# Steps of which the last ones change rows in place.
STEPS = {
    "scaler": (StandardScaler(), MaxAbsScaler(copy=False)),
    "power": (StandardScaler(), preprocessing.PowerTransformer(copy=False)),
    "function": (StandardScaler(), preprocessing.Normalizer(copy=False), FunctionTransformer(doubled)),
    "identity": (StandardScaler(copy=False), FunctionTransformer(), MaxAbsScaler(copy=False)),
    "sparse": (FunctionTransformer(csr_matrix), MaxAbsScaler(copy=False), FunctionTransformer(doubled_numbers)),
}


@pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)
def test_a_step_that_changes_rows_in_place_is_fitted_once_and_changes_no_result(steps):
    # the scores of the training rows are asked for, since a step that works in place changes those too
    options = {"cv": 2, "scoring": "neg_log_loss", "return_train_score": True}
    pipeline = Pipeline([*((f"step{index}", step) for index, step in enumerate(steps)), ("mlp", CLASSIFIER)])
    fleet, plain = both(FleetSearchCV, pipeline, {"mlp__alpha": [0.0, 1e-3, 1e-2, 0.1]}, data=(X, Y), **options)
    for split in range(2):
        mine, its = (search.cv_results_[f"split{split}_test_score"] for search in (fleet, plain))
        # float64 sums may be taken in another order where memory lies otherwise; a step applied twice changes 1e-3
        np.testing.assert_allclose(mine, its, rtol=1e-10)


@pytest.mark.parametrize("launch", [1, 3])
def test_ctrl_c_while_models_train(launch, monkeypatch):
    # launches run on several threads, and each takes a number of its own
    run, launches = BoundProgram.run_many, itertools.count(1)

    def pressed(bound, steps):
        if next(launches) == launch:
            signal.raise_signal(signal.SIGINT)
        run(bound, steps)

    monkeypatch.setattr(BoundProgram, "run_many", pressed)
    endless = MLPClassifier(4, batch_size=16, max_iter=10**7, n_iter_no_change=10**7, random_state=0)
    search = FleetSearchCV(endless, {"alpha": [0.0, 0.1]}, cv=3, n_jobs=6, error_score="raise")
    with pytest.raises(KeyboardInterrupt):
        search.fit(SCALED, Y)
    assert search.estimator is endless and not hasattr(search, "cv_results_")


def test_how_many_models_there_is_memory_for(monkeypatch):
    """Sparse rows are dense in a launch, and a table has no ``nbytes``."""
    dense = np.zeros((100, 50))
    monkeypatch.setattr("fusemlp.sklearn.search.available_memory", lambda: 4 * 10 * dense.nbytes)
    for same in (dense, csr_matrix(dense), csr_array(dense), pandas.DataFrame(dense)):
        assert _at_once(same) == 10
    assert _at_once(dense.astype(np.float32)) == 20
    assert _at_once(np.zeros((10**4, 50))) == 2
    assert _at_once(dense[:1]) == _at_once([[0.0], [1.0, 2.0]]) == 256


def test_a_fitted_search_holds_no_rows():
    rows = SCALED.copy()
    search = FleetSearchCV(CLASSIFIER, {"alpha": [0.0, 0.1]}, cv=3, n_jobs=6).fit(rows, Y)
    gone = weakref.ref(rows)
    del rows
    assert gone() is None and np.isfinite(search.best_score_)


class Probe(Callback):
    """Trains a model of its own after every epoch, and one that is in no loop."""

    def __init__(self):
        self.scores = []

    def on_epoch_end(self, engine, epoch, logs):
        for solver in ("adam", "lbfgs"):
            model = MLPClassifier(3, batch_size=16, max_iter=2, solver=solver, random_state=0)
            self.scores.append(model.fit(SCALED, Y).score(SCALED, Y))


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "rows that do not count"])
def test_a_callback_trains_a_model(weighted):
    weight = (np.arange(len(Y)) % 4 > 0).astype(float) if weighted else None
    model = MLPClassifier(4, batch_size=16, max_iter=2, random_state=0, callbacks=[Probe()])
    search = FleetSearchCV(model, {"alpha": [0.0, 0.1]}, cv=3).fit(SCALED, Y, sample_weight=weight)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()
    # the estimators of the candidates are clones, and so are their callbacks
    assert len(search.best_estimator_.callbacks[0].scores) == 4
