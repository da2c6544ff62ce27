"""Vector code, as a builder of LLVM's writes it: loads, stores and products, loops, and sums of the lanes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from fusemlp_kernels.numpy.compiled.compiler import REGISTER_BYTES, instruction

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
