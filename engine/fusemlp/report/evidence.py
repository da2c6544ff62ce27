"""Evidence on a model from test rows: ROC, calibration, importance of the columns, most wrong rows, robustness.

Robust scores are of rows that an attack has changed; certified ones hold for all numbers within a distance.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import network_inputs
from fusemlp.describe.checks import as_number
from fusemlp.describe.conflicts import check_together
from fusemlp.describe.metrics import METRICS, Judged
from fusemlp.inputs.arrays import Array
from fusemlp.report.metrics import headline, judge, plain, score, spelled
from fusemlp.runtime.attacks import Propagation, attack
from fusemlp.runtime.session import Session

# Rows for curves and most wrong rows, and for each permutation of a column.
MOST_ROWS, PERMUTED_ROWS = 50_000, 500
# Seconds after which no further column is permuted.
SECONDS, REPEATS = 3.0, 3
PARTS = 10
# ROC curves, and most wrong rows.
CURVES, WORST = 6, 12
# A line on columns names this many.
SHOWN = 5
# A heat map of an image has at most this many squares a side.
SIDE = 8
_PIXEL = re.compile(r"pixel_(\d+)_(\d+)")
# The scores under an attack.
FIGURES = ("loss", "accuracy", "rmse")


class Importance(NamedTuple):
    """The loss of the score ``metric`` when the columns ``names`` are permuted, the most important first.

    ``features`` are those of each column, ``worse`` and ``deviation`` are mean and standard deviation over the
    permutations of ``rows`` rows; ``left_out`` columns were not tried.
    """

    metric: str
    names: list[str]
    features: list[Array]
    worse: Array
    deviation: Array
    rows: int
    left_out: int

    def __repr__(self) -> str:
        shown = most_important(self.names, self.worse)
        return f"<Importance of {len(self.names)} columns for {self.metric}, by {self.rows} rows: {shown}>"


def most_important(names: Sequence[str], sizes: Array) -> str:
    """Return the largest of the columns' sizes in words."""
    first = np.argsort(-sizes, kind="stable")[:SHOWN]
    return ", ".join(f"{names[index]} {sizes[index]:.3g}" for index in first) + (" ..." if len(sizes) > SHOWN else "")


def image_shape(preprocessor: Preprocessor) -> tuple[int, int] | None:
    """Return height and width if the columns are the pixels of an image, else None."""
    names = preprocessor.feature_names
    last = _PIXEL.fullmatch(names[-1])
    shape = (int(last[1]) + 1, int(last[2]) + 1) if last else (0, 0)
    return shape if shape[0] * shape[1] == len(names) else None


