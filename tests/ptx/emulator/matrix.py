"""The instructions of whole warps: exchanges of registers, loads of matrices, and products on tensor cores.

The places of a matrix's elements among the threads are those of the figures in "PTX ISA", sections "Warp Level Matrix
Multiply-Accumulate Instructions" and "Asynchronous Warpgroup Level Matrix Instructions". A product is summed exactly,
and the sum cut off to float32: one truncation an instruction. The order of a real tensor core's sums is not documented.
"""

import functools

import numpy as np

from .faults import Problem
from .opcodes import f32_of_bf16

LANES = np.arange(32)
GROUP, MEMBER = LANES // 4, LANES % 4


def cut_off(value):
    """Return the float32 next to a float64 on the side of zero."""
    return (value.view(np.uint64) & np.uint64(0xFFFFFFFFE0000000)).view(np.float64).astype(np.float32)


def values_of(bits, kind):
    """Return the float64 values of tensor-core inputs. TF32 ignores the last 13 bits of a float32."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return (f32_of_bf16(bits) if kind == "bf16" else bits.view(np.float16)).astype(np.float64)


def product(a, b, c):
    """Return a @ b + c in float32, of float64 matrices a and b and float32 c."""
    with np.errstate(all="ignore"):
        return cut_off(a @ b + c)


@functools.cache
def fragment(which, kind):
    """Return rows and columns of a warp's elements of ``a`` (16, K), ``b`` (K, 8) or ``c`` (16, 8), each
    (registers, 32) or, with two elements in a register, (registers, 32, 2)."""
    # registers of one element stand for rows 8 apart, and columns 4 (TF32) or, with two elements each, 8 apart
    step = 4 if kind == "tf32" else 8
    column = MEMBER[:, None] if kind == "tf32" else MEMBER[:, None] * 2 + np.arange(2)
    group = np.broadcast_to(GROUP[:, None], column.shape)
    if which == "a":
        rows = np.stack([group, group + 8, group, group + 8])
        columns = np.stack([column, column, column + step, column + step])
    elif which == "b":
        rows, columns = np.stack([column, column + step]), np.stack([group, group])
    else:
        rows = np.stack([GROUP, GROUP, GROUP + 8, GROUP + 8])
        columns = np.stack([2 * MEMBER, 2 * MEMBER + 1, 2 * MEMBER, 2 * MEMBER + 1])
    return (rows, columns) if rows.shape[-1] != 1 else (rows[..., 0], columns[..., 0])


def gathered(registers, which, kind):
    """Return the matrices (warps, rows, columns), float64, in registers (count, warps, 32)."""
    rows, columns = fragment(which, kind)
    if kind != "tf32" and which != "c":
        registers = np.ascontiguousarray(registers).view(np.uint16).reshape(*registers.shape, 2)
    matrix = np.empty((registers.shape[1], int(rows.max()) + 1, int(columns.max()) + 1))
    matrix[:, rows, columns] = values_of(np.swapaxes(registers, 0, 1), kind)
    return matrix


def multiply(a, b, c, kind):
    """mma.sync.m16n8k8 of TF32 or m16n8k16 of 16 bits: the four registers (4, warps, 32) of a @ b + c, float32."""
    rows, columns = fragment("c", kind)
    before = np.empty((a.shape[1], 16, 8), np.float32)
    before[:, rows, columns] = np.swapaxes(c, 0, 1).view(np.float32)
    after = product(gathered(a, "a", kind), gathered(b, "b", kind), before)
    return np.swapaxes(after[:, rows, columns], 0, 1)


def shuffle(value, mode, lane, clamp):
    """shfl.sync over whole warps, (warps, 32): ``lane`` is the offset or the number."""
    if (clamp & 0x1F1F != 0x1F).any():
        raise NotImplementedError("shuffles within parts of a warp")
    source = LANES ^ lane if mode == "bfly" else np.broadcast_to(lane, value.shape) & 31
    return np.take_along_axis(value, np.broadcast_to(source, value.shape), axis=1)


REDUCTIONS = {"add": np.sum, "min": np.min, "max": np.max}


def reduced(value, mode):
    """redux.sync: the reduction of each warp's 32 values, for all its threads."""
    found = (
        REDUCTIONS[mode](value, axis=1, keepdims=True, dtype=value.dtype)
        if mode == "add"
        else (REDUCTIONS[mode](value, axis=1, keepdims=True))
    )
    return np.broadcast_to(found, value.shape)


@functools.cache
def row_addresses(count, transposed):
    """Return for ldmatrix and stmatrix the lane that names the row of each thread's pair of elements, and the bytes
    from there, each (count, 32, 2)."""
    matrix = 8 * np.arange(count)[:, None, None]
    near = 2 * MEMBER[:, None] + np.arange(2)
    group = np.broadcast_to(GROUP[:, None], near.shape)
    row, column = (near, group) if transposed else (group, near)
    return matrix + row, np.broadcast_to(2 * column, (count, 32, 2))


def matrix_addresses(addresses, count, transposed):
    """Return the addresses (count, warps, 32, 2) of the elements of 8 x 8 matrices; ``addresses`` (warps, 32) has those
    of the rows."""
    if (addresses[:, : 8 * count] % 16).any():
        raise Problem("misaligned shared address of a row of a matrix: expected multiples of 16 bytes")
    lane, offset = row_addresses(count, transposed)
    return np.moveaxis(addresses[:, lane] + offset, 1, 0)
