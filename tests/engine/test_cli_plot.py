"""``fusemlp plot``: several runs in one picture."""

import json
from pathlib import Path

from fusemlp.cli.runs import names
from fusemlp.report import plots
from fusemlp.report.plots import Curves
from fusemlp.report.runs import Run
from make import configuration, run


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
    assert run("plot", one, other, "--out", tmp_path / "both.png") == 0
    assert capsys.readouterr().out == f"plot {tmp_path / 'both.png'}\n"
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")
    assert run("plot", one, "--out", tmp_path / "one.svg", "--json") == 0
    printed = {"runs": [str(one)], "plot": str(tmp_path / "one.svg"), "same": {}}
    assert json.loads(capsys.readouterr().out) == printed
    assert b"<svg" in (tmp_path / "one.svg").read_bytes()


def test_a_second_picture_has_a_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one = made(tmp_path / "a", CLASSES)
    Path("comparison.png").write_text("mine")
    for name in ("comparison-2.png", "comparison-3.png"):
        assert run("plot", one) == 0
        assert capsys.readouterr().out == f"plot {name}\n"
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
    assert [list(line.get_ydata()) for line in loss.get_lines()] == [[3.0, 1.0], [2.0, 1.5], [3.0, 1.0, 0.5]]
    assert [line.get_linestyle() for line in loss.get_lines()] == ["--", "-", "--"]
    assert loss.get_lines()[0].get_color() == loss.get_lines()[1].get_color() != loss.get_lines()[2].get_color()
    assert len(accuracy.get_lines()) == 1
    assert loss.get_ylabel() == "loss (mse)"


def test_runs_that_repeat_another_are_visible_and_named(tmp_path, capsys):
    first, second, third = (str(made(tmp_path / name, CLASSES)) for name in ("first", "second", "third"))
    assert run("plot", first, second, third, first, "--out", tmp_path / "all.png") == 0
    same = [f"{name} has the same curves as {first}" for name in (second, third, f"{first} (2)")]
    assert capsys.readouterr().out.splitlines()[:-1] == same


def filled(lines):
    """Return where along the line each of its curves is first drawn, in line widths."""
    dashes = [line._unscaled_dash_pattern for line in lines]
    return [(start := -offset % (on + off), start + on) for offset, (on, off) in dashes]


def labels(figure, count):
    return [text.get_text() for text in figure.legends[0].get_texts()][:count]


def test_same_curves_share_a_line_without_gaps():
    history = {"loss": [3.0, 1.0, 0.5], "val_loss": [2.0, 1.5, 1.2]}
    nearly = {"loss": [3.0, 1.0, 0.5001], "val_loss": [2.0, 1.5, 1.2001]}
    other = {"loss": [3.0, 2.0, 1.5], "val_loss": [2.0, 1.9, 1.7]}
    runs = [Curves(name, one, "mse") for name, one in zip("abcd", (history, other, history, nearly), strict=True)]
    assert plots.repeats(runs) == {"c": "a"}
    figure = plots.comparison_figure(runs, title="four")
    assert labels(figure, 4) == ["a", "b", "c: same curves as a", "d"]
    lines = figure.axes[0].get_lines()
    training, validation = lines[::2], lines[1::2]
    for part, (dash, gap) in ((training, plots.DASHES["training"]), (validation, plots.DASHES["validation"])):
        together = [part[0], part[2], part[3]]
        each = dash + gap
        assert filled(together) == [(place * each, place * each + dash) for place in range(3)]
        assert all(sum(line._unscaled_dash_pattern[1]) == 3 * each for line in together)
    # The run that differs keeps its whole lines.
    assert [training[1].get_linestyle(), validation[1].get_linestyle()] == ["--", "-"]


def test_a_shorter_run_lies_over_the_one_that_goes_on():
    short, long = {"loss": [3.0, 1.0]}, {"loss": [3.0, 1.0, 0.5]}
    runs = [Curves("short", short, "mse"), Curves("long", long, "mse")]
    assert plots.repeats(runs) == {}
    first, second = plots.comparison_figure(runs, title="two").axes[0].get_lines()
    assert first.get_zorder() > second.get_zorder()


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
