"""Tables: csv, tsv and parquet files as columns.

Numbers become float64 arrays with NaN for missing cells, dates datetime64[us] with NaT, words object arrays of str with
the text of the cell. The standard library alone reads CSV, so a file means the same on every installation. Every error
is a DataError that names the file and the places in it.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp.datasets.dates import EXAMPLES, ORDERS, orders_of, parse_date
from fusemlp.datasets.files import Array, reason
from fusemlp.datasets.textfiles import MISSING, Form, is_compressed, number, open_rows
from fusemlp_kernels.errors import DataError

TABLES = (".csv", ".tsv", ".parquet")
_WHOLE = re.compile(r"[+-]?[0-9]+")
# The number of rows of a csv file in memory as text.
_CHUNK = 4096
# A column of this share of numbers holds numbers, and its other cells are mistakes; but a column of numbers and words
# that has this many different values or fewer holds words.
_MOSTLY = 0.9
_FEW = 20
_SHOWN = 10


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


class _Problems:
    """The mistakes of a file, for one message: the first few of each column and a count of the others."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, list[str]] = {}
        self.more: Counter[str] = Counter()

    def add(self, column: str, place: str, text: str) -> None:
        several = self.found.setdefault(column, [])
        if len(several) < 3:
            several.append(f"{place}: {text}")
        else:
            self.more[column] += 1

    def check(self) -> None:
        """Raise the DataError that names all."""
        lines = [line for several in self.found.values() for line in several]
        if len(lines) == 1:
            raise DataError(f"{self.path}, {lines[0]}")
        for column, count in self.more.items():
            self.found[column][-1] += f" (and {count} more{f' in column {column!r}' if column else ''})"
        lines = [line for several in self.found.values() for line in several]
        if lines:
            hidden = len(lines) - 3 * _SHOWN
            shown = [*lines[: 3 * _SHOWN], *([f"and {hidden} more"] if hidden > 0 else [])]
            total = len(lines) + sum(self.more.values())
            raise DataError(f"{self.path}: {total} mistakes:\n  " + "\n  ".join(shown))


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
    problems = _Problems(path)
    with open_rows(path, form) as file:
        names, reader = file.names, file.reader
        notes += filter(None, [file.said(path)])
        columns: dict[int, _Column | _Target] = {}
        for name in choose_columns(path, names, features, target, drop):
            columns[names.index(name)] = (
                _Target(name, file.decimal, problems, MISSING.difference(known_labels))
                if name == target
                else _Column(name, file.decimal, problems, kinds.get(name))
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
        if isinstance(column, _Target):
            missing = np.array(column.missing, bool)
            table[column.name] = column.finish(words)
        else:
            table[column.name] = column.finish(notes)
            kinds[column.name] = column.kind or "number"
    problems.check()
    return table, missing


class _Column:
    """A feature column of a text table as it grows; its first rows with values decide its kind, unless it is given."""

    def __init__(self, name: str, decimal: str, problems: _Problems, kind: str | None) -> None:
        self.name, self.decimal, self.problems, self.kind = name, decimal, problems, kind
        self.told = kind is not None
        self.waiting: list[tuple[Sequence[str], Sequence[int]]] = []
        self.pieces: list[Array] = []
        # The index of each different word.
        self.codes: dict[str, int] = {}
        self.notes: list[str] = []

    def add(self, values: Sequence[str], lines: Sequence[int]) -> None:
        if self.kind is None:
            self.waiting.append((values, lines))
            self._decide([value.strip() for value in values])
            if self.kind is not None:
                waiting, self.waiting = self.waiting, []
                for piece in waiting:
                    self.add(*piece)
        elif self.kind == "number":
            self.pieces.append(self._numbers(values, lines))
        elif self.kind == "word":
            texts = [value.strip() for value in values]
            for text in dict.fromkeys(texts):
                self.codes.setdefault(text, len(self.codes))
            self.pieces.append(np.fromiter(map(self.codes.__getitem__, texts), np.int64, len(texts)))
        else:
            self.pieces.append(self._dates(values, lines))

    def _decide(self, values: Sequence[str]) -> None:
        present = [value for value in values if value not in MISSING]
        if not present:
            return
        count = sum(number(value, self.decimal) is not None for value in present)
        mixed = count < len(present) and len(set(present)) <= _FEW
        if count >= _MOSTLY * len(present) and not mixed:
            self.kind = "number"
            return
        orders = orders_of(present, _MOSTLY)
        if {"dmy", "mdy"} <= set(orders):
            orders = ["mdy"]
            self.notes.append(f"column {self.name!r} holds dates such as {present[0]!r}, read with the month first")
        self.kind = orders[0] if orders else "word"

    def _numbers(self, values: Sequence[str], lines: Sequence[int]) -> Array:
        if self.decimal == ".":
            try:
                numbers = np.fromiter(map(float, values), np.float64, len(values))
            except ValueError:
                pass
            else:
                if not np.isinf(numbers).any():
                    return numbers
        numbers = np.full(len(values), np.nan)
        for index, value in enumerate(values):
            text = value.strip()
            if text in MISSING:
                continue
            found = number(text, self.decimal)
            if found is None and self.told and text.lower() in ("true", "false"):
                found = float(text.lower() == "true")
            if found is None or not math.isfinite(found):
                self._wrong(lines[index], _not_numeric(text, found, self.told))
            else:
                numbers[index] = found
        return numbers

    def _dates(self, values: Sequence[str], lines: Sequence[int]) -> Array:
        assert self.kind is not None
        known: dict[str, Any] = {text: np.datetime64("NaT", "us") for text in (*MISSING, "NaT")}
        for value, line in zip(values, lines, strict=True):
            text = value.strip()
            if text not in known:
                known[text] = parse_date(text, self.kind)
            if known[text] is None:
                self._wrong(line, f"{text!r} is not a date such as {EXAMPLES[self.kind]}; correct or delete it")
        return np.array([known[value.strip()] for value in values], "datetime64[us]")

    def _wrong(self, line: int, text: str) -> None:
        self.problems.add(self.name, f"line {line}, column {self.name!r}", text)

    def finish(self, notes: list[str]) -> Array:
        notes += self.notes
        if self.kind is None:
            # No cell of the column has a value.
            return np.full(sum(len(values) for values, _ in self.waiting), np.nan)
        whole: Array = np.concatenate(self.pieces) if self.pieces else np.empty(0, np.int64)
        if self.kind != "word":
            return whole
        texts = list(self.codes)
        if not self.told:
            values = [text for text in texts if text not in MISSING]
            if {value.lower() for value in values} == {"true", "false"}:
                self.kind = "number"
                table = [np.nan if text in MISSING else float(text.lower() == "true") for text in texts]
                truth: Array = np.array(table)[whole]
                return truth
            numbers = {text for text in values if number(text, self.decimal) is not None}
            if numbers and len(numbers) < len(values):
                word = next(value for value in values if value not in numbers)
                one = next(value for value in values if value in numbers)
                notes.append(
                    f"column {self.name!r} holds words, such as {word!r}, and numbers, such as {one!r}: all are taken "
                    "as words"
                )
        column: Array = np.array(texts, dtype=object)[whole]
        return column


class _Target:
    """The target column of a csv file as it grows."""

    def __init__(self, name: str, decimal: str, problems: _Problems, missing_words: Collection[str]) -> None:
        self.name, self.decimal, self.problems, self.missing_words = name, decimal, problems, missing_words
        self.words: list[str] = []
        self.lines: list[int] = []
        self.missing: list[bool] = []

    def add(self, values: Sequence[str], lines: Sequence[int]) -> None:
        texts = [value.strip() for value in values]
        missing = [text in self.missing_words for text in texts]
        self.missing += missing
        self.words += [text for text, gone in zip(texts, missing, strict=True) if not gone]
        self.lines += [line for line, gone in zip(lines, missing, strict=True) if not gone]

    def finish(self, words: bool) -> Array:
        if words or not self.words:
            return np.array(self.words, dtype=str)
        if all(map(_WHOLE.fullmatch, self.words)):
            whole = [int(word) for word in self.words]
            if max(map(abs, whole)) < 2**63:
                return np.array(whole, dtype=np.int64)
            return np.array(self.words, dtype=str)
        values = {word: number(word, self.decimal) for word in dict.fromkeys(self.words)}
        numbers = [values[word] for word in self.words]
        valid = [found for found in numbers if found is not None and math.isfinite(found)]
        if len(valid) == len(numbers):
            return np.array(valid, dtype=np.float64)
        # Numbers with decimals are measurements, so a word among them is a mistake; whole numbers can be the
        # names of classes.
        if any(found != math.floor(found) for found in valid):
            for found, word, line in zip(numbers, self.words, self.lines, strict=True):
                if found is None or not math.isfinite(found):
                    self.problems.add(self.name, f"line {line}, column {self.name!r}", _not_numeric(word, found, None))
        return np.array(self.words, dtype=str)


def _not_numeric(text: str, found: float | None, told: bool | None) -> str:
    """Return the mistake; ``told`` is whether the kind of the column was given, None for the target."""
    if found is None and told:
        return f"{text!r} is not a number, but the column held numbers in the training data; correct or delete it"
    if found is None:
        words = ", or take the column as words with --categorical" if told is False else ""
        return f"{text!r} is not a number, but other values of the column are; correct or delete it{words}"
    return f"{text!r} is not a finite number; correct it or delete the row"


def _append(columns: dict[int, _Column | _Target], rows: list[list[str]], lines: list[int]) -> None:
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
    problems = _Problems(path)
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


def _frame_target(series: Any, words: bool, problems: _Problems) -> Array:
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


def _frame_feature(series: Any, kind: str | None, problems: _Problems, notes: list[str]) -> Array:
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
        kind = "word" if not orders_of((text for text in texts if text), _MOSTLY) else None
    column = _Column(str(series.name), ".", problems, kind)
    column.add(texts, range(len(texts)))
    return column.finish(notes)


def _check_words(series: Any, problems: _Problems) -> None:
    wrong = next((value for value in series if not isinstance(value, str)), None)
    if wrong is not None:
        problems.add(
            str(series.name),
            f"column {series.name!r}",
            f"expected numbers or words, found dtype {series.dtype} with values such as {wrong!r}; convert or drop the "
            "column",
        )


def _check_finite(series: Any, numbers: Array, problems: _Problems) -> None:
    for row in np.flatnonzero(~np.isfinite(numbers)):
        text = f"{numbers[row]} is not a finite number; correct it or drop the row"
        problems.add(str(series.name), f"row {row}, column {series.name!r}", text)


def listed(names: Iterable[object]) -> str:
    """Return names as text, at most thirty of them."""
    shown = [repr(name) for name in names]
    return ", ".join(shown) if len(shown) <= 30 else ", ".join(shown[:30]) + f" and {len(shown) - 30} more"
