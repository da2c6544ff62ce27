"""``train --json`` and ``sweep --json``: one object a line on stdout, everything else on stderr."""

import json
import subprocess
import sys

import pytest

from fusemlp.cli.train import Recorder
from make import read, rows, run


def printed(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_lines_of_a_training(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run("train", "iris", "--epochs", "3", "--json", "--out", folder) == 0
    start, *epochs, end = printed(capsys)
    assert (start["event"], start["kind"], start["run"], start["epoch"]) == ("start", "train", str(folder), 0)
    assert start["epochs"] == 3
    assert start["config"] == read(folder / "config.json")
    table = [{name: float(value) for name, value in row.items()} for row in rows(folder / "metrics.csv")]
    around = ("event", "epochs", "seconds")
    assert [{name: one[name] for name in one if name not in around} for one in epochs] == table
    assert all((one["event"], one["epochs"]) == ("epoch", 3) for one in epochs)
    seconds = [one["seconds"] for one in epochs]
    assert seconds == sorted(seconds)
    report = read(folder / "report.json")
    assert end["event"] == "end"
    # the errors of held-out rows are long
    held_out = report.pop("held_out")
    assert held_out["rows"] == 12 and "held_out" not in end
    assert {name: end[name] for name in report} == report
    # A resumed run says where it goes on.
    assert run("train", "--resume", folder, "--epochs", "5", "--json") == 0
    start, *epochs, end = printed(capsys)
    assert start["epoch"] == 3
    assert [one["epoch"] for one in epochs] == [4, 5]
    assert end["epochs"] == 5


def test_quiet_leaves_the_last_line(tmp_path, capsys):
    assert run("train", "iris", "--epochs", "2", "--json", "--quiet", "--out", tmp_path / "a") == 0
    assert [one["event"] for one in printed(capsys)] == ["end"]
    options = ["--vary", "seed=0:2", "--epochs", "2", "--json", "--quiet"]
    assert run("sweep", "iris", *options, "--out", tmp_path / "b") == 0
    assert [one["event"] for one in printed(capsys)] == ["end"]


def test_an_ensemble_has_a_line_a_model(tmp_path, capsys):
    folder = tmp_path / "run"
    assert run("train", "iris", "--epochs", "2", "--models", "3", "--seed", "7", "--json", "--out", folder) == 0
    start, *between, end = printed(capsys)
    models = [one for one in between if one["event"] == "model"]
    assert sorted(one["parameters"]["seed"] for one in models) == [7, 8, 9]
    assert [one["epoch"] for one in between if one["event"] == "epoch"] == [1, 2]
    by_seed = {one["seed"]: one for one in end["models"]}
    for one in models:
        assert one["val_loss"] == by_seed[one["parameters"]["seed"]]["val_loss"]
    assert start["config"]["options"]["models"] == 3


def test_a_sweep_has_a_line_a_model(tmp_path, capsys):
    options = ["--vary", "lr=0.001,0.01", "--vary", "hidden=4,8x4", "--epochs", "2", "--json"]
    assert run("sweep", "iris", *options, "--out", tmp_path / "best") == 0
    start, *models, end = printed(capsys)
    assert (start["event"], start["kind"], start["models"]) == ("start", "sweep", 4)
    assert start["config"]["vary"] == {"lr": ["0.001", "0.01"], "hidden": ["4", "8x4"]}
    assert {(one["event"], one["models"], one["status"]) for one in models} == {("model", 4, "trained")}
    best = min(models, key=lambda one: one["val_loss"])
    assert end["best"]["model"] == best["model"]
    assert end["best"]["parameters"] == best["parameters"]


# One update leaves finite parameters.
@pytest.mark.parametrize(
    ("loss", "options"),
    [("loss", ["--lr", "1000"]), ("val_loss", ["--lr", "1e30", "--batch-size", "317", "--epochs", "1"])],
)
def test_a_diverged_training_has_its_last_line(loss, options, tmp_path, capsys):
    options = [*options, "--scale", "none", "--optimizer", "sgd", "--models", "1", "--json"]
    assert run("train", "diabetes", *options, "--out", tmp_path / "run") == 1
    shown = capsys.readouterr()
    end = json.loads(shown.out.splitlines()[-1])
    assert (end["event"], end["diverged"]) == ("end", True)
    assert f"error: {loss}: it became NaN" in shown.err


def test_what_others_print_goes_to_stderr(tmp_path, monkeypatch, capsys):
    begin = Recorder.on_train_begin

    def chatty(*given):
        print("a library says hello")
        begin(*given)

    monkeypatch.setattr(Recorder, "on_train_begin", chatty)
    assert run("train", "iris", "--epochs", "1", "--json", "--out", tmp_path / "run") == 0
    shown = capsys.readouterr()
    assert [json.loads(line)["event"] for line in shown.out.splitlines()] == ["start", "epoch", "end"]
    assert "a library says hello" in shown.err


def test_a_reader_that_goes_away_does_not_end_the_training(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "fusemlp", "train", "iris", "--epochs", "20", "--json", "--out", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert json.loads(process.stdout.readline())["event"] == "start"
        process.stdout.close()
        errors = process.stderr.read().decode()
    assert process.returncode == 0, errors
    assert read(folder / "report.json")["epochs"] == 20
    assert "BrokenPipe" not in errors
