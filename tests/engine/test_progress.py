"""The progress bar on terminals of every width: nothing is cut, and the least important parts go first."""

import os
import re
import subprocess
import sys

import pytest

from fusemlp import MLP, Engine, ProgressBar
from fusemlp.callbacks.progress import by_importance

LOGS = {"loss": 0.2409, "accuracy": 0.9259, "val_loss": 0.2036, "val_accuracy": 0.8333, "val_auc": 0.9911}
LOGS["learning_rate"] = 0.001
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def lines_of(text):
    """Return the lines that a terminal was told to draw, each state of a line apart."""
    return [line.rstrip() for line in re.split(r"[\r\n]+", ESCAPES.sub("", text)) if "epoch" in line]


@pytest.fixture
def drawn(monkeypatch, capsys):
    """Return a function that draws epochs on a terminal, and gives what it was sent."""

    def draw(epochs, first=0, width=80, term="xterm"):
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("TERM", term)
        bar = ProgressBar()
        bar.set_model(Engine(MLP([2, 2])))
        bar.set_params({"epochs": epochs})
        bar.on_train_begin()
        for epoch in range(first, epochs):
            bar.on_epoch_end(epoch, LOGS)
        bar.on_exit()
        return capsys.readouterr().err

    return draw


@pytest.mark.parametrize("epochs", [7, 12_000])
def test_no_width_cuts_a_word(epochs, drawn):
    counter = f"epoch {epochs}/{epochs}"
    whole = {f"{name} {value:.4g}" for name, value in LOGS.items()} | {"lr 0.001"}
    whole |= {f"{name.replace('accuracy', 'acc')} {value:.4g}" for name, value in LOGS.items()}
    rest, shown = re.compile(rf"{counter}(?: (━+))?(?: (\d:\d\d:\d\d))?(?: (\S.*))?"), -1
    for width in range(len(counter), 140):
        line = lines_of(drawn(epochs, epochs - 1, width))[-1]
        parts = rest.fullmatch(line)
        assert parts is not None and len(line) <= width, line
        said = parts[3].split("  ") if parts[3] else []
        assert set(said) <= whole, line
        # A wider terminal shows no fewer figures than a narrower one.
        assert len(said) >= shown
        shown = len(said)
        assert parts[1] is None or len(parts[1]) in (8, 16)
    assert shown == len(LOGS)


def test_figures_at_80_and_60_columns(drawn):
    figures = "loss 0.2409  val_loss 0.2036  val_auc 0.9911"
    assert lines_of(drawn(40, 39, 80))[-1] == f"epoch 40/40 ━━━━━━━━ 0:00:00 {figures}"
    assert lines_of(drawn(40, 39, 60))[-1] == f"epoch 40/40 {figures}"


def test_losses_come_first_and_the_rate_last():
    expected = ["loss", "val_loss", "val_auc", "val_accuracy", "accuracy", "learning_rate"]
    assert by_importance(LOGS) == expected
    # A figure that a callback wrote into the logs stands beside the scores of training rows.
    assert by_importance({"mine": 1.0, **LOGS}) == [*expected[:4], "mine", *expected[4:]]


def test_a_dumb_terminal_gets_lines(drawn):
    shown = drawn(2, term="dumb")
    begins = [line.split("  ")[:2] for line in shown.splitlines()]
    assert begins == [["epoch 1/2", "loss 0.2409"], ["epoch 2/2", "loss 0.2409"]]
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
