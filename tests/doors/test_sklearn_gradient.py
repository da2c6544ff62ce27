"""The gradient of every objective is the slope of its loss; steps beyond scikit-learn's own solvers are right."""

import warnings

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning

import fusemlp
from fusemlp.sklearn import MLPClassifier, MLPRegressor
from fusemlp.sklearn.batches import CalledBatches
from fusemlp_kernels.contract import ACTIVATIONS

RANDOM = np.random.RandomState(0)
X = RANDOM.standard_normal((9, 4))
VALUES = RANDOM.standard_normal((9, 3))
CLASSES = np.arange(9) % 3
LABELS = (VALUES > 0).astype(int)
WEIGHTS = RANDOM.uniform(0.5, 2.0, 9)

CLASSIFIERS = {
    "classes": (CLASSES, {}),
    "two classes": (CLASSES % 2, {}),
    "labels": (LABELS, {}),
    "classes, smoothed": (CLASSES, {"label_smoothing": 0.2}),
    "labels, smoothed": (LABELS, {"label_smoothing": 0.2}),
    "classes, weighted": (CLASSES, {"class_weight": {0: 1.0, 1: 2.0, 2: 0.3}}),
}
# Without squared_error of several outputs: scikit-learn's loss is a mean over outputs, its gradient that of a sum.
REGRESSORS = {
    "squared error": (VALUES[:, 0], {}),
    "poisson": (np.abs(VALUES), {"loss": "poisson"}),
    "absolute error": (VALUES, {"loss": "absolute_error"}),
    "huber": (VALUES, {"loss": "huber"}),
    "quantile": (VALUES, {"loss": fusemlp.Quantile(0.8)}),
}


def quiet(estimator, *data, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return estimator.fit(*data, **options)


def bound(estimator, y, weight):
    """Return the fitted estimator's model, and all rows bound to it as one batch."""
    model = estimator._model
    encoded = estimator._validate_input(X, y, False, False)[1]
    encoded = encoded.reshape(len(X), -1)
    target, constants = estimator._targets(encoded, model.dtype)
    batches = CalledBatches(
        model,
        estimator._objective(estimator.n_outputs_),
        {"x": X, "target": target},
        estimator._row_weights(encoded, weight, False),
        constants,
        estimator.alpha,
        len(X),
        {},
    )
    return model, batches


def check_gradient(estimator, y, weight=None):
    """Central differences with step h err by h**2 times the third derivative, and by roundings of 1e-16 / h."""
    quiet(estimator, X, y, sample_weight=weight)
    model, batches = bound(estimator, y, weight)
    memory = model.engine.memory
    loss = batches.loss_and_gradient()
    assert loss >= 0.0
    gradient = memory.grads.copy()
    step = 1e-5
    used = np.concatenate([np.arange(p.offset, p.offset + p.size) for p in memory.layout.places.values()])
    slopes = np.zeros_like(gradient)
    for index in used:
        here = memory.params[index]
        memory.params[index] = here + step
        above = batches.loss_and_gradient()
        memory.params[index] = here - step
        below = batches.loss_and_gradient()
        memory.params[index] = here
        slopes[index] = (above - below) / (2.0 * step)
    np.testing.assert_allclose(gradient[used], slopes[used], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, "logistic", ["tanh", "silu"]])
@pytest.mark.parametrize("case", ["classes", "two classes"])
def test_every_activation(case, activation):
    y, options = CLASSIFIERS[case]
    options = {**options, "hidden_layer_sizes": (5, 4), "random_state": 1, "alpha": 0.1}
    check_gradient(MLPClassifier(activation=activation, solver="lbfgs", max_iter=1, **options), y)


@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["", "weights"])
@pytest.mark.parametrize("case", CLASSIFIERS)
def test_every_objective_of_the_classifier(case, weight):
    y, options = CLASSIFIERS[case]
    check_gradient(MLPClassifier((5,), "tanh", solver="lbfgs", max_iter=1, random_state=1, **options), y, weight)


@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["", "weights"])
@pytest.mark.parametrize("case", REGRESSORS)
def test_every_objective_of_the_regressor(case, weight):
    y, options = REGRESSORS[case]
    estimator = MLPRegressor(hidden_layer_sizes=5, activation="tanh", solver="lbfgs", max_iter=1, random_state=1)
    check_gradient(estimator.set_params(**options), y, weight)


