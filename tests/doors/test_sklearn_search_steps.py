"""Pipeline steps before a model are fitted once for several candidates, and the results do not change."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from searches import both
from sklearn.datasets import load_wine
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import FunctionTransformer, MaxAbsScaler, Normalizer, PowerTransformer, StandardScaler

from fusemlp.sklearn import FleetSearchCV, MLPClassifier

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

X, Y = load_wine(return_X_y=True)
ALPHAS = {"mlp__alpha": [0.0, 1e-3, 1e-2, 0.1]}


def pipeline(*steps):
    model = MLPClassifier(8, max_iter=4, batch_size=32, random_state=0)
    return Pipeline([(f"step{index}", step) for index, step in enumerate(steps)] + [("mlp", model)])


def doubled(rows):
    return np.multiply(rows, 2.0, out=rows)


def doubled_numbers(rows):
    rows.data *= 2.0
    return rows


@pytest.mark.parametrize(
    "steps",
    [
        (StandardScaler(), MaxAbsScaler(copy=False)),
        (StandardScaler(), PowerTransformer(copy=False)),
        (StandardScaler(), Normalizer(copy=False), FunctionTransformer(doubled)),
        (StandardScaler(copy=False), FunctionTransformer(), MaxAbsScaler(copy=False)),
        (FunctionTransformer(csr_matrix), MaxAbsScaler(copy=False), FunctionTransformer(doubled_numbers)),
    ],
    ids=["scaler", "power", "function", "identity", "sparse"],
)
def test_a_step_that_changes_rows_in_place(steps):
    # the scores of the training rows are asked for, since a step that works in place changes those too
    options = {"cv": 2, "scoring": "neg_log_loss", "return_train_score": True}
    fleet, plain = both(FleetSearchCV, pipeline(*steps), ALPHAS, data=(X, Y), **options)
    for split in range(2):
        mine, its = (search.cv_results_[f"split{split}_test_score"] for search in (fleet, plain))
        # float64 sums may be taken in another order where memory lies otherwise; a step applied twice changes 1e-3
        np.testing.assert_allclose(mine, its, rtol=1e-10)
