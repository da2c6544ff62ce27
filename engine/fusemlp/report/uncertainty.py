"""Intervals and sets of classes with a chosen coverage, and honest probabilities, from held-out rows.

Split conformal prediction (Lei et al., "Distribution-free predictive inference for regression", 2018; for classes
Sadinle, Lei and Wasserman, "Least ambiguous set-valued classifiers", 2019): of new rows like these, at least the chosen
share has its truth inside, whatever the model. An ensemble's errors are those of each model on its own held-out rows,
which are no smaller than the ensemble's: its intervals are wide rather than narrow. Intervals end at 0 where none of n
targets was below it: a new row is the first below it with a probability of at most 1 / (n + 1), the most coverage lost.

Intervals of a model that knows its spread are as wide as a row needs. They move the outer quantiles by one distance
(Romano, Patterson and Candès, "Conformalized quantile regression", 2019), or are as many standard deviations around the
mean for every row (Lei et al., 2018, section 5.2).

Temperature scaling divides a classifier's logits by one number, so that its probabilities are honest (Guo, Pleiss, Sun
and Weinberger, "On calibration of modern neural networks", 2017). The predicted classes stay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import Rows
from fusemlp.describe.checks import as_number
from fusemlp.describe.losses import Loss
from fusemlp.describe.metrics import Judged
from fusemlp.inputs.arrays import Array
from fusemlp.report.metrics import class_scores, distribution, predictions
from fusemlp.runtime.session import Session
from fusemlp_kernels.errors import ArgumentError

# A report keeps the errors at this many ranks.
KEPT = 1000
# The coverage that a report tells of.
COVERAGE = 0.9

# Fewer held-out rows decide nothing, and a smaller gain in their log loss is none.
LEAST_ROWS, LEAST_GAIN = 100, 1e-4
# The number's logarithm is normal beforehand, with this deviation: few rows move it little. Without that, tables of the
# half "development" of ``python -m bench tables`` lost by it up to some 500 rows.
DEVIATION = 0.15
BOUNDS = 0.1, 10.0


@dataclass(frozen=True)
class HeldOut:
    """The errors of ``rows`` held-out rows at some ``ranks``, in rising order; ``errors`` has a list for each target.

    Of numbers: the distance of truth and prediction, in original units, or with ``target_log`` in logarithms. Of
    classes: one minus the probability of the true class. ``nonnegative`` targets were not below 0 in any row. Targets
    that different numbers of rows have are ranked by ``own_ranks``, a tuple each; ``rows`` then has the largest number.
    ``adaptive``: of numbers, the errors are those of a predicted distribution, see ``_centres``.
    """

    rows: int
    ranks: tuple[int, ...]
    errors: tuple[tuple[float, ...], ...]
    nonnegative: tuple[bool, ...] = ()
    own_ranks: tuple[tuple[int, ...], ...] = ()
    adaptive: bool = False

    @classmethod
    def of(cls, errors: Array, loss: Loss | None = None) -> HeldOut:
        """Return what is kept of ``errors_of`` a model of this loss, (rows,) or (rows, targets), NaN for gaps."""
        columns = [np.sort(column[~np.isnan(column)]) for column in errors.reshape(len(errors), -1).T]
        counts = [len(column) for column in columns]
        places = [np.unique(np.linspace(0, count - 1, min(KEPT, count)).round().astype(np.int64)) for count in counts]
        ranks = tuple(tuple((kept + 1).tolist()) for kept in places)
        values = tuple(tuple(column[kept].tolist()) for column, kept in zip(columns, places, strict=True))
        own_ranks = ranks if len(set(counts)) > 1 else ()
        adaptive = loss is not None and loss.width > 1
        return cls(max(counts), ranks[int(np.argmax(counts))], values, own_ranks=own_ranks, adaptive=adaptive)

    def to_config(self) -> dict[str, Any]:
        """Return plain numbers and tuples, of which ``stored`` makes an equal one."""
        return asdict(self)

    def reaches(self, coverage: float) -> bool:
        """Return whether the rows are enough for this coverage, of several targets those of one."""
        return math.ceil((self.rows + 1) * coverage) <= self.rows

    def bound(self, coverage: float) -> Array:
        """Return for each target the error that at least this share of new rows does not exceed.

        It is infinite for a target of fewer rows than that takes; ArgumentError if no target has as many.
        """
        coverage = as_number("coverage", coverage, low=0.0, high=1.0, low_open=True, high_open=True)
        if not self.reaches(coverage):
            # rounding may make it one more
            needed = math.ceil(coverage / (1.0 - coverage) - 1e-9)
            raise ArgumentError(
                f"coverage: {coverage:g} needs at least {needed} held-out rows, and the model has {self.rows}; "
                "choose a smaller one, or hold out more rows"
            )
        bounds = []
        for ranks, errors in zip(self.own_ranks or [self.ranks] * len(self.errors), self.errors, strict=True):
            # the next rank that is kept, of which the last is the number of rows
            place = int(np.searchsorted(ranks, math.ceil((max(ranks, default=0) + 1) * coverage)))
            bounds.append(errors[place] if place < len(errors) else np.inf)
        return np.array(bounds)


def judged(
    engine: Session,
    preprocessor: Preprocessor,
    train: Rows,
    validation: Rows | None,
    parts: Sequence[tuple[Session, Array]],
) -> tuple[HeldOut | None, Temperature | None]:
    """Scale the logits of classifiers by the temperature of held-out rows; return the errors of these rows, and it.

    They are the ``validation`` rows; without these ``engine`` was merged of ``parts``, each with those of the ``train``
    rows that it was not trained on. None where there are no such rows, and of several labels a row.
    """
    models: Sequence[tuple[Session, Array | slice]] = parts
    rows, temperature = train, None
    if preprocessor.task == "multilabel":
        return None, None
    if validation is not None:
        models, rows = [(engine, slice(None))], validation
    if not models:
        return None, None
    if engine.loss.is_classification:
        temperature = temperature_of(
            held_out_logits(model, rows.X[held], rows.y[held], None if rows.weight is None else rows.weight[held])
            for model, held in models
        )
    if temperature is not None:
        for model in {id(scaled): scaled for scaled in (engine, *(part for part, _ in models))}.values():
            scale_logits(model, temperature.value)
    errors = [errors_of(model, preprocessor, rows.X[held], rows.labels[held]) for model, held in models]
    held_out = HeldOut.of(np.concatenate(errors), engine.loss)
    if preprocessor.classes is None:
        targets = np.concatenate([train.labels, rows.labels]).reshape(-1, preprocessor.outputs)
        held_out = replace(held_out, nonnegative=tuple(not below.any() for below in (targets < 0).T))
    return held_out, temperature


def errors_of(engine: Session, preprocessor: Preprocessor, X: Array, labels: Array) -> Array:
    """Return the errors of rows, (n,) or (n, targets); X is the network's input, labels are those of the data."""
    if preprocessor.classes is not None:
        right = class_scores(engine, X)[np.arange(len(X)), preprocessor.class_codes(labels)]
        return np.asarray(1.0 - right.astype(np.float64))
    truth = np.asarray(labels, np.float64)
    # as the training counts them
    truth = _comparable(preprocessor, np.maximum(truth, preprocessor.target_low) if preprocessor.target_log else truth)
    low, high, unit = _centres(engine, preprocessor, X, adaptive=True)
    return np.asarray(np.maximum(low - truth, truth - high) / unit)


