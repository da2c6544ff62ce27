"""The record of a training, and its position."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusemlp.describe.schedules import PLATEAU_START, PlateauState
from fusemlp.describe.text import counted
from fusemlp.report.diagnosis import Finding, diagnose
from fusemlp.report.plots import curves_figure, draw
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The beginning of ``History.stopped`` after a divergence.
DIVERGED = "the loss became NaN or infinite"


@dataclass
class History:
    """The record of ``fit``: ``history`` has a list for each quantity, one entry an epoch, as in Keras.

    ``epochs``: the numbers of the epochs; ``seconds``: the time of each; ``best_epoch``: the one with the best
    val_loss, or of the quantity that ``fit`` monitored; ``stopped``: the reason for an early end, or empty.
    For ``diagnose``: ``chance_loss`` is the loss where all classes are equally probable, None if the loss has none;
    ``in_use`` are the remedies that the training had.
    """

    history: dict[str, list[float]] = field(default_factory=dict)
    epochs: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    best_epoch: int | None = None
    stopped: str = ""
    chance_loss: float | None = None
    in_use: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        """Return the number of epochs, the last of each quantity, and the reason for an early end."""
        last = [f"{name} {values[-1]:.4g}" for name, values in self.history.items() if values]
        epochs = ", ".join([counted(len(self.epochs), "epoch"), *last])
        return f"<History: {epochs}{'; ' if self.stopped else ''}{self.stopped}>"

    def record(self, epoch: int, logs: dict[str, float], seconds: float) -> None:
        """Add an epoch."""
        self.epochs.append(epoch)
        self.seconds.append(seconds)
        self.amend(logs)

    def amend(self, logs: dict[str, Any], author: str = "logs") -> None:
        """Set quantities of the last epoch, as floats, in ``logs`` too; epochs without a quantity have NaN there.

        Raises ArgumentTypeError, which calls the ``author``, for what is no number.
        """
        count = len(self.epochs)
        for name, value in logs.items():
            if type(value) is not float:
                logs[name] = value = _as_float(author, name, value)
            values = self.history.setdefault(name, [])
            values += [math.nan] * (count - len(values))
            values[-1] = value
        if len(logs) < len(self.history):
            for values in self.history.values():
                values += [math.nan] * (count - len(values))

    def rows(self) -> Iterator[dict[str, float]]:
        """Yield for each epoch its number, from 1, and its quantities."""
        for at, epoch in enumerate(self.epochs):
            yield {"epoch": epoch + 1, **{name: values[at] for name, values in self.history.items()}}

    def diagnose(self, dead: Mapping[str, float] | None = None, **known: Any) -> list[Finding]:
        """Return what is wrong with the training: divergence, exploding loss, small rate, no learning, overfitting.

        ``dead``: the result of ``engine.dead_units(X)``; ``engine.diagnose(X)`` does both. ``known``: what this record
        does not tell, for ``report.diagnosis.diagnose``. Print a finding for its evidence and remedies.
        """
        record: dict[str, Any] = {
            "divergence": self.stopped if self.stopped.startswith(DIVERGED) else "",
            "restored": "restored" in self.stopped,
            "best_epoch": None if self.best_epoch is None else self.epochs.index(self.best_epoch) + 1,
            "early_stopping": "not improved" in self.stopped,
        }
        return diagnose(
            self.history, dead, **{**record, "chance_loss": self.chance_loss, "in_use": self.in_use, **known}
        )

    def plot(self, path: str | Path | None = None, *, title: str = "training") -> Figure:
        """Draw loss and accuracy over the epochs; write the picture to ``path`` (.png, .svg or .pdf) if given.

        Return matplotlib's figure; ArgumentError or ArgumentTypeError for an impossible path or without an epoch.
        """
        if not self.epochs:
            raise ArgumentError("history: it has no epoch to draw; fit with at least one epoch first")
        best = None if self.best_epoch is None else self.epochs.index(self.best_epoch) + 1
        return draw(lambda: curves_figure(self.history, title=title, best_epoch=best), path)


def _as_float(author: str, name: Any, value: Any) -> float:
    if isinstance(name, str) and not isinstance(value, str | bytes):
        with suppress(TypeError, ValueError):
            return float(value)
    raise ArgumentTypeError(
        f"{author}: logs[{name!r}] is {value!r}; the history takes a number by a name, such as logs['val_f1'] = 0.9"
    )


@dataclass
class FitState:
    """The position of a call of ``fit``; together with parameters and counters it is enough to continue.

    ``epoch`` and ``batch`` are those of the next update; ``last_epoch`` is one past the last epoch of the call.
    ``best_loss`` is the best of the quantity ``monitor`` (empty: the default), negated if it rises. ``adversarial``
    describes what the training is against; ``reduce`` is how the gradients of several processes are added, or empty.
    """

    epoch: int
    batch: int
    last_epoch: int
    total_updates: int
    history: History
    best_loss: float = float("inf")
    waited: int = 0
    plateau: PlateauState = PLATEAU_START
    monitor: str = ""
    adversarial: dict[str, Any] | None = None
    reduce: str = ""

    @property
    def first_epoch(self) -> int:
        """The first epoch of the call."""
        return self.history.epochs[0] if self.history.epochs else self.epoch

    def begun(self, update_count: int, batches: int) -> int:
        """Return the updates before the call, of epochs with one update a batch, when there were ``update_count``."""
        return update_count - self.batch - (self.epoch - self.first_epoch) * batches
