"""Defer Ctrl-C to the end of a batch."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def deferred_interrupt(*others: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Record Ctrl-C instead of raising it, so that no update is cut in two; raise a second one at once.

    ``others`` are signals that count as Ctrl-C too. Yields a function that returns whether Ctrl-C came. Only the main
    thread gets signals; elsewhere it returns False, as in a program that ignores Ctrl-C or handles it outside Python.
    """
    came = False

    def handler(number: int, frame: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, *others)}
    # None: a program that embeds Python has a handler of its own, which could not be put back. SIG_IGN: a shell has
    # started this in the background, and Ctrl-C is for the command in the foreground.
    before = {number: own for number, own in before.items() if own not in (None, signal.SIG_IGN)}
    try:
        if threading.current_thread() is not threading.main_thread():
            raise ValueError
        for number in before:
            signal.signal(number, handler)
    except ValueError:
        # or the main thread of a subinterpreter
        yield lambda: False
        return
    try:
        yield lambda: came
    finally:
        for number, own in before.items():
            signal.signal(number, own)
