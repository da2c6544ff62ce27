"""Tables as they come: forms of text files, missing and unseen cells, dates, and columns that are left out."""

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import re
import zipfile
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from decimal import Decimal

import numpy as np
import pandas
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusemlp.datasets import rows as rows_module
from fusemlp.datasets.cells import MOST_WORDS, SCALES, date_parts, orders_of, parse_date
from fusemlp.datasets.load import ColumnChoices, Dataset, load_data, load_features, load_labelled
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import with_files
from fusemlp.datasets.tables import as_frame, read_table
from fusemlp.datasets.textfiles import Form, number
from fusemlp.tables.preparation import prepare
from fusemlp.tables.recipe import TableRecipe
from fusemlp_kernels.errors import ArgumentError, DataError
from make import QUICK, output_of, read, refusal, result_of, run, trained

NAN = math.nan


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lists(table):
    return {name: column.tolist() for name, column in table.items()}


def zipped(*contents):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for index, content in enumerate(contents):
            archive.writestr(f"{index}.csv", content)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("end", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zip", zipped)]
)
def test_a_compressed_file(end, pack, tmp_path):
    path = write(tmp_path / f"a.csv.{end}", pack(b"a;y\n1,5;x\n2,5;z\n"))
    dataset = load_data(path, target="y")
    assert dataset.X.tolist() == [[1.5], [2.5]]
    assert dataset.notes == (f"a.csv.{end}: separated by ';', decimal mark ',', {end}",)
    write(path, path.read_bytes()[:-9])
    with pytest.raises(DataError, match=f"a.csv.{end}"):
        load_data(path, target="y")


def test_an_archive_of_several_files(tmp_path):
    with pytest.raises(DataError, match="expected one file in the archive, found 2"):
        read_table(write(tmp_path / "a.csv.zip", zipped("a\n1\n", "a\n1\n")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sep": ";;"}, r"^sep: expected one character such as ; or \\|, or tab, got ';;'"),
        ({"decimal": ";"}, "^decimal: expected . or , got ';'"),
        ({"encoding": "utf-9"}, "^encoding: 'utf-9' is unknown"),
    ],
)
def test_a_form_that_cannot_be(options, message):
    with pytest.raises(ArgumentError, match=message):
        Form(**options)


def test_a_file_without_a_header(tmp_path):
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


@pytest.mark.parametrize(
    "text", ["", "$", "%", ".", "1,23", "12,3456", "1.2.3", "a1", "1a", "--1", "2024-01-01", "1 2"]
)
def test_other_text_is_no_number(text):
    assert number(text) is None


def test_all_mistakes_are_in_one_message(tmp_path):
    lines = ["a,b,y", *(f"{i},{i / 3:.3f},{i % 2}" for i in range(60)), "x,1,0", "3,y y,1", "4,5", *["many,3,1"] * 5]
    with pytest.raises(DataError) as caught:
        load_data(write(tmp_path / "a.csv", "\n".join(lines)), target="y")
    first, *others = str(caught.value).splitlines()
    assert first.endswith("a.csv: 8 mistakes:")
    for place in ("line 62, column 'a': 'x'", "line 63, column 'b': 'y y'", "line 64: expected 3", "(and 4 more in"):
        assert sum(place in line for line in others) == 1


# Dates


@settings(derandomize=True, deadline=None)
@given(st.datetimes(min_value=pandas.Timestamp(1800, 1, 1), max_value=pandas.Timestamp(2200, 1, 1)))
def test_the_parts_of_a_date(moment):
    assert parse_date(moment.isoformat(), "ymd") == moment
    midnight = moment.replace(hour=0, minute=0, second=0, microsecond=0)
    assert parse_date(f"{moment:%d.%m.}{moment.year:04}", "dmy") == midnight
    parts = [values.tolist() for values in date_parts(np.array([moment, "NaT"], "datetime64[us]")).values()]
    assert all(math.isnan(missing) for _, missing in parts)
    seconds = (moment - midnight).total_seconds()
    days = moment.toordinal() - 719163 + seconds / 86400
    expected = [moment.year, moment.month, moment.day, moment.weekday(), seconds / 3600, days]
    assert [values[0] for values in parts] == pytest.approx(expected, rel=1e-12, abs=1e-9)


