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
from fusemlp_kernels.numpy.compiled.tables import INTEGERS
from fusemlp_kernels.numpy.libraries import LARGE, routine_address

_OPTIONS: Any = EXACT
_POINTERS = 13
for _name in ("sgemm", "dgemm"):
    _address = get_cython_function_address("scipy.linalg.cython_blas", _name)
    llvmlite.binding.add_symbol(f"fusemlp_{_name}", _address)
    llvmlite.binding.add_symbol(f"fusemlp_large_{_name}", routine_address(_name) or _address)
_ROUTINE: Any = types.void(*[types.intp] * _POINTERS)


def gemm(
    first_flag: int, second_flag: int, m: int, n: int, k: int, alpha: float, a: int, lda: int, b: int, ldb: int,
    beta: float, c: int, ldc: int, words: Any, reals: Any,
) -> None:  # fmt: skip
    """Column-major ``C = alpha * op(A) @ op(B) + beta * C``; a, b, c are addresses, a flag 1 transposes.

    words and reals begin with what BLAS is given, see ``tables``.
    """
    raise AssertionError("compiled code only")


@overload(gemm, jit_options=_OPTIONS)
def _of_type(
    first_flag: int, second_flag: int, m: int, n: int, k: int, alpha: float, a: int, lda: int, b: int, ldb: int,
    beta: float, c: int, ldc: int, words: Any, reals: Any,
) -> Any:  # fmt: skip
    letter, size = ("s", 4) if reals.dtype == types.float32 else ("d", 8)
    small: Any = types.ExternalFunction(f"fusemlp_{letter}gemm", _ROUTINE)
    large: Any = types.ExternalFunction(f"fusemlp_large_{letter}gemm", _ROUTINE)

    def gemm(
        first_flag: int, second_flag: int, m: int, n: int, k: int, alpha: float, a: int, lda: int, b: int, ldb: int,
        beta: float, c: int, ldc: int, words: Any, reals: Any,
    ) -> None:  # fmt: skip
        words[0], words[1], words[2] = m, n, k
        # BLAS refuses the pitch of a matrix without columns
        words[3], words[4], words[5] = lda if lda else 1, ldb if ldb else 1, ldc if ldc else 1
        reals[0], reals[1] = alpha, beta
        at, real = words.ctypes.data, reals.ctypes.data
        first, second = at + 4 * (INTEGERS + first_flag), at + 4 * (INTEGERS + second_flag)
        if m * n * k > LARGE:
            large(first, second, at, at + 4, at + 8, real, a, at + 12, b, at + 16, real + size, c, at + 20)
        else:
            small(first, second, at, at + 4, at + 8, real, a, at + 12, b, at + 16, real + size, c, at + 20)

    return gemm


@register_jitable(**EXACT)
def column_sums(out: Any, values: Any, sums: Any, rows: int, columns: int, alpha: float, beta: float) -> None:
    """``out = alpha * values.sum(axis=0) + beta * out``, flat: values (rows, columns); sums is scratch (columns,)."""
    real = out.dtype.type
    a, b = real(alpha), real(beta)
    for j in range(columns):
        sums[j] = 0
    for i in range(rows):
        start = i * columns
        for j in range(columns):
            sums[j] += values[start + j]
    for j in range(columns):
        out[j] = a * sums[j] if beta == 0.0 else a * sums[j] + b * out[j]
