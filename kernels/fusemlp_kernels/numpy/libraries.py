"""Choose the library of matrix products on the CPU: SciPy's BLAS, or Intel's MKL if it is installed.

Every product of a small network is quick in either. From ``LARGE`` multiplications on MKL is ahead on Intel's
processors (README, "Speed"), so there it takes the large products, and SciPy's BLAS those that it computes on one
thread. Both would otherwise keep a pool of threads, which go on spinning for a while after a product and hold up the
threads of the other.

MKL comes with ``pip install 'fusemlp[mkl]'`` and is used on Intel's processors where it is found. The environment
variable ``FUSEMLP_BLAS`` (auto, scipy, mkl) says otherwise; it is read once, when the first backend is made.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

from fusemlp_kernels.errors import BackendUnavailableError, unknown_name
from fusemlp_kernels.numpy.cores import one_thread

_log = logging.getLogger("fusemlp.kernels")

VARIABLE = "FUSEMLP_BLAS"
CHOICES = ("auto", "scipy", "mkl")
# Multiplications (m * n * k) up to which OpenBLAS stays on one thread: GEMM_MULTITHREAD_THRESHOLD (4) * 65536.
LARGE = 262_144

_PATTERN, _FOLDER = ("mkl_rt*.dll", "Library/bin") if sys.platform == "win32" else ("libmkl_rt.so*", "lib")
# mkl_service.h and mkl_types.h
_LP64 = 0
_STRICT = 0x10000


@functools.cache
def mkl() -> ctypes.CDLL | None:
    """MKL, loaded and set up; None where SciPy's BLAS does all the work.

    MKL is asked for results that depend neither on the run nor on how arrays are aligned ("strict conditional
    numerical reproducibility", oneMKL developer guide), and for as many threads as it would take at most.

    Raises BackendUnavailableError if ``FUSEMLP_BLAS`` asks for an MKL that is not there, ArgumentError if it says
    something else.
    """
    choice = os.environ.get(VARIABLE) or "auto"
    if choice not in CHOICES:
        raise unknown_name(VARIABLE, choice, CHOICES)
    if choice == "scipy" or (choice == "auto" and not _is_intel()):
        return None
    path = next(_found(), None)
    if path is None:
        if choice == "auto":
            return None
        raise BackendUnavailableError(
            f"{VARIABLE}: it asks for 'mkl', which is not installed; pip install 'fusemlp[mkl]', or set it to 'auto'"
        )
    library = ctypes.CDLL(str(path))
    layer = library.MKL_Set_Interface_Layer(_LP64)
    if layer != _LP64:
        reason = f"{path} was loaded with 64-bit integers (MKL_INTERFACE_LAYER), and fusemlp passes 32-bit ones"
        if choice == "auto":
            _log.warning("SciPy's BLAS multiplies: %s", reason)
            return None
        raise BackendUnavailableError(f"{VARIABLE}: {reason}; unset MKL_INTERFACE_LAYER, or use 'scipy'")
    library.MKL_CBWR_Set(library.MKL_CBWR_Get_Auto_Branch() | _STRICT)
    # a number of threads that changed with the load would change the order of sums
    library.MKL_Set_Num_Threads(library.MKL_Get_Max_Threads())
    library.MKL_Set_Dynamic(0)
    return library


@contextmanager
def one_thread_here() -> Iterator[None]:
    """Give launches from the calling thread one thread, and MKL's products for them too.

    The number that is set for a process (``MKL_Set_Num_Threads``, ``threadpool_limits``) is that of the thread which
    sets it: others go on with a team each, whose idle members spin.
    """
    library = mkl()
    with one_thread():
        if library is None:
            yield
            return
        before = library.MKL_Set_Num_Threads_Local(1)
        try:
            yield
        finally:
            library.MKL_Set_Num_Threads_Local(before)


def routine_address(name: str) -> int | None:
    """Return the address of MKL's ``name`` ("sgemm", ...), with Fortran's calling convention; None without MKL."""
    library = mkl()
    return None if library is None else ctypes.cast(getattr(library, f"{name}_"), ctypes.c_void_p).value


def _is_intel() -> bool:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if sys.platform == "linux":
        try:
            return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
        except OSError:
            return False
    return "intel" in platform.processor().lower()


def _found() -> Iterator[Path]:
    """Yield the places of the package ``mkl``: pip's, then conda's."""
    try:
        listed = files("mkl") or []
    except PackageNotFoundError:
        listed = []
    for file in listed:
        if file.match(_PATTERN):
            yield Path(str(file.locate())).resolve()
    yield from sorted(Path(sys.prefix, _FOLDER).glob(_PATTERN))
