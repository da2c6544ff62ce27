"""The time that a training takes: a forecast with what shortens it, what goes on, and the command after Ctrl-C."""

import json
import re
import shlex
import signal
import sys
import time
from types import SimpleNamespace

import pytest
from test_compiling import terminal_of

from fusemlp.callbacks import progress
from fusemlp.callbacks.progress import Forecast, compilations_shown, epoch_watchers, waiting
from fusemlp.cli import output, report
from fusemlp.cli.train import Recorder
from fusemlp.tables import training
from fusemlp_kernels.compilation import announced
from make import QUICK, output_of, read, run, table

# The epochs in all, whether of a single model, the ends of epochs as (seconds, model, epochs), and what is said then.
ENDS = {
    "the first epoch compiles": (10, True, [(5, "a", 1), (7, "a", 1), (9, "a", 1)], "16 s"),
    "a long first epoch": (3, True, [(12, "a", 1), (24, "a", 1)], "24 s"),
    "launches of several epochs": (100, True, [(0.9, "a", 10), (2.9, "a", 10), (4.9, "a", 10)], "16 s"),
    "too early for a measurement": (100, True, [(0.5, "a", 1), (0.9, "a", 1), (1.6, "a", 1)], "53 s"),
    "two models side by side": (20, False, [(4, "a", 1), (4.1, "b", 1), (8, "a", 1)], "34 s"),
    "one after another": (20, False, [(4, "a", 1), (6, "a", 1)], "36 s"),
    "minutes": (200, True, [(4, "a", 1), (6, "a", 1)], "7 min"),
    "hours": (9000, True, [(4, "a", 1), (6, "a", 1)], "5.0 h"),
    "short": (4, True, [(1, "a", 1), (2, "a", 1), (3, "a", 1)], None),
}


def forecast_at(monkeypatch, epochs, ends, *, single=True, shorter=""):
    """Return a forecast after ends of epochs, and what it has said."""
    clock, lines = SimpleNamespace(now=0.0), []
    monkeypatch.setattr(progress.time, "perf_counter", lambda: clock.now)
    forecast, models = Forecast(epochs, lines.append, shorter, single=single), {"a": object(), "b": object()}
    for clock.now, name, count in ends:
        forecast(models[name], count)
    return forecast, lines


@pytest.mark.parametrize(("epochs", "single", "ends", "expected"), ENDS.values(), ids=ENDS)
def test_a_forecast_measures_between_two_ends_of_a_model(epochs, single, ends, expected, monkeypatch):
    lines = forecast_at(monkeypatch, epochs, ends, single=single)[1]
    assert lines == ([] if expected is None else [f"about {expected} left at most"])


def test_a_model_that_ends_early_leaves_less(monkeypatch):
    forecast, _ = forecast_at(monkeypatch, 40, [(1, "a", 1), (3, "a", 1)])
    assert str(forecast) == "about 76 s left"
    forecast.skip(18)
    assert str(forecast) == "about 40 s left"
    forecast.skip(18)
    assert str(forecast) == ""


def test_a_long_forecast_says_what_shortens_it(monkeypatch):
    ends = [(1, "a", 1), (3, "a", 1)]
    ending = "; --models 1 takes less, and Ctrl-C keeps what there is"
    for epochs, said in ((31, "about 58 s left at most"), (152, f"about 5 min left at most{ending}")):
        assert forecast_at(monkeypatch, epochs, ends, shorter="--models 1")[1] == [said]
    assert forecast_at(monkeypatch, 152, ends)[1] == ["about 5 min left at most"]


def shorter_of(*, resume=None, early_stopping=20, validates=True, fewer=""):
    options = SimpleNamespace(resume=resume, early_stopping=early_stopping)
    return output.shorter(options, 200, fewer, validates=validates)


def test_the_option_that_shortens_a_training():
    assert shorter_of(fewer="--models 1") == "--models 1"
    assert shorter_of(early_stopping=0) == "--early-stopping 10"
    assert shorter_of() == shorter_of(early_stopping=0, validates=False) == "--epochs 50"
    assert shorter_of(resume="runs/a") == shorter_of(resume="runs/a", fewer="--models 1") == ""


