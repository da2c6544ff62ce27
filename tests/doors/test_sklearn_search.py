"""FleetSearchCV and FleetRandomizedSearchCV return scikit-learn's results, to the last bit."""

import pickle

import joblib
import numpy as np
import pytest
import scipy.stats
from searches import assert_same, both
from sklearn import config_context
from sklearn import model_selection as splits
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.exceptions import NotFittedError
from sklearn.metrics import make_scorer, mean_absolute_error
from sklearn.model_selection import GridSearchCV, KFold, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils import shuffle
from threadpoolctl import threadpool_limits

from fusemlp.sklearn import FleetRandomizedSearchCV, FleetSearchCV, MLPClassifier, MLPRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

WINE = shuffle(*load_wine(return_X_y=True), random_state=0)
WINE = ((WINE[0] - WINE[0].mean(axis=0)) / WINE[0].std(axis=0), WINE[1])
DIABETES = load_diabetes(return_X_y=True)
CLASSIFIER = MLPClassifier(6, max_iter=8, batch_size=32, learning_rate_init=0.02, random_state=0)
REGRESSOR = MLPRegressor(hidden_layer_sizes=6, max_iter=6, batch_size=64, learning_rate_init=0.05, random_state=0)
GRID = {"alpha": [1e-4, 0.1], "hidden_layer_sizes": [4, (6, 5)]}


def scaled(model):
    return Pipeline([("scale", StandardScaler()), ("mlp", model)])


@pytest.mark.parametrize("load", [load_digits, load_wine, load_breast_cancer])
def test_all_results_are_scikit_learns(load):
    X, y = load(return_X_y=True)
    model = MLPClassifier(32, max_iter=12, batch_size=32, random_state=0)
    grid = {"mlp__alpha": [1e-4, 1e-1], "mlp__learning_rate_init": [1e-3, 1e-2], "mlp__solver": ["adam", "sgd"]}
    fleet, plain = both(FleetSearchCV, scaled(model), grid, cv=3, return_train_score=True, data=(X[:700], y[:700]))
    assert_same(fleet, plain)
    np.testing.assert_array_equal(fleet.predict_proba(X[-99:]), plain.predict_proba(X[-99:]))


@pytest.mark.parametrize(
    "grid",
    [
        [{"alpha": [0.1]}, {"alpha": [1e-4], "activation": ["tanh", "relu"]}],
        {},
        {"early_stopping": [True, False], "solver": ["adam", "lbfgs"]},
        {"dropout": [0.0, 0.3], "class_weight": [None, "balanced"], "batch_size": [32, 33]},
        {"learning_rate": ["adaptive", "invscaling"], "solver": ["sgd"], "momentum": [0.0, 0.9]},
    ],
    ids=["list", "nothing", "early stopping", "dropout", "rates"],
)
def test_whatever_varies(grid):
    assert_same(*both(FleetSearchCV, CLASSIFIER, grid, cv=3, data=WINE))


GROUPS = np.arange(len(WINE[0])) % 5


@pytest.mark.parametrize(
    "cv",
    [
        *(None, 4, KFold(2)),
        splits.StratifiedKFold(3, shuffle=True, random_state=1),
        splits.ShuffleSplit(2, random_state=0),
        splits.TimeSeriesSplit(2),
        splits.GroupKFold(3),
        splits.LeaveOneGroupOut(),
        [(np.arange(100), np.arange(100, 178)), (np.arange(50, 178), np.arange(50))],
    ],
    ids=str,
)
def test_folds(cv):
    data = (*WINE, {"groups": GROUPS} if isinstance(cv, splits.GroupKFold | splits.LeaveOneGroupOut) else {})
    assert_same(*both(FleetSearchCV, CLASSIFIER, {"alpha": [1e-4, 0.1]}, cv=cv, data=data))


def test_folds_that_are_made_only_once():
    folds = [(train, test) for train, test in KFold(3).split(WINE[0])]
    fleet = FleetSearchCV(CLASSIFIER, GRID, cv=iter(folds)).fit(*WINE)
    plain, _ = both(FleetSearchCV, CLASSIFIER, GRID, cv=folds, data=WINE)
    np.testing.assert_array_equal(fleet.cv_results_["mean_test_score"], plain.cv_results_["mean_test_score"])


def test_a_fold_that_misses_a_class_scores_as_in_scikit_learn():
    X, y = WINE
    rows = np.argsort(y, kind="stable")
    fleet, plain = both(FleetSearchCV, CLASSIFIER, {"alpha": [1e-4, 0.1]}, cv=KFold(3), data=(X[rows], y[rows]))
    assert_same(fleet, plain)
    assert fleet.cv_results_["mean_test_score"].max() < 0.5


def sum_of_weights(estimator, X, y, sample_weight=None):
    """Return a score that distinguishes fitted models to the last bit."""
    model = estimator[-1] if isinstance(estimator, Pipeline) else estimator
    return float(sum((weight * np.arange(weight.size).reshape(weight.shape)).sum() for weight in model.coefs_))


def test_weights_of_rows_go_to_the_fits():
    weight = np.random.default_rng(0).random(len(WINE[0]))
    grid, options = {"alpha": [1e-4, 0.1]}, {"cv": 3, "scoring": sum_of_weights}
    fleet, plain = both(FleetSearchCV, CLASSIFIER, grid, **options, data=(*WINE, {"sample_weight": weight}))
    assert_same(fleet, plain)
    unweighted = FleetSearchCV(CLASSIFIER, grid, **options).fit(*WINE)
    assert (fleet.cv_results_["mean_test_score"] != unweighted.cv_results_["mean_test_score"]).all()
    data = (*WINE, {"mlp__sample_weight": weight})
    assert_same(*both(FleetSearchCV, scaled(CLASSIFIER), {"mlp__alpha": [1e-4]}, **options, data=data))


