"""Tell programs that code is being compiled: their users wait for it, once on a machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Each is called with True when a compilation begins, and with False when it has ended.
watchers: list[Callable[[bool], object]] = []


@contextmanager
def announced() -> Iterator[None]:
    """Tell the watchers of a compilation, the body."""
    for watcher in tuple(watchers):
        watcher(True)
    try:
        yield
    finally:
        for watcher in tuple(watchers):
            watcher(False)
