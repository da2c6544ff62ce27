"""Validation: its rows, brought to the device once, its metrics, and the quantities that training may follow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fusemlp.describe.checks import check_choice
from fusemlp.describe.metrics import METRICS, Metric, as_metrics
from fusemlp.inputs.batches import Batches, are_batches
from fusemlp.runtime.forward import Evaluation
from fusemlp.runtime.members import MeanEvaluation
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from fusemlp.inputs.targets import Examples, Targets
    from fusemlp.runtime.session import Session
    from fusemlp.training.plan import FitPlan

# This many kinds of models in a fleet share their validation data; the others keep theirs as long as they train.
KINDS = 8


@dataclass(frozen=True, eq=False)
class Validation:
    """Checked rows that each epoch is validated on, also by ``metrics``; ``common``: by several models."""

    data: Examples
    common: bool = False
    metrics: tuple[Metric, ...] = ()
    # evaluations not in use, by network and loss
    _idle: dict[Any, list[Evaluation | MeanEvaluation]] = field(default_factory=dict)

    def of(self, engine: Session) -> Callable[[], dict[str, float]]:
        """Return a function that evaluates ``engine`` on the rows, for the end of each epoch."""
        loss = self._loss_of(engine)
        return loss if not self.metrics else lambda: {**loss(), **engine.inference.figures(self.data, self.metrics)}

    def _loss_of(self, engine: Session) -> Callable[[], dict[str, float]]:
        net = engine.network
        kind = (net.sizes, net.activations, engine.loss)
        if not self.common or (kind not in self._idle and len(self._idle) >= KINDS):
            alone = engine.inference.evaluation(self.data, apart=False)
            return lambda: alone.of(engine.memory)
        idle = self._idle.setdefault(kind, [])

        def together() -> dict[str, float]:
            # models may be trained in several threads
            try:
                evaluation = idle.pop()
            except IndexError:
                evaluation = engine.inference.evaluation(self.data, apart=True)
            metrics = evaluation.of(engine.memory)
            idle.append(evaluation)
            return metrics

        return together


def checked_validation(
    engine: Session, given: Any, *, common: bool = False, steps: int | None = None
) -> Validation | None:
    """Check ``validation_data`` as ``fit`` takes it; ``common``: several models share it."""
    batches = given is not None and are_batches(given)
    if steps is not None and not batches:
        raise ArgumentError(
            f"validation_steps: it counts the batches of validation_data, got {steps!r} without such; all rows of "
            "arrays are validated on"
        )
    if given is None:
        return None
    if batches:
        data = Batches("validation_data", given, steps, "validation_steps").collected(engine.inputs)
    elif isinstance(given, tuple | list) and len(given) in (2, 3):
        names = ("validation_data[0]", "validation_data[1]", "validation_data[2]")
        data = engine.inputs.examples(given[0], given[1], given[2] if len(given) == 3 else None, names)
    else:
        kind = type(given).__name__
        told = f"{len(given)} in a {kind}" if isinstance(given, tuple | list) else kind
        raise ArgumentTypeError(
            f"validation_data: expected (X, y) or (X, y, sample_weight), or batches of them, got {told}"
        )
    # the loss refuses here, not at the end of the first epoch
    engine.loss.spec(accuracy=False, soft=data.targets.soft)
    return Validation(data, common)


def with_metrics(
    engine: Session, plan: FitPlan, targets: Targets, validation: Validation | None, instead: str
) -> Validation | None:
    """Return the validation with the plan's metrics and those that its monitors, such as "val_auc", name.

    ``targets`` are those of training; ``instead``: as for ``check_watched``. Raises ArgumentError for metrics without
    validation, or not of its rows.
    """
    known = {f"val_{name}": name for name in METRICS}
    named = [known[one] for one in plan.monitors if isinstance(one, str) and one in known and validation is not None]
    if not named and not plan.metrics:
        return validation
    kind = engine.inputs.kind_of(targets if validation is None else validation.data.targets)
    both = (*as_metrics("metrics", named, kind), *as_metrics("metrics", plan.metrics, kind))
    if validation is None and both:
        raise ArgumentError(
            f"metrics: they are of validation rows; give validation_data=(Xv, yv) or {instead} too, got "
            f"{[one.name for one in both]}"
        )
    if validation is None:
        return None
    found = replace(validation, metrics=tuple({one.name: one for one in both}.values()))
    unmeasured = engine.normalise and engine.scaling.scale is None
    if unmeasured:
        # for this look alone: predictions of raw inputs might overflow
        engine.scaling.scale = engine.scaling.measured(found.data.X)
    try:
        figures = engine.inference.figures(found.data, found.metrics)
    finally:
        if unmeasured:
            engine.scaling.scale = None
    for name, value in figures.items():
        if math.isnan(value):
            raise ArgumentError(
                f"metrics: {name} is not defined on these {len(found.data.X)} validation rows: it needs rows of two "
                "classes, or two rows of numbers; give more rows, or another metric"
            )
    return found


def logged(engine: Session, targets: Targets, validation: Validation | None) -> list[str]:
    """Return the names of an epoch's logs, in their order."""
    names = ["loss", *(["accuracy"] if engine.inputs.counts_hits(targets) else [])]
    names += [] if engine.privacy is None else ["epsilon"]
    if validation is not None:
        names += ["val_loss", *(["val_accuracy"] if engine.inputs.counts_hits(validation.data.targets) else [])]
        names += [f"val_{metric.name}" for metric in validation.metrics]
    return [*names, "learning_rate"]


def check_monitor(monitor: str | None, names: Sequence[str]) -> None:
    """Raise ArgumentError unless a fit that logs ``names`` can follow ``monitor``."""
    if isinstance(monitor, str) and monitor.startswith("val_") and "val_loss" not in names:
        raise ArgumentError(f"monitor: {monitor!r} is of validation rows; give validation_data=(Xv, yv) too")
    if monitor is not None:
        check_choice("monitor", monitor, names)


def check_watched(plan: FitPlan, validation: Validation | None, instead: str) -> None:
    """Raise ArgumentError for early stopping without a quantity to be watched.

    ``instead``: the argument beside ``validation_data`` that gives validation rows.
    """
    if plan.early_stopping is not None and validation is None and plan.monitor is None:
        raise ArgumentError(
            f"early_stopping: it watches val_loss, so validation_data=(Xv, yv) or {instead} is needed too"
        )