def test_routed_metadata_arrives():
    weight = np.random.default_rng(0).random(len(WINE[0]))
    with config_context(enable_metadata_routing=True):
        model = clone(CLASSIFIER).set_fit_request(sample_weight=True).set_score_request(sample_weight=True)
        assert_same(*both(FleetSearchCV, model, {"alpha": [1e-4, 0.1]}, data=(*WINE, {"sample_weight": weight})))


def first_candidate(results):
    return int(np.argmin(results["mean_test_score"] if "mean_test_score" in results else results["mean_test_error"]))


@pytest.mark.parametrize(
    "options",
    [
        {"scoring": "neg_mean_absolute_error"},
        {"scoring": make_scorer(mean_absolute_error, greater_is_better=False), "refit": False},
        {"scoring": ["r2", "neg_mean_absolute_error"], "refit": "r2", "return_train_score": True},
        {"scoring": {"error": "neg_max_error", "fit": "r2"}, "refit": False},
        {"scoring": {"error": "neg_mean_squared_error"}, "refit": first_candidate},
        {"scoring": lambda model, X, y: {"bias": float(np.mean(model.predict(X) - y))}, "refit": "bias"},
        {"refit": first_candidate},
    ],
    ids=["a name", "a scorer", "several", "a dict", "a refit function", "a function of several", "its own score"],
)
def test_scores_and_refits(options):
    X, y = DIABETES
    fleet, plain = both(FleetSearchCV, REGRESSOR, {"alpha": [1e-4, 10.0]}, cv=3, data=(X, y), **options)
    assert_same(fleet, plain)
    if not options.get("refit", True):
        assert not hasattr(fleet, "best_estimator_") and not hasattr(fleet, "predict")
        return
    np.testing.assert_array_equal(fleet.predict(X), plain.predict(X))
    # With several scores and none chosen, both searches refuse.
    if "scoring" not in options or not callable(options.get("refit")):
        assert fleet.score(X, y) == plain.score(X, y)


def test_random_candidates_are_scikit_learns():
    space = {"alpha": scipy.stats.loguniform(1e-5, 1.0), "activation": ["relu", "tanh"], "tol": [1e-4]}
    kind, options = FleetRandomizedSearchCV, {"n_iter": 4, "cv": 2}
    assert_same(*both(kind, CLASSIFIER, space, random_state=0, data=WINE, **options))
    searches = [kind(CLASSIFIER, space, random_state=np.random.RandomState(5), **options) for _ in range(2)]
    first, second = (search.fit(*WINE).cv_results_["params"] for search in searches)
    assert first == second


@pytest.mark.parametrize("options", [{"n_jobs": 1}, {"n_jobs": 3, "pre_dispatch": 1}, {"n_jobs": -1}])
def test_how_many_train_at_once_changes_no_bit(options):
    with threadpool_limits(1, user_api="blas"):
        plain = GridSearchCV(CLASSIFIER, GRID, cv=3, scoring=sum_of_weights).fit(*WINE)
        fleet = FleetSearchCV(CLASSIFIER, GRID, cv=3, scoring=sum_of_weights, **options).fit(*WINE)
    assert_same(fleet, plain)


def test_it_is_said_what_is_done(capsys):
    FleetSearchCV(CLASSIFIER, {"alpha": [1e-4, 0.1]}, cv=3, verbose=3).fit(*WINE)
    said = capsys.readouterr().out
    assert "Fitting 3 folds for each of 2 candidates, totalling 6 fits" in said
    assert said.count("] END ") == 6 and said.count("alpha=0.1;, score=") == 3


def test_searches_are_cloned_and_pickled(tmp_path):
    search = FleetSearchCV(scaled(CLASSIFIER), {"mlp__alpha": [1e-4, 0.1]}, cv=2, n_jobs=2)
    with pytest.raises(NotFittedError):
        search.predict(WINE[0])
    twin = clone(search)
    assert twin.get_params()["estimator__mlp__max_iter"] == 8 and twin.n_jobs == 2
    search.fit(*WINE)
    joblib.dump(search, tmp_path / "search.joblib")
    for copy in (pickle.loads(pickle.dumps(search)), joblib.load(tmp_path / "search.joblib")):
        np.testing.assert_array_equal(copy.predict(WINE[0]), search.predict(WINE[0]))
        assert copy.best_params_ == search.best_params_
        assert copy.fit(*WINE).best_score_ == search.best_score_


def test_tables():
    pandas = pytest.importorskip("pandas")
    table = pandas.DataFrame(WINE[0], columns=[f"f{index}" for index in range(WINE[0].shape[1])])
    labels = pandas.Series(np.array(["red", "white", "rosé"])[WINE[1]])
    fleet, plain = both(FleetSearchCV, scaled(CLASSIFIER), {"mlp__alpha": [1e-4, 0.1]}, cv=3, data=(table, labels))
    assert_same(fleet, plain)
    assert list(fleet.feature_names_in_) == list(table.columns) and fleet.n_features_in_ == table.shape[1]


def test_inside_of_a_cross_validation():
    with threadpool_limits(1, user_api="blas"):
        nested, plain = (
            cross_val_score(kind(CLASSIFIER, {"alpha": [1e-4, 0.1]}, cv=2), *WINE, cv=2)
            for kind in (FleetSearchCV, GridSearchCV)
        )
    np.testing.assert_array_equal(nested, plain)
