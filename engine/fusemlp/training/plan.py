"""The plan of a fit: its arguments but for the arrays, checked once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, fields
from typing import Annotated, Any

from fusemlp.callbacks.forms import checked_callbacks
from fusemlp.callbacks.progress import ProgressBar
from fusemlp.describe.adversarial import Adversary, as_adversary
from fusemlp.describe.checks import as_deadline, freeze
from fusemlp.describe.conflicts import Features, in_use
from fusemlp.describe.description import Count, Description, Flag, Fraction
from fusemlp.describe.losses import as_loss
from fusemlp.describe.metrics import MetricLike
from fusemlp.describe.privacy import OF_TRAINING_ROWS
from fusemlp.describe.schedules import ReduceOnPlateau, Schedule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError


def _as_several(argument: str, value: Any) -> Any:
    """Return a tuple of what can be read once alone; one name, or what is no metric, stays for its own error."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else value or ()


def _check_verbose(argument: str, value: Any) -> int:
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


NONE = Adversary()


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
    early_stopping: Count | None = None
    monitor: str | None = None
    callbacks: Annotated[Sequence[Any], lambda _, value: checked_callbacks(() if value is None else value)] = ()
    verbose: Annotated[int, _check_verbose] = 0
    shuffle: Flag = True
    drop_last: Flag = False
    row_order: Annotated[Callable[[int], Any], _check_order] | None = None
    resume: Flag = False
    time_limit: float | None = None
    adversarial: Annotated[Adversary, as_adversary] | None = None
    loss: Annotated[Any, lambda _, value: as_loss(value)] | None = None
    # when the time is up, of ``time.monotonic``
    deadline: float = field(init=False)

    def __post_init__(self) -> None:
        deadline = as_deadline("time_limit", self.time_limit)
        super().__post_init__()
        bar = checked_callbacks(ProgressBar(lines=self.verbose == 2)) if self.verbose else []
        freeze(self, deadline=deadline, callbacks=[*self.callbacks, *bar])

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> "FitPlan":
        """Return the plan of a call, of whose arguments it takes its own."""
        return cls(**{own.name: arguments[own.name] for own in fields(cls) if own.init})

    @property
    def monitors(self) -> list[Any]:
        """The quantities that the fit and its callbacks follow; None for one that follows none."""
        return [self.monitor, *(getattr(getattr(one, "listener", None), "monitor", None) for one in self.callbacks)]

    @property
    def adversary(self) -> Adversary:
        """The adversary; by default one that changes nothing."""
        return NONE if self.adversarial is None else self.adversarial

    def uses(
        self, schedule: Schedule, *, batches: bool = False, sample_weight: Any = None, validation_data: Any = None
    ) -> Features:
        """Return the features that it uses, for ``conflicts``, with a schedule of rates and the data beside it."""
        first, *others = self.monitors
        if first is None and (self.early_stopping is not None or isinstance(schedule, ReduceOnPlateau)):
            first = "loss" if validation_data is None and not self.validation_split else "val_loss"
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
        )
        followed = next((name for name in (first, *others) if name in OF_TRAINING_ROWS), None)
        features |= in_use(**{"rows in turn": not self.shuffle, "followed rows": followed})
        return {**features, **self.adversary.uses}
