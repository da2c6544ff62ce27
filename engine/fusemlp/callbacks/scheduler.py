"""A learning rate for each epoch from a function of the user, as in Keras."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusemlp.callbacks.forms import Watching, takes, tell
from fusemlp.describe.checks import as_count, as_number
from fusemlp_kernels.errors import ArgumentTypeError


class LearningRateScheduler(Watching):
    """Set the learning rate of each epoch to ``schedule(epoch)`` or ``schedule(epoch, rate)``, epochs from 0.

    A schedule of the optimizer, such as ``Adam(lr=Cosine(0.01))``, changes the rate by updates, and needs no callback.
    """

    def __init__(self, schedule: Callable[..., float], verbose: int = 0) -> None:
        if not callable(schedule):
            raise ArgumentTypeError(f"schedule: expected a function of the epoch and the rate, got {schedule!r}")
        self.schedule = schedule
        self.verbose = as_count("verbose", verbose, minimum=0)

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Set the rate."""
        now = self.model.learning_rate
        given = self.schedule(epoch, now) if takes(self.schedule, ("epoch", "rate")) else self.schedule(epoch)
        rate = as_number(f"schedule({epoch})", given, low=0.0)
        if rate == now:
            return
        self.model.set_learning_rate(rate)
        tell(self.verbose, "epoch %d: the learning rate is %.4g", epoch + 1, rate)
