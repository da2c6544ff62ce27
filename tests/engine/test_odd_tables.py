"""Odd files and tables in memory, each with its outcome."""

import datetime
import decimal
import gzip
import importlib
import io
import math
import re
import subprocess
import sys
import zipfile

import numpy as np
import pandas
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import feather, parquet

from fusemlp.cli.options import TextOptions
from fusemlp.datasets import rows as rows_module
from fusemlp.datasets import textfiles
from fusemlp.datasets.load import ColumnChoices, Dataset, form_like, load_data, load_features, load_labelled
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import check_memory
from fusemlp.datasets.tables import as_frame, read_table
from fusemlp.datasets.textfiles import Form
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError
from make import refusal

WIDE = ",".join(f"c{i}" for i in range(3000))
LONG = "x" * 100_000

# The content of a file, its columns (None for a missing cell) or the message, and a form that is said.
CORPUS = {
    "no line break at the end": ("a,b\n1,x\n2,y", {"a": [1, 2], "b": ["x", "y"]}),
    "a header alone, without a line break": ("a,b", "no rows below the header"),
    "a header alone": ("a,b\n", "no rows below the header"),
    "one row without a header or a line break": ("1,x", {"column_1": [1], "column_2": ["x"]}, Form(header=False)),
    "blank lines alone": ("\n\n\n", "found an empty file"),
    "a byte order mark alone": ("\ufeff", "found an empty file"),
    "line breaks of Windows": ("a,b\r\n1,x\r\n2,y\r\n", {"a": [1, 2], "b": ["x", "y"]}),
    "mixed line breaks": ("a,b\r\n1,x\n2,y\r3,z\n", {"a": [1, 2, 3], "b": ["x", "y", "z"]}),
    "line breaks in cells": ('a,b\n1,"x\ny"\n2,"z\r\n"\n', {"a": [1, 2], "b": ["x\ny", "z"]}),
    "a line break in the header": ('"a\nb",c\n1,2\n', {"a\nb": [1], "c": [2]}),
    "separators in cells": ('a,b\n1,"x,y"\n2,"z;"\n', {"a": [1, 2], "b": ["x,y", "z;"]}),
    "quotes in quotes": ('a,b\n1,"the ""x"""\n2,""""\n', {"a": [1, 2], "b": ['the "x"', '"']}),
    "a form that is all given": (
        "1,5:x\n2,5:y\n",
        {"column_1": [1.5, 2.5], "column_2": ["x", "y"]},
        Form(sep=":", decimal=",", encoding="ascii", header=False)
    ),
    "tabs by name": ("a\tb\n1\t2\n", {"a": [1], "b": [2]}, Form(sep="tab")),
    "letters that the encoding lacks": ("a\nü\n", "in ascii", Form(encoding="ascii")),
    "nothing, without a header": ("", "found an empty file", Form(header=False)),
    "inches": ('a,b\n1,5" pipe\n2,6" pipe\n', {"a": [1, 2], "b": ['5" pipe', '6" pipe']}),
    "one inch": ('a,b\n1,5"\n2,6\n', {"a": [1, 2], "b": ['5"', "6"]}),
    "everything in quotes": ('"a","b"\n"1","x"\n"2","y"\n', {"a": [1, 2], "b": ["x", "y"]}),
    "empty quotes": ('a,b\n"",x\n2,""\n', {"a": [None, 2], "b": ["x", ""]}),
    "a quote without an end": ('a,b\n1,"x\n2,y\n3,z\n', "expected a csv file .*a quote has no end; close it"),
    "half a character": ("a,b\n1,\u8a9e".encode()[:-1], "in utf-8 .*end of data", Form(encoding="utf-8")),
    "text after a quote's end": ('a,b\n1,"x"y\n2,z\n', "expected a csv file"),
    "a space before a quote": ('a, b\n1, "x, y"\n2, "z"\n', {"a": [1, 2], "b": ["x, y", "z"]}),
    "spaces around cells": ("a , b\n 1 , x \n 2.5 ,y\n", {"a": [1, 2.5], "b": ["x", "y"]}),
    "columns of spaces": ("a  b\n1  x\n22 y\n", {"a": [1, 22], "b": ["x", "y"]}, Form(sep=" ")),
    "a separator beyond ASCII": ("a§b\n1§x\n2§y\n", {"a": [1, 2], "b": ["x", "y"]}, Form(sep="§")),
    "a separator at each line's end": ("a,b,\n1,x,\n2,y,\n", {"b": ["x", "y"], "column_3": [None, None]}),
    "a short line": ("a,b\n1,x\n2\n3,z\n", "line 3: expected 2 fields"),
    "a long line": ("a,b\n1,x\n2,y,\n", "line 3: expected 2 fields, as the header has, found 3"),
    "a short line below a cell of two lines": ('a,b\n1,"x\ny"\n2\n', "line 4: expected 2 fields"),
    "a title above the header": ("Sales of 2023\na,b\n1,x\n2,y\n", "expected 1 fields"),
    "two columns of one name": ("a,a\n1,2\n", "several columns are called 'a'"),
    "one column": ("a\n1\n2\n", {"a": [1, 2]}),
    "one column with blank lines": ("a\n1\n\n2\n", {"a": [1, 2]}),
    "thousands of columns": (f"{WIDE}\n{WIDE.replace('c', '')}\n", {"c0": [0], "c2999": [2999]}),
    "a long cell": (f"a,b\n1,{LONG}\n2,y\n", {"a": [1, 2], "b": [LONG, "y"]}),
    "a zero byte": ("a,b\n1,x\0\n2,y\n", {"a": [1, 2], "b": ["x\0", "y"]}),
    "zero bytes in place of text": (b"\0" * 100, "the first line has zero bytes"),
    "UTF-16 without a mark": ("a,b\n1,x\n".encode("utf-16-le"), "give --encoding utf-16-le"),
    "UTF-16 of the other order": ("a,b\n1,ü\n".encode("utf-16-be"), {"a": [1], "b": ["ü"]}, Form(encoding="utf-16-be")),
    "UTF-16 with quotes": ('a,b\n1,"x,ü"\n'.encode("utf-16"), {"a": [1], "b": ["x,ü"]}),
    "a named encoding": ("a,b\n1,ж\n".encode("koi8-r"), {"a": [1], "b": ["ж"]}, Form(encoding="koi8-r")),
    "Japanese": ("a,b\n1,表\n".encode("shift-jis"), {"a": [1], "b": ["表"]}, Form(encoding="shift-jis")),
    "the wrong encoding": ("a,b\n1,ü\n".encode("latin-1"), "in utf-8", Form(encoding="utf-8")),
    "an encoding cut short": ("a,b\n1,ü".encode()[:-1], "in utf-8", Form(encoding="utf-8")),
    "whole numbers with zeros in front": ("a,b\n007,x\n010,y\n", {"a": [7, 10]}),
    "signs": ("a,b\n+1,-2\n-1,+2.5\n", {"a": [1, -1], "b": [-2, 2.5]}),
    "the minus of typesetters": ("a\n\u22125\n3\n", {"a": [-5, 3]}),
    "exponents": ("a\n1e3\n2.5E-2\n-1e+1\n", {"a": [1000, 0.025, -10]}),
    "exponents and decimal commas": ("a;b\n1,5e3;1\n2;1\n", {"a": [1500, 2]}),
    "too large a number": ("a,b\n1e999,1\n2,1\n", "line 2, column 'a': '1e999' is not a finite number"),
    "points for thousands alone": ("a;b\n1.000.000;1,5\n2.000;2,5\n", {"a": [1000000, 2000], "b": [1.5, 2.5]}),
    "a negative price": ('a\n"-$1,498.50"\n$-2\n', {"a": [-1498.5, -2]}),
    "dates of one kind and a missing one": (
        'a,b\n2024-01-02,1\nNA,2\n" ",3\n2024-01-03,4\n',
        {"a": ["2024-01-02", None, None, "2024-01-03"]}
    ),
    "dates without zeros": ("a,b\n2024-1-2,1\n2024-11-12,2\n", {"a": ["2024-01-02", "2024-11-12"]}),
    "dates before 1970": ("a,b\n1905-03-04,1\n0999-12-31,2\n", {"a": ["1905-03-04", "0999-12-31"]}),
    "a day that does not exist": (
        "a\n" + "".join(f"2024-03-{day}\n" for day in range(10, 29)) + "2024-02-30\n",
        "line 21, column 'a': '2024-02-30' is not a date such as 2024-12-31"
    ),
    "semicolons and decimal commas": ("a;b\n1,5;x\n-2,25;y\n", {"a": [1.5, -2.25], "b": ["x", "y"]}),
    "a decimal mark of its own": ("a;b\n632.96;65488,71\n1.5;2,25\n", {"a": [632.96, 1.5], "b": [65488.71, 2.25]}),
    "dates in two forms": ("a;b\n31.12.2024;1\n2024-01-02;2\n", {"a": ["2024-12-31", "2024-01-02"]}),
    "American and ISO dates": ("a,b\n2024-01-02,1\n12/31/2024,2\n", {"a": ["2024-01-02", "2024-12-31"]}),
    "semicolons and decimal points": ("a;b\n1.5;x\n2.25;y\n", {"a": [1.5, 2.25], "b": ["x", "y"]}),
    "semicolons and thousands of three digits": ("a;b\n1.234,5;x\n12;y\n", {"a": [1234.5, 12], "b": ["x", "y"]}),
    "semicolons and millions": ("a;b\n1.234.567;x\n12;y\n", {"a": [1234567, 12], "b": ["x", "y"]}),
    "semicolons and three decimals": ("a;b\n1,234;x\n12,500;y\n", {"a": [1.234, 12.5], "b": ["x", "y"]}),
    "quoted decimal commas": ('a,b\n"1,5",x\n"2,75",y\n', {"a": [1.5, 2.75], "b": ["x", "y"]}),
    "quoted thousands": ('a,b\n"1,498",x\n"2,775,000",y\n', {"a": [1498, 2775000], "b": ["x", "y"]}),
    "bars": ("a|b, c\n1|x, y\n2|z, y\n", {"a": [1, 2], "b, c": ["x, y", "z, y"]}),
    "tabs": ("a\tb\n1\tx y\n2\tz\n", {"a": [1, 2], "b": ["x y", "z"]}),
    "a byte order mark": ("\ufeffa,b\n1,ü\n", {"a": [1], "b": ["ü"]}),
    "latin-1": ("a,b\n1,Zürich\n".encode("latin-1"), {"a": [1], "b": ["Zürich"]}),
    "Windows": ("a,b\n1,€ 5 to 6 km\n".encode("cp1252"), {"a": [1], "b": ["€ 5 to 6 km"]}),
    "bytes that no code page has": (b"a,b\n1,\x81\n", {"a": [1], "b": ["\x81"]}),
    "utf-16": ("a,b\n1,ü\n".encode("utf-16"), {"a": [1], "b": ["ü"]}),
    "utf-32": ("a,b\n1,ü\n".encode("utf-32"), {"a": [1], "b": ["ü"]}),
    "utf-32 of the other order": ("\ufeffa,b\n1,ü\n".encode("utf-32-be"), {"a": [1], "b": ["ü"]}),
    "carriage returns": ("a,b\r1,x\r2,y\r", {"a": [1, 2], "b": ["x", "y"]}),
    "spaces after the separators": ('a, b, c\n1, "x, y", 2\n3, z, 4\n', {"a": [1, 3], "b": ["x, y", "z"], "c": [2, 4]}),
    "blank lines": ("a,b\n\n1,x\n\n2,y\n\n", {"a": [1, 2], "b": ["x", "y"]}),
    "a column without a name": (",b\n7,x\n9,y\n", {"column_1": [7, 9], "b": ["x", "y"]}),
    "currency": ("a,b\n$5,€ 2.50\n-$7,3 €\n$-8,USD 4\n", {"a": [5, -7, -8], "b": [2.5, 3, 4]}),
    "percent": ("a\n50%\n12.5 %\n-3%\n", {"a": [0.5, 0.125, -0.03]}),
    "spaces and apostrophes": ("a,b\n1 000,1'000.5\n2\u202f500,3\n", {"a": [1000, 2500], "b": [1000.5, 3]}),
    "truth values": ("a,b\ntrue,1\nFALSE,2\n,3\n", {"a": [1, 0, None], "b": [1, 2, 3]}),
    "missing numbers": (
        "a,b\n1,1\n,1\nNA,1\n NA ,1\nNAN,1\nN/A,1\nNaN,1\nnan,1\nnull,1\nNone,1\n?,1\n2,1\n",
        {"a": [1, *[None] * 10, 2], "b": [1] * 12}
    ),
    "missing first": ("a,b\n,\n,\n1,x\n", {"a": [None, None, 1], "b": ["", "", "x"]}),
    "no value at all": ("a,b\n,1\nNA,2\n", {"a": [None, None], "b": [1, 2]}),
    "words and numbers": ("a\nx1\n5\nx2\n", {"a": ["x1", "5", "x2"]}),
    "few numbers and a word": ("a\n" + "4\n6\n8\n" * 9 + "rotary\n", {"a": [*["4", "6", "8"] * 9, "rotary"]}),
    "ISO dates": ("a\n2024-12-31\n\n2024-01-02\nNA\n", {"a": ["2024-12-31", "2024-01-02", None]}),
    "ISO dates with times": (
        "a\n2024-12-31T23:30:00\n2024-01-02 01:00\n2024-01-02T01:00:00+02:00\n",
        {"a": ["2024-12-31T23:30", "2024-01-02T01:00", "2024-01-01T23:00"]}
    ),
    "dates with points": ("a;b\n31.12.2024;1,5\n1.2.2024;2,5\n", {"a": ["2024-12-31", "2024-02-01"]}),
    "dates with points, all days below 13": ("a,b\n03.02.2024,1\n", {"a": ["2024-02-03"]}),
    "American dates": ("a,b\n12/31/2024,1\n2/1/2024,2\n", {"a": ["2024-12-31", "2024-02-01"]}),
    "American times": (
        "a,b\n12/31/2024 3:05 PM,1\n2/1/2024 12:00 AM,2\n",
        {"a": ["2024-12-31T15:05", "2024-02-01"]}
    ),
    "European dates with slashes": ("a,b\n31/12/2024,1\n2/1/2024,2\n", {"a": ["2024-12-31", "2024-01-02"]}),
}  # fmt: skip


