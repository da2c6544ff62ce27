"""Tables: csv, tsv and parquet files as columns.

Numbers become float64 arrays with NaN for missing cells, dates datetime64[us] with NaT, words object arrays of str with
the text of the cell. The standard library alone reads CSV, so a file means the same on every installation. Every error
is a DataError that names the file and the places in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp.datasets.columns import MOSTLY, Column, Problems, Target
from fusemlp.datasets.dates import ORDERS, orders_of
from fusemlp.datasets.files import Array, reason
from fusemlp.datasets.textfiles import MISSING, Form, is_compressed, open_rows
from fusemlp_kernels.errors import DataError

TABLES = (".csv", ".tsv", ".parquet")
# The number of rows of a csv file in memory as text.
_CHUNK = 4096


def is_table(path: Path) -> bool:
    """Return whether the name of a file is that of a table, compressed or not."""
    if is_compressed(path):
        return path.with_suffix("").suffix.lower() in (".csv", ".tsv")
    return path.suffix.lower() in TABLES


def read_table(
    path: Path,
    *,
    features: Sequence[str] | None = None,
    target: str | None = None,
    words: bool = False,
    form: Form | None = None,
    drop: Collection[str] = (),
    kinds: dict[str, str] | None = None,
    known_labels: Collection[str] = (),
    notes: list[str] | None = None,
) -> dict[str, Array]:
    """Return columns of a csv, tsv or parquet file by name, in the file's order.

    ``features`` chooses the feature columns (None: all but the target and those to ``drop``); the others are ignored.
    ``kinds`` says what a feature column holds: "number", "word", or dates in an order of ``ORDERS``; those it does not
    name are told by their values, and entered. The column
    ``target`` becomes int64, float64, bool or str, by its values; with ``words`` it stays str. Rows without a target
    are left out; a missing value's text that is among ``known_labels`` is a label. ``notes`` takes lines on the
    reading.
    """
    notes = [] if notes is None else notes
    kinds = {} if kinds is None else kinds
    if path.suffix.lower() == ".parquet":
        table, missing = _read_parquet(path, features, target, words, drop, kinds, notes)
    else:
        table, missing = _read_csv(path, features, target, words, form or Form(), drop, kinds, known_labels, notes)
    if table and missing.all() and len(missing):
        raise DataError(f"{path}, column {target!r}: the target is missing in all {len(missing)} rows")
    if not table or not len(next(iter(table.values()))):
        raise DataError(f"{path}: there are no rows below the header")
    if missing.any():
        notes.append(f"{int(missing.sum())} of {len(missing)} rows have no {target!r} and are left out")
        table = {name: column if name == target else column[~missing] for name, column in table.items()}
    return table


def choose_columns(
    path: Path, names: Sequence[str], features: Sequence[str] | None, target: str | None, drop: Collection[str] = ()
) -> list[str]:
    """Return the columns to read; DataError, with a list of the columns, if one is missing or named twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path}: several columns are called {listed(twice)}; give each its own name")
    present = set(names)
    wanted = present - set(drop) if features is None else set(features)
    missing = [name for name in features or () if name not in present]
    if target is not None and target not in present:
        raise DataError(f"{path}: there is no target column {target!r}; the columns are {listed(names)}")
    if missing:
        raise DataError(f"{path}: no feature columns {listed(missing)}; the columns are {listed(names)}")
    return [name for name in names if name in wanted or name == target]


def read_names(path: Path, form: Form | None = None) -> list[str]:
    """Return the names of a table's columns, in order."""
    if path.suffix.lower() == ".parquet":
        return list(_frame(path).columns)
    with open_rows(path, form or Form()) as rows:
        return rows.names


def _read_csv(
    path: Path,
    features: Sequence[str] | None,
    target: str | None,
    words: bool,
    form: Form,
    drop: Collection[str],
    kinds: dict[str, str],
    known_labels: Collection[str],
    notes: list[str],
) -> tuple[dict[str, Array], Array]:
    problems = Problems(path)
    with open_rows(path, form) as file:
        names, reader = file.names, file.reader
        notes += filter(None, [file.said(path)])
        columns: dict[int, Column | Target] = {}
        for name in choose_columns(path, names, features, target, drop):
            columns[names.index(name)] = (
                Target(name, file.decimal, problems, MISSING.difference(known_labels))
                if name == target
                else Column(name, file.decimal, problems, kinds.get(name))
            )
        rows: list[list[str]] = []
        lines: list[int] = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                problems.add(
                    "",
                    f"line {reader.line_num}",
                    f"expected {len(names)} fields, as the header has, found {len(row)}; put quotes around fields "
                    f"that contain {file.sep!r}",
                )
                continue
            rows.append(row)
            lines.append(reader.line_num)
            if len(rows) == _CHUNK:
                _append(columns, rows, lines)
                rows, lines = [], []
        _append(columns, rows, lines)
    missing = np.zeros(0, bool)
    table: dict[str, Array] = {}
    for column in columns.values():
        if isinstance(column, Target):
            missing = np.array(column.missing, bool)
            table[column.name] = column.finish(words)
        else:
            table[column.name] = column.finish(notes)
            kinds[column.name] = column.kind or "number"
    problems.check()
    return table, missing


