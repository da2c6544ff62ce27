"""Compare a contender's losses with the oracle's; one that differs is not timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bench.cases import Array, Case, Data, checked_rows, make_data, model_of
from bench.oracle import (
    SECOND_RUNS,
    STEPS,
    Expected,
    Rules,
    checks,
    expected,
    loss_of,
    masked_losses,
    tolerance,
)
from bench.peers import PEERS, Trainer, prepare

# The limit, in standard errors, for the difference of a contender's mean loss under dropout from the oracle's runs.
# Student's t of 12 runs exceeds it once in 40,000.
STANDARD_ERRORS = 7.0
# The number of fleet models outside the common tolerance that get a second check.
SECOND_LOOKS = 16


@dataclass(frozen=True)
class Verdict:
    """``worst``: the largest difference from the oracle over its tolerance; ``reason``: why the contender is refused.

    ``step``: the first step that differs, counted from 1; STEPS + 1 is the loss after the last one.
    """

    worst: float
    step: int | None = None
    reason: str | None = None

    @property
    def agrees(self) -> bool:
        """True if the contender may be timed."""
        return self.reason is None


def trajectory(trainer: Trainer, case: Case, data: Data, steps: int = STEPS) -> Array:
    """Return a contender's losses, shaped like ``Expected.losses``, and reset it to the initial parameters."""
    rows = checked_rows(case, steps)
    trainer.reset()
    losses = np.asarray(trainer.losses(rows), np.float64)
    parameters = trainer.parameters()
    first = rows[: case.batch_size]
    if case.models is None:
        last: Array = np.array([loss_of(case, data, parameters, first)])
    else:
        last = np.array([[loss_of(case, data, model_of(parameters, i), first) for i in range(case.models)]])
    trainer.reset()
    return np.concatenate([losses, last])


def judge(losses: Array, expected: Expected, again: Callable[[int], Array] | None = None) -> Verdict:
    """Compare a contender's losses with the oracle's.

    ``again`` returns the tolerance of one model from runs of its own, for a second check.
    """
    if losses.shape != expected.losses.shape:
        return Verdict(float("inf"), 1, f"returned losses of shape {losses.shape}, not {expected.losses.shape}")
    steps = len(losses) - 1
    flat, wanted = losses.reshape(steps + 1, -1), expected.losses.reshape(steps + 1, -1)
    off = np.abs(flat - wanted)
    allowed = np.repeat(expected.tolerance[:, None], off.shape[1], axis=1)
    outside = np.flatnonzero(~(off <= allowed).all(axis=0))
    if again is not None and len(outside) <= SECOND_LOOKS:
        for column in outside:
            allowed[:, column] = np.maximum(allowed[:, column], again(int(column)))
    share = off / allowed
    wrong = np.flatnonzero(~(share <= 1.0).all(axis=1))
    worst = float(np.max(share))
    if not len(wrong):
        return Verdict(worst)
    at = int(wrong[0])
    model = int(np.argmin(share[at] <= 1.0))
    where = f"step {at + 1}" if at < steps else f"the parameters after step {steps}"
    which = "" if losses.ndim == 1 else f" of model {model}"
    reason = (
        f"differs from the oracle first at {where}: a loss{which} of {flat[at, model]:.7g}, not "
        f"{wanted[at, model]:.7g} (within {allowed[at, model]:.1e})"
    )
    return Verdict(worst, at + 1, reason)


def judge_dropout(losses: Array, masked: Array) -> Verdict:
    """Compare the mean loss under dropout with that of the oracle's runs, which have other masks.

    Each library draws its own masks, but their effect on the mean loss is the same. A contender without dropout, with
    another rate or without the scaling has another mean.
    """
    mean, centre = float(losses[:STEPS].mean()), float(masked.mean())
    # The standard error of one further run against the mean of the others.
    error = float(masked.std(ddof=1)) * np.sqrt(1 + 1 / len(masked))
    share = abs(mean - centre) / (STANDARD_ERRORS * error)
    if share <= 1.0:
        return Verdict(share)
    return Verdict(
        share,
        1,
        f"with dropout on, its mean loss over {STEPS} steps is {mean:.5g}, not {centre:.5g} (within "
        f"{STANDARD_ERRORS * error:.1e})",
    )


def trajectories(name: str, case: Case, data: Data, trainer: Trainer | None = None) -> tuple[list[Array], Array | None]:
    """Return a contender's losses in each of ``oracle.checks`` and, if the case has dropout, with dropout on.

    ``trainer`` is the contender prepared for the case; None prepares it here.
    """
    own = trainer or prepare(name, case, data)
    found = [
        trajectory(own if checked == case else prepare(name, checked, data), checked, data, steps)
        for checked, steps in checks(case)
    ]
    return found, trajectory(own, case, data) if case.dropout else None


class Judge:
    """The oracle's losses of a case, computed once for each set of rules."""

    def __init__(self, case: Case) -> None:
        self.case, self.data = case, make_data(case)
        self._expected: dict[tuple[Rules, int], Expected] = {}
        self._masked: dict[Rules, Array] = {}

    def expected(self, name: str, check: int = 0) -> Expected:
        """See ``oracle.expected``; ``check`` is the place in ``oracle.checks``."""
        case, steps = checks(self.case)[check]
        rules = PEERS[name].rules
        key = (rules, check)
        if key not in self._expected:
            self._expected[key] = expected(case, self.data, rules, steps)
        return self._expected[key]

    def masked(self, name: str) -> Array:
        """See ``oracle.masked_losses``."""
        rules = PEERS[name].rules
        if rules not in self._masked:
            self._masked[rules] = masked_losses(self.case, self.data, rules)
        return self._masked[rules]

    def verdict(self, name: str, losses: Sequence[Array], with_dropout: Array | None) -> Verdict:
        """Return the verdict on a contender's ``trajectories``."""
        found = []
        for check, own in enumerate(losses):
            found.append(judge(own, self.expected(name, check), lambda model, at=check: self._again(name, at, model)))
        if with_dropout is not None and all(one.agrees for one in found):
            masked = judge_dropout(with_dropout, self.masked(name))
            found += [] if masked.agrees else [masked]
        return next((one for one in found if not one.agrees), max(found, key=lambda one: one.worst))

    def _again(self, name: str, check: int, model: int) -> Array:
        case, _ = checks(self.case)[check]
        exact, rules, parameters = self.expected(name, check).losses, PEERS[name].rules, self.data.parameters
        if case.models is not None:
            exact, parameters = exact[:, model], model_of(parameters, model)
        return tolerance(case, self.data, parameters, rules, exact, SECOND_RUNS)