def write(path, content):
    path.write_bytes(content)
    return path


def plain(column):
    """Return the values of a column, times as text without midnight's zeros, None for NaN and NaT."""
    if column.dtype.kind == "M":
        texts = [str(value.astype("datetime64[m]")).removesuffix("T00:00") for value in column]
        return [None if text == "NaT" else text for text in texts]
    return [None if value != value else value for value in column.tolist()]


def assert_outcome(path, expected, form=None):
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected) as caught:
            read_table(path, form=form)
        assert path.name in str(caught.value)
    else:
        table = read_table(path, form=form)
        assert {name: plain(table[name]) for name in expected} == expected


@pytest.mark.parametrize("case", CORPUS)
def test_an_odd_file(case, tmp_path):
    content, *outcome = CORPUS[case]
    content = content if isinstance(content, bytes) else content.encode()
    assert_outcome(write(tmp_path / "odd.csv", content), *outcome)
    assert_outcome(write(tmp_path / "odd.csv.gz", gzip.compress(content)), *outcome)


@settings(derandomize=True, deadline=None, max_examples=200)
@given(st.text('ab1,\n\r" ', max_size=40))
def test_arrow_and_the_csv_module_read_the_same(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "both.csv"
    path.write_bytes(b"x,y\n" + text.encode())

    def outcome():
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


def test_a_line_too_long_for_a_block(tmp_path, monkeypatch):
    # A block has 16 times the longest line of the sample, in 31 bits.
    assert 16 * textfiles._LONGEST < 2**31
    monkeypatch.setattr(textfiles, "_LONGEST", 1000)
    path = write(tmp_path / "a.csv", b"a,b\n1," + b"x" * 995 + b"\n2," + b"y" * 2000)
    with pytest.raises(DataError, match=r"a\.csv: a line has 1,000 characters or more; a line break may be missing"):
        read_table(path)


def test_a_table_longer_than_a_piece(tmp_path, monkeypatch):
    """Pieces end within rows, and the row of a mistake is counted over all of them."""
    monkeypatch.setattr(textfiles, "_BLOCK", 2**14)
    words = [f"w{i % 700}" for i in range(20_000)]
    lines = [f'{i / 8},"{word}\n",{i % 3}' for i, word in enumerate(words)]
    path = tmp_path / "a.csv"
    path.write_text("\n".join(["a,b,y", *lines]))
    table = read_table(path, targets=["y"])
    np.testing.assert_array_equal(table["a"], np.arange(20_000) / 8)
    assert table["b"].tolist() == words
    np.testing.assert_array_equal(table["y"], np.arange(20_000) % 3)
    path.write_text("\n".join(["a,b,y", *lines, "1,2", "x,w,1"]))
    with pytest.raises(DataError) as caught:
        read_table(path, targets=["y"])
    assert "line 40003, column 'a': 'x'" in str(caught.value)
    assert "line 40002: expected 3 fields" in str(caught.value)


def test_a_text_file_is_read_without_pandas(tmp_path):
    """Its import would take longer than the reading."""
    FRAME.to_csv(tmp_path / "a.csv", index=False)
    (tmp_path / "odd.csv").write_text('a, b\n1, "x"\n"$1,498", "y"\n')
    code = (
        "import sys; from fusemlp.datasets.load import load_data\n"
        "load_data('a.csv', target='kind'), load_data('odd.csv', target='a')\n"
        "print('pandas' in sys.modules)"
    )
    shown = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert shown.stdout == "False\n"


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


def write_excel(path, *sheets):
    openpyxl = pytest.importorskip("openpyxl")
    book = openpyxl.Workbook()
    book.remove(book.active)
    for index, rows in enumerate(sheets):
        sheet = book.create_sheet(f"sheet {index}")
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def to_excel(path):
    rows = [[None if cell is pandas.NA or cell != cell else cell for cell in row] for row in FRAME.values.tolist()]
    return write_excel(path, [list(FRAME.columns), *rows])


def saved(write, path, *arguments, **options):
    write(*arguments, path, **options)
    return path


ARROW = pyarrow.Table.from_pandas(FRAME, preserve_index=False)
FORMS = {
    "pandas": lambda folder: FRAME,
    "pandas with Arrow's types": lambda folder: FRAME.convert_dtypes(dtype_backend="pyarrow"),
    "polars": lambda folder: pytest.importorskip("polars").from_arrow(ARROW),
    "an Arrow table": lambda folder: ARROW,
    "a record batch": lambda folder: ARROW.to_batches()[0],
    "a stream of batches": lambda folder: ARROW.to_reader(5),
    "parquet": lambda folder: saved(FRAME.to_parquet, folder / "a.parquet"),
    "parquet in row groups": lambda folder: saved(parquet.write_table, folder / "b.parquet", ARROW, row_group_size=5),
    "feather": lambda folder: saved(feather.write_feather, folder / "a.feather", pyarrow.Table.from_pandas(FRAME)),
    "arrow": lambda folder: str(saved(feather.write_feather, folder / "a.arrow", ARROW, compression="uncompressed")),
    "Excel": lambda folder: to_excel(folder / "a.xlsx"),
}


def test_text_with_the_marks_of_numbers_is_numbers_in_a_frame_too():
    columns = {
        "price": ["$1,498", "$900", None, "$2,000"],
        "share": ["12%", "5%", "0.5%", "40%"],
        "zip": ["00123", "99999", "10115", "00001"],
        "code": ["$1", "a", "b", "c"],
        "y": ["p", "q", "p", "q"],
    }
    frame = pandas.DataFrame({name: 6 * values for name, values in columns.items()})
    data = load_data(frame, target="y")
    assert [role.kind for role in data.roles] == ["number", "number", "words", "words", "target"]
    np.testing.assert_array_equal(data.X[:4, 0], [1498.0, 900.0, np.nan, 2000.0])
    np.testing.assert_allclose(data.X[:4, 1], [0.12, 0.05, 0.005, 0.4], rtol=2**-52)
    words = load_data(frame, target="y", columns=ColumnChoices(categorical=["share"]))
    assert words.roles[1].kind == "words"


@pytest.mark.parametrize("form", FORMS)
def test_a_table_means_the_same_in_every_form(form, tmp_path):
    FRAME.to_csv(tmp_path / "a.csv", index=False)
    columns = ColumnChoices(keep=list(FRAME.columns))
    expected = load_data(tmp_path / "a.csv", target="kind", columns=columns)
    dataset = load_data(FORMS[form](tmp_path), target="kind", columns=columns)
    made, notes = Preprocessor.fit(expected, np.arange(18)), []
    assert (dataset.feature_names, dataset.categories) == (expected.feature_names, expected.categories)
    for X, y in ((dataset.X, dataset.y), load_labelled(FORMS[form](tmp_path), made, notes=notes)):
        np.testing.assert_array_equal(X, expected.X)
        assert y.tolist() == expected.y.tolist()
    assert "rows without 'kind', left out: 6 of 24" in notes
    new = load_features(FORMS[form](tmp_path), made)
    np.testing.assert_array_equal(new[np.arange(24) % 4 != 3], expected.X)


def test_other_values_in_memory(tmp_path):
    mixed = pandas.DataFrame({"a": [1, "x", None], "y": [1, 2, 3]})
    assert read_table(as_frame(mixed))["a"].tolist() == ["1", "x", ""]
    assert load_data(mixed, target="y").name == "DataFrame"
    for wrong in ([[1, 2], [3, 4]], np.ones((2, 2)), 3):
        with pytest.raises(ArgumentTypeError, match=r"expected a table .* a name or a path, got"):
            load_data(wrong, target="y")
    for table, target, message in (
        (pandas.DataFrame([[1, 2, 3]], columns=["a", "a", "y"]), "y", "DataFrame: several columns are called 'a'"),
        (mixed, None, "DataFrame: say which column is the target .--target COLUMN.; the columns are 'a', 'y'"),
        (mixed, "z", "DataFrame: there is no target column 'z'"),
        (pandas.DataFrame({"a": [1, 2], "y": [1.0, math.inf]}), "y", "row 1, column 'y': inf is not a finite number"),
        (
            pandas.DataFrame({"a": [{"b": 1}, {}], "y": [1, 2]}),
            "y",
            "expected numbers or words, found Arrow's type struct",
        ),
    ):
        with pytest.raises(DataError, match=message):
            load_data(table, target=target)
    with pytest.raises(DataError, match=r"a\.feather: it cannot be read as a feather file"):
        read_table(write(tmp_path / "a.feather", b"FEA1 and more"))


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_durations_and_times_of_day_are_seconds(library):
    frame = pytest.importorskip(library).DataFrame(
        {"wait": [datetime.timedelta(hours=1, microseconds=5), None], "at": [datetime.time(1, 30, 0, 5), None]}
    )
    notes = []
    columns = read_table(as_frame(frame), notes=notes)
    np.testing.assert_array_equal(np.stack([*columns.values()]), [[3600.000005, np.nan], [5400.000005, np.nan]])
    assert notes == [f"column {name!r} holds durations or times of day, taken in seconds" for name in columns]
    assert read_table(as_frame(frame), targets=["wait"])["wait"].tolist() == [3600.000005]


def test_a_file_of_nearly_this_name_is_proposed(tmp_path, monkeypatch):
    (tmp_path / "houses.csv").write_text("a,y\n1,2\n")
    monkeypatch.chdir(tmp_path)
    for name in ("houses", "house.csv", tmp_path / "houses.cvs"):
        with pytest.raises(
            DataError, match=r"^data: there is no file .* \(looked in .*\); did you mean 'houses\.csv'\?$"
        ):
            load_data(name, target="y")
    with pytest.raises(DataError, match=r"^data: there is no file or folder 'b\.csv' .*; give a path that exists, or"):
        load_data("b.csv", target="y")


@pytest.mark.parametrize("ending", ["csv", "parquet", "xlsx"])
def test_words_of_the_callers_stand_for_missing_cells(ending, tmp_path):
    frame = pandas.DataFrame(
        {"a": [1.0, -999.0, 3.0], "n": [-999, 2, 3], "w": ["x", "unknown", "-999"], "y": ["p", "q", "unknown"]}
    )
    frame["k"] = pandas.Categorical(["u", "unknown", "v"])
    path, form = tmp_path / f"a.{ending}", Form(missing=("unknown", "-999"))
    if ending == "xlsx":
        write_excel(path, [[*frame.columns], *frame.values.tolist()])
    else:
        getattr(frame, f"to_{ending}")(path, index=False)
    table = read_table(path, targets=["y"], form=form)
    expected = {"a": [1, None], "n": [None, 2], "w": ["x", ""], "k": ["u", ""], "y": ["p", "q"]}
    assert {name: plain(column) for name, column in table.items()} == expected


def test_words_for_missing_cells_are_numbers_in_any_form_and_of_any_column(tmp_path):
    form = Form(missing=["-999", "n.v."])
    path = write(tmp_path / "a.csv", b"a;b\n-999,00;n.v.\n1,5;2\n-9990;3\n")
    table = read_table(path, form=form)
    assert {name: plain(column) for name, column in table.items()} == {"a": [None, 1.5, -9990], "b": [None, 2, 3]}
    prices = pyarrow.table({"a": [decimal.Decimal("-999.00"), decimal.Decimal("2.50")], "nested": [[1], [2]]})
    parquet.write_table(prices, tmp_path / "a.parquet")
    assert plain(read_table(tmp_path / "a.parquet", form=form, drop=["nested"])["a"]) == [None, 2.5]
    with pytest.raises(DataError, match="column 'nested': expected numbers or words, found Arrow's type list"):
        read_table(tmp_path / "a.parquet", form=form)
    for words in ("unknown", [-999], None):
        with pytest.raises(ArgumentTypeError, match="missing: expected a list of words such as"):
            Form(missing=words)
    with pytest.raises(
        DataError, match=r"numbers in the training data; correct or delete it, or .* --missing 'n\.v\.'"
    ):
        read_table(path, kinds={"a": "number", "b": "number"})


def test_new_tables_are_read_as_the_earlier_one_was():
    options = TextOptions(missing=["n.v."], sep="|").like({"missing": ["-999"], "sep": ";", "encoding": "cp1252"})
    assert options.form() == Form(sep="|", encoding="cp1252", missing=["n.v."])
    earlier = load_data(
        pandas.DataFrame({"column_1": [1, 2, -999], "y": [1, 2, 3]}), target="y", form=Form(missing=["-999"])
    )
    assert form_like(options.form(), earlier).missing == ("-999", "n.v.")
    assert form_like(Form(), earlier).header is False and form_like(Form(header=True), earlier).header
    assert form_like(options.form(), None) == options.form()


def test_names_of_columns_without_a_name_are_a_header(tmp_path):
    path = write(tmp_path / "a.csv", b"column_2,column_1\n1,2\n3,4\n")
    assert plain(read_table(path, form=Form(header=False))["column_1"]) == [2, 4]


def test_excel(tmp_path, monkeypatch):
    rows = [
        ["size", None, "when", "flag", "price"],
        [1, "x", datetime.datetime(2024, 1, 2, 3, 30), True, "$1,498"],
        [None] * 5,
        [2.5, "#N/A", datetime.date(2023, 4, 5), False, 7],
    ]
    path = write_excel(tmp_path / "a.xlsx", rows, [["other"], [1]])
    notes = []
    table = read_table(path, notes=notes)
    assert notes == ["a.xlsx: the sheet 'sheet 0' of 2; --sheet NAME takes another"]
    assert read_table(path, form=Form(sheet="sheet 1"), notes=notes)["other"].tolist() == [1] and len(notes) == 1
    with pytest.raises(
        DataError, match=r"no sheet 'shet 1'; the sheets are 'sheet 0', 'sheet 1'; did you mean 'sheet 1'"
    ):
        read_table(path, form=Form(sheet="shet 1"))
    with pytest.raises(
        ArgumentError, match=r"^sheet: an \.xlsx file has sheets, got 'sheet 1' for '.*a\.csv'; leave it out"
    ):
        read_table(tmp_path / "a.csv", form=Form(sheet="sheet 1"))
    assert {name: plain(column) for name, column in table.items()} == {
        "size": [1, 2.5],
        "column_2": ["x", ""],
        "when": ["2024-01-02T03:30", "2023-04-05"],
        "flag": [1, 0],
        "price": [1498, 7],
    }
    bare = write_excel(tmp_path / "bare.xlsx", [[1, "x"], [2, "y"]])
    assert read_table(bare, form=Form(header=False))["column_1"].tolist() == [1, 2]
    typed = write_excel(tmp_path / "text.xlsx", [["a", "b"], ["1,5", 1.125], ["2.000,75", 3]])
    for form in (Form(), Form(earlier={"a": ".", "b": ","})):
        sheet = read_table(typed, form=form)
        assert sheet["a"].tolist() == [1.5, 2000.75] and sheet["b"].tolist() == [1.125, 3]
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
DAMAGED_EXCEL = {
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


def with_part(path, name, change):
    """Return a zip archive with another content of one of its files; None for none."""
    packed = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            content = change(old.read(part)) if part == name else old.read(part)
            if content is not None:
                new.writestr(part, content)
    return packed.getvalue()


@pytest.mark.parametrize("case", DAMAGED_EXCEL)
def test_a_damaged_or_hostile_workbook(case, tmp_path):
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
def test_a_locked_archive(case, name, tmp_path):
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


def many_words(rows=3000):
    generator = np.random.default_rng(0)
    X = np.column_stack([generator.normal(size=rows), np.arange(rows) % 1000, np.arange(rows) % 30]).astype(float)
    words = tuple(f"w{i}" for i in range(1000))
    names = ("size", "town", "shop")
    return Dataset("made", X, np.arange(rows) % 2, "classification", names, categories=(None, words, words[:30]))


def test_memory_is_planned_before_it_is_taken(monkeypatch):
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


def test_the_command_names_the_column_that_takes_the_memory(tmp_path, monkeypatch, capsys):
    lines = [f"{i % 9},w{i % 50},{i % 2}" for i in range(1000)]
    path = write(tmp_path / "a.csv", "\n".join(["a,town,y", *lines]).encode())
    # it takes the function by name: imported during the patch, it would keep this one
    importlib.import_module("fusemlp.fleet.candidates")
    monkeypatch.setattr(rows_module, "available_memory", lambda: 5_000)
    assert "50 of 'town'" in refusal(capsys, "train", path, "--target", "y", "--out", tmp_path / "run", code=1)
    assert not (tmp_path / "run").exists()