def one_step(estimator, y=CLASSES):
    """Return the change of the parameters by an epoch of one batch."""
    options = estimator.get_params() | {"max_iter": 1, "random_state": 3, "hidden_layer_sizes": 5}
    still = quiet(type(estimator)(**options | {"learning_rate": fusemlp.schedules.Constant(0.0)}), X, y)
    moved = quiet(type(estimator)(**options), X, y)
    return still, moved


def test_adamw_decays_the_weights_by_the_rate_and_not_the_biases():
    rate, alpha = 0.01, 0.3
    start, plain = one_step(MLPClassifier(solver="adamw", alpha=0.0, learning_rate_init=rate))
    _, decayed = one_step(MLPClassifier(solver="adamw", alpha=alpha, learning_rate_init=rate))
    for before, without, with_decay in zip(start.coefs_, plain.coefs_, decayed.coefs_, strict=True):
        np.testing.assert_allclose(with_decay, without - rate * alpha * before, rtol=1e-12, atol=1e-15)
    for without, with_decay in zip(plain.intercepts_, decayed.intercepts_, strict=True):
        np.testing.assert_array_equal(with_decay, without)
    assert decayed.loss_ == plain.loss_


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clip_norm_bounds_the_step(limit):
    rate = 0.5
    options = {"solver": "sgd", "momentum": 0.0, "learning_rate_init": rate, "alpha": 0.1}
    start, free = one_step(MLPClassifier(**options))
    _, clipped = one_step(MLPClassifier(**options, clip_norm=limit))

    def length(end):
        pairs = zip([*end.coefs_, *end.intercepts_], [*start.coefs_, *start.intercepts_], strict=True)
        return np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs))

    # The engine divides by norm + 1e-6, as torch does.
    expected = min(length(free), rate * limit)
    assert length(clipped) == pytest.approx(expected, rel=1e-5)


def test_class_weight_is_a_weight_of_the_rows_of_a_class():
    weights = {0: 1.0, 1: 2.5, 2: 0.5}
    by_class = quiet(MLPClassifier(5, class_weight=weights, max_iter=9, random_state=0), X, CLASSES)
    rows = np.array([weights[one] for one in CLASSES])
    by_row = quiet(MLPClassifier(5, max_iter=9, random_state=0), X, CLASSES, sample_weight=rows)
    np.testing.assert_array_equal(by_class.coefs_[0], by_row.coefs_[0])
    both = quiet(MLPClassifier(5, class_weight=weights, max_iter=9, random_state=0), X, CLASSES, sample_weight=rows)
    squared = quiet(MLPClassifier(5, max_iter=9, random_state=0), X, CLASSES, sample_weight=rows**2)
    np.testing.assert_allclose(both.coefs_[0], squared.coefs_[0], rtol=1e-9)


def test_balanced_classes_weigh_the_same():
    y = np.array([0] * 6 + [1] * 3)
    balanced = quiet(MLPClassifier(5, class_weight="balanced", max_iter=9, random_state=0), X, y)
    rows = np.where(y == 0, 9 / (2 * 6), 9 / (2 * 3))
    by_row = quiet(MLPClassifier(5, max_iter=9, random_state=0), X, y, sample_weight=rows)
    np.testing.assert_allclose(balanced.coefs_[0], by_row.coefs_[0], rtol=1e-9)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_quantile_has_that_share_below_it(share):
    """For equal rows the best prediction is the quantile of the targets."""
    y = np.arange(101.0) / 100.0
    rates = {"learning_rate": fusemlp.Cosine(0.1), "momentum": 0.0, "max_iter": 300, "n_iter_no_change": np.inf}
    estimator = MLPRegressor(fusemlp.Quantile(share), (), solver="sgd", alpha=0.0, random_state=0, **rates)
    prediction = quiet(estimator, np.zeros((101, 1)), y).predict(np.zeros((1, 1)))
    # the targets lie 0.01 apart
    assert abs(prediction[0] - share) <= 0.01


