"""Open tables: text files, Arrow's file formats, Excel sheets, and tables in memory.

Every error is a DataError that names the file.
"""

from __future__ import annotations

import csv
import itertools
import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusemlp.datasets.files import ARCHIVE, CONTENT, reason
from fusemlp.datasets.textfiles import Form, Source, as_batches, headed, is_compressed, open_text
from fusemlp_kernels.errors import ArgumentTypeError, DataError

ARROW = {".parquet": "parquet", ".feather": "feather", ".arrow": "feather"}
TABLES = (".csv", ".tsv", *ARROW, ".xlsx")
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
    """Return whether the name of a file is that of a table, compressed or not."""
    if is_compressed(path):
        return path.with_suffix("").suffix.lower() in (".csv", ".tsv")
    return path.suffix.lower() in TABLES


def as_frame(data: Any) -> Frame:
    """Return a DataFrame of pandas or polars, or another table that speaks Arrow; ArgumentTypeError for the rest."""
    import pyarrow

    if isinstance(data, Frame):
        return data
    name = type(data).__name__
    try:
        if hasattr(data, "iloc") and hasattr(data, "columns"):
            columns = [_from_pandas(data.iloc[:, index]) for index in range(data.shape[1])]
            data = pyarrow.table(columns, names=[str(column) for column in data.columns])
        elif isinstance(data, pyarrow.RecordBatch):
            data = pyarrow.Table.from_batches([data])
        elif hasattr(data, "to_arrow"):
            data = data.to_arrow()
        elif not isinstance(data, pyarrow.Table) and hasattr(data, "__arrow_c_stream__"):
            data = pyarrow.table(data)
    except (pyarrow.ArrowException, TypeError, ValueError) as error:
        raise DataError(f"{name}: a column cannot be read ({reason(error)}); convert or drop it") from error
    if not isinstance(data, pyarrow.Table):
        raise ArgumentTypeError(
            f"data: expected a table (a DataFrame of pandas or polars, an Arrow table), a name or a path, got {name}"
        )
    return Frame(name, data)


def _from_pandas(column: Any) -> Any:
    """Return a column of pandas as an Arrow array; one that mixes words and numbers holds words."""
    import pyarrow

    try:
        return pyarrow.Array.from_pandas(column)
    except (pyarrow.ArrowException, TypeError):
        texts = [None if gone else str(value) for value, gone in zip(column, column.isna(), strict=True)]
        return pyarrow.array(texts, pyarrow.string())


@contextmanager
def open_source(source: Place, form: Form) -> Iterator[Source]:
    """Yield an open table; errors of reading become DataError."""
    from pyarrow import ArrowException

    suffix = "" if isinstance(source, Frame) else source.suffix.lower()
    failures = OSError, EOFError, UnicodeError, csv.Error, zlib.error, lzma.LZMAError, zipfile.BadZipFile
    try:
        if isinstance(source, Frame):
            yield _typed(source.table.schema, lambda names: source.table.select(names).to_batches(_ROWS))
        elif suffix in ARROW:
            yield _open_arrow(source)
        elif suffix == ".xlsx":
            yield _open_excel(source, form)
        else:
            yield open_text(source, form)
    except (*failures, ArrowException) as error:
        if suffix in ARROW or suffix == ".xlsx":
            raise DataError(f"{source}: it cannot be read as {_article(suffix[1:])} file ({reason(error)})") from error
        why = reason(error)
        if "straddling" in why:
            why = "a row is longer than 4 MiB; a quote may have no end"
        encoded = f" in {form.encoding or 'its encoding'}" if isinstance(error, UnicodeError) else ""
        raise DataError(f"{source}: expected a csv file{encoded} with a header ({why})") from error


def _article(name: str) -> str:
    return f"an {name}" if name[0] in "ax" else f"a {name}"


def _typed(schema: Any, read: Callable[[list[str]], Any]) -> Source:
    """Return a table with types; an index that pandas stored is no column."""
    index = (schema.pandas_metadata or {}).get("index_columns", [])
    names = [name for name in schema.names if name not in index]

    def batches(columns: Sequence[int], ragged: Callable[[], object]) -> Iterator[Any]:
        yield from read([names[column] for column in columns])

    return Source(names, batches)


def _open_arrow(path: Path) -> Source:
    from pyarrow import dataset

    data = dataset.dataset(path, format=ARROW[path.suffix.lower()])

    def read(names: list[str]) -> Any:
        # Few pieces are read ahead: memory is bounded.
        return data.to_batches(columns=names, batch_size=_ROWS, batch_readahead=2, fragment_readahead=1)

    return _typed(data.schema, read)


def _open_excel(path: Path, form: Form) -> Source:
    """Return the sheet that is shown first, as rows of text."""
    book = _open_book(path)
    said = None
    if len(book.worksheets) > 1:
        said = f"{path.name}: the sheet {_shown(book).title!r} of {len(book.worksheets)}"
    book.close()

    def rows() -> Iterator[tuple[int, list[str]]]:
        book = _open_book(path)
        sheet = _shown(book)
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

    first = next(((texts for _, texts in rows())), [])
    names, header = headed(path, first, ".", form)

    def records() -> Iterator[tuple[int, list[str]]]:
        for number, texts in itertools.islice(rows(), int(header), None):
            yield number, [*texts, *[""] * (len(names) - len(texts))]

    def batches(columns: Sequence[int], ragged: Callable[[], object]) -> Iterator[Any]:
        return as_batches(records(), len(names), columns, ragged)

    return Source(names, batches, records=records, said=said)


def _open_book(path: Path) -> Any:
    try:
        import openpyxl
    except ImportError as error:
        raise DataError(
            f"{path}: Excel files need openpyxl: pip install openpyxl (or 'fusemlp[excel]'); or save the sheet as .csv"
        ) from error
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
    if cell is None or cell in _ERRORS:
        return ""
    return cell.isoformat() if hasattr(cell, "isoformat") else str(cell)
