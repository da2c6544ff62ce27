"""The progress bar on terminals of every width: nothing is cut, and the least important parts go first."""

import os
import re
import subprocess
import sys

import pytest

from fusemlp import MLP, Engine, ProgressBar
from fusemlp.callbacks.progress import by_importance, figures, layouts

LOGS = {"loss": 0.2409, "accuracy": 0.9259, "val_loss": 0.2036, "val_accuracy": 0.8333, "val_auc": 0.9911}
LOGS["learning_rate"] = 0.001
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def lines_of(text):
    """Return the lines that a terminal was told to draw, each state of a line apart."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", text)) if "epoch" in line]


def drawn(width, epochs, monkeypatch, capsys):
    """Return the last line of a bar on a terminal of this width."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = ProgressBar()
    bar.set_model(Engine(MLP([2, 2])))
    bar.set_params({"epochs": epochs})
    bar.on_train_begin()
    bar.on_epoch_end(epochs - 1, LOGS)
    bar.on_exit()
    return lines_of(capsys.readouterr().err)[-1]


@pytest.mark.parametrize("epochs", [7, 12_000])
def test_no_width_cuts_a_word(epochs, monkeypatch, capsys):
    counter = f"epoch {epochs}/{epochs}"
    whole = {f"{name} {value:.4g}" for name, value in LOGS.items()} | {"lr 0.001"}
    whole |= {f"{name.replace('accuracy', 'acc')} {value:.4g}" for name, value in LOGS.items()}
    rest, shown = re.compile(rf"{counter}(?: (━+))?(?: (\d:\d\d:\d\d))?(?: (\S.*))?"), -1
    for width in range(len(counter), 140):
        line = drawn(width, epochs, monkeypatch, capsys)
        parts = rest.fullmatch(line)
        assert parts is not None, line
        assert len(line) <= width
        said = parts[3].split("  ") if parts[3] else []
        assert set(said) <= whole, line
        # A wider terminal shows no fewer figures than a narrower one.
        assert len(said) >= shown
        shown = len(said)
        assert parts[1] is None or len(parts[1]) in (8, 16)
    assert shown == len(LOGS)


def test_figures_at_80_and_60_columns(monkeypatch, capsys):
    wide = "epoch 40/40 ━━━━━━━━ 0:00:00 loss 0.2409  val_loss 0.2036  val_auc 0.9911"
    assert drawn(80, 40, monkeypatch, capsys) == wide
    assert drawn(60, 40, monkeypatch, capsys) == "epoch 40/40 loss 0.2409  val_loss 0.2036  val_auc 0.9911"


def test_every_layout_needs_less_room_than_the_one_before():
    for count in range(7):
        names = by_importance(LOGS)[:count]
        rooms = []
        for bar, timed, short, kept in layouts(count):
            text = figures({name: LOGS[name] for name in names[:kept]}, short=short)
            rooms.append(sum(part + 1 for part in (bar, 8 * timed, len(text)) if part))
        assert rooms == sorted(rooms, reverse=True)
        assert rooms[-1] == 0


def test_losses_come_first_and_the_rate_last():
    expected = ["loss", "val_loss", "val_auc", "val_accuracy", "accuracy", "learning_rate"]
    assert by_importance(LOGS) == expected
    # A figure that a callback wrote into the logs stands beside the scores of training rows.
    assert by_importance({"mine": 1.0, **LOGS}) == [*expected[:4], "mine", *expected[4:]]


def test_a_dumb_terminal_gets_lines(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = ProgressBar()
    bar.set_model(Engine(MLP([2, 2])))
    bar.set_params({"epochs": 2})
    bar.on_train_begin()
    for epoch in range(2):
        bar.on_epoch_end(epoch, LOGS)
    bar.on_exit()
    shown = capsys.readouterr().err
    assert [line.split("  ")[:2] for line in shown.splitlines()] == [
        ["epoch 1/2", "loss 0.2409"],
        ["epoch 2/2", "loss 0.2409"],
    ]
    assert "\x1b" not in shown


def test_a_real_terminal_of_60_columns_without_colour(tmp_path):
    pty = pytest.importorskip("pty")
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    command = [sys.executable, "-m", "fusemlp", "train", "iris", "--epochs", "3", "--out", str(tmp_path / "run")]
    environment = {**inherited, "TERM": "xterm", "NO_COLOR": "1"}
    with subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, env=environment) as process:
        os.close(theirs)
        text = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:
                # Linux ends the terminal with an error.
                break
            if not chunk:
                break
            text += chunk
    os.close(ours)
    assert process.returncode == 0
    last = lines_of(text.decode())[-1]
    assert re.fullmatch(r"epoch 3/3 (\d:\d\d:\d\d )?loss \S+  val_loss \S+  val_acc \S+", last)
    # Colours of the foreground are what NO_COLOR forbids.
    assert not re.search(rb"\x1b\[[0-9;]*3[0-9]m", text)
