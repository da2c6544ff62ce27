"""Training epoch by epoch: scikit-learn's learning rates, its signs of convergence, and what it says of them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from fusemlp.callbacks import deferred_interrupt, overrides
from fusemlp.describe.schedules import ReduceOnPlateau, plateau_step
from fusemlp.sklearn.batches import Batches
from fusemlp.sklearn.loop import Loop
from fusemlp.sklearn.model import Model
from fusemlp.training.history import History
from fusemlp.training.loop import ROWS_AT_ONCE

Array = np.ndarray[Any, Any]

# "adaptive" gives up once the rate is no greater than this.
SMALLEST_RATE = 1e-6
ADAPTIVE_DIVISOR = 5.0


@dataclass(frozen=True)
class Validation:
    """Held-out rows, their targets as the model predicts them, and weights; ``decides``: their score ends training."""

    X: Any
    truth: Array
    weight: Array | None
    decides: bool


def train(
    estimator: Any,
    model: Model,
    batches: Batches | Loop,
    validation: Validation | None,
    random_state: np.random.RandomState,
    callbacks: list[Any],
    *,
    incremental: bool,
) -> None:
    """Train for ``max_iter`` epochs, or for one if ``incremental``, or until nothing improves any more.

    The estimator's ``n_iter_``, ``t_``, ``loss_`` and the other accounts follow. Ctrl-C ends it after the batch with a
    warning; what was learned until then is kept.
    """
    engine = model.engine
    engine.stop_training = False
    engine.history = history = History()
    order = np.arange(batches.n)
    listeners = _BatchListeners(engine, callbacks)
    estimator.n_iter_ = 0
    estimator.learning_rate_ = model.learning_rate
    try:
        with deferred_interrupt() as pressed:
            stop = listeners.end(pressed)
            _call(callbacks, "on_train_begin", engine)
            begin = listeners.begin if listeners.listening else None
            while estimator.n_iter_ < estimator.max_iter:
                count = _undecided(estimator, batches.at_once)
                before = random_state.get_state() if estimator.shuffle and count > 1 else None
                orders = []
                for _ in range(count):
                    if estimator.shuffle:
                        # the permutations pile up from epoch to epoch, as scikit-learn's do
                        order = order[_permutation(random_state, batches.n)]
                    orders.append(order)
                began, updates = time.perf_counter(), engine.update_count
                _call(callbacks, "on_epoch_begin", engine, estimator.n_iter_)
                listeners.batch = 0
                losses = batches.epochs(orders, stop, begin)
                if before is not None and pressed():
                    # epochs that did not begin have drawn nothing
                    random_state.set_state(before)
                    for _ in range(-(-(engine.update_count - updates) // batches.batches)):
                        _permutation(random_state, batches.n)
                seconds = (time.perf_counter() - began) / max(1, len(losses))
                stopping = False
                for loss in losses:
                    stopping = _end_epoch(estimator, model, loss, validation, batches.n)
                    updates += batches.batches
                    if len(losses) > 1:
                        estimator.learning_rate_ = engine.rates.after(updates)
                    logs = _logs(estimator, validation)
                    history.record(estimator.n_iter_ - 1, logs, seconds)
                    _call(callbacks, "on_epoch_end", engine, estimator.n_iter_ - 1, logs)
                if len(losses) < len(orders) or stopping or incremental or engine.stop_training or pressed():
                    break
                if estimator.n_iter_ == estimator.max_iter:
                    warnings.warn(
                        f"Stochastic Optimizer: Maximum iterations ({estimator.max_iter}) reached and the optimization "
                        "hasn't converged yet.",
                        ConvergenceWarning,
                        stacklevel=5,
                    )
            if pressed():
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        warnings.warn("Training interrupted by user.", stacklevel=5)
    _call(callbacks, "on_train_end", engine, history)


def _permutation(random_state: np.random.RandomState, rows: int) -> Array:
    permutation = np.arange(rows)
    random_state.shuffle(permutation)
    return permutation


def epochs_at_once(estimator: Any, model: Model, rows: int, validation: Validation | None, callbacks: list[Any]) -> int:
    """The most epochs of so many rows that a launch may go through, for nobody has to do with one before the next."""
    by_epoch = model.rates.kind == "invscaling" or isinstance(model.engine.optimizer.schedule, ReduceOnPlateau)
    if validation is not None or callbacks or estimator.verbose or by_epoch:
        return 1
    return max(1, int(min(estimator.max_iter, estimator.n_iter_no_change + 1, ROWS_AT_ONCE // rows)))


def _undecided(estimator: Any, at_once: int) -> int:
    """How many epochs, ``at_once`` at most, will be trained whatever their losses are."""
    patience = estimator.n_iter_no_change + 1 - estimator._stalled_epochs
    return max(1, int(min(at_once, estimator.max_iter - estimator.n_iter_, patience)))


class _BatchListeners:
    """The callbacks that want to hear of batches; ``batch`` counts those of an epoch."""

    def __init__(self, engine: Any, callbacks: list[Any]) -> None:
        self.engine = engine
        self.starters = [callback for callback in callbacks if overrides(callback, "on_batch_begin")]
        self.watchers = [callback for callback in callbacks if overrides(callback, "on_batch_end")]
        self.batch = 0

    @property
    def listening(self) -> bool:
        """Whether there are any."""
        return bool(self.starters or self.watchers)

    def begin(self) -> None:
        """Before a batch."""
        # what a callback computes is its own affair: only the step is silent
        with np.errstate(all="warn"):
            _call(self.starters, "on_batch_begin", self.engine, self.batch)

    def end(self, interrupted: Callable[[], bool]) -> Callable[[], bool]:
        """Asked after each batch: whether training ends there."""
        if not self.listening:
            return interrupted

        def stop() -> bool:
            with np.errstate(all="warn"):
                _call(self.watchers, "on_batch_end", self.engine, self.batch)
            self.batch += 1
            return interrupted() or bool(self.engine.stop_training)

        return stop


def _call(callbacks: list[Any], stage: str, *arguments: Any) -> None:
    for callback in callbacks:
        method = getattr(callback, stage, None)
        if method is not None:
            method(*arguments)


def logged(held_out: bool) -> list[str]:
    """The names of what callbacks are told of an epoch."""
    return ["loss", "learning_rate", *(["val_score"] if held_out else [])]


def _logs(estimator: Any, validation: Validation | None) -> dict[str, float]:
    logs = {"loss": estimator.loss_, "learning_rate": estimator.learning_rate_}
    if validation is not None:
        logs["val_score"] = estimator.validation_scores_[-1]
    return logs


def _end_epoch(estimator: Any, model: Model, loss: float, validation: Validation | None, rows: int) -> bool:
    """Write down an epoch and set the rate of the next; whether training has converged."""
    estimator.n_iter_ += 1
    estimator.t_ += rows
    estimator.loss_ = loss
    estimator.loss_curve_.append(loss)
    if estimator.verbose:
        print(f"Iteration {estimator.n_iter_}, loss = {loss:.8f}")
    if validation is not None:
        _score(estimator, model, validation)
    by_score = validation is not None and validation.decides
    if not by_score:
        _count(estimator, loss > estimator.best_loss_ - estimator.tol)
        # in this order a NaN is no improvement
        if loss < estimator.best_loss_:
            estimator.best_loss_ = loss
    rates = model.rates
    if rates.kind == "invscaling":
        model.scale_rate((estimator.t_ + 1) ** -rates.power)
    elif rates.kind == "schedule" and isinstance(model.engine.optimizer.schedule, ReduceOnPlateau):
        watched = -estimator.validation_scores_[-1] if validation is not None else loss
        model.plateau = plateau_step(model.engine.optimizer.schedule, model.plateau, watched)
        model.scale_rate(model.plateau[2])
    stopping = False
    if estimator._stalled_epochs > estimator.n_iter_no_change:
        stopping = _converged(estimator, model, "Validation score" if by_score else "Training loss")
    estimator.learning_rate_ = model.learning_rate
    return stopping


def _count(estimator: Any, stalled: bool) -> None:
    estimator._stalled_epochs = estimator._stalled_epochs + 1 if stalled else 0


def _score(estimator: Any, model: Model, validation: Validation) -> None:
    """The score of the held-out rows; if it decides, the best parameters so far are kept."""
    score = estimator._score_of(model.predict(validation.X), validation.truth, validation.weight)
    estimator.validation_scores_.append(score)
    if estimator.verbose:
        print(f"Validation score: {score:f}")
    best = estimator.best_validation_score_
    if validation.decides:
        _count(estimator, score < best + estimator.tol)
    if score > best:
        estimator.best_validation_score_ = score
        if validation.decides:
            estimator._best_parameters = model.parameters()


def _converged(estimator: Any, model: Model, watched: str) -> bool:
    """What follows when nothing has improved for too long: the end, or with "adaptive" a smaller rate."""
    said = (
        f"{watched} did not improve more than tol={estimator.tol:f} for {estimator.n_iter_no_change:d} "
        "consecutive epochs."
    )
    rate = model.learning_rate
    adaptive = model.rates.kind == "adaptive"
    if adaptive and rate > SMALLEST_RATE:
        rate /= ADAPTIVE_DIVISOR
        model.scale_rate(rate / model.rates.initial)
        estimator._stalled_epochs = 0
        if estimator.verbose:
            print(f"{said} Setting learning rate to {rate:f}")
        return False
    if estimator.verbose:
        print(f"{said} {'Learning rate too small. ' if adaptive else ''}Stopping.")
    return True
