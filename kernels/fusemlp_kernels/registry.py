"""The backends, and for each whether it works on this machine or why it does not."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import logging
import os
import sys
from collections.abc import Callable

from fusemlp_kernels.contract import Backend, NarrowLimits, ResidentLimits, Traits
from fusemlp_kernels.errors import BackendUnavailableError, unknown_name

_log = logging.getLogger("fusemlp")

# The device files of the drivers of NVIDIA (also under WSL) and AMD.
GPU_DEVICES = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
CUDA = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# The CUDA major version of each wheel of CuPy, newest first; a driver runs those of its own version and older ones.
WHEELS = {13: "cupy-cuda13x", 12: "cupy-cuda12x"}
OLDEST = min(WHEELS)
PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp64")
PLANS = ("eager", "graph", "narrow", "card", "chip", "resident")

TRAITS = {
    "triton": Traits(
        name="triton",
        row_multiple=8,
        gathers_in_load=True,
        widest_fused_output=256,
        fused_updates=("sgd", "adam"),
        norms_gradients=True,
        split_rows=1024,
        # 128 multiprocessors with four tiles of 64 x 64 each
        split_size=1 << 21,
        precisions=("fp32", "tf32", "bf16", "fp16"),
        plans=PLANS,
        # The seconds are fitted to the bounds of ci/kernel_cycles.py, with 1.3 us from one launch of a graph to the
        # next; not yet measured on a GPU.
        resident=ResidentLimits(
            "resident kernel",
            layers=8,
            inputs=4096,
            width=256,
            outputs=128,
            batch=1024,
            precisions=("fp32", "tf32", "bf16"),
            step=8e-6,
            speed=4.7e11,
            launch=2.1e-6,
            element=3e-9,
        ),
        card=ResidentLimits("card kernel", 8, 4096, 1024, 16, 1024, ("fp32", "tf32", "bf16"), step=8e-6, speed=2e13),
        chip=ResidentLimits(
            "chip kernel", 2, 64, 32, 16, 32, ("fp32", "tf32", "bf16"), hidden=1, step=3e-6, speed=1e11
        ),
        # two programs on each multiprocessor of an H100
        narrow=NarrowLimits(layers=3, widths=(("bf16", 64),), outputs=16, rows=32, programs=264),
    ),
    # the core of training alone; cuBLAS reads whole matrices, and cuts a long batch itself
    "cupy": Traits(
        name="cupy",
        row_multiple=8,
        # the loss reads the product from memory, of any width
        widest_fused_output=1 << 31,
        fused_updates=(),
        norms_gradients=True,
        precisions=("fp32", "tf32", "fp16"),
        plans=("eager", "graph"),
    ),
    "numpy": Traits(
        name="numpy",
        # the compiled loop reads matrices without gaps
        row_multiple=1,
        stores_masks=True,
        widest_fused_output=1 << 31,
        # Adam is faster in one sweep over the arena than tensor by tensor
        fused_updates=("sgd",),
        precisions=("fp32", "bf16", "fp64"),
        plans=("eager", "resident"),
        on_host=True,
        reads_codes=True,
    ),
}


def availability() -> dict[str, str | None]:
    """Return for each backend None if it works here, else one sentence: why it does not, and how to get it."""
    return {name: _reason(name) for name in TRAITS}


def _reason(name: str) -> str | None:
    return _triton_reason() if name == "triton" else _cupy_reason() if name == "cupy" else None


def interprets_triton() -> bool:
    """Return whether Triton's kernels run under its interpreter, on the CPU: TRITON_INTERPRET is set."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def _triton_reason() -> str | None:
    """Return why Triton cannot work here, without importing torch: that takes seconds."""
    missing = [library for library in ("triton", "torch") if importlib.util.find_spec(library) is None]
    if missing and sys.platform != "linux":
        return f"Triton has no release for {sys.platform}; use backend='cupy' for an NVIDIA card, or 'numpy'"
    if missing:
        return f'{" and ".join(missing)} cannot be imported; get it with: pip install "fusemlp[triton]"'
    if interprets_triton():
        return None
    if not any(os.path.exists(path) for path in GPU_DEVICES):
        return (
            f"no GPU driver is loaded (none of {', '.join(GPU_DEVICES)} is there); set TRITON_INTERPRET=1 to run the "
            "kernels on the CPU, slowly"
        )
    # last: this module takes longer to import than all before, and reads a file
    from importlib.metadata import version

    build = version("torch")
    if build.endswith("+cpu"):
        return (
            f"torch {build} is the build without GPU support; install the one for your driver (pytorch.org), or set "
            "TRITON_INTERPRET=1 to run the kernels on the CPU, slowly"
        )
    return None


