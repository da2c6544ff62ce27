"""Launches of compiled functions: the threads that one may use, the team that shares its tasks, and the loops.

The environment variable ``FUSEMLP_NUM_THREADS`` sets the number of threads. Without it, the least of these counts:

- the cores that the process may run on (CPU affinity);
- the CPU quota of its control group, as containers have one, rounded to a whole number and at least 1. With 1.5 cores
  a second thread adds half a core's work. With 1.2 it would add less than two threads lose by waiting for each other,
  and the system stops both whenever the quota of a period is spent;
- ``OMP_NUM_THREADS``, which joblib, Dask and torchrun set for their workers;
- the threads that OpenBLAS has now: ``OPENBLAS_NUM_THREADS`` and ``threadpoolctl.threadpool_limits`` set them. NumPy
  and SciPy built with another BLAS set no limit here.

OpenBLAS is asked at each launch. All else is read once, and again in a forked process.

A process has one team. A launch takes it if it is free; otherwise, and in ``one_thread``, it runs on the thread that
asks for it, with the same results. The threads are started when they are first needed, and sleep between launches.
Numba is imported when a compiled function is first needed.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import threading
from collections.abc import Iterator, Set
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp_kernels import philox
from fusemlp_kernels.contract import ACTIVATIONS, DISTRIBUTIONS, LOSSES
from fusemlp_kernels.errors import ArgumentError, MissingLibraryError
from fusemlp_kernels.numpy.compiled.tables import LINE, OPTIONAL, Kind
from fusemlp_kernels.numpy.processor import lacks_tiles
from fusemlp_kernels.philox import FEISTEL_ROUNDS, radix, seed_key
from fusemlp_kernels.pointwise import OPTIMIZERS

_log = logging.getLogger("fusemlp.kernels")
Array = np.ndarray[Any, Any]

VARIABLE = "FUSEMLP_NUM_THREADS"


def aligned(size: int, alignment: int = LINE) -> Array:
    """Return ``size`` bytes of zeros that begin at a multiple of ``alignment``."""
    memory = np.zeros(size + alignment, np.uint8)
    start = -memory.__array_interface__["data"][0] % alignment
    return memory[start : start + size]


def _room(threads: int = 1) -> tuple[Array, int]:
    """Return memory of threads for copies of operands, and its address; 0 where nothing is copied."""
    room = aligned(compiled("products" if lacks_tiles() else "amx").ROOM_BYTES * threads)
    return room, room.ctypes.data if room.size else 0


class _Caller(threading.local):
    alone = False

    @functools.cached_property
    def room(self) -> tuple[Array, int]:
        return _room()


_caller = _Caller()


def threads() -> int:
    """Return how many threads a launch from the calling thread may use now; raises as ``limits`` does."""
    return 1 if _caller.alone else min((*_fixed().values(), *(library.get_num_threads() for library in _openblas())))


@contextmanager
def one_thread() -> Iterator[None]:
    """Give launches from the calling thread one thread each: others run beside them."""
    before, _caller.alone = _caller.alone, True
    try:
        yield
    finally:
        _caller.alone = before


def limits() -> dict[str, int]:
    """Return each limit of this process by name; only ``FUSEMLP_NUM_THREADS`` if it is set.

    Raises ArgumentError if that is not a positive whole number.
    """
    blas = [library.get_num_threads() for library in _openblas()]
    return {**_fixed(), **({"OpenBLAS": min(blas)} if blas else {})}


@functools.cache
def _fixed() -> dict[str, int]:
    asked = os.environ.get(VARIABLE, "").strip()
    if asked:
        if not (asked.isdecimal() and int(asked) > 0):
            raise ArgumentError(
                f"{VARIABLE}: expected a positive whole number of threads, got {asked!r}; unset it to use all cores "
                "that this process may use"
            )
        return {VARIABLE: int(asked)}
    counts = {"CPU affinity": _affinity()}
    quota = _quota(Path("/"))
    if quota is not None:
        counts["CPU quota"] = max(1, int(quota + 0.5))
    # "4,2" has a number for each level of nested teams; OpenMP ignores what is no number
    openmp = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if openmp.isdecimal() and int(openmp) > 0:
        counts["OMP_NUM_THREADS"] = int(openmp)
    return counts


def _affinity() -> int:
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quota(root: Path) -> float | None:
    """Return the least CPU quota of this process's control groups and their parents, in cores; None without one."""
    try:
        groups = (root / "proc/self/cgroup").read_text(errors="replace").splitlines()
    except OSError:
        return None
    quotas: list[float] = []
    for group in groups:
        _, controllers, path = group.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        # a container may see the host's path here, and only its own group under the mount
        for folder in (mount / path.strip("/"), *(mount / path.strip("/")).parents):
            quotas += _quota_of(folder)
            if folder == mount:
                break
    return min(quotas, default=None)


