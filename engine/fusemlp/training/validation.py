"""Validation, and what follows from it: early stopping, the learning rate on a plateau, the best weights."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from fusemlp.describe.checks import check_choice, counted, patience_after
from fusemlp.describe.metrics import METRICS, Metric, as_metrics, rises
from fusemlp.describe.optimizers import ReduceOnPlateau, plateau_step
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.examples import Examples, Targets, UserBatches, are_batches
from fusemlp.runtime.forward import Evaluate, metrics_of
from fusemlp.runtime.session import Session
from fusemlp.training.loop import Policy
from fusemlp.training.trainer import DIVERGED, FitPlan, FitState, Trainer
from fusemlp_kernels.contract import LossSpec
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DivergenceError

# The metrics of fusemlp, by the names that the history has for them.
OF_VALIDATION = {f"val_{name}": name for name in METRICS}
# This many kinds of models in a fleet share their validation data; the others keep theirs as long as they train.
KINDS = 8


@dataclass(frozen=True, eq=False)
class Validation:
    """Checked rows that each epoch is validated on, also by ``metrics``; ``common``: by several models."""

    data: Examples
    common: bool = False
    metrics: tuple[Metric, ...] = ()
    # evaluations not in use, by network and loss
    _idle: dict[Any, list[Evaluate]] = field(default_factory=dict)

    def of(self, engine: Session) -> Callable[[], dict[str, float]]:
        """Return a function that evaluates ``engine`` on the rows, for the end of each epoch."""
        loss = self._loss_of(engine)
        return loss if not self.metrics else lambda: {**loss(), **engine.inference.figures(self.data, self.metrics)}

    def _loss_of(self, engine: Session) -> Callable[[], dict[str, float]]:
        kind = (*engine.network.key_without("dropouts", "init"), engine.loss) if self.common else ()
        if not self.common or (kind not in self._idle and len(self._idle) >= KINDS):
            alone = engine.inference.evaluation(self.data)
            return lambda: alone(engine.memory)
        idle = self._idle.setdefault(kind, [])

        def together() -> dict[str, float]:
            # models may be trained in several threads
            try:
                evaluate = idle.pop()
            except IndexError:
                evaluate = engine.inference.evaluation(self.data, apart=True)
            metrics = evaluate(engine.memory)
            idle.append(evaluate)
            return metrics

        return together


def checked_validation(
    engine: Session, rows: Any, *, common: bool = False, steps: int | None = None
) -> Validation | None:
    """Check ``validation_data`` as ``fit`` takes it; ``common``: several models share it."""
    batches = rows is not None and are_batches(rows)
    if steps is not None and not batches:
        raise ArgumentError(
            f"validation_steps: it counts the batches of validation_data, got {steps!r} without such; all rows of "
            "arrays are validated on"
        )
    if rows is None:
        return None
    if batches:
        data = UserBatches("validation_data", rows, steps, "validation_steps").collected(engine.inputs)
    elif isinstance(rows, tuple | list) and len(rows) in (2, 3):
        names = ("validation_data[0]", "validation_data[1]", "validation_data[2]")
        data = engine.inputs.examples(rows[0], rows[1], rows[2] if len(rows) == 3 else None, names, codes=True)
    else:
        received = f"{len(rows)} in a " if isinstance(rows, tuple | list) else ""
        expected = "validation_data: expected (X, y) or (X, y, sample_weight), or batches of them"
        raise ArgumentTypeError(f"{expected}, got {received}{type(rows).__name__}")
    if data.targets.soft:
        # refused here, not at the end of the first epoch
        engine.loss.spec(accuracy=False, soft=True)
    return Validation(data, common)


def measured(
    engine: Session, plan: FitPlan, targets: Targets, validation: Validation | None, instead: str
) -> tuple[Validation | None, list[str]]:
    """Return the validation with the plan's metrics and those that its monitors, such as "val_auc", name; and the logs.

    ``targets`` are those of training; ``instead``: the argument beside ``validation_data`` that gives validation rows.
    Raises ArgumentError for metrics without validation, or not of its rows, for a monitor that is not logged, and for
    early stopping without a quantity to be watched.
    """
    validation = _with_metrics(engine, plan, targets, validation, instead)
    monitor, names = plan.monitor, logged(engine, targets, validation)
    if plan.early_stopping is not None and validation is None and monitor is None:
        raise ArgumentError(f"early_stopping: it watches val_loss; give validation_data=(Xv, yv) or {instead} too")
    if isinstance(monitor, str) and monitor.startswith("val_") and validation is None:
        raise ArgumentError(f"monitor: {monitor!r} is of validation rows; give validation_data=(Xv, yv) too")
    if monitor is not None:
        check_choice("monitor", monitor, names)
    return validation, names


def _with_metrics(
    engine: Session, plan: FitPlan, targets: Targets, validation: Validation | None, instead: str
) -> Validation | None:
    known = {} if validation is None else OF_VALIDATION
    named = [known[name] for name in plan.monitors if isinstance(name, str) and name in known]
    if not named and not plan.metrics:
        return validation
    kind = engine.inputs.kind_of(targets if validation is None else validation.data.targets)
    asked = as_metrics("metrics", plan.metrics, kind, counts_hits=not engine.loss.on_host)
    both = (*as_metrics("metrics", named, kind), *asked)
    if validation is None and both:
        raise ArgumentError(
            f"metrics: they are of validation rows; give validation_data=(Xv, yv) or {instead} too, got "
            f"{[metric.name for metric in both]}"
        )
    if validation is None:
        return None
    validation = replace(validation, metrics=tuple({metric.name: metric for metric in both}.values()))
    before = engine.scaling.scale
    # for this look alone: predictions of raw inputs might overflow
    engine.scaling.measure(validation.data.X)
    try:
        figures = engine.inference.figures(validation.data, validation.metrics)
    finally:
        engine.scaling.scale = before
    for name, value in figures.items():
        if math.isnan(value):
            raise ArgumentError(
                f"metrics: {name} is not defined on these {len(validation.data.X)} validation rows: those of fusemlp "
                "need rows of two classes, or two rows of numbers; give more rows, or another metric"
            )
    return validation


def logged(engine: Session, targets: Targets, validation: Validation | None) -> list[str]:
    """Return the names of an epoch's logs, in their order."""
    names = ["loss", *(["accuracy"] if engine.inputs.counts_hits(targets) else [])]
    names += engine.ledger.logs
    if validation is not None:
        names += ["val_loss", *(["val_accuracy"] if engine.inputs.counts_hits(validation.data.targets) else [])]
        names += [f"val_{metric.name}" for metric in validation.metrics]
    return [*names, "learning_rate"]


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
        of_rows = {} if self.validation is None else {f"val_{m.name}": m.rises for m in self.validation.metrics}
        self._sign = -1.0 if of_rows.get(self._monitor, rises(self._monitor)) else 1.0
        self._ahead: dict[int, Array] = {}
        # of the validation rows after the last epoch
        self._held: dict[str, float] = {}

    def begin(self) -> None:
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
        if state.waited >= patience_after(self.patience, state.epoch - state.waited - state.first_epoch):
            state.history.stopped = (
                f"{self._monitor} has not improved for {counted(state.waited, 'epoch')}{self._restored}"
            )
            return 0
        return max(0, state.last_epoch - state.epoch)

    @property
    def _restored(self) -> str:
        return f"; the weights of epoch {(self.state.history.best_epoch or 0) + 1} were restored"

    def late(self) -> bool:
        return time.monotonic() >= self.deadline

    def order(self, epoch: int) -> Array:
        drawn = self._ahead.pop(epoch, None)
        return self.rows(epoch) if drawn is None else drawn

    def launched(self, following: range) -> None:
        """Draw the rows of the epochs that follow while the device works."""
        if self.draws_ahead:
            self._ahead = {epoch: self.rows(epoch) for epoch in following if epoch < self.last_epoch}

    def validate(self) -> bool:
        if self._validate is not None:
            held = {f"val_{name}": value for name, value in self._validate().items()}
            self._held = self.engine.ranks.of_first(held)
        return math.isfinite(self._held.get("val_loss", 0.0))

    def end_epoch(self, stats: Array, rate: float) -> dict[str, float]:
        engine, state = self.engine, self.state
        logs = metrics_of(stats, self.spec) | self._held
        logs |= {**engine.ledger.figures(lambda: engine.update_count), "learning_rate": rate}
        logs = engine.ranks.of_first(logs)
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
        largest, epoch = self.engine.inputs.largest(self.X), self.state.epoch + 1
        held = not math.isfinite(self._held.get("val_loss", 0.0))
        if largest > LARGE_FEATURE and not self.engine.normalise:
            cause = (
                f"features as large as {largest:.3g} were not scaled: standardise them (mean 0, variance 1), as an "
                "engine with normalise=True does"
            )
        else:
            cause = f"a learning rate of {rate:.3g} is too high for this network: try {min(rate / 10, 0.1):.3g}"
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
