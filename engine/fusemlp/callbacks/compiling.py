"""Show on a terminal that the training is being compiled, and for how long."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from fusemlp_kernels.compilation import watchers

REDRAW = 0.1  # seconds
_CLEAR = "\r\x1b[K"


class _Notice:
    """A line on a terminal while something is compiled, with the seconds of all compilations so far."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        # seconds of the compilations before this one, and when it began
        self._before = self._began = 0.0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __call__(self, begins: bool) -> None:
        if begins:
            self._began = time.perf_counter()
            self._ended.clear()
            self._thread = threading.Thread(target=self._show, daemon=True)
            self._thread.start()
        elif self._thread is not None:
            self._before += time.perf_counter() - self._began
            self._ended.set()
            self._thread.join()
            self._thread = None

    def _show(self) -> None:
        shown = False
        while not self._ended.wait(REDRAW):
            shown = True
            seconds = self._before + time.perf_counter() - self._began
            print(f"{_CLEAR}compiling, once on this machine: {seconds:.1f} s", end="", file=self._stream, flush=True)
        if shown:
            print(_CLEAR, end="", file=self._stream, flush=True)


@contextmanager
def compilations_shown(*, quiet: bool = False) -> Iterator[None]:
    """Show compilations in the body, if stderr is a terminal and nothing shows them already."""
    if quiet or not sys.stderr.isatty() or any(isinstance(one, _Notice) for one in watchers):
        yield
        return
    # A bar that is drawn later writes to sys.stderr in its own way.
    notice = _Notice(sys.stderr)
    watchers.append(notice)
    try:
        yield
    finally:
        watchers.remove(notice)
