"""Evidence on a model from its test rows: curves, calibration, the weight of each column, the worst rows."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fusemlp.datasets.dates import part_names
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.metrics import METRICS, Judged
from fusemlp.inputs.arrays import Array
from fusemlp.report.metrics import predictions

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session

# Rows for curves and worst rows, and for each permutation of a column; columns that are permuted.
MOST_ROWS, PERMUTED_ROWS, MOST_COLUMNS = 50_000, (100, 1000), 100
# About the multiplications that all permutations may take: a second.
WORK = 5e9
# No further column after this time: on a slow backend the multiplications are not what takes long.
SECONDS = 5.0
REPEATS = 3
BINS = 10
_PIXEL = re.compile(r"pixel_(\d+)_(\d+)")


class Importance(NamedTuple):
    """How much worse the score ``metric`` becomes when the values of each of ``names`` are permuted: mean and spread.

    ``rows`` were predicted for each permutation; ``left_out`` columns were not tried.
    """

    metric: str
    names: list[str]
    worse: Array
    spread: Array
    rows: int
    left_out: int


class Worst(NamedTuple):
    """A row that the model got most wrong; ``surprise``: the probability of its class, or its absolute error."""

    row: int
    truth: Any
    predicted: Any
    surprise: float
    cells: Array


@dataclass(eq=False)
class Evidence:
    """A model and rows as in the data: ``cells`` (n, columns) with NaN for missing ones, ``labels``.

    ``numbers`` are the rows' numbers in the data. At most ``MOST_ROWS`` rows, drawn at random, are used.
    """

    engine: Session
    preprocessor: Preprocessor
    cells: Array
    labels: Array
    numbers: Array

    def __post_init__(self) -> None:
        if len(self.cells) > MOST_ROWS:
            chosen = np.sort(np.random.default_rng(0).choice(len(self.cells), MOST_ROWS, replace=False))
            self.cells, self.labels, self.numbers = self.cells[chosen], self.labels[chosen], self.numbers[chosen]

    @cached_property
    def judged(self) -> Judged:
        """The rows' truth beside predictions; numbers in original units."""
        if self.preprocessor.classes is None:
            return self._judge(self.cells, np.asarray(self.labels, np.float64).reshape(len(self.labels), -1))
        return self._judge(self.cells, self.preprocessor.class_codes(self.labels))

    def _judge(self, cells: Array, truth: Array) -> Judged:
        made, X = self.preprocessor, self.preprocessor.transform_features(cells)
        if made.classes is None:
            return Judged(truth, predictions(self.engine, made, X).reshape(truth.shape))
        scores = self.engine.predict_proba(X) if self.probable else self.engine.predict(X)
        return Judged(truth, scores.argmax(axis=1), scores)

    @property
    def probable(self) -> bool:
        """Whether the model gives probabilities of classes."""
        return self.preprocessor.classes is not None and self.engine.loss.is_classification

    def rocs(self, most: int = 6) -> list[tuple[str, Array, Array]]:
        """Return a class's name and the rates of false and true positives, of the classes with the least AUC."""
        from sklearn.metrics import roc_auc_score, roc_curve

        truth, scores, names = self.judged.truth, self.judged.scores, self.preprocessor.labels
        assert scores is not None
        found = []
        for code in range(1 if len(names) == 2 else 0, len(names)):
            of_class = truth == code
            if of_class.any() and not of_class.all():
                area = roc_auc_score(of_class, scores[:, code])
                false, true, _ = roc_curve(of_class, scores[:, code])
                shown = np.unique(np.linspace(0, len(false) - 1, 100).astype(np.int64))
                found.append((area, f"{names[code]} (AUC {area:.4f})", false[shown], true[shown]))
        return [one[1:] for one in sorted(found, key=lambda one: float(one[0]))[:most]]

    def calibration(self) -> tuple[Array, Array, Array]:
        """Return mean prediction, observed mean and row count of ``BINS`` equal parts of the rows by their prediction.

        Of two classes it is the probability of the second, of more that of the predicted class; of numbers the value.
        """
        judged = self.judged
        if judged.scores is None:
            said, observed = judged.predicted[:, 0], judged.truth[:, 0]
        else:
            two = judged.scores.shape[1] == 2
            said = judged.scores[:, 1] if two else judged.scores.max(axis=1)
            observed = judged.truth == 1 if two else judged.truth == judged.predicted
        bins = np.argsort(np.argsort(said, kind="stable")) * BINS // len(said)
        counts = np.bincount(bins, minlength=BINS)
        kept = np.maximum(counts, 1)
        means = [np.bincount(bins, values, BINS) / kept for values in (said, observed)]
        return means[0][counts > 0], means[1][counts > 0], counts[counts > 0]

    @property
    def image(self) -> tuple[int, int] | None:
        """Height and width if the columns are the pixels of an image."""
        names = self.preprocessor.feature_names
        last = _PIXEL.fullmatch(names[-1])
        shape = (int(last[1]) + 1, int(last[2]) + 1) if last else (0, 0)
        return shape if shape[0] * shape[1] == len(names) else None

    def _groups(self) -> dict[str, Array]:
        """Return the features that are permuted together: a column, all parts of a date, a square of pixels."""
        names = self.preprocessor.feature_names
        if self.image is not None:
            side = -(-max(self.image) // 8)
            rows, columns = np.divmod(np.arange(len(names)), self.image[1])
            squares = np.column_stack([rows // side, columns // side])
            each = [str(tuple(square)) for square in squares.tolist()]
        else:
            sources = part_names(name for name, _ in self.preprocessor.dates)
            each = [sources.get(name, name) for name in names]
        return {one: np.flatnonzero([other == one for other in each]) for one in dict.fromkeys(each)}

    def importance(self) -> Importance | None:
        """Permute each column of some rows ``REPEATS`` times (L. Breiman, "Random Forests", 2001).

        Return None if there are too few rows, or too little time for a whole image.
        """
        groups = self._groups()
        left_out = max(0, len(groups) - MOST_COLUMNS)
        if left_out:
            groups = {name: groups[name] for name in self._varying(groups)}
        each = self.engine.network.parameter_count + 20 * self.cells.shape[1]
        count = int(min(len(self.cells), np.clip(WORK / (REPEATS * len(groups) * each), *PERMUTED_ROWS)))
        rng = np.random.default_rng(0)
        rows = rng.choice(len(self.cells), count, replace=False)
        cells, truth = self.cells[rows], self.judged.truth[rows]
        metric = METRICS["rmse" if self.preprocessor.classes is None else "log_loss" if self.probable else "auc"]
        base, sign = metric.of(self._judge(cells, truth)), -1.0 if metric.rises else 1.0
        if count < 2 or not np.isfinite(base):
            return None
        worse: list[list[float]] = []
        began = time.perf_counter()
        for features in groups.values():
            if time.perf_counter() - began > SECONDS:
                if self.image is not None:
                    return None
                break
            worse.append([])
            for _ in range(REPEATS):
                changed = cells.copy()
                changed[:, features] = cells[rng.permutation(count)][:, features]
                worse[-1].append(sign * (metric.of(self._judge(changed, truth)) - base))
        mean, spread = np.mean(worse, axis=1), np.std(worse, axis=1)
        left_out += len(groups) - len(worse)
        return Importance(metric.name, list(groups)[: len(worse)], mean, spread, count, left_out)

    def _varying(self, groups: dict[str, Array]) -> list[str]:
        """Return the names of the columns that vary most with the predictions."""
        said = self.judged.predicted if self.judged.scores is None else self.judged.scores
        cells = np.nan_to_num(self.cells - np.nanmean(self.cells, axis=0))
        scale = np.sqrt((cells**2).sum(axis=0))
        together = np.abs(cells.T @ (said - said.mean(axis=0))).sum(axis=1) / np.where(scale > 0, scale, 1.0)
        return sorted(groups, key=lambda name: -float(together[groups[name]].max()))[:MOST_COLUMNS]

    def worst(self, most: int = 12) -> list[Worst]:
        """Return the wrong rows that the model was most sure of, or those with the largest errors."""
        judged, made = self.judged, self.preprocessor
        if made.classes is None:
            surprise = np.abs(judged.truth - judged.predicted).mean(axis=1)
            order = np.argsort(-surprise, kind="stable")[:most]
        else:
            assert judged.scores is not None
            surprise = judged.scores[np.arange(len(judged.truth)), judged.truth]
            wrong = np.flatnonzero(judged.truth != judged.predicted)
            order = wrong[np.argsort(surprise[wrong], kind="stable")][:most]
        names: Sequence[Any] = made.labels

        def said(values: Array, row: int) -> Any:
            return names[values[row]] if made.classes is not None else values[row].tolist()

        return [
            Worst(
                int(self.numbers[row]),
                said(judged.truth, row),
                said(judged.predicted, row),
                float(surprise[row]),
                self.cells[row],
            )
            for row in order.tolist()
        ]

    def spelled(self, cells: Array) -> list[str]:
        """Return the cells of a row as text; empty for missing ones."""
        texts = []
        for value, words in zip(cells.tolist(), self.preprocessor.categories, strict=True):
            missing = value != value
            texts.append("" if missing else f"{value:.6g}" if words is None else words[int(value)])
        return texts
