"""Estimators on sparse rows that are read as codes end as on dense rows."""

import numpy as np
import pytest
from scipy import sparse

import fusemlp
from fusemlp.sklearn import MLPClassifier, MLPRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

RANDOM = np.random.default_rng(0)
# 2 to 6 of 90 words a row
DENSE = np.zeros((130, 90))
for row in DENSE:
    row[RANDOM.choice(90, RANDOM.integers(2, 7), replace=False)] = RANDOM.integers(1, 4)
SPARSE = sparse.csr_matrix(DENSE)
CLASSES = RANDOM.integers(0, 3, 130)
BASE = {"hidden_layer_sizes": (17,), "max_iter": 4, "random_state": 0, "alpha": 0.1, "batch_size": 32}
OPTIONS = [
    {},
    {"solver": "sgd", "learning_rate": "invscaling", "nesterovs_momentum": False},
    {"solver": "sgd", "learning_rate": "adaptive", "activation": "tanh"},
    {"solver": "lbfgs"},
    {"solver": "adamw", "dropout": 0.2},
    {"early_stopping": True, "n_iter_no_change": 2},
    {"class_weight": "balanced", "clip_norm": 0.5},
    {"learning_rate": fusemlp.Cosine(0.01)},
]


def assert_close(one, other):
    """Both are sums of the same terms in float64, in another order."""
    for left, right in zip([*one.coefs_, *one.intercepts_], [*other.coefs_, *other.intercepts_], strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_fit_to_sparse_rows(options):
    one, other = (MLPClassifier(**{**BASE, **options}).fit(rows, CLASSES) for rows in (SPARSE, DENSE))
    assert one._model.engine.coded and not other._model.engine.coded
    assert_close(one, other)
    np.testing.assert_allclose(
        getattr(one, "loss_curve_", one.loss_), getattr(other, "loss_curve_", other.loss_), rtol=1e-9
    )
    np.testing.assert_allclose(one.predict_proba(SPARSE), other.predict_proba(DENSE), rtol=1e-8)


def test_a_regressor_with_weights_and_own_validation_rows():
    y, weights = DENSE[:, :2] + 1.0, RANDOM.integers(0, 3, 130).astype(float)
    fits = [
        MLPRegressor(**BASE).fit(rows, y, sample_weight=weights, X_val=rows[:40], y_val=y[:40])
        for rows in (SPARSE, DENSE)
    ]
    assert_close(*fits)
    np.testing.assert_allclose(fits[0].validation_loss_curve_, fits[1].validation_loss_curve_, rtol=1e-9)


def test_partial_fit_takes_either_in_turn():
    one, other = (MLPClassifier(**BASE) for _ in range(2))
    for rows in (SPARSE, DENSE, SPARSE[:50], SPARSE[60:], DENSE):
        dense = rows.toarray() if sparse.issparse(rows) else rows
        for estimator, given in ((one, rows), (other, dense)):
            estimator.partial_fit(given, CLASSES[: dense.shape[0]], classes=[0, 1, 2])
    assert_close(one, other)


def test_an_attack_gets_dense_rows():
    options = {**BASE, "adversarial": fusemlp.FGSM(0.1)}
    one, other = (MLPClassifier(**options).fit(rows, CLASSES) for rows in (SPARSE, DENSE))
    assert not one._model.engine.coded
    assert_close(one, other)
