"""The columns of a table as they grow."""

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from fusemlp.datasets.cells import EXAMPLES, ORDERS, orders_of, parse_date
from fusemlp.datasets.textfiles import MISSING, number, text_array, truth_values
from fusemlp.describe.checks import Problems, some
from fusemlp.inputs.arrays import Array

# A column of this share of numbers, by cells or by different values, holds numbers, and its other cells are mistakes;
# but a column of numbers and words that has this many different values or fewer holds words.
MOSTLY = 0.9
_FEW = 20
# Numbers that stand for missing cells in many tables, where they are far from the others.
_STAND_INS = frozenset({-1.0, *(sign * (10.0**digits - 1) for sign in (-1, 1) for digits in range(1, 7))})
# The number of rows with values that tell the kind of a column.
_TELLING = 4096
_DIGIT = re.compile(r"\d")
# A number that is text for a reason.
_MARKED = re.compile(r"[^\d.+\-eE\s]")
# A time with a zone, and whole numbers of which some have more digits than float64 holds.
_ZONED = re.compile(r":\d\d.*(?:Z|[-+]\d\d:?\d\d)$")
LONG = r"^[+-]?[0-9]{16,300}$"
# The numbers that Arrow reads, with another decimal mark too.
_PLAIN = {mark: rf"^[+-]?[0-9]{{1,200}}(?:[{mark}][0-9]{{0,200}})?$" for mark in ".,"}

# Arrow's scalars from Python's values, and its to_numpy, would import pandas, as text_array says.
_EMPTY, _NULL = text_array([""])[0], pa.nulls(1, pa.string())[0]
_NAN = pc.cast(text_array(["nan"]), pa.float64())[0]
_NAT = pc.cast(text_array([str(np.iinfo(np.int64).min)]), pa.int64())[0]
_MICROSECONDS = pc.cast(text_array(["1e6"]), pa.float64())[0]
_INFINITE = ("inf", "infinity")
_NO_DATE = MISSING | {"NaT"}


def is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return any(test(kind) for test in (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal))


def _is_date(kind: pa.DataType) -> bool:
    return bool(pa.types.is_timestamp(kind) or pa.types.is_date(kind))


def _is_time(kind: pa.DataType) -> bool:
    return bool(pa.types.is_duration(kind) or pa.types.is_time(kind))


def _plain(values: Any) -> Any:
    """Return a piece of a column without a dictionary, and durations and times of day in seconds."""
    values = values.dictionary_decode() if pa.types.is_dictionary(values.type) else values
    if not _is_time(values.type):
        return values
    unit = pa.duration("us") if pa.types.is_duration(values.type) else pa.time64("us")
    counts = pc.cast(pc.cast(values, unit, safe=False), pa.int64())
    return pc.divide(pc.cast(counts, pa.float64()), _MICROSECONDS)


def _among(values: Any, words: Collection[str]) -> Any:
    return pc.is_in(values, value_set=text_array(sorted(words)))


def _to_numpy(values: Any) -> Array:
    """Return numbers, truth values or moments as an array of its own; null is NaN or NaT."""
    kind = values.type
    values = pa.concat_arrays(values.chunks) if isinstance(values, pa.ChunkedArray) else values
    if not len(values):
        return np.empty(0, "datetime64[us]" if pa.types.is_timestamp(kind) else kind.to_pandas_dtype())
    if pa.types.is_boolean(kind):
        return np.from_dlpack(pc.cast(values, pa.uint8())).astype(bool)
    if pa.types.is_timestamp(kind):
        return np.from_dlpack(pc.fill_null(pc.cast(values, pa.int64()), _NAT)).view("datetime64[us]").copy()
    return np.array(np.from_dlpack(pc.fill_null(values, _NAN) if values.null_count else values))


def different(texts: Any) -> tuple[list[str], Array]:
    """Return the different texts in the order of their first rows, and the index of each row's text."""
    coded = texts.dictionary_encode()
    return coded.dictionary.to_pylist(), _to_numpy(coded.indices)


