"""One process for each peer, so that thread pools and settings of one library cannot affect another.

A worker waits on a pipe for (method, arguments) and replies with (True, result) or (False, traceback).
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import multiprocessing
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import MappingProxyType
from typing import Any

from bench import processor
from bench.cases import Array, Case, make_data
from bench.peers import PEERS, import_module, prepare, version_of
from bench.verification import trajectories

# Settings that change OpenBLAS from its default; NumPy's and SciPy's builds both read them.
UNSET_PREFIX = "OPENBLAS_"


@dataclass(frozen=True)
class Loaded:
    """``seconds`` from the data to the end of the first epoch; ``chosen``: the backend and plan of this engine."""

    seconds: float
    chosen: str


class WorkerError(RuntimeError):
    """An error inside a worker; the message is its traceback, ``brief`` the last line."""

    def __init__(self, message: str, brief: str) -> None:
        super().__init__(message)
        self.brief = brief


class _Served:
    """The worker's side, in its own process."""

    def __init__(self, peer: str) -> None:
        self.peer = peer

    def load(self, case: Case) -> Loaded:
        """Make a case's data and the contender's trainer, and train an epoch; most libraries compile in it."""
        self.case, self.data = case, make_data(case)
        import_module(self.peer)
        began = time.perf_counter()
        self.trainer = prepare(self.peer, self.case, self.data)
        self.trainer.train(1)
        return Loaded(time.perf_counter() - began, getattr(self.trainer, "chosen", ""))

    def trajectories(self) -> tuple[list[Array], Array | None]:
        """See ``verification.trajectories``."""
        return trajectories(self.peer, self.case, self.data, self.trainer)

    def epochs_in(self, seconds: float) -> int:
        """Return the number of epochs that fill a turn of about ``seconds``."""
        began = time.perf_counter()
        self.trainer.train(1)
        return max(1, round(seconds / (time.perf_counter() - began)))

    def turn(self, epochs: int) -> float:
        """Return the seconds of a model's step, over ``epochs`` epochs from the initial parameters.

        An epoch before them is not timed; a turn of one epoch skips it.
        """
        self.trainer.reset()
        if epochs > 1:
            self.trainer.train(1)
            self.trainer.reset()
        gc.collect()
        began = time.perf_counter()
        self.trainer.train(epochs)
        seconds = time.perf_counter() - began
        self.trainer.reset()
        return seconds / (epochs * self.case.steps * (self.case.models or 1))

    def environment(self) -> dict[str, Any]:
        """Return the contender's version, and the thread pools (BLAS, OpenMP) in its process, none without
        threadpoolctl."""
        found: list[dict[str, Any]] = []
        if importlib.util.find_spec("threadpoolctl") is not None:
            from threadpoolctl import threadpool_info

            found = threadpool_info()
        pools = [
            {key: pool.get(key) for key in ("user_api", "internal_api", "version", "architecture", "num_threads")}
            for pool in found
        ]
        return {
            "version": version_of(PEERS[self.peer].package),
            "pools": pools,
            "instruction_sets": processor.instruction_sets(),
        }

    def peak(self) -> float:
        """See ``processor.peak``."""
        return processor.peak()


def _serve(connection: Connection, peer: str) -> None:
    served = _Served(peer)
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, getattr(served, method)(*arguments))
        except Exception as error:
            brief = f"{type(error).__name__}: {(str(error) or '-').splitlines()[0]}"
            answer = (False, (brief, traceback.format_exc()))
        connection.send(answer)


class Worker:
    """The parent's end of a worker; use as a context manager. ``settings``: variables of its process."""

    def __init__(self, peer: str, settings: Mapping[str, str] = MappingProxyType({})) -> None:
        self.peer, self._settings = peer, settings

    def __enter__(self) -> Worker:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, self.peer), name=f"bench {self.peer}")
        with _without_openblas_settings(), _with_settings({**PEERS[self.peer].environment, **self._settings}):
            self._process.start()
        theirs.close()
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()
        self._process.join(timeout=10)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()

    @property
    def alive(self) -> bool:
        """True if its process is running."""
        return self._process.is_alive()

    def ask(self, method: str, *arguments: Any) -> Any:
        """Return the result of a worker's method; raises WorkerError with the worker's traceback."""
        try:
            self._connection.send((method, arguments))
            good, result = self._connection.recv()
        except (EOFError, OSError):
            message = f"the process of {self.peer} ended during {method}"
            raise WorkerError(message, message) from None
        if not good:
            raise WorkerError(f"{self.peer} failed to {method}:\n{result[1]}", result[0])
        return result


def openblas_settings() -> dict[str, str]:
    """Return the OPENBLAS_* variables of this process; workers do not inherit them."""
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


@contextlib.contextmanager
def _with_settings(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
