"""The rows and the clocks of a crew: where each member is in its epochs, and what comes behind a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fusemlp_kernels.contract import (
    BATCH_INDEX,
    COUNTERS,
    FIRST_UPDATE,
    HYPER,
    LEARNING_RATE,
    LOSS_SUM,
    RATE_COLUMNS,
    RATE_SCALE,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_STEP,
    ROW_TOTAL,
    ROWS_FILLED,
    STATS,
    UPDATE_COUNT,
)
from fusemlp_kernels.numpy.activations import Array
from fusemlp_kernels.numpy.batched.common import Models, spans
from fusemlp_kernels.numpy.linear import bind_take


class Clocks:
    """Hyper and stats of the members, in arrays (members, ...) of the crew's own while it runs, and their counters.

    Members whose counters are equal keep equal counters: they are counted once.
    """

    def __init__(self, models: Models, members: Sequence[int]) -> None:
        count = len(members)
        self._counters = np.zeros((count, COUNTERS), np.int64)
        self.hyper, self.stats = np.zeros((count, HYPER)), np.zeros((count, STATS))
        self._fleet = [
            (own[places], array[fleet])
            for own, array in (
                (self._counters, models.counters),
                (self.hyper, models.hyper),
                (self.stats, models.stats),
            )
            for places, fleet in spans(members)
        ]
        self._rules = [models.rules[member] for member in members]
        self._history = None if models.history is None else [models.history[member] for member in members]
        self._rates = [models.rates[member] for member in members]
        self._every = self._rules[0].accumulate
        # counters, the members that have them, and of each member which it has
        self._states: list[tuple[list[int], list[int]]] = []
        self._own: list[list[int]] = []

    def enter(self) -> None:
        """Take over what the fleet's arrays hold."""
        for own, fleet in self._fleet:
            np.copyto(own, fleet)
        alike: dict[tuple[int, ...], list[int]] = {}
        for place, counters in enumerate(self._counters.tolist()):
            alike.setdefault(tuple(counters), []).append(place)
        self._states = [(list(counters), places) for counters, places in alike.items()]
        of_member = {place: state for state, places in self._states for place in places}
        self._own = [of_member[place] for place in range(len(self._rules))]

    def leave(self) -> None:
        """Write it back."""
        for state, places in self._states:
            self._counters[places] = state
        for own, fleet in self._fleet:
            np.copyto(fleet, own)

    def each(self, counter: int) -> list[int]:
        """What a counter is for each member."""
        return [state[counter] for state in self._own]

    @property
    def begins(self) -> bool:
        """Whether the gradients of this batch are the first of their update."""
        return self._every == 1 or self._own[0][BATCH_INDEX] % self._every == 0

    @property
    def updates(self) -> bool:
        """Whether an update comes behind this batch."""
        return self._every == 1 or (self._own[0][BATCH_INDEX] + 1) % self._every == 0

    def advance(self) -> None:
        """Behind a batch, and behind the update where there is one: see the contract."""
        updated = self.updates
        for state, places in self._states:
            state[BATCH_INDEX] += 1
            if state[ROW_STEP]:
                self._next_rows(state, places)
            state[UPDATE_COUNT] += updated
        if updated:
            self._next_update()

    def _next_rows(self, state: list[int], places: Sequence[int]) -> None:
        total, step = state[ROW_TOTAL], state[ROW_STEP]
        epoch, inside = divmod(state[ROW_OFFSET], total) if total else (0, 0)
        inside += step
        if inside >= total:
            epochs = 0 if self._history is None else len(self._history[0])
            if self._history is not None and epoch < epochs:
                for place in places:
                    self._history[place][epoch] = self.stats[place]
                    self.stats[place, LOSS_SUM:] = 0.0
            epoch, inside = epoch + 1 if epoch + 1 < epochs else 0, 0
        state[ROW_OFFSET], state[ROW_COUNT] = epoch * total + inside, min(total - inside, step)

    def _next_update(self) -> None:
        for place, (table, count) in enumerate(zip(self._rates, self.each(UPDATE_COUNT), strict=True)):
            row = 1 + max(0, min(count - int(table[0, FIRST_UPDATE]), int(table[0, ROWS_FILLED]) - 1))
            self.hyper[place, :RATE_COLUMNS] = table[row]
        self.hyper[:, LEARNING_RATE] *= self.hyper[:, RATE_SCALE]


class Batches:
    """What the members' rows pick: x (models * height, K), target and weight, of which one lies behind the other."""

    def __init__(self, models: Models, members: Sequence[int], height: int, clocks: Clocks) -> None:
        count = len(members)
        self._height, self._clocks = height, clocks
        picked = np.empty((count, height), np.int64)
        self._picked = picked
        self._spans = [(picked[places], models.rows[fleet]) for places, fleet in spans(members)]
        self._each = [(picked[place], models.rows[member]) for place, member in enumerate(members)]
        flat = picked.reshape(-1)

        def rows(source: Array) -> Array:
            return np.empty((count * height, *source.shape[1:]), source.dtype)

        self.x, self.target = rows(models.x), rows(models.target)
        self.weight = None if models.weight is None else rows(models.weight)
        self._takes = [bind_take(models.x, flat, self.x), bind_take(models.target, flat, self.target)]
        if models.weight is not None and self.weight is not None:
            self._takes.append(bind_take(models.weight, flat, self.weight))
        self._in_x = self.x.reshape(count, height, -1)

    def gather(self, counts: Sequence[int]) -> None:
        """Bring in the batches that the counters point at; behind the valid rows x is zero."""
        height = self._height
        offsets = self._clocks.each(ROW_OFFSET)
        whole = min(counts) == height
        if whole and offsets.count(offsets[0]) == len(offsets):
            start = offsets[0]
            for picked, rows in self._spans:
                np.copyto(picked, rows[:, start : start + height])
        else:
            for (picked, rows), start, count in zip(self._each, offsets, counts, strict=True):
                picked[:count] = rows[start : start + count]
                picked[count:] = -1
        for take in self._takes:
            take()
        if not whole:
            for place, count in enumerate(counts):
                self._in_x[place, count:] = 0.0
