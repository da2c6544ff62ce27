"""A search warns once for all of its fits that did not converge, with their number; a single fit as scikit-learn."""

import re
import warnings

import pytest
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from fusemlp.sklearn import FleetRandomizedSearchCV, FleetSearchCV, MLPClassifier

X, Y = load_iris(return_X_y=True)
MODEL = MLPClassifier(4, max_iter=4, random_state=0, backend="numpy")
REACHED = r"Stochastic Optimizer: Maximum iterations (4) reached and the optimization hasn't converged yet."
# With a tolerance of 100 a fit has converged after the third epoch.
GRID = {"tol": [1e-4, 100.0], "n_iter_no_change": [1]}


def heard(call):
    """Return the warnings of a call, each with its file."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        call()
    assert all(one.category is ConvergenceWarning for one in told)
    assert {one.filename for one in told} <= {__file__}
    return [str(one.message) for one in told]


def test_a_fit_outside_a_search_warns_as_before():
    assert heard(lambda: clone(MODEL).fit(X, Y)) == [REACHED]
    assert heard(lambda: clone(MODEL).set_params(tol=100.0, n_iter_no_change=1).fit(X, Y)) == []


def test_a_search_counts():
    # two candidates on three folds, one of them never converging, and the best on all rows
    search = FleetSearchCV(MODEL, GRID, cv=3)
    (told,) = heard(lambda: search.fit(X, Y))
    unconverged = 3 + (search.best_params_["tol"] < 1.0)
    assert told == f"{REACHED} {unconverged} of the 7 fits of this FleetSearchCV ended so: raise max_iter."
    assert heard(lambda: search.fit(X, Y)) == [told]
    assert heard(lambda: FleetSearchCV(MODEL, {"tol": [100.0], "n_iter_no_change": [1]}, cv=3).fit(X, Y)) == []
    (told,) = heard(lambda: FleetSearchCV(MODEL, GRID, cv=3, refit=False).fit(X, Y))
    assert "3 of the 6 fits" in told
    randomized = FleetRandomizedSearchCV(MODEL, {"alpha": [0.1, 0.2]}, n_iter=2, cv=3)
    (told,) = heard(lambda: randomized.fit(X, Y))
    assert "7 of the 7 fits of this FleetRandomizedSearchCV" in told


def test_pipelines_and_lbfgs():
    pipeline = make_pipeline(StandardScaler(), MODEL)
    (told,) = heard(lambda: FleetSearchCV(pipeline, {"mlpclassifier__alpha": [0.0, 1.0]}, cv=3).fit(X, Y))
    assert told.endswith("7 of the 7 fits of this FleetSearchCV ended so: raise max_iter.")
    (told,) = heard(lambda: FleetSearchCV(MODEL, {"solver": ["lbfgs"], "max_iter": [2]}, cv=3).fit(X, Y))
    assert told.startswith("lbfgs failed to converge") and "4 of the 4 fits" in told


def test_the_fits_of_scikit_learns_search_warn_as_its_own_do():
    with pytest.warns(ConvergenceWarning, match=re.escape(REACHED)) as told:
        GridSearchCV(MODEL, GRID, cv=3, refit=False).fit(X, Y)
    assert [str(one.message) for one in told] == [REACHED] * 3


def test_a_search_that_failed_leaves_no_count_to_the_next():
    def score(model, X, y):
        calls.append(model)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return 0.0

    calls = []
    search = FleetSearchCV(MODEL, {"alpha": [0.1]}, cv=3, scoring=score)
    with warnings.catch_warnings(), pytest.raises(KeyboardInterrupt):
        warnings.simplefilter("error")
        search.fit(X, Y)
    (told,) = heard(lambda: search.fit(X, Y))
    assert "4 of the 4 fits" in told
    assert heard(lambda: clone(MODEL).fit(X, Y)) == [REACHED]
