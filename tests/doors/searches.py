"""Run the same search with scikit-learn and with fusemlp, and compare the results."""

import numpy as np
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
from threadpoolctl import threadpool_limits

from fusemlp.sklearn import FleetRandomizedSearchCV, FleetSearchCV

PLAIN = {FleetSearchCV: GridSearchCV, FleetRandomizedSearchCV: RandomizedSearchCV}
TIMES = ("mean_fit_time", "std_fit_time", "mean_score_time", "std_score_time", "refit_time_")


def both(kind, *arguments, data, **options):
    """Return both searches, fleet and plain, fitted to ``data``: X, y and parameters of fit. BLAS has one thread."""
    *arrays, more = data if isinstance(data[-1], dict) else (*data, {})
    with threadpool_limits(1, user_api="blas"):
        plain = PLAIN[kind](*arguments, **options).fit(*arrays, **more)
        fleet = kind(*arguments, **options).fit(*arrays, **more)
    return fleet, plain


def assert_same_column(name, mine, its):
    assert type(mine) is type(its), name
    if isinstance(mine, np.ndarray):
        assert mine.dtype == its.dtype and mine.shape == its.shape, name
        np.testing.assert_array_equal(np.ma.getmaskarray(mine), np.ma.getmaskarray(its), err_msg=name)
    if name in TIMES:
        assert (mine >= 0.0).all(), name
    elif isinstance(mine, np.ma.MaskedArray):
        assert mine.compressed().tolist() == its.compressed().tolist(), name
    elif isinstance(mine, np.ndarray):
        # A model has the same bits in both, so its score is the same too.
        np.testing.assert_array_equal(mine, its, err_msg=name)
    else:
        assert mine == its, name


def assert_same(fleet, plain):
    """Compare all of cv_results_ and the fitted attributes, except the times."""
    assert list(fleet.cv_results_) == list(plain.cv_results_)
    for name, mine in fleet.cv_results_.items():
        assert_same_column(name, mine, plain.cv_results_[name])
    fitted = [name for name in vars(plain) if name.endswith("_") and not name.startswith("_")]
    assert sorted(fitted) == sorted(name for name in vars(fleet) if name.endswith("_") and not name.startswith("_"))
    for name in ("best_index_", "best_params_", "best_score_", "n_splits_", "multimetric_"):
        assert hasattr(fleet, name) == hasattr(plain, name), name
        if hasattr(plain, name):
            assert getattr(fleet, name) == getattr(plain, name), name
    for name in ("classes_", "feature_names_in_"):
        assert hasattr(fleet, name) == hasattr(plain, name), name
        if hasattr(plain, name):
            np.testing.assert_array_equal(getattr(fleet, name), getattr(plain, name))
