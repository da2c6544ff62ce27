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
        bound, rows, size, run = self.bound, self.arrays["rows"], self._size, self.bound.run
        copy = bound.backend.copy_into
        with np.errstate(all="ignore"):
            for _ in range(count):
                batch = self._order[self._start : self._start + size]
                copy(rows[: len(batch)], batch)
                if len(batch) < size:
                    rows[len(batch) :] = -1
                    bound.set_row_count(len(batch))
                self._start += size
                run()
