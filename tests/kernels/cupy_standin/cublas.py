"""cuBLAS through the names of ``cupy_backends.cuda.libs.cublas``: NumPy's product of float32 in its place.

Matrices are column-major, as cuBLAS has them. A call that cuBLAS would refuse is an error, and so is a product that
would read or write outside of the memory.
"""

import ctypes
import itertools

import numpy as np

from cupy_standin import streams
from cupy_standin.memory import LIVE, Misuse, at_address

CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
CUBLAS_POINTER_MODE_HOST, CUBLAS_POINTER_MODE_DEVICE = 0, 1
CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32 = 68, 77
CUBLAS_GEMM_DEFAULT = -1
CUDA_R_32F, CUDA_R_16F = 0, 2
TYPES = {CUDA_R_32F: np.dtype(np.float32), CUDA_R_16F: np.dtype(np.float16)}
# (A and B, C) that cublasGemmEx computes with sums in float32.
COMBINATIONS = {(CUDA_R_32F, CUDA_R_32F), (CUDA_R_16F, CUDA_R_32F), (CUDA_R_16F, CUDA_R_16F)}

_modes = {}
_numbers = itertools.count(1)


def create():
    handle = next(_numbers)
    _modes[handle] = CUBLAS_POINTER_MODE_HOST
    return handle


def destroy(handle):
    del _modes[handle]


def setPointerMode(handle, mode):
    if mode not in (CUBLAS_POINTER_MODE_HOST, CUBLAS_POINTER_MODE_DEVICE):
        raise Misuse(f"setPointerMode: no such mode: {mode!r}")
    _mode_of(handle)
    _modes[handle] = mode


def gemmEx(
    handle, transa, transb, m, n, k, alpha, A, Atype, lda, B,
    Btype, ldb, beta, C, Ctype, ldc, computeType, algo
):  # fmt: skip
    """C (m, n) = alpha * op(A) (m, k) @ op(B) (k, n) + beta * C, sums in float32."""
    mode = _mode_of(handle)
    if Atype != Btype or (Atype, Ctype) not in COMBINATIONS:
        raise Misuse(f"gemmEx: no product of the types {Atype}, {Btype} in {Ctype}")
    if {transa, transb} - {CUBLAS_OP_N, CUBLAS_OP_T} or min(m, n, k) < 0 or algo != CUBLAS_GEMM_DEFAULT:
        raise Misuse(f"gemmEx: transa {transa}, transb {transb}, m {m}, n {n}, k {k}, algo {algo}")
    if computeType not in (CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32F_FAST_TF32):
        raise Misuse(f"gemmEx: computeType {computeType}")
    shapes = _shapes(transa, transb, m, n, k, lda, ldb, ldc)
    if m == 0 or n == 0:
        return
    held = None if mode == CUBLAS_POINTER_MODE_DEVICE else (_host_float(alpha), _host_float(beta))
    places, kinds = (A, B, C), (Atype, Btype, Ctype)

    def run():
        first, second = held or (_device_float(alpha), _device_float(beta))
        a, b, c = _operands(shapes, places, kinds, transa, transb)
        _multiply(a, b, c, first, second, computeType == CUBLAS_COMPUTE_32F_FAST_TF32)

    streams.start(run)


def _shapes(transa, transb, m, n, k, lda, ldb, ldc):
    """The leading dimensions, with the rows and columns that lie in memory."""
    shapes = {
        "lda": (lda, (m, k) if transa == CUBLAS_OP_N else (k, m)),
        "ldb": (ldb, (k, n) if transb == CUBLAS_OP_N else (n, k)),
        "ldc": (ldc, (m, n)),
    }
    for what, (pitch, (rows, _)) in shapes.items():
        if not max(1, rows) <= pitch < 2**31:
            raise Misuse(f"gemmEx: {what} is {pitch}, and a column has {rows} elements")
    return shapes


def _operands(shapes, places, kinds, transa, transb):
    """op(A), op(B) and C."""
    a, b, c = (
        _columns(address, TYPES[kind], shape, pitch)
        for address, kind, (pitch, shape) in zip(places, kinds, shapes.values(), strict=True)
    )
    if np.may_share_memory(a, c) or np.may_share_memory(b, c):
        raise Misuse("gemmEx: C lies on A or B")
    return a if transa == CUBLAS_OP_N else a.T, b if transb == CUBLAS_OP_N else b.T, c


def _multiply(a, b, c, alpha, beta, tf32):
    with np.errstate(all="ignore"):
        total = np.zeros(c.shape, np.float32)
        if alpha and a.shape[1]:
            a, b = a.astype(np.float32), b.astype(np.float32)
            total = alpha * ((rounded_to_tf32(a) @ rounded_to_tf32(b)) if tf32 else a @ b)
        # with a beta of zero cuBLAS does not read C, which may be full of NaN
        c[...] = total + beta * c if beta else total


def rounded_to_tf32(values):
    """float32 numbers with ten bits behind the point, to the nearest, ties away from zero: as tensor cores read."""
    bits = values.view(np.uint32)
    finite = (bits & 0x7F800000) != 0x7F800000
    return np.where(finite, (bits + 0x1000) & 0xFFFFE000, bits).astype(np.uint32).view(np.float32)


def _columns(address, dtype, shape, pitch):
    return at_address(address, shape, dtype, (dtype.itemsize, pitch * dtype.itemsize))


def _mode_of(handle):
    if handle not in _modes:
        raise Misuse(f"cuBLAS: there is no handle {handle}")
    return _modes[handle]


def _host_float(address):
    if LIVE.holds(address):
        raise Misuse("gemmEx: alpha and beta lie on the card, and the pointer mode says on the host")
    return np.float32(ctypes.c_float.from_address(address).value)


def _device_float(address):
    return np.float32(at_address(address, (1,), np.float32, (4,))[0])
