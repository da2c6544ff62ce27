"""The memory that is free, and that a table's inputs take, planned before it is taken."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fusemlp_kernels.errors import DataError

if TYPE_CHECKING:
    from fusemlp.datasets.preprocessing import Preprocessor


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that the system and the control group still allow this process; None if unknown."""
    found = []
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        # not Linux: free pages leave out the caches that the system could give up
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = root / "sys/fs/cgroup"
    # no control groups, or those of version 1
    with suppress(OSError, ValueError):
        most, used, stat = (
            (group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current", "stat")
        )
        if most.strip() != "max":
            figures = dict(line.split() for line in stat.splitlines())
            # cached files count as used, and give way when memory is needed
            files = sum(int(figures.get(name, 0)) for name in ("active_file", "inactive_file"))
            found.append(max(0, int(most) - int(used) + files))
    return min(found, default=None)


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
