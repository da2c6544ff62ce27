"""Memory and records at an address, and calls by address, as intrinsics.

An array of numba's is seven numbers with a reference count: passed from function to function it made three quarters of
the code that LLVM had to read. ``Memory`` is one pointer, of which nothing checks the indices. Numba compiles what a
function calls again with each caller, but for functions that are called by their address.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import from_dtype, types
from numba.core import cgutils
from numba.core.typing.templates import AttributeTemplate
from numba.extending import infer_getattr, intrinsic, lower_getattr, models, register_model

from fusemlp_kernels.numpy.compiled import tables as t


class Memory(types.CPointer):
    """Numbers of type ``dtype`` side by side, from an address on."""


register_model(Memory)(models.PointerModel)


@infer_getattr
class _Attributes(AttributeTemplate):
    """``dtype`` and ``itemsize``, as arrays have them."""

    key = Memory

    def resolve_dtype(self, memory: Any) -> Any:
        return types.DType(memory.dtype)

    def resolve_itemsize(self, memory: Any) -> Any:
        return types.intp


@lower_getattr(Memory, "dtype")
def _dtype(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.get_dummy_value()


@lower_getattr(Memory, "itemsize")
def _itemsize(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))


def _of_address(typingctx: Any, like: Any, address: Any) -> Any:
    """The elements at an address, of the type of ``like``'s."""
    kind = Memory(like.dtype)

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[1], context.get_value_type(kind))

    return kind(like, types.intp), code


def _of_part(typingctx: Any, memory: Any, start: Any) -> Any:
    """The elements from ``start`` on."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return memory(memory, types.intp), code


def _records(dtype: np.dtype[np.void]) -> Any:
    """``at(address, index)``: a record of those of this type that lie side by side from an address on."""
    kind = from_dtype(dtype)

    def at(typingctx: Any, address: Any, index: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.gep(builder.inttoptr(arguments[0], context.get_value_type(kind)), [arguments[1]])

        return kind(types.intp, types.intp), code

    return intrinsic(at)


def _calls(typingctx: Any, address: Any, *given: Any) -> Any:
    """Call a function by its address; the word that it returns."""
    kinds = [types.unliteral(kind) for kind in given]

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        parts = cgutils.unpack_tuple(builder, values[1], len(kinds))
        of = [context.get_value_type(kind) for kind in kinds]
        function = ir.FunctionType(context.get_value_type(types.intp), of).as_pointer()
        return builder.call(builder.inttoptr(values[0], function), parts)

    return types.intp(types.intp, types.Tuple(kinds)), code


call: Any = intrinsic(_calls)
elements: Any = intrinsic(_of_address)
part: Any = intrinsic(_of_part)
head_at, call_at, tensor_at, phase_at, task_at, piece_at = map(
    _records, (t.HEAD, t.CALL, t.TENSOR, t.PHASE, t.TASK, t.PIECE)
)
