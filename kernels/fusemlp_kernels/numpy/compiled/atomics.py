"""Atomic operations on words of memory, and locks to sleep on: threads agree by them.

Every operation is sequentially consistent. The locks are those of the interpreter (``PyThread_acquire_lock``), which
exist on every platform and may be taken and released without holding its global lock.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_WORD, _ORDER, _BYTES = ir.IntType(64), "seq_cst", 8
# The instructions that tell a processor that a thread waits; others have none.
_X86, _ARM = ("llvm.x86.sse2.pause", ()), ("llvm.aarch64.hint", (1,))
_PAUSES: dict[str, tuple[str, tuple[int, ...]]] = {"x86_64": _X86, "amd64": _X86, "arm64": _ARM, "aarch64": _ARM}


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())


def _loads(typingctx: Any, address: Any) -> Any:
    """The word at an address."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_at(builder, arguments[0]), _ORDER, _BYTES)

    return types.intp(types.intp), code


def _stores(typingctx: Any, address: Any, value: Any) -> Any:
    """Write a word."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _at(builder, arguments[0]), _ORDER, _BYTES)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), code


def _adds(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to a word; its value before."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _at(builder, arguments[0]), arguments[1], _ORDER)

    return types.intp(types.intp, types.intp), code


def _swaps(typingctx: Any, address: Any, expected: Any, value: Any) -> Any:
    """Write a word if it is still the expected one; whether it was."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        found = builder.cmpxchg(_at(builder, arguments[0]), arguments[1], arguments[2], _ORDER, _ORDER)
        return builder.extract_value(found, 1)

    return types.boolean(types.intp, types.intp, types.intp), code


def _pauses(typingctx: Any) -> Any:
    """Tell the processor that the thread waits."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        name, given = _PAUSES.get(platform.machine().lower(), ("", ()))
        if name:
            kinds = [ir.IntType(32)] * len(given)
            function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(ir.VoidType(), kinds), name)
            builder.call(function, [ir.IntType(32)(value) for value in given])
        return context.get_dummy_value()

    return types.void(), code


load: Any = intrinsic(_loads)
store: Any = intrinsic(_stores)
add: Any = intrinsic(_adds)
swap_if: Any = intrinsic(_swaps)
pause: Any = intrinsic(_pauses)

for _name in ("PyThread_acquire_lock", "PyThread_release_lock"):
    _routine = ctypes.cast(getattr(ctypes.pythonapi, _name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(f"fusemlp_{_name}", _routine)
# sleep(lock, 1) until wake(lock)
sleep: Any = types.ExternalFunction("fusemlp_PyThread_acquire_lock", types.intc(types.intp, types.intc))
wake: Any = types.ExternalFunction("fusemlp_PyThread_release_lock", types.void(types.intp))
