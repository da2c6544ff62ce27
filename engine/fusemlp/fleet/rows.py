"""The rows of each model of a fleet: those that it trains on, and those that it is validated on."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.inputs.arrays import Array, to_array
from fusemlp.training.validation import Validation
from fusemlp_kernels.errors import ArgumentError

if TYPE_CHECKING:
    from fusemlp.engine import Engine
    from fusemlp.inputs.targets import Examples


def as_rows(argument: str, given: Sequence[Any] | None, models: int, count: int) -> list[Array] | None:
    """Return the row numbers (m,) int64 of each model, of ``count`` rows; None for all rows.

    Raises ArgumentError for a number of lists other than ``models``, or for what are no row numbers.
    """
    if given is None:
        return None
    lists = list(given)
    if len(lists) != models:
        raise ArgumentError(f"{argument}: expected a list of rows for each of the {models} models, got {len(lists)}")
    checked = []
    for index, one in enumerate(lists):
        array = to_array(f"{argument}[{index}]", one)
        if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
            raise ArgumentError(
                f"{argument}[{index}]: expected row numbers (m,), got {np.array2string(array, threshold=8)}"
            )
        if array.min() < 0 or array.max() >= count:
            raise ArgumentError(
                f"{argument}[{index}]: expected numbers from 0 to {count - 1}, got {array.min()} to {array.max()}"
            )
        checked.append(array.astype(np.int64))
    return checked


def held_out(engine: Engine, data: Examples, rows: Sequence[Array]) -> list[Validation]:
    """Return the validation of each model, on its ``rows`` of ``data``; models that have a fold in common share it."""
    # rows of a fold are indexed on the host
    whole = data.map(engine.inputs.on_host)
    folds = {one.tobytes(): one for one in rows}
    picked = {key: Validation(whole.map(itemgetter(one)), common=True) for key, one in folds.items()}
    return [picked[one.tobytes()] for one in rows]
