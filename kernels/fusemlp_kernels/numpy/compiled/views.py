"""Flat views of memory, and calls by address, as intrinsics.

Numba compiles a function for every type of a slice or a ``carray``. It compiles what a function calls again with each
caller, but for functions that are called by their address.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array


def _view(context: Any, builder: Any, kind: Any, data: Any, size: Any) -> Any:
    array = context.make_array(kind)(context, builder)
    item = context.get_constant(types.intp, context.get_abi_sizeof(array.data.type.pointee))
    data = builder.inttoptr(data, array.data.type) if data.type != array.data.type else data
    populate_array(array, data=data, shape=[size], strides=[item], itemsize=item, meminfo=None)
    return array._getvalue()


def _of_address(typingctx: Any, like: Any, address: Any, size: Any) -> Any:
    """The ``size`` elements at an address, of the type of ``like``'s."""
    kind = types.Array(like.dtype, 1, "C")

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _view(context, builder, kind, arguments[1], arguments[2])

    return kind(like, types.intp, types.intp), code


def _of_array(typingctx: Any, array: Any, start: Any, size: Any) -> Any:
    """The elements from ``start`` on, of a contiguous array of one dimension, which outlives the view."""
    kind = types.Array(array.dtype, 1, "C")

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        whole = context.make_array(array)(context, builder, arguments[0])
        return _view(context, builder, kind, builder.gep(whole.data, [arguments[1]]), arguments[2])

    return kind(array, types.intp, types.intp), code


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
part: Any = intrinsic(_of_array)
