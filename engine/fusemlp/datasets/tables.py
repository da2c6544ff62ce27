"""Tables: csv, tsv and parquet files as columns.

Numbers become float64 arrays, words object arrays of str. The standard library alone reads CSV, so a file means
the same on every installation. Every error is a DataError that names the file and the place in it.
"""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fusemlp.datasets.files import Array, reason
from fusemlp_kernels.errors import DataError

TABLES = (".csv", ".tsv", ".parquet")
MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "null", "NULL", "?"})
_WHOLE = re.compile(r"[+-]?[0-9]+")
# The number of rows of a csv file in memory as text.
_CHUNK = 4096


def read_table(
    path: Path, *, features: Sequence[str] | None = None, target: str | None = None, words: bool = False
) -> dict[str, Array]:
    """Return columns of a csv, tsv or parquet file by name, in the file's order.

    ``features`` chooses the feature columns (None: all but the target); the others are ignored. The column
    ``target`` becomes int64, float64, bool or str, by its values; with ``words`` it stays str.
    """
    read = _read_parquet if path.suffix.lower() == ".parquet" else _read_csv
    columns = read(path, features, target, words)
    if not columns or not len(next(iter(columns.values()))):
        raise DataError(f"{path}: there are no rows below the header")
    return columns


def choose_columns(path: Path, names: Sequence[str], features: Sequence[str] | None, target: str | None) -> list[str]:
    """Return the columns to read; DataError, with a list of the columns, if one is missing or named twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{path}: several columns are called {listed(twice)}; give each its own name")
    present = set(names)
    wanted = present if features is None else set(features)
    missing = [name for name in features or () if name not in present]
    if target is not None and target not in present:
        raise DataError(f"{path}: there is no target column {target!r}; the columns are {listed(names)}")
    if missing:
        raise DataError(f"{path}: no feature columns {listed(missing)}; the columns are {listed(names)}")
    return [name for name in names if name in wanted or name == target]


def read_names(path: Path) -> list[str]:
    """Return the names of a table's columns, in order."""
    if path.suffix.lower() == ".parquet":
        return list(_frame(path).columns)
    with _csv_rows(path) as (names, _, _):
        return names


