"""The warning that a fit has not converged; a search gives one for all of its fits, with their number.

A fit cannot be told that a search has called it, so it finds the search among its callers. The fit of the best
candidate, a search's last, gives the warning. A ``FleetSearchCV`` gives it itself, with ``refit=False`` too; another
search with ``refit=False`` gives it with its first such fit. Fits in other processes or threads know of no search.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection._search import BaseSearchCV


@dataclass
class Count:
    """The fits of a search; ``first``: the warning of the first that did not converge."""

    fits: int = 0
    unconverged: int = 0
    first: str = ""
    # A fleet's search gives the warning itself.
    kept: bool = False

    def add(self, message: str | None) -> None:
        """Count a fit, and its warning if it has one."""
        self.fits += 1
        if message is not None:
            self.unconverged += 1
            self.first = self.first or message


class Around(NamedTuple):
    """The search that called a fit; ``call`` is an object that lives as long as this call of its ``fit``."""

    search: Any
    call: Any
    in_fold: bool


# By the object of the call, or by a fleet's search.
_counts: WeakKeyDictionary[Any, Count] = WeakKeyDictionary()


def fit_ended(message: str | None, *, stacklevel: int) -> None:
    """Warn with ``message``, or None of a fit that converged; in a search count it."""
    around = search_around()
    if around is None:
        if message is not None:
            warnings.warn(message, ConvergenceWarning, stacklevel=stacklevel + 1)
        return
    search = around.search
    count = _counts[search] if search in _counts else _counts.setdefault(around.call, Count())
    count.add(message)
    if count.kept:
        return
    if not search.refit:
        if message is not None and count.unconverged == 1:
            _warn(f"{message} Other fits of this {type(search).__name__} that end so give no warning.")
    elif not around.in_fold:
        _counts.pop(around.call)
        _tell(search, count)


@contextmanager
def one_warning(search: Any) -> Iterator[None]:
    """Count the fits of a search in the block, and warn after it."""
    _counts[search] = count = Count(kept=True)
    try:
        yield
    finally:
        _counts.pop(search, None)
    _tell(search, count)


def search_around() -> Around | None:
    """Return the search that called the calling fit, or None."""
    in_fold = False
    for frame in _callers():
        name = frame.f_code.co_name
        if name == "_fit_and_score":
            in_fold = True
        elif name == "fit" and isinstance(search := frame.f_locals.get("self"), BaseSearchCV):
            # scikit-learn clones the estimator at each call
            return Around(search, frame.f_locals.get("base_estimator", search), in_fold)
    return None


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def _tell(search: Any, count: Count) -> None:
    if count.unconverged:
        fits = f"{count.unconverged} of the {count.fits} fits of this {type(search).__name__}"
        # one alone if the folds were fitted in other processes
        _warn(count.first if count.fits == 1 else f"{count.first} {fits} ended so: raise max_iter.")


def _warn(message: str) -> None:
    """Warn at the line outside the libraries that called the search."""
    level = 2
    for frame in _callers():
        if frame.f_globals.get("__name__", "").partition(".")[0] not in ("fusemlp", "sklearn", "joblib", "contextlib"):
            break
        level += 1
    warnings.warn(message, ConvergenceWarning, stacklevel=level)
