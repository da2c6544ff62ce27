"""Scores of a model on labelled rows beside its loss, each with its direction, as scikit-learn defines them.

Those of numbers are computed here: the import of scikit-learn takes a second.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from fusemlp.describe.checks import function_name, returned_number
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, unknown_name

Array = npt.NDArray[Any]
# Kinds of targets: classes with probabilities, classes as one-hot rows of a regression, several labels a row, numbers.
KINDS = ("classes", "one-hot rows", "labels", "numbers")


@dataclass(frozen=True)
class Judged:
    """Rows with their truth and the model's answers.

    ``truth`` and ``predicted``: class indices (n,), labels 0 or 1 (n, N), or numbers (n, N). ``scores`` (n, N):
    probabilities, for one-hot rows the outputs, for numbers None. ``quantile``: the one that pinball is of. NaN in
    ``truth`` (n, N) stands for a missing target.
    """

    truth: Array
    predicted: Array
    scores: Array | None = None
    weight: Array | None = None
    quantile: float = 0.5

    @classmethod
    def of_labels(cls, truth: Array, scores: Array, weight: Array | None = None) -> Judged:
        """Return labels, whose scores above one half mean yes."""
        truth = truth if np.isnan(truth).any() else truth.astype(np.int64)
        return cls(truth, (scores > 0.5).astype(np.int64), scores, weight)

    def part(self, rows: Any) -> Judged:
        """Return some of the rows."""
        scores, weight = (None if part is None else part[rows] for part in (self.scores, self.weight))
        return Judged(self.truth[rows], self.predicted[rows], scores, weight, self.quantile)

    def of_target(self, at: int) -> Judged:
        """Return one of several targets: of numbers a column, of labels two, which scikit-learn takes for labels."""
        columns = [at] if self.scores is None else [at, at]
        scores = None if self.scores is None else self.scores[:, columns]
        return replace(self, truth=self.truth[:, columns], predicted=self.predicted[:, columns], scores=scores)


@dataclass(frozen=True)
class Metric:
    """A score: its name, whether it ``rises`` with the quality of a model, its kinds of targets, its computation.

    ``of`` takes ``Judged`` rows, or with ``of_outputs``, as a function of the caller's does, targets as the loss takes
    them and outputs (n, N); it returns a number.
    """

    name: str
    rises: bool
    kinds: tuple[str | None, ...]
    of: Callable[..., float]
    of_outputs: bool = False

    def of_rows(self, rows: Judged) -> float:
        """Return the score; with missing targets the mean of those of the targets, each of the rows that have it."""
        if rows.truth.dtype.kind != "f" or not (missing := np.isnan(rows.truth)).any():
            return self.of(rows)
        scores = []
        for at, kept in enumerate(~missing.T):
            part = rows.part(kept).of_target(at)
            part = replace(part, truth=part.truth.astype(part.predicted.dtype))
            counted = kept.any() and (part.weight is None or part.weight.any())
            scores.append(self.of(part) if counted else np.nan)
        return float(np.mean([score for score in scores if not np.isnan(score)] or np.nan))


MetricLike: TypeAlias = "str | Metric | Callable[[Array, Array], Any]"
"""A metric by its name, an object, or a function f(targets, outputs) -> number."""


def _auc(rows: Judged) -> float:
    """Return the area under the ROC curve; of several classes or labels the mean over those with rows of both kinds."""
    from sklearn.metrics import roc_auc_score

    assert rows.scores is not None
    classes, areas = rows.scores.shape[1], []
    for code in range(int(rows.truth.ndim == 1 and classes == 2), classes):
        positive = rows.truth == code if rows.truth.ndim == 1 else rows.truth[:, code] == 1
        if positive.any() and not positive.all():
            areas.append(roc_auc_score(positive, rows.scores[:, code], sample_weight=rows.weight))
    return float(np.mean(areas)) if areas else float("nan")


def _log_loss(rows: Judged) -> float:
    # not scikit-learn's, which counts a row at most as 36
    assert rows.scores is not None
    probabilities = rows.scores[np.arange(len(rows.truth)), rows.truth]
    least = np.finfo(probabilities.dtype).smallest_subnormal
    return -float(np.average(np.log(np.maximum(probabilities, least), dtype=np.float64), weights=rows.weight))


def _balanced_accuracy(rows: Judged) -> float:
    # balanced_accuracy_score warns of a predicted class without rows
    return _by("recall_score", average="macro", labels=np.unique(rows.truth), zero_division=0.0)(rows)


def _of_numbers(of: Callable[[Array, Judged], Array]) -> Callable[[Judged], float]:
    """Return the mean over the targets of ``of``, a function of the errors (n, N): truth less prediction."""

    def mean(rows: Judged) -> float:
        truth, predicted = (part.reshape(len(part), -1) for part in (rows.truth, rows.predicted))
        dtype = np.result_type(truth, predicted, *([] if rows.weight is None else [rows.weight]))
        truth = truth.astype(dtype)
        return float(np.mean(of(truth - predicted, replace(rows, truth=truth))))

    return mean


def _average(values: Array, rows: Judged) -> Array:
    return np.asarray(np.average(values, axis=0, weights=rows.weight))


def _pinball(errors: Array, rows: Judged) -> Array:
    return _average(np.where(errors >= 0, rows.quantile * errors, (rows.quantile - 1.0) * errors), rows)


def _r2(errors: Array, rows: Judged) -> Array:
    """Return the share of the variance that is explained; of a constant target 1 without any error, else 0."""
    if len(errors) < 2:
        return np.full(errors.shape[1], np.nan)
    weight = 1.0 if rows.weight is None else rows.weight[:, None]
    left, whole = (weight * part**2 for part in (errors, rows.truth - _average(rows.truth, rows)))
    left, whole = left.sum(axis=0), whole.sum(axis=0)
    return np.asarray(np.where(whole != 0, 1 - left / np.where(whole != 0, whole, 1), left == 0))


def _by(name: str, **options: Any) -> Callable[[Judged], float]:
    """Return the metric that is scikit-learn's function of this name with these options."""

    def of(rows: Judged) -> float:
        import sklearn.metrics

        function = getattr(sklearn.metrics, name)
        return float(function(rows.truth, rows.predicted, sample_weight=rows.weight, **options))

    return of


