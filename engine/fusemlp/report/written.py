"""Write tables as files in the forms that ``fusemlp.datasets.tables`` reads; text that runs as a formula is guarded."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fusemlp.datasets.tables import ARROW, excel
from fusemlp.datasets.textfiles import number

# The beginnings of formulas, also in the full width of Japanese; of a guarded cell too, so that guarding can be undone.
FORMULA = re.compile("'*[=+@\t\r\n\uff1d\uff0b\uff0d\uff20-]")
_PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": partial(gzip.compress, mtime=0),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
# The digits of a number that a sheet of Excel keeps.
EXCEL_DIGITS = 15
# Files whose cells have types, and all.
TYPED = (*ARROW, ".xlsx")
SUFFIXES = (".csv", ".tsv", *(f"{text}{packed}" for text in (".csv", ".tsv") for packed in _PACKERS), *TYPED)


def guarded(cell: Any) -> Any:
    """Return a cell, with an apostrophe in front of text but no number that a spreadsheet would run (OWASP)."""
    runs = isinstance(cell, str) and FORMULA.match(cell) and number(cell) is None and number(cell, ",") is None
    return f"'{cell}" if runs else cell


def csv_bytes(rows: Iterable[Iterable[Any]], notes: list[str] | None = None, sep: str = ",") -> bytes:
    """Return rows of ``guarded`` cells as the content of a CSV file; ``notes`` takes a line if any has changed."""
    stream, changed = io.StringIO(newline=""), False
    # a carriage return is quoted only where lines end with one; an unquoted one would begin a row
    writer = csv.writer(stream, lineterminator="\r\n", delimiter=sep)
    for row in map(list, rows):
        cells = [guarded(cell) for cell in row]
        changed |= cells != row
        writer.writerow(cells)
        stream.seek(stream.tell() - len("\r\n"))
        stream.write("\n")
    stream.truncate()
    if notes is not None and changed:
        notes.append("an apostrophe stands in front of text that a spreadsheet would run as a formula")
    return stream.getvalue().encode(errors="backslashreplace")


def _excel_cell(cell: Any) -> Any:
    """Return a guarded cell; as text what Excel cannot hold: long whole numbers, times with a zone, lists, bytes."""
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    long = isinstance(cell, int) and abs(cell) >= 10**EXCEL_DIGITS
    if long or getattr(cell, "tzinfo", None) is not None or isinstance(cell, list | tuple | dict | bytes):
        cell = str(cell)
    if isinstance(cell, str):
        cell = ILLEGAL_CHARACTERS_RE.sub(lambda match: ascii(match[0])[1:-1], cell)
    return guarded(cell)


def table_bytes(name: str, columns: Mapping[str, Any], notes: list[str]) -> bytes:
    """Return columns, of Python or Arrow, as the content of a file whose ``name`` ends in one of ``SUFFIXES``."""
    suffix, stream = Path(name).suffix.lower(), io.BytesIO()
    if suffix in _PACKERS:
        return _PACKERS[suffix](table_bytes(Path(name).stem, columns, notes))
    if suffix in ARROW:
        import pyarrow
        from pyarrow import feather, parquet

        write = parquet.write_table if ARROW[suffix] == "parquet" else feather.write_feather
        write(pyarrow.table(dict(columns)), stream)
        return stream.getvalue()
    lists = [column.to_pylist() if hasattr(column, "to_pylist") else list(column) for column in columns.values()]
    rows = [[*columns], *zip(*lists, strict=True)]
    if suffix != ".xlsx":
        return csv_bytes(rows, notes, "\t" if suffix == ".tsv" else ",")
    book = excel(name).Workbook(write_only=True)
    sheet = book.create_sheet("predictions")
    for row in rows:
        sheet.append([*map(_excel_cell, row)])
    book.save(stream)
    return stream.getvalue()
