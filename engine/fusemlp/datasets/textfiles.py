"""Text files of tables: their compression, encoding, separator and decimal mark, and their rows.

The beginning of a file tells its form; a ``Form`` sets what the caller knows better. Arrow reads the rows; Python's csv
module reads files with odd quotes, and finds the lines of mistakes.
"""

import bz2
import codecs
import csv
import gzip
import io
import itertools
import lzma
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp.describe.checks import arrow, listed
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError

# From the least likely to stand in text.
SEPARATORS = {"\t": "tab", "|": "'|'", ";": "';'", ",": "','"}
MISSING = frozenset({"", "NA", "N/A", "n/a", "#NA", "#N/A", "<NA>", "NaN", "nan", "null", "NULL", "None", "?"})
COMPRESSED = (".gz", ".bz2", ".xz", ".zip")
# The number of lines that separator and decimal marks are recognised from.
SAMPLE = 1000
_BYTES = 2**20
# The characters of a line: a block of 16 times as many bytes is the largest that Arrow takes.
_LONGEST = 2**27 - 1
# The bytes of text that Arrow parses at a time, and the rows that the csv module does.
_BLOCK = 2**22
_ROWS = 4096
# The mark of UTF-32 begins with that of UTF-16.
_MARKS = dict.fromkeys((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE), "utf-32")
_MARKS |= dict.fromkeys((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE), "utf-16")
_ASCII = bytes(range(9, 127))
_CURRENCY = r"(?:[$\u00a2-\u00a5\u20a0-\u20c0]|EUR|USD|GBP|CHF|JPY)?"
# A number with a mark: digits, thousands, the last mark, digits.
_MARKED = re.compile(r"(\d*)((?:[.,]\d{3})*)([.,])(\d+)(?:[eE][+-]?\d+)?")
# Labels of which a row has several.
_TRUTH = dict.fromkeys(("1", "1.0", "yes", "y", "true", "t"), 1.0)
_TRUTH |= dict.fromkeys(("0", "0.0", "no", "n", "false", "f"), 0.0)
# Digits and points that are no number: a version, a date, an address of the internet.
_DOTTED = re.compile(r"\d+(?:\.\d+){2,}")
# Cells of one form become one text.
_FORMS = str.maketrans("23456789", "11111111")
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
class OpenTable:
    """An open table.

    ``batches`` takes the positions of columns and returns their rows as Arrow's record batches; it leaves out the rows
    of text that have another number of fields, and calls its second argument for each. ``decimals`` has the decimal
    mark of each column of text. ``records`` returns the rows of text again, with the number of the last line of each;
    None for a table with types. ``said`` is a line on the form.
    """

    names: list[str]
    batches: Callable[[Sequence[int], Callable[[], object]], Iterator[Any]]
    decimals: Mapping[str, str] = field(default_factory=dict)
    records: Callable[[], Iterator[tuple[int, list[str]]]] | None = None
    sep: str = ","
    said: str | None = None


@dataclass(frozen=True)
class Form:
    """The form of a file; None is recognised from its beginning.

    ``sep`` is one character (or "tab"), ``decimal`` "." or ",", ``encoding`` a name that Python knows. Without
    ``header`` (recognised: numbers in the first line) the columns are called column_1, column_2 and so on. The words
    ``missing`` stand for missing cells, beside ``MISSING``. ``sheet`` is the name of one in an Excel file. ``earlier``
    has the decimal marks of an earlier table's columns, for columns of this one that do not show theirs.
    """

    sep: str | None = None
    decimal: str | None = None
    encoding: str | None = None
    header: bool | None = None
    missing: Sequence[str] = ()
    sheet: str | None = None
    earlier: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.sep in ("tab", "\\t"):
            object.__setattr__(self, "sep", "\t")
        if self.sep is not None and (len(self.sep) != 1 or self.sep in '"\r\n'):
            raise ArgumentError(f"sep: expected one character such as ; or |, or tab, got {self.sep!r}")
        if self.decimal not in (None, ".", ","):
            raise ArgumentError(f"decimal: expected . or , got {self.decimal!r}")
        if self.decimal is not None and self.decimal == self.sep == ".":
            raise ArgumentError("decimal: separator and decimal mark are both '.'; give another --sep")
        words: Any = self.missing
        several = isinstance(words, Iterable) and not isinstance(words, str)
        if not several or not all(isinstance(word, str) for word in words):
            raise ArgumentTypeError(f"missing: expected a list of words such as ['unknown', '-999'], got {words!r}")
        if self.encoding is not None:
            try:
                # Not every codec encodes text.
                "".encode(self.encoding)
            except (LookupError, UnicodeError):
                raise ArgumentError(f"encoding: {self.encoding!r} is unknown; try utf-8, cp1252 or latin-1") from None


