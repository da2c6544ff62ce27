"""Ctrl-C, which waits for the end of a batch."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[Callable[[], bool]]:
    """Ctrl-C inside is noted instead of raised, so that no update is cut in two; a second one is raised at once.

    Yields the function that tells whether it came. Only the main thread can do this; elsewhere it tells False.
    """
    came = False

    def handler(number: int, frame: Any) -> None:
        nonlocal came
        if came:
            raise KeyboardInterrupt
        came = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGINT, previous)
