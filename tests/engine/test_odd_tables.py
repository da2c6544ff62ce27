"""Odd files and tables in memory, each with its outcome, and random tables in random dialects."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import math
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, parquet

from fusemlp.datasets import rows as rows_module
from fusemlp.datasets import textfiles
from fusemlp.datasets.load import ColumnChoices, Dataset, load_data, load_features, load_labelled
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import check_memory
from fusemlp.datasets.tables import as_frame, read_table
from fusemlp.datasets.textfiles import Form
from fusemlp_kernels.errors import ArgumentTypeError, DataError
from make import run

WIDE = ",".join(f"c{i}" for i in range(3000))
LONG = "x" * 100_000

# The content of a file, the form that is said, and its columns (None for a missing cell) or the message.
CORPUS: dict[str, tuple[str | bytes, Form, dict[str, list[Any]] | str]] = {
    "no line break at the end": ("a,b\n1,x\n2,y", Form(), {"a": [1, 2], "b": ["x", "y"]}),
    "a header alone, without a line break": ("a,b", Form(), "no rows below the header"),
    "a header alone": ("a,b\n", Form(), "no rows below the header"),
    "one row without a header or a line break": ("1,x", Form(header=False), {"column_1": [1], "column_2": ["x"]}),
    "blank lines alone": ("\n\n\n", Form(), "found an empty file"),
    "a byte order mark alone": ("\ufeff", Form(), "found an empty file"),
    "line breaks of Windows": ("a,b\r\n1,x\r\n2,y\r\n", Form(), {"a": [1, 2], "b": ["x", "y"]}),
    "mixed line breaks": ("a,b\r\n1,x\n2,y\r3,z\n", Form(), {"a": [1, 2, 3], "b": ["x", "y", "z"]}),
    "line breaks in cells": ('a,b\n1,"x\ny"\n2,"z\r\n"\n', Form(), {"a": [1, 2], "b": ["x\ny", "z"]}),
    "a line break in the header": ('"a\nb",c\n1,2\n', Form(), {"a\nb": [1], "c": [2]}),
    "separators in cells": ('a,b\n1,"x,y"\n2,"z;"\n', Form(), {"a": [1, 2], "b": ["x,y", "z;"]}),
    "quotes in quotes": ('a,b\n1,"the ""x"""\n2,""""\n', Form(), {"a": [1, 2], "b": ['the "x"', '"']}),
    "inches": ('a,b\n1,5" pipe\n2,6" pipe\n', Form(), {"a": [1, 2], "b": ['5" pipe', '6" pipe']}),
    "one inch": ('a,b\n1,5"\n2,6\n', Form(), {"a": [1, 2], "b": ['5"', "6"]}),
    "everything in quotes": ('"a","b"\n"1","x"\n"2","y"\n', Form(), {"a": [1, 2], "b": ["x", "y"]}),
    "empty quotes": ('a,b\n"",x\n2,""\n', Form(), {"a": [None, 2], "b": ["x", ""]}),
    "a quote without an end": ('a,b\n1,"x\n2,y\n3,z\n', Form(), "expected a csv file"),
    "text after a quote's end": ('a,b\n1,"x"y\n2,z\n', Form(), "expected a csv file"),
    "a space before a quote": ('a, b\n1, "x, y"\n2, "z"\n', Form(), {"a": [1, 2], "b": ["x, y", "z"]}),
    "spaces around cells": ("a , b\n 1 , x \n 2.5 ,y\n", Form(), {"a": [1, 2.5], "b": ["x", "y"]}),
    "columns of spaces": ("a  b\n1  x\n22 y\n", Form(sep=" "), {"a": [1, 22], "b": ["x", "y"]}),
    "a separator beyond ASCII": ("a§b\n1§x\n2§y\n", Form(sep="§"), {"a": [1, 2], "b": ["x", "y"]}),
    "a separator at each line's end": ("a,b,\n1,x,\n2,y,\n", Form(), {"b": ["x", "y"], "column_3": [None, None]}),
    "a short line": ("a,b\n1,x\n2\n3,z\n", Form(), "line 3: expected 2 fields"),
    "a long line": ("a,b\n1,x\n2,y,\n", Form(), "line 3: expected 2 fields, as the header has, found 3"),
    "a short line below a cell of two lines": ('a,b\n1,"x\ny"\n2\n', Form(), "line 4: expected 2 fields"),
    "a title above the header": ("Sales of 2023\na,b\n1,x\n2,y\n", Form(), "expected 1 fields"),
    "two columns of one name": ("a,a\n1,2\n", Form(), "several columns are called 'a'"),
    "one column": ("a\n1\n2\n", Form(), {"a": [1, 2]}),
    "one column with blank lines": ("a\n1\n\n2\n", Form(), {"a": [1, 2]}),
    "thousands of columns": (f"{WIDE}\n{WIDE.replace('c', '')}\n", Form(), {"c0": [0], "c2999": [2999]}),
    "a long cell": (f"a,b\n1,{LONG}\n2,y\n", Form(), {"a": [1, 2], "b": [LONG, "y"]}),
    "a zero byte": ("a,b\n1,x\0\n2,y\n", Form(), {"a": [1, 2], "b": ["x\0", "y"]}),
    "zero bytes in place of text": (b"\0" * 100, Form(), "no rows below the header"),
    "UTF-16 of the other order": ("a,b\n1,ü\n".encode("utf-16-be"), Form(encoding="utf-16-be"), {"a": [1], "b": ["ü"]}),
    "UTF-16 with quotes": ('a,b\n1,"x,ü"\n'.encode("utf-16"), Form(), {"a": [1], "b": ["x,ü"]}),
    "a named encoding": ("a,b\n1,ж\n".encode("koi8-r"), Form(encoding="koi8-r"), {"a": [1], "b": ["ж"]}),
    "Japanese": ("a,b\n1,表\n".encode("shift-jis"), Form(encoding="shift-jis"), {"a": [1], "b": ["表"]}),
    "the wrong encoding": ("a,b\n1,ü\n".encode("latin-1"), Form(encoding="utf-8"), "in utf-8"),
    "an encoding cut short": ("a,b\n1,ü".encode()[:-1], Form(encoding="utf-8"), "in utf-8"),
    "whole numbers with zeros in front": ("a,b\n007,x\n010,y\n", Form(), {"a": [7, 10]}),
    "signs": ("a,b\n+1,-2\n-1,+2.5\n", Form(), {"a": [1, -1], "b": [-2, 2.5]}),
    "the minus of typesetters": ("a\n\u22125\n3\n", Form(), {"a": [-5, 3]}),
    "exponents": ("a\n1e3\n2.5E-2\n-1e+1\n", Form(), {"a": [1000, 0.025, -10]}),
    "exponents and decimal commas": ("a;b\n1,5e3;1\n2;1\n", Form(), {"a": [1500, 2]}),
    "too large a number": ("a,b\n1e999,1\n2,1\n", Form(), "line 2, column 'a': '1e999' is not a finite number"),
    "points for thousands alone": ("a;b\n1.000.000;1,5\n2.000;2,5\n", Form(), {"a": [1000000, 2000], "b": [1.5, 2.5]}),
    "a negative price": ('a\n"-$1,498.50"\n$-2\n', Form(), {"a": [-1498.5, -2]}),
    "names of missing numbers": ("a,b\nNAN,1\n5,2\n NA ,3\n", Form(), {"a": [None, 5, None]}),
    "dates of one kind and a missing one": (
        'a,b\n2024-01-02,1\nNA,2\n" ",3\n2024-01-03,4\n',
        Form(),
        {"a": ["2024-01-02", None, None, "2024-01-03"]},
    ),
    "dates without zeros": ("a,b\n2024-1-2,1\n2024-11-12,2\n", Form(), {"a": ["2024-01-02", "2024-11-12"]}),
    "dates before 1970": ("a,b\n1905-03-04,1\n0999-12-31,2\n", Form(), {"a": ["1905-03-04", "0999-12-31"]}),
    "a day that does not exist": (
        "a\n" + "".join(f"2024-03-{day}\n" for day in range(10, 29)) + "2024-02-30\n",
        Form(),
        "line 21, column 'a': '2024-02-30' is not a date such as 2024-12-31",
    ),
    "truth values": ("a,b\nTRUE,1\nfalse,2\n", Form(), {"a": [1, 0]}),
    "a column without a cell": ("a,b\n,1\n,2\n", Form(), {"a": [None, None], "b": [1, 2]}),
}  # fmt: skip


def plain(column: Any) -> list[Any]:
    """Return the values of a column, dates as text, None for NaN and NaT."""
    if column.dtype.kind == "M":
        return [None if np.isnat(value) else str(value.astype("datetime64[D]")) for value in column]
    return [None if value != value else value for value in column.tolist()]


def assert_outcome(path: Path, form: Form, expected: dict[str, list[Any]] | str) -> None:
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected) as caught:
            read_table(path, form=form)
        assert path.name in str(caught.value)
        return
    table = read_table(path, form=form)
    assert {name: plain(table[name]) for name in expected} == expected


@pytest.mark.parametrize("case", CORPUS)
def test_an_odd_file(case: str, tmp_path: Path) -> None:
    content, form, expected = CORPUS[case]
    content = content if isinstance(content, bytes) else content.encode()
    path = tmp_path / "odd.csv"
    path.write_bytes(content)
    assert_outcome(path, form, expected)
    path = tmp_path / "odd.csv.gz"
    path.write_bytes(gzip.compress(content))
    assert_outcome(path, form, expected)


CELLS = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=12),
    st.sampled_from(["a,b", "1;2", 'the "x"', "two\nlines", " spaces ", "5|6\t7", "-1.5"]),
)
NUMBERS = st.one_of(st.none(), st.integers(-(10**6), 10**6), st.floats(-1e9, 1e9).map(lambda value: round(value, 4)))


@st.composite
def written_tables(draw: Callable[..., Any]) -> tuple[bytes, Form, list[Any], list[str]]:
    """Return a file with a column of words and one of numbers in a random dialect, its form, and both columns."""
    rows = draw(st.lists(st.tuples(CELLS, NUMBERS), min_size=1, max_size=20))
    words, numbers = [f"<{word}>" for word, _ in rows], [number for _, number in rows]
    sep, decimal = draw(st.sampled_from([(",", "."), (";", ","), (";", "."), ("\t", "."), ("|", ","), ("~", ".")]))
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]))
    stream = io.StringIO(newline="")
    csv.writer(
        stream,
        delimiter=sep,
        quoting=draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])),
        lineterminator=draw(st.sampled_from(["\n", "\r\n"])),
    ).writerows(
        [
            ("words", "numbers"),
            *(
                (word, "" if number is None else f"{number}".replace(".", decimal))
                for word, number in zip(words, numbers, strict=True)
            ),
        ]
    )
    text = stream.getvalue()
    content = (text if draw(st.booleans()) else text.rstrip("\r\n")).encode(encoding)
    return content, Form(sep=sep, decimal=decimal, encoding="utf-16" if encoding == "utf-16" else None), numbers, words


@settings(derandomize=True, deadline=None, max_examples=200)
@given(written_tables(), st.booleans())
def test_a_written_table_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, written: tuple[bytes, Form, list[Any], list[str]], small: bool
) -> None:
    content, form, numbers, words = written
    path = tmp_path_factory.getbasetemp() / "written.csv"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        if small:
            # Rows that the csv module reads come in pieces of two.
            patch.setattr(textfiles, "_ROWS", 2)
        table = read_table(path, form=form)
    assert plain(table["words"]) == words
    assert plain(table["numbers"]) == numbers


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text('ab1,\n\r" ', max_size=40))
def test_arrow_and_the_csv_module_read_the_same(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.getbasetemp() / "both.csv"
    path.write_bytes(b"x,y\n" + text.encode())

    def outcome() -> Any:
        try:
            return {name: plain(column) for name, column in read_table(path, form=Form(sep=",", decimal=".")).items()}
        except DataError as error:
            return str(error)

    first = outcome()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(textfiles, "_is_plain", lambda *arguments: False)
        second = outcome()
    # Two odd quotes may look like one whole field; only the csv module refuses them.
    assert second == first or "Error:" in second


def test_a_line_too_long_for_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A block has 16 times the longest line of the sample, in 31 bits.
    assert 16 * textfiles._LONGEST < 2**31
    monkeypatch.setattr(textfiles, "_LONGEST", 1000)
    path = write(tmp_path / "a.csv", b"a,b\n1," + b"x" * 995 + b"\n2," + b"y" * 2000)
    with pytest.raises(DataError, match=r"a\.csv: a line has 1,000 characters or more; a line break may be missing"):
        read_table(path)


def test_a_table_longer_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces end within rows, and the row of a mistake is counted over all of them."""
    monkeypatch.setattr(textfiles, "_BLOCK", 2**14)
    words = [f"w{i % 700}" for i in range(20_000)]
    lines = [f'{i / 8},"{word}\n",{i % 3}' for i, word in enumerate(words)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["a,b,y", *lines]))
    table = read_table(path, target="y")
    np.testing.assert_array_equal(table["a"], np.arange(20_000) / 8)
    assert table["b"].tolist() == words
    np.testing.assert_array_equal(table["y"], np.arange(20_000) % 3)
    path.write_text("\n".join(["a,b,y", *lines, "1,2", "x,w,1"]))
    with pytest.raises(DataError) as caught:
        read_table(path, target="y")
    assert "line 40003, column 'a': 'x'" in str(caught.value)
    assert "line 40002: expected 3 fields" in str(caught.value)


