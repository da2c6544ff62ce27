"""``fusemlp plot``: several runs in one picture; and pictures that cannot be made, which cost no run its report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fusemlp.cli import report as command
from fusemlp.cli.runs import names
from fusemlp.report import plots
from fusemlp.report.plots import Curves
from fusemlp.report.runs import Run
from make import configuration, output_of, read, refusal, result_of, rows, run


def made(path, metrics, loss="cross_entropy"):
    """Make a run folder with the files that the command reads."""
    path.mkdir(parents=True)
    Run(path).config.write_text(json.dumps(configuration(loss)))
    Run(path).metrics.write_text(metrics)
    return path


CLASSES = "epoch,loss,accuracy,val_loss,val_accuracy\n1,1.0,0.5,1.1,0.4\n2,0.5,0.8,0.7,0.6\n"
VALUES = "epoch,loss\n1,2.0\n2,1.0\n3,0.5\n"


def test_runs_in_one_picture(tmp_path, capsys):
    one, other = made(tmp_path / "a", CLASSES), made(tmp_path / "b", VALUES, "mse")
    assert output_of(capsys, "plot", one, other, "--out", tmp_path / "both.png") == f"plot {tmp_path / 'both.png'}\n"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    printed = {"runs": [str(one)], "plot": str(tmp_path / "one.svg"), "same": {}}
    assert result_of(capsys, "plot", one, "--out", tmp_path / "one.svg") == printed
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()


def test_a_second_picture_has_a_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one = made(tmp_path / "a", CLASSES)
    Path("comparison.png").write_text("mine")
    for name in ("comparison-2.png", "comparison-3.png"):
        assert output_of(capsys, "plot", one) == f"plot {name}\n"
        assert Path(name).read_bytes().startswith(b"\x89PNG")
    assert Path("comparison.png").read_text() == "mine"
    assert run("plot", one, "--force") == 0
    assert Path("comparison.png").read_bytes().startswith(b"\x89PNG")
    assert not Path("comparison-4.png").exists()


def test_the_picture_says_which_run_is_which(tmp_path):
    runs = [
        Curves("first", {"loss": [3.0, 1.0], "val_loss": [2.0, 1.5]}, "mse"),
        Curves("second", {"loss": [3.0, 1.0, 0.5], "accuracy": [0.1, 0.2, 0.3]}, "mse"),
    ]
    figure = plots.comparison_figure(runs, title="two")
    assert labels(figure, 5) == ["first", "second", "training", "validation"]
    loss, accuracy = figure.axes
    # a shorter curve lies over a longer one that begins alike
    assert [list(line.get_ydata()) for line in loss.get_lines()] == [[3.0, 1.0, 0.5], [3.0, 1.0], [2.0, 1.5]]
    assert [line.get_linestyle() for line in loss.get_lines()] == ["--", "--", "-"]
    assert loss.get_lines()[0].get_color() != loss.get_lines()[1].get_color() == loss.get_lines()[2].get_color()
    assert len(accuracy.get_lines()) == 1
    assert loss.get_ylabel() == "loss (mse)"


def test_runs_that_repeat_another_are_visible_and_named(tmp_path, capsys):
    first, second, third = (str(made(tmp_path / name, CLASSES)) for name in ("first", "second", "third"))
    assert run("plot", first, second, third, first, "--out", tmp_path / "all.png") == 0
    same = [f"{name} has the same curves as {first}" for name in (second, third, f"{first} (2)")]
    assert capsys.readouterr().out.splitlines()[:-1] == same


def labels(figure, count):
    return [text.get_text() for text in figure.legends[0].get_texts()][:count]


def test_the_legend_says_which_run_repeats_which():
    history = {"loss": [3.0, 1.0, 0.5], "val_loss": [2.0, 1.5, 1.2]}
    nearly = {"loss": [3.0, 1.0, 0.5001], "val_loss": [2.0, 1.5, 1.2001]}
    other = {"loss": [3.0, 2.0, 1.5], "val_loss": [2.0, 1.9, 1.7]}
    runs = [Curves(name, one, "mse") for name, one in zip("abcd", (history, other, history, nearly), strict=True)]
    assert plots.repeats(runs) == {"c": "a"}
    figure = plots.comparison_figure(runs, title="four")
    assert labels(figure, 4) == ["a", "b", "c: same curves as a", "d"]
    assert [line.get_linestyle() for line in figure.axes[0].get_lines()] == ["--", "-"] * 4


def test_no_two_of_many_runs_look_alike():
    runs = [Curves(str(number), {"loss": [1.0 + number, 1.0, 0.0]}, "mse") for number in range(20)]
    lines = plots.comparison_figure(runs, title="many").axes[0].get_lines()
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 20


def test_losses_of_different_kinds_are_named_with_the_runs():
    runs = [Curves("a", {"loss": [1.0]}, "mse"), Curves("b", {"loss": [1.0]}, "mae")]
    figure = plots.comparison_figure(runs, title="two")
    assert labels(figure, 2) == ["a (mse)", "b (mae)"]
    assert figure.axes[0].get_ylabel() == "loss"


def test_runs_of_the_same_name_go_by_their_paths():
    assert names([Path("x/run"), Path("y/other")]) == ["run", "other"]
    assert names([Path("x/run"), Path("y/run")]) == [str(Path("x/run")), str(Path("y/run"))]


def test_what_cannot_be_drawn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    good, empty = made(tmp_path / "good", CLASSES), made(tmp_path / "empty", "")
    (tmp_path / "there.png").write_text("old")
    for arguments, code, words in (
        ((), 2, "Missing argument"),
        ((good, "nowhere"), 1, "'nowhere' is not a run folder"),
        (("nowhere", "--out", "there.png"), 1, "'nowhere' is not a run folder"),
        ((good, empty), 1, "has no complete epoch yet"),
        ((good, "--out", "x.jpg"), 2, "--out: expected a file name ending in .png, .svg or .pdf"),
        ((good, "--out", "there.png"), 2, "exists; give another name, or --force"),
    ):
        assert run("plot", *arguments) == code
        assert words in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "good", "there.png"]


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
    assert refusal(capsys, "plot", tmp_path / "run", "--out", out, code=1) == f"error: out: {failed(out)}\n"
    assert not out.exists()


@pytest.mark.parametrize("setting", ["backend", "file"])
def test_matplotlib_cannot_be_imported(setting, tmp_path):
    folder = made(tmp_path / "run", VALUES)
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
    assert refusal(capsys, "report", tmp_path / "run", code=1) == f"error: report: {because}\n"
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
