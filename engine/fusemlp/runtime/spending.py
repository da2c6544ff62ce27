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


class Spending:
    """The part of an engine that trains privately, if it has a ``privacy``, and counts the steps of all its fits."""

    privacy: DPSGD | None
    batch_size: int
    precision: str
    # private steps of earlier fits; the sampling rate of the last one, and the updates before it
    _spent: list[tuple[float, int]]
    _sampling: tuple[float, int] | None

    @property
    def update_count(self) -> int:
        """The number of updates applied so far."""
        raise NotImplementedError

    def start_spending(self, spent: list[tuple[float, int]]) -> None:
        """Go on from these steps, with a new seed unless one was given."""
        self._spent, self._sampling, self._expected_rows = spent, None, self.batch_size
        if self.privacy is not None:
            self._accountant = Accountant(self.privacy.noise)
            self._private_seed = secrets.randbits(64) if self.privacy.seed is None else self.privacy.seed

    def check_accounting(self) -> None:
        """Raise MissingLibraryError if it trains privately, and dp-accounting is not there."""
        if self.privacy is not None:
            check_accountant()

    def privacy_config(self) -> dict[str, Any] | None:
        """Return privacy and steps, JSON-able, without the seed."""
        return None if self.privacy is None else {**self.privacy.to_config(), "spent": self.steps_spent}

    def start_spending_from(self, config: Mapping[str, Any] | None) -> None:
        """Invert ``privacy_config``."""
        given = dict(config or {})
        spent = stored("privacy.spent", given.pop("spent", []), list[tuple[float, int]])
        self.privacy = DPSGD(**given) if given else None
        self.start_spending(spent)

    def lowered_privacy(self) -> Privacy | None:
        """Return what the program of a step needs to know."""
        if self.privacy is None:
            return None
        deviation = self.privacy.noise * self.privacy.clip
        clip = self.privacy.clip * (1.0 - ROUNDED.get(self.precision, 0.0))
        return Privacy(clip, Noise(deviation, float(self._expected_rows), self._private_seed))

    def sample_privately(self, rows: int, rate: float) -> int:
        """Let the steps from now on take each of ``rows`` rows with probability ``rate``; return the seed for that."""
        assert self.privacy is not None
        if self.privacy.delta is None:
            self.privacy = replace(self.privacy, delta=usual_delta(rows))
        self._spent, self._sampling = self.steps_spent, (rate, self.update_count)
        self._expected_rows = min(self.batch_size, rows)
        return self._private_seed

    @property
    def steps_spent(self) -> list[tuple[float, int]]:
        """The private steps so far: pairs of a sampling rate and the number of steps with it."""
        if self._sampling is None:
            return [*self._spent]
        rate, first = self._sampling
        return joined([*self._spent, (rate, self.update_count - first)])

    def privacy_spent(self) -> dict[str, Any]:
        """The privacy that training has spent: "epsilon", "delta", "steps", and "noise" and "clip" of ``DPSGD``.

        epsilon is an upper bound for all fits together, of the same rows. Raises ArgumentError if the engine has not
        trained privately, MissingLibraryError without dp-accounting.
        """
        if self.privacy is None or self.privacy.delta is None:
            raise ArgumentError(NOT_PRIVATE)
        return _spent(self._accountant, self.privacy, self.steps_spent)


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
