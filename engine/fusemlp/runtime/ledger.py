"""The privacy that an engine's training spends, and the rows that its steps draw.

Each step of private training takes each row by itself with one probability (Poisson sampling).
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from fusemlp.describe.description import stored
from fusemlp.describe.privacy import (
    DPSGD,
    Accountant,
    Spent,
    check_accountant,
    joined,
    sampling_rate,
    steps_of_an_epoch,
    usual_delta,
)
from fusemlp.inputs.arrays import Array
from fusemlp.program.builder import Pass
from fusemlp.program.passes import ClipAndNoise
from fusemlp_kernels.contract import Noise
from fusemlp_kernels.errors import ArgumentError

# Rounding clipped rows, or the factors of their products, makes a row's gradient larger by at most this part of it;
# that of float32 is neglected, as the accountant neglects that of the noise.
ROUNDED = {"tf32": 2.0**-10, "bf16": 2.0**-8}

NOT_PRIVATE = "privacy: it has not trained privately; make it with privacy=DPSGD(noise=1.1, clip=1.0), and then fit"


class Ledger:
    """The account of training without privacy, which spends none.

    Methods that count steps take ``updates``, the number of updates applied so far, or a function that returns it where
    not all wait for the device.
    """

    privacy: DPSGD | None = None
    # the names of ``figures``, and of what a diagnosis need not advise
    logs: ClassVar[tuple[str, ...]] = ()
    remedies: ClassVar[tuple[str, ...]] = ()

    @staticmethod
    def of(privacy: DPSGD | None, rows: int, spent: Spent = ()) -> Ledger:
        """Return the account of training with ``privacy``; see ``PrivateLedger``."""
        return Ledger() if privacy is None else PrivateLedger(privacy, rows, spent)

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, rows: int) -> Ledger:
        """Invert ``to_config``, with a new seed."""
        fields = dict(config or {})
        spent = stored("privacy.spent", fields.pop("spent", []), list[tuple[float, int]])
        return cls.of(DPSGD(**fields) if fields else None, rows, spent)

    def check(self, precision: str) -> None:
        """Raise ArgumentError unless this precision holds the noise."""

    def check_accounting(self) -> None:
        """Raise MissingLibraryError if it trains privately, and dp-accounting is not there."""

    def to_config(self, updates: int) -> dict[str, Any] | None:
        """Return privacy and steps, JSON-able, without the seed; None without privacy."""
        return None

    def passes(self, precision: str) -> tuple[Pass, ...]:
        """Return what changes the program of a step."""
        return ()

    def batches(self, rows: int, batch_size: int, *, drop_last: bool) -> int:
        """Return the batches of an epoch."""
        return rows // batch_size if drop_last else -(-rows // batch_size)

    def draw(
        self, rows: int, batch_size: int, updates: Callable[[], int], epochs: range, before: int
    ) -> PoissonRows | None:
        """Return the rows of the steps of ``epochs``, if they are drawn.

        The first of the epochs began ``before`` updates from now, which is negative for one that is resumed.
        """
        return None

    def figures(self, updates: Callable[[], int]) -> dict[str, float]:
        """Return what an epoch logs of it."""
        return {}

    def spent(self, updates: int) -> dict[str, Any]:
        """Return what training has spent; see ``Engine.privacy_spent``."""
        raise ArgumentError(NOT_PRIVATE)

    def report(self, updates: int) -> dict[str, Any]:
        """Return the entries of report.json."""
        return {}


class PrivateLedger(Ledger):
    """The account of training with ``privacy``, and the steps of all fits.

    ``rows`` are the expected rows of a step; ``spent``: pairs of a sampling rate and the number of steps with it in
    earlier fits.
    """

    privacy: DPSGD
    logs, remedies = ("epsilon",), ("clipping",)

    def __init__(self, privacy: DPSGD, rows: int, spent: Spent) -> None:
        self.privacy, self._spent, self._rows = privacy, [*spent], rows
        self._accountant = Accountant(privacy.noise)
        # the sampling rate of the last fit, and the updates before it
        self._sampling: tuple[float, int] | None = None
        # of sampling and noise: a new one, unless one was given
        self.seed = secrets.randbits(64) if privacy.seed is None else privacy.seed

    def check(self, precision: str) -> None:
        self.privacy.check_size(precision)

    def check_accounting(self) -> None:
        check_accountant()

    def to_config(self, updates: int) -> dict[str, Any]:
        return {**self.privacy.to_config(), "spent": self.steps(updates)}

    def passes(self, precision: str) -> tuple[Pass, ...]:
        deviation = self.privacy.noise * self.privacy.clip
        clip = self.privacy.clip * (1.0 - ROUNDED.get(precision, 0.0))
        return (ClipAndNoise(clip, Noise(deviation, float(self._rows), self.seed)),)

    def batches(self, rows: int, batch_size: int, *, drop_last: bool) -> int:
        return steps_of_an_epoch(rows, batch_size)

    def draw(self, rows: int, batch_size: int, updates: Callable[[], int], epochs: range, before: int) -> PoissonRows:
        applied = updates()
        if self.privacy.delta is None:
            self.privacy = replace(self.privacy, delta=usual_delta(rows))
        self._spent, self._sampling = self.steps(applied), (sampling_rate(rows, batch_size), applied)
        self._rows = batch_size
        steps = steps_of_an_epoch(rows, batch_size)
        begun = {epoch: applied + before + (epoch - epochs.start) * steps for epoch in epochs}
        return PoissonRows(rows, batch_size, self.seed, begun)

    def figures(self, updates: Callable[[], int]) -> dict[str, float]:
        return {"epsilon": self.spent(updates())["epsilon"]}

    def steps(self, updates: int) -> list[tuple[float, int]]:
        """Return the private steps so far: pairs of a sampling rate and the number of steps with it."""
        if self._sampling is None:
            return [*self._spent]
        rate, first = self._sampling
        return joined([*self._spent, (rate, updates - first)])

    def report(self, updates: int) -> dict[str, Any]:
        return {"privacy": self.spent(updates)}

    def spent(self, updates: int) -> dict[str, Any]:
        if self.privacy.delta is None:
            raise ArgumentError(NOT_PRIVATE)
        return _spent(self._accountant, self.privacy, self.steps(updates))


def _spent(accountant: Accountant, privacy: DPSGD, spent: Spent) -> dict[str, Any]:
    assert privacy.delta is not None
    epsilon = accountant.epsilon(spent, privacy.delta)
    return {"epsilon": epsilon, **privacy.to_config(), "steps": sum(count for _, count in spent)}


def spent_together(configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the ``privacy_spent`` of several engines of one privacy on the same rows, by their ``privacy_config``.

    Raises ArgumentError if there are none that have trained, MissingLibraryError without dp-accounting.
    """
    trained = [dict(one) for one in configs if one["delta"] is not None]
    if not trained:
        raise ArgumentError(NOT_PRIVATE)
    spent = joined((rate, count) for one in trained for rate, count in one.pop("spent"))
    # the smallest holds for all
    privacy = DPSGD(**min(trained, key=lambda one: one["delta"]))
    return _spent(Accountant(privacy.noise), privacy, spent)


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
