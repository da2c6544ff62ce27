"""Estimators on the Triton backend, under its interpreter, train the same model as on NumPy.

They run in their own process, because Triton selects the interpreter once, at import.
"""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = """
import json, pickle, sys, warnings
import numpy as np
from sklearn.datasets import load_digits
from fusemlp import sklearn as door

warnings.simplefilter("ignore")
X, y = load_digits(n_class=3, return_X_y=True)
X, y = (X[:26, 20:36] / 16.0).astype(np.float32), y[:26]
weights = np.random.RandomState(0).uniform(0.2, 2.0, 26)
found = []
# 26 rows in batches of 10 end with one of 6
common = dict(hidden_layer_sizes=5, batch_size=10, max_iter=2, learning_rate_init=0.05, random_state=0, alpha=0.3)
for name, options, weighted, again in json.loads(sys.argv[1]):
    pair = []
    for backend in ("triton", "numpy"):
        estimator = getattr(door, name)(**{**common, **options}, backend=backend)
        estimator.fit(X, y, sample_weight=weights if weighted else None)
        if again:
            estimator = pickle.loads(pickle.dumps(estimator)).partial_fit(X[:13], y[:13])
        pair.append(estimator)
    assert pair[0]._model.engine.backend == "triton"
    parameters = [np.concatenate([p.ravel() for p in (*e.coefs_, *e.intercepts_)]) for e in pair]
    answers = [e.predict_proba(X) if hasattr(e, "predict_proba") else e.predict(X) for e in pair]
    found.append([float(np.abs(a - b).max()) for a, b in (parameters, answers, [e.loss_ for e in pair])])
print(json.dumps(found))
"""
CASES = {
    "adam, then partial_fit of a pickle": ("MLPClassifier", {}, False, True),
    "sample weights": ("MLPClassifier", {"solver": "sgd", "learning_rate": "invscaling"}, True, False),
    "clipping": ("MLPClassifier", {"clip_norm": 0.1, "solver": "sgd"}, False, False),
    "early stopping": ("MLPClassifier", {"early_stopping": True, "validation_fraction": 0.3}, False, False),
    "prelu, dropout, adamw": (
        "MLPClassifier",
        {"activation": "prelu", "dropout": 0.3, "solver": "adamw"},
        False,
        False,
    ),
    "poisson": ("MLPRegressor", {"loss": "poisson"}, True, False),
    "lbfgs": ("MLPClassifier", {"solver": "lbfgs", "precision": "fp32"}, True, False),
}


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is there for Linux alone")
def test_triton_trains_what_numpy_trains():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(list(CASES.values()))],
        env={**os.environ, "TRITON_INTERPRET": "1"}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    differences = np.array(json.loads(done.stdout.splitlines()[-1]))
    # 9 updates at most, each off by some roundings of a float32 of a number around 1
    assert (differences <= 9 * 10 * np.finfo(np.float32).eps).all(), dict(zip(CASES, differences.tolist(), strict=True))
