"""Tables in memory as columns: data frames of pandas and polars, Arrow tables, and arrays.

A column becomes what ``tables`` makes of a file's: float64 with NaN, datetime64[us] with NaT, or an object array of str.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import date
from decimal import Decimal
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp.datasets.columns import MOSTLY, Column, Problems
from fusemlp.datasets.dates import ORDERS, orders_of
from fusemlp.datasets.files import Array
from fusemlp.datasets.tables import _frame_feature, choose_columns
from fusemlp_kernels.errors import MissingLibraryError, ShapeError


def is_frame(X: Any) -> bool:
    """Return whether X has columns with names: a data frame or an Arrow table."""
    return hasattr(X, "iloc") or hasattr(X, "to_pandas")


def column_names(X: Any) -> list[str]:
    """Return the names of a table's columns as text; those of an array are x0, x1, ..."""
    if not is_frame(X):
        return [f"x{index}" for index in range(np.shape(X)[1])]
    names = X.column_names if hasattr(X, "column_names") else X.columns
    return [str(name) for name in names]


def read_frame(
    X: Any,
    *,
    names: Sequence[str] | None = None,
    features: Sequence[str] | None = None,
    drop: Collection[str] = (),
    kinds: dict[str, str],
    notes: list[str],
) -> dict[str, Array]:
    """Return columns of a frame, an Arrow table or an array (n, columns), by name and in its order.

    ``names`` are those of an array's columns (None: x0, x1, ...). ``features`` chooses the columns (None: all but those
    to ``drop``). ``kinds`` says what a column holds, as for ``read_table``; those it does not name are told by their
    values, and entered. ``notes`` takes lines on the reading. DataError lists every cell that cannot be read.
    """
    path = Path("X")
    names = column_names(X) if names is None else names
    chosen = set(choose_columns(path, names, features, None, drop))
    frame = _pandas(X) if is_frame(X) else np.asarray(X)
    if frame.ndim != 2 or not len(frame):
        raise ShapeError(f"X: expected a table of one or more rows, got shape {frame.shape}")
    problems = Problems(path)
    table: dict[str, Array] = {}
    for index, name in enumerate(names):
        if name in chosen:
            values = frame.iloc[:, index] if is_frame(frame) else frame[:, index]
            table[name] = column = _feature(name, values, kinds.get(name), problems, notes)
            found = "number" if column.dtype.kind == "f" else "ymd" if column.dtype.kind == "M" else "word"
            kinds.setdefault(name, found)
    problems.check()
    return table


def _pandas(X: Any) -> Any:
    if hasattr(X, "iloc"):
        return X
    try:
        # Arrow's dates would become objects, one of Python's for each cell.
        return X.to_pandas(date_as_object=False) if hasattr(X, "column_names") else X.to_pandas()
    except ImportError as error:
        raise MissingLibraryError(
            f"X: a {type(X).__module__}.{type(X).__name__} is read through pandas and pyarrow: pip install "
            "'fusemlp[parquet]'"
        ) from error


def _feature(name: str, values: Any, kind: str | None, problems: Problems, notes: list[str]) -> Array:
    """Return a column of a frame (a Series) or of an array."""
    if values.dtype == object:
        return _objects(name, list(values), kind, problems, notes)
    if not isinstance(values, np.ndarray):
        return np.asarray(_frame_feature(values.rename(name), kind, problems, notes))
    if values.dtype.kind == "M":
        return values.astype("datetime64[us]")
    if values.dtype.kind in "biuf" and kind in (None, "number"):
        numbers: Array = values.astype(np.float64)
        for row in np.flatnonzero(np.isinf(numbers)):
            problems.add(name, f"row {row}, column {name!r}", f"{numbers[row]} is not a finite number; correct it")
        return numbers
    texts = ["" if _is_missing(value) else str(value) for value in values.tolist()]
    return _texts(name, texts, kind, problems, notes)


def _objects(name: str, values: list[Any], kind: str | None, problems: Problems, notes: list[str]) -> Array:
    """Return a column of Python's objects: numbers, dates or words, with None, NaN, NaT or NA for missing ones."""
    present = [value for value in values if not _is_missing(value)]
    if all(isinstance(value, Real | Decimal | np.bool_) for value in present) and kind in (None, "number"):
        return _feature(name, np.array([float("nan" if _is_missing(v) else v) for v in values]), kind, problems, notes)
    if all(isinstance(value, date | np.datetime64) for value in present) and kind in (None, *ORDERS):
        moments = [np.datetime64("NaT") if _is_missing(value) else _utc(value) for value in values]
        return np.array(moments, "datetime64[us]")
    wrong = next((value for value in present if not isinstance(value, str | Real | Decimal | np.bool_ | date)), None)
    if wrong is not None:
        problems.add(
            name,
            f"column {name!r}",
            f"expected numbers, words or dates, found {type(wrong).__name__} such as {wrong!r}; convert or drop the "
            "column",
        )
    texts = ["" if _is_missing(value) else str(value) for value in values]
    if kind is None and present:
        # Text that looks like numbers stays text where columns have types, but text is how many tables hold dates.
        kind = "word" if not orders_of((text for text in texts if text), MOSTLY) else None
    return _texts(name, texts, kind, problems, notes)


def _texts(name: str, texts: list[str], kind: str | None, problems: Problems, notes: list[str]) -> Array:
    column = Column(name, ".", problems, kind)
    column.add(texts, range(len(texts)))
    return column.finish(notes)


def _utc(value: Any) -> Any:
    """Return a moment without its zone."""
    offset = value.utcoffset() if hasattr(value, "utcoffset") else None
    return value if offset is None else value.replace(tzinfo=None) - offset


def _is_missing(value: Any) -> bool:
    try:
        return value is None or bool(value != value)
    except (TypeError, ValueError):
        # pandas.NA compares as NA.
        return True
