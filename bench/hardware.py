"""The machine of a measurement: processor, card, driver, commit, settings."""

from __future__ import annotations

import functools
import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
THREAD_VARIABLES = ("OMP_", "GOMP_", "KMP_", "MKL_", "XLA_", "JAX_", "OPENBLAS_")
# scikit-learn sets these itself when it is imported.
NOBODYS = ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")
VARIABLES = (*THREAD_VARIABLES, "FUSEMLP_", "NUMBA_", "TRITON_", "TORCH_", "CUDA_", "CUBLAS_", "NVIDIA_TF32_")


def machine() -> dict[str, Any]:
    """Return the processor, the cores that this process may use, the memory and the system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _cpu_model(),
        "cores": cores,
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def _cpu_model() -> str:
    """Return the processor's name from /proc/cpuinfo; family and model help where a virtual machine hides the name."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.partition(":") for line in text.splitlines())
    fields: dict[str, str] = {}
    for key, _, value in pairs:
        fields.setdefault(key.strip(), value.strip())
    if "model name" not in fields:
        return platform.processor() or platform.machine()
    return f"{fields['model name']}, family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"


def _memory_gib() -> float | None:
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    return round(size / 2**30, 1)


@functools.cache
def card() -> dict[str, str] | None:
    """Return name and driver of the first card (NVIDIA's by nvidia-smi, AMD's by torch), or None."""
    found = _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    if found:
        name, _, driver = found.splitlines()[0].rpartition(", ")
        return {"name": name, "driver": driver}
    if not os.path.exists("/dev/kfd"):
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    return {"name": torch.cuda.get_device_name(0), "driver": f"HIP {torch.version.hip}"}


@functools.cache
def commit() -> str | None:
    """Return the commit of the checkout, with a "+" appended if files differ from it."""
    name = _output("git", "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return None if name is None else name + ("+" if changed else "")


def settings() -> dict[str, str]:
    """Return the environment variables that change the libraries' behaviour."""
    kept = (name for name in sorted(os.environ) if name.startswith(VARIABLES) and name not in NOBODYS)
    return {name: os.environ[name] for name in kept}


def load_average() -> float | None:
    """Return the load average of the last minute."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def circumstances(versions: dict[str, Any]) -> dict[str, Any]:
    """Return date, commit, machine, versions and settings: the part that every line of a file shares."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "card": card(),
        "load_average": load_average(),
        "versions": {"python": platform.python_version(), **versions},
        "variables": settings(),
    }


def _output(*command: str) -> str | None:
    """Return the output of a program, or None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=False)
    return None if done.returncode else done.stdout.strip()
