"""The output of commands: lines of JSON, and the way on where stdout, stderr or the disk fails."""

import errno
import json
import os
import shlex
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file

from fusemlp.cli import train
from fusemlp.cli import vary as journal
from fusemlp.cli.train import Recorder
from fusemlp.runtime import files
from make import read, rows, run

TRAINING = ("train", "digits", "--epochs", "6", "--lr", "0.02", "--quiet", "--out")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run whose disk was never full; its logits are divided, the best epoch is not the last."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(*TRAINING, folder) == 0
    report = read(folder / "report.json")
    assert report["temperature"] != 1 and report["best_epoch"] < 6
    return folder


@contextmanager
def failing_stream(kind):
    """Yield a stream as the system hands it to a program: full, closed before the start, or without a reader."""
    if kind == "closed":
        yield None
        return
    reader, writer = os.pipe()
    os.close(reader)
    if kind == "full":
        os.close(writer)
        writer = os.open("/dev/full", os.O_WRONLY)
    with suppress(OSError), open(writer, "w") as stream:
        yield stream


LOST = "error: stdout: No space left on device, so results are not shown\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is of Linux")
@pytest.mark.parametrize("kind", ["full", "closed", "unread"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_fails(kind, name, whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with failing_stream(kind) as stream, monkeypatch.context() as patch:
        patch.setattr(sys, name, stream)
        lost = kind == "full" and name == "stdout"
        assert run("runs", whole.parent) == lost
        # Its line on a model that is worse than a linear one goes to both.
        assert run("train", "iris", "--epochs", "2", "--out", folder) == lost
        assert run("train", "nowhere") == 2
        assert getattr(sys, name) is stream
    shown = capsys.readouterr()
    assert read(folder / "report.json")["epochs"] == 2
    if name == "stderr":
        assert f"run folder {folder}" in shown.out and "epoch 1/2" not in shown.out
        return
    assert shown.err.count(LOST) == 2 * lost
    assert "epoch 2/2" in shown.err and "unknown name 'nowhere'" in shown.err and not shown.out


def full(monkeypatch, module, name, chosen):
    """Let a function of a module fail as on a full disk from the first call on that is ``chosen``."""
    function, seen = getattr(module, name), []

    def failing(*given):
        if seen or chosen(*given):
            seen.append(True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return function(*given)

    monkeypatch.setattr(module, name, failing)


FAILURES = {"config.json": 1, "last.safetensors": 1, "best.safetensors": 3, "metrics.csv": 3, "report.json": 1}


@pytest.mark.parametrize(("name", "count"), FAILURES.items())
def test_a_full_disk(name, count, whole, tmp_path, monkeypatch, capsys):
    folder, writes = tmp_path / "run", []

    def is_it(*given):
        writes.append("metrics.csv" if name == "metrics.csv" else given[1].name)
        return writes.count(name) == count

    with monkeypatch.context() as patch:
        patch.setattr(train, "BETWEEN", 0.0)
        patch.setattr(train, "time", SimpleNamespace(monotonic=float))
        full(patch, *((train, "append_metrics") if name == "metrics.csv" else (files, "replace_file")), is_it)
        assert run(*TRAINING, folder) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "No space left on device" in error
    assert not list(folder.rglob(".[!b]*.tmp"))
    line, _, going = error.strip().partition("; when that is mended, go on: ")
    assert line.removeprefix("error: ").startswith(str(folder)) or name == "metrics.csv"
    # The run goes on, or begins again in its folder, and ends as one that was never cut off.
    assert run(*(shlex.split(going)[1:] if going else (*TRAINING, folder))) == 0
    assert bool(going) == (name != "config.json")
    for kind in ("last", "best", "model"):
        expected = load_file(whole / "checkpoints" / f"{kind}.safetensors")
        for tensor, values in load_file(folder / "checkpoints" / f"{kind}.safetensors").items():
            np.testing.assert_array_equal(values, expected[tensor], err_msg=f"{kind}: {tensor}")
    assert read(folder / "report.json")["test"] == read(whole / "report.json")["test"]
    assert len((folder / "metrics.csv").read_text().splitlines()) == 7
    assert (folder / "report.html").exists()


def test_a_page_without_room_costs_no_run(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        full(patch, files, "replace_file", lambda *paths: paths[1].name == "report.html")
        assert run("train", "iris", "--epochs", "2", "--quiet", "--out", folder) == 0
    assert "no report: " in (shown := capsys.readouterr().out) and "No space left on device" in shown
    assert read(folder / "report.json")["epochs"] == 2
    assert run("report", folder) == 0 and (folder / "report.html").exists()


def test_a_full_disk_in_a_sweep(tmp_path, monkeypatch, capsys):
    sweep = ("sweep", "iris", "--vary", "seed=0,1,2", "--epochs", "1", "--quiet", "--out", tmp_path / "run")
    with monkeypatch.context() as patch:
        # models end in any order: the second that does
        full(patch, journal, "add_to_journal", lambda run, _: (run.path / journal.JOURNAL).read_text().count("\n") == 2)
        assert run(*sweep) == 1
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.endswith(f"; when that is mended, go on: fusemlp sweep --resume {tmp_path}/run\n")
    assert run("sweep", "--resume", tmp_path / "run", "--quiet") == 0
    assert read(tmp_path / "run" / "config.json")["sweep"]["ended"] == 3


def test_a_result_that_cannot_be_written(whole, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "new.npz", X=np.zeros((2, 64)))
    full(monkeypatch, files, "replace_file", lambda *_: True)
    out = tmp_path / "out.csv"
    assert run("predict", whole, "--data", tmp_path / "new.npz", "--out", out) == 1
    assert capsys.readouterr().err == f"error: out: {str(out)!r} cannot be written (No space left on device)\n"
    assert not out.exists()


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
    end = Recorder.on_train_end

    def chatty(*given):
        print("a library says hello")
        end(*given)

    monkeypatch.setattr(Recorder, "on_train_end", chatty)
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
