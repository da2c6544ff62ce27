"""Tables as columns: text files, Parquet and other Arrow files, Excel sheets, and tables in memory.

Numbers become float64 arrays with NaN for missing cells, dates datetime64[us] with NaT, words object arrays of str with
the text of the cell. Arrow reads piece by piece, in the columns' memory. A DataError names the file and its places.
"""

import csv
import itertools
import lzma
import struct
import zipfile
import zlib
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from fusemlp.datasets import textfiles
from fusemlp.datasets.textfiles import MISSING, Form, OpenTable, number, text_array
from fusemlp.describe.checks import Problems, arrow, listed, meant
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError

# Readers raise these for damaged archives, and for damaged content, of XML SyntaxError and of headers of arrays
# TokenError too. RuntimeError stands for encryption and unknown versions.
ARCHIVE = OSError, EOFError, RuntimeError, struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError
CONTENT = ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError, SyntaxError, TokenError


ARROW = {".parquet": "parquet", ".feather": "feather", ".arrow": "feather"}
TABLES = (".csv", ".tsv", *ARROW, ".xlsx")
# The tables in this folder, and the target of each.
SHIPPED = {"diamonds": "price"}
# The number of rows in a piece of a table with types.
_ROWS = 2**16
# The most rows of a sheet, and the bytes and the multiple of its packed size beyond which a part of a workbook is a
# bomb; even cells of one value stay below.
_EXCEL_ROWS, _LARGE, _MULTIPLE = 2**20, 2**26, 200
# The results of formulas that failed.
_ERRORS = frozenset({"#N/A", "#DIV/0!", "#NAME?", "#NULL!", "#NUM!", "#REF!", "#VALUE!"})


@dataclass(frozen=True, eq=False)
class Frame:
    """A table in memory as an Arrow table; ``name`` stands for it in messages."""

    name: str
    table: Any

    def __str__(self) -> str:
        return self.name


Place = Path | Frame


def is_table(path: Path) -> bool:
    """Return whether the name is that of a file with a table, compressed or not, or of a table in ``SHIPPED``."""
    if str(path) in SHIPPED:
        return True
    if textfiles.is_compressed(path):
        return path.with_suffix("").suffix.lower() in (".csv", ".tsv")
    return path.suffix.lower() in TABLES


def as_frame(data: Any) -> Frame:
    """Return a DataFrame of pandas or polars, or another table that speaks Arrow; ArgumentTypeError for the rest."""
    pyarrow = arrow()
    if isinstance(data, Frame):
        return data
    name = type(data).__name__
    try:
        if hasattr(data, "iloc") and hasattr(data, "columns"):
            columns = [_from_pandas(data.iloc[:, index]) for index in range(data.shape[1])]
            data = pyarrow.table(columns, names=[str(column) for column in data.columns])
        elif hasattr(data, "to_arrow"):
            data = data.to_arrow()
        elif not isinstance(data, pyarrow.Table) and hasattr(data, "__arrow_c_stream__"):
            data = pyarrow.table(data)
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{name}: a column cannot be read ({reason(error)}); convert or drop it") from error
    if not isinstance(data, pyarrow.Table):
        raise ArgumentTypeError(f"data: expected a table (pandas, polars or Arrow), a name or a path, got {name}")
    return Frame(name, data)


def as_stored(column: Any) -> Any:
    """Return a column of NumPy or pandas; its numbers in a size and an order of bytes that Arrow has."""
    kind = column.dtype
    odd = isinstance(kind, np.dtype) and kind.kind in "iuf" and not (kind.isnative and kind.itemsize <= 8)
    return column.astype(f"{kind.kind}{min(kind.itemsize, 8)}") if odd else column


def _from_pandas(column: Any) -> Any:
    """Return a column of pandas as an Arrow array; one that mixes words and numbers holds words."""
    pyarrow = arrow()
    # a period is the moment at which it begins
    column = column.dt.to_timestamp() if hasattr(column.dtype, "freq") else as_stored(column)
    if column.dtype.kind == "c":
        raise TypeError(f"{column.name!r} has complex numbers")
    try:
        return pyarrow.Array.from_pandas(column)
    except (pyarrow.ArrowException, TypeError):
        texts = [None if gone else str(value) for value, gone in zip(column, column.isna(), strict=True)]
        return pyarrow.array(texts, pyarrow.string())