def open_text(path: Path, form: Form) -> OpenTable:
    """Return a text file as rows of text."""
    encoding, marks = _inspect(path, form.encoding)
    with _open(path) as raw, io.TextIOWrapper(raw, encoding, newline="") as stream:
        sample = list(itertools.islice(iter(lambda: stream.readline(_LONGEST), ""), SAMPLE))
    if any(len(line) == _LONGEST for line in sample):
        raise DataError(f"{path}: a line has {_LONGEST:,} characters or more; a line break may be missing")
    sep, rows = _separator(sample, [form.sep] if form.sep else [*SEPARATORS])
    first = next(csv.reader(sample, delimiter=sep, skipinitialspace=True, strict=True), [])
    if "\0" in "".join(first):
        mend = "as UTF-16 without a mark has; give --encoding utf-16-le or utf-16-be"
        raise DataError(f"{path}: the first line has zero bytes, {mend}")
    names, header, decimals = headed(path, first, rows, sep, form)
    size = max(_BLOCK, 16 * max(map(len, sample)))

    def records() -> Iterator[tuple[int, list[str]]]:
        with _open(path) as raw, io.TextIOWrapper(raw, encoding, newline="") as stream:
            reader = csv.reader(stream, delimiter=sep, skipinitialspace=True, strict=True)
            for row in itertools.islice(reader, int(header), None):
                if row:
                    yield reader.line_num, row

    def batches(columns: Sequence[int], ragged: Callable[[], object]) -> Iterator[Any]:
        if not _is_plain(path, sep, encoding, marks):
            yield from as_batches(records(), len(names), columns, ragged)
            return
        from pyarrow import csv as arrow_csv

        def skip(row: Any) -> str:
            ragged()
            return "skip"

        places = [str(column) for column in range(len(names))]
        chosen = [places[column] for column in columns]
        read = arrow_csv.ReadOptions(
            block_size=size,
            column_names=places,
            skip_rows_after_names=int(header),
            encoding="utf8" if encoding == "utf-8-sig" else encoding,
        )
        parse = arrow_csv.ParseOptions(delimiter=sep, newlines_in_values=True, invalid_row_handler=skip)
        types = dict.fromkeys(chosen, arrow().string())
        convert = arrow_csv.ConvertOptions(column_types=types, include_columns=chosen, strings_can_be_null=False)
        with _open(path) as raw, arrow_csv.open_csv(raw, read, parse, convert) as reader:
            yield from reader

    said = _said(path, sep, decimals, encoding, header=header or form.header is False)
    return OpenTable(names, batches, decimals, records, sep, said)


def headed(
    path: Path, first: list[str], rows: list[list[str]], sep: str, form: Form
) -> tuple[list[str], bool, dict[str, str]]:
    """Return the names of the columns, whether the first row holds them, and their decimal marks by some ``rows``."""
    shown, usual, sure = _marks(rows, sep)
    if not first:
        what = "rows of a table" if form.header is False else "a header line with the column names"
        raise DataError(f"{path}: expected {what}, found an empty file")
    marks = [form.decimal or mark or usual for mark in shown]
    # our names are a header even of a table that is read as one without
    ours = re.fullmatch(r"column_\d+", first[0].strip()) is not None
    header = ours or (form.header is not False and (form.header or not _is_data(first, marks)))
    names = [(header and name.strip()) or f"column_{index}" for index, name in enumerate(first, 1)]
    # a file that shows its mark, or has commas between fields, stands above an earlier one, unless that had both
    known = {} if (sure or sep == ",") and len({*form.earlier.values()}) < 2 else form.earlier
    named = zip(names, shown, strict=False)
    return names, header, {name: form.decimal or mark or known.get(name, usual) for name, mark in named}


def _said(path: Path, sep: str, decimals: Mapping[str, str], encoding: str, *, header: bool) -> str | None:
    """Return a line on the form of the file; None for a plain one in UTF-8 with commas and decimal points."""
    points, commas = ([name for name, mark in decimals.items() if mark == which] for which in ".,")
    some = f", but a point in {listed(points)}" if points else ""
    some = f" in {listed(commas)}" if len(points) > len(commas) else some
    parts = {
        f"separated by {SEPARATORS.get(sep, repr(sep))}": sep != ",",
        f"decimal mark ','{some}": bool(commas),
        f"encoding {encoding}": encoding != "utf-8-sig",
        path.suffix.lower()[1:]: is_compressed(path),
        "no header: the columns are column_1, column_2, ...": not header,
    }
    odd = [part for part, applies in parts.items() if applies]
    return f"{path.name}: {', '.join(odd)}" if odd else None


