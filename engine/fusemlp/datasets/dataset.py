"""A data set as it is in its source: features, labels, and notes on the columns."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import numpy as np
import numpy.typing as npt

from fusemlp.datasets.dates import PARTS, date_parts
from fusemlp.datasets.tables import Place
from fusemlp.datasets.textfiles import MISSING
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import DataError


@dataclass(frozen=True)
class Role:
    """A column's ``kind``: number, boolean, words, date, target, id, group, time, dropped or left out.

    ``missing`` is its share of missing cells, None for a column that was not read; ``note`` is the reason to leave it
    out. Kinds that are no input are those of ``UNUSED`` and the target.
    """

    name: str
    kind: str
    missing: float | None = None
    note: str = ""


# The kinds of columns that are no inputs and not the target, beside ids.
UNUSED = ("group", "time", "dropped", "left out")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Features and labels as they are in the source.

    ``X`` (n, columns) float64, images flattened; ``y`` (n,) labels as they are in the file: int, float, bool or
    str, or (n, k) float64 for a regression with several targets. ``task`` is "classification" or "regression".
    ``class_names`` go with the sorted distinct labels. ``test`` is the test set that came with the data, or X and y of
    a file of its own, as is ``validation``; ``test_source`` says which.
    ``categories`` holds for each column of X the words that its values are indices into, None for numbers. A missing
    number is NaN, a missing word the category "". ``dates`` are the table's columns of dates with the order of year,
    month and day in their text; X has the parts of each, named as in "sold: month". ``notes`` are lines on the
    reading: the form of the file, columns left out, missing cells. ``roles`` tell what each column of a table became.
    ``ids`` are the columns that name the rows, as text; ``groups`` and ``times`` (n,) are those that decide which rows
    are held out. ``guess`` says that whole numbers were taken as classes, if nothing had told so. ``joins_spellings``
    is that of ``Preprocessor``.
    """

    name: str
    X: Features
    y: Array
    task: str
    feature_names: tuple[str, ...]
    target_name: str = "y"
    class_names: tuple[str, ...] | None = None
    test: tuple[Features, Array] | None = None
    categories: Categories = ()
    notes: tuple[str, ...] = ()
    dates: tuple[tuple[str, str], ...] = ()
    roles: tuple[Role, ...] = ()
    ids: Mapping[str, Array] = field(default_factory=dict)
    groups: Array | None = None
    times: Array | None = None
    validation: tuple[Features, Array] | None = None
    test_source: str = "the data's own test set"
    guess: str = ""
    joins_spellings: bool = True

    def __post_init__(self) -> None:
        if not self.categories:
            object.__setattr__(self, "categories", (None,) * self.X.shape[1])

    @property
    def classes(self) -> Array:
        """The distinct labels, sorted, those of the other sets among them: every split has the same."""
        others = (part[1] for part in (self.validation, self.test) if part is not None)
        return np.unique(np.concatenate([self.y, *others]))

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, X {self.X.shape}, y {self.y.shape} {self.y.dtype}, {self.task})"


Features = npt.NDArray[np.float64]
Categories = tuple[tuple[str, ...] | None, ...]
# A column of whole numbers, one a row, is an identifier if it counts the rows or has such a name.
_IDENTIFIER = re.compile(r"(?i:(?:^|[\W_])(?:id|idx|index|uuid|key|row ?names?|row|nr|no)$)|[a-z](?:Id|ID)$")
# A column of more words than this gives each of its more frequent words an input; the others share one.
FEW_WORDS = 20
MOST_WORDS = 256
# A number as every program writes it: marks of thousands and decimal commas mean other numbers elsewhere.
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
# A table of fewer rows has too few to tell an identifier from a measurement.
_FEWEST_ROWS = 20


def kept_features(table: dict[str, Array]) -> tuple[str, ...]:
    """Return the names of the features, of a date only its parts that differ between rows, and the elapsed days."""
    names: list[str] = []
    for name, column in table.items():
        if column.dtype.kind != "M":
            names.append(name)
            continue
        for part, values in date_parts(np.unique(column)).items():
            if part == PARTS[-1] or len(np.unique(values[~np.isnan(values)])) > 1:
                names.append(f"{name}: {part}")
    return tuple(names)