@pytest.fixture
def eager(monkeypatch):
    """Have every measurement count, and every forecast told with its hint."""
    for name, seconds in (("LEAST", 1e-9), ("WORTH", 0.0), ("LONG", 0.0)):
        monkeypatch.setattr(Forecast, name, seconds)


TRAININGS = {
    "train --epochs 8": "--epochs 2",
    "train --epochs 8 --early-stopping 0": "--early-stopping 10",
    "train --epochs 8 --models 3": "--models 1",
    "sweep --epochs 8 --vary lr=0.01:0.1:log:20": "--sample 5",
    "sweep --epochs 8 --vary lr=0.01,0.1": "--epochs 2",
    "sweep --epochs 8 --vary lr=0.01:0.1:log:8 --seeds 2": "--sample 2",
}


@pytest.mark.parametrize(("words", "hint"), TRAININGS.items())
def test_a_training_tells_once_on_stderr(words, hint, eager, tmp_path, capsys):
    name, *options = words.split()
    assert run(name, "iris", *options, "--out", tmp_path / "run") == 0
    said = capsys.readouterr()
    (line,) = re.findall(r"^about .* left at most; (.*) takes less", said.err, re.MULTILINE)
    assert line == hint and "left at most" not in said.out
    assert said.err.splitlines().count("scoring") == 1 and not epoch_watchers


def test_lines_of_json_are_alone_on_stdout(eager, tmp_path, capsys):
    assert run("train", "iris", "--epochs", "8", "--json", "--out", tmp_path / "run") == 0
    said = capsys.readouterr()
    assert {json.loads(line)["event"] for line in said.out.splitlines()} == {"start", "epoch", "end"}
    assert "left at most" in said.err and "scoring" in said.err


def test_a_time_limit_and_quiet_need_no_forecast(eager, tmp_path, capsys):
    for number, option in enumerate((["--time-limit", "60"], ["--quiet"])):
        assert run("train", "iris", "--epochs", "8", *option, "--out", tmp_path / str(number)) == 0
        assert "left at most" not in capsys.readouterr().err


def test_trials_and_a_final_fit_have_forecasts_of_their_own(eager, monkeypatch, tmp_path, capsys):
    file = table(tmp_path / "t.csv", 300)
    asked = ("--target", "price", "--epochs", "8", "--models", "1", "--final-fit", "--log-target")
    monkeypatch.setattr("fusemlp.training.loop.ROWS_AT_ONCE", 600)
    assert run("train", file, *asked, "--out", tmp_path / "run") == 0
    lines = capsys.readouterr().err.splitlines()
    (trials,) = [at for at, line in enumerate(lines) if line.startswith("trials of how to prepare the columns: about ")]
    assert lines[trials].endswith("left at most; --scale robust takes fewer")
    epochs = read(tmp_path / "run" / "report.json")["final_fit"]["epochs"]
    final = lines.index(f"final fit to all rows, {epochs} epochs in all")
    forecasts = [at for at, line in enumerate(lines) if "left at most; --epochs 2 takes less" in line]
    assert trials < forecasts[0] < final < forecasts[1] < lines.index("scoring") and len(forecasts) == 2


@pytest.mark.filterwarnings("default:the final fit was interrupted")
@pytest.mark.parametrize("models", ["1", "3"])
def test_ctrl_c_in_a_final_fit_keeps_the_model_that_was_judged(models, monkeypatch, tmp_path, capsys):
    fit_to_all_rows = training._fit_to_all_rows

    def interrupted(*arguments):
        epoch_watchers.append(lambda engine, epochs: signal.raise_signal(signal.SIGINT))
        try:
            return fit_to_all_rows(*arguments)
        finally:
            epoch_watchers.pop()

    monkeypatch.setattr(training, "_fit_to_all_rows", interrupted)
    file, told = table(tmp_path / "t.csv"), tmp_path / "run"
    asked = ("--target", "price", "--epochs", "8", "--early-stopping", "0", "--models", models, "--scale", "robust")
    assert run("train", file, *asked, "--final-fit", "--out", told) == 0
    kept = "warning: the final fit was interrupted: the model of the training rows is kept"
    assert kept in capsys.readouterr().err
    report = read(told / "report.json")
    assert "final_fit" not in report and report["test"]["rows"] == 24 and not report["interrupted"]
    assert run("predict", told, "--data", file, "--out", tmp_path / "p.csv") == 0


