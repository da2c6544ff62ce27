"""Fits the steps before a model once for all candidates that share them."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import joblib

# raised for what cannot be pickled
UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError)
# The most bytes of transformed rows; beyond it the least recently used ones are dropped.
LIMIT = 1 << 30


class SharedFits:
    """Keeps fitted steps and their transformed rows in this process, as a pipeline's ``memory``.

    Two calls are the same if the step, its parameters, the rows and the targets are. They share the fitted step and get
    rows of their own, which a later step may change in place, as steps with ``copy=False`` do.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        self.limit = limit
        self._results: OrderedDict[str, tuple[Any, Any]] = OrderedDict()

    def cache(self, function: Callable[..., Any], ignore: Iterable[str] = ()) -> Callable[..., Any]:
        """Return ``function`` called once for the same arguments; those named in ``ignore`` do not count."""
        ignored = frozenset(ignore)

        def call(*arguments: Any, **named: Any) -> Any:
            counted = {name: value for name, value in named.items() if name not in ignored}
            try:
                key = joblib.hash((function.__qualname__, arguments, counted))
            except UNPICKLABLE:
                # a step with a lambda, for example, cannot be compared
                return function(*arguments, **named)
            # the last entry is the one used last
            rows, step = self._results.pop(key) if key in self._results else function(*arguments, **named)
            self._results[key] = copy.deepcopy(rows), step
            while len(self._results) > 1 and sum(_bytes(kept) for kept, _ in self._results.values()) > self.limit:
                self._results.popitem(last=False)
            return rows, step

        return call

    def __deepcopy__(self, memo: Any) -> SharedFits:
        # clones of the pipeline share the results
        return self


def _bytes(rows: Any) -> int:
    """Return the size of transformed rows, dense, sparse or a table."""
    if hasattr(rows, "memory_usage"):
        return int(rows.memory_usage().sum())
    # a sparse matrix keeps its numbers in an array
    stored = rows if hasattr(rows, "nbytes") else getattr(rows, "data", None)
    return int(getattr(stored, "nbytes", 0))
