"""The options of compiled functions, and their cache on disk."""

from __future__ import annotations

import functools
import logging
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
from numba import types

_log = logging.getLogger("fusemlp")

# A division by zero gives an infinity or NaN, as in NumPy.
EXACT: dict[str, Any] = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
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


def kept(function: Callable[..., object], variant: str = "") -> Callable[..., object]:
    """``function``, compiled for the types of its arguments when it is first called, or read from the disk.

    Numba finds what it has kept by the file and the name of a function, and looks at no other file to see whether it is
    out of date. So the name holds ``variant`` and a number for all that the function is made of. Two processes that
    compile one name at once write the same; numba replaces its files in one go.
    """
    return _kept(function, variant, functools.partial(numba.njit, **EXACT))


def kept_for_calls(function: Callable[..., object], variant: str, kinds: Sequence[Any]) -> Any:
    """``function``, which takes arguments of these types and returns a word, as ``kept``, with an ``address``."""
    options = {name: value for name, value in EXACT.items() if name != "no_cfunc_wrapper"}
    return _kept(function, variant, functools.partial(numba.cfunc, types.intp(*kinds), **options))


def _kept(function: Callable[..., object], variant: str, compiler: Callable[..., Any]) -> Any:
    function.__qualname__ = f"{function.__name__}_{zlib.crc32(variant.encode(), contents()):08x}"
    try:
        return compiler(cache=True)(function)
    except RuntimeError as error:
        # no folder to write to: neither the package's nor the user's
        _log.info("what numba compiles is not kept on disk, each process compiles it: %s", error)
        return compiler()(function)
