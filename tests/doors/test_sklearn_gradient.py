"""The gradient of every objective is the slope of its loss; steps beyond scikit-learn's own solvers are right."""

import numpy as np
import pytest
from sklearn.datasets import load_digits

import fusemlp
from fusemlp.sklearn import MLPClassifier, MLPRegressor
from fusemlp.sklearn.batches import CalledBatches

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

RANDOM = np.random.RandomState(0)
X = RANDOM.standard_normal((9, 4))
VALUES = RANDOM.standard_normal((9, 3))
CLASSES = np.arange(9) % 3
LABELS = (VALUES > 0).astype(int)
WEIGHTS = RANDOM.uniform(0.5, 2.0, 9)


# The targets and the options. Without squared_error of several outputs: scikit-learn's loss is a mean over outputs,
# its gradient that of a sum.
OBJECTIVES = {
    "classes": (CLASSES, {}),
    "two classes": (CLASSES % 2, {}),
    "labels": (LABELS, {}),
    "classes, smoothed": (CLASSES, {"label_smoothing": 0.2}),
    "labels, smoothed": (LABELS, {"label_smoothing": 0.2}),
    "classes, weighted": (CLASSES, {"class_weight": {0: 1.0, 1: 2.0, 2: 0.3}}),
    "squared error": (VALUES[:, 0], {"loss": "squared_error"}),
    "poisson": (np.abs(VALUES), {"loss": "poisson"}),
    "absolute error": (VALUES, {"loss": "absolute_error"}),
    "huber": (VALUES, {"loss": "huber"}),
    "quantile": (VALUES, {"loss": fusemlp.Quantile(0.8)}),
}


@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["", "weights"])
@pytest.mark.parametrize("case", OBJECTIVES)
def test_every_objective(case, weight):
    """Central differences with step h err by h**2 times the third derivative, and by roundings of 1e-16 / h."""
    y, options = OBJECTIVES[case]
    kind = MLPRegressor if "loss" in options else MLPClassifier
    common = {"hidden_layer_sizes": (5, 4), "activation": "tanh", "solver": "lbfgs", "max_iter": 1, "random_state": 1}
    estimator = kind(**common, alpha=0.1, **options).fit(X, y, sample_weight=weight)
    # all rows, bound as one batch
    model = estimator._model
    encoded = estimator._validate_input(X, y, False, False)[1].reshape(len(X), -1)
    target, constants = estimator._targets(encoded, model.dtype)
    objective, weights = estimator._objective(estimator.n_outputs_), estimator._row_weights(encoded, weight, False)
    data = {"x": X, "target": target}
    batches = CalledBatches(model, objective, data, weights, constants, estimator.alpha, len(X), {})

    memory, step = model.engine.memory, 1e-5
    assert batches.loss_and_gradient() >= 0.0
    gradient = memory.grads.copy()
    for place in memory.layout.places.values():
        for index in range(place.offset, place.offset + place.size):
            here = memory.params[index]
            losses = []
            for memory.params[index] in (here + step, here - step):
                losses.append(batches.loss_and_gradient())
            memory.params[index] = here
            assert gradient[index] == pytest.approx((losses[0] - losses[1]) / (2.0 * step), rel=1e-6, abs=1e-8)


def one_step(**given):
    """Return classifiers before and after an epoch of one batch."""
    options = {"max_iter": 1, "random_state": 3, "hidden_layer_sizes": 5, **given}
    still = MLPClassifier(**options | {"learning_rate": fusemlp.schedules.Constant(0.0)}).fit(X, CLASSES)
    return still, MLPClassifier(**options).fit(X, CLASSES)


def test_adamw_decays_the_weights_by_the_rate_and_not_the_biases():
    rate, alpha = 0.01, 0.3
    start, plain = one_step(solver="adamw", alpha=0.0, learning_rate_init=rate)
    _, decayed = one_step(solver="adamw", alpha=alpha, learning_rate_init=rate)
    for before, without, with_decay in zip(start.coefs_, plain.coefs_, decayed.coefs_, strict=True):
        np.testing.assert_allclose(with_decay, without - rate * alpha * before, rtol=1e-12, atol=1e-15)
    for without, with_decay in zip(plain.intercepts_, decayed.intercepts_, strict=True):
        np.testing.assert_array_equal(with_decay, without)
    assert decayed.loss_ == plain.loss_


