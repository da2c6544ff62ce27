"""Matrix products, cut into tiles that stay in vector registers; and weights in panels, as the forward pass of layers
with many outputs reads them.

Element (i, j) of a tile is the sum over k of ``a[i, k] * b[k, j]``, taken in the order of k, with one rounding a step
where the processor multiplies and adds at once. So a product has the same bits however it is cut into tiles, and in
registers of any width. a is read number by number and may have any strides; a row of b lies together.

A panel holds PANEL rows of a weight matrix (N, K), transposed: (K, PANEL), any numbers where there is no row.
"""

from __future__ import annotations

import functools
import itertools
import math
import types as python
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import float64, intp, types
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.compiler import (
    EXACT,
    REGISTER_BYTES,
    X86,
    elements,
    intrinsic,
    kept_for_calls,
)
from fusemlp_kernels.numpy.compiled.tables import LINE, PANEL
from fusemlp_kernels.numpy.compiled.vectors import INDEX, VectorCode, folded, looped, number, opaque
from fusemlp_kernels.numpy.plan import Cut
from fusemlp_kernels.numpy.processor import cache

# Rows of a tile, and vectors in one: its sums, a vector of b for each of these and a number of a fill the registers, of
# which there are 32, on x86 before AVX-512 16.
TILE_ROWS, TILE_VECTORS = (6, 2) if X86 and REGISTER_BYTES < 64 else (8, 2)

# Numbers of a sum for which a tile asks for the lines of its results ahead; it always does where it adds to them. Of
# longer sums it also asks for the lines of b, this many rows ahead: they stream through the first cache.
DEEP, AHEAD = 256, 8

# Partial sums of a dot product, and the tile of those: as many as the registers hold.
DOT_BYTES = 64
DOT_ROWS, DOT_COLUMNS = (4, 4) if REGISTER_BYTES == DOT_BYTES else (2, 2)


def row_address(builder: Any, first: Any, stride: Any, i: int, rows: Any) -> Any:
    """The address of row i; beyond the last one that of the last, so that nothing else is read."""
    inside = builder.icmp_signed("<", number(i), rows)
    last = builder.sub(rows, number(1))
    return builder.add(first, builder.mul(builder.select(inside, number(i), last), stride))


