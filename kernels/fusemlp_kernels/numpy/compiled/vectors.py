"""Vector code, as a builder of LLVM's writes it: loads, stores and products, loops, and sums of the lanes. And sums of
many numbers, with the same bits in registers of any width.

For these every 16th number of 64 bytes is added to one of four vectors, while there are four vectors left; these are
added up, and the upper half of the sum to the lower one, again and again. The rest is added in the same way to one
vector of 32 bytes, then number by number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from fusemlp_kernels.numpy.compiled.compiler import REGISTER_BYTES, instruction, intrinsic

WORD, INDEX = ir.IntType(64), ir.IntType(32)


def number(value: int) -> Any:
    return ir.Constant(WORD, value)


class VectorCode:
    """Writes vector code for one type of elements; a vector fills a register, or has ``lanes`` elements."""

    def __init__(self, context: Any, builder: Any, real: Any, lanes: int = 0) -> None:
        self.builder = builder
        self.element = context.get_value_type(real)
        self.size = context.get_abi_sizeof(self.element)
        self.lanes = lanes or REGISTER_BYTES // self.size
        self.vector = ir.VectorType(self.element, self.lanes)
        self._name = f"v{self.lanes}f{8 * self.size}"

    def sum_of_product(self, a: Any, b: Any, c: Any) -> Any:
        return instruction(self.builder, f"fmuladd.{self._name}", self.vector, a, b, c)

    def at(self, address: Any, kind: Any) -> Any:
        return self.builder.inttoptr(address, kind.as_pointer())

    def everywhere(self, value: Any) -> Any:
        """A vector of one number."""
        kind = ir.VectorType(value.type, self.lanes)
        nothing = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(nothing, value, INDEX(0))
        return self.builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(INDEX, self.lanes), None))

    def mask(self, columns: Any) -> Any:
        """The lanes that are among the first columns."""
        lanes = ir.Constant(ir.VectorType(INDEX, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", lanes, self.everywhere(self.builder.trunc(columns, INDEX)))

    def load(self, address: Any, mask: Any = None) -> Any:
        pointer = self.at(address, self.vector)
        if mask is not None:
            name, nothing = f"masked.load.{self._name}.p0", ir.Constant(self.vector, None)
            return instruction(self.builder, name, self.vector, pointer, INDEX(self.size), mask, nothing)
        value = self.builder.load(pointer)
        value.align = self.size
        return value

    def prefetch(self, address: Any) -> None:
        reads, first_level, data = map(INDEX, (0, 3, 1))
        instruction(
            self.builder, "prefetch.p0", ir.VoidType(), self.at(address, ir.IntType(8)), reads, first_level, data
        )

    def store(self, value: Any, address: Any, mask: Any = None) -> None:
        pointer = self.at(address, self.vector)
        if mask is None:
            self.builder.store(value, pointer).align = self.size
        else:
            name = f"masked.store.{self._name}.p0"
            instruction(self.builder, name, ir.VoidType(), value, pointer, INDEX(self.size), mask)


def looped(builder: Any, end: Any, step: int, values: list[Any], of: Callable[..., list[Any]]) -> list[Any]:
    """The values after ``values = of(k, values)`` for k from 0 in steps to before ``end``; they stay in registers."""
    before, body, after = builder.block, builder.append_basic_block("k"), builder.append_basic_block("end")
    firsts = [number(0), *values]
    builder.cbranch(builder.icmp_signed(">", end, firsts[0]), body, after)
    builder.position_at_end(body)
    phis = [builder.phi(value.type) for value in firsts]
    following = [builder.add(phis[0], number(step)), *of(phis[0], phis[1:])]
    builder.cbranch(builder.icmp_signed("<", following[0], end), body, after)
    builder.position_at_end(after)
    results = [builder.phi(value.type) for value in firsts]
    for phi, first, then in zip(phis + results, firsts * 2, following * 2, strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(then, body)
    return results[1:]


def opaque(builder: Any, value: Any) -> Any:
    """The same word, of which LLVM does not know the origin: in a loop it keeps a register and is not computed anew."""
    kind = ir.FunctionType(value.type, [value.type])
    return builder.call(ir.InlineAsm(kind, "", "=r,0"), [value])


def folded(builder: Any, lanes: int, vectors: list[Any]) -> list[Any]:
    """The sums of the elements of each vector, one after the other, in as few vectors as they fill."""
    span = lanes
    while span > 1:
        half, span = span // 2, span // 2
        lower = [lane for lane in range(2 * lanes) if lane // half % 2 == 0]
        picks = [ir.Constant(ir.VectorType(INDEX, lanes), [lane + at for lane in lower]) for at in (0, half)]
        pairs = zip(vectors[::2], vectors[1::2] or vectors, strict=True)
        vectors = [builder.fadd(*(builder.shuffle_vector(*pair, pick) for pick in picks)) for pair in pairs]
    return vectors


# Bytes of a vector, and vectors side by side, from the widest on.
_STAGES = ((64, 4), (32, 1), (0, 1))


def _sum(context: Any, builder: Any, kind: Any, count: Any, added: Callable[[VectorCode, Any, Any], Any]) -> Any:
    """The sum of ``count`` terms; ``added(to, at, held)`` adds those from number ``at`` on to a vector."""
    done, total = number(0), ir.Constant(context.get_value_type(kind), 0.0)
    for size, side_by_side in _STAGES:
        to = VectorCode(context, builder, kind, max(1, size * 8 // kind.bitwidth))
        span = to.lanes * side_by_side
        length = builder.sub(builder.and_(count, number(-span)), done)
        before, start = builder.block, done
        with builder.if_then(builder.icmp_signed(">", length, number(0))):
            nothing = ir.Constant(to.vector, None)
            firsts = [builder.insert_element(nothing, total, INDEX(0)), *[nothing] * (side_by_side - 1)]

            def all_added(k: Any, sums: list[Any], to: VectorCode = to, start: Any = start) -> list[Any]:
                first = builder.add(start, k)
                return [added(to, builder.add(first, number(i * to.lanes)), held) for i, held in enumerate(sums)]

            whole, *others = looped(builder, length, span, firsts, all_added)
            for other in others:
                whole = builder.fadd(other, whole)
            folds = builder.extract_element(folded(builder, to.lanes, [whole])[0], INDEX(0))
            inside = builder.block
        sums = builder.phi(total.type)
        sums.add_incoming(total, before)
        sums.add_incoming(folds, inside)
        done, total = builder.add(done, length), sums
    return total


def _addresses(builder: Any, *memories: Any) -> list[Any]:
    return [builder.ptrtoint(memory, ir.IntType(64)) for memory in memories]


@intrinsic
def sum_of(typingctx: Any, values: Any, count: Any) -> Any:
    """The sum of the first ``count`` values."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (address,) = _addresses(builder, arguments[0])

        def added(to: VectorCode, at: Any, held: Any) -> Any:
            return builder.fadd(held, to.load(builder.add(address, builder.mul(at, number(to.size)))))

        return _sum(context, builder, values.dtype, arguments[1], added)

    return values.dtype(values, types.intp), code


