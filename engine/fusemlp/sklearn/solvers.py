"""The solvers of scikit-learn's estimators: stochastic ones, L-BFGS, and the warning that a fit has not converged."""

from __future__ import annotations

import warnings
from collections import deque
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
from sklearn.exceptions import ConvergenceWarning

from fusemlp.callbacks.forms import deferred_interrupt
from fusemlp.describe.checks import counted
from fusemlp.describe.optimizers import ReduceOnPlateau, plateau_step
from fusemlp.inputs.arrays import Array
from fusemlp.sklearn.batches import EstimatorBatches, HeldLoss
from fusemlp.sklearn.model import Model
from fusemlp.training.loop import EpochLoop, Policy
from fusemlp.training.trainer import FitState
from fusemlp_kernels.errors import DivergenceError

# "adaptive" gives up once the rate is no greater than this.
SMALLEST_RATE = 1e-6
ADAPTIVE_DIVISOR = 5.0


def train(epochs: EpochLoop[SklearnPolicy], *, incremental: bool) -> None:
    """Run the loop. Ctrl-C ends it after the batch with a warning; the parameters are kept."""
    try:
        with deferred_interrupt() as pressed:
            epochs.begin()
            epochs.drive(pressed)
            if pressed():
                raise KeyboardInterrupt
            if not incremental:
                warn_unconverged(epochs)
    except KeyboardInterrupt:
        warnings.warn("Training interrupted by user.", stacklevel=5)
    # also after a second Ctrl-C, which waits for nothing
    epochs.finish(interrupted=False)


def warn_unconverged(epochs: EpochLoop[SklearnPolicy]) -> None:
    """Warn if all epochs were trained and the losses still improve."""
    estimator, message = epochs.policy.estimator, None
    if estimator.n_iter_ == estimator.max_iter and not (epochs.policy.converged or epochs.engine.stop_training):
        message = (
            f"Stochastic Optimizer: Maximum iterations ({estimator.max_iter}) reached and the optimization "
            "hasn't converged yet."
        )
    fit_ended(message, stacklevel=6)


