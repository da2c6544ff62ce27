"""Tables as they come: forms of text files, missing and unseen cells, dates, and columns that are left out."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import math
import zipfile
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusemlp.datasets import rows as rows_module
from fusemlp.datasets.codes import MOST_WORDS, date_parts, orders_of, parse_date
from fusemlp.datasets.load import ColumnChoices, Dataset, load_data, load_features, load_labelled
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import with_files
from fusemlp.datasets.scaling import SCALES
from fusemlp.datasets.tables import as_frame, read_table
from fusemlp.datasets.textfiles import Form, number
from fusemlp_kernels.errors import ArgumentError, DataError
from make import run

NAN = math.nan


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def plain(column: Any) -> list[Any]:
    """Return the values of a column, None for NaN and NaT."""
    return [None if value != value or value is None else value for value in column.tolist()]


# The form of text files

READ = {
    "semicolons and decimal commas": ("a;b\n1,5;x\n-2,25;y\n", {"a": [1.5, -2.25], "b": ["x", "y"]}),
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
        "a,b\n1,1\n,1\nNA,1\nN/A,1\nNaN,1\nnan,1\nnull,1\nNone,1\n?,1\n2,1\n",
        {"a": [1, *[None] * 8, 2], "b": [1] * 10},
    ),
    "missing first": ("a,b\n,\n,\n1,x\n", {"a": [None, None, 1], "b": ["", "", "x"]}),
    "no value at all": ("a,b\n,1\nNA,2\n", {"a": [None, None], "b": [1, 2]}),
    "words and numbers": ("a\nx1\n5\nx2\n", {"a": ["x1", "5", "x2"]}),
    "few numbers and a word": ("a\n" + "4\n6\n8\n" * 9 + "rotary\n", {"a": [*["4", "6", "8"] * 9, "rotary"]}),
    "ISO dates": ("a\n2024-12-31\n\n2024-01-02\nNA\n", {"a": ["2024-12-31T00:00", "2024-01-02T00:00", None]}),
    "ISO dates with times": (
        "a\n2024-12-31T23:30:00\n2024-01-02 01:00\n2024-01-02T01:00:00+02:00\n",
        {"a": ["2024-12-31T23:30", "2024-01-02T01:00", "2024-01-01T23:00"]},
    ),
    "dates with points": ("a;b\n31.12.2024;1,5\n1.2.2024;2,5\n", {"a": ["2024-12-31T00:00", "2024-02-01T00:00"]}),
    "dates with points, all days below 13": ("a,b\n03.02.2024,1\n", {"a": ["2024-02-03T00:00"]}),
    "American dates": ("a,b\n12/31/2024,1\n2/1/2024,2\n", {"a": ["2024-12-31T00:00", "2024-02-01T00:00"]}),
    "American times": (
        "a,b\n12/31/2024 3:05 PM,1\n2/1/2024 12:00 AM,2\n",
        {"a": ["2024-12-31T15:05", "2024-02-01T00:00"]},
    ),
    "European dates with slashes": ("a,b\n31/12/2024,1\n2/1/2024,2\n", {"a": ["2024-12-31T00:00", "2024-01-02T00:00"]}),
}  # fmt: skip


def assert_read(table: dict[str, Any], expected: dict[str, list[Any]]) -> None:
    for name, values in expected.items():
        column = table[name]
        if column.dtype.kind == "M":
            wanted = np.array([value or "NaT" for value in values], "datetime64[us]")
            np.testing.assert_array_equal(column, wanted)
        else:
            assert plain(column) == values


@pytest.mark.parametrize("case", READ)
def test_a_file_is_read_as_it_comes(case: str, tmp_path: Path) -> None:
    content, expected = READ[case]
    assert_read(read_table(write(tmp_path / "a.csv", content)), expected)


@pytest.mark.parametrize(
    ("end", "pack"), [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress), (".zip", None)]
)
def test_a_compressed_file(end: str, pack: Any, tmp_path: Path) -> None:
    content = b"a;y\n1,5;x\n2,5;z\n"
    path = tmp_path / f"a.csv{end}"
    if pack is None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.csv", content)
    else:
        path.write_bytes(pack(content))
    dataset = load_data(path, target="y")
    assert dataset.X.tolist() == [[1.5], [2.5]]
    assert dataset.notes == (f"a.csv{end}: separated by ';', decimal mark ',', {end[1:]}",)
    write(path, path.read_bytes()[:-9])
    with pytest.raises(DataError, match=f"a.csv{end}"):
        load_data(path, target="y")


def test_an_archive_of_several_files(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.csv.zip", "w") as archive:
        archive.writestr("a.csv", "a\n1\n")
        archive.writestr("b.csv", "a\n1\n")
    with pytest.raises(DataError, match="expected one file in the archive, found 2"):
        read_table(tmp_path / "a.csv.zip")


def test_a_form_that_is_given(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "1,5:x\n2,5:y\n")
    table = read_table(path, form=Form(sep=":", decimal=",", encoding="ascii", header=False))
    assert_read(table, {"column_1": [1.5, 2.5], "column_2": ["x", "y"]})
    assert_read(read_table(write(path, "a\tb\n1\t2\n"), form=Form(sep="tab")), {"a": [1], "b": [2]})
    with pytest.raises(DataError, match="in ascii"):
        read_table(write(path, "a\nü\n"), form=Form(encoding="ascii"))
    with pytest.raises(DataError, match="found an empty file"):
        read_table(write(path, ""), form=Form(header=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sep": ";;"}, "sep: expected one character such as ; or |, or tab, got ';;'"),
        ({"decimal": ";"}, "decimal: expected . or , got ';'"),
        ({"encoding": "utf-9"}, "encoding: 'utf-9' is unknown"),
    ],
)
def test_a_form_that_cannot_be(options: dict[str, str], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        Form(**options)  # type: ignore[arg-type]
    assert str(caught.value).startswith(message)


def test_a_file_without_a_header(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "5.1,3.5,setosa\n4.9,3.0,setosa\n")
    with pytest.raises(DataError, match="there is no target column 'y'; the columns are 'column_1', 'column_2'"):
        load_data(path, target="y")
    for form in (None, Form(header=False)):
        dataset = load_data(path, target="column_3", form=form)
        assert dataset.X.tolist() == [[5.1, 3.5], [4.9, 3.0]]
        assert any("no header: the columns are column_1" in note for note in dataset.notes) == (form is None)
    # new data of such a run have no header either, even where their first line could be one
    assert load_labelled(write(path, "5,2010,setosa\n4.9,3.0,setosa\n"), dataset)[0].tolist() == [[5, 2010], [4.9, 3]]
    # Years are names.
    assert list(read_table(write(path, "country,2010,2011\nA,1,2\n"))) == ["country", "2010", "2011"]


ODD = st.one_of(st.binary(), st.text("ab1,;|\t\n\"'.$%-/: 20", max_size=60).map(str.encode))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(ODD, st.booleans())
def test_any_bytes_are_a_table_or_a_named_mistake(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, header: bool
) -> None:
    path = tmp_path_factory.getbasetemp() / "odd.csv"
    path.write_bytes(content)
    try:
        table = read_table(path, form=Form(header=header))
    except DataError as error:
        assert "odd.csv" in str(error)
    else:
        assert len({len(column) for column in table.values()}) == 1


FINITE = st.floats(-1e12, 1e12)


@settings(derandomize=True, deadline=None)
@given(FINITE, st.sampled_from([".", ","]), st.booleans(), st.sampled_from(["", "$", "€ "]))
def test_written_numbers_are_read(value: float, decimal: str, grouped: bool, currency: str) -> None:
    text = f"{abs(value):,.6f}" if grouped else f"{abs(value):.6f}"
    if decimal == ",":
        text = text.translate({ord(","): ".", ord("."): ","})
    assert number(("-" if value < 0 else "") + currency + text, decimal) == float(f"{value:.6f}")


@pytest.mark.parametrize(
    "text", ["", "$", "%", ".", "1,23", "12,3456", "1.2.3", "a1", "1a", "--1", "2024-01-01", "1 2"]
)
def test_other_text_is_no_number(text: str) -> None:
    assert number(text) is None


def test_all_mistakes_are_in_one_message(tmp_path: Path) -> None:
    lines = ["a,b,y", *(f"{i},{i / 3:.3f},{i % 2}" for i in range(60)), "x,1,0", "3,y y,1", "4,5", *["inf,3,1"] * 5]
    with pytest.raises(DataError) as caught:
        load_data(write(tmp_path / "a.csv", "\n".join(lines)), target="y")
    first, *others = str(caught.value).splitlines()
    assert first.endswith("a.csv: 8 mistakes:")
    for place in ("line 62, column 'a': 'x'", "line 63, column 'b': 'y y'", "line 64: expected 3", "(and 3 more in"):
        assert sum(place in line for line in others) == 1


# Dates


@settings(derandomize=True, deadline=None)
@given(st.datetimes(min_value=pandas.Timestamp(1800, 1, 1), max_value=pandas.Timestamp(2200, 1, 1)))
def test_the_parts_of_a_date(moment: Any) -> None:
    assert parse_date(moment.isoformat(), "ymd") == moment
    assert parse_date(f"{moment:%d.%m.}{moment.year:04}", "dmy") == moment.replace(
        hour=0, minute=0, second=0, microsecond=0
    )
    parts = {name: values.tolist() for name, values in date_parts(np.array([moment, "NaT"], "datetime64[us]")).items()}
    assert all(math.isnan(missing) for _, missing in parts.values())
    seconds = moment.hour * 3600 + moment.minute * 60 + moment.second + moment.microsecond / 1e6
    assert [values[0] for values in parts.values()] == pytest.approx(
        [
            *(moment.year, moment.month, moment.day, moment.weekday(), seconds / 3600),
            moment.toordinal() - 719163 + seconds / 86400,
        ],
        rel=1e-12,
        abs=1e-9,
    )


def test_the_order_of_a_date() -> None:
    assert orders_of(["31/12/2024", "1/2/2024"], 1.0) == ["dmy"]
    assert orders_of(["12/31/2024", "1/2/2024"], 1.0) == ["mdy"]
    assert orders_of(["1/2/2024"], 1.0) == ["dmy", "mdy"]
    assert orders_of(["2024-13-01", "2024-02-30", "1.5"], 1.0) == []
    assert parse_date("2024-01-02T25:00", "ymd") is None
    assert parse_date("1/2/2024 13:00 PM", "mdy") is None


def test_an_ambiguous_order_is_said(tmp_path: Path) -> None:
    notes: list[str] = []
    table = read_table(write(tmp_path / "a.csv", "a,b\n1/2/2024,1\n3/4/2024,2\n"), notes=notes)
    assert_read(table, {"a": ["2024-01-02T00:00", "2024-03-04T00:00"]})
    assert notes == ["column 'a' holds dates such as '1/2/2024', read with the month first"]


def test_dates_of_new_data(tmp_path: Path) -> None:
    rows = [f"{day:02}.0{1 + day % 3}.202{day % 2},{day % 5}" for day in range(1, 29)]
    dataset = load_data(write(tmp_path / "a.csv", "\n".join(["when,y", *rows])), target="y")
    assert dataset.feature_names == tuple(f"when: {p}" for p in ("year", "month", "day", "weekday", "elapsed days"))
    assert dataset.dates == (("when", "dmy"),)
    made = Preprocessor.from_json(Preprocessor.fit(dataset, np.arange(28)).to_json())
    # Both orders fit: the training data decide.
    new = load_features(write(tmp_path / "b.csv", "when\n03.02.2021\n\n?\n"), made)
    assert new[0].tolist() == [2021, 2, 3, 2, 18661]
    assert np.isnan(new[1]).all()
    assert np.isfinite(made.transform_features(new)).all()
    with pytest.raises(DataError, match=r"line 2, column 'when': '2021-02-03' is not a date such as 31.12.2024"):
        load_features(write(tmp_path / "b.csv", "when\n2021-02-03\n"), made)


# Numbers among words

ZIPS = "zip,y\n" + "10.0,1\nA,0\n007,1\n2.5,0\n" * 8


def test_a_word_that_reads_as_the_same_number_is_one_word(tmp_path: Path) -> None:
    made = fitted(tmp_path, ZIPS)
    assert made.categories == (("007", "10.0", "2.5", "A"),)
    notes: list[str] = []
    spelled = pandas.DataFrame({"zip": ["10", "+10.00", "1e1", "7", "2.50", "1_0", "10,0", "inf", "8"]})
    codes = load_features(spelled, Preprocessor.from_json(made.to_json()), notes=notes)[:, 0].tolist()
    assert codes[:5] == [1, 1, 1, 0, 2] and np.isnan(codes[5:]).all()
    assert notes == ["words unseen in training, taken as one other category: 4 in 'zip' (such as '1_0')"]
    # A file with types holds the same words.
    assert load_features(pandas.DataFrame({"zip": [10.0, 7.0, 2.5]}), made)[:, 0].tolist() == [1, 0, 2]


def test_spellings_that_training_tells_apart_stay_apart(tmp_path: Path) -> None:
    made = fitted(tmp_path, ZIPS + "10,1\n" * 8)
    codes = load_features(pandas.DataFrame({"zip": ["10", "10.0", "10.00"]}), made)[:, 0]
    assert codes[:2].tolist() == [1, 2] and np.isnan(codes[2])


def test_long_words_of_digits_are_no_floats(tmp_path: Path) -> None:
    made = fitted(tmp_path, ZIPS.replace("007", "9007199254740993"))
    codes = load_features(pandas.DataFrame({"zip": ["9007199254740993.0", "9007199254740992"]}), made)[:, 0]
    assert codes[0] == made.categories[0].index("9007199254740993") and np.isnan(codes[1])


def test_a_stored_preprocessor_of_an_earlier_release_tells_spellings_apart(tmp_path: Path) -> None:
    made = fitted(tmp_path, ZIPS)
    config = made.to_config()
    del config["joins_spellings"]
    old = Preprocessor.from_config(config)
    assert np.isnan(load_features(pandas.DataFrame({"zip": ["10"]}), old)[0, 0])
    again = load_data(tmp_path / "a.csv", target="y", columns=ColumnChoices(like=old))
    assert not with_files(again, "a.csv", test=str(write(tmp_path / "b.csv", "zip,y\n10,1\n"))).joins_spellings
    assert not Preprocessor.fit(again, [0, 1]).joins_spellings


def test_labels_in_another_spelling_are_the_same_classes(tmp_path: Path) -> None:
    text = "x,y\n" + "1.5,1.0\n2,2\n3,b\n" * 8
    dataset = load_data(write(tmp_path / "a.csv", text), target="y")
    made = Preprocessor.fit(dataset, np.arange(24))
    assert made.classes == ("1.0", "2", "b")
    other = write(tmp_path / "b.csv", "x,y\n1,1\n2,2.0\n3,b\n")
    assert made.class_codes(load_labelled(other, made)[1]).tolist() == [0, 1, 2]
    assert made.class_codes(np.array([2.0, 1])).tolist() == [1, 0]
    tested = with_files(dataset, str(tmp_path / "a.csv"), test=str(other))
    assert tested.classes.tolist() == ["1.0", "2", "b"]


def fitted(folder: Path, text: str) -> Preprocessor:
    """Return the preprocessor of all rows of a table, of which "zip" holds words."""
    dataset = load_data(write(folder / "a.csv", text), target="y", columns=ColumnChoices(categorical=["zip"]))
    return Preprocessor.fit(dataset, np.arange(len(dataset.y)))


LONG = 2**53 + 1


@pytest.mark.parametrize(
    "values", [[LONG, 5], [LONG, None], [str(LONG), "-5"], [Decimal(LONG), Decimal(5)], [float(LONG), 2.0**60]]
)
def test_lost_digits_are_said(values: list[Any], tmp_path: Path) -> None:
    notes: list[str] = []
    table = pyarrow.table({"n": values})
    if isinstance(values[0], str):
        read_table(write(tmp_path / "a.csv", "n\n" + "\n".join(values)), notes=notes)
    else:
        read_table(as_frame(table), notes=notes)
    said = (
        "column 'n' loses the last digits of numbers such as 9007199254740993; --categorical takes them as words, "
        "--id as names of the rows"
    )
    assert notes == ([] if isinstance(values[0], float) else [said])


def test_names_of_rows_keep_their_digits(tmp_path: Path) -> None:
    made = fitted(tmp_path, ZIPS)
    ids: dict[str, Any] = {}
    table = pyarrow.table({"zip": ["10", "7"], "n": pyarrow.array([LONG, None])})
    load_features(table, replace(made, ids=("n",)), ids=ids)
    assert ids["n"].tolist() == [str(LONG), ""]


@pytest.mark.parametrize("zone", ["Z", "+02:00", "-0500", ""])
@pytest.mark.parametrize("form", ["text", "parquet"])
def test_a_time_zone_is_said(zone: str, form: str, tmp_path: Path) -> None:
    notes: list[str] = []
    times = ["2024-01-02 10:00:00", f"2024-03-04T12:30:00{zone}"]
    if form == "text":
        read_table(write(tmp_path / "a.csv", "a\n" + "\n".join(times)), kinds={"a": "ymd"}, notes=notes)
    else:
        moments = pandas.to_datetime(times[1:], utc=True) if zone else pandas.to_datetime(times[:1])
        pandas.DataFrame({"a": moments}).to_parquet(tmp_path / "a.parquet")
        read_table(tmp_path / "a.parquet", kinds={"a": "ymd"}, notes=notes)
    said = "column 'a' holds times with a zone: they are taken in UTC, as those without one"
    assert notes == ([said] if zone else [])


# Columns that are left out


def test_useless_columns_are_left_out_and_named(tmp_path: Path) -> None:
    header = ["", "customerId", "ID", "name", "one", "same", "empty", "x", "y"]
    rows = [
        [str(i + 1), str(i * 7 % 101), str(i * 7 % 97), f"name {i}", "1", "w", "", str(i % 7), str(i % 2)]
        for i in range(60)
    ]
    path = write(tmp_path / "a.csv", "\n".join(map(",".join, [header, *rows])))
    dataset = load_data(path, target="y")
    assert dataset.feature_names == ("x",)
    (line,) = dataset.notes
    for name in ("column_1", "customerId", "ID", "name", "one", "same", "empty"):
        assert f"'{name}' (" in line
    kept = load_data(path, target="y", columns=ColumnChoices(drop=["x"], keep=["customerId"], categorical=["name"]))
    assert kept.feature_names == ("customerId", "name")
    with pytest.raises(DataError, match=r"no columns 'z' to drop; the columns are 'column_1'"):
        load_data(path, target="y", columns=ColumnChoices(drop=["z"]))
    with pytest.raises(ArgumentError, match="drop: 'y' is the target"):
        load_data(path, target="y", columns=ColumnChoices(drop=["y"]))


def test_the_only_feature_is_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\n".join(["t,y", *(f"{i},{i % 2}" for i in range(40))]))
    assert load_data(path, target="y").feature_names == ("t",)


# Missing and unseen cells


def table_of(columns: dict[str, list[Any]]) -> Dataset:
    """Return a data set of numbers (lists of floats) and words (lists of str)."""
    X, categories = [], []
    for values in columns.values():
        words = tuple(sorted(set(values))) if isinstance(values[0], str) else None
        X.append(values if words is None else [words.index(value) for value in values])
        categories.append(words)
    y = np.arange(len(X[0])) % 2
    return Dataset("made", np.array(X, float).T, y, "classification", tuple(columns), categories=tuple(categories))


def test_missing_numbers_become_the_median_and_an_indicator() -> None:
    data = table_of({"a": [1.0, NAN, 2.0, 9.0, NAN], "b": [1.0, 2.0, 3.0, 4.0, 5.0]})
    made = Preprocessor.fit(data, [0, 1, 2, 3], scale="none")
    assert made.transform_features(data.X).tolist() == [[1, 0, 1], [2, 1, 2], [2, 0, 3], [9, 0, 4], [2, 1, 5]]
    # The column without a missing cell in training has a median, and no indicator.
    assert made.transform_features([[1.0, NAN]]).tolist() == [[1, 0, 2.5]]
    assert made.width == 3
    assert Preprocessor.fit(data, [1, 4], scale="none").transform_features(data.X)[:, 0].tolist() == [1, 0, 2, 9, 0]


def test_words_that_the_training_rows_lack_are_in_no_input() -> None:
    data = table_of({"a": ["u", "v", "", "w"]})
    made = Preprocessor.fit(data, [0, 1, 2], scale="none")
    assert made.transform_features(data.X).tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert made.transform_features([[NAN]]).tolist() == [[0, 0, 0]]


def test_rare_words_share_an_input_with_unseen_ones() -> None:
    words = [f"w{i:02}" for i in range(30)]
    data = table_of({"a": [*words[:25], *words[:25], *words[25:]]})
    made = Preprocessor.fit(data, np.arange(55), scale="none")
    assert made.width == 26
    inputs = made.transform_features(np.array([[0.0], [24.0], [25.0], [29.0], [NAN]]))
    assert inputs.argmax(axis=1).tolist() == [0, 24, 25, 25, 25]
    assert inputs.sum(axis=1).tolist() == [1] * 5


def test_many_words_have_bounded_inputs() -> None:
    data = table_of({"a": [f"w{i}" for i in range(1000)] * 3})
    made = Preprocessor.fit(data, np.arange(3000))
    assert made.width == MOST_WORDS + 1
    assert (made.transform_features(data.X).sum(axis=1) == 1).all()


def test_inputs_are_made_a_piece_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_PIECE", 3)
    data = table_of({"a": [1.0, NAN, 2.0, 9.0, NAN, 1e300, 7.0], "b": list("uvuvuvw")})
    made = Preprocessor.fit(data, [0, 1, 2, 3])
    whole = made.transform_features(data.X)
    np.testing.assert_array_equal(rows_module.network_inputs(made, data.X, "fp64"), whole)
    # The engine refuses what float32 cannot hold.
    np.testing.assert_array_equal(rows_module.network_inputs(made, data.X, "fp32"), whole)
    fewer = rows_module.network_inputs(made, data.X[:5], "bf16")
    assert fewer.dtype == np.float32
    np.testing.assert_array_equal(fewer, whole[:5].astype(np.float32))
    data.X[6, 1] = 9
    with pytest.raises(DataError, match="at row 6, column 1"):
        rows_module.network_inputs(made, data.X, "fp32")


def test_an_earlier_release_knows_no_missing_cells() -> None:
    data = table_of({"a": [1.0, 2.0], "b": ["u", "v"]})
    fields = Preprocessor.fit(data, [0, 1], scale="none").to_config()
    for name in ("feature_fill", "missing_inputs", "shared", "other_inputs", "dates"):
        del fields[name]
    old = Preprocessor.from_config(fields)
    assert old.width == 3
    assert old.transform_features(data.X).tolist() == [[1, 1, 0], [2, 0, 1]]
    assert old.transform_features([[1.0, NAN]]).tolist() == [[1, 0, 0]]
    with pytest.raises(DataError, match=r"value of 'a' is missing at row 1.* earlier release.*train again"):
        old.transform_features([[1.0, 0.0], [NAN, 0.0]])


def test_parquet_and_csv_have_the_same_missing_cells(tmp_path: Path) -> None:
    frame = pandas.DataFrame(
        {
            "a": [1.5, None, 2.5, 3.5],
            "n": pandas.array([1, None, 3, 4], dtype="Int64"),
            "w": ["u", None, "v", "u"],
            "c": pandas.Categorical(["g", "h", None, "g"]),
            "t": pandas.to_datetime(["2024-01-02", None, "2024-03-05", "2023-01-01"]),
            "d": [date(2024, 1, 2), date(2020, 5, 6), None, date(2021, 7, 8)],
            "f": [True, False, None, True],
            "y": ["p", "q", None, "p"],
        }
    )
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    one, other = (load_data(tmp_path / name, target="y") for name in ("a.csv", "a.parquet"))
    assert one.feature_names == other.feature_names
    assert one.categories == other.categories
    np.testing.assert_array_equal(one.X, other.X)
    assert one.y.tolist() == other.y.tolist() == ["p", "q", "p"]
    made = Preprocessor.fit(one, [0, 1, 2])
    np.testing.assert_array_equal(load_features(tmp_path / "a.parquet", made), load_features(tmp_path / "a.csv", made))
    notes: list[str] = []
    assert len(load_labelled(tmp_path / "a.parquet", made, notes=notes)[1]) == 3
    assert notes[0] == "1 of 4 rows have no 'y' and are left out"


CELLS = {
    "number": st.one_of(st.sampled_from(["", "NA", "?"]), st.floats(-1e6, 1e6).map(repr)),
    "price": st.one_of(st.just("null"), st.integers(0, 10**7).map(lambda value: f"${value:,}")),
    "word": st.sampled_from(["red", "green", "dark blue", "a;b", 'the "one"', "", "None"]),
    "date": st.one_of(st.just(""), st.dates(min_value=pandas.Timestamp(1950, 1, 1).date()).map(str)),
}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_training_and_new_data_have_the_same_features(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    folder = tmp_path_factory.mktemp("same")
    rows = data.draw(st.lists(st.tuples(*CELLS.values()), min_size=4, max_size=30))
    rows = [("1.5", "$5", "red", "2024-05-06"), ("2.5", "$1,600", "green", "2023-01-02"), *rows]
    order = data.draw(st.permutations(range(4)))
    names = list(CELLS)
    with (folder / "train.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([[*names, "y"], *([*row, index % 2] for index, row in enumerate(rows))])
    with (folder / "new.csv").open("w", newline="") as stream:
        csv.writer(stream, delimiter=data.draw(st.sampled_from(",;\t|"))).writerows(
            [[names[k] for k in order], *([row[k] for k in order] for row in rows)]
        )
    dataset = load_data(folder / "train.csv", target="y", columns=ColumnChoices(keep=names))
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1))
    scale = data.draw(st.sampled_from(SCALES))
    made = Preprocessor.fit(dataset, chosen, scale=scale)
    inputs = made.transform_features(dataset.X)
    assert np.isfinite(inputs).all() and inputs.shape == (len(rows), made.width)
    restored = Preprocessor.from_json(made.to_json())
    assert restored == made
    np.testing.assert_array_equal(restored.transform_features(load_features(folder / "new.csv", restored)), inputs)
    # The same row with an unseen word has the same other inputs.
    strange = [[*row[:2], "unseen", row[3]] for row in rows]
    with (folder / "new.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([names, *strange])
    notes: list[str] = []
    again = made.transform_features(load_features(folder / "new.csv", made, notes=notes))
    assert again.shape == inputs.shape
    start = sum(1 + made.missing_inputs[column] for column in range(2))
    end = inputs.shape[1] - (made.width - start - made.word_inputs(2).max() - 1)
    np.testing.assert_array_equal(
        np.delete(again, np.s_[start:end], axis=1), np.delete(inputs, np.s_[start:end], axis=1)
    )
    assert f"taken as one other category: {len(rows)} in 'word' (such as 'unseen')" in notes[-1]


# The command line


def odd_table(path: Path, *, separator: str = ";", rows: int = 150) -> Path:
    generator = np.random.default_rng(0)
    lines = [["id", "größe", "farbe", "tag", "preis"]]
    for index in range(rows):
        size, colour = generator.normal(), ("rot", "grün", "", "blau")[index % 4]
        price = f"{1000 + 100 * size + 50 * (index % 4):.2f}".replace(".", ",")
        height = "NA" if index % 10 == 3 else f"{size:.3f}".replace(".", ",")
        day = f"{1 + index % 28:02}.{1 + index % 12:02}.2023"
        lines.append([str(100 + index), height, colour, day, "" if index == 7 else price])
    path.write_bytes("\n".join(map(separator.join, lines)).encode("latin-1"))
    return path


def test_an_odd_table_from_training_to_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, folder = odd_table(tmp_path / "odd.csv"), tmp_path / "run"
    arguments = ("train", table, "--target", "preis", "--hidden", "8", "--out", folder)
    assert run(*arguments, "--epochs", "3") == 0
    shown = capsys.readouterr().err
    for line in (
        "odd.csv: separated by ';', decimal mark ',', encoding cp1252",
        "1 of 150 rows have no 'preis' and are left out",
        "left out, unless you --keep them: 'id' (",
        "missing cells, filled in: 15 in 'größe', 37 in 'farbe'",
    ):
        assert line in shown
    config = json.loads((folder / "config.json").read_text())
    assert config["data"]["notes"][0] == "odd.csv: separated by ';', decimal mark ',', encoding cp1252"
    assert run("evaluate", folder, "--json") == 0
    report = json.loads((folder / "report.json").read_text())
    assert json.loads(capsys.readouterr().out)["loss"] == report["test"]["loss"]
    assert run("train", "--resume", folder, "--epochs", "4", "--quiet") == 0
    new = write(tmp_path / "new.csv", "tag,farbe,größe\n05.06.2023,lila,1.5\n,,\n2.3.2024,rot,?\n")
    capsys.readouterr()
    assert run("predict", folder, "--data", new, "--out", tmp_path / "out.csv") == 0
    shown = capsys.readouterr().out
    assert "missing cells, filled in: 2 in 'größe', 1 in 'farbe', 1 in 'tag'" in shown
    assert "words unseen in training, taken as one other category: 1 in 'farbe' (such as 'lila')" in shown
    said = (tmp_path / "out.csv").read_text().split()
    assert len(said) == 4 and np.isfinite(np.array(said[1:], float)).all()
    assert run("evaluate", folder, "--data", table) == 0
    assert "1 of 150 rows have no 'preis'" in capsys.readouterr().out


def test_the_options_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"{k % 7}:{k % 3}:{k}:{'ab'[k % 2]}" for k in range(60)]
    table, folder = write(tmp_path / "bare.csv", "\n".join(lines)), tmp_path / "run"
    form = ("--sep", ":", "--no-header")
    arguments = ("train", table, *form, "--target", "column_4", "--drop", "column_1", "--keep", "column_3")
    assert run(*arguments, "--categorical", "column_2", "--epochs", "2", "--quiet", "--out", folder) == 0
    config = json.loads((folder / "config.json").read_text())
    assert config["preprocessor"]["feature_names"] == ["column_2", "column_3"]
    assert config["preprocessor"]["categories"] == [["0", "1", "2"], None]
    assert "--sep : --no-header" in config["command"] and "--drop column_1" in config["command"]
    # New data have the form of the training unless the options say otherwise.
    assert run("predict", folder, "--data", table, "--out", tmp_path / "out.csv") == 0
    capsys.readouterr()
    assert run("train", table, "--sep", "::", "--target", "column_4", "--out", tmp_path / "no") == 2
    assert "error: --sep: expected one character" in capsys.readouterr().err


def test_a_run_of_an_earlier_release(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its features are an index and words, and its configuration lacks everything on missing cells and forms."""
    lines = [
        f"{k},{k % 7}.5,{('True', 'False', 'NULL')[k % 3]},2024-01-{1 + k % 3:02},{'ab'[k % 2]}" for k in range(60)
    ]
    table, folder = (
        write(tmp_path / "a.csv", "\n".join(["id,x,flag,day,y", *lines]).replace("NULL", "so")),
        tmp_path / "run",
    )
    kept = ("--keep", "id", "--categorical", "day", "--categorical", "flag")
    assert run("train", table, "--target", "y", *kept, "--epochs", "2", "--quiet", "--out", folder) == 0
    config = json.loads((folder / "config.json").read_text())
    for name in ("feature_fill", "missing_inputs", "shared", "other_inputs", "dates"):
        del config["preprocessor"][name]
    for name in ("sep", "decimal", "encoding", "header", "drop", "keep", "categorical"):
        del config["options"][name]
    del config["data"]["notes"]
    (folder / "config.json").write_text(json.dumps(config))
    capsys.readouterr()
    assert run("evaluate", folder, "--json") == 0
    report = json.loads((folder / "report.json").read_text())
    assert json.loads(capsys.readouterr().out)["loss"] == report["test"]["loss"]
    assert run("predict", folder, "--data", table, "--out", tmp_path / "out.csv") == 0
    assert run("train", "--resume", folder, "--epochs", "3", "--quiet") == 0


def test_the_mistakes_of_a_file_are_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["a,b,y", *(f"{i},{2 * i},{i % 2}" for i in range(40)), "x,1,0", "4,z,1"]
    table = write(tmp_path / "a.csv", "\n".join(lines))
    assert run("train", table, "--target", "y", "--out", tmp_path / "run") == 1
    first, *others = capsys.readouterr().err.splitlines()
    assert first == f"error: {table}: 2 mistakes:"
    assert [line.split(":")[0] for line in others] == ["  line 42, column 'a'", "  line 43, column 'b'"]