def _centres(
    engine: Session, preprocessor: Preprocessor, X: Array, *, adaptive: bool
) -> tuple[Array, Array, Array | float]:
    """Return the ends (n, targets) that errors are measured from, comparable, and the unit of each error.

    They are the prediction twice, in the unit 1. If ``adaptive`` they are the outer quantiles of a model that predicts
    these, and the unit of one that predicts standard deviations is these, (n, targets).
    """
    beside = [*distribution(engine, preprocessor, X).values()] if adaptive else []
    if engine.loss.kind == "quantiles" and beside:
        low, high = (_comparable(preprocessor, end) for end in (beside[0], beside[-1]))
        return low, high, 1.0
    centre = _comparable(preprocessor, beside[0] if beside else predictions(engine, preprocessor, X))
    return centre, centre, beside[1].reshape(centre.shape) if beside else 1.0


def _comparable(preprocessor: Preprocessor, values: Array) -> Array:
    """Return values (n, targets), in logarithms where the model learns these."""
    values = values.reshape(len(values), -1)
    return np.log(np.maximum(values, np.finfo(np.float64).tiny)) if preprocessor.target_log else values


def intervals(
    engine: Session, preprocessor: Preprocessor, X: Array, held: HeldOut, coverage: float
) -> tuple[Array, Array]:
    """Return the lower and the upper ends for rows, (n,) or (n, targets); none is below 0 if no target was.

    X is the network's input. Outer quantiles that move in by more than half of their distance meet in the middle.
    """
    low, high, unit = _centres(engine, preprocessor, X, adaptive=held.adaptive)
    # quantiles too far out have a bound below 0
    bound, middle = held.bound(coverage) * unit, (low + high) / 2
    ends = np.minimum(low - bound, middle), np.maximum(high + bound, middle)
    least = [0.0 if bounded else -np.inf for bounded in held.nonnegative or [engine.loss.kind == "poisson"]]
    low, high = (np.maximum(np.exp(end) if preprocessor.target_log else end, least) for end in ends)
    shape = (len(X), -1) if preprocessor.outputs > 1 else len(X)
    return low.reshape(shape), high.reshape(shape)


