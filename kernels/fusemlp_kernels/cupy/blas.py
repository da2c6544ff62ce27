"""cuBLAS's products of column-major matrices; alone, and of many at once over arrays of addresses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import cupy
import numpy as np
from cupy_backends.cuda.libs import cublas

from fusemlp_kernels.cupy.device import LARGEST, Array, Device, Run
from fusemlp_kernels.errors import ShapeError

# cuBLAS reads its factors at addresses: alpha, beta.
_FACTORS = np.array([1.0, 0.0], np.float32)
_OPERATIONS = {False: cublas.CUBLAS_OP_N, True: cublas.CUBLAS_OP_T}


def _check_sizes(*sizes: int) -> None:
    if max(sizes) > LARGEST:
        raise ShapeError(f"product: a size or a pitch of {max(sizes)} is more than the {LARGEST} that cuBLAS counts")


def gemm(
    device: Device, out: Array, m: int, n: int, k: int, a: tuple[Array, bool, int], b: tuple[Array, bool, int], ld: int,
    scalars: Array | None,
) -> Run:  # fmt: skip
    """out (m, n) = alpha * a (m, k) @ b (k, n) + beta * out; a and b: the array, whether it is transposed, its leading
    dimension. ``scalars`` (2,) float32 on the card: alpha and beta; None: 1 and 0."""
    _check_sizes(m, n, k, a[2], b[2], ld)
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


def gemm_of_many(
    device: Device, m: int, n: int, k: int, a: tuple[bool, int], b: tuple[bool, int], ld: int,
    addresses: Sequence[Array],
) -> Callable[[int], None]:  # fmt: skip
    """The products out (m, n) = a (m, k) @ b (k, n) of as many float32 matrices as the call is told.

    a and b: whether they are transposed, their leading dimension; ``addresses``: those of a, of b and of out, int64 on
    the card, read when the product runs.
    """
    _check_sizes(m, n, k, a[1], b[1], ld)
    alpha, beta = _FACTORS.ctypes.data, _FACTORS.ctypes.data + 4
    multiply = functools.partial(
        cublas.sgemmBatched,
        device.handle, _OPERATIONS[a[0]], _OPERATIONS[b[0]], m, n, k,
        alpha, addresses[0].data.ptr, a[1], addresses[1].data.ptr, b[1], beta, addresses[2].data.ptr, ld,
    )  # fmt: skip

    def products(count: int, kept: Any = (device, tuple(addresses))) -> None:
        multiply(count)

    return products
