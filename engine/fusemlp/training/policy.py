"""The policy of ``Engine.fit``: validation, early stopping, the learning rate on a plateau, the best weights."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fusemlp.describe.metrics import rises
from fusemlp.describe.schedules import ReduceOnPlateau, plateau_step
from fusemlp.inputs.arrays import Array
from fusemlp.runtime.forward import metrics_of
from fusemlp.training.history import DIVERGED
from fusemlp.training.loop import Policy
from fusemlp_kernels.errors import DivergenceError

if TYPE_CHECKING:
    from fusemlp.training.history import FitState
    from fusemlp.training.plan import FitPlan
    from fusemlp.training.trainer import Trainer
    from fusemlp.training.validation import Validation
    from fusemlp_kernels.contract import LossSpec


# Larger features are not standardised, and then the loss of most networks overflows.
LARGE_FEATURE = 100.0


@dataclass(eq=False)
class FitPolicy(Policy):
    """Decides as ``fit`` documents it for ``engine``, which trains by ``plan`` on X (n, K) up to epoch ``last_epoch``.

    X is as the network takes it. ``rows`` is a function from the epoch to its rows.
    """

    rewinds: ClassVar[bool] = True

    engine: Trainer
    plan: FitPlan
    X: Any
    state: FitState
    spec: LossSpec
    rows: Callable[[int], Array]
    last_epoch: int
    validation: Validation | None
    # of ``time.monotonic``
    deadline: float
    # the first epoch that may be the best: before it the task still changes
    settles: int = 0
    # whether rows may be asked for before their epoch
    draws_ahead: bool = False

    def __post_init__(self) -> None:
        self.patience = self.plan.early_stopping
        self.rule = self.engine.optimizer.rule()
        self.schedule = self.engine.optimizer.schedule.over(self.state.total_updates)
        self._validate = None if self.validation is None else self.validation.of(self.engine)
        self._keeps_best = self.validation is not None or bool(self.state.monitor)
        self._monitor = self.state.monitor or ("loss" if self.validation is None else "val_loss")
        self._sign = -1.0 if rises(self._monitor) else 1.0
        self._ahead: dict[int, Array] = {}
        # of the validation rows after the last epoch
        self._held: dict[str, float] = {}

    def begin(self) -> None:
        """Bind the state of the fit to the engine, and set the learning rate."""
        engine, state = self.engine, self.state
        state.last_epoch = self.last_epoch
        state.history.stopped = ""
        if self.patience is not None and "early stopping" not in state.history.in_use:
            state.history.in_use.append("early stopping")
        engine.fit_state = state
        if not self.plan.resume:
            engine.best_parameters = None
        engine.rates.follow(self.schedule, state.plateau[2])

    def wanted(self) -> int:
        """Return the epochs that are left, or 0 after ``patience`` epochs without a better monitored quantity."""
        state = self.state
        if self.patience is not None and state.waited >= self.patience:
            state.history.stopped = f"{self._monitor} has not improved for {state.waited} epochs{self._restored}"
            return 0
        return max(0, state.last_epoch - state.epoch)

    @property
    def _restored(self) -> str:
        return f"; the weights of epoch {(self.state.history.best_epoch or 0) + 1} were restored"

    def late(self) -> bool:
        """Return whether the deadline is over."""
        return time.monotonic() >= self.deadline

    def order(self, epoch: int) -> Array:
        """Return the rows of an epoch in their order."""
        drawn = self._ahead.pop(epoch, None)
        return self.rows(epoch) if drawn is None else drawn

    def launched(self, following: range) -> None:
        """Draw the rows of the epochs that follow while the device works."""
        if self.draws_ahead:
            self._ahead = {epoch: self.rows(epoch) for epoch in following if epoch < self.last_epoch}

    def validate(self) -> bool:
        """Evaluate the validation rows; return whether their loss is finite."""
        if self._validate is not None:
            self._held = self._agreed({f"val_{name}": value for name, value in self._validate().items()})
        return math.isfinite(self._held.get("val_loss", 0.0))

    def _agreed(self, logs: dict[str, float]) -> dict[str, float]:
        """Return the quantities by which all ranks decide."""
        return dict(zip(logs, self.engine.ranks.of_first(list(logs.values())).tolist(), strict=True))

    def end_epoch(self, stats: Array, rate: float) -> dict[str, float]:
        """Judge the epoch."""
        engine, state = self.engine, self.state
        logs = metrics_of(stats, self.spec) | self._held
        if engine.privacy is not None:
            logs["epsilon"] = engine.ledger.spent(engine.update_count)["epsilon"]
        logs["learning_rate"] = rate
        logs = self._agreed(logs)
        if state.epoch >= self.settles:
            self._judge(self._sign * logs[self._monitor])
        engine.epochs_trained = state.epoch + 1
        return logs

    def _judge(self, watched: float) -> None:
        """Keep the best weights, and lower the learning rate on a plateau, by a quantity that is to fall."""
        engine, state = self.engine, self.state
        if watched < state.best_loss:
            state.best_loss, state.waited = watched, 0
            if self._keeps_best:
                state.history.best_epoch = state.epoch
                if self.patience is not None:
                    engine.keep_best()
        else:
            state.waited += 1
        if isinstance(self.schedule, ReduceOnPlateau):
            state.plateau = plateau_step(self.schedule, state.plateau, watched)
            engine.rates.rescale(state.plateau[2])

    def divergence(self, rate: float) -> DivergenceError:
        """Return an error that names the likely cause."""
        largest, epoch = self.engine.inputs.largest(self.X), self.state.epoch + 1
        held = not math.isfinite(self._held.get("val_loss", 0.0))
        if largest > LARGE_FEATURE and not self.engine.normalise:
            cause = (
                f"features as large as {largest:.3g} were not scaled: standardise them (mean 0, variance 1), as an "
                "engine with normalise=True does"
            )
        else:
            lower = min(rate / 10, 0.1)
            cause = f"a learning rate of {rate:.3g} is too high for this network: try {lower:.3g}"
            cause += "" if self.engine.privacy else ", or clip_norm=1.0"
            cause += "; or the validation rows are far from those of training: compare the two" if held else ""
        self.state.history.stopped = f"{DIVERGED} in epoch {epoch}{' on the validation rows' if held else ''}"
        return DivergenceError(
            f"{'val_' * held}loss: it became NaN or infinite in epoch {epoch}. Likely cause: {cause}. The engine is "
            "back at the state before that epoch"
        )

    def finish(self, *, interrupted: bool) -> None:
        """Say why training ended early, and go back to the best weights unless Ctrl-C ended it."""
        engine, state = self.engine, self.state
        if interrupted:
            place = f"in epoch {state.epoch + 1}" if state.batch else f"after epoch {state.epoch}"
            state.history.stopped = f"interrupted {place}"
        elif engine.stop_training:
            state.history.stopped = "a callback stopped the training"
        elif not state.history.stopped and state.epoch < state.last_epoch:
            restored = self.patience is not None and engine.keeps_best
            state.history.stopped = f"the time limit was reached{self._restored if restored else ''}"
        if self.patience is not None and engine.keeps_best and not interrupted:
            engine.go_to_best()
