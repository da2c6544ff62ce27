"""Numbers below the smallest normal one count as zero while the loop runs.

An optimizer shrinks some values step by step, such as the weight of a feature that is always zero. They end as denormal
numbers, with which x86 processors compute many times more slowly. The loss is below 1e-37 in float32. The control
register of a thread's vector unit (MXCSR) has a bit for results that become zero and one for operands that count as
zero (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, section 10.2.3); a BLAS with one thread
computes in the same thread. Other processors keep their denormal numbers.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_WORD = ir.IntType(32)
_X86 = platform.machine().lower() in ("x86_64", "amd64")
# The bits for: flush to zero, denormals are zero
AS_ZERO = (1 << 15) | (1 << 6)


def _register(builder: Any, name: str, slot: Any) -> None:
    """Let the register be stored to, or loaded from, memory."""
    bytes_at = ir.IntType(8).as_pointer()
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(ir.VoidType(), [bytes_at]), f"llvm.x86.sse.{name}"
    )
    builder.call(function, [builder.bitcast(slot, bytes_at)])


def _reads(typingctx: Any) -> Any:
    """The register."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if not _X86:
            return _WORD(0)
        slot = cgutils.alloca_once(builder, _WORD)
        _register(builder, "stmxcsr", slot)
        return builder.load(slot)

    return types.uint32(), code


def _writes(typingctx: Any, value: Any) -> Any:
    """Set the register."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _X86:
            slot = cgutils.alloca_once_value(builder, arguments[0])
            _register(builder, "ldmxcsr", slot)
        return context.get_dummy_value()

    return types.void(types.uint32), code


read_control: Any = intrinsic(_reads)
write_control: Any = intrinsic(_writes)
