"""What CuPy needs of this machine: the driver, asked without CuPy; the wheel that suits it; and whether CuPy loads."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import sys

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# The CUDA major version that a wheel is built for, newest first; a driver runs those of its own version and older ones.
WHEELS = {13: "cupy-cuda13x", 12: "cupy-cuda12x"}
OLDEST = min(WHEELS)


def cuda_version() -> tuple[int, int] | None:
    """The newest CUDA version that the driver runs, (major, minor); None without a driver."""
    try:
        library = ctypes.CDLL(LIBRARY)
        found = ctypes.c_int()
        # needs no cuInit, and wakes no card
        status = library.cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return None
    return (found.value // 1000, found.value % 1000 // 10) if status == 0 and found.value else None


def wheel_for(version: tuple[int, int] | None) -> str | None:
    """The wheel for a driver: None for one that is too old. Without a driver that which most drivers run."""
    if version is None:
        return WHEELS[OLDEST]
    return next((name for major, name in WHEELS.items() if version[0] >= major), None)


def installed_wheel() -> str | None:
    """The wheel that is installed, of those that are known."""
    for name in WHEELS.values():
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return name
    return None


def refusal() -> str | None:
    """What CuPy says when it is loaded and asked for a card; None if it has one. The first time this takes a second."""
    try:
        from fusemlp_kernels.cupy import device
    except ImportError as error:
        return str(error).splitlines()[0]
    return device.why_not()


def reason() -> str | None:
    """Why the CuPy backend cannot work here, and how to get it, in one sentence; None where nothing is missing."""
    version = cuda_version()
    wheel = wheel_for(version)
    installed = importlib.util.find_spec("cupy") is not None
    if version is None:
        install = "" if installed else f" and CuPy with: pip install 'fusemlp[{wheel}]'"
        missing = "no NVIDIA driver" if installed else "neither an NVIDIA driver nor CuPy"
        return (
            f"this machine has {missing} ({LIBRARY} cannot be loaded); install the driver of an NVIDIA card{install}, "
            "or use backend='numpy'"
        )
    has = f"the driver runs CUDA {version[0]}.{version[1]}"
    if wheel is None:
        return f"{has}, and CuPy needs {OLDEST}.0 or newer: update the driver, or use backend='numpy'"
    if not installed:
        return f"cupy cannot be imported; {has}: get it with: pip install 'fusemlp[{wheel}]'"
    present = installed_wheel()
    if present is not None and version[0] < next(major for major, name in WHEELS.items() if name == present):
        return f"{has}, which is too old for {present}: pip uninstall {present}, then pip install 'fusemlp[{wheel}]'"
    said = refusal()
    if said is not None:
        return (
            f"{has}, but CuPy says: {said}; what it needs of CUDA comes with: pip install 'fusemlp[{wheel}]', or use "
            "backend='numpy'"
        )
    return None
