"""Sums of many numbers, with the same bits in registers of any width.

Every 16th number of 64 bytes is added to one of four vectors, while there are four vectors left; these are added up,
and the upper half of the sum to the lower one, again and again. The rest is added in the same way to one vector of
32 bytes, then number by number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from fusemlp_kernels.numpy.compiled.compiler import intrinsic
from fusemlp_kernels.numpy.compiled.vectors import INDEX, VectorCode, folded, looped, number

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
