"""A data set as it is in its source, and the part that each column plays: an input, the target, or none."""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusemlp.datasets.cells import Categories, Features
from fusemlp.datasets.tables import Place, wrong_weights
from fusemlp.datasets.textfiles import MISSING, truth_values
from fusemlp.describe.checks import listed, meant
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, DataError

# The kinds of columns that are no inputs and not the target, beside ids.
UNUSED = ("group", "time", "weight", "dropped", "left out")
# A column of whole numbers, one a row, is an identifier if it counts the rows or has such a name.
_IDENTIFIER = re.compile(r"(?i:(?:^|[\W_])(?:id|idx|index|uuid|key|row ?names?|row|nr|no)$)|[a-z](?:Id|ID)$")
# A table of fewer rows has too few to tell an identifier from a measurement.
_FEWEST_ROWS = 20


@dataclass(frozen=True)
class Role:
    """A column's ``kind``: number, boolean, words, date, target, id, group, time, weight, dropped or left out.

    ``missing`` is its share of missing cells, None for a column that was not read; ``note`` is the reason to leave it
    out. Kinds that are no input are those of ``UNUSED`` and the target.
    """

    name: str
    kind: str
    missing: float | None = None
    note: str = ""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Features and labels as they are in the source.

    ``X`` (n, columns) float64, images flattened; ``y`` (n,) labels as they are in the file: int, float, bool or
    str, or (n, k) float64 for a regression with several targets, or for several labels a row, each 0 or 1. ``task`` is
    "classification", "regression" or, of the latter, "multilabel".
    ``class_names`` go with the sorted distinct labels. ``test`` is the test set that came with the data, or X and y of
    a file of its own, as is ``validation``; ``test_source`` says which.
    ``categories`` holds for each column of X the words that its values are indices into, None for numbers. A missing
    number is NaN, a missing word the category "". ``dates`` are the table's columns of dates with the order of year,
    month and day in their text; X has the parts of each, named as in "sold: month". ``notes`` are lines on the
    reading: the form of the file, columns left out, missing cells. ``roles`` tell what each column of a table became.
    ``ids`` are the columns that name the rows, as text; ``groups`` and ``times`` (n,) are those that decide which rows
    are held out. ``guess`` says that whole numbers were taken as classes. ``joins_spellings``: see ``Preprocessor``.
    ``weight`` (n,) are the weights of the rows. ``decimals`` has the decimal marks of a table of text with commas, and
    ``missing_words`` the words that the caller has stand for missing cells.
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
    weight: Array | None = None
    decimals: tuple[tuple[str, str], ...] = ()
    missing_words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.categories:
            object.__setattr__(self, "categories", (None,) * self.X.shape[1])

    @property
    def targets(self) -> tuple[str, ...]:
        """The names of the targets."""
        return target_names(self.target_name, 1 if self.y.ndim == 1 else self.y.shape[1])

    @property
    def gaps(self) -> str:
        """The number of values that several targets lack, as text; empty without any."""
        if self.y.ndim == 1:
            return ""
        parts = [self.y, *(part[1] for part in (self.validation, self.test) if part is not None)]
        counts = np.isnan(np.concatenate(parts)).sum(axis=0).tolist()
        return ", ".join(f"{count} in {name!r}" for name, count in zip(self.targets, counts, strict=True) if count)

    def has_gaps(self, rows: Array) -> bool:
        """Return whether several targets lack values in these rows, or in a validation set of its own."""
        parts = [self.y[rows], *([] if self.validation is None else [self.validation[1]])]
        return self.y.ndim > 1 and any(np.isnan(part).any() for part in parts)

    @property
    def classes(self) -> Array:
        """The distinct labels, sorted, those of the other sets among them: every split has the same."""
        others = (part[1] for part in (self.validation, self.test) if part is not None)
        return np.unique(np.concatenate([self.y, *others]))


def check_labels(place: str, y: Array) -> Array:
    """Return labels (n, k) as float64, NaN for a missing one; DataError, with ``place``, unless they are 0 and 1."""
    values = y.astype(np.float64) if y.dtype.kind in "biuf" else truth_values(place, y)
    if len(wrong := values[~np.isin(values, (0.0, 1.0)) & ~np.isnan(values)]):
        raise DataError(
            f"{place}: several labels are 0 or 1 each, yes or no, true or false; found {wrong[0]:g}; train a run for "
            "each of other classes, or a regression of numbers"
        )
    return values


