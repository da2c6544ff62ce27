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

# Elements of the arrays that arguments are passed in: BLAS takes the address of each.
INTEGERS, REALS = 6, 2


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
    integers: Any,
    reals: Any,
    letters: Any,
) -> None:
    """Column-major ``C = alpha * op(A) @ op(B) + beta * C``; a, b, c are addresses, a flag 1 transposes."""
    integers[0], integers[1], integers[2] = m, n, k
    integers[3], integers[4], integers[5] = lda, ldb, ldc
    reals[0], reals[1] = alpha, beta
    at, real, letter = integers.ctypes.data, reals.ctypes.data, letters.ctypes.data
    if reals.itemsize == 4:
        if m * n * k > LARGE:
            _large_sgemm(
                letter + first_flag, letter + second_flag, at, at + 4, at + 8, real, a, at + 12, b, at + 16,
                real + 4, c, at + 20,
            )  # fmt: skip
        else:
            _sgemm(
                letter + first_flag, letter + second_flag, at, at + 4, at + 8, real, a, at + 12, b, at + 16,
                real + 4, c, at + 20,
            )  # fmt: skip
    elif m * n * k > LARGE:
        _large_dgemm(
            letter + first_flag, letter + second_flag, at, at + 4, at + 8, real, a, at + 12, b, at + 16,
            real + 8, c, at + 20,
        )  # fmt: skip
    else:
        _dgemm(
            letter + first_flag, letter + second_flag, at, at + 4, at + 8, real, a, at + 12, b, at + 16,
            real + 8, c, at + 20,
        )  # fmt: skip


@register_jitable(**EXACT)
def forward(
    y: Any, x: Any, w: Any, b: Any, rows: int, inputs: int, outputs: int, integers: Any, reals: Any, letters: Any
) -> None:
    """``y = x @ w.T + b``, all flat: y (rows, outputs), x (rows, inputs), w (outputs, inputs), b (outputs,)."""
    for i in range(rows):
        start = i * outputs
        for j in range(outputs):
            y[start + j] = b[j]
    _gemm(
        1, 0, outputs, rows, inputs, 1.0, w.ctypes.data, inputs, x.ctypes.data, inputs, 1.0, y.ctypes.data, outputs,
        integers, reals, letters,
    )  # fmt: skip


@register_jitable(**EXACT)
def backward(
    out: Any, dz: Any, w: Any, scale: float, rows: int, inputs: int, outputs: int, integers: Any, reals: Any,
    letters: Any,
) -> None:  # fmt: skip
    """``out = scale * dz @ w``, flat: out (rows, inputs), dz (rows, outputs), w (outputs, inputs)."""
    _gemm(
        0, 0, inputs, rows, outputs, scale, w.ctypes.data, inputs, dz.ctypes.data, outputs, 0.0, out.ctypes.data,
        inputs, integers, reals, letters,
    )  # fmt: skip


@register_jitable(**EXACT)
def by_weights(
    out: Any, dz: Any, x: Any, alpha: float, beta: float, rows: int, inputs: int, outputs: int, integers: Any,
    reals: Any, letters: Any,
) -> None:  # fmt: skip
    """``out = alpha * dz.T @ x + beta * out``, flat: out (outputs, inputs), dz (rows, outputs), x (rows, inputs)."""
    _gemm(
        0, 1, inputs, outputs, rows, alpha, x.ctypes.data, inputs, dz.ctypes.data, outputs, beta, out.ctypes.data,
        inputs, integers, reals, letters,
    )  # fmt: skip


@register_jitable(**EXACT)
def column_sums(sums: Any, dz: Any, rows: int, columns: int) -> None:
    """``sums = dz.sum(axis=0)``, flat: sums (columns,), dz (rows, columns)."""
    for j in range(columns):
        sums[j] = 0
    for i in range(rows):
        start = i * columns
        for j in range(columns):
            sums[j] += dz[start + j]
