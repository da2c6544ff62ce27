"""Steps of a program that does not walk its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fusemlp.runtime.bound import BoundProgram

Array = np.ndarray[Any, Any]


class CopiedBatches:
    """Runs a program whose rows are copied into it batch by batch."""

    chunk = 1

    def __init__(self, bound: BoundProgram) -> None:
        self.bound, self.arrays = bound, bound.arrays

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """Take the rows of an epoch, from batch ``first_batch`` of ``size`` rows on."""
        assert epochs == 1
        self._order, self._size, self._start = order, size, first_batch * size
        self.bound.set_row_count(size)

    def run_many(self, count: int) -> None:
        """Train on the next ``count`` batches."""
        with np.errstate(all="ignore"):
            for _ in range(count):
                self.step(self._order[self._start : self._start + self._size])
                self._start += self._size

    def step(self, batch: Array) -> None:
        """Train on these rows."""
        self.copy(batch)
        self.bound.run()

    def copy(self, batch: Array) -> None:
        """Make these the rows of the next step."""
        rows, count = self.arrays["rows"], len(batch)
        self.bound.backend.copy_into(rows[:count], batch)
        if count < len(rows):
            rows[count:] = -1
            self.bound.set_row_count(count)
