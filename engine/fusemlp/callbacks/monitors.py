"""Callbacks that act on a quantity or an epoch, with Keras's arguments: stop, save, set the learning rate."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fusemlp.callbacks.forms import Watching, takes, tell
from fusemlp.describe import checks
from fusemlp.describe.checks import as_count, as_kind, as_number, as_path, check_choice, check_flag, counted, no_folder
from fusemlp.describe.metrics import rises
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

MODES = ("auto", "min", "max")
SUFFIX = ".safetensors"


class Monitor(Watching):
    """The base of callbacks that watch a quantity of the logs for a new best value."""

    def __init__(self, monitor: str, mode: str, verbose: int, min_delta: float = 0.0) -> None:
        self.monitor = as_kind("monitor", monitor, str, "a name such as 'val_loss'")
        self.mode = check_choice("mode", mode, MODES)
        self.verbose = as_count("verbose", verbose, minimum=0)
        # Keras takes the absolute value too.
        self.min_delta = abs(as_number("min_delta", min_delta))
        grows = rises(monitor) if self.mode == "auto" else self.mode == "max"
        self.sign = 1.0 if grows else -1.0
        self.worst = -self.sign * math.inf
        self.best = self.worst
        self.missed = False

    def check_logs(self, names: Sequence[str]) -> None:
        if self.monitor not in names:
            validates = not self.monitor.startswith("val_") or "val_loss" in names
            mend = checks.meant([self.monitor], names) if validates else "; give validation_data to fit"
            raise ArgumentError(
                f"monitor: {self.monitor!r} is not among what this fit logs ({', '.join(names)}){mend}. If a "
                f"callback before this one adds it to the logs, let that one say so: writes = ({self.monitor!r},)"
            )

    @property
    def history(self) -> Any:
        """The record of the running fit; None in a loop of the caller's own."""
        return self.model.history

    def value(self, epoch: int, logs: dict[str, float]) -> float | None:
        """Return the quantity; warn once if an epoch is without it, as its callback may have announced it in vain."""
        if self.monitor not in logs and not self.missed:
            self.missed = True
            warnings.warn(
                f"{type(self).__name__}: the logs of epoch {epoch + 1} have no {self.monitor!r} ({', '.join(logs)}); "
                "epochs without it do not count",
                stacklevel=2,
            )
        return logs.get(self.monitor)

    def better(self, current: float, reference: float) -> bool:
        """Return whether ``current`` is better than ``reference`` by more than ``min_delta``."""
        return self.sign * (current - reference) > self.min_delta

    def recorded(self) -> list[float]:
        """Return the logs of the epochs before this ``fit`` was resumed."""
        return [] if self.history is None else list(self.history.history.get(self.monitor, ()))


