"""Matrix products into given memory, through the BLAS that SciPy carries.

BLAS is column-major: a row-major array is handed over as its transpose, which costs nothing. SciPy's wrappers take
``alpha`` and ``beta`` and write into ``c``, which NumPy's ``matmul`` cannot; a call costs half a microsecond. They
copy an operand that is not laid out the way BLAS wants it, and with a copied ``c`` the result would be lost: layouts
are looked at once, when a product is bound, and what BLAS cannot address goes through ``matmul``.

SciPy and NumPy carry a BLAS each, with a pool of threads each. Both pools at work in turn hold each other up, so the
quick path never calls NumPy's; and where MKL is in use (``libraries``), all goes there that SciPy's would start its
threads for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import blas

from fusemlp_kernels.numpy.libraries import LARGE, LARGE_VECTOR, mkl, prepared

Array = np.ndarray[Any, Any]

_GEMM = {np.dtype(np.float32): blas.sgemm, np.dtype(np.float64): blas.dgemm}
_GEMV = {np.dtype(np.float32): blas.sgemv, np.dtype(np.float64): blas.dgemv}
_AXPY = {np.dtype(np.float32): blas.saxpy, np.dtype(np.float64): blas.daxpy}
_DOT = {np.dtype(np.float32): blas.sdot, np.dtype(np.float64): blas.ddot}
_LETTER = {np.dtype(np.float32): "s", np.dtype(np.float64): "d"}
_NUMBER: dict[np.dtype[Any], Any] = {np.dtype(np.float32): ctypes.c_float, np.dtype(np.float64): ctypes.c_double}
_NORM = {np.dtype(np.float32): blas.snrm2, np.dtype(np.float64): blas.dnrm2}


def _plain(*arrays: Array) -> bool:
    """Whether BLAS can address every array: row-major without gaps, aligned, not empty, of one type."""
    first = arrays[0].dtype
    return all(a.flags.c_contiguous and a.flags.aligned and a.size > 0 and a.dtype == first for a in arrays)


def _in_mkl(multiplications: int, bound: int) -> bool:
    return multiplications > bound and mkl() is not None


def product(
    out: Array, a: Array, b: Array, *, transpose_a: bool = False, transpose_b: bool = False
) -> Callable[[float, float], None]:
    """``run(alpha, beta)`` that computes ``out = alpha * op(a) @ op(b) + beta * out``, ``op`` a transposition or none.

    ``out`` (m, n), ``op(a)`` (m, k), ``op(b)`` (k, n). ``beta`` 0 means that ``out`` is not read.
    """
    left = a.T if transpose_a else a
    right = b.T if transpose_b else b
    if left.shape[1] != right.shape[0] or out.shape != (left.shape[0], right.shape[1]):
        raise AssertionError(f"product of {left.shape} and {right.shape} into {out.shape}")
    if _plain(out, a, b) and out.flags.writeable:
        if _in_mkl(out.size * left.shape[1], LARGE):
            return _mkl_product(out, a, b, transpose_a, transpose_b)
        gemm = _GEMM[out.dtype]
        first, second, into = b.T, a.T, out.T
        flag_first, flag_second = int(transpose_b), int(transpose_a)

        def run(alpha: float, beta: float) -> None:
            gemm(alpha, first, second, beta, into, flag_first, flag_second, 1)

        return run
    scratch = np.empty(out.shape, out.dtype)

    def run_strided(alpha: float, beta: float) -> None:
        np.matmul(left, right, out=scratch)
        np.multiply(scratch, alpha, out=scratch)
        if beta == 0.0:
            np.copyto(out, scratch)
        else:
            np.multiply(out, beta, out=out)
            np.add(out, scratch, out=out)

    return run_strided


def _mkl_product(
    out: Array, a: Array, b: Array, transpose_a: bool, transpose_b: bool
) -> Callable[[float, float], None]:
    m, n = out.shape
    alpha, beta = _NUMBER[out.dtype](), _NUMBER[out.dtype]()
    call = prepared(
        f"{_LETTER[out.dtype]}gemm",
        *(ctypes.c_char(b"T" if transpose else b"N") for transpose in (transpose_b, transpose_a)),
        *(ctypes.c_int(length) for length in (n, m, a.shape[0] if transpose_a else a.shape[1])),
        *(alpha, b, ctypes.c_int(b.shape[1]), a, ctypes.c_int(a.shape[1]), beta, out, ctypes.c_int(n)),
    )

    def run(times: float, plus: float) -> None:
        alpha.value, beta.value = times, plus
        call()

    return run


def _gemv(out: Array, a: Array, ones: Array, *, transpose: bool) -> Callable[[float], None]:
    """``run(alpha)`` that computes ``out = alpha * op(a.T) @ ones``, ``op`` a transposition or none; a (m, n)."""
    m, n = a.shape
    if _in_mkl(a.size, LARGE_VECTOR):
        one, alpha, zero = ctypes.c_int(1), _NUMBER[out.dtype](), _NUMBER[out.dtype]()
        call = prepared(
            f"{_LETTER[out.dtype]}gemv",
            *(ctypes.c_char(b"T" if transpose else b"N"), ctypes.c_int(n), ctypes.c_int(m)),
            *(alpha, a, ctypes.c_int(n), ones, one, zero, out, one),
        )

        def run_mkl(times: float) -> None:
            alpha.value = times
            call()

        return run_mkl
    gemv, matrix, flag = _GEMV[out.dtype], a.T, int(transpose)

    def run(times: float) -> None:
        gemv(times, matrix, ones, 0.0, out, 0, 1, 0, 1, flag, 1)

    return run


def column_sums(out: Array, a: Array) -> Callable[[float, float], None]:
    """``run(alpha, beta)`` that computes ``out = alpha * a.sum(axis=0) + beta * out``; out (n,), a (m, n)."""
    scratch = np.empty(out.shape, out.dtype)
    if _plain(out, a) and out.flags.writeable:
        ones = np.ones(a.shape[0], a.dtype)
        straight = _gemv(out, a, ones, transpose=False)
        # with a beta gemv would add a few rows at a time to out: a parameter would be rounded each time
        aside = _gemv(scratch, a, ones, transpose=False)
        add = axpy(scratch, out)

        def run(alpha: float, beta: float) -> None:
            if beta == 0.0:
                straight(alpha)
                return
            aside(1.0)
            if beta != 1.0:
                np.multiply(out, beta, out=out)
            add(alpha)

        return run

    def run_strided(alpha: float, beta: float) -> None:
        np.add.reduce(a, axis=0, out=scratch)
        np.multiply(scratch, alpha, out=scratch)
        if beta == 0.0:
            np.copyto(out, scratch)
        else:
            np.multiply(out, beta, out=out)
            np.add(out, scratch, out=out)

    return run_strided


def row_sums(out: Array, a: Array) -> Callable[[], None]:
    """``run()`` that computes ``out = a.sum(axis=1)``; out (m,), a (m, n)."""
    if _plain(out, a):
        multiply = _gemv(out, a, np.ones(a.shape[1], a.dtype), transpose=True)
        return lambda: multiply(1.0)

    def run_strided() -> None:
        np.add.reduce(a, axis=1, out=out)

    return run_strided


def axpy(x: Array, y: Array) -> Callable[[float], None]:
    """``run(alpha)`` that computes ``y += alpha * x`` over arrays of one shape."""
    if _plain(x, y) and y.flags.writeable:
        flat_x, flat_y, size = x.reshape(-1), y.reshape(-1), x.size
        if _in_mkl(size, LARGE_VECTOR):
            factor, one = _NUMBER[y.dtype](), ctypes.c_int(1)
            call = prepared(f"{_LETTER[y.dtype]}axpy", ctypes.c_int(size), factor, flat_x, one, flat_y, one)

            def run_mkl(alpha: float) -> None:
                factor.value = alpha
                call()

            return run_mkl
        kernel = _AXPY[y.dtype]

        def run(alpha: float) -> None:
            kernel(flat_x, flat_y, size, alpha)

        return run
    scratch = np.empty(y.shape, y.dtype)

    def run_strided(alpha: float) -> None:
        np.multiply(x, alpha, out=scratch)
        np.add(y, scratch, out=y)

    return run_strided


def dot(x: Array, y: Array) -> Callable[[], float]:
    """``run()`` that returns the sum of ``x * y`` over arrays of one shape."""
    if _plain(x, y):
        flat_x, flat_y = x.reshape(-1), y.reshape(-1)
        if _in_mkl(x.size, LARGE_VECTOR):
            size, one = ctypes.c_int(x.size), ctypes.c_int(1)
            name, number = f"{_LETTER[x.dtype]}dot", _NUMBER[x.dtype]
            return prepared(name, size, flat_x, one, flat_y, one, result=number)
        kernel = _DOT[x.dtype]

        def run() -> float:
            return float(kernel(flat_x, flat_y))

        return run

    scratch = np.empty(y.shape, y.dtype)

    def run_strided() -> float:
        np.multiply(x, y, out=scratch)
        return float(scratch.sum())

    return run_strided


def norm(x: Array) -> Callable[[], float]:
    """``run()`` that returns the Euclidean norm of a flat array, safe against overflow of the squares."""
    kernel = _NORM[x.dtype]
    if x.size == 0:
        return float
    if _in_mkl(x.size, LARGE_VECTOR) and _plain(x):
        name, number = f"{_LETTER[x.dtype]}nrm2", _NUMBER[x.dtype]
        return prepared(name, ctypes.c_int(x.size), x, ctypes.c_int(1), result=number)

    def run() -> float:
        return float(kernel(x))

    return run
