"""Where the values of a program lie: planned and verified once for all programs that differ in numbers alone.

Thousands of models may be trained on one structure, each with a learning rate, a dropout or a seed of its own: neither
the plan of the workspace nor what the verifier looks at depends on these.
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
    """Of the values of kind "work" the dtype and place by name, and the size of the arena of each dtype."""

    places: Mapping[str, tuple[str, Place]]
    sizes: Mapping[str, int]


_placements: OrderedDict[Hashable, Placement] = OrderedDict()
_lock = threading.Lock()


def placement(program: Program, layout: Layout, *, row_multiple: int) -> Placement:
    """The workspace of a verified program whose parameters lie in ``layout``. Raises ProgramError: see ``verify``."""
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
    """The memory of parameters, gradients and optimizer state, for the verifier."""
    ranges = {}
    for name, value in program.values.items():
        if value.kind not in ("parameter", "gradient", "state", "shadow"):
            continue
        short, _, state = name.partition(".")
        place = layout.places[short.removeprefix("d") if value.kind == "gradient" else short]
        ranges[name] = (state or value.kind, place.offset, place.offset + place.size)
    return ranges