@intrinsic
def sum_of_products(typingctx: Any, left: Any, right: Any, count: Any) -> Any:
    """The sum of the products of the first ``count`` values of both."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        addresses = _addresses(builder, *arguments[:2])

        def added(to: VectorCode, at: Any, held: Any) -> Any:
            offset = builder.mul(at, number(to.size))
            of_left, of_right = (to.load(builder.add(address, offset)) for address in addresses)
            return to.sum_of_product(of_left, of_right, held)

        return _sum(context, builder, left.dtype, arguments[2], added)

    return left.dtype(left, right, types.intp), code


@intrinsic
def sum_of_squares(typingctx: Any, values: Any, count: Any, divisor: Any) -> Any:
    """The sum of the squares of the first ``count`` values, divided by a float64; in float64, as no square underflows
    of a float32.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (address,) = _addresses(builder, arguments[0])

        def added(to: VectorCode, at: Any, held: Any) -> Any:
            of = VectorCode(context, builder, values.dtype, to.lanes)
            loaded = of.load(builder.add(address, builder.mul(at, number(of.size))))
            exact = loaded if of.size == to.size else builder.fpext(loaded, to.vector)
            quotient = builder.fdiv(exact, to.everywhere(arguments[2]))
            return to.sum_of_product(quotient, quotient, held)

        return _sum(context, builder, types.float64, arguments[1], added)

    return types.float64(values, types.intp, types.float64), code
