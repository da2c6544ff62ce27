"""Matrix products through BLAS, called from compiled code: SciPy's, and the large ones MKL's where that is in use.

``scipy.linalg.cython_blas`` has the addresses of SciPy's routines. They are made known to the linker under names, so
that what refers to them can be kept on disk and be linked again in another process, with MKL or without.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from numba import types
from numba.extending import get_cython_function_address, overload, register_jitable

from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.libraries import LARGE, routine_address

_OPTIONS: Any = EXACT
_POINTERS = 13
for _name in ("sgemm", "dgemm"):
    _address = get_cython_function_address("scipy.linalg.cython_blas", _name)
    llvmlite.binding.add_symbol(f"fusemlp_{_name}", _address)
    llvmlite.binding.add_symbol(f"fusemlp_large_{_name}", routine_address(_name) or _address)
_ROUTINE: Any = types.void(*[types.intp] * _POINTERS)

# Elements of the arrays that arguments are passed in: BLAS takes the address of each.
INTEGERS, REALS = 6, 2


def gemm(
    first_flag: int, second_flag: int, m: int, n: int, k: int, alpha: float, a: int, lda: int, b: int, ldb: int,
    beta: float, c: int, ldc: int, integers: Any, reals: Any, letters: Any,
) -> None:  # fmt: skip
    """Column-major ``C = alpha * op(A) @ op(B) + beta * C``; a, b, c are addresses, a flag 1 transposes."""
    raise AssertionError("compiled code only")


@overload(gemm, jit_options=_OPTIONS)
def _of_type(
    first_flag: int, second_flag: int, m: int, n: int, k: int, alpha: float, a: int, lda: int, b: int, ldb: int,
    beta: float, c: int, ldc: int, integers: Any, reals: Any, letters: Any,
) -> Any:  # fmt: skip
    letter, size = ("s", 4) if reals.dtype == types.float32 else ("d", 8)
    small: Any = types.ExternalFunction(f"fusemlp_{letter}gemm", _ROUTINE)
    large: Any = types.ExternalFunction(f"fusemlp_large_{letter}gemm", _ROUTINE)

    def gemm(
        first_flag: int, second_flag: int, m: int, n: int, k: int, alpha: float, a: int, lda: int, b: int, ldb: int,
        beta: float, c: int, ldc: int, integers: Any, reals: Any, letters: Any,
    ) -> None:  # fmt: skip
        integers[0], integers[1], integers[2] = m, n, k
        integers[3], integers[4], integers[5] = lda, ldb, ldc
        reals[0], reals[1] = alpha, beta
        at, real = integers.ctypes.data, reals.ctypes.data
        first, second = letters.ctypes.data + first_flag, letters.ctypes.data + second_flag
        if m * n * k > LARGE:
            large(first, second, at, at + 4, at + 8, real, a, at + 12, b, at + 16, real + size, c, at + 20)
        else:
            small(first, second, at, at + 4, at + 8, real, a, at + 12, b, at + 16, real + size, c, at + 20)

    return gemm


@register_jitable(**EXACT)
def column_sums(sums: Any, dz: Any, rows: int, columns: int) -> None:
    """``sums = dz.sum(axis=0)``, flat: sums (columns,), dz (rows, columns)."""
    for j in range(columns):
        sums[j] = 0
    for i in range(rows):
        start = i * columns
        for j in range(columns):
            sums[j] += dz[start + j]
