"""The command line where stdout, stderr or the disk fails: a line, an exit code, and the way on."""

import errno
import os
import shlex
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from fusemlp.cli import train
from fusemlp.cli import vary as journal
from fusemlp.runtime import files
from make import read, run

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
        full(patch, journal, "add_to_journal", lambda run, member: member.index == 1)
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
