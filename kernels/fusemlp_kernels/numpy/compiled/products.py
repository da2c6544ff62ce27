"""Matrix products through BLAS, called from compiled code: SciPy's, and the large ones MKL's where that is in use.

``scipy.linalg.cython_blas`` has the addresses of SciPy's routines. They are made known to the linker under names, so
that what refers to them can be kept on disk and be linked again in another process, with MKL or without.
"""

from __future__ import annotations

from typing import Any

import llvmlite.binding
from numba import types
from numba.extending import get_cython_function_address, register_jitable

from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.tables import INTEGERS
from fusemlp_kernels.numpy.libraries import LARGE, routine_address

_POINTERS = 13
for _name in ("sgemm", "dgemm"):
    _address = get_cython_function_address("scipy.linalg.cython_blas", _name)
    llvmlite.binding.add_symbol(f"fusemlp_{_name}", _address)
    llvmlite.binding.add_symbol(f"fusemlp_large_{_name}", routine_address(_name) or _address)
_ROUTINE = types.void(*[types.intp] * _POINTERS)
_sgemm: Any = types.ExternalFunction("fusemlp_sgemm", _ROUTINE)
_dgemm: Any = types.ExternalFunction("fusemlp_dgemm", _ROUTINE)
_large_sgemm: Any = types.ExternalFunction("fusemlp_large_sgemm", _ROUTINE)
_large_dgemm: Any = types.ExternalFunction("fusemlp_large_dgemm", _ROUTINE)


@register_jitable(**EXACT)
def _gemm(
    first_flag: int,
    second_flag: int,
    m: int,
    n: int,
    k: int,
    alpha: float,
    a: int,
    lda: int,
    b: int,
    ldb: int,
    beta: float,
    c: int,
    ldc: int,
    words: Any,
    reals: Any,
) -> None:
    """Column-major ``C = alpha * op(A) @ op(B) + beta * C``; a, b, c are addresses, a flag 1 transposes."""
    words[0], words[1], words[2] = m, n, k
    # BLAS refuses the pitch of a matrix without columns
    words[3], words[4], words[5] = max(lda, 1), max(ldb, 1), max(ldc, 1)
    reals[0], reals[1] = alpha, beta
    at, real = words.ctypes.data, reals.ctypes.data
    first, second = at + 4 * (INTEGERS + first_flag), at + 4 * (INTEGERS + second_flag)
    if reals.itemsize == 4:
        if m * n * k > LARGE:
            _large_sgemm(
                first, second, at, at + 4, at + 8, real, a, at + 12, b, at + 16, real + 4, c, at + 20
            )  # fmt: skip
        else:
            _sgemm(first, second, at, at + 4, at + 8, real, a, at + 12, b, at + 16, real + 4, c, at + 20)
    elif m * n * k > LARGE:
        _large_dgemm(first, second, at, at + 4, at + 8, real, a, at + 12, b, at + 16, real + 8, c, at + 20)
    else:
        _dgemm(first, second, at, at + 4, at + 8, real, a, at + 12, b, at + 16, real + 8, c, at + 20)


@register_jitable(**EXACT)
def forward(y: Any, x: int, w: int, b: Any, rows: int, inputs: int, outputs: int, words: Any, reals: Any) -> None:
    """``y = x @ w.T + b``, all flat: y (rows, outputs), x (rows, inputs), w (outputs, inputs), b (outputs,).

    Here and below what is only multiplied is given by its address.
    """
    for i in range(rows):
        start = i * outputs
        for j in range(outputs):
            y[start + j] = b[j]
    _gemm(1, 0, outputs, rows, inputs, 1.0, w, inputs, x, inputs, 1.0, y.ctypes.data, outputs, words, reals)


@register_jitable(**EXACT)
def backward(
    out: int, dz: int, w: int, scale: float, rows: int, inputs: int, outputs: int, words: Any, reals: Any
) -> None:  # fmt: skip
    """``out = scale * dz @ w``, flat: out (rows, inputs), dz (rows, outputs), w (outputs, inputs)."""
    _gemm(0, 0, inputs, rows, outputs, scale, w, inputs, dz, outputs, 0.0, out, inputs, words, reals)


@register_jitable(**EXACT)
def by_weights(
    out: int, dz: int, x: int, alpha: float, beta: float, rows: int, inputs: int, outputs: int, words: Any, reals: Any
) -> None:  # fmt: skip
    """``out = alpha * dz.T @ x + beta * out``, flat: out (outputs, inputs), dz (rows, outputs), x (rows, inputs)."""
    _gemm(0, 1, inputs, outputs, rows, alpha, x, inputs, dz, outputs, beta, out, inputs, words, reals)


@register_jitable(**EXACT)
def column_sums(sums: Any, dz: Any, rows: int, columns: int) -> None:
    """``sums = dz.sum(axis=0)``, flat: sums (columns,), dz (rows, columns)."""
    for j in range(columns):
        sums[j] = 0
    for i in range(rows):
        start = i * columns
        for j in range(columns):
            sums[j] += dz[start + j]
