"""The innermost loops of all products, as intrinsics: a tile of the result stays in vector registers.

Element (i, j) of a tile is the sum over k of ``a[i, k] * b[k, j]``, taken in the order of k, with one rounding a step
where the processor multiplies and adds at once. So a product has the same bits however it is cut into tiles, and in
registers of any width. a is read number by number and may have any strides; a row of b lies together.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_WORD, _INDEX = ir.IntType(64), ir.IntType(32)
_X86 = platform.machine().lower() in ("x86_64", "amd64")


def _register_bytes() -> int:
    """The width of a vector register."""
    if not _X86:
        return 16
    features = llvmlite.binding.get_host_cpu_features()
    return 64 if features.get("avx512f") else 32 if features.get("avx2") else 16


REGISTER_BYTES = _register_bytes()
# Rows of a tile, and vectors in one: its sums, a vector of b for each of these and a number of a fill the registers, of
# which there are 32, on x86 before AVX-512 16.
TILE_ROWS, TILE_VECTORS = (6, 2) if _X86 and REGISTER_BYTES < 64 else (8, 2)

# Partial sums of a dot product, and the tile of those: as many as the registers hold.
DOT_BYTES = 64
DOT_ROWS, DOT_COLUMNS = (4, 4) if REGISTER_BYTES == DOT_BYTES else (2, 2)


def _number(value: int) -> Any:
    return ir.Constant(_WORD, value)


class _Code:
    """Writes vector code for one type of elements; a vector fills a register, or has ``lanes`` elements."""

    def __init__(self, context: Any, builder: Any, real: Any, lanes: int = 0) -> None:
        self.builder = builder
        self.element = context.get_value_type(real)
        self.size = context.get_abi_sizeof(self.element)
        self.lanes = lanes or REGISTER_BYTES // self.size
        self.vector = ir.VectorType(self.element, self.lanes)
        self._name = f"v{self.lanes}f{8 * self.size}"

    def call(self, name: str, result: Any, *arguments: Any) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.{name}.{self._name}")
        return self.builder.call(function, arguments)

    def at(self, address: Any, kind: Any) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())

    def everywhere(self, value: Any) -> Any:
        """A vector of one number."""
        kind = ir.VectorType(value.type, self.lanes)
        nothing = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(nothing, value, _INDEX(0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_INDEX, self.lanes), None))

    def mask(self, columns: Any) -> Any:
        """The lanes that are among the first columns."""
        lanes = ir.Constant(ir.VectorType(_INDEX, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", lanes, self.everywhere(self.builder.trunc(columns, _INDEX)))

    def load(self, address: Any, mask: Any = None) -> Any:
        if mask is not None:
            pointer, align = self.at(address, self.vector), _INDEX(self.size)
            kind = ir.FunctionType(self.vector, [pointer.type, _INDEX, mask.type, self.vector])
            name = f"llvm.masked.load.{self._name}.p0"
            function = cgutils.get_or_insert_function(self.builder.module, kind, name)
            return self.builder.call(function, [pointer, align, mask, ir.Constant(self.vector, None)])
        value = self.builder.load(self.at(address, self.vector))
        value.align = self.size
        return value

    def store(self, value: Any, address: Any, mask: Any = None) -> None:
        pointer = self.at(address, self.vector)
        if mask is None:
            self.builder.store(value, pointer).align = self.size
            return
        kind = ir.FunctionType(ir.VoidType(), [self.vector, pointer.type, _INDEX, mask.type])
        name = f"llvm.masked.store.{self._name}.p0"
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        self.builder.call(function, [value, pointer, _INDEX(self.size), mask])


def _row(builder: Any, first: Any, stride: Any, i: int, rows: Any) -> Any:
    """The address of row i; beyond the last one that of the last, so that nothing else is read."""
    inside = builder.icmp_signed("<", _number(i), rows)
    last = builder.sub(rows, _number(1))
    return builder.add(first, builder.mul(builder.select(inside, _number(i), last), stride))


def _joined(to: _Code, one: Any, values: list[Any], other: Any, others: list[Any]) -> list[Any]:
    """The vectors ``values`` after block ``one``, or ``others`` after block ``other``."""
    phis = [to.builder.phi(to.vector) for _ in values]
    for phi, value, else_value in zip(phis, values, others, strict=True):
        phi.add_incoming(value, one)
        phi.add_incoming(else_value, other)
    return phis


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
            to = _Code(context, builder, real)
            in_bytes = [builder.mul(stride, _number(to.size)) for stride in (a_row, a_step, b_step, c_row)]
            a_row, a_step, b_step, c_row = in_bytes
            width = to.lanes
            masks = [
                to.mask(builder.sub(columns, _number(v * width))) if masked else None for v in range(vectors)
            ]  # fmt: skip

            def across(address: Any) -> list[Any]:
                return [to.load(builder.add(address, _number(v * width * to.size)), masks[v]) for v in range(vectors)]

            firsts = across(start) * height
            a_rows = [_row(builder, a, a_row, i, rows) for i in range(height)]
            entry, body, end = builder.block, builder.append_basic_block("k"), builder.append_basic_block("end")
            builder.cbranch(builder.icmp_signed(">", depth, _number(0)), body, end)

            builder.position_at_end(body)
            k, a_at, b_at = (builder.phi(_WORD) for _ in range(3))
            sums = [builder.phi(to.vector) for _ in firsts]
            bs, added = across(b_at), []
            for i in range(height):
                number = builder.load(to.at(builder.add(a_rows[i], a_at), to.element))
                number.align = to.size
                same = to.everywhere(number)
                for v in range(vectors):
                    added.append(to.call("fmuladd", to.vector, same, bs[v], sums[i * vectors + v]))
            following = builder.add(k, _number(1))
            for phi, first, then in (
                (k, _number(0), following),
                (a_at, _number(0), builder.add(a_at, a_step)),
                (b_at, b, builder.add(b_at, b_step)),
                *zip(sums, firsts, added, strict=True),
            ):
                phi.add_incoming(first, entry)
                phi.add_incoming(then, body)
            builder.cbranch(builder.icmp_signed("<", following, depth), body, end)

            builder.position_at_end(end)
            results = _joined(to, entry, firsts, body, added)
            unit, zero = ir.Constant(to.element, 1.0), ir.Constant(to.element, 0.0)
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
                        return to.call("fmuladd", to.vector, alphas, value, held)

                    _each_row(builder, to, c, c_row, rows, results, masks, combined)
            return context.get_dummy_value()

        return signature, code

    return typed


def _each_row(
    builder: Any, to: _Code, c: Any, c_row: Any, rows: Any, results: list[Any], masks: list[Any], of: Callable[..., Any]
) -> None:  # fmt: skip
    """Store what ``of`` makes of each result."""
    vectors = len(masks)
    for i in range(len(results) // vectors):
        with builder.if_then(builder.icmp_signed("<", _number(i), rows)):
            first = builder.add(c, builder.mul(_number(i), c_row))
            for v, mask in enumerate(masks):
                at = builder.add(first, _number(v * to.lanes * to.size))
                value = of(results[i * vectors + v], lambda at=at, mask=mask: to.load(at, mask))
                to.store(value, at, mask)


whole_tile: Any = intrinsic(_tile(TILE_ROWS, TILE_VECTORS, masked=False))
short_tile: Any = intrinsic(_tile(TILE_ROWS // 2, TILE_VECTORS, masked=False))
wide_tile: Any = intrinsic(_tile(TILE_ROWS, TILE_VECTORS, masked=True))
narrow_tile: Any = intrinsic(_tile(TILE_ROWS, 1, masked=True))


def _dots(height: int, width: int) -> Callable[..., Any]:
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
            to, few = (_Code(context, builder, real, lanes) for lanes in (DOT_BYTES // size, width))
            a_row, b_row, c_row = (builder.mul(stride, _number(size)) for stride in (a_row, b_row, c_row))
            tops = [_row(builder, a, a_row, i, rows) for i in range(height)]
            sides = [_row(builder, b, b_row, j, columns) for j in range(width)]

            def added(at: Any, sums: list[Any], mask: Any = None) -> list[Any]:
                xs, ys = ([to.load(builder.add(row, at), mask) for row in of] for of in (tops, sides))
                pairs = [(x, y) for x in xs for y in ys]
                return [to.call("fmuladd", to.vector, *pair, held) for pair, held in zip(pairs, sums, strict=True)]

            nothing = [ir.Constant(to.vector, None)] * (height * width)
            whole = builder.and_(depth, _number(-to.lanes))
            entry, body, rest = builder.block, builder.append_basic_block("k"), builder.append_basic_block("rest")
            last, end = builder.append_basic_block("last"), builder.append_basic_block("end")
            builder.cbranch(builder.icmp_signed(">", whole, _number(0)), body, rest)

            builder.position_at_end(body)
            k, sums = builder.phi(_WORD), [builder.phi(to.vector) for _ in nothing]
            more = added(builder.mul(k, _number(size)), sums)
            following = builder.add(k, _number(to.lanes))
            for phi, first, then in ((k, _number(0), following), *zip(sums, nothing, more, strict=True)):
                phi.add_incoming(first, entry)
                phi.add_incoming(then, body)
            builder.cbranch(builder.icmp_signed("<", following, whole), body, rest)

            builder.position_at_end(rest)
            sums = _joined(to, entry, nothing, body, more)
            builder.cbranch(builder.icmp_signed("<", whole, depth), last, end)
            builder.position_at_end(last)
            more = added(builder.mul(whole, _number(size)), sums, to.mask(builder.sub(depth, whole)))
            builder.branch(end)
            builder.position_at_end(end)
            sums = _folded(builder, to.lanes, _joined(to, rest, sums, last, more))

            mask = few.mask(columns)
            starts = few.load(start, mask)
            for i in range(height):
                with builder.if_then(builder.icmp_signed("<", _number(i), rows)):
                    vector, first = divmod(i * width, to.lanes)
                    pick = ir.Constant(ir.VectorType(_INDEX, width), list(range(first, first + width)))
                    value = builder.shuffle_vector(sums[vector], sums[vector], pick)
                    few.store(builder.fadd(starts, value), builder.add(c, builder.mul(_number(i), c_row)), mask)
            return context.get_dummy_value()

        return signature, code

    return typed


def _folded(builder: Any, lanes: int, vectors: list[Any]) -> list[Any]:
    """The sums of the elements of each vector, one after the other, in as few vectors as they fill."""
    span = lanes
    while span > 1:
        half, span = span // 2, span // 2
        lower = [lane for lane in range(2 * lanes) if lane // half % 2 == 0]
        picks = [ir.Constant(ir.VectorType(_INDEX, lanes), [lane + at for lane in lower]) for at in (0, half)]
        pairs = zip(vectors[::2], vectors[1::2] or vectors, strict=True)
        vectors = [builder.fadd(*(builder.shuffle_vector(*pair, pick) for pick in picks)) for pair in pairs]
    return vectors


dot_tile: Any = intrinsic(_dots(DOT_ROWS, DOT_COLUMNS))


def _transposed(
    typingctx: Any, like: Any, source: Any, source_row: Any, rows: Any, target: Any, target_row: Any
) -> Any:  # fmt: skip
    """Write the transpose of a square, as wide as a register, to ``target``; addresses, and strides in elements.

    Of the source ``rows`` are read; columns beyond are written with any numbers.
    """
    real = like.dtype

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, source, source_row, rows, target, target_row = arguments
        to = _Code(context, builder, real)
        n = to.lanes
        source_row, target_row = (builder.mul(stride, _number(to.size)) for stride in (source_row, target_row))
        lines = [to.load(_row(builder, source, source_row, i, rows)) for i in range(n)]
        half = n // 2
        while half:
            # squares of 2 * half: the upper right quarter changes places with the lower left one
            upper = [lane if not lane & half else n + lane - half for lane in range(n)]
            lower = [lane + half if not lane & half else n + lane for lane in range(n)]
            picks = [ir.Constant(ir.VectorType(_INDEX, n), order) for order in (upper, lower)]
            for i in range(n):
                if not i & half:
                    pair = lines[i], lines[i + half]
                    lines[i], lines[i + half] = (builder.shuffle_vector(*pair, pick) for pick in picks)
            half //= 2
        for i, values in enumerate(lines):
            to.store(values, builder.add(target, builder.mul(_number(i), target_row)))
        return context.get_dummy_value()

    return types.void(like, *[types.intp] * 5), code


transpose_square: Any = intrinsic(_transposed)


def _copies(typingctx: Any, like: Any, target: Any, source: Any, count: Any) -> Any:
    """Copy ``count`` elements from one address to another."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        _, target, source, count = arguments
        size = context.get_abi_sizeof(context.get_value_type(like.dtype))
        byte = ir.IntType(8).as_pointer()
        to, of = (builder.inttoptr(address, byte) for address in (target, source))
        cgutils.raw_memcpy(builder, to, of, count, size)
        return context.get_dummy_value()

    return types.void(like, *[types.intp] * 3), code


copy: Any = intrinsic(_copies)


def _prefetches(typingctx: Any, address: Any) -> Any:
    """Ask for the cache line at an address, which is read later."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        pointer = builder.inttoptr(arguments[0], byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, _INDEX, _INDEX, _INDEX])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        reads, second_level, data = 0, 2, 1
        builder.call(function, [pointer, *map(_INDEX, (reads, second_level, data))])
        return context.get_dummy_value()

    return types.void(types.intp), code


prefetch: Any = intrinsic(_prefetches)
