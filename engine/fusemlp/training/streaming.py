"""Training on batches that come one by one: each is checked and copied to the device when its turn comes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.inputs.arrays import Array
from fusemlp.runtime.binding import bind_staged
from fusemlp.runtime.stepping import run_staged

if TYPE_CHECKING:
    from fusemlp.inputs.batches import Batches
    from fusemlp.inputs.targets import Examples
    from fusemlp.runtime.ranks import Ranks
    from fusemlp.runtime.session import Session


class Stream:
    """The steps of a fit on ``batches``, the first of which is ``first``; ``weighted`` gives rows their weights.

    The program has room for the largest batch so far, and for ``rows`` at first; shorter ones are padded.
    """

    # Ctrl-C waits for one batch
    chunk = 1

    def __init__(
        self,
        engine: Session,
        batches: Batches,
        first: Examples,
        weighted: Callable[[Examples], Examples],
        rows: int,
    ) -> None:
        self._engine, self._batches, self._first, self._weighted = engine, batches, first, weighted
        # of the batches of an epoch so far: their number, and a digest of their targets where ranks compare them
        self._passed, self._digest = 0, hashlib.sha256()
        # not again for a larger batch: a running loop keeps the memory that it began with
        engine.make_room_for(rows)
        self._make_room(rows)

    def _make_room(self, rows: int) -> None:
        engine, first = self._engine, self._weighted(self._first)
        self._rows = rows
        self._bound = bind_staged(
            engine, rows, engine.inputs.spec_for(first.targets), weighted=first.weight is not None
        )
        self.arrays: dict[str, Any] = self._bound.arrays

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """Leave out the batches of an epoch that a resumed fit has trained on."""
        self._batches.skip(first_batch)
        self._passed, self._digest = first_batch, hashlib.sha256()

    def run_many(self, count: int) -> None:
        """Train on the next ``count`` batches."""
        for _ in range(count):
            batch = self._batches.next(self._engine.inputs)
            self._batches.check_alike(self._first, batch)
            if len(batch.X) > self._rows:
                self._make_room(len(batch.X))
            batch = self._weighted(batch)
            x = self._engine.scaling.normalised(batch.X)
            run_staged(self._engine, self._bound, x, batch.targets.values, batch.weight)
            if self._engine.ranks is not None:
                self._compare(self._engine.ranks, batch.targets.values)

    def _compare(self, ranks: Ranks, targets: Any) -> None:
        """Raise DistributedError at the end of an epoch if ranks had batches with other targets."""
        self._passed += 1
        if isinstance(targets, np.ndarray):
            self._digest.update(np.ascontiguousarray(targets).data)
        if self._passed == self._batches.steps:
            ranks.check_same({"a digest of the targets of an epoch": self._digest.hexdigest()})
