"""Matrix products by cuBLAS over row-major arrays of any strides.

cuBLAS reads columns: to it a row-major matrix is the transposed one. So out = a @ b becomes out.T = b.T @ a.T. If
neither rows nor columns of a matrix are contiguous, a kernel copies it first, into memory that binding allocates.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import cupy
import numpy as np
from cupy_backends.cuda.libs import cublas

from fusemlp_kernels.cupy.device import LARGEST, THREADS, Array, Device, Run, in_sequence, nothing, strides_of
from fusemlp_kernels.errors import ShapeError

# Columns for each thread of the element-wise kernels.
LANES = 8
# cuBLAS reads its factors at addresses: alpha, beta.
_FACTORS = np.array([1.0, 0.0], np.float32)
_KINDS = {"float32": cupy.cuda.runtime.CUDA_R_32F, "float16": cupy.cuda.runtime.CUDA_R_16F}


def lane_blocks(rows: int, columns: int) -> int:
    """Return the blocks of a kernel with a thread for LANES columns of a row."""
    return -(-rows * -(-columns // LANES) // THREADS)


def transposed(array: Array) -> Array:
    """Return the transposed matrix, a view."""
    return Device.strided(array, 0, array.shape[::-1], strides_of(array)[::-1])


def pitch_of(array: Array) -> int | None:
    """Return the elements from one row to the next if rows are contiguous and do not overlap, else None."""
    (rows, columns), (row, column) = array.shape, strides_of(array)
    if (columns > 1 and column != 1) or (rows > 1 and row < max(columns, 1)):
        return None
    return max(row if rows > 1 else columns, 1)


def usable(array: Array) -> bool:
    """Return whether cuBLAS can read and write a matrix."""
    return pitch_of(array) is not None or pitch_of(transposed(array)) is not None


def bind_copy(
    device: Device, given: Array, out: Array, rows: Array | None = None, counters: Array | None = None
) -> Run:
    """Return the run of out (M, K) = given, or given[rows] with zeros where a row is -1. Both of the compute type."""
    return device.launch(
        "layers", "gather_rows", lane_blocks(*out.shape), x=given, out=out, indices=rows, counters=counters,
        rows=out.shape[0], columns=out.shape[1],
    )  # fmt: skip


class Factor(NamedTuple):
    """A factor as cuBLAS reads it by columns: its array, operation and pitch, and the run that copies it there."""

    array: Array
    operation: int
    pitch: int
    copy: Run


def _factor(device: Device, array: Array) -> Factor:
    for there, operation in ((array, cublas.CUBLAS_OP_N), (transposed(array), cublas.CUBLAS_OP_T)):
        pitch = pitch_of(there)
        if pitch is not None:
            return Factor(array, operation, pitch, nothing)
    room = device.matrix(array.shape, "compute")
    return Factor(room, cublas.CUBLAS_OP_N, max(array.shape[1], 1), bind_copy(device, array, room))


def bind_product(device: Device, out: Array, a: Array, b: Array, scalars: Array | None = None) -> Run:
    """Return the run of ``out (R, C) = alpha * a (R, I) @ b (I, C) + beta * out``, out float32, or of the compute type
    if cuBLAS can write it and I > 0.

    scalars (2,) float32 on the card: alpha and beta, read when the product runs; None: 1 and 0.
    """
    if out.size == 0:
        return nothing
    if a.shape[1] == 0:
        return bind_combine(device, out, None, scalars)
    pitch = pitch_of(out)
    if pitch is None and usable(out):
        return bind_product(device, transposed(out), transposed(b), transposed(a), scalars)
    if pitch is None:
        room = device.matrix(out.shape)
        return in_sequence([bind_product(device, room, a, b), bind_combine(device, out, room, scalars)])
    left, right = _factor(device, b), _factor(device, a)
    return in_sequence([left.copy, right.copy, _gemm(device, out, pitch, left, right, scalars)])


def _gemm(device: Device, out: Array, pitch: int, left: Factor, right: Factor, scalars: Array | None) -> Run:
    """Return cuBLAS's product of column-major matrices: ``left`` and ``right`` are b.T and a.T of ``bind_product``."""
    rows, columns = out.shape
    inner = right.array.shape[1]
    largest = max(rows, columns, inner, pitch, left.pitch, right.pitch)
    if largest > LARGEST:
        raise ShapeError(f"product: a size or a pitch of {largest} is more than the {LARGEST} that cuBLAS counts")
    factors = _FACTORS.ctypes.data if scalars is None else scalars.data.ptr
    tf32 = device.precision == "tf32"
    multiply = functools.partial(
        cublas.gemmEx,
        device.handle, left.operation, right.operation, columns, rows, inner,
        factors, left.array.data.ptr, _KINDS[left.array.dtype.name], left.pitch,
        right.array.data.ptr, _KINDS[right.array.dtype.name], right.pitch,
        factors + 4, out.data.ptr, _KINDS[out.dtype.name], pitch,
        cublas.CUBLAS_COMPUTE_32F_FAST_TF32 if tf32 else cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip
    kept = (device, out, left, right, scalars)

    def product(kept: Any = kept) -> None:
        multiply()

    def product_with_scalars(kept: Any = kept, handle: int = device.handle) -> None:
        cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_DEVICE)
        try:
            multiply()
        finally:
            cublas.setPointerMode(handle, cublas.CUBLAS_POINTER_MODE_HOST)

    return device.on_card(product if scalars is None else product_with_scalars)


def bind_combine(device: Device, out: Array, source: Array | None, scalars: Array | None) -> Run:
    """Return the run of ``out = alpha * source + beta * out``, float32 matrices of any strides; no source: zeros."""
    return device.launch(
        "gradients", "combine", -(-out.size // THREADS), source=source, out=out, scalars=scalars, rows=out.shape[0],
        columns=out.shape[1],
    )  # fmt: skip