def _cuda_version() -> tuple[int, int] | None:
    """Return the newest CUDA version that the driver runs, (major, minor); None without a driver."""
    try:
        library = ctypes.CDLL(CUDA)
        found = ctypes.c_int()
        # without cuInit, so that no card wakes up
        status = library.cuDriverGetVersion(ctypes.byref(found))
    except (OSError, AttributeError):
        return None
    return (found.value // 1000, found.value % 1000 // 10) if status == 0 and found.value else None


def _wheel_for(version: tuple[int, int] | None) -> str | None:
    """Return the wheel for a driver, None if it is too old; without a driver, the wheel that most drivers run."""
    if version is None:
        return WHEELS[OLDEST]
    return next((name for major, name in WHEELS.items() if version[0] >= major), None)


def _installed_wheel() -> int | None:
    """Return the CUDA major version of the installed wheel, if it is one of ``WHEELS``."""
    import importlib.metadata

    for major, name in WHEELS.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            importlib.metadata.version(name)
            return major
    return None


def _cupy_refusal() -> str | None:
    """Return why CuPy does not load or finds no card, in its own words; None if it has one. Loading takes a second."""
    try:
        from fusemlp_kernels.cupy import device
    except ImportError as error:
        return str(error).splitlines()[0]
    return device.why_not()


def _cupy_reason() -> str | None:
    """Return in one sentence why the CuPy backend cannot work here, and how to get it; None if nothing is missing."""
    version = _cuda_version()
    wheel = _wheel_for(version)
    installed = importlib.util.find_spec("cupy") is not None
    if version is None:
        install = "" if installed else f' and CuPy with: pip install "fusemlp[{wheel}]"'
        missing = "no NVIDIA driver" if installed else "neither an NVIDIA driver nor CuPy"
        return (
            f"this machine has {missing} ({CUDA} cannot be loaded); install the driver of an NVIDIA card{install}, "
            "or use backend='numpy'"
        )
    has = f"the driver runs CUDA {version[0]}.{version[1]}"
    if wheel is None:
        return f"{has}, and CuPy needs {OLDEST}.0 or newer: update the driver, or use backend='numpy'"
    if not installed:
        return f'cupy cannot be imported; {has}: get it with: pip install "fusemlp[{wheel}]"'
    built_for = _installed_wheel()
    if built_for is not None and version[0] < built_for:
        present = WHEELS[built_for]
        return f'{has}, which is too old for {present}: pip uninstall {present}, then pip install "fusemlp[{wheel}]"'
    said = _cupy_refusal()
    if said is not None:
        return (
            f'{has}, but CuPy says: {said}; what it needs of CUDA comes with: pip install "fusemlp[{wheel}]", or use '
            "backend='numpy'"
        )
    return None


def choose(refusal: Callable[[str], str | None] = lambda name: None) -> str:
    """Return the first backend of ``TRAITS`` that works here and has no ``refusal``; the log says why others do not.

    Triton's interpreter is never chosen: users ask for it by name.
    """
    for name in TRAITS:
        reason = _reason(name) or refusal(name)
        if name == "triton" and reason is None and interprets_triton():
            reason = "TRITON_INTERPRET is set: its kernels run only when they are asked for by name"
        if reason is None:
            return name
        _log.info("backend 'auto' passes over %s: %s", name, reason)
    raise AssertionError("the numpy backend is always there")


def backend(name: str, device: str | None, precision: str) -> Backend:
    """Return the backend ``name``, or with "auto" the first that works, on ``device`` (None: its default).

    Raises ArgumentError for an unknown name, BackendUnavailableError for a backend, device or precision that is missing
    here.
    """
    if name == "auto":
        name = choose()
    if name not in TRAITS:
        raise unknown_name("backend", name, ["auto", *TRAITS])
    if precision not in PRECISIONS:
        raise unknown_name("precision", precision, PRECISIONS)
    reason = _reason(name)
    if reason is not None:
        raise BackendUnavailableError(f"backend: {name!r} is not available: {reason}")
    module = importlib.import_module(f"fusemlp_kernels.{name}.backend")
    instance: Backend = getattr(module, f"{name.capitalize()}Backend")(TRAITS[name], device, precision)
    return instance
