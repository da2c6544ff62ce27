"""Time calls on a backend's device, and measure the device's two ceilings: a large copy, a large product.

On the host a call has ended when it returns, and the host's clock times it. On a GPU events on the device time a graph
of several runs, so the host's launch overhead is excluded.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.measure import spread
from bench.vendor import Run, Vendor
from fusemlp_kernels.numpy.launches import threads

# Bytes of a copy that no cache holds, on the host and on a card; the side of a square product that fills all units.
LARGE_BYTES = {"cpu": 1 << 28, "gpu": 1 << 30}
LARGE_SIDE = {"cpu": 2048, "gpu": 8192}
# The ceilings are the best of this many rounds, after one that warms up.
ROUNDS = 7
# Bytes that are overwritten between two cold calls, to empty the last cache.
FLUSHED_BYTES = {"cpu": 1 << 27, "gpu": 1 << 28}


class HostClock:
    """The host's clock, without the time of its own reading."""

    name = "host clock"

    def __init__(self) -> None:
        self._tick = spread(np.diff([time.perf_counter() for _ in range(1001)])).p50

    def seconds(self, run: Run, times: int) -> float:
        """Return the mean time of one run among ``times`` in a row."""
        began = time.perf_counter()
        for _ in range(times):
            run()
        return max(time.perf_counter() - began - self._tick, 1e-9) / times

    def once(self, run: Run) -> float:
        """Return the time of a single run."""
        return self.seconds(run, 1)


class EventClock:
    """Events on the device: torch's for "triton", CuPy's for "cupy"."""

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
        """Return the mean time of one run in a graph of ``times``; cache the graph together with its call."""
        key = (id(run), times)
        if key not in self._graphs:
            run()
            self._backend.synchronize()
            self._graphs[key] = (run, self._backend.capture(run, times))
        return self.once(self._graphs[key][1]) / times

    def once(self, run: Run) -> float:
        """Return the time of a single run. Earlier work keeps the device busy while the host launches the run."""
        start, end = self._event(), self._event()
        start.record()
        run()
        end.record()
        end.synchronize()
        return 1e-3 * self._elapsed(start, end)


def clock_of(backend: Any) -> HostClock | EventClock:
    """Return the clock for calls of a backend."""
    return HostClock() if backend.device == "cpu" else EventClock(backend)


def kind_of(backend: Any) -> str:
    """ "cpu" or "gpu"."""
    return "cpu" if backend.device == "cpu" else "gpu"


@dataclass(frozen=True)
class Ceilings:
    """The measured maximum of floating-point operations and of bytes (read and written) a second.

    ``bytes`` is for a copy that no cache holds, ``near_bytes`` for a copy of ``near_size`` bytes, the size of a step.
    If a cache holds that size, ``near_bytes`` is the higher one and bounds the step.
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
        """Return the minimum of seconds for the operations, and for the traffic."""
        return flops / self.flops, traffic / self.fastest_bytes


def measure_ceilings(
    vendor: Vendor, near_size: int, *, rounds: int = ROUNDS, side: int | None = None, size: int | None = None
) -> Ceilings:
    """Measure the ceilings of a backend's device with the vendor's product and copy; the best of ``rounds`` rounds."""
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
    """Return the bytes a second of a copy that touches ``size`` bytes, by one thread or by all."""
    half = max(1, size // 8)
    source, destination = vendor.vector(half, fill=1.0), vendor.vector(half, fill=0.0)
    touched = 2 * half * source.itemsize
    clock, times = clock_of(vendor.backend), max(1, min(1000, (1 << 24) // touched))

    def copy() -> None:
        vendor.copy(destination, source)

    rate = touched / _best(lambda: clock.seconds(copy, times), rounds)
    workers = threads()
    if kind_of(vendor.backend) == "gpu" or workers == 1 or touched < 1 << 20:
        return rate
    edges = np.linspace(0, half, workers + 1).astype(int)
    with ThreadPoolExecutor(workers) as pool:
        # Each thread copies its part several times, so that its start does not count.
        def part(edge: tuple[int, int]) -> None:
            for _ in range(times):
                vendor.copy(destination[edge[0] : edge[1]], source[edge[0] : edge[1]])

        def together() -> None:
            list(pool.map(part, itertools.pairwise(edges)))

        return max(rate, times * touched / _best(lambda: clock.seconds(together, 1), rounds))


def flusher(vendor: Vendor) -> Run:
    """Return a call that fills the last cache with other data."""
    size = FLUSHED_BYTES[kind_of(vendor.backend)] // 8
    first, second = vendor.vector(size, fill=1.0), vendor.vector(size, fill=0.0)
    return lambda: vendor.copy(second, first)
