"""How a search's fits are run: on threads, of which each fit has one to itself."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from joblib.parallel import ThreadingBackend
from sklearn import config_context

from fusemlp.runtime.backends import one_blas_thread
from fusemlp.sklearn.gathering import Gathering

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
    that are under way end after their batches. What the tasks do in Python they do in turn, see ``Gathering``.

    ``most``: how many tasks there are at once if nobody says how many, None for one a core. ``on_host``: models may
    train on NumPy, BLAS on one thread in each.
    """

    def __init__(
        self,
        config: dict[str, Any],
        *,
        most: int | None = None,
        on_host: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._config = config
        self._most, self._on_host = most, on_host
        self._gathering = Gathering()
        self._event = threading.Event()

    def effective_n_jobs(self, n_jobs: Any) -> int:
        """How many tasks there are at once."""
        if self._most is not None and n_jobs is not None and n_jobs < 0:
            return self._most
        return int(super().effective_n_jobs(n_jobs))

    def configure(self, *arguments: Any, **options: Any) -> Any:
        """Make ready for so many threads."""
        threads = super().configure(*arguments, **options)
        self._gathering.threads = threads
        return threads

    @contextmanager
    def retrieval_context(self) -> Iterator[None]:
        """While results are waited for, when the first tasks have all been submitted."""
        self._gathering.all_handed_out()
        with super().retrieval_context():
            yield

    def submit(self, func: Any, callback: Any = None) -> Any:
        """Start a batch of tasks."""
        return super().submit(self._unwrapped(func), callback)

    def apply_async(self, func: Any, callback: Any = None) -> Any:
        """``submit`` by its name in older releases of joblib."""
        return super().apply_async(self._unwrapped(func), callback)

    def give_up(self) -> None:
        """What is under way, if anything is, is of no use any more."""
        self._event.set()
        self._gathering.give_up()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """After an error, or Ctrl-C."""
        self.give_up()
        super().abort_everything(ensure_ready)

    def _unwrapped(self, batch: Any) -> Any:
        batch.items = [(self._configured(task), *given) for task, *given in batch.items]
        return batch

    def _configured(self, task: Callable[..., Any]) -> Callable[..., Any]:
        # what functools.wraps leaves in a wrapper
        task = getattr(task, "__wrapped__", task)
        self._gathering.hand_out()

        def run(*arguments: Any, **named: Any) -> Any:
            # on a thread of the pool's own
            _abandoned.set(self._event)
            threads = one_blas_thread() if self._on_host else nullcontext()
            with config_context(**self._config), threads, self._gathering.task():
                return task(*arguments, **named)

        return run