def _tile(height: int, vectors: int, masked: bool) -> Callable[..., Any]:
    """A tile of this many rows and vectors of columns, ``masked`` where some columns may be missing."""

    def typed(
        typingctx: Any, like: Any, a: Any, a_row: Any, a_step: Any, b: Any, b_step: Any, depth: Any, start: Any,
        alpha: Any, beta: Any, c: Any, c_row: Any, rows: Any, columns: Any,
    ) -> Any:  # fmt: skip
        """``c = alpha * (start + a @ b) + beta * c``; addresses, and strides in elements; start is a row.

        Of c only ``rows`` by ``columns`` are written, and of a, b and start no others are read. With beta 0 c
        may be anything.
        """
        real, word = like.dtype, types.intp
        signature = types.void(like, *[word] * 7, real, real, *[word] * 4)

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, a, a_row, a_step, b, b_step, depth, start, alpha, beta, c, c_row, rows, columns = arguments
            to = VectorCode(context, builder, real)
            in_bytes = [builder.mul(stride, number(to.size)) for stride in (a_row, a_step, b_step, c_row)]
            a_row, a_step, b_step, c_row = in_bytes
            width = to.lanes
            firsts = [number(v * width) for v in range(vectors)]
            masks = [to.mask(builder.sub(columns, first)) if masked else None for first in firsts]

            def across(address: Any) -> list[Any]:
                return [to.load(builder.add(address, number(v * width * to.size)), masks[v]) for v in range(vectors)]

            span, zero = vectors * width * to.size, ir.Constant(to.element, 0.0)
            adds, deep = builder.fcmp_unordered("!=", beta, zero), builder.icmp_signed(">=", depth, number(DEEP))
            with builder.if_then(builder.or_(adds, deep)):
                # the end of the tile reads or writes them, too late to wait for memory
                for i, line in itertools.product(range(height), (*range(0, span, LINE), span - 1)):
                    to.prefetch(builder.add(row_address(builder, c, c_row, i, rows), number(line)))
            starts = across(start) * height
            a_rows = [row_address(builder, a, a_row, i, rows) for i in range(height)]
            if REGISTER_BYTES == 64:
                # of eight LLVM would add up some anew for each k, in units that multiply
                a_rows = [opaque(builder, row) for row in a_rows]

            def added(ahead: int, values: list[Any]) -> list[Any]:
                a_at, b_at, *sums = values
                for line in range(0, span if ahead else 0, LINE):
                    later = builder.add(b_at, builder.mul(b_step, number(ahead)))
                    to.prefetch(builder.add(later, number(line)))
                bs = across(b_at)
                for i in range(height):
                    value = builder.load(to.at(builder.add(a_rows[i], a_at), to.element))
                    value.align = to.size
                    same = to.everywhere(value)
                    for v, at in enumerate(range(i * vectors, (i + 1) * vectors)):
                        sums[at] = to.sum_of_product(same, bs[v], sums[at])
                return [builder.add(a_at, a_step), builder.add(b_at, b_step), *sums]

            streams, values = builder.icmp_signed(">", depth, number(DEEP)), [number(0), b, *starts]
            for ahead, steps in ((AHEAD, (depth, number(0))), (0, (number(0), depth))):
                values = looped(
                    builder, builder.select(streams, *steps), 1, values, lambda _, values, n=ahead: added(n, values)
                )
            _, _, *results = values
            unit = ir.Constant(to.element, 1.0)
            plain = builder.and_(builder.fcmp_ordered("==", alpha, unit), builder.fcmp_ordered("==", beta, zero))
            with builder.if_else(plain) as (store, combine):
                with store:
                    _each_row(builder, to, c, c_row, rows, results, masks, lambda value, _: value)
                with combine:
                    alphas, betas = to.everywhere(alpha), to.everywhere(beta)
                    forgets, nothing = builder.fcmp_ordered("==", beta, zero), ir.Constant(to.vector, None)

                    def combined(value: Any, before: Callable[[], Any]) -> Any:
                        # what is there may be NaN
                        held = builder.select(forgets, nothing, builder.fmul(betas, before()))
                        return to.sum_of_product(alphas, value, held)

                    _each_row(builder, to, c, c_row, rows, results, masks, combined)
            return context.get_dummy_value()

        return signature, code

    return typed


