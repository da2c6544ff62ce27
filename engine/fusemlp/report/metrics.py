"""Scores of a model, and of a constant and a linear one, on labelled rows, in original labels and units."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.losses import GaussianNLL, Quantiles
from fusemlp.describe.metrics import METRICS, Judged, metrics_for
from fusemlp.inputs.arrays import Array

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session

# A linear model of this many numbers, inputs times classes, takes a second or two, and about 250 MB.
MOST_NUMBERS = 20_000_000
ITERATIONS = 200
# The most inputs of a logistic regression by Newton's method, whose matrix has a row and a column for each.
NEWTON_INPUTS = 1000


def predicted_codes(engine: Session, preprocessor: Preprocessor, X: Array) -> Array:
    """Return ``engine.predict``, of several quantiles the middle one; after one-hot training, the class index of the
    largest output of each row."""
    if preprocessor.one_hot_targets:
        return np.asarray(class_scores(engine, X).argmax(axis=1))
    return np.asarray(engine.loss.judged(engine.inference.predict(X))[0])


def distribution(engine: Session, preprocessor: Preprocessor, X: Array) -> dict[str, Array]:
    """Return by name what the loss says beside a value, in original units: quantiles, or mean and deviation."""
    decode, loss = preprocessor.decode_predictions, engine.loss
    if isinstance(loss, Quantiles):
        columns = decode(engine.inference.predict(X)).reshape(len(X), -1).T
        return {f"q{100 * q:g}": column for q, column in zip(loss.q, columns, strict=True)}
    if isinstance(loss, GaussianNLL):
        mean, std = engine.inference.predict_std(X)
        return {"mean": decode(mean), "std": std * np.array(preprocessor.target_scale)}
    return {}


def class_scores(engine: Session, X: Array) -> Array:
    """Return the probabilities (n, classes); after one-hot training the outputs."""
    if engine.loss.is_classification:
        return engine.inference.predict_proba(X)
    # the outputs of a single class have one axis
    return engine.inference.predict(X).reshape(len(X), -1)


def predictions(engine: Session, preprocessor: Preprocessor, X: Array) -> Array:
    """Return labels (n,), or values (n,) or (n, targets) in original units; X is ``transform_features``'s result."""
    return preprocessor.decode_predictions(predicted_codes(engine, preprocessor, X))


def judge(engine: Session, preprocessor: Preprocessor, X: Array, labels: Array) -> Judged:
    """Return the truth of rows beside predictions and scores; numbers in original units."""
    if preprocessor.classes is None:
        truth = np.asarray(labels, np.float64).reshape(len(X), -1)
        predicted, quantile = engine.loss.judged(engine.inference.predict(X))
        return Judged(truth, preprocessor.decode_predictions(predicted).reshape(truth.shape), quantile=quantile)
    scores = class_scores(engine, X)
    return Judged(preprocessor.class_codes(labels), scores.argmax(axis=1), scores)


def score(
    engine: Session, preprocessor: Preprocessor, X: Array, labels: Array, weight: Any = None
) -> tuple[dict[str, Any], Judged]:
    """Return the model's loss and scores on rows, and its predictions; X is the network's input, labels the data's."""
    y, judged = preprocessor.encode_targets(labels), judge(engine, preprocessor, X, labels)
    report: dict[str, Any] = {"rows": len(X), "loss": engine.inference.evaluate(X, y, weight)["loss"]}
    report |= figures(judged, probable=engine.loss.is_classification)
    if preprocessor.classes is not None:
        report |= class_figures(judged.truth, judged.predicted, preprocessor.labels)
    return report, judged


def figures(judged: Judged, *, probable: bool) -> dict[str, float]:
    """Return the scores of classes or numbers; ``probable``: the scores of classes are probabilities."""
    if judged.scores is None:
        return {name: metric.of(judged) for name, metric in metrics_for("numbers").items()}
    metrics = metrics_for("classes" if probable else "one-hot rows")
    accuracy = float(np.mean(judged.truth == judged.predicted))
    return {"accuracy": accuracy, **{name: metric.of(judged) for name, metric in metrics.items()}}


def class_figures(codes: Array, predicted: Array, names: Sequence[str]) -> dict[str, Any]:
    """Return scores of each class, 0 where undefined, and the confusion matrix with a row for each true class."""
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

    every = np.arange(len(names))
    columns = precision_recall_fscore_support(codes, predicted, labels=every, zero_division=0)
    return {
        "classes": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "rows": int(n)}
            for name, p, r, f, n in zip(names, *columns, strict=True)
        },
        "confusion_matrix": confusion_matrix(codes, predicted, labels=every).tolist(),
    }


def headline(report: Mapping[str, Any], name: str = "test") -> Iterator[str]:
    """Yield a line for each scalar score: ``test accuracy 0.9722``."""
    for figure, value in scalars(report).items():
        yield f"{name} {figure} {spelled(value)}"


