"""The common parts of the kernels with a matrix product: the tile of a program, and the places of its elements.

``ALIGNED`` kernels are for matrices with unit column stride whose rows start at multiples of 16 bytes: the row pitch is
a multiple of 8 elements, and the columns between the width and the next multiple of 8 hold zeros. They mask by that
multiple, so that every load is a whole vector, and write zeros there. The others take any strides and touch nothing but
the matrix.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import ROW_OFFSET

# Rows of tiles that programs work on together, so that their inputs stay in the L2 cache.
GROUP: tl.constexpr = tl.constexpr(8)


def kernel(*, numbers_from: str) -> Callable[[Any], Any]:
    """Return ``triton.jit`` for a kernel whose arguments from this one to the constants are numbers; Triton compiles it
    once for all their values."""

    def compiled_once(function: Any) -> Any:
        names = list(inspect.signature(function).parameters)
        numbers = names[names.index(numbers_from) :]
        is_constant = [function.__annotations__.get(name) == "tl.constexpr" for name in numbers]
        return triton.jit(function, do_not_specialize=numbers[: is_constant.index(True)])

    return compiled_once


@triton.jit
def tile_of(program, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the tile (row, column) of a program among ceil(rows / ROWS) x ceil(cols / COLS) tiles, column by column
    within groups of tile rows (the "L2 cache optimisation" of Triton's matrix multiplication tutorial)."""
    tall = tl.cdiv(rows, ROWS)
    wide = tl.cdiv(cols, COLS)
    group = program // (GROUP * wide)
    first = group * GROUP
    height = tl.minimum(tall - first, GROUP)
    within = program - group * GROUP * wide
    return first + within % height, within // height


@triton.jit
def masked_width(width, ALIGNED: tl.constexpr):
    """Return the number of columns of a row that are loaded or stored."""
    if ALIGNED:
        width = (width + 7) // 8 * 8
    return width


@triton.jit
def row_pitch(pitch, ALIGNED: tl.constexpr):
    """Return the elements between rows; the division tells the compiler that they are a multiple of 8."""
    if ALIGNED:
        pitch = pitch // 8 * 8
    return pitch.to(tl.int64)


@triton.jit
def column_step(step, ALIGNED: tl.constexpr):
    """Return the elements between columns."""
    if ALIGNED:
        return 1
    else:
        return step.to(tl.int64)


@triton.jit
def this_batch(rows, counters, gather):
    """Return the first row number of this batch."""
    # no branch: Triton for AMD compiles none that gives a pointer
    return rows + tl.load(counters + ROW_OFFSET, mask=gather != 0, other=0)


@triton.jit
def batch_rows(rows, offsets, count, gather):
    """Return the rows of x for a batch's ``offsets``: the offsets, or with ``gather`` their entries in ``rows``.

    -1 stands for no row: it loads as zeros.
    """
    inside = offsets < count
    found = offsets.to(tl.int64)
    if gather != 0:
        found = tl.load(rows + offsets, mask=inside, other=-1)
    return tl.where(inside, found, -1)


@triton.jit
def leading(v):
    """Return v with the 11 leading bits of its significand, which TF32 keeps."""
    return (v.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, acc, rest, PRODUCT: tl.constexpr):
    """Return the sums acc + a @ b and ``rest``, float32; ``whole_sum`` makes one of both after the last product.

    ``PRODUCT`` is ``tl.dot``'s input precision, or "split": three TF32 products of the leading bits of float32 numbers
    and of the bits that follow (the "3xTF32" of CUTLASS). The small products have their own sum: infinity has no bits
    that follow, so that theirs is NaN.
    """
    if PRODUCT == "split":
        a_first, b_first = leading(a), leading(b)
        rest = tl.dot(a - a_first, b_first, rest, input_precision="tf32")
        rest = tl.dot(a_first, b - b_first, rest, input_precision="tf32")
        acc = tl.dot(a_first, b_first, acc, input_precision="tf32")
    else:
        acc = tl.dot(a, b, acc, input_precision=PRODUCT)
    return acc, rest


@triton.jit
def whole_sum(acc, rest, PRODUCT: tl.constexpr):
    """Return the sum of both results of ``product``."""
    if PRODUCT == "split":
        acc += tl.where(rest == rest, rest, 0.0)
    return acc


@triton.jit
def described_product(
    a, b, row, col, begin, end, A_TURNED: tl.constexpr, B_TURNED: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, PRODUCT: tl.constexpr,
):  # fmt: skip
    """Return the tile (ROWS, COLS) at ``row``, ``col`` of a @ b, float32, over the reduction from ``begin`` to ``end``.

    a and b are tensor descriptors: their blocks come through the tensor memory accelerator of a card that has one, and
    hold zeros outside the matrices. ``A_TURNED``, ``B_TURNED``: the product is of the transposed matrix.
    """
    acc = tl.zeros((ROWS, COLS), tl.float32)
    rest = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(begin, end, DEPTH):
        if A_TURNED:
            left = tl.trans(a.load([start, row]))
        else:
            left = a.load([row, start])
        if B_TURNED:
            right = tl.trans(b.load([col, start]))
        else:
            right = b.load([start, col])
        acc, rest = product(left, right, acc, rest, PRODUCT)
    return whole_sum(acc, rest, PRODUCT)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the left and the right half of a tile (ROWS, COLS)."""
    return tl.split(tl.permute(tl.reshape(tile, (ROWS, 2, COLS // 2)), (0, 2, 1)))


@triton.jit
def part_of(tile, piece: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return one part of a tile (ROWS, COLS) that is cut into 1, 2, 4 or 8 parts side by side.

    An epilogue runs part by part, so that its loads and results fit the registers beside the sums: the stores of one
    part keep the compiler from moving the loads of the next before them.
    """
    tl.static_assert(PARTS == 1 or PARTS == 2 or PARTS == 4 or PARTS == 8, "a tile is cut into 1, 2, 4 or 8 parts")
    if PARTS > 1:
        left, right = halves(tile, ROWS, COLS)
        if piece < PARTS // 2:
            tile = left
        else:
            tile = right
    if PARTS > 2:
        left, right = halves(tile, ROWS, COLS // 2)
        if piece % (PARTS // 2) < PARTS // 4:
            tile = left
        else:
            tile = right
    if PARTS > 4:
        left, right = halves(tile, ROWS, COLS // 4)
        if piece % 2 == 0:
            tile = left
        else:
            tile = right
    return tile
