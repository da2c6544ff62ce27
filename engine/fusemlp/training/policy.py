"""The policy of ``Engine.fit``: validation, early stopping, the learning rate on a plateau, the best weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.describe.schedules import ReduceOnPlateau, plateau_step
from fusemlp.runtime.inference import metrics_of

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session
    from fusemlp.training.history import FitState
    from fusemlp.training.validation import Validation
    from fusemlp_kernels.contract import LossSpec

Array = np.ndarray[Any, Any]


class FitPolicy:
    """Decides for ``engine`` as ``fit`` documents it, up to epoch ``last_epoch``.

    ``order`` is a function from the epoch to its rows. ``best`` are the best parameters so far of a resumed fit.
    """

    def __init__(
        self,
        engine: Session,
        state: FitState,
        spec: LossSpec,
        order: Callable[[int], Array],
        *,
        last_epoch: int,
        validation: Validation | None,
        patience: int | None,
        best: dict[str, Array] | None,
    ) -> None:
        self.engine, self.state, self.spec, self.order = engine, state, spec, order
        self.last_epoch, self.patience, self.best = last_epoch, patience, best
        self.rule = engine.optimizer.rule(total_updates=state.total_updates)
        self.schedule = engine.optimizer.schedule
        self._validate = None if validation is None else validation.of(engine)

    def begin(self) -> None:
        """Bind the state of the fit to the engine, and set the learning rate."""
        engine, state = self.engine, self.state
        state.last_epoch = self.last_epoch
        state.history.stopped = ""
        engine.fit_state = state
        engine.best_parameters = self.best
        engine.use_rule(self.rule, state.plateau[2])

    def wanted(self) -> int:
        """Return the epochs that are left, or 0 after ``patience`` epochs without a better val_loss."""
        state = self.state
        if self.patience is not None and state.waited >= self.patience:
            state.history.stopped = (
                f"val_loss has not improved for {state.waited} epochs; the weights of epoch "
                f"{(state.history.best_epoch or 0) + 1} were restored"
            )
            return 0
        return max(0, state.last_epoch - state.epoch)

    def cut_off(self, begun: int) -> None:
        """Do nothing: an epoch's order depends on its number alone."""

    def end_epoch(self, stats: Array, rate: float) -> dict[str, float]:
        """Validate, keep the best weights, and lower the learning rate on a plateau."""
        engine, state = self.engine, self.state
        logs = dict(metrics_of(stats, self.spec))
        if self._validate is not None:
            logs |= {f"val_{name}": value for name, value in self._validate().items()}
        logs["learning_rate"] = rate
        watched = logs.get("val_loss", logs["loss"])
        if watched < state.best_loss:
            state.best_loss, state.waited = watched, 0
            if self._validate is not None:
                state.history.best_epoch = state.epoch
                if self.patience is not None:
                    self.best = engine.state_dict()
        else:
            state.waited += 1
        if isinstance(self.schedule, ReduceOnPlateau):
            state.plateau = plateau_step(self.schedule, state.plateau, watched)
            engine.use_rule(self.rule, state.plateau[2])
        engine.epochs_trained = state.epoch + 1
        engine.best_parameters = self.best
        return logs

    def finish(self, *, interrupted: bool) -> None:
        """Say why training ended early, and go back to the best weights unless Ctrl-C ended it."""
        engine, state = self.engine, self.state
        if interrupted:
            place = f"in epoch {state.epoch + 1}" if state.batch else f"after epoch {state.epoch}"
            state.history.stopped = f"interrupted {place}"
        elif engine.stop_training:
            state.history.stopped = "a callback stopped the training"
        if self.patience is not None and self.best is not None and not interrupted:
            engine.write_tensors(self.best, "")
        engine.best_parameters = self.best
