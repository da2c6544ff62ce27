"""The steps in front of a model, fitted once for all candidates that have them in common."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any

import joblib

from fusemlp.sklearn.gathering import result_of

# What transformed rows may take in all, in bytes; beyond it the ones that were used longest ago are computed again.
LIMIT = 1 << 30


class SharedFits:
    """A pipeline's ``memory`` that keeps fitted steps and their transformed rows in this process, for all threads.

    Two calls are the same where the step, its parameters, the rows and the targets are. They have the fitted step in
    common, and rows of their own, which a later step may change in place, as those with ``copy=False`` do.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._results: OrderedDict[str, Future[Any]] = OrderedDict()
        self._sizes: dict[str, int] = {}

    def cache(self, function: Callable[..., Any], ignore: Iterable[str] = ()) -> Callable[..., Any]:
        """``function``, called once for the same arguments; those named in ``ignore`` do not count."""
        ignored = frozenset(ignore)

        def call(*arguments: Any, **named: Any) -> Any:
            counted = {name: value for name, value in named.items() if name not in ignored}
            try:
                key = joblib.hash((function.__qualname__, arguments, counted))
            except (pickle.PicklingError, AttributeError, TypeError):
                # a step that cannot be pickled, such as one with a lambda, cannot be told from another
                return function(*arguments, **named)
            return self._result(key, lambda: function(*arguments, **named))

        return call

    def _result(self, key: str, compute: Callable[[], Any]) -> Any:
        with self._lock:
            future = self._results.get(key)
            if future is not None:
                self._results.move_to_end(key)
            else:
                mine = self._results[key] = Future()
        if future is not None:
            rows, step = result_of(future)
            return copy.deepcopy(rows), step
        try:
            rows, step = compute()
            kept = copy.deepcopy(rows)
        except BaseException as error:
            with self._lock:
                self._results.pop(key, None)
            mine.set_exception(error)
            raise
        mine.set_result((kept, step))
        self._keep(key, _bytes(kept))
        return rows, step

    def _keep(self, key: str, size: int) -> None:
        with self._lock:
            self._sizes[key] = size
            oldest = [one for one in self._results if one in self._sizes]
            while oldest and sum(self._sizes.values()) > self.limit:
                del self._results[oldest[0]], self._sizes[oldest[0]]
                oldest.pop(0)

    def __deepcopy__(self, memo: Any) -> SharedFits:
        # a clone of the pipeline shares what there is
        return self

    def __repr__(self) -> str:
        return "SharedFits()"


def _bytes(rows: Any) -> int:
    """The size of transformed rows, dense, sparse or a table."""
    if hasattr(rows, "memory_usage"):
        return int(rows.memory_usage().sum())
    # a sparse matrix has its numbers in an array
    stored = rows if hasattr(rows, "nbytes") else getattr(rows, "data", None)
    return int(getattr(stored, "nbytes", 0))
