"""Matrix products of bfloat16 numbers, summed in float32, in the tile registers of AMX.

Operands and results are float32 in memory. Both operands are rounded to bfloat16, to the nearest, ties to even, when
they are brought into the order that tiles read. A tile has 16 rows of 64 bytes: 16 x 32 numbers of a; of b 16 pairs of
rows by 16 columns, the numbers of a pair side by side; 16 x 16 sums of c. Four of c are computed at once. An element
is the sum over blocks of 32 numbers, in their order, of the sums of the 16 products with even and with odd places:
TDPBF16PS, VCVTNE2PS2BF16 in volume 2 of the Intel 64 and IA-32 Architectures Software Developer's Manual. So the bits
do not depend on how a product is cut into tiles. Numbers below the smallest normal one count as zero.

A panel holds PANEL rows of a weight matrix as b: pairs of numbers of a row, one row's after another's.
"""

from __future__ import annotations

import functools
from typing import Any

import llvmlite.binding
import numpy as np
from llvmlite import ir
from numba import float64, intp, types
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled import products
from fusemlp_kernels.numpy.compiled.compiler import EXACT, elements, emits, intrinsic, kept_for_calls
from fusemlp_kernels.numpy.compiled.products import row_address, transpose_square, transposed
from fusemlp_kernels.numpy.compiled.tables import PANEL
from fusemlp_kernels.numpy.compiled.vectors import INDEX, VectorCode, number
from fusemlp_kernels.numpy.plan import Cut

# Rows of a tile, and numbers of a row of a; bytes of a tile; rows and columns of four tiles of c.
ROWS, DEEP, TILE, BLOCK = 16, 32, 1024, 32
# Operands are packed anew for each task, and so tasks are larger than those of other products.
CUT = Cut(tall=64, most_tasks=16, dots=False)
# The memory of a thread: the configuration of eight tiles, the sums of a block, pairs to be transposed, zeros; strips
# of b, each BLOCK numbers wide, then rows of a.
SUMS = 64
PAIRS = SUMS + 4 * BLOCK * BLOCK
ZEROS = PAIRS + TILE
B, B_BYTES = ZEROS + 4 * BLOCK, 1 << 20
A, A_BYTES = B + B_BYTES, 1 << 20
ROOM_BYTES = max(A + A_BYTES, products.ROOM_BYTES)
# The deepest sum of one pass: a strip of b fills the memory of b.
DEEPEST = B_BYTES // (2 * BLOCK)

# Tiles 0 to 3 are those of c, 4 and 5 of a, 6 and 7 of b.
_BLOCK_OF_C = """
mov $0, %r8
mov $1, %r9
mov $2, %r10
mov $3, %r11
mov $$64, %rax
mov $$128, %rdx
tilezero %tmm0
tilezero %tmm1
tilezero %tmm2
tilezero %tmm3
test %r11, %r11
jz 2f
1:
tileloadd (%r8,%rax,1), %tmm4
tileloadd (%r10,%rdx,1), %tmm6
tdpbf16ps %tmm6, %tmm4, %tmm0
tileloadd 64(%r10,%rdx,1), %tmm7
tdpbf16ps %tmm7, %tmm4, %tmm1
tileloadd (%r9,%rax,1), %tmm5
tdpbf16ps %tmm6, %tmm5, %tmm2
tdpbf16ps %tmm7, %tmm5, %tmm3
add $$1024, %r8
add $$1024, %r9
add $$2048, %r10
dec %r11
jnz 1b
2:
tilestored %tmm0, ($4,%rdx,1)
tilestored %tmm1, 64($4,%rdx,1)
tilestored %tmm2, 2048($4,%rdx,1)
tilestored %tmm3, 2112($4,%rdx,1)
"""


def _assembly(builder: Any, text: str, constraints: str, result: Any, *arguments: Any, effects: bool = True) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.asm(kind, text.strip(), constraints, arguments, effects)


@emits(types.void, *[types.intp] * 5)
def multiply_tiles(builder: Any, upper: Any, lower: Any, b: Any, count: Any, sums: Any) -> None:
    """Write ``sums = a @ b`` (BLOCK, BLOCK): ``count`` tiles of a's upper rows, and of its lower ones, a strip of b."""
    changed = "~{rax},~{rdx},~{r8},~{r9},~{r10},~{r11},~{memory},~{flags}"
    _assembly(builder, _BLOCK_OF_C, f"r,r,r,r,r,{changed}", ir.VoidType(), upper, lower, b, count, sums)


