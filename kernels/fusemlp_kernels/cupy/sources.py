"""The CUDA C sources as text, and the structures in them as NumPy types: nothing here needs CuPy or a card.

A kernel takes one argument, a structure by value, whose members are all eight bytes wide: pointers, ``long long`` and
``double``. So there is no padding, and a structured NumPy array with the same fields is the same bytes.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np

FOLDER = Path(__file__).parent
MODULES = ("layers", "loss", "gradients", "update")
# What a module is compiled with for each type of what the matrix products read.
PRECISIONS = {
    "float": ("-std=c++17", "-DCOMPUTE_IS_HALF=0"),
    "half": ("-std=c++17", "-DCOMPUTE_IS_HALF=1"),
}
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)
_STRUCT = re.compile(r"struct (\w+) \{\n(.*?)\n\};", re.DOTALL)
_MEMBER = re.compile(r"(?:const )?(\w+(?: long)?)( ?\*)? ?(\w+);")


@functools.cache
def text(module: str) -> str:
    """The whole source of a module of ``MODULES``: its includes stand in it, each once.

    CuPy keeps what it has compiled by the text that it was given: a change in an included file would go unseen.
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
    """The NumPy type of a structure: int64 for numbers and pointers, float64 for ``double``."""
    bodies = dict(_STRUCT.findall(text(module)))
    fields = []
    for line in bodies[struct].splitlines():
        line = line.split("//")[0].strip()
        if not line:
            continue
        member = _MEMBER.fullmatch(line)
        if member is None or not (member[2] or member[1] in ("long long", "double")):
            raise AssertionError(f"{struct}: a member of eight bytes is expected, got {line!r}")
        fields.append((member[3], "<f8" if member[1] == "double" and not member[2] else "<i8"))
    return np.dtype(fields)