def spread(models: Sequence[Session], preprocessor: Preprocessor, X: Array, chosen: Array) -> Array:
    """Return the standard deviation over models of their predictions, shaped like ``chosen``, in original units.

    Of classes it is that of the probability of ``chosen``, the codes (n,) of the merged model's classes, and of several
    labels that of the probability of each.
    """
    numbers, of = preprocessor.task == "regression", (np.arange(len(X)), chosen) if chosen.ndim == 1 else ...
    each = [predictions(model, preprocessor, X) if numbers else class_scores(model, X)[of] for model in models]
    return np.asarray(np.std(each, axis=0))


def sets(probabilities: Array, held: HeldOut, coverage: float) -> Array:
    """Return which classes are in the set of each row, bool (n, classes); the most probable one always is."""
    chosen: Array = 1.0 - probabilities.astype(np.float64) <= held.bound(coverage)[0]
    chosen[np.arange(len(chosen)), probabilities.argmax(axis=1)] = True
    return chosen


def summary(engine: Session, preprocessor: Preprocessor, X: Array, held: HeldOut, tested: Judged) -> dict[str, Any]:
    """Return the share of the test rows' truths that intervals or sets of ``COVERAGE`` hold, and their mean size.

    X is the network's input of the test rows. Intervals of several targets, whose units may differ, have no mean size.
    """
    truth = tested.truth
    if tested.scores is not None:
        chosen = sets(tested.scores, held, COVERAGE)
        figures = chosen[np.arange(len(truth)), truth], chosen.sum(axis=1)
    else:
        low, high = (end.reshape(truth.shape) for end in intervals(engine, preprocessor, X, held, COVERAGE))
        # a target of too few held-out rows has no ends
        there = ~np.isnan(truth) & np.isfinite(high)
        figures = ((low <= truth) & (truth <= high))[there], (high - low)[there]
    inside, size = (float(values.mean()) for values in figures)
    report = {"level": COVERAGE, "coverage": inside}
    if len(preprocessor.targets) > 1:
        return report
    return report | {"width" if preprocessor.classes is None else "classes": size}


@dataclass(frozen=True)
class Temperature:
    """The number ``value``, and the log loss of ``rows`` held-out rows before and after."""

    value: float
    rows: int
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f"temperature {self.value:.4g} divides the logits: log loss of {self.rows} held-out rows {self.after:.4g}, "
            f"{self.before:.4g} without"
        )


def held_out_logits(engine: Session, X: Array, y: Array, weight: Array | None) -> tuple[Array, Array, Array]:
    """Return for ``temperature_of`` logits (n, members, classes), classes (n,) and weights of its loss (n,)."""
    logits, codes = engine.inference.member_outputs(X).astype(np.float64), np.asarray(y).reshape(-1).astype(np.int64)
    logits = np.concatenate([np.zeros_like(logits), logits], axis=2) if logits.shape[2] == 1 else logits
    weights = np.ones(len(codes)) if weight is None else weight.astype(np.float64)
    by_class = engine.loss.class_weight
    return logits, codes, weights if by_class is None else weights * np.array(by_class)[codes]


def temperature_of(parts: Iterable[tuple[Array, Array, Array]]) -> Temperature | None:
    """Return the most probable number by held-out rows, given as ``held_out_logits`` returns them, by model.

    It minimises the sum of their log losses and ``(log T / DEVIATION) ** 2 / 2``. None with fewer than ``LEAST_ROWS``
    rows of a weight above 0, and if their log loss falls by less than ``LEAST_GAIN``.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    logits, codes, weights = map(np.concatenate, zip(*parts, strict=True))
    # without members (n, classes)
    logits = logits.reshape(len(logits), -1, logits.shape[-1])
    rows = int((weights > 0).sum())
    if rows < LEAST_ROWS:
        return None
    margins, shares = logits - np.take_along_axis(logits, codes[:, None, None], axis=2), weights / weights.sum()

    def log_loss(logarithm: float) -> float:
        # of the mean of the members' probabilities
        losses = logsumexp(margins / np.exp(logarithm), axis=2)
        return float(shares @ -logsumexp(-losses, axis=1, b=1.0 / losses.shape[1]))

    def objective(logarithm: float) -> float:
        return rows * log_loss(logarithm) + 0.5 * (logarithm / DEVIATION) ** 2

    minimum = minimize_scalar(objective, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-4})
    value = round(float(np.exp(minimum.x)), 4)
    before, after = log_loss(0.0), log_loss(np.log(value))
    return Temperature(value, rows, before, after) if before - after >= LEAST_GAIN else None


def scale_logits(engine: Session, value: float) -> None:
    """Divide the last layer's weights and biases by the number ``value``."""
    state, last = engine.state_dict(), 2 * (engine.network.layers - 1)
    for name in (f"{last}.weight", f"{last}.bias"):
        state[name] = state[name] / value
    biases = engine.merged_biases
    engine.load_state_dict(state)
    engine.merged = None if biases is None else biases / value
