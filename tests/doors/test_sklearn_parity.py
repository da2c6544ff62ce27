"""With the same random_state a fitted model is scikit-learn's, to within rounding.

Whole runs of the stochastic solvers are compared relative to the largest element of a tensor. L-BFGS amplifies rounding
from step to step, so its bound is the effect of input rounding on scikit-learn's own result.
"""

import copy

import numpy as np
import pytest
from sklearn import neural_network as theirs
from sklearn.datasets import load_digits, make_multilabel_classification, make_regression

from fusemlp import sklearn as ours

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

# The longest run has 1560 updates, each off by about sqrt(64) roundings of 1.1e-16 where K = 64: 1.4e-12 in all.
TOLERANCE = 1e-11
# Our sums and products round in other places, along paths of up to this many roundings for each one in the input.
ROUNDINGS = 100.0
ITERATIONS = (1, 10, 100)

digits = load_digits()
X_DIGITS, Y_DIGITS = digits.data[:130] / 16.0, digits.target[:130]
X_LABELS, Y_LABELS = make_multilabel_classification(n_samples=130, random_state=0)
X_REAL, Y_REAL = make_regression(n_samples=130, n_features=10, n_targets=3, noise=5.0, random_state=0)
Y_REAL = Y_REAL / 100.0

DATA = {
    "classes": ("MLPClassifier", X_DIGITS, Y_DIGITS, {}),
    "two classes": ("MLPClassifier", X_DIGITS, Y_DIGITS % 2, {}),
    "labels": ("MLPClassifier", X_LABELS / 10.0, Y_LABELS, {}),
    "values": ("MLPRegressor", X_REAL, Y_REAL[:, 0], {}),
    "several values": ("MLPRegressor", X_REAL, Y_REAL, {}),
    "counts": ("MLPRegressor", X_REAL, np.abs(Y_REAL[:, :2]), {"loss": "poisson"}),
}
SGD = {"solver": "sgd", "learning_rate_init": 0.01}
SOLVERS = {
    "sgd": SGD,
    "sgd, no momentum": {**SGD, "momentum": 0.0},
    "sgd, no Nesterov": {**SGD, "nesterovs_momentum": False},
    "sgd, invscaling": {**SGD, "learning_rate": "invscaling", "power_t": 0.3},
    "sgd, adaptive": {**SGD, "learning_rate": "adaptive", "n_iter_no_change": 1, "tol": 1e-2},
    "adam": {},
    "adam, logistic": {"activation": "logistic", "alpha": 0.1, "beta_1": 0.8},
    "adam, tanh": {"activation": "tanh", "shuffle": False, "beta_2": 0.99, "epsilon": 1e-3},
    "early stopping": {"early_stopping": True, "validation_fraction": 0.3, "n_iter_no_change": 5},
}
# 130 rows in batches of 32 end with one of 2
BASE = {"hidden_layer_sizes": (8, 5), "batch_size": 32, "random_state": 4, "tol": 0.0, "n_iter_no_change": 1000}


def row_weights(n):
    return np.random.RandomState(5).uniform(0.1, 2.0, n)


def fitted(module, data, options, *, weighted=False, **changes):
    name, X, y, own = DATA[data]
    estimator = getattr(module, name)(**{**BASE, **own, **options, **changes})
    return estimator.fit(X, y, sample_weight=row_weights(len(X)) if weighted else None)


def parameters(estimator):
    return [*estimator.coefs_, *estimator.intercepts_]


def distance(mine, reference):
    """Return the largest difference of parameters, in units of their tensor's largest element."""
    pairs = zip(parameters(mine), parameters(reference), strict=True)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs)


def check_accounts(mine, reference, tolerance):
    for name in ("n_iter_", "t_", "n_layers_", "n_outputs_", "out_activation_", "n_features_in_"):
        assert getattr(mine, name) == getattr(reference, name), name
    for name in ("loss_", "best_loss_", "loss_curve_", "validation_scores_", "best_validation_score_"):
        assert hasattr(mine, name) == hasattr(reference, name), name
        value = getattr(reference, name, None)
        if value is None:
            assert getattr(mine, name, None) is None, name
        else:
            np.testing.assert_allclose(getattr(mine, name), value, rtol=tolerance, atol=tolerance, err_msg=name)


def check_same(mine, reference):
    assert distance(mine, reference) <= TOLERANCE
    check_accounts(mine, reference, TOLERANCE)


