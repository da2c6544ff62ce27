"""Memory of an engine: flat arenas with named views, and a workspace planned by liveness.

All parameters lie in one arena, each tensor aligned to 256 bytes; the gradients and each optimizer state are arenas of
the same layout. So the update is one sweep, the gradient norm one reduction, and a copy of everything one copy.

The workspace is planned and verified once for all programs that differ only in numbers: thousands of models may have
one structure, each with its own learning rate, dropout or seed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from fusemlp.describe.network import MLP
from fusemlp.program.program import Program, Structure, Value
from fusemlp.program.verifier import Places, lifetimes, verify
from fusemlp_kernels.contract import Backend

ALIGNMENT_BYTES = 256
# Layouts, plans and programs that are remembered, of each kind; the least recently used are dropped.
REMEMBERED = 256
# Updates whose learning rates the table on the device holds: 24 KiB of them.
RATE_ROWS = 1024


def short_names(net: MLP) -> dict[str, str]:
    """Return the parameters' names in the state_dict by those in the program."""
    return {parameter.short: parameter.name for parameter in net.tensors}


@dataclass(frozen=True)
class Place:
    """The place of a tensor in a flat arena, in elements: rows are ``pitch`` elements apart.

    A matrix that is ``transposed`` lies there column by column, so it is these that are as far apart.
    """

    offset: int
    shape: tuple[int, ...]
    pitch: int
    transposed: bool = False

    @property
    def stored(self) -> tuple[int, ...]:
        """The shape as it lies in memory."""
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def columns(self) -> int:
        """The elements of a row as it lies in memory."""
        return self.stored[-1]

    @property
    def size(self) -> int:
        """Elements from the first to the last, padding between rows included."""
        return self.pitch if len(self.shape) == 1 else self.stored[0] * self.pitch

    def view(self, backend: Backend, arena: Any) -> Any:
        """The tensor in an arena."""
        view = backend.view(arena, self.offset, self.stored, self.pitch)
        return view.T if self.transposed else view


@dataclass(frozen=True)
class Layout:
    """The places of named tensors in one arena of ``size`` elements."""

    places: Mapping[str, Place]
    size: int

    def __hash__(self) -> int:
        # two whose tensors are called the same and take the same room are seldom different
        return hash((tuple(self.places), self.size))

    @classmethod
    def of(
        cls,
        shapes: Mapping[str, tuple[int, ...]],
        *,
        row_multiple: int,
        item_bytes: int,
        transposed: Collection[str] = (),
    ) -> Layout:
        """Tensors one after another, each aligned; the pitch of a matrix is a multiple of ``row_multiple``."""
        step = ALIGNMENT_BYTES // item_bytes
        places, end = {}, 0
        for name, shape in shapes.items():
            flipped = name in transposed
            pitch = _pitch(shape[::-1] if flipped else shape, row_multiple)
            places[name] = Place(_round_up(end, step), shape, pitch, flipped)
            end = places[name].offset + places[name].size
        return cls(places, _round_up(end, step))

    def views(self, backend: Backend, arena: Any) -> dict[str, Any]:
        """A view of ``arena`` for each tensor."""
        return {name: place.view(backend, arena) for name, place in self.places.items()}


@lru_cache(maxsize=REMEMBERED)
def parameter_layout(net: MLP, *, row_multiple: int, item_bytes: int, coded: bool = False) -> Layout:
    """The layout of the parameters, under their short names; ``coded``: the first layer reads codes, and the weights of
    an input lie side by side."""
    shapes = net.parameter_shapes()
    by_short_name = {short: shapes[name] for short, name in short_names(net).items()}
    transposed = ("w0",) if coded else ()
    return Layout.of(by_short_name, row_multiple=row_multiple, item_bytes=item_bytes, transposed=transposed)


class Placement(NamedTuple):
    """The dtype and place of each value of kind "work", and the size of the arena of each dtype."""

    places: dict[str, tuple[str, Place]]
    sizes: dict[str, int]

    @property
    def ranges(self) -> Places:
        """The places, for the verifier."""
        return {
            name: (f"workspace {dtype}", place.offset, place.offset + place.size)
            for name, (dtype, place) in self.places.items()
        }


@lru_cache(maxsize=REMEMBERED)
def placement(structure: Structure, layout: Layout, *, row_multiple: int) -> Placement:
    """Return the verified workspace of the programs with a structure, with parameters in ``layout``.

    Raises ProgramError: see ``verify``.
    """
    program = structure.program
    placed = plan_workspace(program, row_multiple=row_multiple)
    verify(program, {**placed.ranges, **persistent_places(program, layout)})
    return placed


def plan_workspace(program: Program, *, row_multiple: int) -> Placement:
    """Return a workspace in which values that are never alive together may share memory.

    Large values are placed first, each at the lowest free offset.
    """
    spans = lifetimes(program)
    values = [v for v in program.values.values() if v.kind == "work" and v.name in spans]
    placed = Placement({}, {})
    places, sizes = placed
    for value in sorted(values, key=lambda v: (-v.size, v.name)):
        step = max(1, ALIGNMENT_BYTES // program.item_bytes(value.dtype))
        pitch = _pitch(value.shape, row_multiple)
        size = _round_up(Place(0, value.shape, pitch).size, step)
        first, last = spans[value.name]
        taken = sorted(
            (place.offset, _round_up(place.offset + place.size, step))
            for name, (dtype, place) in places.items()
            if dtype == value.dtype and spans[name][0] <= last and first <= spans[name][1]
        )
        offset = _lowest_gap(taken, size)
        places[value.name] = (value.dtype, Place(offset, value.shape, pitch))
        sizes[value.dtype] = max(sizes.get(value.dtype, 0), offset + size)
    return placed


def _lowest_gap(taken: Iterable[tuple[int, int]], size: int) -> int:
    offset = 0
    for start, stop in taken:
        if offset + size <= start:
            break
        offset = max(offset, stop)
    return offset


def _pitch(shape: tuple[int, ...], row_multiple: int) -> int:
    return _round_up(shape[-1], row_multiple) if len(shape) == 2 else shape[0]


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


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


def allocate(backend: Backend, value: Value, row_multiple: int = 1) -> Any:
    """An array of its own for a value: inputs that are copied in, and the control arrays. The rows of a matrix are a
    multiple of ``row_multiple`` elements apart."""
    rows, width = value.size // max(value.shape[-1], 1), value.shape[-1]
    pitch = -(-width // row_multiple) * row_multiple if len(value.shape) == 2 else width
    flat = backend.allocate(max(rows * pitch, 1), value.dtype)
    if len(value.shape) > 2:
        return flat[: value.size].reshape(value.shape)
    return backend.view(flat, 0, value.shape, pitch)