@contextmanager
def _csv_rows(path: Path) -> Iterator[tuple[list[str], str, Any]]:
    """Yield column names, delimiter and the reader of the rows; errors of the reader become DataError."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            # Spreadsheets write ";" if "," is the decimal sign.
            delimiter = max(",;\t", key=first.count)
            stream.seek(0)
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            names = [name.strip() for name in next(reader, [])]
            _check_header(path, names)
            yield names, delimiter, reader
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: expected a csv file in UTF-8 with a header ({reason(error)})") from error


def _read_csv(path: Path, features: Sequence[str] | None, target: str | None, words: bool) -> dict[str, Array]:
    with _csv_rows(path) as (names, delimiter, reader):
        chosen = choose_columns(path, names, features, target)
        columns = {names.index(name): _Column(path, name, is_target=name == target) for name in chosen}
        rows: list[list[str]] = []
        lines: list[int] = []
        for row in reader:
            if not row:
                continue
            if len(row) != len(names):
                raise DataError(
                    f"{path}, line {reader.line_num}: expected {len(names)} fields, as the header has, found "
                    f"{len(row)}; put quotes around fields that contain {delimiter!r}"
                )
            rows.append(row)
            lines.append(reader.line_num)
            if len(rows) == _CHUNK:
                _append(columns, rows, lines)
                rows, lines = [], []
        _append(columns, rows, lines)
    return {column.name: column.finish(words) for column in columns.values()}


class _Column:
    """A column of a csv file as it grows; the first value decides between numbers and words."""

    def __init__(self, path: Path, name: str, *, is_target: bool) -> None:
        self.path, self.name, self.is_target = path, name, is_target
        self.numeric: bool | None = False if is_target else None
        self.numbers: list[Array] = []
        self.words: list[str] = []
        self.lines: list[int] = []

    def add(self, values: Sequence[str], lines: Sequence[int]) -> None:
        if self.numeric is None:
            self.numeric = _number(values[0]) is not None or values[0].strip() in MISSING
        if not self.numeric:
            stripped = [value.strip() for value in values]
            if not MISSING.isdisjoint(stripped):
                self._refuse(next(i for i, value in enumerate(stripped) if value in MISSING), values, lines)
            self.words += stripped
            self.lines += lines
            return
        try:
            numbers = np.fromiter(map(float, values), np.float64, len(values))
        except ValueError:
            self._refuse(next(i for i, value in enumerate(values) if _number(value) is None), values, lines)
        bad = ~np.isfinite(numbers)
        if bad.any():
            self._refuse(int(np.argmax(bad)), values, lines)
        self.numbers.append(numbers)

    def finish(self, words: bool) -> Array:
        if self.numeric or self.numeric is None:
            return np.concatenate(self.numbers) if self.numbers else np.empty(0)
        if self.is_target:
            return np.array(self.words, dtype=str) if words else self._labels()
        for value in sorted(set(self.words)):
            if _number(value) is not None:
                self._refuse(self.words.index(value), self.words, self.lines)
        return np.array(self.words, dtype=object)

    def _labels(self) -> Array:
        if self.words and all(map(_WHOLE.fullmatch, self.words)):
            whole = [int(word) for word in self.words]
            if max(map(abs, whole)) < 2**63:
                return np.array(whole, dtype=np.int64)
            return np.array(self.words, dtype=str)
        numbers = [_number(word) for word in self.words]
        valid = [number for number in numbers if number is not None and math.isfinite(number)]
        if len(valid) == len(numbers):
            return np.array(valid, dtype=np.float64)
        # Numbers with decimals are measurements, so a word among them is a mistake; whole numbers can be the
        # names of classes.
        if any(number != math.floor(number) for number in valid):
            wrong = next(i for i, number in enumerate(numbers) if number is None or not math.isfinite(number))
            self._refuse(wrong, self.words, self.lines)
        return np.array(self.words, dtype=str)

    def _refuse(self, index: int, values: Sequence[str], lines: Sequence[int]) -> NoReturn:
        value = values[index].strip()
        if value in MISSING:
            found = f"the value is missing ({value!r}); fill it in or delete the row"
        elif _number(value) is None:
            found = f"{value!r} is not a number, but other values of the column are; correct or delete it"
        elif self.numeric or self.is_target:
            found = f"{value!r} is not a finite number; correct it or delete the row"
        else:
            found = f"{value!r} is a number, but other values of the column are words; correct or rename it"
        raise DataError(f"{self.path}, line {lines[index]}, column {self.name!r}: {found}")


def _append(columns: dict[int, _Column], rows: list[list[str]], lines: list[int]) -> None:
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


def _read_parquet(path: Path, features: Sequence[str] | None, target: str | None, words: bool) -> dict[str, Array]:
    frame = _frame(path)
    chosen = choose_columns(path, list(frame.columns), features, target)
    return {name: _frame_column(path, frame[name], is_target=name == target, words=words) for name in chosen}


def _frame_column(path: Path, series: Any, *, is_target: bool, words: bool) -> Array:
    import pandas

    if isinstance(series.dtype, pandas.CategoricalDtype):
        series = series.astype(series.cat.categories.dtype)
    missing = np.flatnonzero(series.isna().to_numpy())
    if missing.size:
        raise DataError(
            f"{path}, row {missing[0]}, column {series.name!r}: the value is missing ({missing.size} in this "
            "column); fill it in or drop the row"
        )
    types = pandas.api.types
    if types.is_numeric_dtype(series.dtype) and not types.is_complex_dtype(series.dtype):
        kept = is_target and not types.is_float_dtype(series.dtype)
        numbers = np.asarray(series.to_list()) if kept else series.to_numpy(np.float64)
        infinite = np.flatnonzero(~np.isfinite(numbers))
        if infinite.size:
            raise DataError(
                f"{path}, row {infinite[0]}, column {series.name!r}: {numbers[infinite[0]]} is not a finite "
                "number; correct it or drop the row"
            )
        return numbers.astype(str) if is_target and words else numbers
    values = series.to_list()
    if not all(isinstance(value, str) for value in values):
        raise DataError(
            f"{path}, column {series.name!r}: expected numbers or words, found dtype {series.dtype} with "
            f"values such as {values[0]!r}; convert or drop the column"
        )
    return np.array(values, dtype=str if is_target else object)


def _check_header(path: Path, names: list[str]) -> None:
    if not names:
        raise DataError(f"{path}: expected a header line with the column names, found an empty file")
    if "" in names:
        raise DataError(
            f"{path}: column {names.index('') + 1} of the header has no name; if it is a row index, write "
            "the file without it (pandas: to_csv(index=False))"
        )
    # pandas numbers the columns of an unnamed frame from 0.
    numbered = [str(index) for index in range(len(names))]
    if names != numbered and all(_number(name) is not None for name in names):
        raise DataError(
            f"{path}: the first line must hold the names of the columns, found the numbers {listed(names[:5])}"
        )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def listed(names: Iterable[object]) -> str:
    """Return names as text, at most thirty of them."""
    shown = [repr(name) for name in names]
    return ", ".join(shown) if len(shown) <= 30 else ", ".join(shown[:30]) + f" and {len(shown) - 30} more"
