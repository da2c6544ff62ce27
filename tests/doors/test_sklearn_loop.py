"""Whole epochs in the compiled loop end where the same epochs end call by call."""

import signal

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_digits

import fusemlp
from fusemlp import Callback
from fusemlp.describe.optimizers import Cosine, ReduceOnPlateau
from fusemlp.runtime.programs import BoundProgram
from fusemlp.sklearn import MLPClassifier, MLPRegressor
from fusemlp.sklearn.batches import CalledBatches, ResidentBatches

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

DIGITS = load_digits(return_X_y=True)
DIGITS = (DIGITS[0][:500] / 16.0, DIGITS[1][:500])
DIABETES = load_diabetes(return_X_y=True)
COMMON = {"hidden_layer_sizes": (12, 9), "batch_size": 64, "max_iter": 6, "random_state": 0}
WEIGHT = 0.5 + np.random.default_rng(0).random(500)

CLASSIFIERS = {
    "adam": {},
    "one batch": {"batch_size": 500},
    "no short batch": {"batch_size": 50},
    "strong penalty": {"alpha": 10.0},
    "no penalty": {"alpha": 0.0},
    "adamw": {"solver": "adamw", "alpha": 0.1},
    "sgd": {"solver": "sgd", "momentum": 0.0, "learning_rate_init": 0.1, "alpha": 0.1},
    "momentum": {"solver": "sgd", "learning_rate_init": 0.05, "nesterovs_momentum": False},
    "invscaling": {"solver": "sgd", "learning_rate": "invscaling", "learning_rate_init": 0.1},
    "adaptive": {"solver": "sgd", "learning_rate": "adaptive", "n_iter_no_change": 1, "tol": 0.5},
    "early stopping": {"early_stopping": True, "n_iter_no_change": 1},
    "in order": {"shuffle": False},
    "clipped": {"clip_norm": 0.05, "alpha": 1.0},
    "dropout": {"dropout": [0.4, 0.1]},
    "prelu": {"activation": "prelu"},
    "gelu": {"activation": "gelu", "label_smoothing": 0.1},
    "balanced": {"class_weight": "balanced"},
    "cosine": {"learning_rate": Cosine(0.01)},
    "plateau": {"learning_rate": ReduceOnPlateau(0.01, patience=1)},
}


def assert_alike(fit):
    """Assert that ``fit`` ends alike if no model has a loop."""
    one = fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fusemlp.sklearn.base.ResidentBatches", lambda *rules, **_: CalledBatches(*rules))
        other = fit()
    # some dozens of steps of a few thousand roundings in float64, of which Adam's first enlarge those near zero
    assert one.n_iter_ == other.n_iter_
    np.testing.assert_allclose(one.loss_curve_, other.loss_curve_, rtol=1e-9)
    for name in ("coefs_", "intercepts_"):
        for mine, its in zip(getattr(one, name), getattr(other, name), strict=True):
            np.testing.assert_allclose(mine, its, rtol=1e-6, atol=1e-8)
    assert one.learning_rate_ == other.learning_rate_
    if one.validation_scores_ is not None:
        np.testing.assert_allclose(one.validation_scores_, other.validation_scores_)


@pytest.mark.parametrize("options", CLASSIFIERS.values(), ids=CLASSIFIERS)
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["", "weighted"])
def test_classifiers(options, weight):
    assert_alike(lambda: MLPClassifier(**COMMON | options).fit(*DIGITS, sample_weight=weight))


@pytest.mark.parametrize("loss", ["squared_error", "poisson", "absolute_error", fusemlp.Huber(5.0), "quantile"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_regressors(loss, outputs):
    X, y = DIABETES
    # per column another scale
    y = (y[:, None] / 100.0 / np.arange(1, outputs + 1)).squeeze()
    options = COMMON | {"alpha": 1.0, "solver": "sgd", "learning_rate_init": 0.01}
    assert_alike(lambda: MLPRegressor(loss, **options).fit(X, y))


class Batchwise(Callback):
    """Hears of every batch."""

    def __init__(self):
        self.begun, self.ended = [], []

    def on_batch_begin(self, engine, batch):
        self.begun.append(batch)

    def on_batch_end(self, engine, batch):
        self.ended.append((batch, engine.update_count))


def test_who_hears_of_every_batch_changes_no_bit():
    listener = Batchwise()
    heard = MLPClassifier(**COMMON, callbacks=[listener]).fit(*DIGITS)
    plain = MLPClassifier(**COMMON).fit(*DIGITS)
    assert heard.loss_curve_ == plain.loss_curve_
    for mine, its in zip(heard.coefs_, plain.coefs_, strict=True):
        assert mine.tobytes() == its.tobytes()
    assert listener.begun == [batch for batch, _ in listener.ended] == list(range(8)) * 6
    assert [count for _, count in listener.ended] == list(range(1, 49))


@pytest.mark.parametrize("launch", [1, 2, 3, 6])
def test_ctrl_c_ends_training_after_the_launch(launch, monkeypatch):
    """Launches of 12 steps, epochs of 8 batches, all of one block: the last epoch may be cut off."""
    run, launches = BoundProgram.run_many, []

    def pressing(bound, count):
        launches.append(count)
        if len(launches) == launch:
            signal.raise_signal(signal.SIGINT)
        run(bound, count)

    monkeypatch.setattr(BoundProgram, "run_many", pressing)
    monkeypatch.setattr("fusemlp.runtime.programs.resident_chunk", lambda *_: 12)
    with pytest.warns(UserWarning, match="interrupted by user"):
        model = MLPClassifier(**COMMON | {"max_iter": 9}).fit(*DIGITS)
    assert launches == [12] * launch and model.n_iter_ == 12 * launch // 8


class Ended(Callback):
    """Presses Ctrl-C twice after an epoch, and hears of the end."""

    ended = 0

    def on_epoch_end(self, engine, epoch, logs):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    def on_train_end(self, engine, history):
        self.ended += 1


def test_callbacks_hear_of_the_end_after_a_second_ctrl_c():
    listener = Ended()
    with pytest.warns(UserWarning, match="interrupted by user"):
        model = MLPClassifier(**COMMON, callbacks=[listener]).fit(*DIGITS)
    assert model.n_iter_ == listener.ended == 1


def loops(weight=None, **options):
    """Return whether a fit trains in launches of many steps."""
    used = []
    original = ResidentBatches.loss

    def seen(self, *arguments):
        used.append(True)
        return original(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResidentBatches, "loss", seen)
        MLPClassifier(**COMMON | options).fit(*DIGITS, sample_weight=weight)
    return bool(used)


def test_what_goes_through_the_loop():
    assert loops() and loops(weight=WEIGHT) and loops(early_stopping=True)
    assert not loops(solver="lbfgs")
    # a batch in which no row counts is passed over, which the loop cannot
    assert not loops(weight=np.where(np.arange(500) < 250, 0.0, 1.0))
