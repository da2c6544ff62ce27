"""The processor, as Linux describes it."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from pathlib import Path

# Products in tiles need these, by the names of /proc/cpuinfo.
TILES = ("amx_tile", "amx_bf16", "avx512_bf16", "avx512bw")
# Linux gives the memory of tiles to a process that asks for it: arch_prctl, its request and the number of the tiles.
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18


def cache(level: int) -> int:
    """Return the bytes of a core's cache of this level, 1 (that of data) or 2; 0 where they are unknown."""
    folder = Path("/sys/devices/system/cpu/cpu0/cache", {1: "index0", 2: "index2"}[level])
    try:
        return int((folder / "size").read_text().strip().removesuffix("K")) << 10
    except (OSError, ValueError):
        return 0


def _flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


@functools.cache
def lacks_tiles() -> str | None:
    """Return why the processor has no products in tiles; None if it has."""
    if not sys.platform.startswith("linux"):
        return "this is not Linux"
    flags = _flags()
    missing = [name for name in TILES if name not in flags]
    if missing:
        return f"this processor has no {missing[0]}"
    if os.environ.get("FUSEMLP_ISA", "avx512") not in ("", "avx512"):
        return "FUSEMLP_ISA asks for less"
    if os.environ.get("NUMBA_CPU_NAME") or os.environ.get("NUMBA_CPU_FEATURES"):
        return "NUMBA_CPU_NAME or NUMBA_CPU_FEATURES chooses another processor"
    return None


@functools.cache
def why_no_tiles() -> str | None:
    """Return why products in tiles do not run here; None if they do, and the process may use them from now on."""
    reason = lacks_tiles()
    # from then on Linux refuses small signal stacks: processes without such products do not ask
    if reason is None and ctypes.CDLL(None, use_errno=True).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) != 0:
        error = os.strerror(ctypes.get_errno())
        return f"Linux refuses the memory of the tiles ({error}); a thread may have a small signal stack"
    return reason
