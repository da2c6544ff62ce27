"""Giving the peers their turns, and the statistics of what they took.

On a shared machine the speed of the cores drifts within seconds. So peers take turns within a round, the first one
changing from round to round; a ratio compares two turns of the same round; and of the ratios the median is reported,
with the 20th and 80th percentiles.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from bench.cases import Array, Case
from bench.peers import REFERENCE
from bench.worker import Worker

# After its last product a thread of OpenBLAS spins for 100 ms before it sleeps; PyTorch's and XLA's for under 5 ms
# (read from /proc/PID/task/*/schedstat). OMP_WAIT_POLICY does not reach OpenBLAS's own threads, so each peer waits
# until the one before it is asleep.
PAUSE_SECONDS = 0.15
# How far the losses may differ after an epoch of the same updates, relative to what the epoch gained. Rounding alone
# comes to less than 1e-6; a wrong learning rate, a missing bias or another batch come to more than 1e-3.
AGREEMENT = 1e-3


class DisagreementError(RuntimeError):
    """Peers that should have made the same updates did not reach the same loss."""


@dataclass(frozen=True)
class Spread:
    """Percentiles of repeated measurements."""

    p20: float
    p50: float
    p80: float


def spread(values: Sequence[float] | Array) -> Spread:
    """The 20th, 50th and 80th percentile."""
    return Spread(*(float(p) for p in np.percentile(values, [20, 50, 80])))


@dataclass(frozen=True)
class Result:
    """What a peer did on a case.

    ``seconds``: a step's, one figure a round. ``loss_before`` and ``loss_after`` belong to the checked epoch.
    """

    case: Case
    peer: str
    seconds: tuple[float, ...]
    loss_before: float
    loss_after: float

    @property
    def microseconds(self) -> Spread:
        """A step's."""
        return spread([1e6 * s for s in self.seconds])

    def ratios(self, reference: Result) -> Spread:
        """How many times as long as the reference a step takes, round by round."""
        return spread([mine / its for mine, its in zip(self.seconds, reference.seconds, strict=True)])


def check_agreement(results: Sequence[Result]) -> float:
    """The largest difference between losses after the checked epoch, relative to what the epoch gained.

    Raises DisagreementError if it is more than ``AGREEMENT``, or if the loss did not fall.
    """
    before, after = results[0].loss_before, [r.loss_after for r in results]
    gain = before - statistics.median(after)
    difference = (max(after) - min(after)) / gain if gain > 0 else float("nan")
    if not difference <= AGREEMENT:
        losses = ", ".join(f"{r.peer} {r.loss_after:.6g}" for r in results)
        raise DisagreementError(
            f"{results[0].case.name}: from a loss of {before:.6g} one epoch of the same updates led to {losses}; "
            f"their difference may be {AGREEMENT:g} of the gain, so the timings would not compare equal work"
        )
    return difference


def measure(
    case: Case,
    workers: dict[str, Worker],
    *,
    repeats: int,
    progress: Callable[[str], None],
    pause: float = PAUSE_SECONDS,
) -> list[Result]:
    """``repeats`` rounds of a case, each with a turn of every peer; the results in the order of ``workers``.

    Raises DisagreementError before anything is timed if the peers do not do equal work.
    """
    losses = {}
    for name, worker in workers.items():
        worker.ask("load", case)
        losses[name] = worker.ask("check")
    check_agreement([Result(case, name, (), *losses[name]) for name in workers])
    seconds: dict[str, list[float]] = {name: [] for name in workers}
    names = list(workers)
    for turn in range(repeats):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
            seconds[name].append(workers[name].ask("turn", case.epochs))
        progress(f"{case.name}: round {turn + 1} of {repeats}")
    return [Result(case, name, tuple(seconds[name]), *losses[name]) for name in names]


@contextlib.contextmanager
def started(names: Sequence[str]) -> Iterator[dict[str, Worker]]:
    """A worker for each peer, the reference first."""
    ordered = sorted(names, key=lambda name: name != REFERENCE)
    with contextlib.ExitStack() as stack:
        yield {name: stack.enter_context(Worker(name)) for name in ordered}
