"""Matrix products by cuBLAS over row-major arrays of any strides.

cuBLAS reads columns: a row-major matrix is its transposed there, so out = a @ b is asked for as out.T = b.T @ a.T. A
matrix of which neither rows nor columns lie without gaps is copied first, by a kernel, into room that binding has
planned.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusemlp_kernels.cupy.blas import gemm
from fusemlp_kernels.cupy.device import THREADS, Array, Device, Run, in_sequence, nothing, strides_of

# Columns that a thread of the element-wise kernels works on.
LANES = 8


def lane_blocks(rows: int, columns: int) -> int:
    """How many blocks a kernel has whose threads work on LANES columns of a row each."""
    return -(-rows * -(-columns // LANES) // THREADS)


@dataclass(frozen=True)
class Matrix:
    """A matrix in memory: strides in elements, where a dimension of one element may say anything."""

    array: Array
    rows: int
    columns: int
    row: int
    column: int

    @property
    def transposed(self) -> Matrix:
        return Matrix(self.array, self.columns, self.rows, self.column, self.row)

    @property
    def by_rows(self) -> bool:
        """Whether rows lie without gaps, one behind the other."""
        return (self.columns <= 1 or self.column == 1) and (self.rows <= 1 or self.row >= max(self.columns, 1))

    @property
    def pitch(self) -> int:
        """What lies between two rows, where ``by_rows``."""
        return max(self.row if self.rows > 1 else self.columns, 1)

    @property
    def usable(self) -> bool:
        return self.by_rows or self.transposed.by_rows

    def factor(self) -> tuple[Array, bool, int]:
        """As cuBLAS takes the transposed matrix: the array, whether it is transposed again, its leading dimension."""
        if self.by_rows:
            return self.array, False, self.pitch
        return self.array, True, self.transposed.pitch


def matrix(array: Array, transposed: bool = False) -> Matrix:
    """The matrix of a 2-D array, or its transposed."""
    found = Matrix(array, *array.shape, *strides_of(array))
    return found.transposed if transposed else found


def _packed(device: Device, given: Matrix) -> tuple[Matrix, Run]:
    """A matrix that cuBLAS can read, and what brings the values there."""
    if given.usable:
        return given, nothing
    room = device.view(
        device.zeros(given.rows * given.columns, device.compute), 0, (given.rows, given.columns), (given.columns, 1)
    )
    return matrix(room), bind_copy(device, given, room)


def bind_copy(
    device: Device, given: Matrix, out: Array, rows: Array | None = None, counters: Array | None = None
) -> Run:
    """out (M, K) = given, or given[rows]; zeros where a row is -1. Both of the compute type."""
    row, column = strides_of(out)
    return device.launch(
        "layers", "gather_rows", "Gather", lane_blocks(*out.shape),
        x=given.array, x_row=given.row, x_col=given.column, out=out, out_row=row, out_col=column, indices=rows,
        counters=counters, rows=out.shape[0], columns=out.shape[1],
    )  # fmt: skip


def bind_product(device: Device, out: Array, a: Matrix, b: Matrix, scalars: Array | None = None) -> Run:
    """``out (R, C) = alpha * a (R, I) @ b (I, C) + beta * out``, out float32.

    scalars (2,) float32 on the card: alpha and beta, read when the product runs; None: 1 and 0.
    """
    wanted = matrix(out)
    if out.size == 0:
        return nothing
    if a.columns == 0:
        return bind_combine(device, out, None, scalars)
    if not wanted.usable:
        room = device.zeros(out.size, out.dtype)
        room = device.view(room, 0, out.shape, (wanted.columns, 1))
        return in_sequence([bind_product(device, room, a, b), bind_combine(device, out, room, scalars)])
    (a, pack_a), (b, pack_b) = _packed(device, a), _packed(device, b)
    if not wanted.by_rows:
        wanted, a, b = wanted.transposed, b.transposed, a.transposed
    multiply = gemm(device, out, wanted.columns, wanted.rows, a.columns, b.factor(), a.factor(), wanted.pitch, scalars)
    return in_sequence([pack_a, pack_b, multiply])


def bind_combine(device: Device, out: Array, source: Array | None, scalars: Array | None) -> Run:
    """``out = alpha * source + beta * out``, float32 matrices of any strides; no source: zeros."""
    row, column = strides_of(out)
    from_row, from_column = (0, 0) if source is None else strides_of(source)
    return device.launch(
        "gradients", "combine", "Combine", -(-out.size // THREADS),
        source=source, source_row=from_row, source_col=from_column, out=out, out_row=row, out_col=column,
        scalars=scalars, rows=out.shape[0], columns=out.shape[1],
    )  # fmt: skip
