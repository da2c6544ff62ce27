"""The conditions of CuPy on this machine: a driver, which is asked without CuPy, its wheel, and that CuPy loads."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.metadata
import importlib.util
import sys

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# The CUDA major version of each wheel, newest first; a driver runs those of its own version and older ones.
WHEELS = {13: "cupy-cuda13x", 12: "cupy-cuda12x"}
OLDEST = min(WHEELS)


def cuda_version() -> tuple[int, int] | None:
    """Return the newest CUDA version that the driver runs, (major, minor); None without a driver."""
    try:
        library = ctypes.CDLL(LIBRARY)
        found = ctypes.c_int()
        # without cuInit, so that no card wakes up
        status = library.cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return None
    return (found.value // 1000, found.value % 1000 // 10) if status == 0 and found.value else None


def wheel_for(version: tuple[int, int] | None) -> str | None:
    """Return the wheel for a driver, None if it is too old; without a driver, the wheel that most drivers run."""
    if version is None:
        return WHEELS[OLDEST]
    return next((name for major, name in WHEELS.items() if version[0] >= major), None)


def installed_wheel() -> int | None:
    """Return the CUDA major version of the installed wheel, if it is one of ``WHEELS``."""
    for major, name in WHEELS.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            return major
    return None


def refusal() -> str | None:
    """Return why CuPy does not load or finds no card, in its own words; None if it has one. Loading takes a second."""
    try:
        from fusemlp_kernels.cupy import device
    except ImportError as error:
        return str(error).splitlines()[0]
    return device.why_not()


def reason() -> str | None:
    """Return in one sentence why the CuPy backend cannot work here, and how to get it; None if nothing is missing."""
    version = cuda_version()
    wheel = wheel_for(version)
    installed = importlib.util.find_spec("cupy") is not None
    if version is None:
        install = "" if installed else f' and CuPy with: pip install "fusemlp[{wheel}]"'
        missing = "no NVIDIA driver" if installed else "neither an NVIDIA driver nor CuPy"
        return (
            f"this machine has {missing} ({LIBRARY} cannot be loaded); install the driver of an NVIDIA card{install}, "
            "or use backend='numpy'"
        )
    has = f"the driver runs CUDA {version[0]}.{version[1]}"
    if wheel is None:
        return f"{has}, and CuPy needs {OLDEST}.0 or newer: update the driver, or use backend='numpy'"
    if not installed:
        return f'cupy cannot be imported; {has}: get it with: pip install "fusemlp[{wheel}]"'
    built_for = installed_wheel()
    if built_for is not None and version[0] < built_for:
        present = WHEELS[built_for]
        return f'{has}, which is too old for {present}: pip uninstall {present}, then pip install "fusemlp[{wheel}]"'
    said = refusal()
    if said is not None:
        return (
            f'{has}, but CuPy says: {said}; what it needs of CUDA comes with: pip install "fusemlp[{wheel}]", or use '
            "backend='numpy'"
        )
    return None
