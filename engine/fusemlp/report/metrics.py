"""Scores of a model, and of a constant and a linear one, on labelled rows, in original labels and units."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.checks import counted, some
from fusemlp.describe.losses import ElementLoss, GaussianNLL, Quantiles
from fusemlp.describe.metrics import METRICS, Judged, metrics_for, rises
from fusemlp.inputs.arrays import Array
from fusemlp.runtime.session import Session
from fusemlp_kernels.pointwise import LossOptions, elements

# A linear model of this many numbers, inputs times classes, takes a second or two, and about 250 MB.
MOST_NUMBERS = 20_000_000
ITERATIONS = 200
# A class with fewer test rows may go unanswered by chance.
FEWEST_MISSED = 5
# Columns that a verdict names.
MOST_NAMED = 8
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
        return dict(zip(loss.names, columns, strict=True))
    if isinstance(loss, GaussianNLL):
        mean, std = engine.inference.predict_std(X, engine.merged_biases)
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
    if preprocessor.task == "multilabel":
        return Judged.of_labels(labels, class_scores(engine, X))
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
    report: dict[str, Any] = {"rows": len(X), "loss": _loss(engine, X, y, weight)}
    report |= figures(judged, probable=engine.loss.is_classification)
    if len(names := preprocessor.targets) > 1:
        report["targets"] = {name: figures(judged.of_target(at), probable=False) for at, name in enumerate(names)}
    if judged.truth.dtype.kind == "i" and judged.truth.ndim == 2:
        report["subset_accuracy"] = float((judged.truth == judged.predicted).all(axis=1).mean())
    if preprocessor.classes is not None:
        report |= class_figures(judged.truth, judged.predicted, preprocessor.labels)
    if isinstance(engine.loss, Quantiles):
        predicted = np.column_stack([*distribution(engine, preprocessor, X).values()])
        report["quantiles"] = quantile_figures(engine.loss, predicted, judged.truth)
    return report, judged


def quantile_figures(loss: Quantiles, predicted: Array, truth: Array) -> dict[str, dict[str, float]]:
    """Return for each quantile by name its pinball loss and the share of the ``truth`` (n, 1) that is not above it.

    ``predicted`` (n, levels) are the quantiles. The share should be near the level.
    """
    pinball = METRICS["pinball"]
    return {
        name: {
            "pinball": pinball.of_rows(Judged(truth, column[:, None], quantile=level)),
            "below": float(np.mean(truth[:, 0] <= column)),
        }
        for name, level, column in zip(loss.names, loss.q, predicted.T, strict=True)
    }


def _loss(engine: Session, X: Array, y: Array, weight: Any) -> float:
    """Return the loss of rows, of which a model that was trained without gaps in its targets may have some."""
    loss = engine.loss
    if not isinstance(loss, ElementLoss) or loss.missing or not np.isnan(y).any():
        return engine.inference.evaluate(X, y, weight)["loss"]
    outputs, truth = engine.inference.outputs(X).astype(np.float64), y.reshape(len(y), -1)
    there, count = ~np.isnan(truth), truth.shape[1]
    raw = outputs[:, -count:][there]
    values = elements(loss.kind, outputs[:, :count][there], truth[there], raw, **loss.shared(LossOptions))
    shares = np.broadcast_to(1.0 if weight is None else np.asarray(weight)[:, None], truth.shape)[there]
    return float(shares @ values) / (float(shares.sum()) if loss.reduction == "mean" else 1.0)


def figures(judged: Judged, *, probable: bool) -> dict[str, float]:
    """Return the scores of classes, labels or numbers; ``probable``: the scores of classes are probabilities."""
    if judged.scores is None:
        return {name: metric.of_rows(judged) for name, metric in metrics_for("numbers").items()}
    several = judged.truth.ndim == 2
    metrics = metrics_for("labels" if several else "classes" if probable else "one-hot rows")
    accuracy = float(np.mean((judged.truth == judged.predicted)[~np.isnan(judged.truth)]))
    return {"accuracy": accuracy, **{name: metric.of_rows(judged) for name, metric in metrics.items()}}


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
    """Yield a line for each scalar score: ``test accuracy 0.9722``; of several targets the means, then each."""
    for figure, value in scalars(report).items():
        yield f"{name} {figure} {scored(figure, value)}"
    for target, scores in report.get("targets", {}).items():
        figures = ", ".join(f"{figure} {scored(figure, value)}" for figure, value in scalars(scores).items())
        yield f"{name} {target!r}: {figures}"
    for quantile, scores in report.get("quantiles", {}).items():
        yield f"{name} {quantile}: pinball {spelled(scores['pinball'])}, {scores['below']:.1%} of the targets below"


def scored(name: str, value: float) -> str:
    """Return a score as text: of a share, such as an accuracy, four decimals also near 0, and more near 1."""
    if not rises(name):
        return spelled(value)
    return f"{value:.{_decimals(value)}f}" if _decimals(value) > 4 else spelled(value, max(1.0, abs(value)))


def in_percent(share: float) -> str:
    """Return a share as ``97.7%``; one below 1 is no 100%."""
    return f"{share:.{max(1, _decimals(share) - 2)}%}"


def _decimals(share: float) -> int:
    """Return the decimals of a share that show its distance from 1, 0 for less than 1e-9."""
    return -math.floor(math.log10(1.0 - share)) if 0.0 <= share <= 1.0 - 1e-9 else 0


def spelled(value: float, beside: float | None = None) -> str:
    """Return a number as people read it: four decimals, from 100 on six digits, below 0.001 two digits.

    ``beside``: with the decimals of this larger number.
    """
    size = abs(value if beside is None else beside)
    if size and not 1e-6 <= size < 1e15:
        return f"{value:.3g}"
    digits = math.floor(math.log10(size or 1.0))
    return f"{value:z.{1 - digits if digits < -3 else min(4, max(0, 5 - digits))}f}"


def plain(value: float) -> str:
    """Return a number of the data as text: ``spelled`` without zeros at its end."""
    text = spelled(value)
    return text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text


def scalars(report: Mapping[str, Any]) -> dict[str, float]:
    """Return the scalar scores that are defined and say more than the others: no median pinball, no second loss."""
    scores = {
        name: report[name] for name in ("loss", "accuracy", "subset_accuracy", *METRICS) if report.get(name) is not None
    }
    for name, other, share in (("log_loss", "loss", 1.0), ("pinball", "mae", 0.5)):
        if name in scores and math.isclose(scores[name], share * scores[other], rel_tol=1e-4):
            del scores[name]
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def class_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return scores and counts of each class as rows of text, below a header."""
    rows, counts = [["class", "precision", "recall", "f1", "rows", "answered", "right"]], report["confusion_matrix"]
    for code, (name, figures) in enumerate(report["classes"].items()):
        answered, right = sum(row[code] for row in counts), counts[code][code]
        shares = [f"{figures[key]:.4f}" for key in ("precision", "recall", "f1")]
        rows.append([name, *shares, *map(str, (figures["rows"], answered, right))])
    return rows