def _each_row(
    builder: Any,
    to: VectorCode,
    c: Any,
    c_row: Any,
    rows: Any,
    results: list[Any],
    masks: list[Any],
    of: Callable[..., Any],
) -> None:
    """Store what ``of`` makes of each result."""
    vectors = len(masks)
    for i in range(len(results) // vectors):
        with builder.if_then(builder.icmp_signed("<", number(i), rows)):
            first = builder.add(c, builder.mul(number(i), c_row))
            for v, mask in enumerate(masks):
                at = builder.add(first, number(v * to.lanes * to.size))
                value = of(results[i * vectors + v], lambda at=at, mask=mask: to.load(at, mask))
                to.store(value, at, mask)


whole_tile: Any = intrinsic(_tile(TILE_ROWS, TILE_VECTORS, masked=False))
short_tile: Any = intrinsic(_tile(TILE_ROWS // 2, TILE_VECTORS, masked=False))
wide_tile: Any = intrinsic(_tile(TILE_ROWS, TILE_VECTORS, masked=True))
narrow_tile: Any = intrinsic(_tile(TILE_ROWS, 1, masked=True))


def _dot_tile(height: int, width: int) -> Callable[..., Any]:
    """A tile whose rows and columns are those of two matrices that both have their numbers side by side.

    An element is the sum of DOT_BYTES of partial sums: of every 16th product in float32, say. In the end the upper half
    of them is added to the lower one, again and again. So the bits do not depend on the registers here either.
    """

    def typed(
        typingctx: Any, like: Any, a: Any, a_row: Any, b: Any, b_row: Any, depth: Any, start: Any, c: Any, c_row: Any,
        rows: Any, columns: Any,
    ) -> Any:  # fmt: skip
        """``c = start + a @ b.T``: see ``_tile``."""
        real, word = like.dtype, types.intp
        signature = types.void(like, *[word] * 10)

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, a, a_row, b, b_row, depth, start, c, c_row, rows, columns = arguments
            size = context.get_abi_sizeof(context.get_value_type(real))
            to, few = (VectorCode(context, builder, real, lanes) for lanes in (DOT_BYTES // size, width))
            a_row, b_row, c_row = (builder.mul(stride, number(size)) for stride in (a_row, b_row, c_row))
            tops = [row_address(builder, a, a_row, i, rows) for i in range(height)]
            sides = [row_address(builder, b, b_row, j, columns) for j in range(width)]

            def added(at: Any, sums: list[Any], mask: Any = None) -> list[Any]:
                xs, ys = ([to.load(builder.add(row, at), mask) for row in of] for of in (tops, sides))
                pairs = [(x, y) for x in xs for y in ys]
                return [to.sum_of_product(*pair, held) for pair, held in zip(pairs, sums, strict=True)]

            nothing = [ir.Constant(to.vector, None)] * (height * width)
            whole, rest = (builder.and_(depth, number(bits)) for bits in (-to.lanes, to.lanes - 1))
            sums = looped(builder, whole, to.lanes, nothing, lambda k, sums: added(builder.mul(k, number(size)), sums))
            after, inside = builder.mul(whole, number(size)), to.mask(rest)
            sums = looped(builder, rest, to.lanes, sums, lambda _, sums: added(after, sums, inside))
            sums = folded(builder, to.lanes, sums)
            mask = few.mask(columns)
            starts = few.load(start, mask)
            for i in range(height):
                with builder.if_then(builder.icmp_signed("<", number(i), rows)):
                    vector, first = divmod(i * width, to.lanes)
                    pick = ir.Constant(ir.VectorType(INDEX, width), list(range(first, first + width)))
                    value = builder.shuffle_vector(sums[vector], sums[vector], pick)
                    few.store(builder.fadd(starts, value), builder.add(c, builder.mul(number(i), c_row)), mask)
            return context.get_dummy_value()

        return signature, code

    return typed


dot_tile: Any = intrinsic(_dot_tile(DOT_ROWS, DOT_COLUMNS))


def transposed(builder: Any, lines: list[Any]) -> list[Any]:
    """The columns of a square whose rows are ``lines``, in registers."""
    lines, n = [*lines], len(lines)
    half = n // 2
    while half:
        # squares of 2 * half: the upper right quarter changes places with the lower left one
        upper = [lane if not lane & half else n + lane - half for lane in range(n)]
        lower = [lane + half if not lane & half else n + lane for lane in range(n)]
        picks = [ir.Constant(ir.VectorType(INDEX, n), order) for order in (upper, lower)]
        for i in range(n):
            if not i & half:
                pair = lines[i], lines[i + half]
                lines[i], lines[i + half] = (builder.shuffle_vector(*pair, pick) for pick in picks)
        half //= 2
    return lines


@intrinsic
def transpose_square(
    typingctx: Any, like: Any, source: Any, source_row: Any, rows: Any, target: Any, target_row: Any
) -> Any:
    """Write the transpose of a square, as wide as a register, to ``target``; addresses, and strides in elements.

    Of the source ``rows`` are read; columns beyond are written with any numbers.
    """
    real = like.dtype

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, source, source_row, rows, target, target_row = arguments
        to = VectorCode(context, builder, real)
        n = to.lanes
        source_row, target_row = (builder.mul(stride, number(to.size)) for stride in (source_row, target_row))
        lines = [to.load(row_address(builder, source, source_row, i, rows)) for i in range(n)]
        lines = transposed(builder, lines)
        for i, values in enumerate(lines):
            to.store(values, builder.add(target, builder.mul(number(i), target_row)))
        return context.get_dummy_value()

    return types.void(like, *[types.intp] * 5), code


# Operands are copied where this was measured to pay, on x86: in registers of 32 bytes and less, and in longer ones
# where the cache has 48 KB, as Intel's have it since Ice Lake.
COPIES = X86 and (REGISTER_BYTES < 64 or cache(1) >= 48 << 10)
# Bytes of each of the two copies, which take a bit over half of the second cache, if that has 570 KB or more; rows of a
# product for which a strip of b is copied, and bytes from the first row of b to the last beyond which; numbers between
# the tiles of a copy of a, for each row.
HALF, STRIP_ROWS, CACHED, BETWEEN = max(160 << 10, cache(2) * 9 // 32), 4 * TILE_ROWS, 1 << 15, 2
# Rows of a piece of a weight where that saves copies, or a multiple: whole tiles, and whole lines of the panels.
CUT = Cut(math.lcm(TILE_ROWS, PANEL // 2) if COPIES else 0)
# The bytes of both copies.
ROOM_BYTES = 2 * HALF if COPIES else 0
# The type of the elements; each type has a copy of these functions.
REAL: Any = np.float32


def _copy(lanes: int, masked: bool) -> Callable[..., Any]:
    """Copy at least this many numbers, 0 standing for the columns of a tile, in whole vectors."""

    def typed(typingctx: Any, like: Any, source: Any, target: Any, count: Any) -> Any:
        """Copy side by side; with a mask, of the source the first ``count`` are read."""

        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, source, target, count = arguments
            to = VectorCode(context, builder, like.dtype)
            for v in range(-(-lanes // to.lanes) or TILE_VECTORS):
                first = number(v * to.lanes * to.size)
                mask = to.mask(builder.sub(count, number(v * to.lanes))) if masked else None
                to.store(to.load(builder.add(source, first), mask), builder.add(target, first))
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 3), code

    return typed


copy_columns: Any = intrinsic(_copy(0, masked=False))
copy_some_columns: Any = intrinsic(_copy(0, masked=True))
copy_rows: Any = intrinsic(_copy(TILE_ROWS, masked=True))


@register_jitable(**EXACT)
def _copy_strip(like: Any, b: int, b_step: int, depth: int, columns: int, to: int) -> None:
    """Copy the columns of a tile, of which ``columns`` are left, from rows that are b_step apart."""
    size = like.itemsize
    width = TILE_VECTORS * REGISTER_BYTES // size
    if columns >= width:
        for k in range(depth):
            copy_columns(like, b + size * k * b_step, to + size * k * width, columns)
    else:
        for k in range(depth):
            copy_some_columns(like, b + size * k * b_step, to + size * k * width, columns)


@register_jitable(**EXACT)
def _turn(like: Any, a: int, a_step: int, depth: int, rows: int, to: int) -> None:
    """Copy rows of a, which lie together in each of ``depth`` columns, tile by tile, as tiles read them.

    Vectors are longer than a tile is high: what follows a number of a tile is written after it, or is between tiles.
    """
    size = like.itemsize
    for k in range(depth):
        for i in range(0, rows, TILE_ROWS):
            copy_rows(
                like,
                a + size * (k * a_step + i),
                to + size * (i * (depth + BETWEEN) + k * TILE_ROWS),
                min(rows - i, TILE_ROWS),
            )


def _product(
    a: int, a_row: int, a_step: int, b: int, b_panel: int, b_step: int, depth: int, start: int,
    start_step: int, alpha: float, beta: float, c: int, c_row: int, rows: int, columns: int, room: int,
) -> int:  # fmt: skip
    """``c = alpha * (start + a @ b) + beta * c``: c (rows, columns), a (rows, depth), b (depth, columns).

    a, b, c and start are addresses, the others strides in elements: b_panel from the first PANEL columns of b to the
    next. The same row of start is added to all rows; without start_step it is PANEL numbers, again and again.

    ``room`` is memory for two times HALF bytes, or 0. If b is large and the numbers that a tile reads of it lie far
    apart, they are copied there first: many such lines share one place in the cache, and each has its own in the table
    of pages. So are those of a, if its columns lie together.
    """
    like = elements(REAL, a)
    real, size = like.dtype.type, like.itemsize
    lanes = REGISTER_BYTES // size
    width = TILE_VECTORS * lanes
    scale, keep, most = real(alpha), real(beta), HALF // size
    strips = (
        COPIES
        and room != 0
        and b_step > PANEL
        and rows >= STRIP_ROWS
        and size * depth * b_step > CACHED
        and depth * width <= most
    )
    turns = strips and a_row == 1 and (depth + BETWEEN) * STRIP_ROWS <= most
    some = rows
    if turns:
        # all parts of about the same height: each has the strips copied anew
        parts = -(-rows // (most // (depth + BETWEEN) // TILE_ROWS * TILE_ROWS))
        some = -(-rows // (parts * TILE_ROWS)) * TILE_ROWS
    for top in range(0, rows, max(some, 1)):
        end = min(rows, top + some)
        a_top, row, step, tile_row = a + size * top * a_row, a_row, a_step, a_row
        if turns:
            _turn(like, a_top, a_step, depth, end - top, room)
            a_top, row, step, tile_row = room, 1, TILE_ROWS, depth + BETWEEN
        for j in range(0, columns, width):
            left = columns - j
            # where a tile of columns begins
            panel, inside = j // PANEL, j % PANEL
            b_at, b_next, c_at = b + size * (panel * b_panel + inside), b_step, c + size * j
            first = start + size * j * start_step
            if strips:
                strip = room + HALF
                _copy_strip(like, b_at, b_step, depth, left, strip)
                b_at, b_next = strip, width
            for i in range(top, end, TILE_ROWS):
                below = min(TILE_ROWS, end - i)
                a_at, to = a_top + size * (i - top) * tile_row, c_at + size * i * c_row
                tile = a_at, row, step, b_at, b_next, depth, first, scale, keep, to, c_row, below, left
                if left >= width and 2 * below <= TILE_ROWS:
                    short_tile(like, *tile)
                elif left >= width:
                    whole_tile(like, *tile)
                elif left > lanes:
                    wide_tile(like, *tile)
                else:
                    narrow_tile(like, *tile)
    return 0


def _dots(x: int, w: int, depth: int, b: int, z: int, rows: int, columns: int) -> int:
    """``z = x @ w.T + b`` for few columns: x (rows, depth), w (columns, depth), b (columns,), by their addresses."""
    like = elements(REAL, x)
    size = like.itemsize
    for i in range(0, rows, DOT_ROWS):
        for j in range(0, columns, DOT_COLUMNS):
            dot_tile(
                like, x + size * i * depth, depth, w + size * j * depth, depth, depth, b + size * j,
                z + size * (i * columns + j), columns, min(DOT_ROWS, rows - i), min(DOT_COLUMNS, columns - j),
            )  # fmt: skip
    return 0


@register_jitable(**EXACT)
def _place(row: int, column: int, inputs: int) -> int:
    """Return the place of a weight in the panels."""
    return (row // PANEL * inputs + column) * PANEL + row % PANEL


def _pack(w: int, inputs: int, panels: int, rows_from: int, rows_to: int, first: int, last: int) -> int:
    """Bring columns first to before last of rows of w, (N, inputs), into panels; rows_from begins a vector of one."""
    like = elements(REAL, w)
    size = like.itemsize
    lanes = REGISTER_BYTES // size
    done = first
    if last - first >= lanes:
        # squares under each other fill whole lines of a panel, and few rows are read at once
        for upper in range(rows_from, rows_to, PANEL):
            for column in range(first, last, lanes):
                # the last square may cover columns for a second time
                k = min(column, last - lanes)
                for top in range(upper, min(rows_to, upper + PANEL), lanes):
                    source, target = w + size * (top * inputs + k), panels + size * _place(top, k, inputs)
                    transpose_square(like, source, inputs, min(lanes, rows_to - top), target, PANEL)
        done = last
    for i in range(rows_from, rows_to):
        row, panel = elements(like, w + size * i * inputs), elements(like, panels + size * _place(i, 0, inputs))
        for column in range(done, last):
            panel[column * PANEL] = row[column]
    return 0


@functools.cache
def by_address(real: Any) -> tuple[Any, Any, Any]:
    """``_product``, ``_pack`` and ``_dots`` for this type, to be called by their ``address``: they are compiled once,
    and not again with each kind of step."""
    names = globals() | {"REAL": np.dtype(real).type}

    def copy_of(function: Any, floats: Sequence[int]) -> Any:
        own = python.FunctionType(function.__code__, names, function.__name__)
        kinds = [float64 if at in floats else intp for at in range(function.__code__.co_argcount)]
        return kept_for_calls(lambda: own, own.__name__, f"{np.dtype(real).name} {COPIES} {HALF}", kinds)

    return copy_of(_product, (9, 10)), copy_of(_pack, ()), copy_of(_dots, ())