@contextmanager
def open_source(source: Place, form: Form) -> Iterator[OpenTable]:
    """Yield an open table; errors of reading become DataError."""
    pyarrow = arrow()
    suffix = "" if isinstance(source, Frame) else source.suffix.lower()
    if form.sheet is not None and suffix != ".xlsx":
        raise ArgumentError(f"sheet: an .xlsx file has sheets, got {form.sheet!r} for {str(source)!r}; leave it out")
    failures = OSError, EOFError, UnicodeError, csv.Error, zlib.error, lzma.LZMAError, zipfile.BadZipFile
    try:
        if isinstance(source, Frame):
            yield _typed(source.table.schema, lambda names: source.table.select(names).to_batches(_ROWS))
        elif suffix in ARROW:
            yield _open_arrow(source)
        elif suffix == ".xlsx":
            yield _open_excel(source, form)
        else:
            yield textfiles.open_text(source, form)
    except (*failures, pyarrow.ArrowException) as error:
        if suffix in ARROW or suffix == ".xlsx":
            kind = f"a{'n' if suffix[1] in 'ax' else ''} {suffix[1:]}"
            raise DataError(f"{source}: it cannot be read as {kind} file ({reason(error)})") from error
        why = reason(error)
        if "straddling" in why:
            why = "a row is longer than 4 MiB; a quote may have no end"
        elif isinstance(error, csv.Error) and "end of data" in why:
            why = "a quote has no end; close it, or leave it out"
        encoded = f" in {form.encoding or 'its encoding'}" if isinstance(error, UnicodeError) else ""
        raise DataError(f"{source}: expected a csv file{encoded} with a header ({why})") from error


def _typed(schema: Any, read: Callable[[list[str]], Any]) -> OpenTable:
    """Return a table with types; an index that pandas stored is no column."""
    index = (schema.pandas_metadata or {}).get("index_columns", [])
    names = [name for name in schema.names if name not in index]

    def batches(columns: Sequence[int], ragged: Callable[[], object]) -> Iterator[Any]:
        yield from read([names[column] for column in columns])

    return OpenTable(names, batches)


def _open_arrow(path: Path) -> OpenTable:
    from pyarrow import dataset

    data = dataset.dataset(path, format=ARROW[path.suffix.lower()])

    def read(names: list[str]) -> Iterator[Any]:
        # Few pieces are read ahead: memory is bounded.
        for batch in data.to_batches(columns=names, batch_size=_ROWS, batch_readahead=2, fragment_readahead=1):
            # Offsets of a damaged file lead outside its memory.
            batch.validate(full=True)
            yield batch

    return _typed(data.schema, read)


def _open_excel(path: Path, form: Form) -> OpenTable:
    """Return the sheet of the form, or the one that is shown first, as rows of text."""
    book = _open_book(path)
    said, names = None, [sheet.title for sheet in book.worksheets]
    if len(names) > 1 and form.sheet is None:
        said = f"{path.name}: the sheet {_shown(book).title!r} of {len(names)}; --sheet NAME takes another"
    book.close()
    if form.sheet not in (None, *names):
        near = meant([str(form.sheet)], names)
        raise DataError(f"{path}: there is no sheet {form.sheet!r}; the sheets are {listed(names)}{near}")

    def rows() -> Iterator[tuple[int, list[str]]]:
        book = _open_book(path)
        sheet = _shown(book) if form.sheet is None else book[form.sheet]
        # Some programs write wrong dimensions, by which openpyxl would leave out cells.
        sheet.reset_dimensions()
        try:
            for number, cells in enumerate(itertools.islice(sheet.iter_rows(values_only=True), _EXCEL_ROWS), 1):
                texts = [_text(cell) for cell in cells]
                while texts and not texts[-1]:
                    texts.pop()
                if texts:
                    yield number, texts
        except (*ARCHIVE, *CONTENT) as error:
            raise OSError(reason(error)) from error
        finally:
            book.close()

    sample = [texts for _, texts in itertools.islice(rows(), textfiles.SAMPLE)]
    # numbers have no mark in a sheet, texts may show one
    form = replace(form, decimal=None, earlier={})
    names, header, decimals = textfiles.headed(path, sample[0] if sample else [], sample, "", form)

    def records() -> Iterator[tuple[int, list[str]]]:
        for line, texts in itertools.islice(rows(), int(header), None):
            yield line, [*texts, *[""] * (len(names) - len(texts))]

    def batches(columns: Sequence[int], ragged: Callable[[], object]) -> Iterator[Any]:
        return textfiles.as_batches(records(), len(names), columns, ragged)

    return OpenTable(names, batches, decimals, records, said=said)