def confusion_table(report: Mapping[str, Any]) -> list[list[str]]:
    """Return the confusion matrix as rows of text, below a header: true classes down, predicted ones across."""
    names = list(report["classes"])
    body = [[name, *map(str, counts)] for name, counts in zip(names, report["confusion_matrix"], strict=True)]
    return [["true \\ predicted", *names], *body]


def baselines(
    preprocessor: Preprocessor, X: Array, labels: Array, test_X: Array, test_labels: Array, *, balanced: bool = False
) -> dict[str, dict[str, float]]:
    """Return the test scores of both, fitted on X (n, inputs), which may be overwritten, and the labels.

    "constant" is the shares of the classes or the mean, "linear" a logistic regression, of classes that weigh alike if
    ``balanced``, or a ridge regression, also of labels.
    """
    if preprocessor.classes is None:
        values = np.asarray(labels, np.float64).reshape(len(X), -1)
        truth = np.asarray(test_labels, np.float64).reshape(len(test_X), -1)
        there = ~np.isnan(values)
        parts = [(slice(None), slice(None))] if there.all() else [(kept, [at]) for at, kept in enumerate(there.T)]
        linear = np.hstack([ridge(X[kept], values[kept][:, at], test_X) for kept, at in parts])
        predicted = {"constant": np.broadcast_to(np.nanmean(values, axis=0), truth.shape), "linear": linear}
        judges = Judged.of_labels if preprocessor.task == "multilabel" else Judged
        return {name: figures(judges(truth, numbers), probable=False) for name, numbers in predicted.items()}
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
            weight = "balanced" if balanced else None
            model = LogisticRegression(max_iter=ITERATIONS, solver=solver, class_weight=weight).fit(X, codes)
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


