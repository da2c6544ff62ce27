"""The CSV files of the commands: text that a spreadsheet would run as a formula has an apostrophe in front."""

import csv
import io

import numpy as np
import pandas

from fusemlp.report.runs import Run, read_columns
from fusemlp.report.written import csv_bytes
from make import rows, run

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
    assert run("predict", folder, *given, "--proba", "--interval", "0.5") == 0
    assert "apostrophe" in capsys.readouterr().out
    found = rows(out)
    assert list(found[0]) == ["'=id", "prediction", "set", "probability_+yes()", "probability_no"]
    assert [row["'=id"] for row in found[:2]] == ["'=HYPERLINK(1)", "-1.5"]
    assert {row["prediction"] for row in found} == {"'+yes()", "no"} and {row["set"] for row in found} >= {"'+yes()"}
    assert run("explain", folder, *given, "--method", "integrated", "--force") == 0
    assert "apostrophe" in capsys.readouterr().out
    assert list(rows(out)[0]) == ["row", "'=id", "explained", "output", "baseline", "'@a", "b", "error"]
    # the other format has the labels as they are
    assert run("predict", folder, "--data", data, "--out", tmp_path / "out.npz") == 0
    assert "apostrophe" not in capsys.readouterr().out
    with np.load(tmp_path / "out.npz") as arrays:
        assert set(arrays["predictions"]) == {"+yes()", "no"} and arrays["ids"][0, 0] == "=HYPERLINK(1)"
