"""The end of a training and its results; also the facts of scikit-learn's own tests that read private names."""

import os
import signal

import numpy as np
import pytest
import scipy.sparse
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split

import fusemlp
from fusemlp import EarlyStopping
from fusemlp.sklearn import MLPClassifier, MLPRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

X, Y = load_digits(n_class=2, return_X_y=True)
X, Y = X[:100] / 16.0, Y[:100]


@pytest.mark.parametrize("patience", [1, 2, 5, 20])
def test_training_ends_when_more_epochs_than_the_patience_bring_nothing(patience):
    tol = 0.01
    estimator = MLPClassifier(solver="sgd", tol=tol, max_iter=3000, n_iter_no_change=patience, random_state=0)
    losses = np.array(estimator.fit(X, Y).loss_curve_)
    best = np.minimum.accumulate(np.concatenate([[np.inf], losses]))[:-1]
    idle = losses > best - tol
    assert estimator.n_iter_ < 3000
    assert idle[-(patience + 1) :].all() and not idle[-(patience + 2)]
    # nowhere before were there as many in a row
    runs = "".join("x" if one else " " for one in idle[:-1]).split()
    assert max(map(len, runs), default=0) <= patience


def test_without_a_patience_training_goes_to_the_end():
    estimator = MLPClassifier(solver="sgd", tol=1e9, max_iter=60, n_iter_no_change=np.inf, hidden_layer_sizes=4)
    with pytest.warns(ConvergenceWarning, match=r"Maximum iterations \(60\) reached"):
        estimator.fit(X, Y)
    assert estimator.n_iter_ == 60 == len(estimator.loss_curve_)


class PressCtrlC:
    """Press Ctrl-C during the third batch."""

    def on_batch_end(self, engine, batch):
        if batch == 2:
            os.kill(os.getpid(), signal.SIGINT)


class RaiseInterrupt:
    def on_epoch_end(self, engine, epoch, logs):
        raise KeyboardInterrupt


@pytest.mark.parametrize("callback, epochs", [(PressCtrlC(), 0), (RaiseInterrupt(), 1)])
def test_ctrl_c_ends_training_with_a_warning_and_keeps_the_model(callback, epochs):
    estimator = MLPClassifier(batch_size=20, callbacks=[callback], random_state=0)
    with pytest.warns(UserWarning, match="Training interrupted by user"):
        estimator.fit(X, Y)
    assert estimator.n_iter_ == epochs
    untrained = MLPClassifier(random_state=0, max_iter=1, learning_rate_init=1e-300).fit(X, Y)
    assert not np.array_equal(estimator.coefs_[0], untrained.coefs_[0])
    assert estimator.predict(X).shape == (100,)


def test_callbacks_hear_of_the_stages_and_can_end_training():
    heard = []

    class Listener:
        def on_train_begin(self, engine):
            heard.append("begin")

        def on_epoch_end(self, engine, epoch, logs):
            heard.append((epoch, sorted(logs)))
            engine.stop_training = epoch == 1

        def on_train_end(self, engine, history):
            heard.append(("end", history.epochs))

    estimator = MLPRegressor(callbacks=[Listener()], hidden_layer_sizes=3).fit(X, Y, X_val=X[:9], y_val=Y[:9])
    names = ["learning_rate", "loss", "val_loss", "val_score"]
    assert heard == ["begin", (0, names), (1, names), ("end", [0, 1])]
    assert estimator.n_iter_ == 2


def test_own_held_out_rows_are_scored_and_decide():
    kept, held = slice(0, 70), slice(70, 100)
    options = {"hidden_layer_sizes": 5, "max_iter": 40, "random_state": 1, "learning_rate_init": 0.05}
    stopping = MLPClassifier(early_stopping=True, n_iter_no_change=3, **options)
    stopping.fit(X[kept], Y[kept], X_val=X[held], y_val=Y[held])
    assert stopping.n_iter_ < 40 and stopping.best_loss_ is None
    assert stopping.score(X[held], Y[held]) == stopping.best_validation_score_ == max(stopping.validation_scores_)
    # Training used all rows of X.
    assert stopping.t_ == 70 * stopping.n_iter_

    watching = MLPClassifier(**options).fit(X[kept], Y[kept], X_val=X[held], y_val=Y[held])
    assert len(watching.validation_scores_) == watching.n_iter_
    assert watching.score(X[held], Y[held]) == watching.validation_scores_[-1]
    plain = MLPClassifier(**options).fit(X[kept], Y[kept])
    np.testing.assert_array_equal(watching.coefs_[0], plain.coefs_[0])
    assert plain.validation_scores_ is None


