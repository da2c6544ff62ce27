"""Threads that train models side by side take turns in Python, and leave their turn while a launch computes.

Each of NumPy's calls gives Python's lock away for a moment, and threads that all want it hand it on so often that it
takes longer than their work in Python.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_turn: ContextVar[threading.Lock | None] = ContextVar("turn", default=None)


@contextmanager
def in_turn(turn: threading.Lock) -> Iterator[None]:
    """While a thread works in Python, one of those that have ``turn`` in common."""
    with turn:
        token = _turn.set(turn)
        try:
            yield
        finally:
            _turn.reset(token)


@contextmanager
def turn_left() -> Iterator[None]:
    """While a launch computes: other threads have their turn."""
    turn = _turn.get()
    if turn is None:
        yield
        return
    turn.release()
    try:
        yield
    finally:
        turn.acquire()
