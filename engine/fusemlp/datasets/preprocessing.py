"""The preprocessing between file and network; a run stores it, to repeat and to invert it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from fusemlp.datasets import cells
from fusemlp.datasets.cells import MOST_WORDS, ORDERS, SCALES, Categories, Features, Indices, Knots
from fusemlp.datasets.dataset import UNUSED, Dataset, target_names
from fusemlp.describe.checks import as_count, as_number, check_choice
from fusemlp.describe.description import reading, stored
from fusemlp.inputs.arrays import Array, as_class_labels, as_features, as_values, to_array
from fusemlp_kernels.coding import NUMBERS, PIECES, WORD, Coding, Column
from fusemlp_kernels.errors import CheckpointError, DataError, ShapeError, unknown_name

Label = str | int | float | bool


def split(y: Array, *, fraction: float = 0.2, seed: int, stratify: bool) -> tuple[Indices, Indices]:
    """Return the indices of the training rows and of the held-out rows; the same for the same ``seed``.

    A shuffled ``fraction`` of all rows, rounded up, is held out. ``stratify`` keeps the shares of the classes;
    a class with a single row stays in the training rows, with a warning. Raises DataError if a side would be
    empty or, stratified, have fewer rows than there are classes.
    """
    as_number("fraction", fraction, low=0, high=1, low_open=True, high_open=True)
    as_count("seed", seed, minimum=0)
    rows, kept, labels, needed = np.arange(len(y), dtype=np.int64), np.empty(0, np.int64), None, 1
    if stratify:
        _, codes, counts = np.unique(y, return_inverse=True, return_counts=True)
        alone = counts[codes] == 1
        rows, kept, labels = rows[~alone], rows[alone], codes[~alone]
        needed = max(1, int((counts > 1).sum()))
    if len(kept) == len(y) > 0:
        raise DataError("fraction: no row can be held out, because each is the only one of its class; give more rows")
    tested = int(np.ceil(fraction * len(rows)))
    if min(tested, len(rows) - tested) < needed:
        alone_note = f" ({len(kept)} more are alone in their class)" if len(kept) else ""
        raise DataError(
            f"fraction: {fraction} of {len(rows)} rows{alone_note} leaves {len(rows) - tested} rows to train on and "
            f"{tested} held out; each side needs at least {needed}{', one for each class' if stratify else ''}; choose "
            "another fraction or give more rows"
        )
    if len(kept):
        names = ", ".join(repr(label) for label in np.unique(y[kept]).tolist()[:10])
        warnings.warn(f"classes with a single row, which is not held out: {names}", stacklevel=2)
    if labels is None:
        # as train_test_split draws them: the import of scikit-learn takes a second
        drawn = np.random.RandomState(seed % 2**32).permutation(rows)
        return drawn[tested:], drawn[:tested]
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(rows, test_size=tested, random_state=seed % 2**32, stratify=labels)
    return np.concatenate([train, kept]), test


@dataclass(frozen=True)
class Preprocessor:
    """Scaling of features, one column a category, and encoding of labels or scaling of targets; ``fit`` makes one.

    A column c of numbers becomes (c - shift) / scale, after it by ``scale`` "robust" ``cells.clipped``, by "quantile"
    the scores of ``feature_knots``, and by "piecewise" an input for each piece between them; its missing cells (NaN)
    become the median of the training rows (``feature_fill``). If training rows had missing cells (``missing_inputs``),
    a further column is 1 at missing cells. A column of words becomes one 0/1 column for each of its categories, without
    those in ``shared``, which are rare or absent in the training rows. They and unseen words (NaN) are one other
    category: it has a column if training rows filled it (``other_inputs``), and is 0 in all columns otherwise. Each of
    these four may be empty: no column has any. ``dates`` are the columns of dates whose parts are features, with the
    order of day, month and year in their text. ``classes`` are the labels in sorted order (None for a regression
    or several labels a row). Targets of a regression become (y - target_shift) / target_scale, with ``target_log`` of
    their logarithms; a target below ``target_low``, the least of the training rows, counts as that one there. ``ids``
    are the columns that name the rows of a table, ``unused`` its other columns that are no inputs. With
    ``joins_spellings`` a new word or label that reads as the same number as a single one of the training data, "10" as
    "10.0", is that one; earlier releases, whose preprocessors lack the entry, took it for an unseen one. ``decimals``
    and ``missing_words`` are the dataset's.
    """

    task: str
    scale: str
    feature_names: tuple[str, ...]
    categories: Categories
    feature_shift: tuple[float, ...]
    feature_scale: tuple[float, ...]
    target_name: str
    classes: tuple[Label, ...] | None
    class_names: tuple[str, ...] | None
    target_shift: tuple[float, ...]
    target_scale: tuple[float, ...]
    one_hot_targets: bool
    feature_fill: tuple[float | None, ...] = ()
    missing_inputs: tuple[bool, ...] = ()
    shared: tuple[tuple[int, ...], ...] = ()
    other_inputs: tuple[bool, ...] = ()
    dates: tuple[tuple[str, str], ...] = ()
    ids: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    feature_knots: tuple[Knots | None, ...] = ()
    target_log: bool = False
    target_low: float = 0.0
    joins_spellings: bool = False
    decimals: tuple[tuple[str, str], ...] = ()
    missing_words: tuple[str, ...] = ()

    @classmethod
    def fit(
        cls,
        dataset: Dataset,
        rows: npt.ArrayLike,
        *,
        scale: str = "standard",
        one_hot_targets: bool = False,
        scale_targets: bool = True,
        log_targets: bool = False,
        most_words: int | None = MOST_WORDS,
    ) -> Preprocessor:
        """Return a Preprocessor with the statistics of the training ``rows`` of a data set.

        ``scale``: "robust" (median 0, interquartile range 1, smoothly clipped), "piecewise" (an input for each piece of
        a column, ``cells.by_pieces``; robust for a column of few values), "quantile" (normal scores), "standard"
        (mean 0, variance 1), "minmax" (0 to 1) or "none". The targets of a regression are scaled in the same way, by
        "standard" for the first three, unless ``scale_targets`` is False (a Poisson loss needs its counts);
        ``log_targets`` takes their logarithms before. Of a column of words the ``most_words`` most frequent have an
        input, all with None. Constant columns are only shifted. The classes are those of the whole data set.
        """
        if scale not in SCALES:
            raise unknown_name("scale", scale, SCALES)
        chosen = np.asarray(rows)
        if not chosen.size:
            raise DataError(f"rows: got no training rows of {dataset.name}; give at least one")
        X, words = dataset.X[chosen], dataset.categories
        missing, numbers = np.isnan(X), np.array([entries is None for entries in words])
        fill = [_median(column) if number else None for column, number in zip(X.T, numbers, strict=True)]
        shared = [
            cells.rare_words(column, entries, most_words) if entries else ()
            for column, entries in zip(X.T, words, strict=True)
        ]
        other_inputs = [bool(len(rare) and np.isin(X[:, at], rare).any()) for at, rare in enumerate(shared)]
        X = np.where(missing, _numbers(fill), X) if missing.any() else X
        shift, factor = cells.statistics(X, scale, dataset.feature_names)
        of = {"quantile": cells.knots, "piecewise": cells.edges}.get(scale)
        # The parts of a date are missing together: its first part marks it.
        sources = cells.sources_of(dataset.feature_names, dict(dataset.dates))
        first = np.array([index == 0 or name != sources[index - 1] for index, name in enumerate(sources)])
        classes, low = tuple(dataset.classes.tolist()) if dataset.task == "classification" else None, 0.0
        target_shift = target_factor = np.empty(0)
        if classes is None:
            targets = dataset.y.astype(np.float64).reshape(len(dataset.y), -1)[chosen]
            names = dataset.targets
            if log_targets:
                low = float(np.nanmin(targets))
                if low <= 0:
                    name = names[np.nanargmin(targets) % len(names)]
                    raise DataError(f"log_targets: the target {name!r} holds {low:g}, and has no logarithm")
                targets = np.log(targets)
            how = "none" if not scale_targets else "standard" if scale in ("robust", "piecewise", "quantile") else scale
            there = [column[~np.isnan(column), None] for column in targets.T]
            if not all(map(len, there)):
                raise DataError(f"a target of {names} has no value in the training rows; leave it out")
            fitted = [cells.statistics(column, how, [name]) for column, name in zip(there, names, strict=True)]
            target_shift, target_factor = np.hstack(fitted)
        return cls(
            task=dataset.task,
            scale=scale,
            feature_names=dataset.feature_names,
            categories=words,
            feature_shift=tuple(np.where(numbers, shift, 0.0).tolist()),
            feature_scale=tuple(np.where(numbers, factor, 1.0).tolist()),
            target_name=dataset.target_name,
            classes=classes,
            class_names=dataset.class_names,
            target_shift=tuple(target_shift.tolist()),
            target_scale=tuple(target_factor.tolist()),
            one_hot_targets=one_hot_targets and classes is not None,
            feature_fill=tuple(fill),
            missing_inputs=tuple((missing.any(axis=0) & numbers & first).tolist()),
            shared=tuple(shared),
            other_inputs=tuple(other_inputs),
            dates=dataset.dates,
            ids=tuple(dataset.ids),
            unused=tuple(role.name for role in dataset.roles if role.kind in UNUSED),
            feature_knots=tuple(of(X[:, at]) if number else None for at, number in enumerate(numbers)) if of else (),
            target_log=log_targets and classes is None,
            target_low=low,
            joins_spellings=dataset.joins_spellings,
            decimals=dataset.decimals,
            missing_words=dataset.missing_words,
        )

    @property
    def width(self) -> int:
        """The number of columns that ``transform_features`` returns: the inputs of the network."""
        return sum(self.widths)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The number of columns that ``transform_features`` returns for each feature."""
        return tuple(
            1 + int(self.word_inputs(column).max())
            if words is not None
            else self.pieces(column) + bool(self.missing_inputs and self.missing_inputs[column])
            for column, words in enumerate(self.categories)
        )

    @property
    def sources(self) -> tuple[str, ...]:
        """The table's column of each feature: of the parts of a date the date."""
        return cells.sources_of(self.feature_names, dict(self.dates))

    def by_column(self, values: Array) -> tuple[tuple[str, ...], Array]:
        """Return the names of the columns, and for each the sum of ``values`` (n, ``width``) of its inputs."""
        places: dict[str, int] = {}
        column_of = np.repeat([places.setdefault(name, len(places)) for name in self.sources], self.widths)
        sums = np.zeros((len(places), len(values)))
        for place, column in zip(column_of, values.T, strict=True):
            sums[place] += column
        return tuple(places), sums.T

    @property
    def outputs(self) -> int:
        """The number of classes, or of a regression's targets."""
        return len(self.target_shift) if self.classes is None else len(self.classes)

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the targets."""
        return target_names(self.target_name, max(1, len(self.target_shift)))

    @property
    def labels(self) -> tuple[str, ...]:
        """The names of the classes, for reports; empty for a regression."""
        return () if self.classes is None else self.class_names or tuple(str(label) for label in self.classes)

    def pieces(self, column: int) -> int:
        """Return the number of inputs of a column of numbers, without the one for missing cells."""
        at = self.feature_knots[column] if self.scale == "piecewise" else None
        return 1 if at is None else len(at[0]) - 1

    def word_inputs(self, column: int) -> Indices:
        """Return the input of each category of a column of words, then that of an unseen word; -1 for none."""
        count = len(self.categories[column] or ())
        shared = list(self.shared[column]) if self.shared else []
        inputs = np.full(count + 1, -1, np.int64)
        frequent = np.setdiff1d(np.arange(count), shared)
        inputs[frequent] = np.arange(len(frequent))
        if self.other_inputs and self.other_inputs[column]:
            inputs[[*shared, count]] = len(frequent)
        return inputs

    @cached_property
    def coding(self) -> Coding:
        """The codes of the network's inputs: words, pieces of numbers, and numbers as they are."""
        columns = []
        for column, (words, inputs) in enumerate(zip(self.categories, self.widths, strict=True)):
            pieces = self.pieces(column)
            if words is None and pieces > 1:
                columns.append(Column(PIECES, pieces))
                inputs -= pieces
            if words is None and inputs and columns and columns[-1].kind == NUMBERS:
                # neighbours take one loop of the first layer
                inputs += columns.pop().inputs
            if inputs:
                columns.append(Column(NUMBERS if words is None else WORD, inputs))
        return Coding(tuple(columns))

    def transform_features(self, X: Any) -> Features:
        """Transform rows from ``load_data`` or ``load_features`` into (n, ``width``) float64."""
        codes = self.encode_features(X)
        # columns of numbers alone are their own codes
        return self.coding.dense(codes) if len(self.coding.indices) else codes

    def encode_features(self, X: Any) -> Features:
        """Transform rows from ``load_data`` or ``load_features`` into codes (n, ``coding.slots``) float64."""
        names = self.feature_names
        features = as_features("X", X, width=len(names), dtype=np.float64, check_finite=False)
        missing = np.isnan(features)
        if np.isinf(features).any():
            as_features("X", np.where(missing, 0.0, features), width=len(names), dtype=np.float64)
        numbers = np.array([words is None for words in self.categories])
        if missing.any() and (gaps := missing & numbers).any():
            fill = self.feature_fill or (None,) * len(names)
            for column in np.flatnonzero(gaps.any(axis=0)).tolist():
                if fill[column] is None:
                    row = int(np.argmax(missing[:, column]))
                    raise DataError(
                        f"X: the value of {names[column]!r} is missing at row {row}, and the stored preprocessor, of "
                        "an earlier release, has no median to fill in; fill it in or train again"
                    )
            features = np.where(gaps, _numbers(fill), features)
        scaled: Features = features - np.array(self.feature_shift)
        scaled /= np.array(self.feature_scale)
        scaled = cells.clipped(scaled) if self.scale in ("robust", "piecewise") else scaled
        for column, at in enumerate(self.feature_knots if self.scale == "quantile" else ()):
            if at is not None:
                # straight lines between the knots, constant outside them
                scaled[:, column] = np.interp(features[:, column], *at)
        if numbers.all() and self.width == len(names):
            return scaled
        slots: list[Array] = []
        for column, (words, inputs) in enumerate(zip(self.categories, self.widths, strict=True)):
            if words is not None:
                indices = self._codes_of_words(column, features[:, column], missing[:, column])
                slots += [indices] if inputs else []
                continue
            pieces = self.pieces(column)
            at = self.feature_knots[column] if pieces > 1 else None
            slots += [scaled[:, column]] if at is None else [*cells.by_pieces(features[:, column], at).T]
            slots += [missing[:, column]] if inputs > pieces else []
        # words alone may have no input
        return np.column_stack([np.empty((len(features), 0)), *slots])

    def _codes_of_words(self, column: int, cells: Array, missing: Array) -> Array:
        """Return the input of each cell's word among those of its column, -1 for none."""
        words = self.categories[column] or ()
        codes = np.where(missing, -1, cells)
        wrong = (codes < -1) | (codes >= len(words)) | (codes != np.floor(codes)) | (cells == -1)
        if wrong.any():
            row = int(np.argmax(wrong))
            raise DataError(
                f"X: {cells[row]} at row {row}, column {column} is not the index of one of the "
                f"{len(words)} categories of {self.feature_names[column]!r}; read the data with load_features"
            )
        return self.word_inputs(column)[codes.astype(np.int64)]

    def encode_targets(self, y: Any) -> Array:
        """Return the loss's targets: class indices (n,) int64, or float64 rows (one-hot or scaled), NaN if missing."""
        if self.classes is None:
            several = self.outputs > 1 or None
            values = as_values("y", y, width=self.outputs, rows=None, dtype=np.float64, missing=several)
            values = np.log(np.maximum(values, self.target_low)) if self.target_log else values
            return np.asarray((values - np.array(self.target_shift)) / np.array(self.target_scale))
        codes = self.class_codes(y)
        return np.eye(len(self.classes))[codes] if self.one_hot_targets else codes

    def class_codes(self, y: Any) -> Array:
        """Return class indices (n,) int64 by a label's value, its text, or ``spellings``; DataError for others."""
        classes = self.classes or ()
        labels = to_array("y", y)
        if labels.ndim != 1:
            raise ShapeError(f"y: expected shape (n,), one label a row, got shape {labels.shape}")
        labels = labels.astype(str) if labels.dtype.kind == "O" else labels
        different, codes = np.unique(labels, return_inverse=True)
        index: dict[Any, int] = {label: code for code, label in enumerate(classes)}
        by_text = {str(label): code for code, label in enumerate(classes)}
        same = cells.spellings(different.astype(str), by_text) if self.joins_spellings else {}
        known = [index.get(label, by_text.get(same.get(str(label), str(label)))) for label in different.tolist()]
        if None in known:
            row = int(np.argmax(codes == known.index(None)))
            raise DataError(
                f"y: the label {labels[row].item()!r} in row {row} is not one of the {len(classes)} classes of "
                f"the training data: {', '.join(map(repr, classes[:20]))}; correct it or train again"
            )
        return np.asarray(np.array(known, np.int64)[codes])

    def decode_predictions(self, predictions: Any) -> Array:
        """Transform class indices (n,) into labels, and values (n,) or (n, targets) into their original units.

        Several labels (n, labels) stay 0 and 1.

        Values of one target may be (n, columns), such as its quantiles.
        """
        if self.task == "multilabel":
            return to_array("predictions", predictions)
        if self.classes is not None:
            codes = as_class_labels("predictions", predictions, classes=len(self.classes), rows=None)
            return np.asarray(np.array(self.classes)[codes])
        values = to_array("predictions", predictions)
        values = values.reshape(len(values), -1) * np.array(self.target_scale) + np.array(self.target_shift)
        values = np.exp(values) if self.target_log else values
        return np.asarray(values[:, 0] if values.shape[1] == 1 else values)

    def to_config(self) -> dict[str, Any]:
        """Return plain numbers, strings and tuples; ``from_config`` gives an equal Preprocessor."""
        return asdict(self)

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Preprocessor:
        """Invert ``to_config``, before or after JSON; CheckpointError if the entries do not fit."""
        with reading("preprocessor: its stored form", "use another file of the run, or train again"):
            result: Preprocessor = stored("preprocessor", config, cls)
            for _, order in result.dates:
                check_choice("dates", order, ORDERS)
        lists = result.feature_names, result.categories, result.feature_shift, result.feature_scale
        optional = result.feature_fill, result.missing_inputs, result.feature_knots, result.shared, result.other_inputs
        columns = {*map(len, lists), *map(len, filter(None, optional))}
        if len(columns) != 1 or len(result.target_shift) != len(result.target_scale):
            raise CheckpointError(f"preprocessor: the stored lists differ in length ({sorted(columns)} columns)")
        return result

    def to_json(self) -> str:
        """Return ``to_config`` as JSON: floats in their shortest exact decimal form, labels with their types."""
        return json.dumps(self.to_config(), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Preprocessor:
        """Invert ``to_json``; CheckpointError for other text."""
        try:
            # int refuses NaN and Infinity, which to_json does not write
            config = json.loads(text, parse_constant=int)
        except ValueError as error:
            raise CheckpointError(f"preprocessor: expected JSON, got {text[:40]!r} ({error})") from error
        return cls.from_config(config)


def _numbers(fill: Sequence[float | None]) -> Features:
    """Return the medians of columns of numbers, 0 for the other columns."""
    return np.array([0.0 if value is None else value for value in fill])


def _median(values: Features) -> float:
    """Return the median of the values that are not missing, 0 if all are."""
    present = values[~np.isnan(values)]
    return float(np.median(present)) if len(present) else 0.0
