"""The order of the rows in each epoch: the user's, or one by the seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.inputs.arrays import Array, to_array
from fusemlp.runtime.backends import row_order as shuffled
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session


def of_epoch(
    engine: Session, count: int, rows: Array | None, order: Callable[[int], Array] | None
) -> Callable[[int], Array]:
    """Return the function from the epoch to its rows: by ``order``, or ``count`` rows in the order of the seed.

    The latter are those of ``rows`` (count,) if given. Members of one data row follow one another.
    """

    def by_seed(epoch: int) -> Array:
        found = shuffled(engine.backend, engine.plan, count, engine.seed, epoch)
        return found if rows is None else rows[found]

    single, members = by_seed if order is None else order, engine.network.members
    return single if members == 1 else lambda epoch: np.repeat(single(epoch), members)


def checked_order(n: int, shuffle: bool, given: Any, first_epoch: int) -> Callable[[int], Array] | None:
    """Return the function from the epoch to the order of the rows that ``fit`` is asked for; None for the seed's."""
    if given is None:
        identity = np.arange(n)
        return None if shuffle else lambda epoch: identity
    if not callable(given):
        raise ArgumentTypeError(
            f"row_order: expected a function from the epoch to the order of the rows, got {type(given).__name__}; "
            "for one fixed order give lambda epoch: rows"
        )

    def checked(epoch: int) -> Array:
        rows = to_array(f"row_order({epoch})", given(epoch))
        if rows.shape != (n,) or rows.dtype.kind not in "iu" or not np.array_equal(np.sort(rows), np.arange(n)):
            raise ArgumentError(
                f"row_order: expected a permutation of range({n}) for epoch {epoch}, got "
                f"{np.array2string(rows, threshold=8)}"
            )
        return rows

    # the first is checked before anything has changed, and asked for only once
    ahead = {first_epoch: checked(first_epoch)}
    return lambda epoch: ahead.pop(epoch) if epoch in ahead else checked(epoch)
