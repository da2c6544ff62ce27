"""The session that fits: the plan of a fit, its arguments checked once, its record, its position, its best weights."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from fusemlp.callbacks.forms import checked_callbacks
from fusemlp.callbacks.progress import ProgressBar
from fusemlp.describe.adversarial import NONE, Adversary, as_adversary
from fusemlp.describe.checks import as_deadline, as_patience, counted, freeze
from fusemlp.describe.conflicts import Features, in_use
from fusemlp.describe.description import Count, Description, Flag, Fraction, Machine
from fusemlp.describe.losses import as_loss
from fusemlp.describe.metrics import MetricLike
from fusemlp.describe.optimizers import PLATEAU_START, PlateauState, ReduceOnPlateau, Schedule
from fusemlp.describe.privacy import OF_TRAINING_ROWS
from fusemlp.inputs.arrays import Array
from fusemlp.report.diagnosis import Finding, diagnose
from fusemlp.report.plots import curves_figure, draw
from fusemlp.runtime.session import Session
from fusemlp_kernels.coding import Coding
from fusemlp_kernels.contract import RATE_SCALE
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, ShapeError

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
            # as of a model, or of all models of several
            "waited": "improved" in self.stopped,
        }
        return diagnose(
            self.history, dead, **{**record, "chance_loss": self.chance_loss, "in_use": self.in_use, **known}
        )

    def plot(self, path: str | Path | None = None, *, title: str = "training") -> "Figure":
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


def _as_several(argument: str, value: Any) -> Any:
    """Return a tuple of what can be read once alone; one name, or what is no metric, stays for its own error."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value or ()


def _check_verbose(argument: str, value: Any) -> int:
    value = 1 if isinstance(value, str) and value == "auto" else value  # as Keras has it
    if value not in (0, 1, 2):
        raise ArgumentError(f"{argument}: expected 0 (silent), 1 (a bar) or 2 (a line an epoch), got {value!r}")
    return int(value)


def _check_order(argument: str, value: Any) -> Any:
    if not callable(value):
        raise ArgumentTypeError(
            f"{argument}: expected a function from the epoch to the order of the rows, got {type(value).__name__}; "
            "for one fixed order give lambda epoch: rows"
        )
    return value


@dataclass(frozen=True, eq=False)
class FitPlan(Description):
    """The arguments of ``Engine.fit``, which documents them, but for its arrays."""

    _: KW_ONLY
    epochs: Count
    batch_size: Count | None = None
    class_weight: Any = None
    validation_split: Fraction = 0.0
    validation_steps: Any = None
    steps_per_epoch: Any = None
    metrics: Annotated[Iterable[MetricLike], _as_several] = ()
    early_stopping: Annotated[int | str, as_patience] | None = None
    monitor: str | None = None
    callbacks: Annotated[Sequence[Any], lambda _, value: checked_callbacks(() if value is None else value)] = ()
    verbose: Annotated[int, _check_verbose] = 0
    shuffle: Flag = True
    drop_last: Flag = False
    row_order: Annotated[Callable[[int], Any], _check_order] | None = None
    resume: Flag = False
    time_limit: float | None = None
    adversarial: Annotated[Adversary, as_adversary] = NONE
    loss: Annotated[Any, lambda _, value: as_loss(value)] | None = None
    # when the time is up, of ``time.monotonic``
    deadline: float = field(init=False)
    # the quantities that the fit and its callbacks follow; None for one that follows none
    monitors: list[Any] = field(init=False)

    def __post_init__(self) -> None:
        deadline = as_deadline("time_limit", self.time_limit)
        super().__post_init__()
        bar = checked_callbacks(ProgressBar(lines=self.verbose == 2)) if self.verbose else []
        monitors = [getattr(callback.listener, "monitor", None) for callback in self.callbacks if callback.keras]
        freeze(self, deadline=deadline, callbacks=[*self.callbacks, *bar], monitors=[self.monitor, *monitors])

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "FitPlan":
        """Return the plan of a call, of whose arguments it takes its own."""
        return cls(**{own.name: arguments[own.name] for own in fields(cls) if own.init})

    def uses(
        self, schedule: Schedule, *, batches: bool = False, sample_weight: Any = None, validation_data: Any = None
    ) -> Features:
        """Return the features that it uses, for ``conflicts``, with a schedule of rates and the data beside it."""
        first, *others = self.monitors
        if first is None and (self.early_stopping is not None or isinstance(schedule, ReduceOnPlateau)):
            first = "loss" if validation_data is None and not self.validation_split else "val_loss"
        followed = next((name for name in (first, *others) if name in OF_TRAINING_ROWS), None)
        features = in_use(
            batches=batches,
            arrays=not batches,
            sample_weight=sample_weight,
            validation_data=validation_data,
            validation_split=self.validation_split or None,
            batch_size=self.batch_size,
            steps_per_epoch=self.steps_per_epoch,
            row_order=self.row_order,
            drop_last=self.drop_last,
            balanced=isinstance(self.class_weight, str) and self.class_weight == "balanced",
            **{"rows in turn": not self.shuffle, "followed rows": followed},
        )
        return {**features, **self.adversarial.uses}