def _standing(report: Mapping[str, Any]) -> tuple[str, list[float], float] | None:
    """Return the figure that judges, its values of the model and of each baseline, and twice the standard error.

    It is the accuracy, or the one that the report is ``judged_by``, and R2 of numbers.

    Of a share p the error is sqrt(p (1 - p) / n), of the mean of such shares the root of their mean square over the
    root of their number, of R2 in large samples 2 sqrt(R2 / n) (1 - R2) (Olkin and Finn,
    "Correlations redux", 1995). None where they are undefined, and for a quantile that is not the median: it is to be
    wrong on one side.
    """
    models = [report.get("test", {}), *report.get("baselines", {}).values()]
    test, classifies = models[0], "accuracy" in models[0]
    figure = report.get("judged_by", "accuracy") if classifies else "r2"
    shares = [scores.get(figure) for scores in models]
    if len(shares) < 3 or not all(share is not None and math.isfinite(share) for share in shares):
        return None
    half = test.get("mae", 0.0) / 2.0
    if not classifies and not math.isclose(test.get("pinball", half), half, rel_tol=1e-4):
        return None
    mine, rows = max(0.0, shares[0]), test["rows"]
    if not classifies:
        return figure, shares, 4.0 * math.sqrt(mine / rows) * (1.0 - mine)
    classes = [] if figure == "accuracy" else [(c["recall"], c["rows"]) for c in test["classes"].values() if c["rows"]]
    parts = classes or [(mine, rows)]
    return figure, shares, 2.0 * math.sqrt(sum(share * (1.0 - share) / n for share, n in parts)) / len(parts)


def worse_than(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each baseline that is better on the test rows, but for the constant by more than chance.

    The figure of ``_standing`` decides, of numbers the rmse; of several targets, whose units may differ, the mean R2.
    """
    if (standing := _standing(report)) is None:
        return
    (figure, (mine, *others), chance), test = standing, report["test"]
    figure = "rmse" if figure == "r2" and "targets" not in test else figure
    for (name, scores), theirs in zip(report["baselines"].items(), others, strict=True):
        if theirs - mine > (0.0 if name == "constant" else chance):
            against = f"{test[figure]:.4g} against {scores[figure]:.4g}"
            yield f"the model is worse than the {name} one: test {figure} {against}"


def verdict(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line on the test scores beside those of the baselines, and lines on what to do with model and columns.

    A gain of less than two standard errors may be chance.
    """
    if (standing := _standing(report)) is not None:
        yield from _judgement(report, *standing)
    if earlier := report.get("baselines", {}).get("earlier"):
        scores = ", ".join(f"{name} {scored(name, value)}" for name, value in earlier.items())
        yield f"the model it started from, on these rows: {scores}"
    if left_out := report.get("left_out"):
        reasons = some([f"{name!r} ({reason})" for name, reason in left_out.items()], MOST_NAMED)
        yield f"it leaves out {reasons}; --keep COLUMN takes one in"


def _judgement(report: Mapping[str, Any], figure: str, shares: Sequence[float], chance: float) -> Iterator[str]:
    (mine, least, linear, *_), test = (max(0.0, share) for share in shares), report["test"]
    rows = counted(test["rows"], "test row")
    if figure != "r2":
        of = rows if figure == "accuracy" else f"the rows of a class on average, {rows} in all"
        of, alone = (f"the labels of {of}", "answer to each") if "targets" in test else (of, "class")
        line = f"right on {in_percent(mine)} of {of}, a linear model on {in_percent(linear)}"
        yield f"{line}, the most frequent {alone} alone on {least:.1%}"
    else:
        line = f"explains {in_percent(mine)} of the variation in {rows}, a linear model {in_percent(linear)}"
        # the errors of several targets may have other units
        if "targets" not in test:
            both = test, report["baselines"]["constant"]
            off, alone = (plain(float(f"{scores['mae']:.3g}")) for scores in both)
            line += f"; off by {off} on average, the mean alone by {alone}"
        yield line
    table = class_table(test)[1:] if "classes" in test else []
    if never := [row for row in table if row[5] == "0" and int(row[4]) >= FEWEST_MISSED]:
        more = f" and {len(never) - 1} other classes" if len(never) > 1 else ""
        mend = "train with --class-weight balanced, or " if figure == "accuracy" else ""
        yield f"it never answers {never[0][0]!r} (true of {never[0][4]} rows){more}: {mend}decide by the probabilities"
    elif mine <= least:
        yield "it has learned nothing of use: look at its training, and try rates with fusemlp lr-find"
    elif abs(mine - linear) <= chance:
        yield "its distance from the linear model may be chance: more test rows would tell"
    elif mine < linear:
        yield "the linear model is better: use one, or try rates and widths with fusemlp sweep"
    else:
        yield "its gain over the linear model is more than chance: use the network"