@dataclass(eq=False)
class Evidence:
    """A model and test rows as in the data: ``rows`` of X (n, columns), NaN for missing cells, and of ``y``.

    ``MOST_ROWS`` of them at most count. ``ids`` (n,) name the rows; ``known`` has the predictions of ``rows``.
    """

    engine: Session
    preprocessor: Preprocessor
    X: Array
    y: Array
    rows: Array
    ids: Mapping[str, Array] = field(default_factory=dict)
    known: InitVar[Judged | None] = None

    def __post_init__(self, known: Judged | None) -> None:
        if len(self.rows) > MOST_ROWS:
            drawn = np.random.default_rng(0).choice(len(self.rows), MOST_ROWS, replace=False)
            drawn = drawn[np.argsort(self.rows[drawn])]
            self.rows, known = self.rows[drawn], None if known is None else known.part(drawn)
        self.cells = self.X[self.rows]
        self.judged = known or self._judge(self.cells, self.y[self.rows])
        self.image = image_shape(self.preprocessor)

    def _judge(self, cells: Array, labels: Array) -> Judged:
        X = network_inputs(self.preprocessor, cells, self.engine.precision, codes=self.engine.inputs.reads_codes)
        return judge(self.engine, self.preprocessor, X, labels)

    @property
    def probable(self) -> bool:
        """True if the model gives probabilities of classes or labels."""
        return self.engine.loss.is_classification

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the classes, or of the targets."""
        return self.preprocessor.labels or self.preprocessor.targets

    def rocs(self) -> list[tuple[str, Array, Array]]:
        """Return name and rates of false and true positives of the classes or labels with the least AUC.

        Of two classes they are those of the second.
        """
        from sklearn.metrics import auc, roc_curve

        curves = []
        names, truth, scores = self.names, self.judged.truth, self.judged.scores
        assert scores is not None
        for code in range(int(truth.ndim == 1 and len(names) == 2), len(names)):
            of_class = truth == code if truth.ndim == 1 else truth[:, code] == 1
            # one row has no curve
            if 1 < of_class.sum() < len(of_class):
                false, true, _ = roc_curve(of_class, scores[:, code])
                shown = np.unique(np.linspace(0, len(false) - 1, 100).astype(np.int64))
                curves.append((auc(false, true), names[code], false[shown], true[shown]))
        curves.sort(key=lambda curve: float(curve[0]))
        return [(f"{name} (AUC {area:.4f})", false, true) for area, name, false, true in curves[:CURVES]]

    def calibration(self) -> tuple[Array, Array]:
        """Return the mean prediction and the observed mean of each tenth of the rows, in the order of the predictions.

        Of two classes it is the probability of the second, of more that of the predicted one, of labels that of each,
        of numbers the value.
        """
        judged = self.judged
        there = ~np.isnan(judged.truth)
        if judged.scores is None:
            said, observed = (part[there[:, 0], 0] for part in (judged.predicted, judged.truth))
        elif judged.truth.ndim == 2:
            said, observed = judged.scores[there], judged.truth[there]
        elif judged.scores.shape[1] == 2:
            said, observed = judged.scores[:, 1], judged.truth
        else:
            said, observed = judged.scores.max(axis=1), judged.truth == judged.predicted
        parts = np.array_split(np.argsort(said, kind="stable"), min(PARTS, len(said)))
        return np.array([said[part].mean() for part in parts]), np.array([observed[part].mean() for part in parts])

    def _groups(self) -> dict[str, Array]:
        """Return the features that are permuted together: a column, all parts of a date, a square of pixels."""
        each = list(self.preprocessor.sources)
        if self.image is not None:
            side = -(-max(self.image) // SIDE)
            each = [f"{at // self.image[1] // side} {at % self.image[1] // side}" for at in range(len(each))]
        members: dict[str, list[int]] = {}
        for feature, group in enumerate(each):
            members.setdefault(group, []).append(feature)
        return {group: np.array(features) for group, features in members.items()}

    def importance(
        self, *, most: int = PERMUTED_ROWS, repeats: int = REPEATS, seconds: float | None = None, seed: int = 0
    ) -> Importance | None:
        """Permute each column of ``most`` rows ``repeats`` times (L. Breiman, "Random Forests", 2001).

        Columns that vary with the predictions come first; after ``seconds``, ``SECONDS`` unless given, no further one
        is tried. Return None if the score is not defined on the rows.
        """
        rng, judged = np.random.default_rng(seed), self.judged
        said = judged.predicted if judged.scores is None else judged.scores
        rows = rng.permutation(len(self.cells))[:most]
        cells, labels, said = self.cells[rows], self.y[self.rows[rows]], said[rows] - said[rows].mean(axis=0)
        # by their greatest: squares and products of the cells may be beyond all numbers
        said = np.asarray(said, np.float64) / max(float(np.abs(said).max()), 1e-300)
        greatest = np.abs(np.nan_to_num(cells)).max(axis=0)
        scaled = np.asarray(cells, np.float64) / np.maximum(greatest, 1e-300, dtype=np.float64)
        centred = np.nan_to_num(scaled - np.nan_to_num(scaled).mean(axis=0))
        varies = np.abs(centred.T @ said).sum(axis=1) / np.maximum(np.sqrt((centred**2).sum(axis=0)), 1e-300)
        groups = sorted(self._groups().items(), key=lambda group: -float(varies[group[1]].max()))
        # R2 has no unit, and targets may have several
        of_numbers = "r2" if len(self.preprocessor.targets) > 1 else "rmse"
        by_class = "log_loss" if self.probable and judged.truth.ndim == 1 else "auc"
        metric = METRICS[of_numbers if judged.scores is None else by_class]

        def scored(changed: Array) -> float:
            value = metric.of_rows(self._judge(changed, labels))
            return -value if metric.rises else value

        base, began = scored(cells), time.perf_counter()
        worse: list[list[float]] = []
        if not np.isfinite(base):
            return None
        for _, together in groups:
            if worse and time.perf_counter() - began > (SECONDS if seconds is None else seconds):
                break
            worse.append([])
            for _ in range(repeats):
                changed = cells.copy()
                changed[:, together] = cells[rng.permutation(len(rows))][:, together]
                worse[-1].append(scored(changed) - base)
        mean, deviation = np.mean(worse, axis=1), np.std(worse, axis=1)
        order = np.argsort(-mean, kind="stable")
        names, features = [groups[at][0] for at in order], [groups[at][1] for at in order]
        left_out = len(groups) - len(worse)
        return Importance(metric.name, names, features, mean[order], deviation[order], len(rows), left_out)

    def surprise(self) -> Array:
        """Return the probability (or output) of the true class of each row, or the absolute error of a number.

        Of several targets it is the mean of the errors in deviations of each target, of labels the mean probability.
        """
        judged = self.judged
        if judged.scores is None:
            errors = np.abs(judged.truth - judged.predicted)
            if errors.shape[1] > 1:
                deviation = np.nanstd(judged.truth, axis=0)
                errors /= np.where(deviation > 0.0, deviation, 1.0)
            return np.asarray(np.nanmean(errors, axis=1))
        if judged.truth.ndim == 2:
            return np.asarray(np.nanmean(1.0 - np.abs(judged.truth - judged.scores), axis=1))
        return np.asarray(judged.scores[np.arange(len(judged.truth)), judged.truth])

    def worst(self) -> list[int]:
        """Return the places of the wrong rows whose true class is the least probable, or of the largest errors."""
        if self.judged.scores is None:
            return [int(at) for at in np.argsort(-self.surprise(), kind="stable")[:WORST]]
        wrong = (self.judged.truth != self.judged.predicted) & ~np.isnan(self.judged.truth)
        wrong = np.flatnonzero(wrong.reshape(len(wrong), -1).any(axis=1))
        return [int(at) for at in wrong[np.argsort(self.surprise()[wrong], kind="stable")][:WORST]]

    def spelled(self, at: int, feature: int) -> str:
        """Return a cell of the row at a place as text, a date by its elapsed days; empty if it is missing."""
        value, words = float(self.cells[at, feature]), self.preprocessor.categories[feature]
        if value == value and self.preprocessor.sources[feature] != self.preprocessor.feature_names[feature]:
            return str(np.datetime64(round(value * 86400), "s").item()).removesuffix(" 00:00:00")
        return "" if value != value else plain(value) if words is None else words[int(value)]


def guarantees(
    engine: Any, preprocessor: Preprocessor, how: Any, X: Array, cells: Array, labels: Array, weight: Any = None
) -> dict[str, Any]:
    """Return the entries of a report on rows X: "robust", an attack with loss and accuracy (of numbers the rmse) under
    it, or of interval bounds "certified", by the ``cells`` as in the data; none without either."""
    if how is None:
        return {}
    if how.plain is None:
        return {"certified": certify(engine, preprocessor, cells, labels, how.eps)}
    changed = attack(engine, X, preprocessor.encode_targets(labels), how)
    scores, _ = score(engine, preprocessor, changed, labels, weight)
    return {"robust": {"attack": how.to_config(), **{name: scores[name] for name in FIGURES if name in scores}}}


def reach(preprocessor: Preprocessor, cells: Array, eps: float, precision: str) -> tuple[Array, Array]:
    """Return the least and the greatest inputs of the network (n, width) when numbers move by ``eps`` at most.

    The input of a number moves by eps after scaling. A column of pieces moves by eps interquartile ranges, and its
    inputs with it. Words, dates and missing cells do not move. Pixels that are not scaled stay within those given.
    """
    # the parts of a date have another source
    columns = zip(preprocessor.feature_names, preprocessor.sources, preprocessor.categories, strict=True)
    moves = np.array([words is None and name == source for name, source, words in columns])
    cut = np.array([preprocessor.pieces(column) > 1 for column in range(len(moves))])
    shift = eps * np.where(moves & cut, preprocessor.feature_scale, 0.0)
    low, high = (network_inputs(preprocessor, end, precision) for end in (cells - shift, cells + shift))
    alone = np.flatnonzero(moves & ~cut)
    first = (np.cumsum(preprocessor.widths) - preprocessor.widths)[alone]
    radius = np.zeros(low.shape)
    radius[:, first] = np.where(np.isnan(cells[:, alone]), 0.0, eps)
    least, most = low - radius, high + radius
    if image_shape(preprocessor) is not None and preprocessor.scale == "none":
        least, most = np.maximum(least, low.min()), np.minimum(most, high.max())
    return least, most


def certify(
    engine: Session, preprocessor: Preprocessor, cells: Array, labels: Array, eps: Any, *, argument: str = "eps"
) -> dict[str, float]:
    """Return the certified accuracy of rows as in the data, or of numbers the mean width of the bounds.

    Raises ArgumentError or ArgumentTypeError unless ``eps``, which errors call ``argument``, is at least 0.
    """
    eps = as_number(argument, eps, low=0.0)
    check_together({**engine.network.uses, "bounds": argument})
    low, high = reach(preprocessor, cells, eps, engine.precision)
    bounds = Propagation(engine)
    if preprocessor.task == "regression":
        with np.errstate(all="ignore"):
            ends = [engine.loss.judged(engine.loss.transform(end))[0] for end in bounds.outputs(low, high)]
            least, most = map(preprocessor.decode_predictions, ends)
            return {"eps": eps, "width": float(np.mean(most - least))}
    codes = preprocessor.encode_targets(labels)
    if engine.loss.kind == "binary_cross_entropy":
        certified = bounds.certified_labels(low, high, codes.reshape(len(codes), -1) == 1)
    else:
        certified = bounds.certified(low, high, codes)
    return {"eps": eps, "accuracy": float(certified.mean())}


def guarantee_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on the privacy that a training spent, the scores under an attack, and the certified scores."""
    if "privacy" in report:
        spent = report["privacy"]
        yield (
            f"privacy: epsilon {spent['epsilon']:.3g} at delta {spent['delta']:g}, for adding or removing a training "
            f"row (noise {spent['noise']:.4g}, clip {spent['clip']:g}, {spent['steps']} steps)"
        )
    if "robust" in report:
        robust, how = report["robust"], report["robust"]["attack"]
        steps = f", norm {how['norm']}, {how['steps']} steps" if "steps" in how else ""
        yield f"under attack by {how['kind']}, eps {how['eps']:g}{steps}:"
        yield from headline({name: robust[name] for name in FIGURES if name in robust}, "robust")
    if "certified" in report:
        certified, within = report["certified"], f"within eps {report['certified']['eps']:g}"
        if "accuracy" in certified:
            yield f"test certified accuracy {spelled(certified['accuracy'])} {within}"
        else:
            yield f"test certified width {spelled(certified['width'])}, of the bounds of predictions {within}"
