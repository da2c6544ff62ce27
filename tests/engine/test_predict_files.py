"""``fusemlp predict``: the rows' own columns beside the predictions, and files of every form that the readers know.

Text that a spreadsheet would run as a formula has an apostrophe in front, in all CSV files of the commands.
"""

import csv
import io
import sys
import tracemalloc

import numpy as np
import pandas
import pyarrow
import pytest

from fusemlp.cli import model as of_runs
from fusemlp.cli.model import SUFFIXES
from fusemlp.datasets.load import load_data
from fusemlp.report.runs import Run, csv_bytes, read_columns
from make import frame, output_of, refusal, rows, run, trained

READERS = {
    "csv": pandas.read_csv,
    "tsv": lambda path: pandas.read_csv(path, sep="\t"),
    "parquet": pandas.read_parquet,
    "feather": pandas.read_feather,
    "arrow": pandas.read_feather,
    "xlsx": lambda path: pandas.read_excel(path, dtype={"zip": str}),
}
# As they stand in the file: an identifier with zeros, a whole number, text like a formula, an empty cell.
OWN = {"zip": ["00123", "00456", "99999"], "count": ["3", "4", ""], "note": ["=1+1", "-1.50", 'a "b", c']}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("run"), "--epochs", "2", "--quiet", "--models", "1", classes=2)


@pytest.fixture(scope="module")
def new_rows(tmp_path_factory):
    """A file of new rows, with columns that the training did not have."""
    path = tmp_path_factory.mktemp("rows") / "new.csv"
    table = frame(3, classes=2).drop(columns="price")
    for name, cells in OWN.items():
        table.insert(0, name, cells)
    table.to_csv(path, index=False)
    return path


def as_text(path):
    with path.open(newline="") as stream:
        header, *rows = csv.reader(stream)
    return dict(zip(header, map(list, zip(*rows, strict=True)), strict=True))


def test_the_data_stand_in_front_of_the_predictions_as_they_are(model, new_rows, tmp_path, capsys):
    said = output_of(capsys, "predict", model, "--data", new_rows, "--with-data", "--out", tmp_path / "out.csv")
    written, given = as_text(tmp_path / "out.csv"), as_text(new_rows)
    assert [*written] == [*given, "prediction"]
    assert written.pop("note") == ["'=1+1", *given.pop("note")[1:]] and "apostrophe" in said
    assert {name: written[name] for name in given} == given
    # they are not ignored
    assert "ignored" not in said


@pytest.mark.parametrize("names", [["zip"], ["note", "a"]])
def test_columns_that_are_named_stand_in_front(names, model, new_rows, tmp_path):
    options = [word for name in names for word in ("--id", name)]
    assert run("predict", model, "--data", new_rows, *options, "--out", tmp_path / "out.csv") == 0
    assert {*as_text(tmp_path / "out.csv")} == {*names, "prediction"}


def test_named_columns_replace_those_of_the_training(tmp_path):
    run_folder = trained(tmp_path, "--id", "word", "--epochs", "2", "--quiet", "--models", "1", classes=2)
    written = []
    for options in ((), ("--id", "a"), ("--with-data",)):
        assert run("predict", run_folder, "--data", tmp_path / "data.csv", *options, "--out", tmp_path / "o.csv") == 0
        written.append([*as_text(tmp_path / "o.csv")])
        (tmp_path / "o.csv").unlink()
    assert written == [["word", "prediction"], ["a", "prediction"], ["a", "b", "word", "day", "price", "prediction"]]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_form_is_read_again(suffix, model, new_rows, tmp_path):
    out = tmp_path / f"out{suffix}"
    assert run("predict", model, "--data", new_rows, "--with-data", "--proba", "--out", out) == 0
    table = READERS[suffix.split(".")[1]](out)
    expected = pandas.read_csv(new_rows)
    names = [*expected, "prediction"]
    assert [*table][: len(names)] == names and len(table) == 3
    np.testing.assert_allclose(table["a"], expected["a"])
    np.testing.assert_allclose(table.filter(like="probability").sum(axis=1), 1.0, atol=1e-6)
    typed = suffix in (".parquet", ".feather", ".arrow", ".xlsx")
    if typed:
        assert {*table.filter(like="probability").dtypes} == {np.dtype(float)}
        # no number loses its zeros
        assert table["zip"].tolist() == OWN["zip"]
        assert table["count"].tolist()[:2] == [3, 4] and pandas.isna(table["count"][2])
    # and by the readers of this library
    assert load_data(out, target="prediction").y.tolist() == table["prediction"].tolist()


