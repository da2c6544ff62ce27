"""How a search's fits are run: on threads, of which each fit has one to itself."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from joblib.parallel import ThreadingBackend
from sklearn import config_context

_abandoned: ContextVar[threading.Event | None] = ContextVar("abandoned", default=None)


def abandoned() -> bool:
    """Whether nobody waits any more for the fit that this thread is at."""
    event = _abandoned.get()
    return event is not None and event.is_set()


class SideBySide(ThreadingBackend):
    """joblib's threads, for tasks of scikit-learn's.

    scikit-learn wraps a task in something that sets warning filters for it and takes them back. Filters belong to the
    process: on threads of one process that would lose those of the user. Here the tasks run without it, and only the
    configuration, which belongs to a thread, is handed to them. After Ctrl-C, or an error that is to be raised, fits
    that are under way end after their batches.
    """

    def __init__(self, config: dict[str, Any], *, alone: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self._config = config
        self._alone = alone
        self._event = threading.Event()

    def effective_n_jobs(self, n_jobs: Any) -> int:
        """How many tasks run at once; ``alone``: one, whatever is asked for."""
        return min(int(super().effective_n_jobs(n_jobs)), 1 if self._alone else sys.maxsize)

    def submit(self, func: Any, callback: Any = None) -> Any:
        """Start a batch of tasks."""
        return super().submit(self._unwrapped(func), callback)

    def apply_async(self, func: Any, callback: Any = None) -> Any:
        """``submit`` by its name in older releases of joblib."""
        return super().apply_async(self._unwrapped(func), callback)

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """What is under way is of no use any more."""
        self._event.set()
        super().abort_everything(ensure_ready)

    def _unwrapped(self, batch: Any) -> Any:
        batch.items = [(self._configured(task), *given) for task, *given in batch.items]
        return batch

    def _configured(self, task: Callable[..., Any]) -> Callable[..., Any]:
        # what functools.wraps leaves in a wrapper
        task = getattr(task, "__wrapped__", task)

        def run(*arguments: Any, **named: Any) -> Any:
            # on a thread of the pool's own
            _abandoned.set(self._event)
            with config_context(**self._config):
                return task(*arguments, **named)

        return run