def as_batches(
    records: Iterable[tuple[int, list[str]]], width: int, columns: Sequence[int], ragged: Callable[[], object]
) -> Iterator[Any]:
    """Return chosen columns of rows of text as record batches, without the rows of another width."""
    rows = (row for _, row in records)
    while piece := list(itertools.islice(rows, _ROWS)):
        right = [row for row in piece if len(row) == width]
        for _ in range(len(piece) - len(right)):
            ragged()
        by_column = list(zip(*right, strict=True)) or [()] * width
        arrays = [text_array(by_column[column]) for column in columns]
        yield arrow().record_batch(arrays, [str(column) for column in columns])


def text_array(texts: Sequence[str]) -> Any:
    """Return texts as an Arrow array; ``pyarrow.array`` would import pandas."""
    pyarrow = arrow()
    encoded = [text.encode() for text in texts]
    ends = np.cumsum([0, *map(len, encoded)], dtype=np.int32)
    return pyarrow.StringArray.from_buffers(len(texts), pyarrow.py_buffer(ends), pyarrow.py_buffer(b"".join(encoded)))


def number(text: str, decimal: str = ".") -> float | None:
    """Return the number that a cell holds, with thousands, a currency or a percent sign (12% is 0.12); else None."""
    if decimal == ".":
        try:
            return float(text)
        except ValueError:
            pass
    match = _PATTERNS[decimal].fullmatch(text.strip())
    if match is None or not (match["whole"] or match["part"]) or (match["sign"] and match["minus"]):
        return None
    digits = re.sub(r"\D", "", match["whole"] or "0")
    value = float(f"{digits}.{match['part'] or '0'}{match['power'] or ''}")
    value = value / 100 if match["percent"] else value
    return -value if {match["sign"], match["minus"]} & {"-", "\u2212"} else value


def stand_ins(words: Sequence[str]) -> tuple[list[str], list[float]]:
    """Return words that stand for missing cells with other spellings of those that are numbers, and these numbers."""
    numbers = [value for value in map(number, words) if value is not None]
    return [*words, *map(str, numbers), *(f"{value:.17g}" for value in numbers)], numbers


def truth_values(place: str, words: Array) -> Array:
    """Return words for yes and no as 1.0 and 0.0, NaN for a missing one; DataError, with ``place``, for others."""
    different, codes = np.unique(words.astype(str), return_inverse=True)
    values = [_TRUTH.get(word.lower(), np.nan if word in MISSING else None) for word in different.tolist()]
    if None in values:
        raise DataError(
            f"{place}: several targets are numbers, or yes and no, and it holds words such as "
            f"{different[values.index(None)].item()!r}; train a run for each"
        )
    return np.array(values, np.float64)[codes].reshape(words.shape)


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSED


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    suffix = path.suffix.lower()
    openers: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    if suffix == ".zip":
        try:
            with zipfile.ZipFile(path) as archive:
                members = [member for member in archive.namelist() if not member.endswith("/")]
                if len(members) != 1:
                    raise DataError(f"{path}: expected one file in the archive, found {len(members)}; unpack it first")
                with archive.open(members[0]) as stream:
                    yield stream
        except RuntimeError as error:
            # A password, or a version or compression that Python lacks.
            raise DataError(f"{path}: the archive cannot be read here ({error}); unpack it first") from error
        return
    with openers.get(suffix, open)(path, "rb") as stream:
        yield stream


def _inspect(path: Path, charset: str | None) -> tuple[str, bytes]:
    """Return the encoding, given or recognised, and which bytes of quotes and line breaks the file has.

    UTF-16 and UTF-32 have marks; else it is UTF-8 if all bytes are that, Western Europe's Windows page, or latin-1.
    """
    candidates = [charset] if charset else ["utf-8-sig", "cp1252", "latin-1"]
    while True:
        encoding = candidates.pop(0)
        decoder, marks, first = codecs.getincrementaldecoder(encoding)(), b"", True
        try:
            with _open(path) as stream:
                while chunk := stream.read(_BYTES):
                    wide = next((name for mark, name in _MARKS.items() if chunk.startswith(mark)), None)
                    if first and not charset and wide:
                        return wide, b""
                    first = False
                    decoder.decode(chunk)
                    marks += bytes(mark for mark in b'"\r\n' if mark not in marks and mark in chunk)
                decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            if not candidates:
                raise
        else:
            return encoding, marks


