"""A first layer of codes: the sums of weights that it adds up, its pre-activation, and the gradient by its weights.

``coding`` says what codes stand for. Weights are (K, N): those of an input lie side by side. The sums have their rows,
but of a column in pieces the sums of the rows before each edge. A row of the batch adds one of them for a word, and two
neighbours for a number in pieces, whatever the number of inputs.

The gradient by the weights of an input is a sum of rows of dz, those with its code in rising order: so the bits do not
depend on threads. Of pieces it is the sum over all rows beyond the piece, run from the last piece to the first. From
the first, by subtraction, exact zeros would become 1e-8, of which Adam makes full steps.

Members that share weights multiply the inputs by factors r of their own. A member's sums are of its weights ``r * w``.
From its gradient by these come that by w, ``r`` times it, and that by r, its products with w: no gradient by the inputs
is needed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.compiler import (
    ELEMENTWISE,
    EXACT,
    block,
    clear,
    column_at,
    elements,
    part,
)
from fusemlp_kernels.numpy.compiled.vectors import sum_of_products


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
def _sum_rows(total: Any, before: Any, like: Any, rows: Any, factors: Any, entries: int, width: int) -> None:
    """The sum of ``before``, other memory, and the rows at some addresses, each times its factor, in their order."""
    if entries == 0:
        _store(total, before, like.dtype.type(1.0), width)
        return
    _sum_of(total, before, elements(like, rows[0]), factors[0], width)
    fours = 1 + (entries - 1) // 4 * 4
    for at in range(1, fours, 4):
        a, b = elements(like, rows[at]), elements(like, rows[at + 1])
        c, d = elements(like, rows[at + 2]), elements(like, rows[at + 3])
        _add_four(total, a, b, c, d, part(factors, at), width)
    for at in range(fours, entries):
        _add(total, elements(like, rows[at]), factors[at], width)


@register_jitable(**ELEMENTWISE)
def _sum_of_share(total: Any, whole: Any, row: Any, share: Any, count: int) -> None:
    """The sum of ``whole`` and a share of a row, all of which is then added to ``whole``."""
    for j in range(np.uintp(count)):
        total[j] = whole[j] + share * row[j]
        whole[j] += row[j]


@register_jitable(**ELEMENTWISE)
def _add_four_shares(total: Any, whole: Any, a: Any, b: Any, c: Any, d: Any, shares: Any, count: int) -> None:
    """Add a share of each of four rows to one total, and all of them to the other."""
    of_a, of_b, of_c, of_d = shares[0], shares[1], shares[2], shares[3]
    for j in range(np.uintp(count)):
        total[j] = (((total[j] + of_a * a[j]) + of_b * b[j]) + of_c * c[j]) + of_d * d[j]
        whole[j] = (((whole[j] + a[j]) + b[j]) + c[j]) + d[j]


@register_jitable(**ELEMENTWISE)
def _add_share(total: Any, whole: Any, row: Any, share: Any, count: int) -> None:
    for j in range(np.uintp(count)):
        total[j] += share * row[j]
        whole[j] += row[j]


@register_jitable(**EXACT)
def _sum_shares(total: Any, whole: Any, like: Any, rows: Any, shares: Any, entries: int, width: int) -> None:
    """The sum of ``whole`` and a share of the rows at some addresses, all of which are then added to ``whole``."""
    if entries == 0:
        _store(total, whole, like.dtype.type(1.0), width)
        return
    _sum_of_share(total, whole, elements(like, rows[0]), shares[0], width)
    fours = 1 + (entries - 1) // 4 * 4
    for at in range(1, fours, 4):
        a, b = elements(like, rows[at]), elements(like, rows[at + 1])
        c, d = elements(like, rows[at + 2]), elements(like, rows[at + 3])
        _add_four_shares(total, whole, a, b, c, d, part(shares, at), width)
    for at in range(fours, entries):
        _add_share(total, whole, elements(like, rows[at]), shares[at], width)


@register_jitable(**ELEMENTWISE)
def _store(out: Any, total: Any, factor: Any, count: int) -> None:
    for j in range(np.uintp(count)):
        out[j] = factor * total[j]


@register_jitable(**ELEMENTWISE)
def _sum_of(out: Any, before: Any, row: Any, factor: Any, count: int) -> None:
    for j in range(np.uintp(count)):
        out[j] = before[j] + factor * row[j]


@register_jitable(**EXACT)
def _sums_of_all(call: Any) -> int:
    """The rows of sums that all columns have."""
    last = column_at(call.coding, call.columns - 1)
    return int(last.sums + last.inputs + (1 if last.kind == t.PIECES else 0))


@register_jitable(**EXACT)
def sum_columns(call: Any, like: Any, top: int, bottom: int) -> None:
    """The sums of the columns whose inputs lie from ``top`` to before ``bottom``, of each member."""
    width, factor = call.k, like.dtype.type(1.0)
    for member in range(call.members if call.by_r else 1):
        start = member * _sums_of_all(call)
        for index in range(call.columns):
            column = column_at(call.coding, index)
            if column.first < top or column.first >= bottom:
                continue
            sums = start + column.sums
            if column.kind == t.PIECES:
                clear(block(like, call.panels, sums, width), width)
            for j in range(column.inputs):
                row = block(like, call.w, column.first + j, width)
                if call.by_r:
                    factor = block(like, call.by_r, member, call.n)[column.first + j]
                if column.kind == t.PIECES:
                    before = block(like, call.panels, sums + j, width)
                    _sum_of(block(like, call.panels, sums + j + 1, width), before, row, factor, width)
                else:
                    _store(block(like, call.panels, sums + j, width), row, factor, width)


@register_jitable(**EXACT)
def add_columns(call: Any, head: Any, like: Any, first: int, count: int, task: int) -> None:
    """The pre-activations of ``count`` rows of codes from ``first`` on, those of one member after another."""
    members = call.members if call.by_r else 1
    for member in range(members):
        panels = call.panels
        if call.by_r:
            panels += like.itemsize * call.n * _sums_of_all(call) * member
        for i in range(first + member, first + count, members):
            _add_columns(call, head, like, panels, i, task)


@register_jitable(**EXACT)
def _add_columns(call: Any, head: Any, like: Any, panels: int, i: int, task: int) -> None:
    """The pre-activation of a row of codes by the sums at an address."""
    width, size, bias = call.n, like.itemsize, elements(like, call.b)
    rows, factors = elements(np.int64, head.order + 8 * head.order_row * task), _totals(head, like, task)
    codes, z = block(like, call.x, i, call.slots), block(like, call.z, i, width)
    entries = 0
    for index in range(call.columns):
        column = column_at(call.coding, index)
        slot, sums = column.slot, panels + size * width * column.sums
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
    _sum_rows(z, bias, like, rows, factors, entries, width)


@register_jitable(**EXACT)
def _sort(
    cells: Any, slots: int, pairs: int, values: bool, inputs: int, count: int, dz: int, step: int, ends: Any, rows: Any,
    factors: Any,
) -> None:  # fmt: skip
    """Order the cells of a column by their code, and of one code by row: of each the address of its row of dz, and the
    value after its code, or 1 without ``values``.

    ``ends`` (inputs + 1,) are those of the codes; ``step`` the bytes of a row of dz.
    """
    for code in range(inputs + 1):
        ends[code] = 0
    for i in range(count):
        for at in range(i * slots, i * slots + 2 * pairs, 2):
            if cells[at] >= 0:
                ends[int(cells[at]) + 1] += 1
    for code in range(inputs):
        ends[code + 1] += ends[code]
    for i in range(count):
        for at in range(i * slots, i * slots + 2 * pairs, 2):
            if cells[at] >= 0:
                code = int(cells[at])
                place = ends[code]
                rows[place] = dz + step * i
                factors[place] = cells[at + 1] if values else 1
                ends[code] = place + 1


@register_jitable(**EXACT)
def _gradient_of_column(
    call: Any, like: Any, column: Any, count: int, adds: bool, ends: Any, factors: Any, apart: Any, beyond: Any
) -> None:
    members = call.members if call.by_r else 1
    width, kind, inputs, factor = call.k, column.kind, column.inputs, like.dtype.type(1.0)
    size, slots, each = like.itemsize * width, call.slots * members, count // members
    cells, rows = part(elements(like, call.x), column.slot), part(ends, inputs + 1)
    if kind != t.NUMBERS:
        pairs = column.slots // 2 if kind == t.BAG else 1
        _sort(cells, slots, pairs, kind != t.WORD, inputs, each, call.dz, size * members, ends, rows, factors)
    for member in range(members):
        if member and kind != t.NUMBERS:
            # a member's rows lie after those of the member before
            for at in range(ends[inputs - 1]):
                rows[at] += size
        clear(beyond, width)
        for code in range(inputs - 1, -1, -1):
            at = column.first + code
            start, out = ends[code - 1] if code and kind != t.NUMBERS else 0, block(like, call.out, at, width)
            # a sum of its own, where it is multiplied or added to what is there
            total = apart if adds or call.by_r else out
            if kind == t.NUMBERS:
                for i in range(each):
                    rows[i] = call.dz + size * (i * members + member)
                    factors[i] = cells[i * slots + code]
                _sum_rows(total, beyond, like, rows, factors, each, width)
            elif kind == t.PIECES:
                _sum_shares(total, beyond, like, part(rows, start), part(factors, start), ends[code] - start, width)
            else:
                _sum_rows(total, beyond, like, part(rows, start), part(factors, start), ends[code] - start, width)
            if call.by_r:
                factor = block(like, call.by_r, member, call.n)[at]
                block(like, call.sum_r, member, call.n)[at] = sum_of_products(
                    total, block(like, call.w, at, width), width
                )
            if adds or member:
                _add(out, total, factor, width)
            elif call.by_r:
                _store(out, total, factor, width)


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
    apart = part(factors, head.order_row)
    beyond = part(apart, call.k)
    for index in range(call.columns):
        column = column_at(call.coding, index)
        if piece.top <= column.first and column.first < piece.bottom:
            _gradient_of_column(call, like, column, count, adds, ends, factors, apart, beyond)
