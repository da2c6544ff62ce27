"""The rows of private training: each step takes each row by itself with one probability (Poisson sampling)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fusemlp.describe.privacy import OF_TRAINING_ROWS, check_accountant, sampling_rate, steps_of_an_epoch
from fusemlp.describe.schedules import ReduceOnPlateau, Schedule
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError


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


def check_private(
    schedule: Schedule,
    given: Mapping[str, Any],
    class_weight: Any,
    *,
    validates: bool,
    stops: bool,
    monitors: Iterable[Any],
) -> None:
    """Raise ArgumentError for arguments of ``fit`` that a private engine does not take, MissingLibraryError without
    dp-accounting.

    ``schedule``: its optimizer's. ``given``: arguments that it refuses unless they are false. It has validation rows if
    it ``validates``, and ``stops`` early by the first of ``monitors``; callbacks follow the others.
    """
    mends = {
        "y": "give arrays X and y: each step draws its rows at random from all",
        "shuffle": "each step draws its rows at random; leave it out",
        "row_order": "each step draws its rows at random; leave it out",
        "drop_last": "its batches have no common length; leave it out",
    }
    for name, value in given.items():
        if value:
            raise ArgumentError(f"{name}: the engine trains privately; {mends[name]}")
    if isinstance(class_weight, str):
        raise ArgumentError(
            "class_weight: 'balanced' counts the private rows, which privacy does not cover; give the weight of each "
            "class"
        )
    first, *others = monitors
    if first is None and (stops or isinstance(schedule, ReduceOnPlateau)):
        first = "val_loss" if validates else "loss"
    for monitor in (first, *others):
        if monitor in OF_TRAINING_ROWS:
            raise ArgumentError(
                f"monitor: {monitor!r} is of the private rows, which privacy does not cover; give "
                "validation_data=(Xv, yv) of rows that need no protection, and follow val_loss"
            )
    check_accountant()
