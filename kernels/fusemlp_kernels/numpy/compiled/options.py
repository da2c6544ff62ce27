"""How the compiled functions are compiled, and kept on disk.

Numba looks only at the file of a function to see whether what it kept is out of date. The functions here are made of
others in several files, so they are told of all their contents, through a number that is part of what they are compiled
from and that they return.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

_log = logging.getLogger("fusemlp")

# A division by zero gives an infinity or NaN, as in NumPy.
EXACT: dict[str, Any] = {"nogil": True, "error_model": "numpy"}
# Products and sums may be contracted into one rounding; the order of a sum stays, so that an argument reduction keeps
# what its second part is for.
ELEMENTWISE = EXACT | {"fastmath": {"contract"}}
# A function of one element: a loop that calls it without having its code in it is not brought into vector registers.
ELEMENT = ELEMENTWISE | {"forceinline": True}
# Sums may be taken in any order, that of vector registers.
REDUCTION = EXACT | {"fastmath": {"contract", "reassoc"}}


def contents() -> int:
    """A number for the text of all files that are compiled."""
    folder = Path(__file__).parent
    files = [*sorted(folder.glob("*.py")), folder.parent.parent / "contract.py", folder.parent.parent / "philox.py"]
    number = 0
    for file in files:
        number = zlib.crc32(file.read_bytes(), number)
    return number


def kept(function: Callable[..., int]) -> Callable[..., int]:
    """``function``, compiled for the types of its arguments when it is first called, or read from the disk."""
    try:
        return numba.njit(cache=True, **EXACT)(function)
    except RuntimeError as error:
        # no folder to write to: neither the package's nor the user's
        _log.info("what numba compiles is not kept on disk, each process compiles it: %s", error)
        return numba.njit(**EXACT)(function)
