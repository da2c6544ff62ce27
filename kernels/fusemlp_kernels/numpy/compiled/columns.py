"""A first layer of codes: the sums of weights that it adds up, its pre-activation, and the gradient by its weights.

``coding`` says what codes stand for. Weights are (K, N): those of an input lie side by side. The sums have their rows,
but of a column in pieces the sums of the rows before each edge. A row of the batch adds one of them for a word, and two
neighbours for a number in pieces, whatever the number of inputs.

The gradient by the weights of an input is a sum of rows of dz, those with its code in rising order: so the bits do not
depend on threads. Of pieces it is the sum over all rows beyond the piece, run from the last piece to the first. From
the first, by subtraction, exact zeros would become 1e-8, of which Adam makes full steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.compiler import ELEMENTWISE, EXACT, block, clear, column_at, elements, part


@register_jitable(**ELEMENTWISE)
def _add(total: Any, row: Any, factor: Any, count: int) -> None:
    for j in range(np.uintp(count)):
        total[j] += factor * row[j]


@register_jitable(**ELEMENTWISE)
def _add_four(total: Any, a: Any, b: Any, c: Any, d: Any, factors: Any, count: int) -> None:
    """Add four rows, each times its factor, one after another: the total is read and written once."""
    at_a, at_b, at_c, at_d = factors[0], factors[1], factors[2], factors[3]
    for j in range(np.uintp(count)):
        total[j] = (((total[j] + at_a * a[j]) + at_b * b[j]) + at_c * c[j]) + at_d * d[j]


@register_jitable(**EXACT)
def _add_rows(total: Any, like: Any, rows: Any, factors: Any, entries: int, width: int) -> None:
    """Add the rows at some addresses, each times its factor."""
    whole = entries // 4 * 4
    for at in range(0, whole, 4):
        a, b = elements(like, rows[at]), elements(like, rows[at + 1])
        c, d = elements(like, rows[at + 2]), elements(like, rows[at + 3])
        _add_four(total, a, b, c, d, part(factors, at), width)
    for at in range(whole, entries):
        _add(total, elements(like, rows[at]), factors[at], width)


@register_jitable(**ELEMENTWISE)
def _store(out: Any, total: Any, count: int, adds: bool) -> None:
    if adds:
        for j in range(np.uintp(count)):
            out[j] += total[j]
    else:
        for j in range(np.uintp(count)):
            out[j] = total[j]


@register_jitable(**ELEMENTWISE)
def _sum_of(out: Any, before: Any, row: Any, count: int) -> None:
    for j in range(np.uintp(count)):
        out[j] = before[j] + row[j]


@register_jitable(**EXACT)
def sum_columns(call: Any, like: Any, top: int, bottom: int) -> None:
    """The sums of the columns whose inputs lie from ``top`` to before ``bottom``."""
    width = call.k
    for index in range(call.columns):
        column = column_at(call.coding, index)
        if column.first < top or column.first >= bottom:
            continue
        sums = column.sums
        if column.kind == t.PIECES:
            clear(block(like, call.panels, sums, width), width)
        for j in range(column.inputs):
            row = block(like, call.w, column.first + j, width)
            if column.kind == t.PIECES:
                before, after = block(like, call.panels, sums + j, width), block(like, call.panels, sums + j + 1, width)
                _sum_of(after, before, row, width)
            else:
                _store(block(like, call.panels, sums + j, width), row, width, False)


@register_jitable(**EXACT)
def add_columns(call: Any, head: Any, like: Any, first: int, count: int, task: int) -> None:
    """The pre-activations of ``count`` rows of codes from ``first`` on."""
    width, size, bias = call.n, like.itemsize, elements(like, call.b)
    rows, factors = elements(np.int64, head.order + 8 * head.order_row * task), _totals(head, like, task)
    for i in range(first, first + count):
        codes, z = block(like, call.x, i, call.slots), block(like, call.z, i, width)
        _store(z, bias, width, False)
        entries = 0
        for index in range(call.columns):
            column = column_at(call.coding, index)
            slot, sums = column.slot, call.panels + size * width * column.sums
            if column.kind == t.PIECES:
                rows[entries] = sums + size * width * int(codes[slot])
                rows[entries + 1] = rows[entries] + size * width
                factors[entries], factors[entries + 1] = 1 - codes[slot + 1], codes[slot + 1]
                entries += 2
            elif column.kind == t.NUMBERS:
                for j in range(column.inputs):
                    rows[entries], factors[entries] = sums + size * width * j, codes[slot + j]
                    entries += 1
            elif column.kind == t.WORD:
                if codes[slot] >= 0:
                    rows[entries], factors[entries] = sums + size * width * int(codes[slot]), 1
                    entries += 1
            else:
                for pair in range(slot, slot + column.slots, 2):
                    if codes[pair] >= 0:
                        rows[entries], factors[entries] = sums + size * width * int(codes[pair]), codes[pair + 1]
                        entries += 1
        _add_rows(z, like, rows, factors, entries, width)


@register_jitable(**EXACT)
def _sort(call: Any, like: Any, column: Any, count: int, ends: Any, order: Any) -> None:
    """Order the cells of a column by their code, and of one code by row; ``ends`` (inputs + 1,) are those of the codes.

    Cell ``pair`` of row i is number i * pairs + pair.
    """
    pairs = column.slots // 2 if column.kind == t.BAG else 1
    for code in range(column.inputs + 1):
        ends[code] = 0
    for i in range(count):
        codes = part(block(like, call.x, i, call.slots), column.slot)
        for pair in range(pairs):
            if codes[2 * pair] >= 0:
                ends[int(codes[2 * pair]) + 1] += 1
    for code in range(column.inputs):
        ends[code + 1] += ends[code]
    for i in range(count):
        codes = part(block(like, call.x, i, call.slots), column.slot)
        for pair in range(pairs):
            if codes[2 * pair] >= 0:
                code = int(codes[2 * pair])
                order[ends[code]] = i * pairs + pair
                ends[code] += 1


@register_jitable(**EXACT)
def _gradient_of_column(
    call: Any, like: Any, column: Any, count: int, adds: bool, ends: Any, factors: Any, total: Any, beyond: Any
) -> None:
    width, size, slot, real = call.k, like.itemsize, column.slot, like.dtype.type
    pairs = column.slots // 2 if column.kind == t.BAG else 1
    rows = part(ends, column.inputs + 1)
    if column.kind != t.NUMBERS:
        _sort(call, like, column, count, ends, rows)
    clear(beyond, width)
    for code in range(column.inputs - 1, -1, -1):
        start, end = 0, count
        if column.kind != t.NUMBERS:
            start, end = ends[code - 1] if code else 0, ends[code]
        for at in range(start, end):
            cell = at if column.kind == t.NUMBERS else rows[at]
            i = cell // pairs
            codes = part(block(like, call.x, i, call.slots), slot)
            if column.kind == t.WORD:
                factors[at - start] = 1
            elif column.kind == t.NUMBERS:
                factors[at - start] = codes[code]
            else:
                factors[at - start] = codes[2 * (cell - i * pairs) + 1]
            rows[at] = call.dz + size * width * i
        _store(total, beyond, width, False)
        _add_rows(total, like, part(rows, start), factors, end - start, width)
        if column.kind == t.PIECES:
            for at in range(end - start):
                factors[at] = real(1.0)
            _add_rows(beyond, like, part(rows, start), factors, end - start, width)
        _store(block(like, call.out, column.first + code, width), total, width, adds)


@register_jitable(**EXACT)
def _totals(head: Any, like: Any, task: int) -> Any:
    return elements(like, head.totals + like.itemsize * head.totals_row * task)


@register_jitable(**EXACT)
def gradient_of_columns(call: Any, head: Any, like: Any, piece: Any, count: int, adds: bool, task: int) -> None:
    """The gradient by the weights of a piece's columns, whose rows are in ``out``, for ``count`` rows of the batch.

    With ``adds`` it is added to what is there.
    """
    ends = elements(np.int64, head.order + 8 * head.order_row * task)
    factors = _totals(head, like, task)
    total = part(factors, head.order_row)
    beyond = part(total, call.k)
    for index in range(call.columns):
        column = column_at(call.coding, index)
        if piece.top <= column.first and column.first < piece.bottom:
            _gradient_of_column(call, like, column, count, adds, ends, factors, total, beyond)
