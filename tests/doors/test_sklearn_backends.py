"""Estimators on Triton and CuPy, on a card or on what stands in for one, train the same model as on NumPy."""

import pickle
import warnings

import numpy as np
import pytest
from devices import CUPY_GPU, GPU, INTERPRETER, STAND_IN, marks_of, usable
from sklearn.datasets import load_digits

from fusemlp import sklearn as door

PLACES = [pytest.param(place, id=place.name, marks=marks_of(place)) for place in (INTERPRETER, GPU, STAND_IN, CUPY_GPU)]
CASES = {
    "adam, then partial_fit of a pickle": ("MLPClassifier", {}),
    "sample weights": ("MLPClassifier", {"solver": "sgd", "learning_rate": "invscaling"}),
    "clipping": ("MLPClassifier", {"clip_norm": 0.1, "solver": "sgd"}),
    "early stopping": ("MLPClassifier", {"early_stopping": True, "validation_fraction": 0.3}),
    "prelu, dropout": ("MLPClassifier", {"activation": "prelu", "dropout": 0.3, "solver": "adamw"}),
    "poisson, sample weights": ("MLPRegressor", {"loss": "poisson"}),
    "lbfgs, sample weights": ("MLPClassifier", {"solver": "lbfgs", "precision": "fp32"}),
}
COMMON = {
    "hidden_layer_sizes": 5, "batch_size": 10, "max_iter": 2, "learning_rate_init": 0.05, "random_state": 0,
    "alpha": 0.3,
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("place", PLACES)
def test_the_backend_trains_what_numpy_trains(place, case):
    name, options = CASES[case]
    X, y = load_digits(n_class=3, return_X_y=True)
    # 26 rows in batches of 10 end with one of 6
    X, y = (X[:26, 20:36] / 16.0).astype(np.float32), y[:26]
    weights = np.random.RandomState(0).uniform(0.2, 2.0, 26) if "sample weights" in case else None
    pair = []
    with usable(place), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for backend in (place.backend, "numpy"):
            estimator = getattr(door, name)(**{**COMMON, **options}, backend=backend)
            estimator.fit(X, y, sample_weight=weights)
            if "pickle" in case:
                estimator = pickle.loads(pickle.dumps(estimator)).partial_fit(X[:13], y[:13])
            pair.append(estimator)
        assert pair[0]._model.engine.backend == place.backend
        answers = [e.predict_proba(X) if hasattr(e, "predict_proba") else e.predict(X) for e in pair]
    parameters = [np.concatenate([p.ravel() for p in (*e.coefs_, *e.intercepts_)]) for e in pair]
    for first, second in (parameters, answers, [e.loss_ for e in pair]):
        # 9 updates at most, each off by some roundings of a float32 of a number around 1
        assert np.abs(first - second).max() <= 9 * 10 * np.finfo(np.float32).eps
