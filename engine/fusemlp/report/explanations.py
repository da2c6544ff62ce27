"""The share of each input in an output of a network, row by row, and the importance of a table's columns."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.checks import as_count, check_choice
from fusemlp.inputs.arrays import Array
from fusemlp.report.evidence import Evidence, Importance, most_important
from fusemlp.report.metrics import predicted_codes
from fusemlp.runtime.session import Session
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError

METHODS = ("integrated", "expected", "gradient")
# The points on each line: those of a quadrature rule, and random ones.
STEPS = {"integrated": 50, "expected": 200, "gradient": 1}
# Integrated gradients double their steps up to the first while their mean error is above this share of the difference.
MOST_STEPS, INEXACT = 800, 0.1


@dataclass(frozen=True, eq=False)
class Attributions:
    """``values`` (n, K) add up to ``outputs`` (n,) less ``base`` (n,), the output at the baseline, but for ``error``.

    ``chosen`` (n,) are the indices of the explained outputs, ``names`` those of the columns, if they have any.
    """

    values: Array
    outputs: Array
    base: Array
    chosen: Array
    names: tuple[str, ...] = ()

    def __repr__(self) -> str:
        rows, columns = self.values.shape
        names = self.names or [f"column {index}" for index in range(columns)]
        shown = most_important(names, self.importance)
        most = np.abs(self.error).max(initial=0.0)
        return f"<Attributions of {rows} rows; the mean of their sizes: {shown}; error at most {most:.1g}>"

    @property
    def error(self) -> Array:
        """The completeness error of each row (n,): ``outputs - base`` less the sum of its attributions."""
        return np.asarray(self.outputs - self.base - self.values.sum(axis=1))

    @property
    def inexact(self) -> bool:
        """True if the mean error is above a tenth of the mean difference, and is more than rounding."""
        sizes = np.abs(self.outputs) + np.abs(self.values).sum(axis=1)
        rounding = 16 * np.finfo(self.values.dtype).eps * sizes.mean()
        return not np.abs(self.error).mean() <= max(INEXACT * np.abs(self.outputs - self.base).mean(), rounding)

    @property
    def importance(self) -> Array:
        """The mean absolute attribution of each column (K,)."""
        return np.asarray(np.abs(self.values).mean(axis=0))


def attributions(
    engine: Session,
    X: Any,
    *,
    method: str = "integrated",
    output: Any = None,
    baseline: Any = None,
    background: Any = None,
    steps: int | None = None,
    seed: int = 0,
) -> Attributions:
    """Return the attributions of the inputs X (n, K) to an output of each row, ``output`` as in ``input_gradient``.

    - integrated: integrated gradients on the straight line from ``baseline`` to the row, by the Gauss-Legendre rule
      with ``steps`` points. More points make the error smaller: unless given they are 50, doubled up to 800 while the
      mean error is above a tenth of the mean difference (M. Sundararajan, A. Taly, Q. Yan, "Axiomatic attribution for
      deep networks", 2017).
    - expected: expected gradients, the mean over ``steps`` random points, 200 unless given, on lines from random rows
      of ``background`` (m, K), whose mean output is ``base`` (G. Erion and others, "Improving performance of deep
      learning models with axiomatic attribution priors and expected gradients", 2021; GradientSHAP without noise).
    - gradient: the gradient at the row times the row less ``baseline``.

    ``baseline`` is a row (K,) or one a row (n, K); None stands for zeros of the network's inputs, which with normalised
    inputs are the columns' means. ``seed`` decides what is drawn. The numbers have the type of the engine.

    Raises ArgumentError, ArgumentTypeError, ShapeError, DTypeError or DataError, before anything has been computed;
    DataError also if integrated gradients are not that exact with 800 points.
    """
    if not isinstance(engine, Session):
        raise ArgumentTypeError(f"engine: expected an Engine, got {type(engine).__name__}")
    check_choice("method", method, METHODS)
    count, drawn = as_count("steps", STEPS[method] if steps is None else steps), as_count("seed", seed, minimum=0)
    expected = method == "expected"
    if expected and background is None:
        raise ArgumentError("background: expected gradients draw baselines from rows; give them, background=X")
    if (baseline if expected else background) is not None:
        unused = "baseline" if expected else "background"
        raise ArgumentError(f"{unused}: the method {method!r} has none; leave it out")
    rows = _checked(engine, "X", X)
    engine.scaling.check_measured()
    if expected:
        start = _checked(engine, "background", background)
    elif baseline is not None:
        start = _checked(engine, "baseline", np.atleast_2d(baseline))
        if len(start) not in (1, len(rows)):
            raise ShapeError(f"baseline: expected one row, or {len(rows)}, one for each row of X, got {len(start)}")
    else:
        start = np.zeros_like(rows[:1]) if engine.scaling.scale is None else engine.scaling.scale.mean[None]
    inference = engine.inference
    chosen = inference.chosen(rows, output)
    seeds, base = inference.seeds(chosen), inference.outputs(start)
    if expected:
        base, random, values = base.mean(axis=0), np.random.default_rng(drawn), np.zeros_like(rows)
        for _ in range(count):
            line = rows - start[random.integers(0, len(start), len(rows))]
            point = rows - line * random.uniform(size=(len(rows), 1)).astype(rows.dtype)
            values += line * inference.input_gradient(point, output=chosen) / count
    else:
        points, weights = _rule(count) if method == "integrated" else (np.ones(1), np.ones(1))
        values = (rows - start) * inference.path_gradient(rows, start, chosen, points, weights)
    result = Attributions(values, (seeds * inference.outputs(rows)).sum(axis=1), (seeds * base).sum(axis=1), chosen)
    while method == "integrated" and steps is None and result.inexact:
        if count == MOST_STEPS:
            gap, difference = (np.abs(part).mean() for part in (result.error, result.outputs - result.base))
            raise DataError(
                f"X: integrated gradients are not exact enough with {count} steps: their sums miss differences of "
                f"{difference:.3g} by {gap:.3g} on average; use the method 'expected' or 'permutation'"
            )
        count *= 2
        result = replace(result, values=(rows - start) * inference.path_gradient(rows, start, chosen, *_rule(count)))
    return result


def _checked(engine: Session, argument: str, X: Any) -> Array:
    """Return checked rows on the host, in the type of the outputs."""
    rows: Array = engine.inputs.on_host(engine.inputs.features(argument, X))
    return rows.astype(np.float64 if engine.precision == "fp64" else np.float32, copy=False)


@lru_cache
def _rule(count: int) -> tuple[Array, Array]:
    """Return the points and weights of the Gauss-Legendre rule on [0, 1]."""
    points, weights = np.polynomial.legendre.leggauss(count)
    return (1 + points) / 2, weights / 2


def column_attributions(
    engine: Session,
    preprocessor: Preprocessor,
    X: Array,
    *,
    method: str = "integrated",
    background: Any = None,
    baseline: Any = None,
    **options: Any,
) -> Attributions:
    """Return the attributions of a table's columns, from ``transform_features``'s inputs X; see ``attributions``.

    Inputs that come from one column are added up, which keeps the sum of a row. Classes have the logit of ``output``,
    numbers their own unit or its logarithm. ``background`` are inputs too, by default X, ``baseline`` is their mean.
    """
    rows = X if background is None else background
    if background is None and baseline is None and len(X) == 1:
        raise ArgumentError("background: a single row is its own baseline; explain several rows, or give other rows")
    if method == "expected":
        options["background"] = rows
    elif baseline is None:
        baseline = np.asarray(rows).mean(axis=0, dtype=np.float64)
    if options.get("output") is None and preprocessor.classes is not None:
        options["output"] = predicted_codes(engine, preprocessor, X)
    parts = attributions(engine, X, method=method, baseline=baseline, **options)
    names, values = preprocessor.by_column(parts.values)
    outputs, base, chosen = parts.outputs, parts.base, parts.chosen
    if preprocessor.classes is None:
        # a target may have several outputs
        at = chosen % preprocessor.outputs
        scale, shift = np.array(preprocessor.target_scale)[at], np.array(preprocessor.target_shift)[at]
        values, outputs, base = values * scale[:, None], outputs * scale + shift, base * scale + shift
    return Attributions(values, outputs, base, chosen, names)


def permutation_importance(
    engine: Session, preprocessor: Preprocessor, X: Array, y: Array, *, repeats: int = 10, seed: int = 0
) -> Importance:
    """Return how much worse the error becomes when a column's values are permuted, mean and deviation of ``repeats``.

    X (n, columns) and y are as in the data; the error is RMSE, log loss or, of classes trained as numbers, less AUC
    (L. Breiman, "Random Forests", 2001). Parts of a date are permuted together, and squares of pixels.

    Raises ArgumentError, and DataError if the error is not defined on these rows.
    """
    if len(X) < 2:
        raise DataError(f"X: permutation mixes rows; expected two or more, got {len(X)}")
    many, drawn = as_count("repeats", repeats, minimum=1), as_count("seed", seed, minimum=0)
    evidence = Evidence(engine, preprocessor, X, y, np.arange(len(X)))
    importance = evidence.importance(most=len(X), repeats=many, seconds=math.inf, seed=drawn)
    if importance is None:
        raise DataError("y: the error is not defined on these rows; give rows of every class, or attribute outputs")
    return importance