def excel(path: Path | str) -> Any:
    """Return the library of Excel files; DataError, which names the file, if it is not installed."""
    try:
        import openpyxl
    except ImportError as error:
        raise DataError(
            f"{path}: Excel files need openpyxl: pip install openpyxl (or 'fusemlp[excel]'); or take .csv"
        ) from error
    return openpyxl


def _open_book(path: Path) -> Any:
    openpyxl = excel(path)
    try:
        with zipfile.ZipFile(path) as archive:
            for part in archive.infolist():
                if part.file_size > max(_LARGE, _MULTIPLE * part.compress_size):
                    raise OSError(f"{part.filename} would unpack from {part.compress_size} to {part.file_size} bytes")
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
    except (*ARCHIVE, *CONTENT, openpyxl.utils.exceptions.InvalidFileException) as error:
        raise OSError(reason(error)) from error
    if not book.worksheets:
        raise OSError("it has no sheet of cells")
    return book


def _shown(book: Any) -> Any:
    """Return the sheet that Excel shows first; the first of cells if that is a chart."""
    return book.active if book.active in book.worksheets else book.worksheets[0]


def _text(cell: Any) -> str:
    """Return the text of a cell as a csv file has it."""
    text = cell.isoformat() if hasattr(cell, "isoformat") else str(cell)
    return "" if cell is None or cell in _ERRORS else text


# A piece of a table has at least this many rows, which tell the kinds of its columns.
_FEWEST = 4096


