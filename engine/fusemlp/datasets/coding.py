"""The columns of a table as one matrix of numbers, and the columns that a network cannot learn from."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Sequence
from decimal import Decimal
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fusemlp.datasets.dates import PARTS, date_parts, parts_of, sources_of
from fusemlp.datasets.sources import Place
from fusemlp.datasets.textfiles import MISSING
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import DataError

if TYPE_CHECKING:
    from fusemlp.datasets.dataset import Dataset
    from fusemlp.datasets.preprocessing import Preprocessor

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
    useless = {name: found for name, found in reasons.items() if found is not None}
    rest = {name: column for name, column in table.items() if name not in useless}
    useless |= {name: f"the same as {other!r}" for name, other in _twins(rest).items() if name not in keep}
    if not useless:
        return {}
    if len(useless) == len(table):
        numbers = {name: table[name] for name in useless if table[name].dtype.kind in "fM"}
        numbers = {name: column for name, column in numbers.items() if useless[name] != "no values"}
        if not numbers:
            found = "; ".join(f"column {name!r}: {found}" for name, found in useless.items())
            raise DataError(f"{path}: no feature is left to learn from: {found}; drop or --keep these columns")
        return {name: found for name, found in useless.items() if name not in numbers}
    told = ", ".join(f"{name!r} ({found})" for name, found in useless.items())
    notes.append(f"left out, unless you --keep them: {told}")
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


def coded(
    table: dict[str, Array], names: tuple[str, ...], like: Preprocessor | Dataset | None, notes: list[str]
) -> tuple[Features, Categories]:
    """Return the columns as one float64 matrix, words as indices into their categories (those of ``like`` or found)."""
    sources = sources_of(names, [name for name, column in table.items() if column.dtype.kind == "M"])
    X = np.empty((len(next(iter(table.values()))), len(names)))
    categories: list[tuple[str, ...] | None] = []
    missing: dict[str, int] = {}
    unseen: list[str] = []
    parts: dict[str, Array] = {}
    for index, (name, source) in enumerate(zip(names, sources, strict=True)):
        if source != name and name not in parts:
            parts = parts_of(source, table[source])
        column = parts[name] if source != name else table[name]
        if column.dtype.kind in "biuf":
            categories.append(None)
            X[:, index] = column
            count = int(np.isnan(column).sum())
        else:
            found, codes = different(column)
            words = like.categories[index] if like is not None else _categories(found)
            assert words is not None, "a column that held numbers was read as numbers"
            categories.append(words)
            place: dict[str, float] = {word: code for code, word in enumerate(words)}
            if like is not None and like.joins_spellings:
                place = {word: place[known] for word, known in spellings(found, words).items()} | place
            absent = place.get("", math.nan)
            X[:, index] = np.array([place.get(word, absent if word in MISSING else math.nan) for word in found], float)[
                codes
            ]
            cells = np.bincount(codes, minlength=len(found)).tolist()
            counts = dict(zip(found, cells, strict=True))
            count = sum(cells for word, cells in counts.items() if word in MISSING and (not word or word not in place))
            strange = {word: cells for word, cells in counts.items() if word not in place and word not in MISSING}
            if strange:
                unseen.append(f"{sum(strange.values())} in {name!r} (such as {next(iter(strange))!r})")
        if count:
            missing[source] = count
    if missing:
        notes.append(f"missing cells, filled in: {_some([f'{count} in {name!r}' for name, count in missing.items()])}")
    if unseen:
        notes.append(f"words unseen in training, taken as one other category: {_some(unseen)}")
    return X, tuple(categories)


def _some(parts: list[str]) -> str:
    return ", ".join(parts[:20]) + (f" and in {len(parts) - 20} more columns" if len(parts) > 20 else "")


def different(column: Array) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Return the different words of a column in the order of their first rows, and the index of each row's word."""
    places = {word: place for place, word in enumerate(dict.fromkeys(column))}
    return list(places), np.fromiter(map(places.__getitem__, column), np.int32, len(column))


def _categories(found: list[str]) -> tuple[str, ...]:
    return tuple(sorted({"" if word in MISSING else word for word in found}))


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