@pytest.mark.parametrize("suffix", ["csv", "parquet", "xlsx"])
def test_decimal_commas_become_points(suffix, model, new_rows, tmp_path):
    table, out = pandas.read_csv(new_rows), tmp_path / f"out.{suffix}"
    table["paid"] = ["1.234,5", "0,25", ""]
    table.to_csv(tmp_path / "new.csv", index=False, sep=";", decimal=",")
    assert run("predict", model, "--data", tmp_path / "new.csv", "--with-data", "--out", out) == 0
    written = READERS[suffix](out)
    np.testing.assert_array_equal(written["a"], table["a"])
    np.testing.assert_array_equal(written["paid"], [1234.5, 0.25, np.nan])
    assert run("predict", model, "--data", out, "--out", tmp_path / "again.csv") == 0
    assert as_text(tmp_path / "again.csv")["prediction"] == [*map(str, written["prediction"])]


@pytest.mark.parametrize("suffix", ["parquet", "xlsx"])
def test_long_numbers_keep_their_digits(suffix, model, new_rows, tmp_path):
    table, out = pandas.read_csv(new_rows), tmp_path / f"out.{suffix}"
    own = {"big": [12345678901234567890, 12345678901234567891, 1], "long": [9007199254740993, 2, 3], "e": [1e16, 2, 3]}
    table.assign(**own).to_csv(tmp_path / "new.csv", index=False)
    assert run("predict", model, "--data", tmp_path / "new.csv", "--with-data", "--out", out) == 0
    written = READERS[suffix](out)
    for name, numbers in own.items():
        assert [*map(float if name == "e" else int, written[name])] == numbers


def test_excel_takes_zones_lists_and_control_characters(model, tmp_path):
    table = frame(2, classes=2).drop(columns="price")
    table["time"] = pandas.to_datetime(["2020-01-02 03:04", None], utc=True)
    table["list"], table["bell"] = [[1, 2], []], ["a\x07b", "c"]
    table.to_parquet(tmp_path / "new.parquet")
    options = ("--data", tmp_path / "new.parquet", "--with-data", "--out", tmp_path / "out.xlsx")
    assert run("predict", model, *options) == 0
    written = pandas.read_excel(tmp_path / "out.xlsx", keep_default_na=False)
    assert written["time"][0] == "2020-01-02 03:04:00+00:00"
    assert written["list"].tolist() == ["[1, 2]", "[]"] and written["bell"].tolist() == ["a\\x07b", "c"]


def test_types_of_a_parquet_file_stay(model, tmp_path):
    table = (
        frame(5, classes=2)
        .drop(columns="price")
        .assign(zip=["123", "4", "5", "6", "7"], flag=[True, False] * 2 + [None])
    )
    table.to_parquet(tmp_path / "new.parquet")
    expected = pandas.read_parquet(tmp_path / "new.parquet")
    for suffix in (".parquet", ".feather"):
        out = tmp_path / f"o{suffix}"
        assert run("predict", model, "--data", tmp_path / "new.parquet", "--with-data", "--out", out) == 0
        written = READERS[suffix[1:]](out)
        pandas.testing.assert_frame_equal(written.drop(columns="prediction"), expected)


def test_predictions_on_stdout_are_alone_there(model, new_rows, tmp_path, capsys, monkeypatch):
    assert run("predict", model, "--data", new_rows, "--id", "zip", "--out", tmp_path / "out.csv") == 0
    capsys.readouterr()
    assert run("predict", model, "--data", new_rows, "--id", "zip", "--out", "-") == 0
    said = capsys.readouterr()
    assert said.out == (tmp_path / "out.csv").read_text()
    assert said.out.startswith("zip,prediction\n")
    assert said.err.endswith("predictions of 3 rows on stdout\n")
    # before the work
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    words = ("predict", tmp_path / "no run", "--data", new_rows, "--out", tmp_path / "out.xlsx")
    assert f"{tmp_path / 'out.xlsx'}: Excel files need openpyxl: pip install" in refusal(capsys, *words, code=1)


REFUSED = {
    "json": (("--out", "-", "--json"), 2, "--json: with --out - the predictions are on stdout"),
    "both": (("--with-data", "--id", "a"), 2, "--id: --with-data writes all columns, 'a' too; leave out one of both"),
    "unknown": (("--id", "zap"), 1, "no columns 'zap'; the columns are 'note', 'count', 'zip', "),
}