def _is_plain(path: Path, sep: str, encoding: str, marks: bytes) -> bool:
    """Return whether Arrow reads quotes as the slower csv module: none in a field, after a space or without an end."""
    ends = b"\n" in marks or b"\r" in marks
    if not ends or sep == " " or not sep.isascii() or _ASCII.decode(encoding, "replace") != _ASCII.decode("ascii"):
        return False
    if b'"' not in marks:
        return True
    mark, outside = sep.encode(), re.escape(sep).encode() + b'\r\n"'
    beside = (mark + b'"', b'"' + mark, b'\n"', b'\r"', b'"\n', b'"\r')
    inner = re.compile(b'"(?:(?<=[^%b]")|(?<=[%b\r\n]")")(?=[^%b])' % (outside, re.escape(mark), outside))
    quotes, rest = 0, b"\n"
    with _open(path) as stream:
        while chunk := stream.read(_BYTES):
            rest += chunk
            end = max(rest.rfind(b"\n"), rest.rfind(b"\r"))
            # A piece begins and ends with a line break.
            piece, rest = rest[: end + 1], rest[end:] if end > 0 else rest
            count = piece.count(b'"')
            quotes += count
            if b' "' in piece or (count != sum(map(piece.count, beside)) and inner.search(piece)):
                return False
    return (quotes + rest.count(b'"')) % 2 == 0 and not inner.search(rest) and b' "' not in rest


def _cells(sample: list[str], sep: str) -> list[list[str]]:
    """Return the rows of the sample's whole lines."""
    rows: list[list[str]] = []
    # the rows before one that is none are kept
    with suppress(csv.Error):
        rows.extend(filter(None, csv.reader(sample, delimiter=sep, skipinitialspace=True)))
    return rows


def _separator(sample: list[str], candidates: list[str]) -> tuple[str, list[list[str]]]:
    """Return the separator that gives most rows the width of the first, and then the widest, the last one if none does.

    The rows of the sample are returned too.
    """

    def score(rows: list[list[str]]) -> tuple[float, int]:
        width = len(rows[0]) if rows else 0
        return (sum(len(row) == width for row in rows) / len(rows) if width > 1 else 0.0, width)

    cut = {sep: _cells(sample, sep) for sep in candidates}
    best = max(candidates, key=lambda sep: score(cut[sep]))
    best = best if score(cut[best])[0] else candidates[-1]
    return best, cut[best]


def _marks(rows: list[list[str]], sep: str) -> tuple[list[str], str, bool]:
    """Return the decimal mark of each column by its own numbers, "" if open; that of all; and whether numbers show it.

    Three digits after a mark may be thousands: such a number counts only where nothing else decides, and for a comma
    only in a file separated by semicolons, as spreadsheets write it where the comma is the decimal mark. A column
    decides by itself if most of its marks are sure, and in a sheet, without a separator, alone. One of versions or
    addresses decides nothing.
    """
    columns = []
    for cells in itertools.zip_longest(*rows, fillvalue=""):
        forms = Counter[str]()
        for form, count in Counter("\0".join(cells).translate(_FORMS).split("\0")).items():
            forms[_shown(form)] += count
        columns.append(Counter() if forms["dotted"] > forms["sure,"] else forms)
    counts: Counter[str] = sum(columns, Counter())

    def most(of: Counter[str]) -> str:
        return "," if of["sure,"] > of["sure."] else "."

    marks = [most(own) if own["sure,"] + own["sure."] > own["maybe,"] + own["maybe."] else "" for own in columns]
    if counts["sure,"] or counts["sure."]:
        return marks, most(counts) if sep else ".", True
    return marks, "," if sep == ";" and counts["maybe,"] and not counts["maybe."] else ".", False


def _shown(cell: str) -> str:
    """Return the decimal mark that a cell shows, after "sure" or "maybe"; "dotted" or "" for no number with a mark."""
    match = _MARKED.fullmatch(cell.strip(" +-$%\u00a3\u00a5\u20ac"))
    if not match or (match[3] in match[2] and len(match[4]) != 3):
        return "dotted" if _DOTTED.fullmatch(cell) else ""
    if match[3] in match[2]:
        # Several equal marks are thousands.
        return "sure," if match[3] == "." else "sure."
    sure = match[2] or len(match[4]) != 3 or len(match[1]) > 3 or match[1] in ("", "0")
    return ("sure" if sure else "maybe") + match[3]


def _is_data(first: list[str], marks: Sequence[str]) -> bool:
    """Return True if a first row holds numbers as no header does."""
    names = [name.strip() for name in first]
    numbers = [value for value in map(number, names, marks) if value is not None]
    # pandas numbers the columns of an unnamed frame from 0; whole numbers may be years.
    numbered = names == [str(index) for index in range(len(names))]
    fractions = any(value != value // 1 for value in numbers)
    return bool(names) and not numbered and (len(numbers) == len(names) or fractions)
