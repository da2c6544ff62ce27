"""A constant and a linear model on the rows of a training: what a network must be better than."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.metrics import Judged
from fusemlp.inputs.arrays import Array
from fusemlp.report.metrics import figures

# A linear model of this many numbers, inputs times classes, takes a second or two, and about 250 MB.
MOST_NUMBERS = 20_000_000
ITERATIONS = 200


def baselines(
    preprocessor: Preprocessor, X: Array, labels: Array, test_X: Array, test_labels: Array
) -> dict[str, dict[str, float]]:
    """Return the test scores of both, fitted on X (n, inputs) and the labels.

    "constant" is the shares of the classes or the mean, "linear" a logistic regression or a ridge regression.
    """
    if preprocessor.classes is None:
        from sklearn.linear_model import Ridge

        values = np.asarray(labels, np.float64).reshape(len(X), -1)
        truth = np.asarray(test_labels, np.float64).reshape(len(test_X), -1)
        constant = np.broadcast_to(values.mean(axis=0), truth.shape)
        linear = Ridge().fit(X, values).predict(test_X).reshape(truth.shape)
        return {
            name: figures(Judged(truth, predicted), probable=False)
            for name, predicted in (("constant", constant), ("linear", linear))
        }
    from sklearn.linear_model import LogisticRegression

    codes, right = preprocessor.class_codes(labels), preprocessor.class_codes(test_labels)
    shares = np.bincount(codes, minlength=preprocessor.outputs) / len(codes)
    constant = np.broadcast_to(shares, (len(right), preprocessor.outputs))
    linear = constant
    if len(np.unique(codes)) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LogisticRegression(max_iter=ITERATIONS).fit(X, codes)
        # A class without training rows has probability 0.
        linear = np.zeros(constant.shape)
        linear[:, model.classes_] = model.predict_proba(test_X)
    return {
        name: figures(Judged(right, scores.argmax(axis=1), scores), probable=True)
        for name, scores in (("constant", constant), ("linear", linear))
    }


def worse_than(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each baseline with a better accuracy, or a lower rmse, than the model on the test rows."""
    figure = "accuracy" if "accuracy" in report["test"] else "rmse"
    mine = report["test"][figure]
    for name, scores in report.get("baselines", {}).items():
        theirs = scores[figure]
        if theirs > mine if figure == "accuracy" else theirs < mine:
            yield f"the model is worse than the {name} one: test {figure} {mine:.4g} against {theirs:.4g}"


def baseline_line(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line with the scores of the baselines."""
    figure = "accuracy" if "accuracy" in report.get("test", {}) else "r2"
    shown = [
        f"{name} {scores[figure]:.4f}"
        for name, scores in report.get("baselines", {}).items()
        if math.isfinite(scores.get(figure, math.nan))
    ]
    if shown:
        yield f"baselines {figure}: {', '.join(shown)}"