def without_useless(path: Place, table: dict[str, Array], keep: Collection[str], notes: list[str]) -> dict[str, str]:
    """Return the columns that a network cannot learn from with the reasons, and note them; none if all are such."""
    reasons = {name: None if name in keep else _useless(name, column) for name, column in table.items()}
    useless = {name: reason for name, reason in reasons.items() if reason is not None}
    rest = {name: column for name, column in table.items() if name not in useless}
    useless |= {name: f"the same as {other!r}" for name, other in _twins(rest).items() if name not in keep}
    if not useless:
        return {}
    if len(useless) == len(table):
        numbers = {name: table[name] for name in useless if table[name].dtype.kind in "fM"}
        numbers = {name: column for name, column in numbers.items() if useless[name] != "no values"}
        if not numbers:
            faults = "; ".join(f"column {name!r}: {reason}" for name, reason in useless.items())
            raise DataError(f"{path}: no feature is left to learn from: {faults}; drop or --keep these columns")
        return {name: reason for name, reason in useless.items() if name not in numbers}
    listing = ", ".join(f"{name!r} ({reason})" for name, reason in useless.items())
    notes.append(f"left out, unless you --keep them: {listing}")
    return {name: useless[name] for name in table if name in useless}


def _twins(table: dict[str, Array]) -> dict[str, str]:
    """Return the columns that hold the same values in every row as an earlier one, with that one's name."""
    first: dict[object, list[str]] = {}
    twins: dict[str, str] = {}
    for name, column in table.items():
        numbers = column.dtype.kind in "biuf"
        plain = column.dtype.kind != "O"
        content = hash((column + 0.0 if numbers else column).tobytes() if plain else tuple(column))
        others = first.setdefault((column.dtype.kind, content), [])
        same = (other for other in others if np.array_equal(table[other], column, equal_nan=numbers))
        other = next(same, None)
        if other is None:
            others.append(name)
        else:
            twins[name] = other
    return twins


def _useless(name: str, column: Array) -> str | None:
    """Return the reason to leave a feature column out, None to keep it."""
    if column.dtype.kind != "f":
        if column.dtype.kind == "M":
            return "constant" if len(np.unique(column)) == 1 and len(column) > 1 else None
        words = set(column) - MISSING
        if len(words) > 20 and 2 * len(words) > len(column):
            return f"{len(words)} different words in {len(column)} rows look like names"
        return "constant" if len(set(column)) == 1 and len(column) > 1 else None
    missing = np.isnan(column)
    if missing.all():
        return "no values"
    if len(column) < _FEWEST_ROWS or missing.any():
        return None
    if (column == column[0]).all():
        return "constant"
    if (np.diff(column) == 1).all():
        return "counts the rows"
    whole = (column == np.floor(column)).all()
    # The first column without a name is an index from which rows may have been taken.
    named = _IDENTIFIER.search(name) or (name == "column_1" and (np.diff(column) > 0).all())
    if whole and named and len(np.unique(column)) == len(column):
        return "a number for each row, named as an identifier"
    return None


def spellings(words: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Return, for each word that is a number in another spelling than the ``known`` word of that number, the latter.

    "10" is "10.0" for a program that reads numbers. Known words that spell one number in several ways stay apart.
    """
    numbers: dict[Decimal, list[str]] = {}
    for word in dict.fromkeys(known):
        if _NUMBER.fullmatch(word):
            numbers.setdefault(Decimal(word), []).append(word)
    same = {word: numbers.get(Decimal(word), []) for word in words if numbers and _NUMBER.fullmatch(word)}
    return {word: known[0] for word, known in same.items() if len(known) == 1}


def different(column: Array) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Return the different words of a column in the order of their first rows, and the index of each row's word."""
    places = {word: place for place, word in enumerate(dict.fromkeys(column))}
    return list(places), np.fromiter(map(places.__getitem__, column), np.int32, len(column))


def rare_words(codes: Features, words: Sequence[str]) -> tuple[int, ...]:
    """Return the categories that share an input, by the codes of the training rows.

    They are the words that no training row has, and, in a column of many words, those of a single row and those beyond
    the ``MOST_WORDS`` most frequent. Missing cells are a category of their own.
    """
    counts = np.bincount(codes[~np.isnan(codes)].astype(np.int64), minlength=len(words))
    ranked = np.argsort(-counts, kind="stable")
    rare = counts < (2 if len(words) > FEW_WORDS else 1)
    rare[ranked[MOST_WORDS:]] = True
    if "" in words:
        missing = words.index("")
        rare[missing] = counts[missing] == 0
    return tuple(np.flatnonzero(rare).tolist())
