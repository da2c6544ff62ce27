"""The records of an op and its operands: shapes, element types, and what it reads and writes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fusemlp_kernels.contract import COUNTERS, HYPER, RATE_COLUMNS, STATS

# Letters of a shape that are one size everywhere; M and n are one size in a whole program, K and N in a call.
FIXED = {"1": 1, "C": COUNTERS, "H": HYPER, "S": STATS, "4": RATE_COLUMNS}
COMMON = "Mn"
READ, WRITTEN, UPDATED = "read", "written", "updated"


@dataclass(frozen=True)
class Operand:
    """One operand of an op, or one field of an operand that is a sequence of mappings (``fields``).

    ``shape``: a letter a dimension, A for a flat arena, B for all batches, D for what all members have, one after
    another; None for what is no array. ``dtype`` as in ``Backend.allocate``. A target's depend on the loss: (M,) int64
    for classes, (M, N) real for others. ``rows``: the operand whose row numbers pick this one's rows; where that is
    given, the array has n rows in place of M. ``use``: an updated operand is read and written. ``kind``: what a written
    operand holds, as in ``program.KINDS``. ``default``: what None stands for, where an operand is left out.
    ``nullable``: it must be named, and may be None. ``hidden``: the printed program leaves it out. ``several``: a tuple
    of arrays of this shape.
    """

    name: str
    shape: str | None = None
    dtype: str = "real"
    use: str = READ
    kind: str = "work"
    rows: str = ""
    optional: bool = False
    default: Any = None
    nullable: bool = False
    hidden: bool = False
    several: bool = False
    fields: tuple[Operand, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class Op:
    """An op: what it computes, and its operands in order."""

    name: str
    computes: str
    operands: tuple[Operand, ...]

    @cached_property
    def by_name(self) -> Mapping[str, Operand]:
        """The operands by name; a field of a sequence of mappings as ``layers.w``."""
        return dict(_named(self.operands))

    @cached_property
    def required(self) -> tuple[str, ...]:
        """The operands that the op cannot do without."""
        return tuple(operand.name for operand in self.operands if not operand.optional)

    @cached_property
    def written(self) -> frozenset[str]:
        """The operands that the op writes or updates."""
        return frozenset(name for name, operand in self.by_name.items() if operand.use != READ)

    @cached_property
    def only_written(self) -> frozenset[str]:
        """The operands that the op writes without reading them."""
        return frozenset(name for name, operand in self.by_name.items() if operand.use == WRITTEN)


def _named(operands: Iterable[Operand], prefix: str = "") -> Iterator[tuple[str, Operand]]:
    for operand in operands:
        yield prefix + operand.name, operand
        yield from _named(operand.fields, f"{prefix}{operand.name}.")


def expected(operand: Operand, given: Mapping[str, Any]) -> tuple[str, str]:
    """The element type and the letters of an operand's shape beside the other operands of the call."""
    dtype, letters = operand.dtype, operand.shape or ""
    if letters == "target":
        loss = given["loss"]
        classes = loss.kind == "cross_entropy" and not loss.soft
        dtype, letters = ("int64", "M") if classes else ("real", "MN")
    if operand.rows and given.get(operand.rows) is not None:
        letters = letters.replace("M", "n")
    return dtype, letters
