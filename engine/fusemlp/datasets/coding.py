"""The columns of a table as one matrix of numbers, and the columns that a network cannot learn from."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fusemlp.datasets.dates import PARTS, part_names, with_parts
from fusemlp.datasets.files import Array
from fusemlp.datasets.textfiles import MISSING
from fusemlp_kernels.errors import DataError

Features = npt.NDArray[np.float64]
Categories = tuple[tuple[str, ...] | None, ...]
# A column of whole numbers, one a row, is an identifier if it counts the rows or has such a name.
_IDENTIFIER = re.compile(r"(?i:(?:^|[\W_])(?:id|idx|index|uuid|key|row ?names?|row|nr|no)$)|[a-z](?:Id|ID)$")
# A table of fewer rows has too few to tell an identifier from a measurement.
_FEWEST_ROWS = 20


def kept_features(table: dict[str, Array]) -> tuple[str, ...]:
    """Return the names of the features, of a date only its parts that differ between rows, and the elapsed days."""
    parts = part_names(name for name, column in table.items() if column.dtype.kind == "M")
    return tuple(
        name
        for name, values in with_parts(table).items()
        if name not in parts or name.endswith(PARTS[-1]) or len(np.unique(values[~np.isnan(values)])) > 1
    )


def without_useless(path: Path, table: dict[str, Array], keep: Collection[str], notes: list[str]) -> dict[str, str]:
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


def coded(
    table: dict[str, Array], names: tuple[str, ...], known: Categories | None, notes: list[str]
) -> tuple[Features, Categories]:
    """Return the columns as one float64 matrix, words as indices into their categories (``known`` or found)."""
    sources = part_names(name for name, column in table.items() if column.dtype.kind == "M")
    table = with_parts(table)
    X = np.empty((len(table[names[0]]), len(names)))
    categories: list[tuple[str, ...] | None] = []
    missing: dict[str, int] = {}
    unseen: list[str] = []
    for index, name in enumerate(names):
        column = table[name]
        words = known[index] if known is not None else _categories(column)
        categories.append(words)
        if words is None:
            X[:, index] = column
            count = int(np.isnan(column).sum())
        else:
            codes: dict[str, float] = {word: code for code, word in enumerate(words)}
            absent = codes.get("", math.nan)
            strange = {word for word in dict.fromkeys(column) if word not in codes and word not in MISSING}
            for word in dict.fromkeys(column):
                codes.setdefault(word, math.nan if word in strange else absent)
            X[:, index] = [codes[word] for word in column]
            known_words = set(words)
            count = sum(word in MISSING and (word == "" or word not in known_words) for word in column)
            if strange:
                cells = sum(word in strange for word in column)
                example = next(word for word in column if word in strange)
                unseen.append(f"{cells} in {name!r} (such as {example!r})")
        if count:
            missing[sources.get(name, name)] = count
    if missing:
        notes.append(f"missing cells, filled in: {_some([f'{count} in {name!r}' for name, count in missing.items()])}")
    if unseen:
        notes.append(f"words unseen in training, taken as one other category: {_some(unseen)}")
    return X, tuple(categories)


def _some(parts: list[str]) -> str:
    return ", ".join(parts[:20]) + (f" and in {len(parts) - 20} more columns" if len(parts) > 20 else "")


def _categories(column: Array) -> tuple[str, ...] | None:
    if column.dtype.kind in "biuf":
        return None
    words = set(column)
    return tuple(sorted({"" if word in MISSING else word for word in words}))