@pytest.mark.parametrize("limit", [1e-3, 1e3])
def test_clip_norm_bounds_the_step(limit):
    rate = 0.5
    options = {"solver": "sgd", "momentum": 0.0, "learning_rate_init": rate, "alpha": 0.1}
    start, free = one_step(**options)
    _, clipped = one_step(**options, clip_norm=limit)

    def length(end):
        pairs = zip([*end.coefs_, *end.intercepts_], [*start.coefs_, *start.intercepts_], strict=True)
        return np.sqrt(sum(np.sum((a - b) ** 2) for a, b in pairs))

    # The engine divides by norm + 1e-6, as torch does.
    expected = min(length(free), rate * limit)
    assert length(clipped) == pytest.approx(expected, rel=1e-5)


def test_class_weight_is_a_weight_of_the_rows_of_a_class():
    def first_layer(y=CLASSES, weight=None, **options):
        return MLPClassifier(5, max_iter=9, random_state=0, **options).fit(X, y, sample_weight=weight).coefs_[0]

    weights = {0: 1.0, 1: 2.5, 2: 0.5}
    rows = np.array([weights[one] for one in CLASSES])
    np.testing.assert_array_equal(first_layer(class_weight=weights), first_layer(weight=rows))
    both = first_layer(weight=rows, class_weight=weights)
    np.testing.assert_allclose(both, first_layer(weight=rows**2), rtol=1e-9)
    y = np.array([0] * 6 + [1] * 3)
    rows = np.where(y == 0, 9 / (2 * 6), 9 / (2 * 3))
    np.testing.assert_allclose(first_layer(y, class_weight="balanced"), first_layer(y, rows), rtol=1e-9)


def test_smoothed_targets_keep_probabilities_from_the_ends():
    """The best prediction of a row is its smoothed target."""
    y, rows = np.repeat([0, 1, 2], 3), np.repeat(np.eye(3), 3, axis=0)
    estimator = MLPClassifier((), label_smoothing=0.3, solver="lbfgs", alpha=0.0, random_state=0, tol=1e-9)
    expected = np.full((3, 3), 0.1) + 0.7 * np.eye(3)
    np.testing.assert_allclose(estimator.fit(rows, y).predict_proba(np.eye(3)), expected, atol=1e-4)
    two = estimator.fit(rows, y == 0).predict_proba(np.eye(3))[:, 1]
    np.testing.assert_allclose(two, [0.85, 0.15, 0.15], atol=1e-4)


def test_dropout_is_for_training_alone_and_repeats_with_the_random_state():
    digits, y = load_digits(return_X_y=True)
    digits, y = digits[:200] / 16.0, y[:200]
    plain, dropped, again, layers = (
        MLPClassifier((20, 10), max_iter=5, random_state=0, dropout=rate).fit(digits, y)
        for rate in (0.0, 0.5, 0.5, [0.5, 0.0])
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
    MLPClassifier(solver=solver, callbacks=[Watch()], **options).fit(X, CLASSES)
    # 9 rows in batches of 4 make 3 updates an epoch, 12 in all
    steps = np.arange(1, 13) / 12.0
    np.testing.assert_allclose(rates, 0.02 + 0.04 * (1.0 + np.cos(np.pi * steps)), rtol=1e-12)


def test_partial_fit_after_lbfgs_begins_with_an_optimizer_of_its_own():
    """Adam's first step moves a parameter by its rate, less the effect of epsilon."""
    estimator = MLPClassifier(5, "tanh", solver="lbfgs", max_iter=2, random_state=0).fit(X, CLASSES)
    before = [coef.copy() for coef in estimator.coefs_]
    estimator.set_params(solver="adam", learning_rate_init=0.125, epsilon=1e-12).partial_fit(X, CLASSES)
    for coef, old in zip(estimator.coefs_, before, strict=True):
        np.testing.assert_allclose(np.abs(coef - old), 0.125, rtol=1e-6)
