"""The rows of each epoch in their order: by the seed, by the user, or drawn for privacy.

Each step of private training takes each row by itself with one probability (Poisson sampling).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from fusemlp.describe.privacy import sampling_rate, steps_of_an_epoch
from fusemlp.inputs.arrays import Array, to_array
from fusemlp.runtime.backends import row_order as shuffled
from fusemlp_kernels.errors import ArgumentError

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session
    from fusemlp.training.history import FitState
    from fusemlp.training.plan import FitPlan

Order = Callable[[int], Array]


def batches_of(engine: Session, count: int, batch_size: int, *, drop_last: bool) -> int:
    """Return the batches of an epoch of ``count`` rows."""
    if engine.privacy is not None:
        return steps_of_an_epoch(count, batch_size)
    return count // batch_size if drop_last else -(-count // batch_size)


def order_of(engine: Session, count: int, rows: Array | None, order: Order | None) -> Order:
    """Return the function from the epoch to its rows: by ``order``, or ``count`` rows in the order of the seed.

    The latter are those of ``rows`` (count,) if given. Members of one data row follow one another.
    """

    def by_seed(epoch: int) -> Array:
        places = shuffled(engine.backend, engine.plan, count, engine.seed, epoch)
        return places if rows is None else rows[places]

    single, members = by_seed if order is None else order, engine.network.members
    return single if members == 1 else lambda epoch: np.repeat(single(epoch), members)


def asked_order(engine: Session, plan: FitPlan, count: int, first_epoch: int) -> Order | None:
    """Return the function from the epoch to the order of the ``count`` rows that a fit is asked for; None for the
    seed's.

    Raises ArgumentError for what is no permutation in the first epoch, and DistributedError if ranks have others.
    """
    if plan.row_order is None:
        identity = np.arange(count)
        return None if plan.shuffle else lambda epoch: identity
    of_user = plan.row_order

    def checked(epoch: int) -> Array:
        rows = to_array(f"row_order({epoch})", of_user(epoch))
        if rows.shape != (count,) or rows.dtype.kind not in "iu" or not np.array_equal(np.sort(rows), np.arange(count)):
            raise ArgumentError(
                f"row_order: expected a permutation of range({count}) for epoch {epoch}, got "
                f"{np.array2string(rows, threshold=8)}"
            )
        return rows

    # the first is checked before anything has changed, and asked for only once
    ahead = {first_epoch: checked(first_epoch)}

    def order(epoch: int) -> Array:
        rows = ahead.pop(epoch) if epoch in ahead else checked(epoch)
        engine.ranks.check_same({f"row_order({epoch})": rows})
        return rows

    return order


def sampled_rows(engine: Session, state: FitState, count: int, batches: int, last_epoch: int) -> PoissonRows | None:
    """Return the rows of a private fit, whose state this is, up to an epoch; None where it is not private."""
    if engine.privacy is None:
        return None
    size = min(engine.batch_size, count)
    engine.ledger.sample(count, sampling_rate(count, size), size, engine.update_count)
    begun, first = state.begun(engine.update_count, batches), state.first_epoch
    updates = {epoch: begun + (epoch - first) * batches for epoch in range(first, last_epoch)}
    return PoissonRows(count, size, engine.ledger.seed, updates)


class PoissonRows:
    """The batches of epochs: ``steps`` an epoch, each with room for ``size`` rows, as many as the largest batch has.

    The batches are drawn twice, first for ``size``; none is ever cut. They are a function of ``seed`` and of how many
    updates were before the epoch, which ``updates`` says: an epoch that is begun anew after Ctrl-C has other batches.
    """

    def __init__(self, rows: int, batch_size: int, seed: int, updates: Mapping[int, int]) -> None:
        self.rows, self.seed, self.updates = rows, seed, updates
        self.rate, self.steps = sampling_rate(rows, batch_size), steps_of_an_epoch(rows, batch_size)
        self.size = max([1, *(int(np.bincount(self._drawn(epoch)[0]).max(initial=0)) for epoch in updates)])

    def _drawn(self, epoch: int) -> tuple[Array, Array]:
        """The steps of an epoch, and for each a row that it takes, both in order.

        From one success of independent trials to the next there are geometrically many: no trial is drawn by itself.
        """
        generator, trials = np.random.default_rng((self.seed, self.updates[epoch])), self.steps * self.rows
        expected = trials * self.rate
        count, last, parts = int(expected + 4.0 * math.sqrt(expected)) + 8, -1, []
        while last < trials:
            parts.append(last + np.cumsum(generator.geometric(self.rate, count)))
            last = int(parts[-1][-1])
        taken = np.concatenate(parts)
        steps, rows = np.divmod(taken[taken < trials], self.rows)
        return steps, rows

    def order(self, epoch: int) -> Array:
        """The rows of an epoch, (steps * size,) int64: ``size`` for each step, -1 after the last that it takes."""
        steps, rows = self._drawn(epoch)
        starts = np.searchsorted(steps, np.arange(self.steps))
        order = np.full((self.steps, self.size), -1, np.int64)
        order[steps, np.arange(len(rows)) - starts[steps]] = rows
        return order.reshape(-1)
