"""Several updates on each batch, one after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fusemlp.inputs.arrays import Array

if TYPE_CHECKING:
    from fusemlp.runtime.bound import BoundProgram


class Replays:
    """The steps of ``bound`` on batches that come ``repeats`` times each; an epoch has ``rows`` rows."""

    def __init__(self, bound: BoundProgram, repeats: int, rows: int) -> None:
        self._bound, self._repeats, self._rows = bound, repeats, rows
        self.chunk, self.arrays = bound.chunk, bound.arrays
        # the rows of the last batch where it is a short one, and the steps before it
        self._short: Array = np.arange(0)
        self._size, self._before = 0, 0

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """See ``walk_rows``; ``first_batch`` counts steps, and ``epochs`` is 1."""
        del epochs
        order = np.asarray(order[: self._rows])
        whole = len(order) // size
        self._short, self._size, self._before = order[whole * size :], size, whole * self._repeats - first_batch
        if self._before > 0:
            batches = order[: whole * size].reshape(whole, size)
            self._bound.set_rows(np.repeat(batches, self._repeats, axis=0).reshape(-1), first_batch, size)
        else:
            self._bound.set_rows(self._short, 0, size)

    def run_many(self, count: int) -> None:
        """``count`` steps one after another."""
        first = min(count, max(0, self._before))
        if first:
            self._bound.run_many(first)
            self._before -= first
            if self._before == 0 and len(self._short):
                # the clock goes back to the first row after the last: one batch by itself comes again and again
                self._bound.set_rows(self._short, 0, self._size)
        if count > first:
            self._bound.run_many(count - first)