def numbers_of(texts: Any, decimal: str, missing: Collection[str] = MISSING) -> tuple[Array, Array]:
    """Return the numbers of texts, NaN where missing or wrong, and the rows of those that are wrong."""
    if decimal == ".":
        try:
            present = pc.if_else(_among(texts, missing), _NULL, texts)
            numbers = _to_numpy(pc.cast(present, pa.float64()))
        except pa.ArrowInvalid:
            pass
        else:
            if not np.isinf(numbers).any():
                return numbers, np.empty(0, np.int64)
    texts = pc.utf8_trim_whitespace(texts)
    plain = pc.match_substring_regex(texts, _PLAIN[decimal])
    present = pc.if_else(plain, texts, _NULL)
    present = pc.replace_substring(present, ",", ".") if decimal == "," else present
    numbers = _to_numpy(pc.cast(present, pa.float64()))
    odd = pc.invert(pc.or_(plain, _among(texts, missing)))
    rows = np.flatnonzero(_to_numpy(odd))
    words, codes = different(texts.filter(odd))
    values = [number(word, decimal) for word in words]
    # An infinity stands for text that is no number: both are mistakes.
    numbers[rows] = np.array([math.inf if value is None else value for value in values])[codes] if words else ()
    wrong = rows[np.isinf(numbers[rows])]
    numbers[wrong] = np.nan
    return numbers, wrong


def _holds_numbers(rows: Mapping[str, int], decimal: str) -> bool:
    """Return whether nearly all cells, or different ones, are numbers, with any words among too many to be names.

    ``rows`` are those of each different cell. Frequent cells such as N12 and 90+ make a column of codes.
    """
    numbers = {text: count for text, count in rows.items() if number(text, decimal) is not None}
    words = rows.keys() - numbers.keys()
    mostly = sum(numbers.values()) >= MOSTLY * sum(rows.values())
    if not mostly and len(numbers) >= MOSTLY * len(rows):
        mostly = not any(map(_DIGIT.search, words))
    return mostly and (not words or len(rows) > _FEW)


def stand_in(name: str, values: Array) -> list[str]:
    """Return a note on a number that may stand for missing cells, as -999 does; none without one."""
    if not len(values) or values.dtype.kind not in "iuf":
        return []
    for value in {float(np.fmin.reduce(values)), float(np.fmax.reduce(values))} & _STAND_INS:
        others = values[~np.isnan(values) & (values != value)]
        rows = np.count_nonzero(values == value)
        if rows < 2 or len(np.unique(others)) <= 10:
            continue
        low, high = float(others.min()), float(others.max())
        far = max(low - value, value - high) >= high - low or (value < -1 and low >= 0)
        # -1 is near to counts, and then more frequent than the least of them
        if far or (value == -1 and low >= 0 and rows > 3 * np.count_nonzero(others == low)):
            text = f"column {name!r} holds {value:g} in {rows} rows, apart from its other numbers ({low:g} to {high:g})"
            return [f"{text}; if it stands for missing cells: --missing {value:g}"]
    return []


def twins(name: str, words: Sequence[str]) -> list[str]:
    """Return a note on words that differ in case alone, of a column with few different ones; none without any."""
    forms: dict[str, list[str]] = {}
    for word in words if len(words) <= _TELLING else ():
        forms.setdefault(word.casefold(), []).append(word)
    pairs = [" and ".join(map(repr, same)) for same in forms.values() if len(same) > 1]
    text = f"column {name!r} holds words that differ in case alone: {some(pairs, 3)}"
    return [f"{text}; write them alike if they mean the same"] if pairs else []