def row_losses(estimator, rows, targets):
    """Return the losses of rows by scikit-learn's definitions, from the predictions."""
    if isinstance(estimator, MLPRegressor):
        predicted = estimator.predict(rows)
        if estimator.loss == "poisson":
            return targets * np.log(np.where(targets > 0, targets, 1.0) / predicted) - targets + predicted
        return (0.5 * (predicted - targets) ** 2).reshape(len(rows), -1).mean(axis=1)
    chances = estimator.predict_proba(rows)
    if targets.ndim == 2:
        return -np.log(np.where(targets == 1, chances, 1.0 - chances)).sum(axis=1)
    return -np.log(chances[np.arange(len(rows)), np.searchsorted(estimator.classes_, targets)])


LABELS = np.column_stack([Y, 1 - Y, Y])
WATCHED = {
    "two classes": (MLPClassifier(), Y),
    "three classes": (MLPClassifier(), np.where(X[:, 0] > 1.0, "c", np.where(Y, "a", "b"))),
    "several labels": (MLPClassifier(), LABELS),
    "squares": (MLPRegressor(), X[:, 0] * 3.0),
    "two values": (MLPRegressor(), LABELS[:, :2] * 0.5),
    "counts": (MLPRegressor("poisson"), LABELS[:, 0] * 2.0),
}


@pytest.mark.parametrize("name", WATCHED)
def test_the_loss_of_held_out_rows_is_recorded(name):
    model, targets = WATCHED[name]
    options = {"hidden_layer_sizes": 5, "max_iter": 4, "random_state": 1, "alpha": 10.0, "dropout": 0.2}
    estimator = clone(model).set_params(**options).fit(X[:70], targets[:70], X_val=X[70:], y_val=targets[70:])
    assert len(estimator.validation_loss_curve_) == estimator.n_iter_ == 4
    expected = row_losses(estimator, X[70:], targets[70:]).mean()
    assert estimator.validation_loss_curve_[-1] == pytest.approx(expected, rel=1e-12)
    assert estimator.validation_scores_[-1] == pytest.approx(estimator.score(X[70:], targets[70:]), rel=1e-12)


def test_the_loss_of_held_out_rows_has_the_weights_of_the_loss():
    given = {"hidden_layer_sizes": 5, "max_iter": 3, "random_state": 1}
    weighted = MLPClassifier(class_weight={0: 3.0, 1: 1.0}, **given).fit(X[:70], Y[:70], X_val=X[70:], y_val=Y[70:])
    losses, weight = row_losses(weighted, X[70:], Y[70:]), np.where(Y[70:], 1.0, 3.0)
    assert weighted.validation_loss_curve_[-1] == pytest.approx(np.average(losses, weights=weight), rel=1e-12)
    # the score counts rows
    assert weighted.validation_scores_[-1] == weighted.score(X[70:], Y[70:])

    # balanced are the training rows, of which the first class has 10
    rows = np.concatenate([np.flatnonzero(Y == 0)[:10], np.flatnonzero(Y == 1)[:40]])
    balanced = MLPClassifier(class_weight="balanced", **given)
    balanced.fit(X[rows], Y[rows], X_val=X, y_val=Y)
    losses, weight = row_losses(balanced, X, Y), np.where(Y, 50 / (2 * 40), 50 / (2 * 10))
    assert balanced.validation_loss_curve_[-1] == pytest.approx(np.average(losses, weights=weight), rel=1e-12)
    several = MLPClassifier(class_weight="balanced", **given).fit(X, LABELS, X_val=X[:50], y_val=LABELS[:50])
    assert len(several.validation_loss_curve_) == 3

    weight = np.linspace(0.5, 2.0, len(Y))
    split = MLPClassifier(early_stopping=True, n_iter_no_change=99, **given)
    split.set_params(learning_rate_init=1e-300)
    split.fit(X, Y, weight)
    # the rows are drawn after the initial weights
    state = np.random.RandomState(1)
    for array in (one for layer in zip(split.coefs_, split.intercepts_, strict=True) for one in layer):
        state.uniform(size=array.shape)
    _, held = train_test_split(np.arange(len(Y)), random_state=state, test_size=0.1, stratify=Y)
    losses = row_losses(split, X[held], Y[held])
    expected = np.average(losses, weights=weight[held])
    assert split.validation_loss_curve_ == [pytest.approx(expected, rel=1e-12)] * 3


