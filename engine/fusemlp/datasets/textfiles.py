"""Text files of tables: their compression, encoding, separator and decimal mark, and their rows.

The beginning of a file tells its form; a ``Form`` sets what the caller knows better. Every error is a DataError.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import itertools
import lzma
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusemlp.datasets.files import reason
from fusemlp_kernels.errors import ArgumentError, DataError

# From the least likely to stand in text.
SEPARATORS = {"\t": "tab", "|": "'|'", ";": "';'", ",": "','"}
MISSING = frozenset({"", "NA", "N/A", "NaN", "nan", "null", "NULL", "None", "?"})
COMPRESSED = (".gz", ".bz2", ".xz", ".zip")
# The number of lines that separator and decimal mark are recognised from.
_SAMPLE = 1000
_BYTES = 2**20
_CURRENCY = r"(?:[$\u00a2-\u00a5\u20a0-\u20c0]|EUR|USD|GBP|CHF|JPY)?"
_SPACES = r" '\u2019\u00a0\u202f"


def _pattern(decimal: str) -> re.Pattern[str]:
    thousands = f"[{_SPACES}{'.' if decimal == ',' else ','}]"
    digits = rf"(?:\d{{1,3}}(?P<mark>{thousands})\d{{3}}(?:(?P=mark)\d{{3}})*|\d+)"
    point = re.escape(decimal)
    return re.compile(
        rf"(?P<sign>[-+\u2212]?)\s*{_CURRENCY}\s*(?P<minus>[-\u2212]?)(?P<whole>{digits})?(?:{point}(?P<part>\d*))?"
        rf"(?P<power>[eE][+-]?\d+)?\s*(?P<percent>%?){_CURRENCY}"
    )


_PATTERNS = {decimal: _pattern(decimal) for decimal in ".,"}


@dataclass(frozen=True)
class Form:
    """The form of a text file; None is recognised from its beginning.

    ``sep`` is one character (or "tab"), ``decimal`` "." or ",", ``encoding`` a name that Python knows. Without
    ``header`` the columns are called column_1, column_2 and so on.
    """

    sep: str | None = None
    decimal: str | None = None
    encoding: str | None = None
    header: bool = True

    def __post_init__(self) -> None:
        if self.sep in ("tab", "\\t"):
            object.__setattr__(self, "sep", "\t")
        if self.sep is not None and (len(self.sep) != 1 or self.sep in '"\r\n'):
            raise ArgumentError(f"sep: expected one character such as ; or |, or tab, got {self.sep!r}")
        if self.decimal not in (None, ".", ","):
            raise ArgumentError(f"decimal: expected . or , got {self.decimal!r}")
        if self.decimal is not None and self.decimal == self.sep == ".":
            raise ArgumentError("decimal: separator and decimal mark are both '.'; give another --sep")
        if self.encoding is not None:
            try:
                codecs.lookup(self.encoding)
            except LookupError:
                raise ArgumentError(
                    f"encoding: {self.encoding!r} is unknown; use a name such as utf-8, cp1252 or latin-1"
                ) from None


@dataclass(frozen=True)
class Rows:
    """An open text file: its form, the names of its columns, and the reader of its rows.

    ``start`` is the number of the line before the reader's first.
    """

    names: list[str]
    sep: str
    decimal: str
    encoding: str
    reader: Any

    def said(self, path: Path) -> str | None:
        """Return a line on the form of the file; None for a plain one in UTF-8 with commas and decimal points."""
        found = [] if self.sep == "," else [f"separated by {SEPARATORS.get(self.sep, repr(self.sep))}"]
        found += [] if self.decimal == "." else [f"decimal mark {self.decimal!r}"]
        found += [] if self.encoding == "utf-8-sig" else [f"encoding {self.encoding}"]
        found += [path.suffix.lower()[1:]] if path.suffix.lower() in COMPRESSED else []
        return f"{path.name}: {', '.join(found)}" if found else None


@contextmanager
def open_rows(path: Path, form: Form) -> Iterator[Rows]:
    """Yield the rows of a text file; errors of reading become DataError."""
    encoding = form.encoding or "utf-8-sig"
    try:
        if form.encoding is None:
            encoding = _encoding(path)
        with _open(path) as raw, io.TextIOWrapper(raw, encoding, newline="") as stream:
            sample = list(itertools.islice(stream, _SAMPLE))
            sep = form.sep or _separator(sample)
            decimal = form.decimal or _decimal(sample, sep)
            lines = itertools.chain(sample, stream)
            reader = csv.reader(lines, delimiter=sep, skipinitialspace=True, strict=True)
            if form.header:
                names = [name.strip() or f"column_{index}" for index, name in enumerate(next(reader, []), 1)]
                _check_header(path, names, decimal)
            else:
                width = len(next(csv.reader(sample, delimiter=sep, skipinitialspace=True, strict=True), []))
                names = [f"column_{index}" for index in range(1, width + 1)]
                if not names:
                    raise DataError(f"{path}: expected rows of a table, found an empty file")
            yield Rows(names, sep, decimal, encoding, reader)
    except (OSError, EOFError, UnicodeError, csv.Error, zlib.error, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path}: expected a csv file{f' in {encoding}' if isinstance(error, UnicodeError) else ''} with a header "
            f"({reason(error)})"
        ) from error


def number(text: str, decimal: str = ".") -> float | None:
    """Return the number that a cell holds, None for other text.

    Thousands may be marked, a currency sign may stand on either side; 12% is 0.12.
    """
    if decimal == ".":
        try:
            return float(text)
        except ValueError:
            pass
    found = _PATTERNS[decimal].fullmatch(text.strip())
    if found is None or not (found["whole"] or found["part"]) or (found["sign"] and found["minus"]):
        return None
    digits = re.sub(r"\D", "", found["whole"] or "0")
    value = float(f"{digits}.{found['part'] or '0'}{found['power'] or ''}")
    value = value / 100 if found["percent"] else value
    return -value if {found["sign"], found["minus"]} & {"-", "\u2212"} else value


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    suffix = path.suffix.lower()
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    if suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.namelist() if not member.endswith("/")]
            if len(members) != 1:
                raise DataError(f"{path}: expected one file in the archive, found {len(members)}; unpack it first")
            with archive.open(members[0]) as stream:
                yield stream
        return
    with openers.get(suffix, open)(path, "rb") as stream:
        yield stream


def _encoding(path: Path) -> str:
    """Return UTF-16 by its mark, UTF-8 if all bytes are that, else Western Europe's Windows code page, or latin-1."""
    with _open(path) as stream:
        chunk = stream.read(_BYTES)
        if chunk.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return "utf-16"
        decoders = {name: codecs.getincrementaldecoder(name)() for name in ("utf-8-sig", "cp1252")}
        while decoders:
            for name in list(decoders):
                try:
                    decoders[name].decode(chunk, final=not chunk)
                except UnicodeDecodeError:
                    del decoders[name]
            if not chunk:
                break
            chunk = stream.read(_BYTES)
    return next(iter(decoders), "latin-1")