def test_members_are_shortened_by_the_plain_preset(eager, tmp_path, capsys):
    file = table(tmp_path / "t.csv", classes=2)
    assert run("train", file, "--target", "price", "--preset", "tabm", "--epochs", "8", "--out", tmp_path / "run") == 0
    assert "; --preset plain takes less" in capsys.readouterr().err


# Ctrl-C in a training: as ``signal`` tells of it, in the epoch after the first.
def interrupts(monkeypatch):
    end = Recorder.on_epoch_end

    def on_epoch_end(self, engine, epoch, logs):
        end(self, engine, epoch, logs)
        if epoch == 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(Recorder, "on_epoch_end", on_epoch_end)


def command_after(text, words):
    """Return the words of the command on the line that begins so."""
    (line,) = re.findall(rf"{words}: (fusemlp .*)$", text, re.MULTILINE)
    return shlex.split(line)[1:]


def test_ctrl_c_shows_the_command_that_goes_on(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "a run"
    with monkeypatch.context() as patch:
        interrupts(patch)
        assert run("train", "iris", "--epochs", "5", "--out", folder) == 0
    going = command_after(capsys.readouterr().out, "to go on")
    assert going == ["train", "--resume", str(folder)]
    assert "to go on" not in output_of(capsys, *going, "--quiet")
    assert read(folder / "report.json")["epochs"] == 5 and not read(folder / "report.json")["interrupted"]


def test_ctrl_c_while_scoring_shows_the_command_too(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report, "report_of", interrupted)
        assert run("train", "iris", *QUICK, "--out", tmp_path / "run") == 130
    going = command_after(capsys.readouterr().err, "interrupted; to go on")
    assert run(*going, "--quiet") == 0
    assert read(tmp_path / "run/report.json")["epochs"] == 3


def test_ctrl_c_while_the_page_is_written_leaves_a_whole_run(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report, "write_page", interrupted)
        assert run("train", "iris", *QUICK, "--out", tmp_path / "run") == 0
    assert not (tmp_path / "run/report.html").exists()
    assert run(*command_after(capsys.readouterr().out, "no report: interrupted; to make it")) == 0
    assert (tmp_path / "run/report.html").exists()


def test_what_takes_time_is_a_line_that_goes(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with waiting("scoring", quiet=False):
        time.sleep(3 * progress.REDRAW)
    drawn = [line for line in terminal.getvalue().split(progress.CLEAR) if line]
    assert drawn and all(re.fullmatch(r"scoring: \d\.\d s", line) for line in drawn)
    assert terminal.getvalue().endswith(progress.CLEAR)


def test_of_two_things_the_later_is_shown(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with compilations_shown(), waiting("scoring", quiet=False), announced():
        time.sleep(4 * progress.REDRAW)
    drawn = [line.split(":")[0] for line in terminal.getvalue().split(progress.CLEAR) if line]
    later = "compiling, once on this machine"
    # a busy machine may draw the first before the second begins
    assert set(drawn[drawn.index(later) :]) == {later}


def test_elsewhere_it_is_one_line_if_asked_for_and_none_if_quiet(capsys):
    with waiting("scoring", quiet=False, elsewhere=True), waiting("writing", quiet=True, elsewhere=True):
        pass
    with waiting("preparing", quiet=False):
        pass
    assert capsys.readouterr().err == "scoring\n" and not sys.stderr.isatty()
