"""The table of learning rates that the clock on the device reads: the host fills it ahead of the launches."""

import sys
from typing import Any

import numpy as np

from fusemlp.describe.schedules import Schedule
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.clock import rate_table
from fusemlp_kernels.contract import (
    BIAS_CORRECTION_1,
    BIAS_CORRECTION_2,
    LEARNING_RATE,
    RATE_SCALE,
    RATE_SHARE,
    SHARE,
    UPDATE_COUNT,
    Backend,
    UpdateRule,
)


class RateTable:
    """Keeps ``rates`` ahead of the updates of one optimizer; the arrays are the contract's, on the device.

    ``cover`` is called before each launch. After the counters were written from outside, ``forget`` makes the next
    launch fill the table anew.
    """

    def __init__(
        self, backend: Backend, rule: UpdateRule, hyper: Any, rates: Any, counters: Any, *, skips: bool = False
    ) -> None:
        self.hyper, self.rates, self.counters = hyper, rates, counters
        self.schedule: Schedule | None = None
        self._backend = backend
        self.rule = rule
        # what the table was filled with, and of which update its first row is
        self._filled: Array = np.empty((0, 0))
        self._first = 0
        # how many more batches it has rows for
        self._batches = 0
        # batches may be skipped without an update
        self._skips = skips
        # the number of updates when the host last knew it, and the batches that were launched since
        self._known: int | None = None
        self._since = 0

    def follow(self, schedule: Schedule, scale: float | None = None, *, count: int | None = None) -> None:
        """Take the learning rates from ``schedule``, whose lengths are numbers of updates, from the next update on.

        ``scale`` multiplies them. ``count``: how many updates were before, where the caller knows; else the device is
        asked, and waited for.
        """
        hyper = self.hyper
        self.note(int(self.counters[UPDATE_COUNT]) if count is None else count)
        first, _ = self._updates()
        known = schedule == self.schedule and 0 <= first - self._first < len(self._filled)
        self.schedule = schedule
        if known:
            self._count_batches(first, first)
        else:
            self._fill(first, first)
        if scale is None:
            scale = float(hyper[RATE_SCALE])
        else:
            hyper[RATE_SCALE] = scale
        row = self._filled[first - self._first]
        hyper[LEARNING_RATE] = row[LEARNING_RATE] * scale
        hyper[BIAS_CORRECTION_1], hyper[BIAS_CORRECTION_2] = row[BIAS_CORRECTION_1], row[BIAS_CORRECTION_2]
        hyper[SHARE] = row[RATE_SHARE]

    def rescale(self, scale: float) -> None:
        """Multiply the rates of the schedule by ``scale`` from the next update on."""
        self.hyper[RATE_SCALE] = scale
        self.hyper[LEARNING_RATE] = self.base * scale

    @property
    def base(self) -> float:
        """The rate of the schedule for the next update, without the factor on it."""
        assert self.schedule is not None
        least, most = self._updates()
        return self.schedule.at(least if least == most else int(self.counters[UPDATE_COUNT]))

    def note(self, count: int) -> None:
        """Learn how many updates there were."""
        self._known, self._since = count, 0

    def forget(self) -> None:
        """Fill the table again before the next launch."""
        self._batches, self._known = 0, None

    def _updates(self) -> tuple[int, int]:
        """The least and the greatest number that there may have been; asks the device, and waits for it, if the host
        knows none. In host memory nothing waits."""
        if self._known is None or isinstance(self.counters, np.ndarray):
            self.note(int(self.counters[UPDATE_COUNT]))
        assert self._known is not None
        whole, rest = divmod(self._since, self.rule.accumulate)
        return self._known + (0 if self._skips else whole), self._known + whole + bool(rest)

    def cover(self, schedule: Schedule, batches: int) -> int:
        """Make the table ready for a launch by ``schedule``; returns how many of ``batches`` it may go through."""
        if schedule is not self.schedule:
            self.follow(schedule)
        if batches > self._batches:
            least, most = self._updates()
            if most - least >= len(self.rates) // 2:
                # too many that may have been skipped
                self._known = None
                least, most = self._updates()
            self._fill(least, most)
        covered = min(batches, self._batches)
        self._batches -= covered
        self._since += covered
        return covered

    def _fill(self, first: int, most: int) -> None:
        """Fill the table from update ``first`` on; the next is at most update ``most``."""
        assert self.schedule is not None
        rows = len(self.rates) - 1
        if self.schedule.constant and first >= self.schedule.warmup and self.rule.kind == "sgd" and not self.rule.ema:
            rows = 1
        table = rate_table(self.rule, self.schedule.rates(first, rows), first)
        self._backend.copy_into(self.rates[: len(table)], table)
        # on the host the table is kept once
        self._first, self._filled = first, (self.rates if isinstance(self.rates, np.ndarray) else table)[1 : len(table)]
        self._count_batches(first, most)

    def _count_batches(self, first: int, most: int) -> None:
        assert self.schedule is not None
        ahead = first - self._first
        row = self._filled[ahead]
        settled = self.schedule.constant and first >= self.schedule.warmup
        # with bias corrections that are 1, those of the average too, a constant rate's row stands for all that follow
        corrected = row[BIAS_CORRECTION_1] == row[BIAS_CORRECTION_2] == 1.0 and row[RATE_SHARE] == 1.0 - self.rule.ema
        if settled and corrected:
            self._batches = sys.maxsize
        else:
            self._batches = (len(self._filled) - 1 - ahead - (most - first)) * self.rule.accumulate