def test_the_order_of_a_date():
    assert orders_of(["31/12/2024", "1/2/2024"], 1.0) == ["dmy"]
    assert orders_of(["12/31/2024", "1/2/2024"], 1.0) == ["mdy"]
    assert orders_of(["1/2/2024"], 1.0) == ["dmy", "mdy"]
    assert orders_of(["2024-13-01", "2024-02-30", "1.5"], 1.0) == []
    assert parse_date("2024-01-02T25:00", "ymd") is None
    assert parse_date("1/2/2024 13:00 PM", "mdy") is None
    assert [parse_date(text, "dmy").year for text in ("31.12.69", "31/12/70", "2024-12-31")] == [2069, 1970, 2024]
    assert parse_date("31-12-24", "dmy") is None and parse_date("31.12.24", "ymd") is None


def test_a_date_with_a_short_year_shows_a_day_that_is_no_month(tmp_path):
    kinds = {}
    read_table(write(tmp_path / "a.csv", "version,day\n1.2.10,1.2.10\n1.12.15,13.12.15\n"), kinds=kinds)
    assert kinds == {"version": "word", "day": "dmy"}


def test_an_ambiguous_order_is_said(tmp_path):
    notes = []
    table = read_table(write(tmp_path / "a.csv", "a,b\n1/2/2024,1\n3/4/2024,2\n"), notes=notes)
    assert table["a"].astype("datetime64[D]").astype(str).tolist() == ["2024-01-02", "2024-03-04"]
    assert notes == ["column 'a' holds dates such as '1/2/2024', read with the month first"]