def target_names(name: str, count: int) -> tuple[str, ...]:
    """Return the names of targets: of several those between the commas of ``name``, or numbers if it has no such."""
    names = tuple(name.split(","))
    return (name,) if count == 1 else names if len(names) == count else tuple(map(str, range(count)))


def targets_in(target: str, names: Collection[str]) -> tuple[str, ...]:
    """Return the target columns: those between the commas of ``target``, unless one of ``names`` has these commas."""
    return (target,) if target in names else tuple(dict.fromkeys(part.strip() for part in target.split(",")))


@dataclass(frozen=True)
class ColumnChoices:
    """Choices for the columns of a table: to ``drop``, to ``keep`` in any case, and to take as ``categorical``.

    ``ids`` name the rows, and stand beside predictions; ``group`` keeps rows together and ``time`` orders them when
    some are held out. Of these ``time`` alone is an input. ``weight`` has the weight of each row. Columns and
    categories of the preprocessor ``like`` stay.
    """

    drop: Collection[str] = ()
    keep: Collection[str] = ()
    categorical: Collection[str] = ()
    ids: Collection[str] = ()
    group: str | None = None
    time: str | None = None
    like: Any = None
    weight: str | None = None

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns that are no inputs but are read, as text."""
        return (*dict.fromkeys([*self.ids, *([] if self.group is None else [self.group])]),)

    def options(self) -> dict[str, Collection[str]]:
        """Return the named columns of each option of the command line."""
        single = {"group": self.group, "time": self.time, "weight": self.weight}
        several = {"drop": self.drop, "keep": self.keep, "categorical": self.categorical, "id": self.ids}
        return several | {name: () if column is None else (column,) for name, column in single.items()}

    def check(self, path: Place, names: Collection[str], targets: Collection[str]) -> None:
        """Raise unless the table has the named columns, and no column has two parts that exclude each other."""
        options = self.options()
        for option, chosen in options.items():
            both = [name for name in targets if name in chosen]
            if both and option not in ("keep", "categorical"):
                raise ArgumentError(f"{option}: {both[0]!r} is the target")
            if absent := [name for name in chosen if name not in names]:
                does = {"id": "name", "time": "order", "weight": "weigh", "categorical": "take"}.get(option, option)
                does += {"drop": "", "keep": "", "categorical": " as words"}.get(option, " the rows by")
                near, parts = meant(absent, names), [part.strip() for name in absent for part in name.split(",")]
                if option not in ("group", "time", "weight") and {*parts} <= {*names}:
                    near = f"; did you mean {' '.join(f'--{option} {part}' for part in parts)}?"
                raise DataError(f"{path}: no columns {listed(absent)} to {does}; the columns are {listed(names)}{near}")
        aside = ("id", "group", "weight")
        clashes = {"keep": aside, "categorical": aside, "drop": ("keep", "categorical", *aside), "weight": aside[:2]}
        for option, other in ((option, other) for option, others in clashes.items() for other in others):
            both = [name for name in options[option] if name in options[other]]
            if both:
                raise ArgumentError(f"{option}: {both[0]!r} is the column of --{other} too; give one of them")
        if self.group is not None and self.time is not None:
            raise ArgumentError("group: rows are held out by group or in the order of time; give one of the options")


def roles(
    names: Collection[str],
    targets: Collection[str],
    columns: ColumnChoices,
    table: Mapping[str, Array],
    inputs: Collection[str],
    reasons: Mapping[str, str],
) -> tuple[Role, ...]:
    """Return the role of each column; ``table`` holds those that were read, ``reasons`` those to leave some out."""
    aside: dict[Any, str] = {columns.time: "time", columns.weight: "weight", columns.group: "group"}
    aside |= dict.fromkeys(columns.ids, "id")
    parts = []
    for name in names:
        kind, note = aside.get(name, "dropped"), ""
        missing = missing_share(table[name]) if name in table else None
        if name in inputs:
            kind, note = _kind(table[name]), "orders the rows" if name == columns.time else ""
        elif name in targets:
            kind, missing = "target", 0.0
        elif name in reasons:
            kind, note = "left out", reasons[name]
        parts.append(Role(name, kind, missing, note))
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
    if column.dtype.kind in "biufM":
        return float(np.isnan(column).mean())
    return sum(map(MISSING.__contains__, column)) / len(column)


def times(path: Place, name: str, column: Array) -> Array:
    """Return the column ``name`` as numbers that order the rows; DataError if some have no time."""
    purpose = f"{path}, column {name!r}: it is to order the rows (--time)"
    if column.dtype.kind not in "biufM":
        example = next((word for word in column if word not in MISSING), "")
        raise DataError(
            f"{purpose}, which takes numbers or dates such as 2024-12-31, but holds words such as {example!r}"
        )
    missing = int(np.isnan(column).sum())
    if missing:
        raise DataError(
            f"{purpose}, but has no value in {missing} of {len(column)} rows; fill them in or delete the rows"
        )
    return column.astype(np.int64) if column.dtype.kind == "M" else column


def weights(place: str, column: Array) -> Array:
    """Return a column of weights, which ``place`` names; DataError if they are none, or all 0."""
    wrong = np.flatnonzero(wrong_weights(column))
    if len(wrong) or not column.any():
        fault = f"row {wrong[0]} holds {column[wrong[0]]}" if len(wrong) else "every row holds 0"
        raise DataError(f"{place}: expected weights of at least 0, of which at least one is a non-zero number; {fault}")
    return column


def without_useless(path: Place, table: dict[str, Array], keep: Collection[str], notes: list[str]) -> dict[str, str]:
    """Return the columns that a network cannot learn from with the reasons, and note them; none if all are such."""
    reasons = {name: "" if name in keep else _useless(name, column) for name, column in table.items()}
    twins = _twins({name: column for name, column in table.items() if not reasons[name]})
    reasons |= {name: f"the same as {other!r}" for name, other in twins.items() if name not in keep}
    useless = {name: reason for name, reason in reasons.items() if reason}
    if not useless:
        return {}
    if len(useless) == len(table):
        numbers = [name for name in useless if table[name].dtype.kind in "fM" and useless[name] != "no values"]
        if not numbers:
            faults = "; ".join(f"column {name!r}: {reason}" for name, reason in useless.items())
            raise DataError(f"{path}: no feature is left to learn from: {faults}; drop or --keep these columns")
        return {name: reason for name, reason in useless.items() if name not in numbers}
    listing = ", ".join(f"{name!r} ({reason})" for name, reason in useless.items())
    notes.append(f"left out, unless you --keep them: {listing}")
    return useless


def _twins(table: dict[str, Array]) -> dict[str, str]:
    """Return the columns that hold the same values in every row as an earlier one, with that one's name."""
    first: dict[object, list[str]] = {}
    twins: dict[str, str] = {}
    for name, column in table.items():
        numbers = column.dtype.kind in "biuf"
        plain = column.dtype.kind != "O"
        content = hash((column + 0.0 if numbers else column).tobytes() if plain else tuple(column))
        others = first.setdefault((column.dtype.kind, content), [])
        other = next((other for other in others if np.array_equal(table[other], column, equal_nan=numbers)), None)
        if other is None:
            others.append(name)
        else:
            twins[name] = other
    return twins


def _useless(name: str, column: Array) -> str:
    """Return the reason to leave a feature column out, "" to keep it."""
    if column.dtype.kind == "M":
        return "constant" if len(np.unique(column)) == 1 and len(column) > 1 else ""
    if column.dtype.kind != "f":
        words = set(column)
        count = len(words - MISSING)
        if count > 20 and 2 * count > len(column):
            return f"{count} different words in {len(column)} rows look like names"
        return "constant" if len(words) == 1 and len(column) > 1 else ""
    missing = np.isnan(column)
    if missing.all():
        return "no values"
    if len(column) < _FEWEST_ROWS or missing.any():
        return ""
    steps = np.diff(column)
    if not steps.any():
        return "constant"
    if (steps == 1).all():
        return "counts the rows"
    # The first column without a name is an index from which rows may have been taken.
    named = _IDENTIFIER.search(name) or (name == "column_1" and (steps > 0).all())
    whole = named and (column == np.floor(column)).all()
    return "a number for each row, named as an identifier" if whole and len(np.unique(column)) == len(column) else ""
