"""A picture or a page that cannot be made costs no run its report and its scores, and names are drawn as they are."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from fusemlp.cli import report as command
from fusemlp.report import plots
from make import configuration, read, rows, run

# a file name of bytes that are no UTF-8, as Python reads it, and letters that begin a formula of matplotlib
ODD = "d\udcff$a_{$"
SMALL = ("--hidden", "4", "--epochs", "2", "--models", "1", "--quiet")


def classes(path, names=("no", "yes")):
    X = np.random.default_rng(0).normal(size=(80, 3))
    np.savez(path, X=X, y=np.array(names)[(X[:, 0] > 0).astype(int)])
    return path


def broken(*given, **named):
    raise ValueError("Key backend: 'nonsense'\nis not valid")


def failed(path):
    return f"{str(path)!r} cannot be made (ValueError: Key backend: 'nonsense' is not valid)"


def test_a_run_without_its_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(plots, "_figure", broken)
    data = classes(tmp_path / "data.npz")
    assert run("train", data, *SMALL, "--out", tmp_path / "run") == 0
    shown, report = capsys.readouterr().out.splitlines(), read(tmp_path / "run/report.json")
    because = failed(tmp_path / "run/curves.png")
    assert f"no plot: {because}" in shown and report["no_plot"] == because
    assert any(line.startswith("test accuracy") for line in shown)
    assert f"report {tmp_path / 'run/report.html'}" in shown and (tmp_path / "run/report.html").exists()
    assert not (tmp_path / "run/curves.png").exists()
    assert run("sweep", data, "--vary", "lr=0.1,0.01", "--epochs", "2", "--quiet", "--out", tmp_path / "sweep") == 0
    shown = capsys.readouterr().out.splitlines()
    for name in ("scores.png", "curves.png"):
        assert f"no plot: {failed(tmp_path / 'sweep' / name)}" in shown
    assert f"run folder {tmp_path / 'sweep'}" in shown
    assert (tmp_path / "sweep/report.json").exists() and not (tmp_path / "sweep/sweep.jsonl").exists()


def test_a_picture_that_was_asked_for_fails_after_the_results(tmp_path, monkeypatch, capsys):
    data, out = classes(tmp_path / "data.npz"), tmp_path / "picture.png"
    assert run("train", data, *SMALL, "--out", tmp_path / "run") == 0
    monkeypatch.setattr(plots, "_figure", broken)
    capsys.readouterr()
    assert run("explain", tmp_path / "run", "--plot", out, "--json") == 1
    shown = capsys.readouterr()
    assert len(json.loads(shown.out)["columns"]) == 3 and "plot" not in json.loads(shown.out)
    assert shown.err.endswith(f"error: plot: {failed(out)}\n")
    assert run("lr-find", data, "--steps", "20", "--plot", out, "--json") == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out)["suggested"] > 0 and json.loads(shown.out)["plot"] is None
    assert shown.err.endswith(f"error: plot: {failed(out)}\n")
    assert run("plot", tmp_path / "run", "--out", out) == 1
    assert capsys.readouterr().err == f"error: out: {failed(out)}\n"
    assert not out.exists()


@pytest.mark.parametrize("setting", ["backend", "file"])
def test_matplotlib_cannot_be_imported(setting, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(configuration()))
    (folder / "metrics.csv").write_text("epoch,loss\n1,2.0\n2,1.0\n")
    (tmp_path / "matplotlibrc").write_bytes(b"font.size: \xff\n")
    settings = {"MPLBACKEND": "nonsense"} if setting == "backend" else {"MATPLOTLIBRC": str(tmp_path)}
    command = [sys.executable, "-m", "fusemlp", "plot", folder, "--out", tmp_path / "out.png"]
    ended = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert ended.returncode == 1 and ended.stdout == ""
    line = ended.stderr.splitlines()[-1]
    assert line.startswith(f"error: out: '{tmp_path / 'out.png'}' cannot be made (")
    assert ("nonsense" if setting == "backend" else "UnicodeDecodeError") in line


def test_a_run_without_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "page", broken)
    assert run("train", classes(tmp_path / "data.npz"), *SMALL, "--out", tmp_path / "run", "--json") == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if '"end"' in line)
    because = failed(tmp_path / "run/report.html")
    assert json.loads(line)["page"] is None and json.loads(line)["no_page"] == because
    assert "test" in read(tmp_path / "run/report.json")
    assert run("report", tmp_path / "run") == 1
    assert capsys.readouterr().err == f"error: report: {because}\n"
    options = ("--vary", "lr=0.1,0.01", "--epochs", "2", "--quiet")
    assert run("sweep", tmp_path / "data.npz", *options, "--out", tmp_path / "sweep") == 0
    assert f"no report: {failed(tmp_path / 'sweep/report.html')}" in capsys.readouterr().out.splitlines()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has file names of any bytes")
def test_names_that_are_no_utf_8_and_look_like_formulas(tmp_path, capsys):
    table = tmp_path / f"{ODD}.csv"
    numbers = np.random.default_rng(0).normal(size=(80, 2))
    table.write_text("a$x^$,b,y\n" + "".join(f"{a:.3f},{b:.3f},{'no' if a > 0 else 'yes'}\n" for a, b in numbers))
    folder = tmp_path / f"run{ODD}"
    assert run("train", table, "--target", "y", *SMALL, "--out", folder) == 0
    assert f"plot {tmp_path}/run{ODD}/curves.png".replace("\udcff", r"\udcff") in capsys.readouterr().out
    assert r"d\udcff$a_{$.csv: classification of y" in (folder / "report.html").read_text()
    for ending in plots.FORMATS:
        assert run("plot", folder, tmp_path / folder, "--out", tmp_path / f"all{ending}") == 0
    assert run("explain", folder, "--plot", tmp_path / "columns.png") == 0
    assert run("lr-find", table, "--target", "y", "--steps", "20", "--plot", tmp_path / "rates.png") == 0
    assert (tmp_path / "columns.png").exists() and (tmp_path / "rates.png").exists()


def test_classes_with_lone_surrogates(tmp_path):
    data, folder = classes(tmp_path / "data.npz", ("\ud800", "$\\frac$")), tmp_path / "run"
    assert run("train", data, *SMALL, "--out", folder) == 0
    assert (folder / "report.html").exists()
    assert run("predict", folder, "--data", data, "--out", tmp_path / "out.csv", "--proba") == 0
    assert list(rows(tmp_path / "out.csv")[0]) == ["prediction", "probability_$\\frac$", r"probability_\ud800"]
    output = ("--method", "integrated", "--plot", tmp_path / "out.png")
    assert run("explain", folder, *output, "--out", tmp_path / "rows.csv") == 0
    assert {row["explained"] for row in rows(tmp_path / "rows.csv")} <= {r"\ud800", "$\\frac$"}


def test_residuals_that_are_huge_and_nearly_equal(tmp_path):
    X = np.random.default_rng(0).normal(size=(60, 2))
    for name, y in (("train", X[:, 0]), ("test", 1e20 + 1e4 * X[:, 1]), ("equal", np.full(60, 1e20))):
        np.savez(tmp_path / f"{name}.npz", X=X, y=y)
    for name in ("test", "equal"):
        options = ("--test", tmp_path / f"{name}.npz", *SMALL)
        assert run("train", tmp_path / "train.npz", *options, "--out", tmp_path / f"run-{name}") == 0
        assert "Residuals" in (tmp_path / f"run-{name}" / "report.html").read_text()