class Trainer(Session):
    """A session that ``fit`` trains; ``Engine`` is its public face.

    ``history`` is the record of the last ``fit`` and ``fit_state`` its position, None before the first.
    ``stop_training`` ends the running fit after the batch.
    """

    def start(self, machine: Machine) -> None:
        """Choose the backend and allocate, with no training yet."""
        super().start(machine)
        self.history: History | None = None
        self.fit_state: FitState | None = None
        self.epochs_trained = 0
        self.stop_training = False
        # the best weights, as in the arena that predictions read
        self._best: Any = None

    @property
    def best_parameters(self) -> dict[str, Array] | None:
        """Copies of the weights of the best epoch, by name, where early stopping keeps them; else None."""
        return None if self._best is None else self.memory.named(self._best)

    @best_parameters.setter
    def best_parameters(self, tensors: dict[str, Array] | None) -> None:
        self._best = None if tensors is None else self.memory.flat(tensors)

    @property
    def keeps_best(self) -> bool:
        """Return whether there are such weights."""
        return self._best is not None

    def lay_out(self, coding: Coding | None) -> None:
        """Lay out the weights of the first layer for rows with a coding, or for dense ones with None."""
        before = self._memory
        super().lay_out(coding)
        if self._best is not None and self._memory is not before:
            self.best_parameters = before.named(self._best)

    def keep_best(self) -> None:
        """Keep what predictions read now as the best weights."""
        memory = self.memory
        name = memory.evaluated_arena
        self._best = memory.copies([name], None if self._best is None else {name: self._best})[name]

    def go_to_best(self) -> None:
        """Go back to the best weights; an average of the parameters begins anew with them."""
        memory = self.memory
        for name in {"params", memory.evaluated_arena}:
            memory.backend.copy_into(memory.arrays[name], self._best)
        memory.refresh_shadow()

    def scale_learning_rate(self, factor: float) -> None:
        """Multiply the rates of the running ``fit`` by ``factor`` from the next update on; checkpoints keep it."""
        self._take_rate_scale(float(self.memory.hyper[RATE_SCALE]) * factor)

    def set_learning_rate(self, rate: float) -> None:
        """Let the next update have this rate, later ones in proportion; ArgumentError if the schedule's is 0 now."""
        base = self.rates.base
        if not base:
            raise ArgumentError(
                f"rate: the optimizer's own rate is 0 now, and {rate!r} no multiple of it; give it one, Adam(lr=0.001)"
            )
        self._take_rate_scale(rate / base)

    def _take_rate_scale(self, scale: float) -> None:
        self.rates.rescale(scale)
        state = self.fit_state
        if state is not None:
            best, waited, _ = state.plateau
            state.plateau = best, waited, scale


def fresh_state(engine: Trainer, plan: FitPlan, batches: int) -> FitState:
    """Return the position before a fit with this many batches an epoch."""
    updates = plan.epochs * batches // engine.optimizer.accumulate
    remedies = ["dropout"] if any(engine.network.dropouts) else []
    remedies += [*(["scaling"] if engine.normalise else []), *engine.ledger.remedies]
    return FitState(
        epoch=engine.epochs_trained,
        batch=0,
        last_epoch=engine.epochs_trained + plan.epochs,
        total_updates=engine.update_count + updates,
        history=History(chance_loss=_chance_loss(engine), in_use=remedies),
        monitor=plan.monitor or "",
        adversarial=plan.adversarial.to_config() or None,
        reduce=engine.sharding.reduce,
    )


def _chance_loss(engine: Trainer) -> float | None:
    loss = engine.loss
    if not loss.is_classification or loss.reduction != "mean":
        return None
    return math.log(engine.network.sizes[-1] if loss.kind == "cross_entropy" else 2)


def resumed_state(engine: Trainer, plan: FitPlan, batches: int, *, rows: int) -> FitState:
    """Return the position of the fit that ``engine``'s checkpoint was written in.

    Raises ArgumentError if there was none, or not for this plan, ShapeError if the data has too few batches.
    """
    state = engine.fit_state
    if state is None:
        raise ArgumentError("resume: this engine has no fit to go on with; load a checkpoint written during one")
    begun = state.epoch - state.first_epoch + (1 if state.batch else 0)
    if plan.epochs < begun:
        raise ArgumentError(
            f"epochs: the fit that is resumed has begun {begun} epochs, which count, got {plan.epochs}; give {begun} "
            "or more, or resume=False"
        )
    if state.batch > batches:
        raise ShapeError(
            f"X: the checkpoint stands at batch {state.batch} of its epoch, and {rows} rows make only {batches}; "
            "resume with the data of the first call"
        )
    reduce = engine.sharding.reduce
    if state.reduce != reduce:
        raise ArgumentError(
            f"reduce: the fit that is resumed has reduce={state.reduce or None!r}, got {reduce or None!r}; "
            "go on with the same: torchrun --nproc-per-node 1 -m fusemlp train --resume RUN, or in a script that "
            "torchrun starts load_checkpoint(..., distributed=True, reduce=...); where it was None, without torchrun"
        )
    for name, before, now, does in (
        ("monitor", state.monitor or None, plan.monitor or None, "follows"),
        ("adversarial", state.adversarial, plan.adversarial.to_config() or None, "trains against"),
    ):
        if before != now:
            raise ArgumentError(f"{name}: the fit that is resumed {does} {before!r}, got {now!r}; give the same")
    return state