def _quota_of(folder: Path) -> list[float]:
    """Return the quota of a control group of version 2 or 1; nothing if it has none."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = " ".join((folder / name).read_text() for name in names).split()
            return [int(quota) / int(period)] if int(quota) > 0 else []
        except (OSError, ValueError):  # a file that is not there; the word "max"
            continue
    return []


@functools.cache
def _openblas() -> list[Any]:
    """Return the loaded OpenBLAS libraries, NumPy's among them; none where ``FUSEMLP_NUM_THREADS`` decides."""
    if VARIABLE in _fixed():
        return []
    from threadpoolctl import ThreadpoolController

    return list(ThreadpoolController().select(internal_api="openblas").lib_controllers)


@functools.cache
def compiled(module: str) -> Any:
    """A module of ``compiled``, whose import imports numba."""
    try:
        return import_module(f"fusemlp_kernels.numpy.compiled.{module}")
    except ImportError as error:
        raise MissingLibraryError(
            f"backend: training on the numpy backend needs numba, which cannot be imported ({error}); install it again "
            "with pip install --force-reinstall numba"
        ) from error


# A thread looks this often for the next task before it sleeps: 10 to 25 microseconds on processors since 2016.
SPINS = 500


class _Team:
    """Up to ``most`` threads; the one that begins a launch leads it."""

    def __init__(self, most: int) -> None:
        layout = compiled("team")
        self.most = most
        self.free = threading.Lock()
        size = layout.MEMBER + layout.MEMBER_BYTES * most
        self._words = aligned(size, layout.MEMBER_BYTES).view(np.int64)
        rooms, room = _room(most)
        # the threads look at them until the process ends, after the interpreter has released all else
        for array in (self._words, rooms):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(array))
        self._address = self._words.ctypes.data
        self._threads = 1
        for member in range(most):
            at = (layout.MEMBER + layout.MEMBER_BYTES * member) // 8
            self._words[at + layout.LOCK // 8] = layout.new_lock()
            self._words[at + layout.ROOM // 8] = room + rooms.size // most * member
        self._words[layout.SPINS // 8] = SPINS

    def lead(self, members: int, work: int, job: int) -> None:
        """Run a launch with up to ``members`` threads."""
        serve = compiled("team").serve
        while self._threads < members:
            target = functools.partial(serve, self._address, self._threads, 0, 0, 0)
            try:
                threading.Thread(target=target, name=f"fusemlp-{self._threads}", daemon=True).start()
            except RuntimeError as error:
                _log.info("%d threads train in place of %d: %s", self._threads, members, error)
                break
            self._threads += 1
        serve(self._address, 0, work, job, min(members, self._threads))


_team: _Team | None = None
_making = threading.Lock()


def _the_team(members: int) -> _Team:
    """The team of this process, with room for this many."""
    global _team
    with _making:
        if _team is None or _team.most < members:
            _team = _Team(max(members, os.cpu_count() or 1))
        return _team


def _forget() -> None:
    """A forked process has none of the threads, and perhaps a lock that is taken for ever."""
    global _team, _making
    _team, _making = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    for forget in (_forget, _fixed.cache_clear, _openblas.cache_clear):
        os.register_at_fork(after_in_child=forget)


def launch(work: int, job: int, tasks: int) -> None:
    """Run a launch whose phases have up to ``tasks`` tasks: the address of its function, and of what it works on."""
    size = 1 if tasks == 1 else min(tasks, threads())
    if size > 1:
        team = _the_team(size)
        if team.free.acquire(blocking=False):
            try:
                team.lead(size, work, job)
            finally:
                team.free.release()
            return
    compiled("team").alone(work, job, _caller.room[1])


# Names of ``compiled.tables`` and of the printed formulas that a table may do without, as the fields ``OPTIONAL``.
OPTIMIZER_NAMES = tuple(f"RULE_{name.upper()}" for name in OPTIMIZERS)
NAMES = frozenset(
    {
        *({*Kind.__members__, *OPTIONAL, "BY_ITSELF"} - {"CLOCK", "PAUSE"}),
        *(name.upper() for name in (*ACTIVATIONS, *LOSSES, *DISTRIBUTIONS)),
        *OPTIMIZER_NAMES,
    }
)

# Set, one loop for all tables is compiled, once; unset, each kind of table compiles what it uses, in less time.
WHOLE_LOOP = "FUSEMLP_WHOLE_LOOP"
_loading = threading.Lock()
# The loops of this process by the names that they have code for, and the names of single calls that have not run yet.
_loops: dict[tuple[str, frozenset[str]], Any] = {}
_waiting: set[str] = set()


# Rows that NumPy orders before numba compiles the order: a short training does without the 0.4 s that this takes.
_NUMPY_ROWS = 1 << 20
_ordered = 0


def row_order(n: int, seed: int, epoch: int) -> Array:
    """The same order as ``philox.row_order``; compiled, which is faster, once a process orders many rows."""
    global _ordered
    if _ordered < _NUMPY_ROWS:
        # each order costs NumPy as much as some 4,000 rows
        _ordered += n + 4000
        return philox.row_order(n, seed, epoch)
    return compiled_row_order(n, seed, epoch)


def compiled_row_order(n: int, seed: int, epoch: int) -> Array:
    """The order of the rows in an epoch, (n,) int64, by numba."""
    with _loading:
        permute = compiled("random").row_order
    order, a = np.empty(n, np.int64), radix(n)
    low, high = seed_key(seed)
    permute(order, np.empty((FEISTEL_ROUNDS, a), np.int64), np.empty((2, a), np.int64), low, high, epoch)
    return order


def work_for(names: frozenset[str], real: Any, *, alone: bool) -> Any:
    """A function that has code for ``names``: one of this process, or a new one, that all threads share.

    Without ``alone`` a new one is for all the single calls that wait for theirs: those of a step are compiled together.
    """
    with _loading:
        work = _loaded(names, real)
        if work is None:
            if not alone:
                names |= _waiting
                _waiting.clear()
            if os.environ.get(WHOLE_LOOP):
                names = NAMES
            work = compiled("pruning").compiled_work(NAMES - names, real)
            _loops[real.char, names] = work
        return work


def _loaded(names: frozenset[str], real: Any) -> Any:
    found = (work for (char, known), work in tuple(_loops.items()) if char == real.char and names <= known)
    return next(found, None)


class _Later:
    """A function that is chosen when its address is first asked for."""

    def __init__(self, names: frozenset[str], real: Any) -> None:
        self._names, self._real = names, real
        _waiting.update(names)

    @functools.cached_property
    def address(self) -> int:
        address: int = work_for(self._names, self._real, alone=False).address
        return address


def loop_of(names: Set[str], real: Any, *, alone: bool) -> Any:
    """The loop for a table that uses ``names``: chosen now with ``alone``, else where none fits at the first run."""
    known = NAMES & names
    return (work_for(known, real, alone=True) if alone else _loaded(known, real)) or _Later(known, real)
