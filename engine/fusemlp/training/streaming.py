"""Training on batches that come one by one: each is checked and copied to the device when its turn comes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fusemlp.inputs.arrays import Array

if TYPE_CHECKING:
    from fusemlp.inputs.batches import Batches
    from fusemlp.inputs.targets import Examples
    from fusemlp.runtime.session import Session


class Stream:
    """The steps of a fit on ``batches``, the first of which is ``first``; ``weighted`` gives rows their weights.

    The program has room for ``rows`` rows or the largest batch so far; shorter ones are padded.
    """

    # Ctrl-C waits for one batch
    chunk = 1

    def __init__(
        self,
        engine: Session,
        batches: Batches,
        first: Examples,
        weighted: Callable[[Examples], Examples],
        rows: int = 0,
    ) -> None:
        self._engine, self._batches, self._first, self._weighted = engine, batches, first, weighted
        rows = max(rows, len(first.X))
        # not again for a larger batch: a running loop keeps the memory that it began with
        engine.make_room_for(rows)
        self._make_room(rows)

    def _make_room(self, rows: int) -> None:
        engine, first = self._engine, self._weighted(self._first)
        self._rows = rows
        self._bound = engine.bind_staged(rows, engine.spec_for(first.targets), weighted=first.weight is not None)
        self.arrays: dict[str, Any] = self._bound.arrays

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """Leave out the batches of an epoch that a resumed fit has trained on."""
        self._batches.skip(first_batch)

    def run_many(self, count: int) -> None:
        """Train on the next ``count`` batches."""
        for _ in range(count):
            batch = self._batches.next(self._engine)
            self._batches.check_alike(self._first, batch)
            if len(batch.X) > self._rows:
                self._make_room(len(batch.X))
            batch = self._weighted(batch)
            self._engine.run_staged(self._bound, self._engine.normalised(batch.X), batch.targets.values, batch.weight)
