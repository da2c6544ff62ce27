"""Count the threads that a launch on the CPU may use.

The environment variable ``FUSEMLP_NUM_THREADS`` sets the number. Without it, the least of these counts:

- the cores that the process may run on (CPU affinity);
- the CPU quota of its control group, as containers have one, rounded to a whole number and at least 1. With 1.5 cores
  a second thread adds half a core's work. With 1.2 it would add less than two threads lose by waiting for each other,
  and the system stops both whenever the quota of a period is spent;
- ``OMP_NUM_THREADS``, which joblib, Dask and torchrun set for their workers;
- the threads that OpenBLAS has now: ``OPENBLAS_NUM_THREADS`` and ``threadpoolctl.threadpool_limits`` set them. NumPy
  and SciPy built with another BLAS set no limit here.

OpenBLAS is asked at each launch. All else is read once, and again in a forked process.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fusemlp_kernels.errors import ArgumentError

VARIABLE = "FUSEMLP_NUM_THREADS"


class _Caller(threading.local):
    alone = False


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


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fixed.cache_clear)
    os.register_at_fork(after_in_child=_openblas.cache_clear)
