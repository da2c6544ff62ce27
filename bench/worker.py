"""A process of its own for each peer, so that thread pools and settings of one library cannot reach another.

A worker waits on a pipe for (method, arguments) and answers with (True, result) or (False, traceback).
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from bench.cases import Case, make_data, mean_loss
from bench.peers import PEERS, prepare

# Settings that make OpenBLAS something else than what people have; NumPy's and SciPy's builds both heed them.
UNSET_PREFIX = "OPENBLAS_"


class WorkerError(RuntimeError):
    """Something was raised inside a worker; the message is its traceback."""


class _Served:
    """What runs in the worker's process."""

    def __init__(self, peer: str) -> None:
        self.peer = peer

    def load(self, case: Case) -> None:
        """Make a case's data and the peer's trainer."""
        self.case, self.data = case, make_data(case)
        self.trainer = prepare(self.peer, case, self.data)

    def check(self) -> tuple[float, float]:
        """The loss before and after one epoch in the order that all peers are given."""
        before = mean_loss(self.data, self.trainer.parameters())
        self.trainer.train_in_order(self.data.order)
        after = mean_loss(self.data, self.trainer.parameters())
        self.trainer.reset()
        return before, after

    def turn(self, epochs: int) -> float:
        """Seconds a step, over ``epochs`` epochs from the initial parameters; one epoch before them is not timed."""
        self.trainer.train(1)
        self.trainer.reset()
        gc.collect()
        began = time.perf_counter()
        self.trainer.train(epochs)
        seconds = time.perf_counter() - began
        self.trainer.reset()
        return seconds / (epochs * self.case.steps)

    def environment(self) -> dict[str, Any]:
        """The peer's version, and the thread pools (BLAS, OpenMP) in its process."""
        from threadpoolctl import threadpool_info

        pools = [
            {key: pool.get(key) for key in ("user_api", "internal_api", "version", "architecture", "num_threads")}
            for pool in threadpool_info()
        ]
        return {"version": _version(PEERS[self.peer].package), "pools": pools}

    def breakdown(self, case: Case, steps: int) -> Any:
        """See ``bench.breakdown``."""
        from bench.breakdown import measure_calls

        return measure_calls(case, make_data(case), steps)


def _version(package: str) -> str:
    if package == "fusemlp":
        import fusemlp

        return fusemlp.__version__
    return importlib.metadata.version({"sklearn": "scikit-learn"}.get(package, package))


def _serve(connection: Connection, peer: str) -> None:
    served = _Served(peer)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(served, method)(*arguments))
        except Exception:
            answer = (False, traceback.format_exc())
        connection.send(answer)


class Worker:
    """The parent's end of a worker; use as a context manager."""

    def __init__(self, peer: str) -> None:
        self.peer = peer

    def __enter__(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.peer), name=f"bench {self.peer}")
        with _without_openblas_settings():
            self._process.start()
        theirs.close()
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    def ask(self, method: str, *arguments: Any) -> Any:
        """The result of a method of the worker. Raises WorkerError with what was raised there."""
        self._connection.send((method, arguments))
        try:
            good, result = self._connection.recv()
        except EOFError:
            raise WorkerError(f"the process of the peer {self.peer} ended while it was asked to {method}") from None
        if not good:
            raise WorkerError(f"the peer {self.peer} failed to {method}:\n{result}")
        return result


def openblas_settings() -> dict[str, str]:
    """The OPENBLAS_* variables of this process, which workers do not inherit."""
    return {name: value for name, value in os.environ.items() if name.startswith(UNSET_PREFIX)}


@contextlib.contextmanager
def _without_openblas_settings() -> Iterator[None]:
    removed = openblas_settings()
    for name in removed:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(removed)
