"""The facts of Windows, macOS and embedded interpreters that can be simulated here."""

import os
import signal
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest

import fusemlp
from fusemlp import ArgumentError, CSVLogger
from fusemlp.callbacks.forms import deferred_interrupt
from fusemlp.cli import output, train
from fusemlp.cli.train import Recorder
from fusemlp.describe import checks
from fusemlp.report.runs import create_run
from fusemlp.runtime import files
from make import assert_same

X, y = np.random.default_rng(0).random((24, 4), np.float32), np.arange(24) % 3


def make(rate=0.001):
    return fusemlp.Engine(fusemlp.MLP([4, 3]), optimizer=fusemlp.Adam(rate), backend="numpy", batch_size=8)


@pytest.fixture
def windows(monkeypatch):
    """Take the ways of Windows, and return the seconds that were waited."""
    waited = []
    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(checks, "WINDOWS", True)
    monkeypatch.setattr(files.time, "sleep", waited.append)
    return waited


def locked(monkeypatch, times):
    """Refuse to replace files, as Windows does while another program has one open."""
    real, left = os.replace, [times]

    def replace(source, target):
        if left[0] > 0:
            left[0] -= 1
            raise PermissionError(13, "The process cannot access the file", str(target))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)


def test_a_file_that_another_program_has_open_is_tried_again(windows, monkeypatch, tmp_path):
    locked(monkeypatch, 3)
    files.write_atomically(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert windows == list(files.WAITS[:3])


@pytest.mark.parametrize("system", ["Windows", "another"])
def test_a_file_that_stays_open_keeps_its_content(system, request, monkeypatch, tmp_path):
    waited = request.getfixturevalue("windows") if system == "Windows" else []
    (tmp_path / "file").write_bytes(b"old")
    locked(monkeypatch, 99)
    with pytest.raises(PermissionError):
        files.write_atomically(tmp_path / "file", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"
    assert 1.0 < sum(waited) < 5.0 if waited else system != "Windows"


def test_checkpoints_of_a_run_that_are_looked_at(windows, monkeypatch, tmp_path):
    run = create_run(tmp_path / "run")
    engine = make()
    locked(monkeypatch, 2)
    engine.fit(X, y, epochs=2, validation_data=(X, y), callbacks=[Recorder(run)])
    assert len(windows) == 2
    assert fusemlp.load_checkpoint(run.checkpoint("best")).epochs_trained == 2


def test_checkpoints_of_quick_epochs_are_written_together(monkeypatch, tmp_path):
    def write(path, data):
        written.append(path.stem)
        files.write_atomically(path, data)

    monkeypatch.setattr(train, "write_atomically", write)
    monkeypatch.setattr(train, "time", SimpleNamespace(monotonic=float))
    folders, expected = [], {0.0: ["best", *["last"] * 8], 1e9: ["best", "last", "last"]}
    for seconds in expected:
        run, written = create_run(tmp_path / str(seconds)), []
        monkeypatch.setattr(train, "BETWEEN", seconds)
        stop = SimpleNamespace(on_epoch_begin=lambda engine, epoch: 1 // (8 - epoch))
        with pytest.raises(ZeroDivisionError):
            make(0.3).fit(X, y, epochs=9, validation_data=(X, (y + 1) % 3), callbacks=[Recorder(run), stop])
        assert written == expected[seconds]
        folders.append([fusemlp.load_checkpoint(run.checkpoint(name)) for name in ("best", "last")])
    for often, seldom, epochs in zip(*folders, (1, 8), strict=True):
        assert_same(often, seldom)
        assert seldom.epochs_trained == epochs


def test_metrics_that_another_program_has_open_follow_later(monkeypatch, tmp_path):
    run, rows, open_in_excel = create_run(tmp_path / "run"), [], [2, 3, 4]

    def append(run, row):
        if heard[-1] in open_in_excel:
            raise PermissionError(13, "The process cannot access the file", "metrics.csv")
        rows.append(row["epoch"])

    heard = []
    listener = SimpleNamespace(on_epoch_begin=lambda engine, epoch: heard.append(epoch))
    monkeypatch.setattr(train, "append_metrics", append)
    engine = make()
    given = {"epochs": 7, "callbacks": [listener, Recorder(run)]}
    with pytest.raises(PermissionError):
        engine.fit(X, y, **given)
    monkeypatch.setattr(train, "WINDOWS", True)
    rows.clear()
    heard.clear()
    given["callbacks"] = [listener, Recorder(run)]
    engine = make()
    with pytest.warns(UserWarning, match=r"metrics\.csv: another program has it open") as told:
        engine.fit(X, y, **given)
    assert rows == [1, 2, 3, 4, 5, 6, 7] and len(told) == 1


def test_the_command_that_makes_a_folder_is_that_of_the_system(windows, tmp_path):
    engine = fusemlp.Engine(fusemlp.MLP([4, 3]), backend="numpy")
    with pytest.raises(ArgumentError, match=r"make it first: mkdir [^-]"):
        engine.save(tmp_path / "no" / "model")
    with pytest.raises(ArgumentError, match=r"filename: .*make it first: mkdir [^-]"):
        CSVLogger(str(tmp_path / "no" / "log.csv")).check_logs(["loss"])


def test_a_command_is_quoted_for_the_shell_of_the_system(monkeypatch):
    words = ["fusemlp", "train", "my houses.csv"]
    assert output.command_line(words) == "fusemlp train 'my houses.csv'"
    monkeypatch.setattr(output, "WINDOWS", True)
    assert output.command_line(words) == 'fusemlp train "my houses.csv"'


def no_signals(*_):
    raise ValueError("signal only works in main thread of the main interpreter")


@pytest.mark.parametrize(
    "handler, change",
    [
        # a program that embeds Python may have set it
        (None, lambda *_: pytest.fail("the handler was replaced")),
        # a shell lets commands in the background ignore Ctrl-C
        (signal.SIG_IGN, lambda *_: pytest.fail("the handler was replaced")),
        (signal.default_int_handler, no_signals),
    ],
    ids=["outside Python", "ignored", "subinterpreter"],
)
def test_a_handler_that_cannot_or_should_not_be_replaced_stays(handler, change, monkeypatch):
    monkeypatch.setattr(signal, "getsignal", lambda number: handler)
    monkeypatch.setattr(signal, "signal", change)
    with deferred_interrupt() as interrupted:
        assert interrupted() is False


def test_the_handler_is_put_back_and_threads_have_none():
    before = signal.getsignal(signal.SIGINT)
    with deferred_interrupt() as interrupted:
        assert signal.getsignal(signal.SIGINT) is not before
        signal.raise_signal(signal.SIGINT)
        assert interrupted() is True
    assert signal.getsignal(signal.SIGINT) is before

    def elsewhere():
        with deferred_interrupt() as interrupted:
            found.append((interrupted(), signal.getsignal(signal.SIGINT)))

    found = []
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert found == [(False, before)]


def test_letters_that_an_output_lacks_end_no_command(tmp_path):
    """A redirected output has a code page on Windows."""
    table = tmp_path / "表.csv"
    rows = "".join(f"{number % 7},{'猫' if number % 2 else '犬'}\n" for number in range(80))
    table.write_text(f"größe,種\n{rows}", encoding="utf-8")
    options = ["--target", "種", "--epochs", "1", "--out", tmp_path / "run"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "fusemlp", "train", table, *options]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert b"\\u8868" in done.stdout + done.stderr