def _append(columns: dict[int, Column | Target], rows: list[list[str]], lines: list[int]) -> None:
    if rows:
        by_column = list(zip(*rows, strict=True))
        for position, column in columns.items():
            column.add(by_column[position], lines)


def _frame(path: Path) -> Any:
    try:
        import pandas

        frame = pandas.read_parquet(path, engine="pyarrow")
    except ImportError as error:
        raise DataError(
            f"{path}: parquet files need pandas and pyarrow: pip install 'fusemlp[parquet]'; or save the "
            "data as .csv or .npz"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: it cannot be read as a parquet file ({reason(error)})") from error
    frame.columns = [str(name) for name in frame.columns]
    return frame


def _read_parquet(
    path: Path,
    features: Sequence[str] | None,
    target: str | None,
    words: bool,
    drop: Collection[str],
    kinds: dict[str, str],
    notes: list[str],
) -> tuple[dict[str, Array], Array]:
    frame = _frame(path)
    problems = Problems(path)
    table: dict[str, Array] = {}
    missing = np.zeros(0, bool)
    for name in choose_columns(path, list(frame.columns), features, target, drop):
        series = frame[name]
        if name == target:
            missing = series.isna().to_numpy()
            table[name] = _frame_target(series[~missing], words, problems)
        else:
            table[name] = column = _frame_feature(series, kinds.get(name), problems, notes)
            found = "number" if column.dtype.kind in "biuf" else "ymd" if column.dtype.kind == "M" else "word"
            kinds.setdefault(name, found)
    problems.check()
    return table, missing


def _plain(series: Any) -> tuple[Any, bool]:
    """Return the column without pandas's categories, and whether it holds numbers."""
    import pandas

    if isinstance(series.dtype, pandas.CategoricalDtype):
        kind = series.cat.categories.dtype
        # Integers and truth values have no missing ones.
        series = series.astype("float64" if series.isna().any() and kind.kind in "biu" else kind)
    types = pandas.api.types
    if series.dtype == object:
        # Truth values with missing ones, and days, come as objects.
        found = types.infer_dtype(series, skipna=True)
        if found == "boolean":
            series = series.astype("boolean" if series.isna().any() else bool)
        elif found == "date":
            series = pandas.to_datetime(series)
    return series, types.is_numeric_dtype(series.dtype) and not types.is_complex_dtype(series.dtype)


def _frame_target(series: Any, words: bool, problems: Problems) -> Array:
    import pandas

    series, numeric = _plain(series)
    if not numeric:
        _check_words(series, problems)
        return np.array(series.to_list(), dtype=str)
    if pandas.api.types.is_float_dtype(series.dtype):
        numbers = series.to_numpy(np.float64)
        _check_finite(series, numbers, problems)
    else:
        numbers = np.asarray(series.to_list())
    labels: Array = numbers.astype(str) if words else numbers
    return labels


def _frame_feature(series: Any, kind: str | None, problems: Problems, notes: list[str]) -> Array:
    import pandas

    series, numeric = _plain(series)
    missing = series.isna().to_numpy()
    if pandas.api.types.is_datetime64_any_dtype(series.dtype) and kind in (None, *ORDERS):
        zoned = isinstance(series.dtype, pandas.DatetimeTZDtype)
        moments: Array = (series.dt.tz_convert(None) if zoned else series).to_numpy().astype("datetime64[us]")
        return moments
    if numeric and kind != "word" and kind not in ORDERS:
        numbers: Array = series.to_numpy(np.float64, na_value=np.nan)
        _check_finite(series, np.where(missing, 0.0, numbers), problems)
        return numbers
    if not numeric:
        _check_words(series[~missing], problems)
    texts = ["" if gone else str(value) for value, gone in zip(series, missing, strict=True)]
    if kind is None and not missing.all():
        # Text that looks like numbers stays text in a file with types, but text is how many files hold dates.
        kind = "word" if not orders_of((text for text in texts if text), MOSTLY) else None
    column = Column(str(series.name), ".", problems, kind)
    column.add(texts, range(len(texts)))
    return column.finish(notes)


def _check_words(series: Any, problems: Problems) -> None:
    wrong = next((value for value in series if not isinstance(value, str)), None)
    if wrong is not None:
        problems.add(
            str(series.name),
            f"column {series.name!r}",
            f"expected numbers or words, found dtype {series.dtype} with values such as {wrong!r}; convert or drop the "
            "column",
        )


def _check_finite(series: Any, numbers: Array, problems: Problems) -> None:
    for row in np.flatnonzero(~np.isfinite(numbers)):
        text = f"{numbers[row]} is not a finite number; correct it or drop the row"
        problems.add(str(series.name), f"row {row}, column {series.name!r}", text)


def listed(names: Iterable[object]) -> str:
    """Return names as text, at most thirty of them."""
    shown = [repr(name) for name in names]
    return ", ".join(shown) if len(shown) <= 30 else ", ".join(shown[:30]) + f" and {len(shown) - 30} more"
