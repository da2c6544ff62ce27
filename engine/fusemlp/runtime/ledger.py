"""The privacy that an engine's training spends."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fusemlp.describe.description import stored
from fusemlp.describe.privacy import DPSGD, Accountant, Spent, check_accountant, joined, usual_delta
from fusemlp.program.step import Privacy
from fusemlp_kernels.contract import Noise
from fusemlp_kernels.errors import ArgumentError

# Rounding clipped rows, or the factors of their products, makes a row's gradient larger by at most this part of it;
# that of float32 is neglected, as the accountant neglects that of the noise.
ROUNDED = {"tf32": 2.0**-10, "bf16": 2.0**-8}


NOT_PRIVATE = "privacy: it has not trained privately; make it with privacy=DPSGD(noise=1.1, clip=1.0), and then fit"


class Ledger:
    """The account of private training: ``privacy``, None without, and the steps of all fits.

    ``rows`` are the expected rows of a step; ``spent``: pairs of a sampling rate and the number of steps with it in
    earlier fits. Methods that count steps take ``updates``, the number of updates applied so far.
    """

    def __init__(self, privacy: DPSGD | None, rows: int, spent: Spent = ()) -> None:
        self.privacy, self._spent, self._rows = privacy, [*spent], rows
        # the sampling rate of the last fit, and the updates before it
        self._sampling: tuple[float, int] | None = None
        if privacy is not None:
            self._accountant = Accountant(privacy.noise)
            # of sampling and noise: a new one, unless one was given
            self.seed = secrets.randbits(64) if privacy.seed is None else privacy.seed

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None, rows: int) -> Ledger:
        """Invert ``to_config``, with a new seed."""
        fields = dict(config or {})
        spent = stored("privacy.spent", fields.pop("spent", []), list[tuple[float, int]])
        return cls(DPSGD(**fields) if fields else None, rows, spent)

    def check_accounting(self) -> None:
        """Raise MissingLibraryError if it trains privately, and dp-accounting is not there."""
        if self.privacy is not None:
            check_accountant()

    def check_size(self, precision: str) -> None:
        """Raise ArgumentError unless this precision holds the noise."""
        if self.privacy is not None:
            self.privacy.check_size(precision)

    def to_config(self, updates: int) -> dict[str, Any] | None:
        """Return privacy and steps, JSON-able, without the seed."""
        return None if self.privacy is None else {**self.privacy.to_config(), "spent": self.steps(updates)}

    def lowered(self, precision: str) -> Privacy | None:
        """Return what the program of a step needs to know."""
        if self.privacy is None:
            return None
        deviation = self.privacy.noise * self.privacy.clip
        clip = self.privacy.clip * (1.0 - ROUNDED.get(precision, 0.0))
        return Privacy(clip, Noise(deviation, float(self._rows), self.seed))

    def sample(self, rows: int, rate: float, expected: int, updates: int) -> None:
        """Let the steps from now on take each of ``rows`` rows with probability ``rate``, ``expected`` at a time."""
        assert self.privacy is not None
        if self.privacy.delta is None:
            self.privacy = replace(self.privacy, delta=usual_delta(rows))
        self._spent, self._sampling = self.steps(updates), (rate, updates)
        self._rows = expected

    def steps(self, updates: int) -> list[tuple[float, int]]:
        """Return the private steps so far: pairs of a sampling rate and the number of steps with it."""
        if self._sampling is None:
            return [*self._spent]
        rate, first = self._sampling
        return joined([*self._spent, (rate, updates - first)])

    def spent(self, updates: int) -> dict[str, Any]:
        """Return what training has spent; see ``Engine.privacy_spent``."""
        if self.privacy is None or self.privacy.delta is None:
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
