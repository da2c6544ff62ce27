"""Cut the calls of a table into phases, and phases into tasks, for threads to share: see ``compiled.team``.

The rows of a batch do not depend on one another through forward and backward propagation. Pieces of weight matrices do
not through gradient and update. So a step has two phases, whatever its depth, and a third where all gradients must
be known before the first update. The cuts follow from the shapes alone, and so do the bits of the results.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fusemlp_kernels.coding import Coding
from fusemlp_kernels.numpy.compiled import tables as t

# Multiplications, or work that takes as long, worth a task of its own; the most tasks of a phase; and the pieces of a
# tensor in one, for tasks that take as long as each other.
GRAIN = 1 << 18
MOST_TASKS = 64
PIECES = 4
# A block has a multiple of this many rows.
ROWS = 8
# Up to about this many rows in a task: weights that are larger than a core's cache are read once for all of them, but
# more rows leave the cache themselves.
TASK_ROWS = 256
# Elements of a row that a piece of a weight has at least, where there are as many: an update of short rows leaves
# little to do in vector registers. If products copy their operands, large pieces save copies: tall ones have rows of
# at least WIDE elements and TALL times the work of others, and a part of the rows stays for small ones, with which
# threads end at about the same time. Up to FEW threads share the others in about TOGETHER parts.
SHORTEST, WIDE, TALL, SMALL_PART, FEW, TOGETHER = 512, 768, 2, 8, 4, 7
# The cost of an element of work beside products, in multiplications.
ELEMENT, LOSS, MOVE, UPDATE = 16, 64, 4, 32


class Cut(NamedTuple):
    """The cuts that products want. A tall piece of a weight has a multiple of ``tall`` rows, 0 for none. A phase by
    pieces has up to ``most_tasks``. ``dots``: a layer of few outputs may be dot products."""

    tall: int = 0
    most_tasks: int = MOST_TASKS
    dots: bool = True


PIECEWISE = ("WEIGHT", "CODES", "BIAS", "SLOPES", "FACTORS")
_CUT = {
    **dict.fromkeys((*PIECEWISE, "NORM", "UPDATE", "PACK", "SUMS"), t.BY_PIECES),
    **{"CLOCK": t.AT_ONCE, "PAUSE": t.BY_ROWS},
}


@dataclass(frozen=True)
class Row:
    """A row of calls: its kind, N and K, its first tensor and the one after its last; and the arrays that it reads or
    writes by rows of the batch: address, bytes, bytes of a row, or 0 for one that is read as a whole. With a ``coding``
    N are the inputs of its columns, and K the units that they go to, and each of ``members`` has sums of its own."""

    kind: str
    n: int
    k: int
    first: int = 0
    end: int = 0
    arrays: tuple[tuple[int, int, int], ...] = ()
    coding: Coding | None = None
    members: int = 1


@dataclass(frozen=True)
class Plan:
    """The records of phases, tasks and pieces; ``blocks`` blocks of ``block`` rows, and the most tasks of a phase."""

    phases: list[tuple[int, ...]]
    tasks: list[tuple[int, ...]]
    pieces: list[tuple[int, ...]]
    block: int
    blocks: int
    prologue: int
    most: int


def plan(
    rows: Sequence[Row],
    packs: Sequence[Row],
    height: int,
    sizes: Sequence[int],
    wanted: Cut,
    members: int = 1,
    shards: int = 0,
) -> Plan:
    """Plan ``rows`` of calls for batches of up to ``height`` rows; the trained tensors have these ``sizes``.

    A block has as many rows of each of ``members``.

    ``packs`` are the last rows of the table: they run before the first step, and where an update does not bring the
    weights into panels itself, after that. With ``shards`` the rows are those of several shards alike, each of which is
    cut as if it were alone.
    """
    block = _block(rows[: len(rows) // max(1, shards)], height, math.lcm(ROWS, members))
    by_rows = max(1, -(-height // block)) if block else 1
    phases: list[tuple[int, ...]] = []
    tasks: list[tuple[int, ...]] = []
    pieces: list[tuple[int, ...]] = []
    most = 1

    def phase(first: int, group: Sequence[Row]) -> None:
        nonlocal most
        cut = _CUT.get(group[0].kind, t.BY_ROWS)
        start, count, large = len(tasks), 1, 0
        if cut == t.BY_PIECES:
            total = sum(piece[-1] for row in group for piece in _pieces(row, height, sizes, wanted.tall, math.inf))
            count = min(_tasks(total), wanted.most_tasks)
            grain = total / min(wanted.most_tasks, PIECES * count) if count > 1 else math.inf
            begun, cost, ended = len(pieces), 0, 0
            cut_pieces = [
                (first + i, *piece)
                for i, row in enumerate(group)
                for piece in _pieces(row, height, sizes, wanted.tall, grain)
            ]
            if wanted.tall and group[0].kind in PIECEWISE:
                cut_pieces.sort(key=lambda piece: -piece[-1])
            for *piece, work in cut_pieces:
                pieces.append(tuple(piece))
                cost += work
                if cost * count >= total * (ended + 1):
                    tasks.append((begun, len(pieces)))
                    large += wanted.tall > 0 and SMALL_PART * (total - cost) >= total
                    begun, ended = len(pieces), cost * count // max(total, 1)
            if begun < len(pieces):
                tasks.append((begun, len(pieces)))
            count = len(tasks) - start
        elif cut == t.BY_ROWS:
            count = 0 if group[0].kind == "PAUSE" else by_rows
        phases.append((cut, first, first + len(group), count, start, max(1, large // TOGETHER), large))
        most = max(most, count)

    if packs:
        phase(len(rows), packs)
    prologue = len(phases)
    for first, group in _groups(rows):
        phase(first, group)
        if packs and group[0].kind == "UPDATE":
            phase(len(rows), packs)
    return Plan(phases, tasks, pieces, block, by_rows, prologue, most)


def _groups(rows: Sequence[Row]) -> Iterator[tuple[int, Sequence[Row]]]:
    """The rows of each phase, and the place of the first."""

    def class_of(row: Row) -> str:
        # factors have their gradients from those of codes
        return (
            "gradients" if row.kind in PIECEWISE and row.kind != "FACTORS" else row.kind if row.kind in _CUT else "rows"
        )

    first = 0
    for at in range(1, len(rows) + 1):
        group = rows[first:at]
        if at == len(rows) or class_of(rows[at]) != class_of(group[0]) or _disturbs(rows[at], group):
            yield first, group
            first = at


def _disturbs(row: Row, others: Sequence[Row]) -> bool:
    """True if arrays of a row lie where other rows have arrays of another width: a value that is not needed any more
    leaves its memory to another, but a task may be ahead of those that still read it."""
    for start, size, width in row.arrays:
        for other in others:
            for their_start, their_size, their_width in other.arrays:
                apart = start + size <= their_start or their_start + their_size <= start
                if not apart and (start, width) != (their_start, their_width):
                    return True
    return False


def _block(rows: Sequence[Row], height: int, unit: int) -> int:
    """Rows a block, a multiple of ``unit``."""
    cost = 0
    for row in rows:
        if row.kind in ("AFFINE", "BACKWARD", "HEADS", "HEADS_BACKWARD"):
            cost += row.n * row.k
        elif row.kind in ("ENTROPY", "ELEMENTWISE"):
            cost += LOSS * row.n
        elif row.kind in ("GATHER", "COLUMNS"):
            cost += MOVE * row.k * max(1, row.n)
        elif row.kind not in _CUT:
            cost += ELEMENT * row.n
    return -(-height // (_tasks(height * cost) * unit)) * unit


def row_tasks(block: int, blocks: int, threads: int) -> int:
    """Return the number of tasks for blocks of rows; the results do not depend on it."""
    count = -(-blocks // max(1, min(TASK_ROWS // max(1, block), blocks // threads)))
    # as many for each thread
    return count if count < threads else count - count % threads


def _tasks(cost: int) -> int:
    """Return how many tasks so much work is worth, an even number: two threads then have as many each."""
    count = min(MOST_TASKS, cost // GRAIN)
    return max(1, count - count % 2)


def _even(size: int, parts: int, unit: int) -> Iterator[tuple[int, int]]:
    """Cut ``size`` into about ``parts`` parts that begin at multiples of ``unit``."""
    step = max(1, -(-size // (max(parts, 1) * unit))) * unit
    for start in range(0, size, step):
        yield start, min(size, start + step)


def _columns(row: Row, coding: Coding, height: int, grain: float) -> Iterator[tuple[int, int, int, int, int]]:
    """Whole columns of codes, each time about as much work as ``grain``."""
    top, cost = 0, 0
    for place in coding.places:
        bottom = place.first + place.inputs
        if row.kind == "SUMS":
            cost += row.k * MOVE * place.inputs * row.members
        else:
            each = UPDATE + MOVE * (row.members - 1)
            cost += row.k * (each * place.inputs + height * place.slots)
        if cost >= grain or bottom == coding.inputs:
            yield top, bottom, 0, row.k, cost
            top, cost = bottom, 0


def _blocks(
    start: int, end: int, inputs: int, parts: float, shortest: int, unit: int
) -> Iterator[tuple[int, int, int, int]]:
    """Cut rows of a weight into about ``parts`` blocks: top, bottom, left, right."""
    count = max(1, math.ceil(parts))
    strips = min(count, max(1, inputs // shortest))
    for left, right in _even(inputs, strips, t.PANEL):
        for top, bottom in _even(end - start, -(-count // strips), unit):
            yield start + top, start + bottom, left, right


def _pieces(
    row: Row, height: int, sizes: Sequence[int], tall: int, grain: float
) -> Iterator[tuple[int, int, int, int, int]]:
    """The pieces of a row, each about as much work as ``grain``: top, bottom, left, right, and its work."""
    if row.kind in ("NORM", "UPDATE"):
        for tensor in range(row.first, row.end):
            size = sizes[tensor]
            for left, right in _even(size, int(size * UPDATE // grain), t.PANEL):
                yield tensor, 0, left, right, (right - left) * UPDATE
    elif row.coding is not None:
        yield from _columns(row, row.coding, height, grain)
    elif row.kind in ("WEIGHT", "PACK"):
        each = height + UPDATE if row.kind == "WEIGHT" else MOVE
        if tall and row.n * row.k * each > grain:
            high = row.n * (SMALL_PART - 1) // (SMALL_PART * tall) * tall
            blocks = [
                *_blocks(0, high, row.k, high * row.k * each / (TALL * grain), WIDE, tall),
                *_blocks(high, row.n, row.k, (row.n - high) * row.k * each / grain, SHORTEST // 4, t.PANEL),
            ]
        else:
            blocks = [*_blocks(0, row.n, row.k, row.n * row.k * each / grain, SHORTEST, t.PANEL // 2)]
        for top, bottom, left, right in blocks:
            yield top, bottom, left, right, (bottom - top) * (right - left) * each
    else:
        each = UPDATE if row.kind == "FACTORS" else height
        for left, right in _even(row.n, int(row.n * each // grain), t.PANEL):
            yield 0, 0, left, right, (right - left) * each
