"""The memory that a table's inputs take, planned before it is taken."""

from __future__ import annotations

from pathlib import Path

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp_kernels.errors import DataError

# Linux's counts of memory: of the machine, and of a container.
_MACHINE = Path("/proc/meminfo")
_CONTAINER = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """Return the bytes that can be taken without swapping; None on a system that does not say."""
    try:
        lines = _MACHINE.read_text().splitlines()
        free = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None
    try:
        limit, used = ((_CONTAINER / f"memory.{name}").read_text() for name in ("max", "current"))
        stat = dict(line.split() for line in (_CONTAINER / "memory.stat").read_text().splitlines())
        # The container's cache of files can be dropped.
        return min(free, int(limit) - int(used) + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        return free


def check_memory(preprocessor: Preprocessor, rows: int, precision: str) -> None:
    """Raise DataError if the inputs of this many rows do not fit into memory; it names the columns that take most."""
    free, width = available_memory(), preprocessor.width
    need = rows * width * (8 if precision == "fp64" else 4)
    if free is None or need <= free:
        return
    widest = sorted(zip(preprocessor.widths, preprocessor.feature_names, strict=True), reverse=True)[:3]
    told = ", ".join(f"{count} of {name!r}" for count, name in widest)
    raise DataError(
        f"the inputs of the network take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: {rows} rows "
        f"have {width} inputs, {told} among them; --drop a column of many words, or give fewer rows"
    )