class Column:
    """A feature column of a table as it grows; its first rows with values decide its kind, unless it is given.

    The column of a file or frame ``with_types`` holds what its type says: words are read as numbers only if all are
    and some have marks that a number's type cannot have, as in "$1,498" or "12%".
    """

    def __init__(self, name: str, decimal: str, problems: Problems, kind: str | None, with_types: bool = False) -> None:
        self.name, self.decimal, self.problems, self.kind = name, decimal, problems, kind
        self.fixed = kind is not None
        self.as_words = None if self.fixed else "--categorical"
        self.with_types = with_types
        self.rows = 0
        self.waiting: list[Any] = []
        self.pieces: list[Array] = []
        # The index of each different word.
        self.codes: dict[str, int] = {}
        self.notes: list[str] = []
        # True if a time has a zone, of durations; a number that float64 does not hold; the number of infinite ones.
        self.zoned = self.timed = False
        self.rounded: str | None = None
        self.infinite = 0

    def add(self, values: Any) -> None:
        """Append a piece of the column, an Arrow array."""
        self.timed = self.timed or _is_time(values.type)
        values = _plain(values)
        kind = values.type
        if pa.types.is_null(kind) or is_text(kind):
            self._add_text(pc.fill_null(pc.cast(values, pa.string()), _EMPTY))
        elif _is_date(kind) and self.kind in (None, *ORDERS):
            self.kind = self.kind or "ymd"
            self.zoned = self.zoned or getattr(kind, "tz", None) is not None
            self._append(_to_numpy(pc.cast(values, pa.timestamp("us", getattr(kind, "tz", None)), safe=False)))
        elif _is_number(kind) and self.kind in (None, "number"):
            self.kind = "number"
            numbers = _to_numpy(pc.cast(values, pa.float64(), safe=False))
            if not pa.types.is_floating(kind):
                self._watch_digits(pc.cast(values, pa.string()), numbers)
            infinite = np.isinf(numbers)
            self.infinite += int(infinite.sum())
            self._append(np.where(infinite, np.nan, numbers))
        elif _is_number(kind) or (_is_date(kind) and self.kind == "word"):
            self._add_text(as_text(values))
        else:
            refuse_type(self.name, values, self.problems)
            self.rows += len(values)

    def _append(self, piece: Array) -> None:
        self.pieces.append(piece)
        self.rows += len(piece)

    def _watch_digits(self, texts: Any, numbers: Array) -> None:
        """Keep the first of the whole numbers that lost digits when their ``texts`` became ``numbers``."""
        if self.rounded is None and (np.abs(numbers) >= 2**53).any():
            texts = pc.utf8_trim_whitespace(texts)
            long = pc.unique(texts.filter(pc.match_substring_regex(texts, LONG))).to_pylist()
            self.rounded = next((text for text in long if int(text) != float(text)), None)

    def _add_text(self, texts: Any) -> None:
        if self.kind is None:
            self.waiting.append(texts)
            self._decide(texts)
            if self.kind is not None:
                waiting, self.waiting = self.waiting, []
                for piece in waiting:
                    self._add_text(piece)
        elif self.kind == "number":
            self._append(self._numbers(texts))
        elif self.kind == "word":
            words, codes = different(texts)
            indices = [self.codes.setdefault(word.strip(), len(self.codes)) for word in words]
            self._append(np.array(indices, np.int32)[codes])
        else:
            self._append(self._dates(texts))

    def _decide(self, texts: Any) -> None:
        texts = pc.utf8_trim_whitespace(texts)
        present = texts.filter(pc.invert(_among(texts, MISSING))).slice(0, _TELLING).to_pylist()
        if not present:
            return
        rows = Counter(present)
        plain = self.with_types and not (
            any(map(_MARKED.search, rows)) and all(number(text, self.decimal) is not None for text in rows)
        )
        number_like = not plain and any(_holds_numbers(rows, mark) for mark in ".,")
        self.kind = "number" if number_like else self._order([*rows])

    def _order(self, texts: Sequence[str]) -> str:
        """Return the order of different texts that are dates, "word" if they are not; note what is unsure."""
        orders = orders_of(texts, 0.5)
        if not orders:
            return "word"
        order = "mdy" if orders[:2] == ["dmy", "mdy"] else orders[0]
        strange = [text for text in texts if parse_date(text, order) is None]
        date = next(
            text for text in texts if parse_date(text, order) and (order == "ymd" or not parse_date(text, "ymd"))
        )
        note = f"column {self.name!r} holds dates such as {date!r}"
        # 1.10.12 may be a version
        short = re.match(r"\d{1,2}\D\d+\D\d\d(?!\d)", date)
        if len(strange) > (0.0 if short else (1.0 - MOSTLY) * len(texts)):
            mend = "write all as 2024-12-31, or take them as missing cells with --missing"
            self.notes.append(f"{note} and others such as {strange[0]!r}: all are taken as words; {mend}")
            return "word"
        if short and all(moment.day <= 12 for text in texts if (moment := parse_date(text, order))):
            return "word"
        if order != orders[0]:
            self.notes.append(f"{note}, read with the month first")
        return order

    def _numbers(self, texts: Any) -> Array:
        numbers, wrong = numbers_of(texts, self.decimal)
        self._watch_digits(texts, numbers)
        for row in wrong.tolist():
            text = texts[row].as_py().strip()
            if self.fixed and text.lower() in ("true", "false"):
                numbers[row] = text.lower() == "true"
            elif text.lower().lstrip("+-") in _INFINITE:
                self.infinite += 1
            else:
                self._wrong(row, _not_numeric(text, self.decimal, self.as_words))
        return numbers

    def _dates(self, texts: Any) -> Array:
        order = self.kind or ""
        if order == "ymd":
            try:
                present = pc.if_else(_among(texts, _NO_DATE), _NULL, texts)
                return _to_numpy(pc.cast(present, pa.timestamp("us")))
            except pa.ArrowInvalid:
                pass
        cells, codes = different(texts)
        words = [word.strip() for word in cells]
        moments = [parse_date(word, order) for word in words]
        self.zoned = self.zoned or any(map(_ZONED.search, words))
        wrong = np.array([m is None and word not in _NO_DATE for m, word in zip(moments, words, strict=True)], bool)
        for row in np.flatnonzero(wrong[codes]).tolist():
            word = words[codes[row]]
            self._wrong(row, f"{word!r} is not a date such as {EXAMPLES[order]}; {_mends(word, self.as_words)}")
        return np.array([m or "NaT" for m in moments], "datetime64[us]")[codes]

    def _wrong(self, row: int, text: str) -> None:
        self.problems.add(self.name, self.rows + row, text)

    def finish(self, notes: list[str]) -> Array:
        notes += self.notes
        if self.zoned:
            notes.append(f"column {self.name!r} holds times with a zone: they are taken in UTC, as those without one")
        if self.timed:
            notes.append(f"column {self.name!r} holds durations or times of day, taken in seconds")
        if self.rounded is not None:
            instead = "" if self.fixed else "; --categorical takes them as words, --id as names of the rows"
            notes.append(f"column {self.name!r} loses the last digits of numbers such as {self.rounded}{instead}")
        if self.infinite:
            notes.append(f"column {self.name!r} holds infinite numbers, taken as missing cells: {self.infinite}")
        if self.kind is None or not self.pieces:
            # No cell of the column has a value.
            return np.full(sum(map(len, self.waiting)), np.nan)
        whole: Array = np.concatenate(self.pieces)
        self.pieces.clear()
        if self.kind == "number" and not self.fixed:
            notes += stand_in(self.name, whole)
        if self.kind != "word":
            return whole
        texts: Array = np.array([*self.codes], dtype=object)
        if not (self.fixed or self.with_types):
            values = [text for text in texts if text not in MISSING]
            if {value.lower() for value in values} == {"true", "false"}:
                self.kind = "number"
                texts = np.array([np.nan if text in MISSING else float(text.lower() == "true") for text in texts])
            numbers = {text for text in values if number(text, self.decimal) is not None}
            if 0 < len(numbers) < len(values):
                word = next(value for value in values if value not in numbers)
                cell = next(value for value in values if value in numbers)
                notes.append(_both(self.name, word, cell))
        if self.kind == "word" and not self.fixed:
            notes += twins(self.name, [*self.codes])
        return np.asarray(texts[whole])