def test_a_text_file_is_read_without_pandas(tmp_path: Path) -> None:
    """Its import would take longer than the reading."""
    FRAME.to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "odd.csv").write_text('a, b\n1, "x"\n"$1,498", "y"\n')
    code = (
        "import sys; from fusemlp.datasets.load import load_data\n"
        "for name, target in (('a.csv', 'kind'), ('odd.csv', 'a')):\n"
        "    load_data(name, target=target)\n"
        "print('pandas' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


# Arrow's files and tables in memory

FRAME = pandas.DataFrame(
    {
        "size": [1.5, None, 2.5, 3.5] * 6,
        "count": pandas.array([1, None, 3, 4] * 6, dtype="Int64"),
        "colour": ["red", "green", None, "red"] * 6,
        "group": pandas.Categorical(["g", "h", None, "g"] * 6),
        "when": pandas.to_datetime(["2024-01-02 00:00", None, "2024-03-05 12:30", "2023-01-01 00:00"] * 6),
        "flag": [True, False, None, True] * 6,
        "kind": ["p", "q", "p", None] * 6,
    },
    index=pandas.Index(range(100, 124), name="row"),
)


def to_polars(frame: pandas.DataFrame) -> Any:
    polars = pytest.importorskip("polars")
    return polars.from_arrow(pyarrow.Table.from_pandas(frame, preserve_index=False))


def write_excel(path: Path, *sheets: list[list[Any]]) -> Path:
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for index, rows in enumerate(sheets):
        sheet = book.create_sheet(f"sheet {index}")
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def to_excel(path: Path) -> Path:
    rows = [[None if cell is pandas.NA or cell != cell else cell for cell in row] for row in FRAME.values.tolist()]
    return write_excel(path, [list(FRAME.columns), *rows])


FORMS: dict[str, Callable[[Path], Any]] = {
    "pandas": lambda folder: FRAME,
    "pandas with Arrow's types": lambda folder: FRAME.convert_dtypes(dtype_backend="pyarrow"),
    "polars": lambda folder: to_polars(FRAME),
    "an Arrow table": lambda folder: pyarrow.Table.from_pandas(FRAME, preserve_index=False),
    "a record batch": lambda folder: pyarrow.RecordBatch.from_pandas(FRAME, preserve_index=False),
    "a stream of batches": lambda folder: pyarrow.Table.from_pandas(FRAME, preserve_index=False).to_reader(5),
    "parquet": lambda folder: FRAME.to_parquet(folder / "a.parquet") or folder / "a.parquet",
    "parquet in row groups": lambda folder: (
        parquet.write_table(pyarrow.Table.from_pandas(FRAME), folder / "b.parquet", row_group_size=5)
        or folder / "b.parquet"
    ),
    "feather": lambda folder: (
        feather.write_feather(pyarrow.Table.from_pandas(FRAME), folder / "a.feather") or folder / "a.feather"
    ),
    "arrow": lambda folder: (
        feather.write_feather(FRAME.reset_index(drop=True), folder / "a.arrow", compression="uncompressed")
        or str(folder / "a.arrow")
    ),
    "Excel": lambda folder: to_excel(folder / "a.xlsx"),
}


def test_text_with_the_marks_of_numbers_is_numbers_in_a_frame_too() -> None:
    frame = pandas.DataFrame(
        {
            "price": ["$1,498", "$900", None, "$2,000"] * 6,
            "share": ["12%", "5%", "0.5%", "40%"] * 6,
            "zip": ["00123", "99999", "10115", "00001"] * 6,
            "code": ["$1", "a", "b", "c"] * 6,
            "y": ["p", "q"] * 12,
        }
    )
    data = load_data(frame, target="y")
    assert {role.name: role.kind for role in data.roles} == {
        **{"price": "number", "share": "number", "zip": "words", "code": "words"},
        "y": "target",
    }
    np.testing.assert_array_equal(data.X[:4, 0], [1498.0, 900.0, np.nan, 2000.0])
    np.testing.assert_allclose(data.X[:4, 1], [0.12, 0.05, 0.005, 0.4], rtol=2**-52)
    words = load_data(frame, target="y", columns=ColumnChoices(categorical=["share"]))
    assert {role.name: role.kind for role in words.roles}["share"] == "words"


@pytest.mark.parametrize("form", FORMS)
def test_a_table_means_the_same_in_every_form(form: str, tmp_path: Path) -> None:
    FRAME.to_csv(tmp_path / "a.csv", index=False)
    columns = ColumnChoices(keep=list(FRAME.columns))
    expected = load_data(tmp_path / "a.csv", target="kind", columns=columns)
    dataset = load_data(FORMS[form](tmp_path), target="kind", columns=columns)
    assert dataset.feature_names == expected.feature_names
    assert dataset.categories == expected.categories
    np.testing.assert_array_equal(dataset.X, expected.X)
    assert dataset.y.tolist() == expected.y.tolist()
    made = Preprocessor.fit(expected, np.arange(18))
    notes: list[str] = []
    X, y = load_labelled(FORMS[form](tmp_path), made, notes=notes)
    np.testing.assert_array_equal(X, expected.X)
    assert y.tolist() == expected.y.tolist()
    assert "6 of 24 rows have no 'kind' and are left out" in notes
    new = load_features(FORMS[form](tmp_path), made)
    np.testing.assert_array_equal(new[np.arange(24) % 4 != 3], expected.X)


def test_other_values_in_memory(tmp_path: Path) -> None:
    mixed = pandas.DataFrame({"a": [1, "x", None], "y": [1, 2, 3]})
    assert read_table(as_frame(mixed))["a"].tolist() == ["1", "x", ""]
    assert load_data(mixed, target="y").name == "DataFrame"
    for wrong in ([[1, 2], [3, 4]], np.ones((2, 2)), 3):
        with pytest.raises(ArgumentTypeError, match=r"expected a table .* a name or a path, got"):
            load_data(wrong, target="y")
    with pytest.raises(DataError, match="DataFrame: several columns are called 'a'"):
        load_data(pandas.DataFrame([[1, 2, 3]], columns=["a", "a", "y"]), target="y")
    with pytest.raises(DataError, match="DataFrame: say which column is the target; the columns are 'a', 'y'"):
        load_data(mixed)
    with pytest.raises(DataError, match="DataFrame: there is no target column 'z'"):
        load_data(mixed, target="z")
    with pytest.raises(DataError, match="DataFrame, row 1, column 'a': inf is not a finite number"):
        load_data(pandas.DataFrame({"a": [1.0, math.inf], "y": [1, 2]}), target="y")
    with pytest.raises(DataError, match="column 'a': expected numbers or words, found Arrow's type struct"):
        load_data(pandas.DataFrame({"a": [{"b": 1}, {"b": 2}], "y": [1, 2]}), target="y")
    with pytest.raises(DataError, match=r"a\.feather: it cannot be read as a feather file"):
        read_table(write(tmp_path / "a.feather", b"FEA1 and more"))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_excel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        ["size", None, "when", "flag", "price"],
        [1, "x", datetime.datetime(2024, 1, 2, 3, 30), True, "$1,498"],
        [None] * 5,
        [2.5, "#N/A", datetime.date(2023, 4, 5), False, 7],
    ]
    path = write_excel(tmp_path / "a.xlsx", rows, [["other"], [1]])
    notes: list[str] = []
    table = read_table(path, notes=notes)
    assert notes == ["a.xlsx: the sheet 'sheet 0' of 2"]
    assert {name: plain(column) for name, column in table.items()} == {
        "size": [1, 2.5],
        "column_2": ["x", ""],
        "when": ["2024-01-02", "2023-04-05"],
        "flag": [1, 0],
        "price": [1498, 7],
    }
    bare = write_excel(tmp_path / "bare.xlsx", [[1, "x"], [2, "y"]])
    assert read_table(bare, form=Form(header=False))["column_1"].tolist() == [1, 2]
    wide = write_excel(tmp_path / "wide.xlsx", [["a", "b"], [1, 2], [None], [3, 4, 5]])
    with pytest.raises(DataError, match=r"wide\.xlsx, line 4: expected 2 fields, as the header has, found 3"):
        read_table(wide)
    with pytest.raises(DataError, match=r"cut\.xlsx: it cannot be read as an xlsx file"):
        read_table(write(tmp_path / "cut.xlsx", path.read_bytes()[:2000]))
    with pytest.raises(DataError, match="found an empty file"):
        read_table(write_excel(tmp_path / "empty.xlsx", []))
    short = with_part(path, SHEET, lambda xml: re.sub(b'<dimension ref="[^"]*"', b'<dimension ref="A1:B2"', xml))
    assert list(read_table(write(tmp_path / "short.xlsx", short))) == list(table)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(DataError, match=r"a\.xlsx: Excel files need openpyxl: pip install openpyxl"):
        read_table(path)


