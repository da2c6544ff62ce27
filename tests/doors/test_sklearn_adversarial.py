"""Estimators that train against attacks: the engine's own training, and what they refuse."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.model_selection import KFold

import fusemlp
from fusemlp import IBP, PGD, ArgumentError
from fusemlp.sklearn import FleetSearchCV, MLPClassifier, MLPRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

PIXELS, LABELS = load_digits(n_class=4, return_X_y=True)
X, Y = PIXELS[:120] / 16.0, LABELS[:120]
OPTIONS = {
    "hidden_layer_sizes": (12,), "solver": "sgd", "momentum": 0.0, "alpha": 0.0, "learning_rate_init": 0.5,
    "batch_size": 30, "max_iter": 6, "n_iter_no_change": 100, "shuffle": False, "random_state": 0, "backend": "numpy",
}  # fmt: skip
AGAINST = {"pgd": PGD(0.1, steps=2, bounds=(0, 1)), "ibp": IBP(0.05, warmup=0.2, ramp=0.5, bounds=(0, 1))}


def fitted(how, X=X, y=Y, sample_weight=None, **options):
    return MLPClassifier(**{**OPTIONS, **options}, adversarial=how).fit(X, y, sample_weight)


def parameters(estimator):
    return np.concatenate([one.ravel() for one in (*estimator.coefs_, *estimator.intercepts_)])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("how", AGAINST.values(), ids=AGAINST)
def test_it_is_the_engines_training(how, weighted):
    # a weight of 0 is in no launch of many steps
    weight = np.random.RandomState(1).uniform(0.2, 2.0, 120) if weighted else None
    if weight is not None:
        weight[3] = 0.0
        # the penalty of a batch is divided by its sum of weights, here 45
        batches = weight.reshape(4, 30)
        batches *= 1.5 / batches.mean(axis=1, keepdims=True)
    start = fitted(None, max_iter=1, learning_rate_init=1e-30)
    optimizer = fusemlp.SGD(lr=0.5, weight_decay=3.0 / (45 if weighted else 30), decay_biases=False)
    options = {"batch_size": 30, "backend": "numpy", "precision": "fp64", "normalise": False}
    engine = fusemlp.Engine(fusemlp.MLP([64, 12, 4]), optimizer=optimizer, **options)
    state = {}
    for layer, (w, b) in enumerate(zip(start.coefs_, start.intercepts_, strict=True)):
        state |= {f"{2 * layer}.weight": w.T, f"{2 * layer}.bias": b}
    engine.load_state_dict(state)
    engine.fit(X, Y, epochs=6, shuffle=False, adversarial=how, sample_weight=weight)
    found = fitted(how, sample_weight=weight, alpha=3.0)
    for layer, w in enumerate(found.coefs_):
        np.testing.assert_allclose(w.T, engine.state_dict()[f"{2 * layer}.weight"], rtol=0, atol=1e-10)
    plain = fitted(None, sample_weight=weight, alpha=3.0)
    assert not np.allclose(parameters(found), parameters(plain), rtol=0, atol=1e-3)


def test_one_epoch_after_another_is_a_fit():
    how, one = AGAINST["pgd"], MLPClassifier(**OPTIONS, adversarial=AGAINST["pgd"])
    for _ in range(6):
        one.partial_fit(X, Y, classes=np.arange(4))
    np.testing.assert_allclose(parameters(one), parameters(fitted(how)), rtol=0, atol=1e-10)
    others = fitted(how), fitted(how).set_params(adversarial=None)
    for other in others:
        other.partial_fit(X, Y)
    assert not np.array_equal(*map(parameters, others))


@pytest.mark.parametrize("how", AGAINST.values(), ids=AGAINST)
def test_it_is_a_parameter_like_others(how, tmp_path):
    estimator = fitted(how)
    assert clone(estimator).adversarial == estimator.get_params()["adversarial"] == how
    estimator.save(tmp_path / "firm.safetensors")
    loaded = MLPClassifier.load(tmp_path / "firm.safetensors")
    assert loaded.adversarial == how and np.array_equal(loaded.predict_proba(X), estimator.predict_proba(X))


def test_a_search_tries_attacks():
    hows, cv = [None, *AGAINST.values()], KFold(2)
    found = FleetSearchCV(MLPClassifier(**{**OPTIONS, "max_iter": 3}), {"adversarial": hows}, cv=cv).fit(X, Y)
    train, test = next(cv.split(X))
    alone = [fitted(how, X[train], Y[train], max_iter=3).score(X[test], Y[test]) for how in hows]
    assert found.cv_results_["split0_test_score"].tolist() == alone
    best = fitted(found.best_params_["adversarial"], max_iter=3)
    assert np.array_equal(parameters(found.best_estimator_), parameters(best))


def test_intervals_converge_after_their_ramp():
    # the loss of the rows falls by less than tol in every epoch
    options = {"max_iter": 30, "n_iter_no_change": 2, "tol": 10.0}
    assert fitted(AGAINST["pgd"], **options).n_iter_ < 6
    ibp = IBP(0.1, warmup=0.0, ramp=0.5)
    for early_stopping in (False, True):
        found = fitted(ibp, **options, early_stopping=early_stopping)
        assert ibp.settled(30) == 15 and 17 <= found.n_iter_ <= 20


def test_the_rate_falls_on_a_plateau_after_the_ramp():
    # of the epochs 5 to 8 none is better than the first
    rate = fusemlp.ReduceOnPlateau(0.5, factor=0.5, patience=1, min_delta=10.0)
    assert fitted(IBP(0.1, warmup=0.0, ramp=0.5), learning_rate=rate, max_iter=8).learning_rate_ == 0.5 * 0.5**3


def test_a_fit_that_ends_within_the_ramp_keeps_its_last_parameters():
    class Stop(fusemlp.Callback):
        def on_epoch_end(self, engine, epoch, logs):
            engine.stop_training = epoch == 2

    options = {**OPTIONS, "max_iter": 30, "callbacks": [Stop()], "adversarial": IBP(0.1, warmup=0.0)}
    last, judged = (MLPClassifier(**options, early_stopping=how).fit(X, Y, X_val=X, y_val=Y) for how in (False, True))
    assert judged.n_iter_ == 3 and np.array_equal(parameters(judged), parameters(last))


def test_regressors_resist_attacks_too():
    options = {**OPTIONS, "learning_rate_init": 0.01}
    plain, firm = (MLPRegressor(**options, adversarial=how).fit(X, Y) for how in (None, PGD(0.1)))
    assert np.isfinite(parameters(firm)).all() and not np.array_equal(parameters(plain), parameters(firm))


BAD = {
    "a number": (
        {"adversarial": 0.1},
        fusemlp.ArgumentTypeError,
        r"adversarial: expected an attack such as PGD\(0.1\)",
    ),
    "bounds": ({"adversarial": PGD(0.1, bounds=(0.5, 1))}, fusemlp.DataError, "X: values from 0 to 1 are not within"),
    "gelu": ({"adversarial": IBP(0.1), "activation": "gelu"}, ArgumentError, "IBP takes activations that rise"),
}


@pytest.mark.parametrize(("options", "error", "message"), BAD.values(), ids=BAD)
def test_refusals_change_nothing(options, error, message):
    estimator = fitted(None, warm_start=True)
    before = parameters(estimator)
    with pytest.raises(error, match=message):
        estimator.set_params(**options).fit(X, Y)
    assert np.array_equal(parameters(estimator), before)
