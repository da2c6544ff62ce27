"""The product of a layer into given memory, through the BLAS that SciPy carries.

BLAS is column-major: a row-major array is handed over as its transpose, which costs nothing. SciPy's wrappers take
``beta`` and write into ``c``, which NumPy's ``matmul`` cannot; a call costs half a microsecond.

SciPy and NumPy carry a BLAS each, with a pool of threads each. Both pools at work in turn hold each other up, so the
quick path never calls NumPy's; and where MKL is in use (``libraries``), all goes there that SciPy's would start its
threads for.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.linalg import blas

from fusemlp_kernels.numpy.libraries import LARGE, mkl

Array = np.ndarray[Any, Any]

_GEMM = {"f": blas.sgemm, "d": blas.dgemm}
_ROUTINES: dict[str, tuple[str, Any]] = {"f": ("sgemm_", ctypes.c_float), "d": ("dgemm_", ctypes.c_double)}


def bind_product(y: Array, x: Array, w: Array) -> Callable[[], object]:
    """``run()`` that computes ``y += x @ w.T``; contiguous arrays, none empty: y (M, N), x (M, K), w (N, K)."""
    kind, (rows, outputs), inputs = y.dtype.char, y.shape, w.shape[1]
    library = mkl() if y.size * inputs > LARGE else None
    if library is None:
        return functools.partial(_GEMM[kind], 1.0, w.T, x.T, 1.0, y.T, 1, 0, 1)
    name, number = _ROUTINES[kind]
    integers, one = (ctypes.c_int * 3)(outputs, rows, inputs), number(1.0)
    n, m, k = (ctypes.addressof(integers) + 4 * at for at in range(3))
    scalar, letters = ctypes.addressof(one), (ctypes.c_char * 2)(b"T", b"N")
    flags = ctypes.addressof(letters)
    routine = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 13)((name, library))
    addresses = flags, flags + 1, n, m, k, scalar, w.ctypes.data, k, x.ctypes.data, k, scalar, y.ctypes.data, n

    # ``kept`` holds the memory of the addresses
    def run(kept: Any = (integers, one, letters, w, x, y)) -> None:
        routine(*addresses)

    return run