@pytest.mark.parametrize("iterations", ITERATIONS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("solver", SOLVERS)
def test_stochastic_solvers(solver, data, iterations):
    mine, reference = (fitted(module, data, SOLVERS[solver], max_iter=iterations) for module in (ours, theirs))
    check_same(mine, reference)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("solver", ["sgd", "adam", "early stopping"])
def test_sample_weights(solver, data):
    options = {**SOLVERS[solver], "alpha": 0.1, "max_iter": 30}
    mine, reference = (fitted(module, data, options, weighted=True) for module in (ours, theirs))
    check_same(mine, reference)


def sensitivity(data, options, weighted):
    """Return the largest of three changes of scikit-learn's result when each element of X is rounded once."""
    name, X, y, own = DATA[data]
    reference = fitted(theirs, data, options, weighted=weighted)
    moved = []
    for seed in range(3):
        signs = np.random.RandomState(seed).choice([-1.0, 1.0], X.shape)
        nearby = getattr(theirs, name)(**{**BASE, **own, **options})
        weight = row_weights(len(X)) if weighted else None
        nearby.fit(X * (1.0 + signs * np.finfo(float).eps), y, sample_weight=weight)
        moved.append((distance(nearby, reference), abs(nearby.loss_ / reference.loss_ - 1.0)))
    return reference, np.max(moved, axis=0)


@pytest.mark.parametrize("iterations", ITERATIONS)
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
def test_lbfgs(data, iterations, weighted):
    options = {"solver": "lbfgs", "alpha": 0.1, "max_iter": iterations}
    reference, (moved, loss_moved) = sensitivity(data, options, weighted)
    mine = fitted(ours, data, options, weighted=weighted)
    assert distance(mine, reference) <= ROUNDINGS * moved + TOLERANCE
    check_accounts(mine, reference, ROUNDINGS * loss_moved + TOLERANCE)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("solver", ["sgd, invscaling", "adam"])
def test_partial_fit_goes_on(solver, data):
    name, X, y, own = DATA[data]
    pair = [getattr(module, name)(**{**BASE, **own, **SOLVERS[solver]}) for module in (ours, theirs)]
    classes = np.unique(y) if y.ndim == 1 else np.arange(y.shape[1])
    first = {"classes": classes} if name == "MLPClassifier" else {}
    for rows in (slice(0, 70), slice(70, 130), slice(0, 70), slice(20, 90)):
        for estimator in pair:
            estimator.partial_fit(X[rows], y[rows], **first)
        first = {}
    check_same(*pair)


@pytest.mark.parametrize("solver", ["sgd, adaptive", "adam", "early stopping", "lbfgs"])
def test_warm_start_goes_on(solver):
    _, X, y, _ = DATA["classes"]
    options = {**BASE, **SOLVERS.get(solver, {"solver": "lbfgs"}), "warm_start": True, "max_iter": 7}
    pair = [module.MLPClassifier(**options) for module in (ours, theirs)]
    for _ in range(3):
        for estimator in pair:
            estimator.fit(X, y)
    check_same(*pair)


@pytest.mark.parametrize("solver", ["adam", "sgd"])
def test_partial_fit_after_fit_goes_on_with_the_optimizer_of_then(solver):
    _, X, y, _ = DATA["classes"]
    pair = [fitted(module, "classes", {"max_iter": 3, "solver": solver}) for module in (ours, theirs)]
    for estimator in pair:
        estimator.set_params(solver="adam").partial_fit(X, y).partial_fit(X, y)
    check_same(*pair)


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_layer_sizes": ()},
        {"hidden_layer_sizes": (), "activation": "logistic"},
        {"hidden_layer_sizes": 12, "batch_size": "auto"},
        {"hidden_layer_sizes": [4, 4, 4], "activation": "identity", "batch_size": 1},
        {"alpha": 0.0, "batch_size": 65},
        {"solver": "sgd", "momentum": 1.0, "learning_rate_init": 1e-4},
        {"random_state": np.random.RandomState(8)},
    ],
    ids=lambda options: ", ".join(f"{name}={value}" for name, value in options.items())[:60],
)
def test_shapes_and_sizes(options):
    pair = [fitted(module, "classes", copy.deepcopy(options), max_iter=12) for module in (ours, theirs)]
    check_same(*pair)


@pytest.mark.parametrize("data", DATA)
def test_predictions(data):
    mine, reference = (fitted(module, data, {}, max_iter=20) for module in (ours, theirs))
    X, y = DATA[data][1:3]
    expected = reference.predict(X)
    predicted = mine.predict(X)
    assert predicted.dtype == expected.dtype and predicted.shape == expected.shape
    np.testing.assert_allclose(predicted, expected, rtol=1e-8)
    assert abs(mine.score(X, y) - reference.score(X, y)) <= 1e-9
    if hasattr(reference, "predict_proba"):
        np.testing.assert_array_equal(mine.classes_, reference.classes_)
        np.testing.assert_allclose(mine.predict_proba(X), reference.predict_proba(X), rtol=1e-7)
        np.testing.assert_allclose(mine.predict_log_proba(X), reference.predict_log_proba(X), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("solver", ["sgd", "adam", "lbfgs"])
def test_single_precision_in_single_precision_out(solver):
    """One epoch of 5 updates: each parameter is within some roundings of a float32 of scikit-learn's."""
    X = X_DIGITS.astype(np.float32)
    options = {**BASE, "max_iter": 1, "solver": solver}
    mine, reference = (module.MLPClassifier(**options).fit(X, Y_DIGITS) for module in (ours, theirs))
    assert [p.dtype for p in parameters(mine)] == [p.dtype for p in parameters(reference)]
    # Adam divides by the root of the second moment: where gradients are roundings, so is the direction of a step
    assert distance(mine, reference) <= 1e-4
    assert mine.predict_proba(X).dtype == reference.predict_proba(X).dtype


@pytest.mark.parametrize("solver", ["sgd, adaptive", "early stopping", "adam"])
def test_verbose_says_the_same(solver, capsys):
    said = []
    options = {**SOLVERS[solver], "max_iter": 12, "verbose": True, "tol": 0.05, "n_iter_no_change": 2}
    for module in (ours, theirs):
        fitted(module, "classes", options)
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] != ""