def cells(*values):
    """Return a table: of 60 rows, in which every fourth cell is one of ``values``, and the others are 100, 101, ..."""
    rows = (values[row // 4 % len(values)] if row % 4 == 0 else 100 + row for row in range(60))
    return "a;b\n" + "".join(f"{cell};{row % 7}\n" for row, cell in enumerate(rows))


DAYS = [f"{day:02}.01.2024" for day in range(10, 25)]
MIXED = [*DAYS[:9], *(f"Jan {day}" for day in range(10, 16))]
AMONG = "'unknown' is not a number, but other values .*--missing 'unknown'.*and 14 more in column 'a'"


CASES = "a;b\n" + "Flat;1\nflat;2\nhouse;3\nß;4\nSS;5\n" * 9
COMMA = {"form": Form(missing=["x,5"]), "kinds": {"a": "word"}}


@pytest.mark.parametrize(
    ("content", "note", "options"),
    [
        (cells(-999), "column 'a' holds -999 in 15 rows, apart .*101 to 159.*: --missing -999$", {}),
        (cells(-999), "column 'a' holds -999 in 15 rows", {"targets": ["a"]}),
        (cells(-1), "column 'a' holds -1 in 15 rows", {}),
        (cells(9999), "column 'a' holds 9999 in 15 rows", {}),
        (cells(-999), "", {"kinds": {"a": "number"}}),
        (cells(999, 700), "", {}),
        (cells(99), "", {}),
        ("a;b\n" + "-999;1\n3;2\n" * 20, "", {}),
        (cells("unknown"), "", {"form": Form(missing=["unknown"])}),
        ("a;b\n" + "x;1\n3;2\n" * 20, "holds words, such as 'x', and numbers, such as '3': .*--missing 'x'", {}),
        ("a;b\n" + "x;1\n3;2\n" * 20, "holds words, such as 'x', and numbers, such as '3'", {"targets": ["a"]}),
        (cells("N12"), "holds words, such as 'N12', and numbers, such as '101'", {}),
        (CASES, "column 'a' holds words that differ in case alone: 'Flat' and 'flat', 'ß' and 'SS'; write", {}),
        (CASES, "column 'a' holds words that differ in case alone: ", {"targets": ["a"]}),
        (CASES, "", {"kinds": {"a": "word"}}),
        (CASES, "", {"targets": ["a"], "words": True}),
        ("a;b\n" + "True;1\ntrue;2\nfalse;3\n" * 9, "", {}),
        (cells("x,5"), "", {"form": Form(missing=["x,5"])}),
        (cells("x", "5"), "^no cell is 'x,5'; give one word an option: --missing x --missing 5$", COMMA),
        (cells("z"), "", COMMA),
        (cells("x"), "holds words, such as 'x', and .*", {"targets": ["a"], "task": "classification"}),
        (
            "a;b\n" + "".join(f"{day};1\n" for day in MIXED),
            "'10.01.2024' and others such as 'Jan 10': .*2024-12-31",
            {},
        ),
        ("a,b\n" + "31.12.24,1\n1.2.69,2\n", "", {}),
        ("a;b\n" + "".join(f"1.{minor}.15;1\n" for minor in range(13)), "'1.1.15' and others such as '1.0.15'", {}),
        ("a;b\n" + "1.5;2,25\n" * 9, "decimal mark ',', but a point in 'a'$", {}),
        ("a;b;c\n" + "1.5;2,25;2\n" * 9, "decimal mark ',' in 'b'$", {}),
        # addresses have no decimal mark
        ("a,b\n" + "".join(f"192.168.123.{last},1.5\n" for last in range(89, 110)), "", {}),
        ("a;b\n" + "".join(f"10.0.1.{last};1\n192.168.123.45;1\n" for last in range(9)), "", {}),
    ],
)
def test_a_doubtful_column_is_said(content, note, options, tmp_path):
    notes = []
    read_table(write(tmp_path / "a.csv", content), notes=notes, **options)
    notes = notes[1:] if not note else notes
    assert [bool(re.search(note, line)) for line in notes].count(True) == bool(note), notes


def test_a_sum_below_the_rows_and_a_target_without_variation_are_said(tmp_path):
    rows = "".join(f"{'xyz'[row % 3]};{row % 7};5.5\n" for row in range(30))
    path = write(tmp_path / "a.csv", f"where;b;y\n{rows}Total:;99;5.5\n")
    note = "the last row holds 'Total:' in 'where': delete it if it is the sum of the others"
    dataset = load_data(path, target="y")
    assert note in dataset.notes
    notes = prepare(TableRecipe(epochs=1, scale="robust", models=1), dataset).notes
    assert "the target 'y' is 5.5 in all rows: choose another one" in notes
    rows = "".join(f"{row % 7};{'yes' if row % 3 else ''};{'no' if row % 2 else 'yes'};no\n" for row in range(30))
    path = write(tmp_path / "b.csv", f"b;always;half;never\n{rows}")
    notes = prepare(TableRecipe(epochs=1, scale="robust", models=1), load_data(path, target="always,half,never")).notes
    constant = [
        f"the target {name!r} is {value} in all rows: choose another one"
        for name, value in (("always", 1.0), ("never", 0.0))
    ]
    assert [note for note in notes if "in all rows" in note] == constant


@pytest.mark.parametrize(
    ("content", "message", "options"),
    [
        (cells("unknown"), f"line 2, column 'a': {AMONG}", {}),
        (cells("unknown"), f"line 2, column 'a': {AMONG}", {"targets": ["a"]}),
        (
            cells("unknown"),
            "missing 'unknown', or take the column as words with --task classification",
            {"targets": ["a"]},
        ),
        ("a\n" + "\n".join([*DAYS, "soon"]), "such as 31.12.2024; correct .* --missing 'soon', or .*--categorical", {}),
        ("a;b\n" + "1.75;2,25\n" * 9, "'1.75' is not a number with the decimal mark ','", {"form": Form(decimal=",")}),
        ("y;b\n" + "unknown;1\n3;2\n" * 20, "'unknown' is not a number", {"targets": ["y"], "task": "regression"}),
        (cells("1.5", "x"), "line 6, column 'a': 'x' is not a number", {"targets": ["a"]}),
        (
            cells("unknown", -999),
            "\n  no cell is 'unknown,-999'; give one word an option: --missing unknown --missing -999$",
            {"form": Form(missing=["unknown,-999"])},
        ),
        (
            "y;b\n" + "632.96;1\n" * 9,
            "mark ','; correct .*give --decimal . if all columns are written so, else write this one with ',',",
            {"targets": ["y"], "form": Form(decimal=",")},
        ),
    ],
)
def test_a_word_among_numbers_is_a_mistake(content, message, options, tmp_path):
    with pytest.raises(DataError, match=message):
        read_table(write(tmp_path / "a.csv", content), **options)


@pytest.mark.parametrize(
    ("content", "earlier", "value"),
    [
        # the training had both marks
        ("a;b\n1.234;5,5\n", {"a": ".", "b": ","}, 1.234),
        ("a;b\n1.23;5,5\n", {"a": ",", "b": "."}, 1.23),
        # the file shows its mark; it shows none
        ("a;b\n1.234;5,5\n", {"a": ".", "b": "."}, 1234),
        ("a;b\n1.234;5\n", {"a": ",", "b": ","}, 1234),
        ("a;b\n1.234;5\n", {}, 1.234),
        # no decimal comma stands between commas
        ("a,b\n1.234,5\n", {"a": ",", "b": ","}, 1.234),
        # a slip among thousands
        ("a;b\n" + "".join(f"{row}.234;5,5\n" for row in range(1, 30)) + "9.5;1,5\n", {}, None),
    ],
)
def test_the_decimal_mark_of_a_column(content, earlier, value, tmp_path):
    path = write(tmp_path / "a.csv", content)
    with nullcontext() if value else pytest.raises(DataError, match=r"line 31, column 'a': '9\.5' is not a number"):
        assert read_table(path, form=Form(earlier=earlier))["a"][0] == value


def test_a_run_reads_new_rows_with_the_marks_of_its_columns(tmp_path, capsys):
    lines = [f"{x / 3:.2f};{x * 7 / 3:.2f}".split(";") for x in range(1, 121)]
    text = "a;y\n" + "".join(f"{a};{y.replace('.', ',')}\n" for a, y in lines)
    path, out = write(tmp_path / "a.csv", text), tmp_path / "run"
    assert run("train", path, "--target", "y", "--models", "1", *QUICK, "--out", out) == 0
    assert read(out / "config.json")["preprocessor"]["decimals"] == [["a", "."], ["y", ","]]
    predicted = []
    for index, cell in enumerate(("9.125", "9.1250", "9125")):
        new = write(tmp_path / f"{index}.csv", f"a;z\n{cell};1,5\n")
        assert run("predict", out, "--data", new, "--out", tmp_path / f"p{index}.csv", "--ignore-unused") == 0
        predicted.append((tmp_path / f"p{index}.csv").read_text())
    assert predicted[0] == predicted[1] != predicted[2]
    assert run("train", path, "--from", out, "--models", "1", *QUICK, "--out", tmp_path / "again") == 0
    assert read(tmp_path / "again" / "config.json")["preprocessor"]["decimals"] == [["a", "."], ["y", ","]]


def test_dates_of_new_data(tmp_path):
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
    with pytest.raises(DataError, match=r"line 3, column 'when': '02/2021' is not a date such as 31.12.2024"):
        load_features(write(tmp_path / "b.csv", "when\n2021-02-03\n02/2021\n"), made)


# Numbers among words

ZIPS = "zip,y\n" + "10.0,1\nA,0\n007,1\n2.5,0\n" * 8


def test_a_word_that_reads_as_the_same_number_is_one_word(tmp_path):
    made = fitted(tmp_path, ZIPS)
    assert made.categories == (("007", "10.0", "2.5", "A"),)
    notes = []
    spelled = pandas.DataFrame({"zip": ["10", "+10.00", "1e1", "7", "2.50", "1_0", "10,0", "inf", "8"]})
    codes = load_features(spelled, Preprocessor.from_json(made.to_json()), notes=notes)[:, 0].tolist()
    assert codes[:5] == [1, 1, 1, 0, 2] and np.isnan(codes[5:]).all()
    assert notes == ["words unseen in training, taken as one other category: 4 in 'zip' (such as '1_0')"]
    # A file with types holds the same words.
    assert load_features(pandas.DataFrame({"zip": [10.0, 7.0, 2.5]}), made)[:, 0].tolist() == [1, 0, 2]


def test_spellings_that_training_tells_apart_stay_apart(tmp_path):
    made = fitted(tmp_path, ZIPS + "10,1\n" * 8)
    codes = load_features(pandas.DataFrame({"zip": ["10", "10.0", "10.00"]}), made)[:, 0]
    assert codes[:2].tolist() == [1, 2] and np.isnan(codes[2])


def test_long_words_of_digits_are_no_floats(tmp_path):
    made = fitted(tmp_path, ZIPS.replace("007", "9007199254740993"))
    codes = load_features(pandas.DataFrame({"zip": ["9007199254740993.0", "9007199254740992"]}), made)[:, 0]
    assert codes[0] == made.categories[0].index("9007199254740993") and np.isnan(codes[1])


def test_a_stored_preprocessor_of_an_earlier_release_tells_spellings_apart(tmp_path):
    made = fitted(tmp_path, ZIPS)
    config = made.to_config()
    del config["joins_spellings"]
    old = Preprocessor.from_config(config)
    assert np.isnan(load_features(pandas.DataFrame({"zip": ["10"]}), old)[0, 0])
    again = load_data(tmp_path / "a.csv", target="y", columns=ColumnChoices(like=old))
    assert not with_files(again, "a.csv", test=str(write(tmp_path / "b.csv", "zip,y\n10,1\n"))).joins_spellings
    assert not Preprocessor.fit(again, [0, 1]).joins_spellings


def test_labels_in_another_spelling_are_the_same_classes(tmp_path):
    text = "x,y\n" + "1.5,1.0\n2,2\n3,b\n" * 8
    dataset = load_data(write(tmp_path / "a.csv", text), target="y")
    made = Preprocessor.fit(dataset, np.arange(24))
    assert made.classes == ("1.0", "2", "b")
    other = write(tmp_path / "b.csv", "x,y\n1,1\n2,2.0\n3,b\n")
    assert made.class_codes(load_labelled(other, made)[1]).tolist() == [0, 1, 2]
    assert made.class_codes(np.array([2.0, 1])).tolist() == [1, 0]
    tested = with_files(dataset, str(tmp_path / "a.csv"), test=str(other))
    assert tested.classes.tolist() == ["1.0", "2", "b"]


def fitted(folder, text):
    """Return the preprocessor of all rows of a table, of which "zip" holds words."""
    dataset = load_data(write(folder / "a.csv", text), target="y", columns=ColumnChoices(categorical=["zip"]))
    return Preprocessor.fit(dataset, np.arange(len(dataset.y)))


LONG = 2**53 + 1


@pytest.mark.parametrize(
    "values", [[LONG, 5], [LONG, None], [str(LONG), "-5"], [Decimal(LONG), Decimal(5)], [float(LONG), 2.0**60]]
)
def test_lost_digits_are_said(values, tmp_path):
    notes, text = [], isinstance(values[0], str)
    file = write(tmp_path / "a.csv", "n\n" + "\n".join(values)) if text else as_frame(pyarrow.table({"n": values}))
    read_table(file, notes=notes)
    said = (
        "column 'n' loses the last digits of numbers such as 9007199254740993; --categorical takes them as words, "
        "--id as names of the rows"
    )
    assert notes == ([] if isinstance(values[0], float) else [said])


def test_names_of_rows_keep_their_digits(tmp_path):
    made = fitted(tmp_path, ZIPS)
    ids = {}
    table = pyarrow.table({"zip": ["10", "7"], "n": pyarrow.array([LONG, None])})
    load_features(table, replace(made, ids=("n",)), ids=ids)
    assert ids["n"].tolist() == [str(LONG), ""]


@pytest.mark.parametrize("zone", ["Z", "+02:00", "-0500", ""])
@pytest.mark.parametrize("form", ["text", "parquet"])
def test_a_time_zone_is_said(zone, form, tmp_path):
    notes = []
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


def test_useless_columns_are_left_out_and_named(tmp_path):
    names = ["column_1", "customerId", "ID", "name", "one", "same", "empty"]
    rows = [f"{i + 1},{i * 7 % 101},{i * 7 % 97},name {i},1,w,,{i % 7},{i % 2}" for i in range(60)]
    path = write(tmp_path / "a.csv", "\n".join([",".join(["", *names[1:], "x", "y"]), *rows]))
    dataset = load_data(path, target="y")
    assert dataset.feature_names == ("x",)
    (line,) = dataset.notes
    assert all(f"'{name}' (" in line for name in names)
    kept = load_data(path, target="y", columns=ColumnChoices(drop=["x"], keep=["customerId"], categorical=["name"]))
    assert kept.feature_names == ("customerId", "name")
    with pytest.raises(DataError, match=r"no columns 'z' to drop; the columns are 'column_1'"):
        load_data(path, target="y", columns=ColumnChoices(drop=["z"]))
    with pytest.raises(ArgumentError, match="drop: 'y' is the target"):
        load_data(path, target="y", columns=ColumnChoices(drop=["y"]))


def test_the_only_feature_is_kept(tmp_path):
    path = write(tmp_path / "a.csv", "\n".join(["t,y", *(f"{i},{i % 2}" for i in range(40))]))
    assert load_data(path, target="y").feature_names == ("t",)


# Missing and unseen cells


def table_of(columns):
    """Return a data set of numbers (lists of floats) and words (lists of str)."""
    X, categories = [], []
    for values in columns.values():
        words = tuple(sorted(set(values))) if isinstance(values[0], str) else None
        X.append(values if words is None else [words.index(value) for value in values])
        categories.append(words)
    y = np.arange(len(X[0])) % 2
    return Dataset("made", np.array(X, float).T, y, "classification", tuple(columns), categories=tuple(categories))


def test_missing_numbers_become_the_median_and_an_indicator():
    data = table_of({"a": [1.0, NAN, 2.0, 9.0, NAN], "b": [1.0, 2.0, 3.0, 4.0, 5.0]})
    made = Preprocessor.fit(data, [0, 1, 2, 3], scale="none")
    assert made.transform_features(data.X).tolist() == [[1, 0, 1], [2, 1, 2], [2, 0, 3], [9, 0, 4], [2, 1, 5]]
    # The column without a missing cell in training has a median, and no indicator.
    assert made.transform_features([[1.0, NAN]]).tolist() == [[1, 0, 2.5]]
    assert made.width == 3
    assert Preprocessor.fit(data, [1, 4], scale="none").transform_features(data.X)[:, 0].tolist() == [1, 0, 2, 9, 0]


def test_words_that_the_training_rows_lack_are_in_no_input():
    data = table_of({"a": ["u", "v", "", "w"]})
    made = Preprocessor.fit(data, [0, 1, 2], scale="none")
    assert made.transform_features(data.X).tolist() == [[0, 1, 0], [0, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert made.transform_features([[NAN]]).tolist() == [[0, 0, 0]]


def test_rare_words_share_an_input_with_unseen_ones():
    words = [f"w{i:02}" for i in range(30)]
    data = table_of({"a": [*words[:25], *words[:25], *words[25:]]})
    made = Preprocessor.fit(data, np.arange(55), scale="none")
    assert made.width == 26
    inputs = made.transform_features(np.array([[0.0], [24.0], [25.0], [29.0], [NAN]]))
    assert inputs.argmax(axis=1).tolist() == [0, 24, 25, 25, 25]
    assert inputs.sum(axis=1).tolist() == [1] * 5


def test_many_words_have_bounded_inputs():
    data = table_of({"a": [f"w{i}" for i in range(1000)] * 3})
    made = Preprocessor.fit(data, np.arange(3000))
    assert made.width == MOST_WORDS + 1
    assert (made.transform_features(data.X).sum(axis=1) == 1).all()
    assert Preprocessor.fit(data, np.arange(3000), most_words=None).width == 1000


def test_inputs_are_made_a_piece_at_a_time(monkeypatch):
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


def test_an_earlier_release_knows_no_missing_cells():
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


def test_days_of_parquet_are_those_of_a_text(tmp_path):
    frame = pandas.DataFrame({"d": [date(2024, 1, 2), date(2020, 5, 6), None, date(2021, 7, 8)], "y": [*"pqpq"]})
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    text, days = (load_data(tmp_path / name, target="y") for name in ("a.csv", "a.parquet"))
    assert text.feature_names == days.feature_names
    np.testing.assert_array_equal(text.X, days.X)


CELLS = {
    "number": st.one_of(st.sampled_from(["", "NA", "?"]), st.floats(-1e6, 1e6).map(repr)),
    "price": st.one_of(st.just("null"), st.integers(0, 10**7).map(lambda value: f"${value:,}")),
    "word": st.sampled_from(["red", "green", "dark blue", "a;b", 'the "one"', "", "None"]),
    "date": st.one_of(st.just(""), st.dates(min_value=pandas.Timestamp(1950, 1, 1).date()).map(str)),
}


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_training_and_new_data_have_the_same_features(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("same")

    def table(name, lines, separator=","):
        with (folder / name).open("w", newline="") as stream:
            csv.writer(stream, delimiter=separator).writerows(lines)
        return folder / name

    rows = data.draw(st.lists(st.tuples(*CELLS.values()), min_size=4, max_size=30))
    rows = [("1.5", "$5", "red", "2024-05-06"), ("2.5", "$1,600", "green", "2023-01-02"), *rows]
    order = data.draw(st.permutations(range(4)))
    names = list(CELLS)
    train = table("train.csv", [[*names, "y"], *([*row, index % 2] for index, row in enumerate(rows))])
    moved = [[line[k] for k in order] for line in (names, *rows)]
    new = table("new.csv", moved, data.draw(st.sampled_from(",;\t|")))
    dataset = load_data(train, target="y", columns=ColumnChoices(keep=names))
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1))
    made = Preprocessor.fit(dataset, chosen, scale=data.draw(st.sampled_from(SCALES)))
    inputs = made.transform_features(dataset.X)
    assert np.isfinite(inputs).all() and inputs.shape == (len(rows), made.width)
    restored = Preprocessor.from_json(made.to_json())
    assert restored == made
    np.testing.assert_array_equal(restored.transform_features(load_features(new, restored)), inputs)
    # The same row with an unseen word has the same other inputs.
    table("new.csv", [names, *([*row[:2], "unseen", row[3]] for row in rows)])
    notes = []
    again = made.transform_features(load_features(new, made, notes=notes))
    assert again.shape == inputs.shape
    start = sum(1 + made.missing_inputs[column] for column in range(2))
    words = np.s_[start : inputs.shape[1] - (made.width - start - made.word_inputs(2).max() - 1)]
    np.testing.assert_array_equal(np.delete(again, words, axis=1), np.delete(inputs, words, axis=1))
    assert f"taken as one other category: {len(rows)} in 'word' (such as 'unseen')" in notes[-1]


# The command line


def odd_table(path):
    lines = ["id;größe;farbe;tag;preis"]
    for index, size in enumerate(np.random.default_rng(0).normal(size=150)):
        price = "" if index == 7 else f"{1000 + 100 * size + 50 * (index % 4):.2f}"
        height = "NA" if index % 10 == 3 else f"{size:.3f}"
        colour, day = ("rot", "grün", "", "blau")[index % 4], f"{1 + index % 28:02}.{1 + index % 12:02}.2023"
        lines.append(";".join([str(100 + index), height.replace(".", ","), colour, day, price.replace(".", ",")]))
    return write(path, "\n".join(lines).encode("latin-1"))


def test_an_odd_table_from_training_to_prediction(tmp_path, capsys):
    table, folder = odd_table(tmp_path / "odd.csv"), tmp_path / "run"
    assert run("train", table, "--target", "preis", "--hidden", "8", "--out", folder, "--epochs", "3") == 0
    shown = capsys.readouterr().err
    for line in (
        "odd.csv: separated by ';', decimal mark ',', encoding cp1252",
        "rows without 'preis', left out: 1 of 150",
        "left out, unless you --keep them: 'id' (",
        "missing cells, filled in: 15 in 'größe', 37 in 'farbe'",
    ):
        assert line in shown
    config = read(folder / "config.json")
    assert config["data"]["notes"][0] == "odd.csv: separated by ';', decimal mark ',', encoding cp1252"
    report = read(folder / "report.json")
    assert result_of(capsys, "evaluate", folder)["loss"] == report["test"]["loss"]
    assert run("train", "--resume", folder, "--epochs", "4", "--quiet") == 0
    new = write(tmp_path / "new.csv", "tag,farbe,größe\n05.06.2023,lila,1.5\n,,\n2.3.2024,rot,?\n")
    capsys.readouterr()
    shown = output_of(capsys, "predict", folder, "--data", new, "--out", tmp_path / "out.csv")
    assert "missing cells, filled in: 2 in 'größe', 1 in 'farbe', 1 in 'tag'" in shown
    assert "words unseen in training, taken as one other category: 1 in 'farbe' (such as 'lila')" in shown
    said = (tmp_path / "out.csv").read_text().split()
    assert len(said) == 4 and np.isfinite(np.array(said[1:], float)).all()
    assert "rows without 'preis', left out: 1 of 150" in output_of(capsys, "evaluate", folder, "--data", table)


def test_the_options_of_a_table(tmp_path, capsys):
    lines = [f"{k % 7}:{k % 3}:{k}:{'ab'[k % 2]}" for k in range(60)]
    table, folder = write(tmp_path / "bare.csv", "\n".join(lines)), tmp_path / "run"
    form = ("--sep", ":", "--no-header", "--encoding", "latin-1")
    arguments = ("train", table, *form, "--target", "column_4", "--drop", "column_1", "--keep", "column_3")
    assert run(*arguments, "--categorical", "column_2", "--epochs", "2", "--quiet", "--out", folder) == 0
    config = read(folder / "config.json")
    assert config["preprocessor"]["feature_names"] == ["column_2", "column_3"]
    assert config["preprocessor"]["categories"] == [["0", "1", "2"], None]
    assert "--sep : --encoding latin-1 --no-header" in config["command"] and "--drop column_1" in config["command"]
    # New data have the form of the training unless the options say otherwise.
    assert run("predict", folder, "--data", table, "--out", tmp_path / "out.csv") == 0
    capsys.readouterr()
    assert run("train", table, "--sep", "::", "--target", "column_4", "--out", tmp_path / "no") == 2
    assert "error: --sep: expected one character" in capsys.readouterr().err


def test_a_run_of_an_earlier_release(tmp_path, capsys):
    """Its configuration lacks everything on missing cells and forms."""
    folder = trained(tmp_path, *QUICK, "--drop", "day")
    config = read(folder / "config.json")
    for part, names in {
        "preprocessor": ("feature_fill", "missing_inputs", "shared", "other_inputs", "dates"),
        "options": ("sep", "decimal", "encoding", "header", "drop", "keep", "categorical"),
        "data": ("notes",),
    }.items():
        config[part] = {name: value for name, value in config[part].items() if name not in names}
    (folder / "config.json").write_text(json.dumps(config))
    assert result_of(capsys, "evaluate", folder)["loss"] == read(folder / "report.json")["test"]["loss"]
    assert run("predict", folder, "--data", tmp_path / "data.csv", "--out", tmp_path / "out.csv") == 0
    assert run("train", "--resume", folder, "--epochs", "4", "--quiet") == 0


def test_the_mistakes_of_a_file_are_lines(tmp_path, capsys):
    lines = ["a,b,y", *(f"{i},{2 * i},{i % 2}" for i in range(40)), "x,1,0", "4,z,1"]
    table = write(tmp_path / "a.csv", "\n".join(lines))
    first, *others = refusal(capsys, "train", table, "--target", "y", "--out", tmp_path / "run", code=1).splitlines()
    assert first == f"error: {table}: 2 mistakes:"
    assert [line.split(":")[0] for line in others] == ["  line 42, column 'a'", "  line 43, column 'b'"]
