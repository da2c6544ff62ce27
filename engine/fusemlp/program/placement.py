"""Plan and verify the workspace of a program once for all programs that differ only in numbers.

Thousands of models may have one structure, each with its own learning rate, dropout or seed. The plan of the workspace
and the verifier's checks do not depend on these.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from fusemlp.program.layout import REMEMBERED, Layout, Place, plan_workspace
from fusemlp.program.program import Program
from fusemlp.program.verifier import Places, verify


@dataclass(frozen=True)
class Placement:
    """The dtype and place of each value of kind "work", and the size of the arena of each dtype."""

    places: Mapping[str, tuple[str, Place]]
    sizes: Mapping[str, int]


_placements: OrderedDict[Hashable, Placement] = OrderedDict()
_lock = threading.Lock()


def placement(program: Program, layout: Layout, *, row_multiple: int) -> Placement:
    """Return the workspace of a verified program with parameters in ``layout``. Raises ProgramError: see ``verify``."""
    key = (program.structure, layout, row_multiple)
    with _lock:
        known = _placements.get(key)
        if known is not None:
            _placements.move_to_end(key)
            return known
    ranges, places, sizes = plan_workspace(program, row_multiple=row_multiple)
    verify(program, {**ranges, **persistent_places(program, layout)})
    made = Placement(places, sizes)
    with _lock:
        _placements[key] = made
        while len(_placements) > REMEMBERED:
            _placements.popitem(last=False)
    return made


def persistent_places(program: Program, layout: Layout) -> Places:
    """Return the memory of parameters, gradients and optimizer state, for the verifier."""
    ranges = {}
    for name, value in program.values.items():
        if value.kind not in ("parameter", "gradient", "state", "shadow"):
            continue
        short, _, state = name.partition(".")
        place = layout.places[short.removeprefix("d") if value.kind == "gradient" else short]
        ranges[name] = (state or value.kind, place.offset, place.offset + place.size)
    return ranges
