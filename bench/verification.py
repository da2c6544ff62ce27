"""Whether a contender computes what the others compute: its losses beside the oracle's. If not, it is not timed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from bench.cases import Array, Case, Data, checked_rows, model_of
from bench.oracle import STEPS, Expected, loss_of
from bench.peers import PEERS, Trainer, prepare

# The mean loss under dropout of a contender and of the oracle's runs: so many standard errors apart is not chance.
# Student's t of 12 runs exceeds it once in 40,000.
STANDARD_ERRORS = 7.0


@dataclass(frozen=True)
class Verdict:
    """``worst`` is the largest difference from the oracle over what rounding allows; ``reason`` says why it is refused.

    ``step`` is the first that differs, counted from 1; STEPS + 1 is the loss after the last one.
    """

    worst: float
    step: int | None = None
    reason: str | None = None

    @property
    def agrees(self) -> bool:
        """Whether it may be timed."""
        return self.reason is None


def computed_case(name: str, case: Case) -> Case:
    """The case as the contender computes it: in its own precision where it has only one."""
    return replace(case, precision=PEERS[name].computes_in or case.precision)


def trajectory(trainer: Trainer, case: Case, data: Data) -> Array:
    """A contender's losses, shaped like ``Expected.losses``; it is left at the initial parameters."""
    rows = checked_rows(case, STEPS)
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


def judge(losses: Array, expected: Expected) -> Verdict:
    """Compare a contender's losses with the oracle's."""
    if losses.shape != expected.losses.shape:
        return Verdict(float("inf"), 1, f"returned losses of shape {losses.shape}, not {expected.losses.shape}")
    off = np.abs(losses - expected.losses).reshape(STEPS + 1, -1)
    share = off.max(axis=1) / expected.tolerance
    wrong = np.flatnonzero(~(share <= 1.0))
    worst = float(np.max(share))
    if not len(wrong):
        return Verdict(worst)
    at = int(wrong[0])
    model = int(np.argmax(off[at]))
    got, wanted = losses.reshape(STEPS + 1, -1)[at, model], expected.losses.reshape(STEPS + 1, -1)[at, model]
    where = f"step {at + 1}" if at < STEPS else f"the parameters after step {STEPS}"
    which = "" if losses.ndim == 1 else f" of model {model}"
    reason = (
        f"differs from the oracle first at {where}: a loss{which} of {got:.7g}, not {wanted:.7g} "
        f"(within {expected.tolerance[at]:.1e})"
    )
    return Verdict(worst, at + 1, reason)


def judge_dropout(losses: Array, masked: Array) -> Verdict:
    """Compare the mean loss with dropout on with that of the oracle's runs, whose masks are others.

    Which elements fall is each library's own affair; how much their loss moves the mean is not: a contender without
    dropout, with another rate or without the scaling has another mean.
    """
    mean, centre = float(losses[:STEPS].mean()), float(masked.mean())
    # of one further run beside the mean of the others
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


def verify(
    name: str, case: Case, data: Data, expected: Expected, masked: Array | None, trainer: Trainer | None = None
) -> Verdict:
    """Compare a contender with the oracle: with dropout off, and where the case has it, with it on.

    ``trainer`` is the contender prepared for the case; without it, it is prepared here.
    """
    own = trainer or prepare(name, case, data)
    if masked is None:
        return judge(trajectory(own, case, data), expected)
    plain = replace(case, dropout=0.0)
    verdict = judge(trajectory(prepare(name, plain, data), plain, data), expected)
    if not verdict.agrees:
        return verdict
    with_dropout = judge_dropout(trajectory(own, case, data), masked)
    return verdict if with_dropout.agrees else with_dropout