def spelled(value: float, beside: float | None = None) -> str:
    """Return a score as text, with six digits from 100 on; ``beside``: with the decimals of this larger score."""
    size = abs(value if beside is None else beside)
    if not 1e-3 <= size < 1e6:
        return f"{value:.4g}"
    return f"{value:z.{max(places for places in range(5) if size < 10 ** (6 - places))}f}"


def scalars(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalar scores that are defined and say more than the others: no median pinball, no second loss."""
    scores = {name: report[name] for name in ("loss", "accuracy", *METRICS) if report.get(name) is not None}
    for name, other, share in (("log_loss", "loss", 1.0), ("pinball", "mae", 0.5)):
        if name in scores and math.isclose(scores[name], share * scores[other], rel_tol=1e-4):
            del scores[name]
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def class_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the scores of each class as rows of text, below a header."""
    rows = [["class", "precision", "recall", "f1", "rows"]]
    for name, figures in report["classes"].items():
        rows.append([name, *[f"{figures[key]:.4f}" for key in ("precision", "recall", "f1")], str(figures["rows"])])
    return rows


def confusion_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the confusion matrix as rows of text, below a header: true classes down, predicted ones across."""
    names = list(report["classes"])
    body = [[name, *map(str, counts)] for name, counts in zip(names, report["confusion_matrix"], strict=True)]
    return [["true \\ predicted", *names], *body]


def baselines(
    preprocessor: Preprocessor, X: Array, labels: Array, test_X: Array, test_labels: Array
) -> dict[str, dict[str, float]]:
    """Return the test scores of both, fitted on X (n, inputs), which may be overwritten, and the labels.

    "constant" is the shares of the classes or the mean, "linear" a logistic regression or a ridge regression.
    """
    if preprocessor.classes is None:
        values = np.asarray(labels, np.float64).reshape(len(X), -1)
        truth = np.asarray(test_labels, np.float64).reshape(len(test_X), -1)
        predicted = {"constant": np.broadcast_to(values.mean(axis=0), truth.shape), "linear": ridge(X, values, test_X)}
        return {name: figures(Judged(truth, numbers), probable=False) for name, numbers in predicted.items()}
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    codes, right = preprocessor.class_codes(labels), preprocessor.class_codes(test_labels)
    # a class without training rows has probability 0
    constant = np.tile(np.bincount(codes, minlength=preprocessor.outputs) / len(codes), (len(right), 1))
    linear = constant.copy()
    if constant.max() < 1.0:
        # Newton's method takes a fifth of the time where its matrix is small
        solver = "newton-cholesky" if preprocessor.outputs <= 2 and X.shape[1] <= NEWTON_INPUTS else "lbfgs"
        # beside other work the threads of a BLAS wait for one another
        with warnings.catch_warnings(), threadpool_limits(1, "blas"):
            warnings.simplefilter("ignore")
            model = LogisticRegression(max_iter=ITERATIONS, solver=solver).fit(X, codes)
        linear[:, model.classes_] = np.concatenate([model.predict_proba(part) for part in dense_parts(test_X)])
    predicted = {"constant": constant, "linear": linear}
    return {name: figures(Judged(right, p.argmax(axis=1), p), probable=True) for name, p in predicted.items()}


def dense_parts(X: Any) -> Iterator[Array]:
    """Yield dense rows of X, perhaps Columns, of ``MOST_NUMBERS`` numbers at most."""
    step = max(1, MOST_NUMBERS // max(1, X.shape[1]))
    return (np.asarray(X[start : start + step]) for start in range(0, len(X), step))


def ridge(X: Array, values: Array, test_X: Array) -> Array:
    """Return the numbers (m, N) that a ridge regression of strength 1 on X (n, K) and values (n, N) predicts.

    X is centred in place. It solves the normal equations, or their dual of fewer rows than inputs, as scikit-learn's,
    whose import takes a second; by singular values where rounding has left the equations indefinite.
    """
    from scipy import linalg

    values, wide = values.astype(X.dtype), X.shape[1] > len(X)
    centre, mean = X.mean(axis=0), values.mean(axis=0)
    X -= centre
    values -= mean
    gram = X @ X.T if wide else X.T @ X
    gram.flat[:: len(gram) + 1] += 1.0
    try:
        solved = linalg.solve(gram, values if wide else X.T @ values, assume_a="pos", overwrite_a=True)
        weights = X.T @ solved if wide else solved
    except linalg.LinAlgError:
        rows, sizes, inputs = np.linalg.svd(X, full_matrices=False)
        weights = inputs.T @ ((sizes / (sizes**2 + 1.0))[:, None] * (rows.T @ values))
    return np.asarray(np.concatenate([part @ weights for part in dense_parts(test_X)]) + (mean - centre @ weights))


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
