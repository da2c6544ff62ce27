"""The columns of a text table as they grow, and the mistakes found in them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp.datasets.dates import EXAMPLES, orders_of, parse_date
from fusemlp.datasets.files import Array
from fusemlp.datasets.textfiles import MISSING, number
from fusemlp_kernels.errors import DataError

_WHOLE = re.compile(r"[+-]?[0-9]+")
# A column of this share of numbers holds numbers, and its other cells are mistakes; but a column of numbers and words
# that has this many different values or fewer holds words.
MOSTLY = 0.9
_FEW = 20
# The number of mistakes in a message.
_SHOWN = 30


class Problems:
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
            hidden = len(lines) - _SHOWN
            shown = [*lines[:_SHOWN], *([f"and {hidden} more"] if hidden > 0 else [])]
            total = len(lines) + sum(self.more.values())
            raise DataError(f"{self.path}: {total} mistakes:\n  " + "\n  ".join(shown))


class Column:
    """A feature column of a text table as it grows; its first rows with values decide its kind, unless it is given."""

    def __init__(self, name: str, decimal: str, problems: Problems, kind: str | None) -> None:
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
        if count >= MOSTLY * len(present) and not mixed:
            self.kind = "number"
            return
        orders = orders_of(present, MOSTLY)
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


class Target:
    """The target column of a csv file as it grows."""

    def __init__(self, name: str, decimal: str, problems: Problems, missing_words: Collection[str]) -> None:
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
            # A longer number is a name; Python refuses to read thousands of digits.
            if max(map(len, self.words)) <= 20 and max(abs(int(word)) for word in self.words) < 2**63:
                return np.array([int(word) for word in self.words], dtype=np.int64)
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