@dataclass(eq=False)
class SklearnPolicy(Policy):
    """Decides for an estimator as scikit-learn does, and keeps its accounts.

    Training ends when more than ``n_iter_no_change`` epochs in a row do not improve the loss, or the validation score
    with ``early_stopping``, by ``tol``. The order of the rows comes from ``random_state``. The estimator's ``n_iter_``,
    ``t_``, ``loss_`` and the other accounts follow.
    """

    estimator: Any
    model: Model
    batches: EstimatorBatches
    state: FitState
    held: HeldLoss | None
    random_state: np.random.RandomState
    # coefs, intercepts and slopes with the best validation score
    best: tuple[list[Array], list[Array], list[Any]] | None
    converged: bool = False
    # the number of first epochs that are not judged: in them the task still changes
    settles: int = 0

    def __post_init__(self) -> None:
        self.schedule = self.model.schedule
        self._order = np.arange(self.batches.n)
        # of the epochs that have not ended
        self._orders: deque[Array] = deque()

    def begin(self) -> None:
        self.estimator.n_iter_ = 0
        self.estimator.learning_rate_ = self.model.engine.learning_rate

    def wanted(self) -> int:
        """Return the epochs after which training may have converged, or 0 when it has."""
        estimator, left = self.estimator, self.state.last_epoch - self.state.epoch
        if self.converged or left <= 0:
            return 0
        return max(1, int(min(left, estimator.n_iter_no_change + 1 - estimator._stalled_epochs)))

    def order(self, epoch: int) -> Array:
        """Return the rows of the next epoch, from which the epoch after it is shuffled, as in scikit-learn."""
        if self.estimator.shuffle:
            permutation = np.arange(self.batches.n)
            self.random_state.shuffle(permutation)
            self._order = self._order[permutation]
        self._orders.append(self._order)
        return self._order

    def end_epoch(self, stats: Array, rate: float) -> dict[str, float]:
        """Write down an epoch, set the rate of the next, and decide whether training has converged."""
        estimator, held = self.estimator, self.held
        loss = self.batches.loss(stats, self._orders.popleft())
        estimator.n_iter_ += 1
        estimator.t_ += self.batches.n
        estimator.loss_ = loss
        estimator.loss_curve_.append(loss)
        estimator.learning_rate_ = rate
        if estimator.verbose:
            print(f"Iteration {estimator.n_iter_}, loss = {loss:.8f}")
        if held is not None:
            self._score(held)
        by_score = held is not None and held.rows.decides
        if not by_score and estimator.n_iter_ > self.settles:
            self._count(loss > estimator.best_loss_ - estimator.tol)
            # in this order a NaN is no improvement
            if loss < estimator.best_loss_:
                estimator.best_loss_ = loss
        self._follow_rates(loss)
        if estimator._stalled_epochs > estimator.n_iter_no_change:
            self._stall("Validation score" if by_score else "Training loss")
        logs = {"loss": loss, "learning_rate": estimator.learning_rate_}
        if held is not None:
            logs["val_loss"] = estimator.validation_loss_curve_[-1]
            logs["val_score"] = estimator.validation_scores_[-1]
        return logs

    def _count(self, stalled: bool) -> None:
        self.estimator._stalled_epochs = self.estimator._stalled_epochs + 1 if stalled else 0

    def _score(self, held: HeldLoss) -> None:
        """Record score and loss of the validation rows; if it decides, keep the best parameters so far."""
        estimator, validation = self.estimator, held.rows
        loss, score = held()
        # as in scikit-learn, training goes on where an earlier epoch will be restored
        restores = validation.decides and estimator.best_validation_score_ > -np.inf
        # rows without any weight have no loss
        weighs = validation.loss_weight is None or validation.loss_weight.any()
        if not np.isfinite(loss) and weighs and not restores:
            raise DivergenceError(
                f"val_loss: it became NaN or infinite in epoch {estimator.n_iter_}. Likely causes: validation rows far "
                "from those of training, or too high a learning rate; standardise X, or lower learning_rate_init"
            )
        if score is None or validation.weight is not None:
            predicted = self.model.ask("predict", validation.X)
            score = float(estimator._score_of(predicted, validation.truth, validation.weight))
        estimator.validation_loss_curve_.append(loss)
        estimator.validation_scores_.append(score)
        if estimator.verbose:
            print(f"Validation score: {score:f}")
        if estimator.n_iter_ <= self.settles:
            return
        best = estimator.best_validation_score_
        if validation.decides:
            self._count(score < best + estimator.tol)
        if score > best:
            estimator.best_validation_score_ = score
            if validation.decides:
                self.best = self.model.parameters()

    def _follow_rates(self, loss: float) -> None:
        """Set the next epoch's learning rate where it depends on the epoch."""
        estimator, model = self.estimator, self.model
        schedule = model.engine.optimizer.schedule
        if model.rates.kind == "invscaling":
            self._scale_rate((estimator.t_ + 1) ** -model.rates.power)
        elif (
            model.rates.kind == "schedule"
            and isinstance(schedule, ReduceOnPlateau)
            and estimator.n_iter_ > self.settles
        ):
            watched = loss if self.held is None else -estimator.validation_scores_[-1]
            model.plateau = plateau_step(schedule, model.plateau, watched)
            self._scale_rate(model.plateau[2])

    def _scale_rate(self, scale: float) -> None:
        self.model.engine.rates.rescale(scale)
        self.estimator.learning_rate_ = self.model.engine.learning_rate

    def _stall(self, watched: str) -> None:
        """End training that has not improved for too long, or with "adaptive" lower the learning rate."""
        estimator, rates, rate = self.estimator, self.model.rates, self.model.engine.learning_rate
        said = (
            f"{watched} did not improve more than tol={estimator.tol:f} for {estimator.n_iter_no_change:d} "
            "consecutive epochs."
        )
        adaptive = rates.kind == "adaptive"
        self.converged = not adaptive or rate <= SMALLEST_RATE
        if self.converged:
            said += f"{' Learning rate too small.' if adaptive else ''} Stopping."
        else:
            rate /= ADAPTIVE_DIVISOR
            self._scale_rate(rate / rates.initial)
            estimator._stalled_epochs = 0
            said += f" Setting learning rate to {rate:f}"
        if estimator.verbose:
            print(said)


def minimise(policy: SklearnPolicy) -> None:
    """Minimise the loss of all rows (Liu and Nocedal, 1989); sets ``n_iter_`` and ``loss_``, warns if a limit ended it.

    Arena elements between the tensors have gradient zero, and so stay zero.
    """
    estimator, model = policy.estimator, policy.model
    batches: Any = policy.batches
    memory = model.engine.memory
    backend = memory.backend

    def objective(theta: Array) -> tuple[float, Array]:
        backend.copy_into(memory.params, theta.astype(model.dtype, copy=False))
        return batches.loss_and_gradient(), backend.to_host(memory.grads).astype(np.float64, copy=False)

    result = scipy.optimize.minimize(
        objective,
        backend.to_host(memory.params).astype(np.float64),
        method="L-BFGS-B",
        jac=True,
        options={"maxfun": estimator.max_fun, "maxiter": estimator.max_iter, "gtol": estimator.tol},
    )
    backend.copy_into(memory.params, result.x.astype(model.dtype, copy=False))
    estimator.loss_ = result.fun
    count = estimator.n_iter_ = min(result.nit, estimator.max_iter)
    reason = f"lbfgs failed to converge after {counted(count, 'iteration')}: {result.message}."
    fit_ended(f"{reason} Scale the data, or raise max_iter or max_fun." if result.status else None, stacklevel=5)


# The messages of the fits of a search of fleets, None of those that converged; None outside one.
ENDS: ContextVar[list[str | None] | None] = ContextVar("ENDS", default=None)


def fit_ended(message: str | None, *, stacklevel: int) -> None:
    """Warn with ``message``, or None of a fit that converged; in a search of fleets note it."""
    ends = ENDS.get()
    if ends is not None:
        ends.append(message)
    elif message is not None:
        warnings.warn(message, ConvergenceWarning, stacklevel=stacklevel + 1)
