"""Matrix products, cut into tiles; and weights in panels, as the forward pass of layers with many outputs reads them.

A panel holds PANEL rows of a weight matrix (N, K), transposed: (K, PANEL), any numbers where there is no row.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import float64, intp

from fusemlp_kernels.numpy.compiled.compiler import elements, kept_for_calls
from fusemlp_kernels.numpy.compiled.tables import PANEL
from fusemlp_kernels.numpy.compiled.tiles import (
    DOT_COLUMNS,
    DOT_ROWS,
    REGISTER_BYTES,
    TILE_ROWS,
    TILE_VECTORS,
    dot_tile,
    narrow_tile,
    short_tile,
    transpose_square,
    whole_tile,
    wide_tile,
)

# The type of the elements; each type has a copy of these functions.
REAL: Any = np.float32


def _product(
    a: int, a_row: int, a_step: int, b: int, b_panel: int, b_step: int, depth: int, start: int,
    start_step: int, alpha: float, beta: float, c: int, c_row: int, rows: int, columns: int,
) -> int:  # fmt: skip
    """``c = alpha * (start + a @ b) + beta * c``: c (rows, columns), a (rows, depth), b (depth, columns).

    a, b, c and start are addresses, the others strides in elements: b_panel from the first PANEL columns of b to the
    next. The same row of start is added to all rows; without start_step it is PANEL numbers, again and again.
    """
    like = elements(REAL, a)
    real, size = like.dtype.type, like.itemsize
    lanes = REGISTER_BYTES // size
    width = TILE_VECTORS * lanes
    scale, keep = real(alpha), real(beta)
    for j in range(0, columns, width):
        left = columns - j
        # where a tile of columns begins
        panel, inside = j // PANEL, j % PANEL
        b_at, c_at = b + size * (panel * b_panel + inside), c + size * j
        first = start + size * j * start_step
        for i in range(0, rows, TILE_ROWS):
            below = min(TILE_ROWS, rows - i)
            a_at, to = a + size * i * a_row, c_at + size * i * c_row
            tile = a_at, a_row, a_step, b_at, b_step, depth, first, scale, keep, to, c_row, below, left
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


def _pack(w: int, inputs: int, panels: int, rows_from: int, rows_to: int, first: int, last: int) -> int:
    """Bring columns first to before last of some rows of w, (N, inputs), into panels; rows_from begins a panel."""
    like = elements(REAL, w)
    size = like.itemsize
    lanes = REGISTER_BYTES // size
    for top in range(rows_from, rows_to, lanes):
        source = w + size * top * inputs
        target = panels + size * (top // PANEL * inputs * PANEL + top % PANEL)
        rows = min(lanes, rows_to - top)
        k = first
        while k < last and last - first >= lanes:
            # the last square may cover columns for a second time
            k = min(k, last - lanes)
            transpose_square(like, source + size * k, inputs, rows, target + size * k * PANEL, PANEL)
            k += lanes
        for i in range(rows):
            row, panel = elements(like, source + size * i * inputs), elements(like, target + size * i)
            for column in range(k, last):
                panel[column * PANEL] = row[column]
    return 0


@functools.cache
def by_address(real: Any) -> tuple[Any, Any, Any]:
    """``_product``, ``_pack`` and ``_dots`` for this type, to be called by their ``address``: they are compiled once,
    and not again with each kind of step."""
    names = globals() | {"REAL": np.dtype(real).type}

    def copy_of(function: Any, floats: Sequence[int]) -> Any:
        own = types.FunctionType(function.__code__, names, function.__name__)
        kinds = [float64 if at in floats else intp for at in range(function.__code__.co_argcount)]
        return kept_for_calls(own, np.dtype(real).name, kinds)

    return copy_of(_product, (9, 10)), copy_of(_pack, ()), copy_of(_dots, ())
