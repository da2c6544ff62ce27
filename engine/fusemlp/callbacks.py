"""Callbacks: objects that ``fit`` tells of its stages; and Ctrl-C, which waits for the end of a batch."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from fusemlp_kernels.errors import ArgumentTypeError

if TYPE_CHECKING:
    from fusemlp.engine import Engine
    from fusemlp.history import History


class Callback:
    """Told of the stages of ``fit``; override what you need. Epochs and batches count from 0.

    Setting ``engine.stop_training`` ends the training after the batch.
    """

    def on_train_begin(self, engine: Engine) -> None:
        """Before the first epoch."""

    def on_epoch_begin(self, engine: Engine, epoch: int) -> None:
        """Before an epoch's first batch."""

    def on_batch_end(self, engine: Engine, batch: int) -> None:
        """After each update of an epoch."""

    def on_epoch_end(self, engine: Engine, epoch: int, logs: dict[str, float]) -> None:
        """After an epoch; ``logs`` is what the history receives."""

    def on_train_end(self, engine: Engine, history: History) -> None:
        """After the last epoch, also when training was interrupted."""


def overrides(callback: Any, stage: str) -> bool:
    """Whether a callback wants to hear of a stage."""
    return getattr(type(callback), stage, None) not in (None, getattr(Callback, stage))


def checked_callbacks(given: Any) -> list[Any]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        given = [given]
    listeners = list(given)
    stages = [name for name in vars(Callback) if name.startswith("on_")]
    for listener in listeners:
        if isinstance(listener, type) or not any(hasattr(listener, stage) for stage in stages):
            mend = f"; give an object of it: {listener.__name__}()" if isinstance(listener, type) else ""
            raise ArgumentTypeError(
                f"callbacks: expected objects with one of the methods {', '.join(stages)}, got {listener!r}{mend}"
            )
    return listeners


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
