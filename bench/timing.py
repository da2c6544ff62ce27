"""How long a call takes on a backend's device, and the two ceilings of that device: a large copy, a large product.

On the host a call has ended when it returns, and the clock is the host's. On a GPU the time is taken by events on the
device, around a graph of several runs, so that what the host needs to start a kernel is not in it.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.measure import spread
from bench.vendor import Run, Vendor

# A copy of what no cache holds, on the host and on a card; and the side of a square product that keeps all units busy.
LARGE_BYTES = {"cpu": 1 << 28, "gpu": 1 << 30}
LARGE_SIDE = {"cpu": 2048, "gpu": 8192}
# What is overwritten between two calls, so that the next finds nothing of its own in the last cache.
FLUSHED_BYTES = {"cpu": 1 << 27, "gpu": 1 << 28}


class HostClock:
    """The host's clock, less what reading it takes."""

    name = "host clock"

    def __init__(self) -> None:
        self._tick = spread(np.diff([time.perf_counter() for _ in range(1001)])).p50

    def seconds(self, run: Run, times: int) -> float:
        """Of one run, the mean of so many in a row."""
        began = time.perf_counter()
        for _ in range(times):
            run()
        return max(time.perf_counter() - began - self._tick, 1e-9) / times

    def once(self, run: Run) -> float:
        """Of a single run."""
        return self.seconds(run, 1)


class EventClock:
    """Events on the device; for "triton" torch's, for "cupy" CuPy's."""

    name = "events on the device"

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._graphs: dict[tuple[int, int], tuple[Run, Run]] = {}
        self._event: Callable[[], Any]
        self._elapsed: Callable[[Any, Any], float]
        if backend.traits.name == "triton":
            import torch

            self._event = lambda: torch.cuda.Event(enable_timing=True)
            self._elapsed = lambda start, end: start.elapsed_time(end)
        else:
            import cupy

            self._event, self._elapsed = cupy.cuda.Event, cupy.cuda.get_elapsed_time

    def seconds(self, run: Run, times: int) -> float:
        """Of one run, the mean of a graph of so many; the graph is kept, with the call that it was made from."""
        key = (id(run), times)
        if key not in self._graphs:
            run()
            self._backend.synchronize()
            self._graphs[key] = (run, self._backend.capture(run, times))
        return self.once(self._graphs[key][1]) / times

    def once(self, run: Run) -> float:
        """Of a single run. What was started before keeps the device busy while the host starts the run."""
        start, end = self._event(), self._event()
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * self._elapsed(start, end)


def clock_of(backend: Any) -> HostClock | EventClock:
    """The clock for calls of a backend."""
    return HostClock() if backend.device == "cpu" else EventClock(backend)


def kind_of(backend: Any) -> str:
    """ "cpu" or "gpu"."""
    return "cpu" if backend.device == "cpu" else "gpu"


@dataclass(frozen=True)
class Ceilings:
    """The most that was seen in this run: floating-point operations and bytes (read and written) a second.

    ``bytes`` is that of a copy which no cache holds, ``near_bytes`` that of a copy of ``near_size`` bytes, which is
    what a step touches: where a cache holds that, it is the higher of the two, and the one that bounds a step.
    """

    flops: float
    bytes: float
    near_bytes: float
    near_size: int

    @property
    def fastest_bytes(self) -> float:
        """The higher of the two rates."""
        return max(self.bytes, self.near_bytes)

    def floor(self, flops: float, traffic: float) -> tuple[float, float]:
        """Seconds that the operations take at least, and seconds that the traffic takes at least."""
        return flops / self.flops, traffic / self.fastest_bytes


def measure_ceilings(
    vendor: Vendor, near_size: int, *, rounds: int = 7, side: int | None = None, size: int | None = None
) -> Ceilings:
    """The ceilings of a backend's device, by the vendor's product and copy; the best of ``rounds`` rounds each."""
    backend, kind = vendor.backend, kind_of(vendor.backend)
    clock = clock_of(backend)
    side, size = side or LARGE_SIDE[kind], size or LARGE_BYTES[kind]
    a, b, c = (vendor.matrix(side, side, seed=seed) for seed in range(3))
    product = vendor.product(a, b, c)
    flops = 2.0 * side**3 / _best(lambda: clock.once(product), rounds)
    near = max(1 << 12, near_size)
    return Ceilings(flops, _copy_rate(vendor, size, rounds), _copy_rate(vendor, near, rounds), near)


def _best(seconds: Callable[[], float], rounds: int) -> float:
    return min(seconds() for _ in range(rounds + 1))


def _copy_rate(vendor: Vendor, size: int, rounds: int) -> float:
    """Bytes read and written a second by a copy in which ``size`` bytes are touched, by one thread or by all."""
    half = max(1, size // 8)
    source, destination = vendor.vector(half, fill=1.0), vendor.vector(half, fill=0.0)
    touched = 2 * half * source.itemsize
    clock, times = clock_of(vendor.backend), max(1, min(1000, (1 << 24) // touched))

    def copy() -> None:
        vendor.copy(destination, source)

    rate = touched / _best(lambda: clock.seconds(copy, times), rounds)
    workers = cores()
    if kind_of(vendor.backend) == "gpu" or workers == 1 or touched < 1 << 20:
        return rate
    edges = np.linspace(0, half, workers + 1).astype(int)
    with ThreadPoolExecutor(workers) as pool:
        # each thread copies its part several times, so that starting it does not count
        def part(edge: tuple[int, int]) -> None:
            for _ in range(times):
                vendor.copy(destination[edge[0] : edge[1]], source[edge[0] : edge[1]])

        def together() -> None:
            list(pool.map(part, itertools.pairwise(edges)))

        return max(rate, times * touched / _best(lambda: clock.seconds(together, 1), rounds))


def cores() -> int:
    """The cores that this process may use, no more than OMP_NUM_THREADS allows."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    allowed = os.environ.get("OMP_NUM_THREADS", "")
    return max(1, min(found, int(allowed))) if allowed.isdecimal() else found


def flusher(vendor: Vendor) -> Run:
    """A call that fills the last cache with something else."""
    size = FLUSHED_BYTES[kind_of(vendor.backend)] // 8
    first, second = vendor.vector(size, fill=1.0), vendor.vector(size, fill=0.0)
    return lambda: vendor.copy(second, first)