def _cells(sample: list[str], sep: str) -> list[list[str]]:
    """Return the rows of the sample's whole lines."""
    rows = []
    try:
        for row in csv.reader(sample, delimiter=sep, skipinitialspace=True):
            rows.append(row)
    except csv.Error:
        pass
    return [row for row in rows if row]


def _separator(sample: list[str]) -> str:
    """Return the separator that gives most rows the width of the first, and then the widest rows; a comma if none."""

    def score(sep: str) -> tuple[float, int]:
        rows = _cells(sample, sep)
        width = len(rows[0]) if rows else 0
        return (sum(len(row) == width for row in rows) / len(rows) if width > 1 else 0.0, width)

    best = max(SEPARATORS, key=score)
    return best if score(best)[0] else ","


def _decimal(sample: list[str], sep: str) -> str:
    """Return the decimal mark of the sample's numbers.

    Three digits after a mark may be thousands: such a number counts only where nothing else decides, and for a comma
    only in a file separated by semicolons, as spreadsheets write it where the comma is the decimal mark.
    """
    counts = {"sure,": 0, "sure.": 0, "maybe,": 0, "maybe.": 0}
    for row in _cells(sample, sep):
        for cell in row:
            found = re.fullmatch(r"(\d*)((?:[.,]\d{3})*)([.,])(\d+)", cell.strip(" +-$%\u00a3\u00a5\u20ac"))
            if found and found[3] in found[2]:
                # Several equal marks are thousands.
                counts["sure," if found[3] == "." else "sure."] += 1
            elif found:
                sure = found[2] or len(found[4]) != 3 or len(found[1]) > 3 or found[1] in ("", "0")
                counts[("sure" if sure else "maybe") + found[3]] += 1
    if counts["sure,"] or counts["sure."]:
        return "," if counts["sure,"] > counts["sure."] else "."
    return "," if sep == ";" and counts["maybe,"] and not counts["maybe."] else "."


def _check_header(path: Path, names: list[str], decimal: str) -> None:
    if not names:
        raise DataError(f"{path}: expected a header line with the column names, found an empty file")
    values = [number(name, decimal) for name in names]
    found = [value for value in values if value is not None]
    # pandas numbers the columns of an unnamed frame from 0; whole numbers may be years.
    numbered = names == [str(index) for index in range(len(names))]
    if not numbered and (len(found) == len(names) or any(value != value // 1 for value in found)):
        raise DataError(
            f"{path}: the first line must hold the names of the columns, found the numbers "
            f"{', '.join(repr(name) for name in names[:5])}; if the file has no header, say --no-header "
            "(in Python Form(header=False))"
        )