@emits(types.void, types.intp)
def configure(builder: Any, address: Any) -> None:
    """Use the tile registers as the configuration at an address says."""
    _assembly(builder, "ldtilecfg ($0)", "r,~{memory}", ir.VoidType(), address)


@emits(types.void)
def release(builder: Any) -> None:
    """Leave the tile registers empty, so that the system need not save them."""
    _assembly(builder, "tilerelease", "~{memory}", ir.VoidType())


def _rounded(builder: Any, low: Any, high: Any) -> Any:
    """16 numbers and 16 others as bfloat16."""
    words = ir.VectorType(ir.IntType(16), 2 * ROWS)
    return _assembly(builder, "vcvtne2ps2bf16 $2, $1, $0", "=v,v,v", words, high, low, effects=False)


def _rounding(paired: bool, masked: bool) -> Any:
    """Round 16 numbers at each of two addresses, ``masked`` where only the first ``count`` are there.

    They become pairs of one and one, or a row of the first and then the second ones.
    """

    def typed(typingctx: Any, like: Any, first: Any, second: Any, count: Any, target: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _, first, second, count, target = arguments
            to = VectorCode(context, builder, like.dtype, ROWS)
            counts = count, count if paired else builder.sub(count, number(ROWS))
            masks = [to.mask(each) if masked else None for each in counts]
            words = _rounded(builder, *(to.load(at, mask) for at, mask in zip((first, second), masks, strict=True)))
            if paired:
                order = [lane + ROWS * half for lane in range(ROWS) for half in (0, 1)]
                pick = ir.Constant(ir.VectorType(INDEX, 2 * ROWS), order)
                words = builder.shuffle_vector(words, words, pick)
            builder.store(words, to.at(target, words.type)).align = 64
            return context.get_dummy_value()

        return types.void(like, *[types.intp] * 4), code

    return intrinsic(typed)


round_pairs, round_some_pairs = _rounding(True, False), _rounding(True, True)
round_row, round_some_row = _rounding(False, False), _rounding(False, True)


@intrinsic
def pack_rows(typingctx: Any, like: Any, source: Any, stride: Any, rows: Any, count: Any, target: Any) -> Any:
    """Write ``count`` numbers, up to DEEP, of each of up to 16 rows as a part of a panel; strides in elements."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, source, stride, rows, count, target = arguments
        to, stride = VectorCode(context, builder, like.dtype, ROWS), builder.mul(stride, number(4))
        masks = to.mask(count), to.mask(builder.sub(count, number(ROWS)))
        lines = []
        for i in range(ROWS):
            first = row_address(builder, source, stride, i, rows)
            halves = (to.load(builder.add(first, number(64 * at)), masks[at]) for at in (0, 1))
            lines.append(builder.bitcast(_rounded(builder, *halves), to.vector))
        for i, pairs in enumerate(transposed(builder, lines)):
            with builder.if_then(builder.icmp_signed("<", number(2 * i), count)):
                to.store(pairs, builder.add(target, number(4 * PANEL * i)))
        return context.get_dummy_value()

    return types.void(like, *[types.intp] * 5), code


@intrinsic
def store_row(typingctx: Any, like: Any, sums: Any, start: Any, alpha: Any, beta: Any, c: Any, columns: Any) -> Any:
    """``c = alpha * (start + sums) + beta * c`` for a row of a block; with beta 0 c may be anything."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, sums, start, alpha, beta, c, columns = arguments
        to = VectorCode(context, builder, like.dtype, ROWS)
        nothing, alphas, betas = ir.Constant(to.vector, None), to.everywhere(alpha), to.everywhere(beta)
        forgets = builder.fcmp_ordered("==", beta, ir.Constant(to.element, 0.0))
        for first in range(0, BLOCK, ROWS):
            mask = to.mask(builder.sub(columns, number(first)))
            of_start, of_sums, of_c = (builder.add(address, number(4 * first)) for address in (start, sums, c))
            total = builder.fadd(to.load(of_start, mask), to.load(of_sums, mask))
            addend = builder.select(forgets, nothing, builder.fmul(betas, to.load(of_c, mask)))
            to.store(to.sum_of_product(alphas, total, addend), of_c, mask)
        return context.get_dummy_value()

    words = types.intp, types.intp, like.dtype, like.dtype, types.intp, types.intp
    return types.void(like, *words), code


@register_jitable(**EXACT)
def _prepare(like: Any, room: int) -> None:
    """Write the configuration of the tiles, and zeros."""
    words, zeros = elements(np.int64, room), elements(like, room + ZEROS)
    for i in range(8):
        words[i] = 0
    # palette 1; the bytes of a row, 64, and the rows, 16, of each of eight tiles
    words[0] = 1
    words[2] = words[3] = 0x0040004000400040
    words[6] = 0x1010101010101010
    for i in range(BLOCK):
        zeros[i] = 0


@register_jitable(**EXACT)
def _pack_b(like: Any, b: int, b_step: int, depth: int, columns: int, zeros: int, to: int, strip: int) -> None:
    """Bring rows of b into strips, ``strip`` bytes apart, with zeros after the last row."""
    for k in range(0, -(-depth // DEEP) * DEEP, 2):
        first, second = b + 4 * k * b_step, b + 4 * (k + 1) * b_step
        at, whole = to + 64 * k, columns // BLOCK * BLOCK * (k + 1 < depth)
        for j in range(0, whole, BLOCK):
            round_pairs(like, first + 4 * j, second + 4 * j, 0, at)
            round_pairs(like, first + 4 * (j + ROWS), second + 4 * (j + ROWS), 0, at + 64)
            at += strip
        for j in range(whole, columns, ROWS):
            here = first + 4 * j if k < depth else zeros
            round_some_pairs(like, here, second + 4 * j if k + 1 < depth else zeros, columns - j, at)
            at += 64 if j % BLOCK == 0 else strip - 64


@register_jitable(**EXACT)
def _pack_a(like: Any, a: int, a_row: int, depth: int, rows: int, zeros: int, to: int) -> None:
    """Bring rows of a, of numbers that lie together, into tiles, with zeros after the last row."""
    blocks = -(-depth // DEEP)
    for i in range(0, -(-rows // BLOCK) * BLOCK):
        at, source = to + TILE * (i // ROWS * blocks) + 64 * (i % ROWS), a + 4 * i * a_row
        for k in range(0, depth, DEEP):
            here = source + 4 * k
            if i >= rows:
                round_row(like, zeros, zeros, 0, at)
            elif depth - k >= DEEP:
                round_row(like, here, here + 4 * ROWS, 0, at)
            else:
                round_some_row(like, here, here + 4 * ROWS, depth - k, at)
            at += TILE


@register_jitable(**EXACT)
def _pack_columns_of_a(
    like: Any, a: int, a_step: int, depth: int, rows: int, zeros: int, to: int, pairs: int
) -> None:  # fmt: skip
    """Bring rows of a into tiles whose columns lie together: ``pairs`` is memory for one of them."""
    blocks = -(-depth // DEEP)
    for k in range(0, depth, DEEP):
        for i in range(0, -(-rows // BLOCK) * BLOCK, ROWS):
            for j in range(0, DEEP, 2):
                first = a + 4 * ((k + j) * a_step + i) if k + j < depth and i < rows else zeros
                second = a + 4 * ((k + j + 1) * a_step + i) if k + j + 1 < depth and i < rows else zeros
                if rows - i >= ROWS:
                    round_pairs(like, first, second, 0, pairs + 32 * j)
                else:
                    round_some_pairs(like, first, second, rows - i, pairs + 32 * j)
            transpose_square(like, pairs, ROWS, ROWS, to + TILE * (i // ROWS * blocks + k // DEEP), ROWS)


@register_jitable(**EXACT)
def _copy_panel(like: Any, panel: int, depth: int, columns: int, to: int) -> None:
    """Copy columns of a panel of fewer pairs than a tile of b has, with zeros after them."""
    source, strip = elements(like, panel), elements(like, to)
    for i in range(ROWS):
        for j in range(columns):
            strip[i * BLOCK + j] = source[i * BLOCK + j] if 2 * i < depth else 0


@register_jitable(**EXACT)
def _strips(
    like: Any, b: int, strip: int, start: int, start_step: int, alpha: Any, beta: Any, c: int, c_row: int, rows: int,
    columns: int, blocks: int, room: int,
) -> None:  # fmt: skip
    """Write the columns of c that strips of b, ``strip`` bytes apart, give with the rows of a in ``room``."""
    for j in range(0, columns, BLOCK):
        for i in range(0, rows, BLOCK):
            upper = room + A + 2 * DEEP * blocks * i
            multiply_tiles(upper, upper + TILE * blocks, b, blocks, room + SUMS)
            for row in range(min(BLOCK, rows - i)):
                store_row(
                    like, room + SUMS + 4 * BLOCK * row, start + 4 * j * start_step, alpha, beta,
                    c + 4 * ((i + row) * c_row + j), columns - j,
                )  # fmt: skip
        b += strip


def _product(
    a: int, a_row: int, a_step: int, b: int, b_panel: int, b_step: int, depth: int, start: int,
    start_step: int, alpha: float, beta: float, c: int, c_row: int, rows: int, columns: int, room: int,
) -> int:  # fmt: skip
    """``c = alpha * (start + a @ b) + beta * c``, as in ``products``; b is in panels where start has a step."""
    like = elements(np.float32, a)
    scale, keep, zeros, in_panels = np.float32(alpha), np.float32(beta), room + ZEROS, start_step != 0
    _prepare(like, room)
    configure(room)
    # without a sum one pass writes what is left of c
    for front in range(0, max(depth, 1), DEEPEST):
        deep = min(depth - front, DEEPEST)
        blocks = -(-deep // DEEP)
        strip = 2 * BLOCK * DEEP * blocks
        most_rows = A_BYTES // (2 * DEEP * max(1, blocks)) // BLOCK * BLOCK
        most_columns = B_BYTES // max(1, strip) * BLOCK
        for top in range(0, rows, most_rows):
            height, to = min(rows - top, most_rows), c + 4 * top * c_row
            if a_step == 1:
                _pack_a(like, a + 4 * (top * a_row + front), a_row, deep, height, zeros, room + A)
            else:
                first = a + 4 * (top + front * a_step)
                _pack_columns_of_a(like, first, a_step, deep, height, zeros, room + A, room + PAIRS)
            if in_panels and depth > ROWS:
                _strips(
                    like, b + 64 * front, 4 * b_panel, start, start_step, scale, keep, to, c_row, height, columns,
                    blocks, room,
                )  # fmt: skip
                continue
            for left in range(0, columns, most_columns):
                width = min(columns - left, most_columns)
                if in_panels:
                    for j in range(0, width, BLOCK):
                        panel = b + 4 * ((left + j) // BLOCK) * b_panel
                        _copy_panel(like, panel, deep, min(BLOCK, width - j), room + B + strip * (j // BLOCK))
                else:
                    _pack_b(like, b + 4 * (front * b_step + left), b_step, deep, width, zeros, room + B, strip)
                _strips(
                    like, room + B, strip, start + 4 * left * start_step, start_step, scale, keep, to + 4 * left, c_row,
                    height, width, blocks, room,
                )  # fmt: skip
        start, start_step, keep = zeros, 0, np.float32(1)
    release()
    return 0


def _pack(w: int, inputs: int, panels: int, rows_from: int, rows_to: int, first: int, last: int) -> int:
    """Bring columns first to before last of rows of w, (N, inputs), into panels; first is a multiple of DEEP."""
    like = elements(np.float32, w)
    for top in range(rows_from, rows_to, ROWS):
        to = panels + 4 * (top // PANEL * inputs * PANEL + top % PANEL)
        for k in range(first, last, DEEP):
            source = w + 4 * (top * inputs + k)
            pack_rows(like, source, inputs, min(ROWS, rows_to - top), min(DEEP, last - k), to + 64 * k)
    return 0


@functools.cache
def by_address(real: Any) -> tuple[Any, Any]:
    """See ``products.by_address``; there are no dot products."""
    llvmlite.binding.initialize_native_asmparser()
    kinds = [float64 if at in (9, 10) else intp for at in range(_product.__code__.co_argcount)]
    product = kept_for_calls(lambda: _product, "_product", "bf16", kinds)
    return product, kept_for_calls(lambda: _pack, "_pack", "bf16", [intp] * 7)