SHEET = "xl/worksheets/sheet1.xml"
LAUGHS = b"".join(b'<!ENTITY e%d "%s">' % (i, b"&e%d;" % (i - 1) * 10 if i else b"ha") for i in range(11))
ROWS = b"<sheetData>"
# Changes of a part of a workbook, and the message.
DAMAGED_EXCEL: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "a sheet cut short": (SHEET, lambda xml: xml[: len(xml) // 2], "ParseError|SyntaxError"),
    "no sheet": (SHEET, lambda xml: None, "no sheet of cells"),
    "an empty list of sheets": ("xl/workbook.xml", lambda xml: b"", "ParseError|SyntaxError"),
    "a number that is none": (SHEET, lambda xml: xml.replace(b"<v>3</v>", b"<v>3x</v>"), "ValueError"),
    "a word that is not in the list": (SHEET, lambda xml: xml.replace(b't="n"', b't="s"'), "IndexError"),
    "colours": ("xl/styles.xml", lambda xml: xml.replace(b'Id="0"', b'Id="9999999999"'), "OverflowError"),
    "a billion laughs": (
        SHEET,
        lambda xml: b"<!DOCTYPE l [%s]>" % LAUGHS + xml.replace(ROWS, ROWS + b"<row><c><v>&e10;</v></c></row>"),
        "cannot be read as an xlsx file",
    ),
    "a bomb": (SHEET, lambda xml: xml.replace(ROWS, ROWS + b" " * 2**27), "would unpack from"),
    "a row beyond the last": (SHEET, lambda xml: xml.replace(b'r="2"', b'r="99999999999"'), "no rows below"),
}


def with_part(path: Path, name: str, change: Callable[[bytes], bytes | None]) -> bytes:
    """Return a zip archive with another content of one of its files; None for none."""
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            content = change(old.read(part)) if part == name else old.read(part)
            if content is not None:
                new.writestr(part, content)
    return packed.getvalue()


@pytest.mark.parametrize("case", DAMAGED_EXCEL)
def test_a_damaged_or_hostile_workbook(case: str, tmp_path: Path) -> None:
    part, change, message = DAMAGED_EXCEL[case]
    path = write_excel(tmp_path / "a.xlsx", [["a", "b"], [1, 2], [3, 4]])
    path.write_bytes(with_part(path, part, change))
    with pytest.raises(DataError, match=rf"a\.xlsx.*(?:{message})"):
        read_table(path)


# The flags and the method in the headers of an archive's file, and the message.
LOCKED = {
    "a password": (1, 8, "password required"),
    "a strong cipher": (0x41, 8, "strong encryption"),
    "a compression that Python lacks": (0, 99, "not supported"),
}


@pytest.mark.parametrize("case", LOCKED)
@pytest.mark.parametrize("name", ["a.csv.zip", "a.xlsx"])
def test_a_locked_archive(case: str, name: str, tmp_path: Path) -> None:
    flags, method, message = LOCKED[case]
    path = tmp_path / name
    if path.suffix == ".xlsx":
        write_excel(path, [["a"], [1]])
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.csv", "a\n1\n")
    content = bytearray(path.read_bytes())
    # Signature, version (a number more in the directory), flags, method.
    for header in re.finditer(rb"PK(?:\x03\x04|\x01\x02..)..", bytes(content), re.DOTALL):
        content[header.end()], content[header.end() + 2] = flags, method
    with pytest.raises(DataError, match=rf"{re.escape(name)}.*{message}"):
        read_table(write(path, bytes(content)))


# Memory


def many_words(rows: int = 3000) -> Dataset:
    generator = np.random.default_rng(0)
    X = np.column_stack([generator.normal(size=rows), np.arange(rows) % 1000, np.arange(rows) % 30]).astype(float)
    words = tuple(f"w{i}" for i in range(1000))
    names = ("size", "town", "shop")
    return Dataset("made", X, np.arange(rows) % 2, "classification", names, categories=(None, words, words[:30]))


def test_memory_is_planned_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Preprocessor.fit(many_words(), np.arange(3000))
    assert made.width == 1 + 257 + 30
    monkeypatch.setattr(rows_module, "available_memory", lambda: 4 * made.width * 1000)
    check_memory(made, 1000, "fp32")
    with pytest.raises(DataError, match=r"1001 rows have 288 inputs, 257 of 'town', 30 of 'shop', 1 of 'size'.*--drop"):
        check_memory(made, 1001, "fp32")
    with pytest.raises(DataError, match="of memory are free"):
        check_memory(made, 1000, "fp64")
    monkeypatch.setattr(rows_module, "available_memory", lambda: None)
    check_memory(made, 10**12, "fp64")


def test_the_command_names_the_column_that_takes_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"{i % 9},w{i % 50},{i % 2}" for i in range(1000)]
    path = write(tmp_path / "a.csv", "\n".join(["a,town,y", *lines]).encode())
    monkeypatch.setattr(rows_module, "available_memory", lambda: 10_000)
    assert run("train", path, "--target", "y", "--out", tmp_path / "run") == 1
    assert "50 of 'town'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