@pytest.mark.parametrize(("options", "code", "words"), REFUSED.values(), ids=REFUSED)
def test_a_wrong_call_writes_nothing(options, code, words, model, new_rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    out = () if "--out" in options else ("--out", "out.csv")
    assert run("predict", model, "--data", new_rows, *options, *out) == code
    said = capsys.readouterr()
    assert words in said.err and said.out == "" and list(tmp_path.iterdir()) == []


def test_a_column_of_the_data_is_not_written_twice(model, new_rows, tmp_path, capsys):
    first = tmp_path / "first.csv"
    assert run("predict", model, "--data", new_rows, "--with-data", "--out", first) == 0
    assert run("predict", model, "--data", first, "--with-data", "--out", tmp_path / "second.csv") == 1
    assert "predictions have columns 'prediction' too; rename them there" in capsys.readouterr().err


def test_arrays_have_no_columns_to_carry(model, tmp_path, capsys):
    np.savez(tmp_path / "x.npz", X=np.zeros((3, 8)))
    for option in (("--with-data",), ("--id", "a")):
        said = refusal(capsys, "predict", model, "--data", tmp_path / "x.npz", *option, "--out", tmp_path / "o.csv")
        assert f"error: {option[0]}: only tables (" in said


# A spreadsheet would run this text, and takes the other for numbers and words.
FORMULAS = ("=1+1", "+3-cmd|' /C calc'!A0", "-2+3", "-word", "-", "@SUM(A1)", "\t=1", "\r=1", "\n=1", "\uff1d1")
FORMULAS += ("'=1", "''+a")
PLAIN = ("-1.5", "+3", "-1,234.5", "-1,5", "-1e-05", "-inf", "-12%", "word", "a=1", "'word", "'", "", -1.5, 3, None)


def test_formulas_get_an_apostrophe_and_numbers_stay():
    notes = []
    content = csv_bytes([FORMULAS], notes).decode()
    assert next(csv.reader(io.StringIO(content, newline=""))) == [f"'{text}" for text in FORMULAS]
    assert len(notes) == 1 and "apostrophe" in notes[0]
    plain = csv_bytes([PLAIN], notes).decode()
    assert next(csv.reader(io.StringIO(plain, newline=""))) == ["" if cell is None else str(cell) for cell in PLAIN]
    assert len(notes) == 1
    # a carriage return begins no row, and its rest no cell
    assert list(csv.reader(io.StringIO(csv_bytes([["a\r=1", "b"]]).decode(), newline=""))) == [["a\r=1", "b"]]


def test_rows_are_written_without_all_their_cells_at_once(monkeypatch):
    monkeypatch.setattr(of_runs, "BLOCK", 1000)
    columns = {"id": pyarrow.array([f"row {index}" for index in range(30_000)]), "p": np.arange(30_000) / 7}
    tracemalloc.start()
    try:
        content = of_runs.table_bytes("out.csv", columns, [])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # the content while it grows and once more, as bytes; the cells of all rows would take more than 200 bytes a row
    assert len(content) < 32 * 30_001 and peak < 4 * len(content)


def test_the_files_of_a_run(tmp_path, capsys):
    X = np.random.default_rng(0).normal(size=(60, 2))
    table = pandas.DataFrame({"=id": ["=HYPERLINK(1)", "-1.5"] * 30, "@a": X[:, 0], "b": X[:, 1]})
    table["kind"] = np.where(X[:, 0] > 0, "+yes()", "no")
    data, out, folder = tmp_path / "data.csv", tmp_path / "out.csv", tmp_path / "run"
    table.to_csv(data, index=False)
    options = ("--id", "=id", "--hidden", "4", "--models", "1", "--quiet", "--out", folder)
    assert run("train", data, "--target", "kind", "--epochs", "40", *options) == 0
    assert rows(folder / "columns.csv")[0]["column"] == "'=id"
    assert [one["column"] for one in read_columns(Run(folder))] == ["=id", "@a", "b", "kind"]
    capsys.readouterr()
    given = ("--data", data, "--out", out)
    assert "apostrophe" in output_of(capsys, "predict", folder, *given, "--proba", "--interval", "0.5")
    found = rows(out)
    assert list(found[0]) == ["'=id", "prediction", "set", "probability_+yes()", "probability_no"]
    assert [row["'=id"] for row in found[:2]] == ["'=HYPERLINK(1)", "-1.5"]
    assert {row["prediction"] for row in found} == {"'+yes()", "no"} and {row["set"] for row in found} >= {"'+yes()"}
    assert "apostrophe" in output_of(capsys, "explain", folder, *given, "--method", "integrated", "--force")
    assert list(rows(out)[0]) == ["row", "'=id", "explained", "output", "baseline", "'@a", "b", "error"]
    # the other format has the labels as they are
    assert "apostrophe" not in output_of(capsys, "predict", folder, "--data", data, "--out", tmp_path / "out.npz")
    with np.load(tmp_path / "out.npz") as arrays:
        assert set(arrays["predictions"]) == {"+yes()", "no"} and arrays["ids"][0, 0] == "=HYPERLINK(1)"