def read_table(
    source: Place,
    *,
    features: Sequence[str] | None = None,
    targets: Sequence[str] = (),
    words: bool = False,
    form: Form | None = None,
    drop: Collection[str] = (),
    kinds: dict[str, str] | None = None,
    known_labels: Collection[str] = (),
    notes: list[str] | None = None,
    weight: str | None = None,
    decimals: dict[str, str] | None = None,
    task: str | None = None,
) -> dict[str, Array]:
    """Return columns of a table by name, in its order.

    ``features`` chooses the feature columns (None: all but targets and those to ``drop``); the others are ignored.
    ``kinds`` says what a feature column holds: "number", "word", or dates in an order of ``ORDERS``; those it does not
    name are told by their values, and entered. The column of a single target becomes int64, float64, bool or str, by
    its values and the ``task``; with ``words`` it stays str. Several become float64, NaN where missing. Rows without
    any target are left out; a missing value's text that is among ``known_labels`` is a label. The column ``weight`` has
    a weight in each other row. ``notes`` takes lines on all this, ``decimals`` the decimal mark of each text column.
    """
    from fusemlp.datasets.columns import Column, Target, stand_in

    notes = [] if notes is None else notes
    kinds = {} if kinds is None else kinds
    problems = Problems(source)
    ragged, form, present = itertools.count(), form or Form(), set[str]()
    with open_source(source, form) as opened:
        names, with_types = opened.names, opened.records is None
        notes += filter(None, [opened.said])
        if decimals is not None:
            decimals |= opened.decimals
        columns: list[Column | Target] = [
            Target(name, opened.decimals.get(name, "."), problems, MISSING.difference(known_labels))
            if name in targets
            else Column(name, opened.decimals.get(name, "."), problems, kinds.get(name), with_types)
            for name in choose_columns(source, names, features, targets, drop)
        ]
        positions = [names.index(column.name) for column in columns]
        for batch in _pieces(opened.batches(positions, lambda: next(ragged))):
            for column, values in zip(columns, batch.columns, strict=True):
                column.add(_without(values, form.missing, column.decimal, present) if form.missing else values)
        held = [column for column in columns if isinstance(column, Target)]
        table: dict[str, Array] = {}
        for column in columns:
            if isinstance(column, Target):
                table[column.name] = column.finish(notes, words, with_types, task)
                notes += stand_in(column.name, table[column.name])
            else:
                table[column.name] = column.finish(notes)
                kinds[column.name] = column.kind or "number"
        missing = np.all([column.missing for column in held], axis=0) if held else np.zeros(0, bool)
        if weight is not None and not problems.found:
            for row in np.flatnonzero(~missing & wrong_weights(table[weight])).tolist():
                cell = table[weight][row]
                text = f"expected a weight, a finite number of at least 0, found {cell if cell == cell else 'none'}"
                problems.add(weight, row, text)
        for word in form.missing:
            parts = word.split(",")
            if word not in present and present.issuperset(parts):
                hint = f"no cell is {word!r}; give one word an option: --missing {' --missing '.join(parts)}"
                if problems.found:
                    problems.add("", None, hint)
                notes.append(hint)
        if next(ragged) or problems.found:
            _refuse(source, problems, opened)
    arrow().default_memory_pool().release_unused()
    if missing.all() and len(missing):
        raise DataError(f"{source}, column {listed(targets)}: the target is missing in all {len(missing)} rows")
    if not table or not len(next(iter(table.values()))):
        raise DataError(f"{source}: there are no rows below the header")
    if len(held) > 1:
        table |= {column.name: column.with_gaps(table[column.name]) for column in held}
    if missing.any():
        notes.append(f"rows without {listed(targets)}, left out: {int(missing.sum())} of {len(missing)}")
        table = {name: column[~missing] if len(column) == len(missing) else column for name, column in table.items()}
    return table


def _without(column: Any, words: Sequence[str], decimal: str, present: set[str]) -> Any:
    """Return a column of Arrow without the cells that are one of ``words`` or its number; text becomes empty.

    Cells that are such a word with commas, or a part of it, are entered in ``present``.
    """
    from pyarrow import compute, types

    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    joined = [part for word in words if "," in word for part in (word, *word.split(","))]
    words, _ = textfiles.stand_ins(words)
    try:
        texts = column.cast("string")
    except (arrow().ArrowInvalid, arrow().ArrowNotImplementedError):
        # of a type that is refused, by its name
        return column
    trimmed = compute.utf8_trim_whitespace(texts)
    if joined:
        present.update(compute.unique(trimmed.filter(compute.is_in(trimmed, text_array(joined)))).to_pylist())
    # -999.00 is -999
    whole = compute.replace_substring_regex(trimmed, rf"^([+-]?\d+)[{decimal}]0+$", r"\1")
    gone = compute.or_(*(compute.is_in(cells, value_set=arrow().array(words)) for cells in (trimmed, whole)))
    return compute.if_else(gone, "", texts) if types.is_string(column.type) else compute.if_else(gone, None, column)


def wrong_weights(column: Array) -> Array:
    """Return for each row (n,) of a column whether it is no number of at least 0."""
    return ~(column >= 0) if column.dtype.kind in "biuf" else np.ones(len(column), bool)