class EarlyStopping(Monitor):
    """End the training when a quantity has not improved for ``patience`` epochs.

    An improvement is a change by more than ``min_delta``: downwards (``mode`` "min") or upwards ("max"); "auto" means
    upwards for accuracies, scores and metrics such as val_auc. Epochs count as without improvement until the quantity
    is better than ``baseline``. The first ``start_from_epoch`` epochs of the fit are ignored. ``restore_best_weights``
    restores the weights of the best epoch at the end of the training, also after its full length, but not after Ctrl-C.

    A resumed fit continues the count. A checkpoint does not hold the best weights of this callback;
    ``fit(early_stopping=patience)`` keeps its own there.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        min_delta: float = 0.0,
        patience: int = 0,
        verbose: int = 0,
        mode: str = "auto",
        baseline: float | None = None,
        restore_best_weights: bool = False,
        start_from_epoch: int = 0,
    ) -> None:
        super().__init__(monitor, mode, verbose, min_delta)
        self.patience = as_count("patience", patience, minimum=0)
        self.baseline = None if baseline is None else as_number("baseline", baseline)
        self.restore_best_weights = check_flag("restore_best_weights", restore_best_weights)
        self.start_from_epoch = as_count("start_from_epoch", start_from_epoch, minimum=0)
        self._begin()

    def _begin(self) -> None:
        self.wait, self.best = 0, self.worst
        self.best_epoch: int | None = None
        self.best_weights: dict[str, Array] | None = None
        self.stopped_epoch: int | None = None

    def on_train_begin(self, logs: Any = None) -> None:
        self._begin()
        for index, value in enumerate(self.recorded()):
            if self._improves(index, value) and self.history is not None:
                self.best_epoch = self.history.epochs[index]
        if self.restore_best_weights and self.best_epoch is not None:
            warnings.warn(
                f"EarlyStopping: the weights of the best epoch so far ({self.best_epoch + 1}) are not in the "
                "checkpoint and cannot be restored; fit(early_stopping=patience) keeps them",
                stacklevel=2,
            )

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        index = epoch if self.history is None else self.history.epochs.index(epoch)
        current = self.value(epoch, logs)
        if current is None:
            return
        if self._improves(index, current):
            self.best_epoch = epoch
            if self.restore_best_weights:
                self.best_weights = self.model.state_dict()
        elif self.wait >= self.patience and index > 0 and index >= self.start_from_epoch:
            self.stopped_epoch = epoch
            self.model.stop_training = True

    def _improves(self, index: int, current: float) -> bool:
        """Count the epoch ``index`` of this fit; return whether it is the best so far."""
        if index < self.start_from_epoch:
            return False
        self.wait += 1
        if not self.better(current, self.best):
            return False
        self.best = current
        if self.baseline is None or self.better(current, self.baseline):
            self.wait = 0
        return True

    def on_train_end(self, logs: Any = None) -> None:
        history = self.history
        interrupted = history is not None and history.stopped.startswith("interrupted")
        if history is not None and "early stopping" not in history.in_use:
            history.in_use.append("early stopping")
        weights = None if interrupted else self.best_weights
        if weights is not None:
            self.model.load_state_dict(weights)
        if self.stopped_epoch is not None:
            reason = f"{self.monitor} has not improved for {counted(self.wait, 'epoch')}"
            if weights is not None and self.best_epoch is not None:
                reason += f"; the weights of epoch {self.best_epoch + 1} were restored"
            if history is not None and not interrupted:
                history.stopped = reason
            tell(self.verbose, "epoch %d: %s", self.stopped_epoch + 1, reason)


class ModelCheckpoint(Monitor):
    """Save after each epoch, or after each that is the best so far.

    ``filepath`` ends in .safetensors and may have fields of the epoch, from 1, and of the logs:
    ``"{epoch:02d}-{val_loss:.3f}.safetensors"``. Its folder must exist. With ``save_best_only`` an epoch counts only if
    ``monitor`` is better than ever and than ``initial_value_threshold``. The file is a checkpoint, to resume the fit
    from; with ``save_weights_only`` the model alone, as from ``engine.save``. ``fusemlp.load`` reads both.
    """

    def __init__(
        self,
        filepath: str | os.PathLike[str],
        monitor: str = "val_loss",
        verbose: int = 0,
        save_best_only: bool = False,
        save_weights_only: bool = False,
        mode: str = "auto",
        save_freq: str = "epoch",
        initial_value_threshold: float | None = None,
    ) -> None:
        super().__init__(monitor, mode, verbose)
        self.filepath = as_path("filepath", filepath)
        if not self.filepath.endswith(SUFFIX):
            raise ArgumentError(f"filepath: expected a name ending in {SUFFIX}, got {self.filepath!r}")
        if save_freq != "epoch":
            raise ArgumentError(f"save_freq: only 'epoch' is supported, got {save_freq!r}")
        self.save_best_only = check_flag("save_best_only", save_best_only)
        self.save_weights_only = check_flag("save_weights_only", save_weights_only)
        threshold = initial_value_threshold
        self.threshold = self.worst if threshold is None else as_number("initial_value_threshold", threshold)

    def check_logs(self, names: Sequence[str]) -> None:
        if self.save_best_only:
            super().check_logs(names)
        try:
            example = self._path(0, dict.fromkeys(names, 0.0))
        except (LookupError, ValueError) as error:
            fields = ", ".join(["epoch", *names])
            message = f"filepath: the fields of {self.filepath!r} cannot be filled in ({error}); there are {fields}"
            raise ArgumentError(message) from error
        if not example.parent.is_dir():
            raise no_folder("filepath", example.parent)
        if example.is_dir():
            raise ArgumentError(f"filepath: {str(example)!r} is a folder; expected a file, there already or new")

    def _path(self, epoch: int, logs: dict[str, float]) -> Path:
        return Path(self.filepath.format(epoch=epoch + 1, **logs))

    def on_train_begin(self, logs: Any = None) -> None:
        self.best = self.threshold
        for value in self.recorded():
            if self.better(value, self.best):
                self.best = value

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        if self.save_best_only:
            current = self.value(epoch, logs)
            if current is None or not self.better(current, self.best):
                return
            self.best = current
        path = self._path(epoch, logs)
        if self.save_weights_only:
            self.model.save(path)
        else:
            self.model.save_checkpoint(path)
        tell(self.verbose, "epoch %d: saved %s", epoch + 1, path)


class ReduceLROnPlateau(Monitor):
    """Multiply the learning rate by ``factor`` when a quantity has not improved for ``patience`` epochs.

    After that, ``cooldown`` epochs do not count. The rate does not fall below ``min_lr``. The factors multiply any
    schedule, are kept in checkpoints, and end with the ``fit``. ``ReduceOnPlateau`` is the same as a schedule.
    """

    def __init__(
        self,
        monitor: str = "val_loss",
        factor: float = 0.1,
        patience: int = 10,
        verbose: int = 0,
        mode: str = "auto",
        min_delta: float = 1e-4,
        cooldown: int = 0,
        min_lr: float = 0.0,
    ) -> None:
        super().__init__(monitor, mode, verbose, min_delta)
        self.factor = as_number("factor", factor, low=0.0, high=1.0, low_open=True, high_open=True)
        self.patience = as_count("patience", patience, minimum=0)
        self.cooldown = as_count("cooldown", cooldown, minimum=0)
        self.min_lr = as_number("min_lr", min_lr, low=0.0)
        self.wait = self.cooling = 0

    def on_train_begin(self, logs: Any = None) -> None:
        self.wait = self.cooling = 0
        self.best = self.worst
        for value in self.recorded():
            self._is_due(value)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        current = self.value(epoch, logs)
        if current is None or not self._is_due(current):
            return
        rate = self.model.learning_rate
        lower = max(rate * self.factor, self.min_lr)
        if lower < rate:
            self.model.scale_learning_rate(lower / rate)
            tell(self.verbose, "epoch %d: the learning rate is now %.4g", epoch + 1, lower)

    def _is_due(self, current: float) -> bool:
        """Count an epoch, and return whether the rate shall fall."""
        if self.cooling:
            self.cooling -= 1
            self.wait = 0
        if self.better(current, self.best):
            self.best, self.wait = current, 0
        elif not self.cooling:
            self.wait += 1
            if self.wait >= self.patience:
                self.wait, self.cooling = 0, self.cooldown
                return True
        return False


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
        now = self.model.learning_rate
        given = self.schedule(epoch, now) if takes(self.schedule, ("epoch", "rate")) else self.schedule(epoch)
        rate = as_number(f"schedule({epoch})", given, low=0.0)
        if rate == now:
            return
        self.model.set_learning_rate(rate)
        tell(self.verbose, "epoch %d: the learning rate is %.4g", epoch + 1, rate)
