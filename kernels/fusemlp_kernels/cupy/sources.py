"""The CUDA C sources as text, and the structures in them as NumPy types: nothing here needs CuPy or a card.

A kernel takes one argument, a structure by value. All its members are eight bytes wide: pointers, ``long long`` and
``double``, and pointers with strides (``Vector``, ``Matrix``). So there is no padding, and a structured NumPy array
with the same fields is the same bytes.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
MODULES = ("layers", "loss", "gradients", "update")
# The options of a module, for each type of the factors of the matrix products.
PRECISIONS = {
    "float": ("-std=c++17", "-DCOMPUTE_IS_HALF=0"),
    "half": ("-std=c++17", "-DCOMPUTE_IS_HALF=1"),
}
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)
_STRUCT = re.compile(r"struct (\w+) \{\n(.*?)\n\};", re.DOTALL)
_MEMBER = re.compile(r"(?:const )?(long long|double|Vector|Matrix|\w+(?=\*))(\*|<[\w ]+>)? (\w+);")
# The strides beside a pointer, by the member's type.
STRIDES = {"Vector": ("_step",), "Matrix": ("_row", "_col")}


@functools.cache
def text(module: str) -> str:
    """Return the source of a module of ``MODULES``, with each included file in it once.

    CuPy caches compiled modules by this text: it would not see a change in an included file.
    """
    seen: set[str] = set()

    def inlined(name: str) -> str:
        def include(match: re.Match[str]) -> str:
            if match[1] in seen:
                return ""
            seen.add(match[1])
            return inlined(match[1])

        return _INCLUDE.sub(include, (FOLDER / name).read_text(encoding="utf-8"))

    return inlined(f"{module}.cu")


@functools.cache
def layout(module: str, struct: str) -> np.dtype[Any]:
    """Return the NumPy type of a structure: int64 for numbers, pointers and strides, float64 for ``double``."""
    body = dict(_STRUCT.findall(text(module)))[struct]
    fields = []
    for line in re.sub(r" *//.*", "", body).splitlines():
        member = _MEMBER.fullmatch(line.strip())
        if member is None:
            raise AssertionError(f"{struct}: a member of eight bytes is expected, got {line!r}")
        kind, array, name = member.groups()
        fields.append((name, "<f8" if kind == "double" and not array else "<i8"))
        fields += [(name + stride, "<i8") for stride in STRIDES.get(kind, ())]
    return np.dtype(fields)


@functools.cache
def argument(module: str, kernel: str) -> str:
    """Return the name of the structure that a kernel takes."""
    found = re.search(rf"\b{kernel}\(const (\w+) call\)", text(module))
    assert found is not None
    return found[1]