METRICS = {
    one.name: one
    for one in (
        Metric("balanced_accuracy", True, KINDS[:2], _balanced_accuracy),
        Metric("f1", True, KINDS[:3], _by("f1_score", average="macro", zero_division=0.0)),
        Metric("auc", True, KINDS[:3], _auc),
        Metric("log_loss", False, KINDS[:1], _log_loss),
        Metric("rmse", False, KINDS[3:], _of_numbers(lambda errors, rows: np.sqrt(_average(errors**2, rows)))),
        Metric("mae", False, KINDS[3:], _of_numbers(lambda errors, rows: _average(np.abs(errors), rows))),
        Metric("r2", True, KINDS[3:], _of_numbers(_r2)),
        Metric("pinball", False, KINDS[3:], _of_numbers(_pinball)),
    )
}


_NAMES_ELSEWHERE = {
    **dict.fromkeys(("acc", "categorical_accuracy", "sparse_categorical_accuracy", "binary_accuracy"), "'accuracy'"),
    **dict.fromkeys(("f1_score", "F1Score"), "'f1'"),
    **dict.fromkeys(("AUC", "roc_auc"), "'auc'"),
    **dict.fromkeys(("mean_absolute_error", "MAE"), "'mae'"),
    **dict.fromkeys(("mse", "MSE", "mean_squared_error"), "'rmse' (its square root)"),
    "root_mean_squared_error": "'rmse'",
    "r2_score": "'r2'",
}


def metrics_for(kind: str) -> dict[str, Metric]:
    """Return the metrics of a kind of targets, by name."""
    return {name: metric for name, metric in METRICS.items() if kind in metric.kinds}


def rises(name: str) -> bool:
    """Return whether a logged quantity such as "val_auc" is better when larger: accuracies, scores, some metrics."""
    metric = METRICS.get(name.removeprefix("val_"))
    return name.endswith(("accuracy", "score")) if metric is None else metric.rises


def _of_function(argument: str, function: Callable[..., Any]) -> Metric:
    """Return the metric ``function(targets, outputs)``; one whose name ends in accuracy or score rises."""
    name = function_name(function)

    def of(targets: Array, outputs: Array) -> float:
        return returned_number(argument, name, function(targets, outputs))

    return Metric(name, rises(name), (*KINDS, None), of, of_outputs=True)


def as_metrics(
    argument: str, choices: Iterable[MetricLike], kind: str | None, *, counts_hits: bool = True
) -> tuple[Metric, ...]:
    """Check metrics, names, objects or functions, for targets of ``kind``; None: those that functions alone are for.

    "accuracy" is left out: it is always there, but for numbers and for losses that count no hits.
    """
    if isinstance(choices, str | Metric) or not isinstance(choices, Iterable):
        raise ArgumentTypeError(f"{argument}: expected a list of names such as ['auc'], got {choices!r}")
    metrics: dict[str, Metric] = {}
    for choice in choices:
        if choice == "accuracy" and kind != "numbers":
            if not counts_hits:
                raise ArgumentError(
                    f"{argument}: a function as loss counts no 'accuracy'; give a function of targets and outputs, "
                    "such as (outputs.argmax(axis=1) == targets).mean()"
                )
            continue
        metric = choice if isinstance(choice, Metric) else METRICS.get(choice) if isinstance(choice, str) else None
        if callable(choice):
            metric = _of_function(argument, choice)
            if metric.name in {"accuracy", "loss"} | METRICS.keys() | metrics.keys():
                raise ArgumentError(f"{argument}: there are two of the name {metric.name!r}; rename the function")
        if metric is None and not isinstance(choice, str):
            raise ArgumentTypeError(
                f"{argument}: expected names such as 'auc', functions f(targets, outputs) -> number, or Metric(name, "
                f"rises, kinds, of) of fusemlp.describe.metrics, got {choice!r}"
            )
        if metric is None and choice in _NAMES_ELSEWHERE:
            raise ArgumentError(f"{argument}: unknown name {choice!r}; it is called {_NAMES_ELSEWHERE[choice]} here")
        if metric is None:
            raise unknown_name(argument, choice, ["accuracy", *METRICS] if kind != "numbers" else METRICS)
        if kind not in metric.kinds:
            there = f"for {kind} there are {', '.join(metrics_for(kind))}" if kind else "for these give a function"
            raise ArgumentError(f"{argument}: {metric.name} is for {' and '.join(filter(None, metric.kinds))}; {there}")
        metrics[metric.name] = metric
    return tuple(metrics.values())