def test_the_loss_of_held_out_rows_without_any_and_over_warm_starts():
    options = {"hidden_layer_sizes": 5, "max_iter": 2, "random_state": 1, "warm_start": True}
    estimator = MLPClassifier(**options).fit(X, Y)
    assert estimator.validation_loss_curve_ is None
    stopping = MLPClassifier(early_stopping=True, **options)
    stopping.fit(X, Y).fit(X, Y)
    assert len(stopping.validation_loss_curve_) == len(stopping.validation_scores_) == 4
    sparse = scipy.sparse.csr_matrix(X)
    lone = {**options, "warm_start": False}
    same = [MLPClassifier(**lone).fit(rows, Y, X_val=rows, y_val=Y) for rows in (X, sparse)]
    assert same[0].validation_loss_curve_ == same[1].validation_loss_curve_


def test_a_loss_of_held_out_rows_that_is_not_finite_is_a_divergence():
    far, target = X.copy(), X[:, 20]
    far[3, 20] = 1e200
    estimator = MLPRegressor(hidden_layer_sizes=4, max_iter=3, warm_start=True, random_state=0)
    with pytest.raises(fusemlp.DivergenceError, match=r"^val_loss: it became NaN or infinite in epoch 1"):
        estimator.fit(X, target, X_val=far, y_val=target)
    assert not hasattr(estimator, "coefs_")
    predicted = estimator.fit(X, target).predict(X)
    with pytest.raises(fusemlp.DivergenceError):
        estimator.fit(X, target, X_val=far, y_val=target)
    np.testing.assert_array_equal(estimator.predict(X), predicted)


def test_ready_made_callbacks(tmp_path):
    options = {"hidden_layer_sizes": 5, "max_iter": 60, "random_state": 1, "learning_rate_init": 0.05}
    stop = EarlyStopping("val_score", patience=3, restore_best_weights=True)
    best = fusemlp.ModelCheckpoint(tmp_path / "best.safetensors", "val_score", save_best_only=True)
    callbacks = [stop, fusemlp.CSVLogger(tmp_path / "log.csv"), best, fusemlp.ProgressBar()]
    estimator = MLPClassifier(callbacks=callbacks, **options).fit(X[:70], Y[:70], X_val=X[70:], y_val=Y[70:])
    assert estimator.n_iter_ == stop.best_epoch + 4 < 60
    assert estimator.score(X[70:], Y[70:]) == max(estimator.validation_scores_) == stop.best
    header, *rows = (tmp_path / "log.csv").read_text().splitlines()
    assert header == "epoch,loss,learning_rate,val_loss,val_score"
    assert [float(row.split(",")[1]) for row in rows] == estimator.loss_curve_
    best = fusemlp.load(tmp_path / "best.safetensors")
    np.testing.assert_array_equal(best.state_dict()["0.weight"], estimator.coefs_[0].T)


def test_a_callback_that_watches_what_is_not_logged_is_refused_before_training():
    estimator = MLPClassifier(callbacks=[EarlyStopping("val_score")])
    with pytest.raises(ValueError, match=r"monitor: 'val_score' is not among what this fit logs \(loss, learning_rate"):
        estimator.fit(X, Y)
    assert not hasattr(estimator, "coefs_")
