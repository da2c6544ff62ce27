"""The line that tells that the training is being compiled."""

import io
import sys
import time

import pytest

from fusemlp.callbacks.progress import REDRAW, compilations_shown
from fusemlp_kernels.compilation import announced, watchers


class Terminal(io.StringIO):
    def isatty(self):
        return True


def terminal_of(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    return sys.stderr


def test_a_compilation_is_shown_with_its_time_and_wiped_out(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with compilations_shown():
        with announced():
            time.sleep(5 * REDRAW)
        time.sleep(20 * REDRAW)
        # the seconds of all compilations, without those between them
        with announced():
            time.sleep(5 * REDRAW)
    shown, begins = terminal.getvalue(), "compiling, once on this machine: "
    first, *_, last = [line for line in shown.split("\r\x1b[K") if line]
    assert first.startswith(begins) and last.startswith(begins) and shown.endswith("\r\x1b[K")
    assert float(first.split()[-2]) < 5 * REDRAW < float(last.split()[-2]) < 20 * REDRAW
    assert not watchers


def test_the_line_is_shown_once_and_not_for_short_compilations(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with compilations_shown(), compilations_shown():
        assert len(watchers) == 1
        with announced():
            pass
    assert terminal.getvalue() == ""


@pytest.mark.parametrize("quiet", [False, True])
def test_nothing_is_shown_elsewhere_or_when_quiet(quiet, monkeypatch):
    terminal = terminal_of(monkeypatch)
    if not quiet:
        monkeypatch.setattr(sys, "stderr", io.StringIO())
    with compilations_shown(quiet=quiet), announced():
        time.sleep(2 * REDRAW)
    assert not watchers and terminal.getvalue() == ""


def test_an_error_of_the_compiler_ends_the_line(monkeypatch):
    terminal = terminal_of(monkeypatch)
    with pytest.raises(KeyboardInterrupt), compilations_shown(), announced():
        time.sleep(3 * REDRAW)
        raise KeyboardInterrupt
    assert terminal.getvalue().endswith("\r\x1b[K") and not watchers
