"""A constant and a linear model on the rows of a training: what a network must be better than."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.inputs.arrays import Array

# A linear model of this many numbers, inputs times classes, takes a second or two, and about 250 MB.
MOST_NUMBERS = 20_000_000
ITERATIONS = 200


def baselines(
    preprocessor: Preprocessor, X: Array, labels: Array, test_X: Array, test_labels: Array
) -> dict[str, dict[str, float | None]]:
    """Return the test scores of both, fitted on X (n, inputs) and the labels.

    "constant" is the most frequent class or the mean, "linear" a logistic regression or a ridge regression.
    """
    if preprocessor.classes is None:
        from sklearn.linear_model import Ridge

        values = np.asarray(labels, np.float64).reshape(len(X), -1)
        truth = np.asarray(test_labels, np.float64).reshape(len(test_X), -1)
        constant = np.broadcast_to(values.mean(axis=0), truth.shape)
        linear = Ridge().fit(X, values).predict(test_X).reshape(truth.shape)
        return {"constant": _of_numbers(truth, constant), "linear": _of_numbers(truth, linear)}
    from sklearn.linear_model import LogisticRegression

    codes, right = preprocessor.class_codes(labels), preprocessor.class_codes(test_labels)
    most = int(np.bincount(codes).argmax())
    frequent = float(np.mean(right == most))
    accuracy = frequent
    if len(np.unique(codes)) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = LogisticRegression(max_iter=ITERATIONS).fit(X, codes)
        accuracy = float(np.mean(model.predict(test_X) == right))
    return {"constant": {"accuracy": frequent}, "linear": {"accuracy": accuracy}}


def _of_numbers(truth: Array, predicted: Array) -> dict[str, float | None]:
    from sklearn.metrics import r2_score

    return {
        "rmse": float(np.sqrt(np.mean((truth - predicted) ** 2))),
        "r2": float(r2_score(truth, predicted)) if len(truth) > 1 else None,
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
        if scores.get(figure) is not None
    ]
    if shown:
        yield f"baselines {figure}: {', '.join(shown)}"
