"""Time the contenders in turn, and summarise the times.

On a shared machine the speed of the cores drifts within seconds. So all contenders run once in each round, in a
rotating order, and a ratio compares two turns of the same round. Reports give the median of the ratios, with the 20th
and 80th percentiles.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from bench.busy import spinning
from bench.cases import Array, Case
from bench.peers import PEERS, reference_of, unsuited
from bench.verification import Judge, Verdict
from bench.worker import Loaded, Worker, WorkerError

# After its last product a thread of OpenBLAS spins for 100 ms before it sleeps; PyTorch's and XLA's for under 5 ms
# (read from /proc/PID/task/*/schedstat). OMP_WAIT_POLICY does not affect OpenBLAS's own threads, so each contender
# waits until the one before it is asleep.
PAUSE_SECONDS = 0.15
# The length of a turn. The set-up of a ``fit`` takes a few milliseconds, about one per cent of it.
TURN_SECONDS = 0.3
# Models of a fleet are set up one by one, so their turns are longer, at most by this factor.
MOST_TURNS = 10
# A case ends after its rounds, or after this many seconds once it has the minimum of rounds.
CASE_SECONDS, FEWEST_ROUNDS = 60.0, 5
# The largest relative difference of a door's two losses after the same updates.
AGREEMENT = 1e-3
TIMED, REFUSED, FAILED, UNSUITED, ABSENT = "timed", "refused", "failed", "unsuited", "absent"


@dataclass(frozen=True)
class Spread:
    """Percentiles of repeated measurements."""

    p20: float
    p50: float
    p80: float


def spread(values: Sequence[float] | Array) -> Spread:
    """Return the 20th, 50th and 80th percentile."""
    return Spread(*(float(p) for p in np.percentile(values, [20, 50, 80])))


@dataclass(frozen=True)
class Result:
    """The result of a contender on a case: ``status``, and the reason unless it was timed.

    ``seconds``: a model's step, one figure a round; ``epochs``: the length of a turn. ``loaded``: the first epoch,
    compilation included.
    """

    case: Case
    peer: str
    status: str
    reason: str = ""
    seconds: tuple[float, ...] = ()
    epochs: int = 0
    loaded: Loaded | None = None
    verdict: Verdict | None = None

    @property
    def microseconds(self) -> Spread:
        """The time of a model's step."""
        return spread([1e6 * s for s in self.seconds])

    def ratios(self, reference: Result) -> Spread:
        """Return the ratio of the step's time to the reference's, round by round."""
        return spread([mine / its for mine, its in zip(self.seconds, reference.seconds, strict=True)])


def measure(
    case: Case,
    workers: Mapping[str, Worker],
    *,
    repeats: int,
    progress: Callable[[str], None],
    pause: float = PAUSE_SECONDS,
    turn_seconds: float = TURN_SECONDS,
    busy: int = 0,
) -> list[Result]:
    """Run ``repeats`` rounds with a turn of every contender; return the results in the order of ``workers``.

    ``busy``: processes that spin during each turn.

    A contender with losses other than the oracle's is refused, and one that raises has failed: neither is timed.
    """
    results: dict[str, Result] = {}
    judge: Judge | None = None
    for name, worker in workers.items():
        why = unsuited(name, case)
        if why is not None:
            results[name] = Result(case, name, UNSUITED, why)
            continue
        progress(f"{case.name}: comparing {PEERS[name].label} with the oracle")
        judge = judge or Judge(case)
        results[name] = _admitted(case, name, worker, judge, turn_seconds * min(case.models or 1, MOST_TURNS), busy)
        if results[name].status != TIMED:
            progress(f"{case.name}: {PEERS[name].label} is not timed: {results[name].reason}")
    seconds: dict[str, list[float]] = {name: [] for name, result in results.items() if result.status == TIMED}
    began = time.monotonic()
    for turn in range(repeats):
        if turn >= FEWEST_ROUNDS and time.monotonic() - began > CASE_SECONDS:
            progress(f"{case.name}: {turn} rounds have taken long enough")
            break
        names = list(seconds)
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            time.sleep(pause)
            try:
                with spinning(busy):
                    seconds[name].append(workers[name].ask("turn", results[name].epochs))
            except WorkerError as error:
                del seconds[name]
                results[name] = replace(results[name], status=FAILED, reason=error.brief)
        progress(f"{case.name}: round {turn + 1} of {repeats}")
    return [replace(result, seconds=tuple(seconds.get(name, ()))) for name, result in results.items()]


def _admitted(case: Case, name: str, worker: Worker, judge: Judge, turn_seconds: float, busy: int) -> Result:
    """Load a contender with a case and compare it with the oracle."""
    try:
        loaded = worker.ask("load", case)
        verdict = judge.verdict(name, *worker.ask("trajectories"))
        if not verdict.agrees:
            return Result(case, name, REFUSED, verdict.reason or "", loaded=loaded, verdict=verdict)
        with spinning(busy):
            epochs = worker.ask("epochs_in", turn_seconds)
    except WorkerError as error:
        return Result(case, name, FAILED, error.brief)
    return Result(case, name, TIMED, epochs=epochs, loaded=loaded, verdict=verdict)


@contextlib.contextmanager
def started(
    names: Sequence[str], cases: Sequence[Case], settings: Mapping[str, str] = MappingProxyType({})
) -> Iterator[dict[str, Worker]]:
    """Yield a worker by name for each contender that can run a case, the references first.

    ``settings``: variables of their processes.
    """
    references = {reference_of(case) for case in cases}
    wanted = [name for name in names if any(unsuited(name, case) is None for case in cases)]
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(Worker(name, settings))
            for name in sorted(wanted, key=lambda name: name not in references)
        }