class Target:
    """The target column of a table as it grows."""

    def __init__(self, name: str, decimal: str, problems: Problems, missing_words: Collection[str]) -> None:
        self.name, self.decimal, self.problems, self.missing_words = name, decimal, problems, missing_words
        self.pieces: list[Any] = []
        self.missing: Array = np.zeros(0, bool)

    def add(self, values: Any) -> None:
        """Append a piece of the column, an Arrow array."""
        self.pieces.append(_plain(values))

    def finish(self, notes: list[str], words: bool, with_types: bool, task: str | None) -> Array:
        """Return the labels of the rows that have one; ``missing`` says which have none.

        Words among numbers are mistakes where the ``task``, or their small share, says so.
        """
        if not self.pieces:
            return np.empty(0, str)
        whole = pa.chunked_array(self.pieces)
        self.pieces.clear()
        if is_text(whole.type) and not with_types:
            whole = pc.utf8_trim_whitespace(whole)
            missing = _among(whole, self.missing_words)
        else:
            missing = pc.is_null(whole, nan_is_null=True)
        self.missing = _to_numpy(missing)
        present = whole.filter(pc.invert(missing)).combine_chunks()
        if _is_number(whole.type):
            dtype = pa.float64() if pa.types.is_decimal(whole.type) else whole.type
            values = _to_numpy(pc.cast(present, dtype))
            if values.dtype.kind == "f":
                values = values.astype(np.float64)
                rows = np.flatnonzero(~self.missing)
                for at in np.flatnonzero(np.isinf(values)).tolist():
                    text = f"{values[at]} is not a finite number; correct it or drop the row"
                    self.problems.add(self.name, int(rows[at]), text)
            values = values.astype(np.int64) if values.dtype.kind == "i" else values
            return np.asarray(values, str if words else values.dtype)
        if not (is_text(whole.type) or pa.types.is_null(whole.type)):
            refuse_type(self.name, present, self.problems)
            return np.empty(0, str)
        if not (words or with_types):
            numbers = self._numbers(present, notes, task)
            if numbers is not None:
                return numbers
        different_labels, codes = different(present)
        notes += [] if words else twins(self.name, different_labels)
        return np.array(different_labels, dtype=str)[codes] if different_labels else np.empty(0, str)

    def with_gaps(self, present: Array) -> Array:
        """Return the numbers of all rows, of which those that have one are ``present``, with NaN for the others.

        Words for yes and no are 1 and 0.
        """
        if present.dtype.kind not in "biuf":
            present = truth_values(f"{self.problems.source}, column {self.name!r}", present)
        whole = np.full(len(self.missing), np.nan)
        if len(present):
            whole[~self.missing] = present
        return whole

    def _numbers(self, present: Any, notes: list[str], task: str | None) -> Array | None:
        """Return the labels as numbers; None, with a word among measurements as a mistake, if they are words."""
        if not len(present):
            return None
        if pc.all(pc.match_substring_regex(present, r"^[+-]?[0-9]+$")).as_py():
            try:
                whole = _to_numpy(pc.cast(pc.utf8_ltrim(present, "+"), pa.int64()))
            except pa.ArrowInvalid:
                # A longer number is a name.
                return None
            return None if (whole == np.iinfo(np.int64).min).any() else whole
        numbers, wrong = numbers_of(present, self.decimal, ())
        wrong = np.union1d(wrong, np.flatnonzero(np.isnan(numbers)))
        if not len(wrong):
            return numbers
        # Numbers with decimals are measurements, so a word among them is a mistake; a few whole numbers can be the
        # names of classes.
        words, codes = different(present)
        counts = dict(zip(words, np.bincount(codes).tolist(), strict=True))
        valid = numbers[~np.isnan(numbers)]
        measured = (len(valid) and task == "regression") or (valid != np.floor(valid)).any()
        measured = measured or any(_holds_numbers(counts, mark) for mark in ".,")
        if task != "classification" and measured:
            rows, as_words = np.flatnonzero(~self.missing), "" if task else "--task classification"
            for row in wrong.tolist():
                text = _not_numeric(words[codes[row]], self.decimal, as_words)
                self.problems.add(self.name, int(rows[row]), text)
        elif len(valid):
            first = (words[codes[row]] for row in (wrong[0], np.flatnonzero(~np.isnan(numbers))[0]))
            notes.append(_both(self.name, *first))
        return None