def choose_columns(
    source: Place, names: Sequence[str], features: Sequence[str] | None, targets: Sequence[str], drop: Collection[str]
) -> list[str]:
    """Return the columns to read; DataError, with a list of the columns, if one is missing or named twice."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise DataError(f"{source}: several columns are called {listed(twice)}; give each its own name")
    present = set(names)
    wanted = present - set(drop) if features is None else set(features)
    missing, columns = [name for name in features or () if name not in present], f"the columns are {listed(names)}"
    if absent := [name for name in targets if name not in present]:
        near = meant(absent, names) or "; give another --target"
        raise DataError(f"{source}: there is no target column {listed(absent)}; {columns}{near}")
    if missing:
        near = meant(missing, [name for name in names if name not in wanted])
        mend = " If so, rename in the table." if near else "; add what is missing, with empty cells where unknown"
        raise DataError(f"{source}: no feature columns {listed(missing)}; {columns}{near}{mend}")
    return [name for name in names if name in wanted or name in targets]


def read_cells(source: Place, form: Form, names: Sequence[str] | None, *, typed: bool) -> dict[str, Any]:
    """Return columns of a table, all for None, as Arrow's: the cells of a text file as text, unless ``typed``.

    Its decimal commas become points, as numbers beside them have.
    """
    with open_source(source, form) as opened:
        wanted = opened.names if names is None else list(dict.fromkeys(names))
        absent = [name for name in wanted if name not in opened.names]
        if absent:
            columns = f"the columns are {listed(opened.names)}"
            raise DataError(f"{source}: no columns {listed(absent)}; {columns}{meant(absent, opened.names)}")
        positions = [opened.names.index(name) for name in wanted]
        cells = arrow().Table.from_batches(opened.batches(positions, lambda: None)).columns
        commas = [opened.decimals.get(name) == "," for name in wanted]
        cells = [_with_points(column) if comma else column for column, comma in zip(cells, commas, strict=True)]
        return dict(zip(wanted, map(_as_numbers, cells) if typed and opened.records else cells, strict=True))


def _with_points(column: Any) -> Any:
    """Return a column of text with decimal points in place of commas if all its cells are numbers."""
    texts, cells = column.to_pylist(), []
    for text in texts:
        value, pointed = number(text, ","), text.replace(",", ".")
        if value is None and text.strip() not in MISSING:
            return column
        # those with thousands are written anew
        cells.append(text if value is None else pointed if number(pointed) == value else repr(value))
    return text_array(cells)


def _as_numbers(column: Any) -> Any:
    """Return a column of text as numbers if all its cells are, none begins with zeros, as 007, and all digits stay."""
    from pyarrow import ArrowInvalid, compute

    from fusemlp.datasets.columns import LONG

    cells = compute.if_else(compute.equal(column, ""), None, column)
    if not compute.any(compute.match_substring_regex(cells, r"^[+-]?0\d")).as_py():
        with suppress(ArrowInvalid):
            return cells.cast("int64")
        with suppress(ArrowInvalid):
            numbers = cells.cast("float64")
            long = cells.filter(compute.match_substring_regex(cells, LONG)).to_pylist()
            if all(int(text) == float(text) for text in long):
                return numbers
    return column


def read_names(source: Place, form: Form | None = None) -> list[str]:
    """Return the names of a table's columns, in order."""
    with open_source(source, form or Form()) as opened:
        return opened.names


def _pieces(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield record batches with few rows as larger ones."""
    waiting: list[Any] = []
    for batch in itertools.chain(batches, [None]):
        if waiting and (batch is None or sum(piece.num_rows for piece in waiting) >= _FEWEST):
            yield from arrow().Table.from_batches(waiting).combine_chunks().to_batches()
            waiting = []
        if batch is not None and batch.num_rows:
            waiting.append(batch)


def _refuse(source: Place, problems: Problems, opened: OpenTable) -> None:
    """Raise the DataError with all problems; those of text have the numbers of their lines."""
    if opened.records is None:
        problems.check(lambda row: f"row {row}")
        return
    lines = array("q")
    for line, row in opened.records():
        if len(row) == len(opened.names):
            lines.append(line)
        else:
            problems.add(
                "",
                line,
                f"expected {len(opened.names)} fields, as the header has, found {len(row)}; delete the line if it is a "
                f"note, or put quotes around fields that contain {opened.sep!r}",
            )
    problems.check(lambda row: f"line {lines[row]}")
    raise DataError(f"{source}: some rows have another number of fields than the header, which has {len(opened.names)}")


def reason(error: Exception) -> str:
    """Return kind and message of an error in one line."""
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
