"""cuBLAS's product of column-major matrices."""

from __future__ import annotations

import functools
from typing import Any

import cupy
import numpy as np
from cupy_backends.cuda.libs import cublas

from fusemlp_kernels.cupy.device import LARGEST, Array, Device, Run
from fusemlp_kernels.errors import ShapeError

# cuBLAS reads its factors at addresses: alpha, beta.
_FACTORS = np.array([1.0, 0.0], np.float32)
_OPERATIONS = {False: cublas.CUBLAS_OP_N, True: cublas.CUBLAS_OP_T}


def gemm(
    device: Device, out: Array, m: int, n: int, k: int, a: tuple[Array, bool, int], b: tuple[Array, bool, int], ld: int,
    scalars: Array | None,
) -> Run:  # fmt: skip
    """out (m, n) = alpha * a (m, k) @ b (k, n) + beta * out; a and b: the array, whether it is transposed, its leading
    dimension. ``scalars`` (2,) float32 on the card: alpha and beta; None: 1 and 0."""
    largest = max(m, n, k, a[2], b[2], ld)
    if largest > LARGEST:
        raise ShapeError(f"product: a size or a pitch of {largest} is more than the {LARGEST} that cuBLAS counts")
    factors = _FACTORS.ctypes.data if scalars is None else scalars.data.ptr
    kind = {"float32": cupy.cuda.runtime.CUDA_R_32F, "float16": cupy.cuda.runtime.CUDA_R_16F}
    tf32 = device.precision == "tf32"
    multiply = functools.partial(
        cublas.gemmEx,
        device.handle, _OPERATIONS[a[1]], _OPERATIONS[b[1]], m, n, k,
        factors, a[0].data.ptr, kind[a[0].dtype.name], a[2], b[0].data.ptr, kind[b[0].dtype.name], b[2],
        factors + 4, out.data.ptr, kind[out.dtype.name], ld,
        cublas.CUBLAS_COMPUTE_32F_FAST_TF32 if tf32 else cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip
    kept = (device, out, a[0], b[0], scalars)

    def product(kept: Any = kept) -> None:
        multiply()

    def product_with_scalars(kept: Any = kept, handle: int = device.handle) -> None:
        cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_DEVICE)
        try:
            multiply()
        finally:
            cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)

    return device.on_card(product if scalars is None else product_with_scalars)