def as_text(values: Any) -> Any:
    """Return values of another type as text, as Python writes them; null becomes empty."""
    if pa.types.is_timestamp(values.type):
        values = pc.cast(values, pa.timestamp("us", values.type.tz), safe=False)
    coded = pc.dictionary_encode(values)
    # Whole numbers are floats where other rows of their column are missing.
    whole = (int(v) if isinstance(v, float) and v.is_integer() else v for v in coded.dictionary.to_pylist())
    return pc.fill_null(text_array([str(value) for value in whole]).take(coded.indices), _EMPTY)


def refuse_type(column: str, values: Any, problems: Problems) -> None:
    if column not in problems.found:
        text = f"expected numbers or words, found Arrow's type {values.type}; convert or drop the column"
        problems.add(column, None, text)


def _both(name: str, word: str, cell: str) -> str:
    """Return a note on a column that holds words and numbers."""
    mend = f"--missing {word!r} would take the former as missing cells"
    return (
        f"column {name!r} holds words, such as {word!r}, and numbers, such as {cell!r}: all are taken as words; {mend}"
    )


def _not_numeric(text: str, decimal: str, as_words: str | None) -> str:
    """Return the mistake; ``as_words`` is the option that takes the column as words, None in new rows of a run."""
    if number(text, decimal) is not None:
        return f"{text!r} is not a finite number; correct it or delete the row"
    other = {".": ",", ",": "."}[decimal]
    marked = number(text, other) is not None
    mend = [f"give --decimal {other} if all columns are written so, else write this one with {decimal!r}"]
    others = "the column held numbers in the training data" if as_words is None else "other values of the column are"
    what = f"not a number with the decimal mark {decimal!r}" if marked else f"not a number, but {others}"
    return f"{text!r} is {what}; {_mends(text, as_words, *(mend if marked else []))}"


def _mends(text: str, as_words: str | None, *more: str) -> str:
    mends = ["correct or delete it", *more, f"take it as a missing cell with --missing {text.strip()!r}"]
    mends += [f"take the column as words with {as_words}"] if as_words else []
    return f"{', '.join(mends[:-1])}, or {mends[-1]}"
