"""The part that each column of a table plays: an input, the target, an identifier, a group, or none."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fusemlp.datasets.dataset import Categories, Dataset, Features, Role, different, spellings
from fusemlp.datasets.dates import parts_of, sources_of
from fusemlp.datasets.tables import Place
from fusemlp.datasets.textfiles import MISSING
from fusemlp.describe.text import listed, meant
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from fusemlp.datasets.preprocessing import Preprocessor


@dataclass(frozen=True)
class ColumnChoices:
    """Choices for the columns of a table: to ``drop``, to ``keep`` in any case, and to take as ``categorical``.

    ``ids`` name the rows: they are no inputs, and stand beside predictions. Rows of one ``group`` stay together when
    rows are held out; the column is no input. ``time`` orders the rows, so that the last ones are held out; the column
    is an input unless it is dropped. ``like`` is the preprocessor of an earlier reading, whose columns and categories
    are taken as they are.
    """

    drop: Collection[str] = ()
    keep: Collection[str] = ()
    categorical: Collection[str] = ()
    ids: Collection[str] = ()
    group: str | None = None
    time: str | None = None
    like: Preprocessor | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that are no inputs but are read, as text."""
        return (*dict.fromkeys([*self.ids, *([] if self.group is None else [self.group])]),)

    def options(self) -> dict[str, Collection[str]]:
        """Return the named columns of each option of the command line."""
        single = {"group": self.group, "time": self.time}
        return {
            "drop": self.drop,
            "keep": self.keep,
            "categorical": self.categorical,
            "id": self.ids,
            **{name: () if column is None else (column,) for name, column in single.items()},
        }

    def check(self, path: Place, names: Collection[str], target: str) -> None:
        """Raise unless the table has the named columns, and no column has two parts that exclude each other."""
        options = self.options()
        for option, chosen in options.items():
            if target in chosen and option not in ("keep", "categorical"):
                raise ArgumentError(f"{option}: {target!r} is the target")
            absent = [name for name in chosen if name not in names]
            if absent:
                purpose = {"id": "name the rows by", "group": "group the rows by", "time": "order the rows by"}
                raise DataError(
                    f"{path}: no columns {listed(absent)} to {purpose.get(option, option)}; the columns are "
                    f"{listed(names)}{meant(absent, names)}"
                )
        for option in ("drop", "keep", "categorical"):
            both = [name for name in options[option] if name in self.texts]
            if both:
                name = next(name for name in ("id", "group") if both[0] in options[name])
                raise ArgumentError(f"{option}: {both[0]!r} is no input anyway: --{name} names it; give one of them")
        both = [name for name in self.drop if name in (*self.keep, *self.categorical)]
        if both:
            raise ArgumentError(f"drop: {both[0]!r} is to be an input too, by --keep or --categorical; give one")
        if self.group is not None and self.time is not None:
            raise ArgumentError("group: rows are held out by group or in the order of time; give one of the options")


def roles(
    names: Collection[str],
    target: str,
    columns: ColumnChoices,
    table: Mapping[str, Array],
    inputs: Collection[str],
    reasons: Mapping[str, str],
) -> tuple[Role, ...]:
    """Return the role of each column; ``table`` holds those that were read, ``reasons`` those to leave some out."""
    parts = []
    for name in names:
        missing = missing_share(table[name]) if name in table else None
        if name in inputs:
            parts.append(Role(name, _kind(table[name]), missing, "orders the rows" if name == columns.time else ""))
        elif name == target:
            parts.append(Role(name, "target", 0.0))
        elif name in reasons:
            parts.append(Role(name, "left out", missing, reasons[name]))
        else:
            kinds = {"id": columns.ids, "group": (columns.group,), "time": (columns.time,)}
            parts.append(
                Role(name, next((kind for kind, entries in kinds.items() if name in entries), "dropped"), missing)
            )
    return tuple(parts)


def _kind(column: Array) -> str:
    if column.dtype.kind == "M":
        return "date"
    if column.dtype.kind not in "biuf":
        return "words"
    values = column[~np.isnan(column)]
    return "boolean" if len(values) and np.isin(values, (0, 1)).all() else "number"


def missing_share(column: Array) -> float:
    """Return the share of a column's cells that are missing."""
    if column.dtype.kind == "M":
        return float(np.isnat(column).mean())
    if column.dtype.kind in "biuf":
        return float(np.isnan(column).mean())
    return sum(map(MISSING.__contains__, column)) / len(column)


def times(path: Place, name: str, column: Array) -> Array:
    """Return the column ``name`` as numbers that order the rows; DataError if some have no time."""
    if column.dtype.kind not in "biufM":
        example = next((word for word in column if word not in MISSING), "")
        raise DataError(
            f"{path}, column {name!r}: it is to order the rows (--time), which takes numbers or dates such as "
            f"2024-12-31, but holds words such as {example!r}"
        )
    missing = np.isnat(column) if column.dtype.kind == "M" else np.isnan(column)
    if missing.any():
        raise DataError(
            f"{path}, column {name!r}: it is to order the rows (--time), but has no value in {int(missing.sum())} of "
            f"{len(column)} rows; fill them in or delete the rows"
        )
    return column.astype(np.int64) if column.dtype.kind == "M" else column


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
            entries, codes = different(column)
            words = like.categories[index] if like is not None else _categories(entries)
            assert words is not None, "a column that held numbers was read as numbers"
            categories.append(words)
            place: dict[str, float] = {word: code for code, word in enumerate(words)}
            if like is not None and like.joins_spellings:
                place = {word: place[known] for word, known in spellings(entries, words).items()} | place
            absent = place.get("", math.nan)
            X[:, index] = np.array(
                [place.get(word, absent if word in MISSING else math.nan) for word in entries], float
            )[codes]
            cells = np.bincount(codes, minlength=len(entries)).tolist()
            counts = dict(zip(entries, cells, strict=True))
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


def _categories(found: list[str]) -> tuple[str, ...]:
    return tuple(sorted({"" if word in MISSING else word for word in found}))