def test_smoothed_targets_keep_probabilities_from_the_ends():
    """The best prediction of a row is its smoothed target."""
    y = np.repeat([0, 1, 2], 3)
    rows = np.repeat(np.eye(3), 3, axis=0)
    estimator = MLPClassifier((), label_smoothing=0.3, solver="lbfgs", alpha=0.0, random_state=0, tol=1e-9)
    expected = np.full((3, 3), 0.1) + 0.7 * np.eye(3)
    np.testing.assert_allclose(quiet(estimator, rows, y).predict_proba(np.eye(3)), expected, atol=1e-4)
    two = MLPClassifier((), label_smoothing=0.3, solver="lbfgs", alpha=0.0, random_state=0, tol=1e-9)
    np.testing.assert_allclose(quiet(two, rows, y == 0).predict_proba(np.eye(3))[:, 1], [0.85, 0.15, 0.15], atol=1e-4)


def test_dropout_is_for_training_alone_and_repeats_with_the_random_state():
    digits, y = load_digits(return_X_y=True)
    digits, y = digits[:200] / 16.0, y[:200]
    options = {"hidden_layer_sizes": (20, 10), "max_iter": 5, "random_state": 0}
    plain, dropped, again, layers = (
        quiet(MLPClassifier(**options, dropout=rate), digits, y) for rate in (0.0, 0.5, 0.5, [0.5, 0.0])
    )
    np.testing.assert_array_equal(dropped.coefs_[0], again.coefs_[0])
    assert not np.array_equal(dropped.coefs_[0], plain.coefs_[0])
    assert not np.array_equal(dropped.coefs_[0], layers.coefs_[0])
    np.testing.assert_array_equal(dropped.predict_proba(digits), dropped.predict_proba(digits))


@pytest.mark.parametrize("solver", ["sgd", "adam", "adamw"])
def test_schedules_span_the_training(solver):
    rates = []

    class Watch:
        def on_batch_end(self, engine, batch):
            rates.append(engine.learning_rate)

    schedule = fusemlp.Cosine(0.1, final=0.02)
    options = {"learning_rate": schedule, "batch_size": 4, "max_iter": 4, "n_iter_no_change": 9}
    quiet(MLPClassifier(solver=solver, callbacks=[Watch()], **options), X, CLASSES)
    # 9 rows in batches of 4 make 3 updates an epoch, 12 in all
    steps = np.arange(1, 13) / 12.0
    np.testing.assert_allclose(rates, 0.02 + 0.04 * (1.0 + np.cos(np.pi * steps)), rtol=1e-12)


def test_partial_fit_after_lbfgs_begins_with_an_optimizer_of_its_own():
    """Adam's first step moves a parameter by its rate, less the effect of epsilon."""
    estimator = quiet(MLPClassifier(5, "tanh", solver="lbfgs", max_iter=2, random_state=0), X, CLASSES)
    before = [coef.copy() for coef in estimator.coefs_]
    estimator.set_params(solver="adam", learning_rate_init=0.125, epsilon=1e-12).partial_fit(X, CLASSES)
    for coef, old in zip(estimator.coefs_, before, strict=True):
        np.testing.assert_allclose(np.abs(coef - old), 0.125, rtol=1e-6)


def test_a_plateau_lowers_the_rate():
    schedule = fusemlp.ReduceOnPlateau(0.1, patience=2, min_delta=1e9)
    estimator = MLPClassifier(solver="sgd", learning_rate=schedule, max_iter=5, n_iter_no_change=9)
    # the first epoch is the best; the third and the fifth end two without an improvement
    assert quiet(estimator, X, CLASSES).learning_rate_ == pytest.approx(0.1 * 0.1**2)


def test_the_penalty_is_of_the_weights():
    estimator = quiet(MLPClassifier((5, 4), max_iter=2, random_state=0, alpha=0.3), X, CLASSES)
    model, batches = bound(estimator, CLASSES, None)
    memory = model.engine.memory
    assert batches.penalty() == pytest.approx(0.15 * sum(np.sum(coef**2) for coef in estimator.coefs_), rel=1e-12)
    memory.grads[:] = 0.0
    batches.add_penalty_gradient(0.25)
    np.testing.assert_allclose(memory.arrays["dw1"], 0.25 * 0.3 * estimator.coefs_[1].T, rtol=1e-15)
    assert not memory.arrays["db1"].any()
