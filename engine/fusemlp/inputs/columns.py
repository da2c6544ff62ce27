"""Columns of a table as codes: the rows of X without its zeros."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusemlp.inputs.arrays import Array, to_array
from fusemlp_kernels.coding import Coding
from fusemlp_kernels.errors import DataError, DTypeError, ShapeError


class Columns:
    """Rows (n, K) of inputs, held as ``codes`` (n, ``coding.slots``); ``numpy.asarray`` makes them dense.

    A slice, an array of row numbers or a mask gives Columns of these rows, and a row number those of one row. Codes are
    checked once: do not write into their array afterwards.

    Raises ShapeError, DTypeError, and DataError for NaN, infinities and codes that no input of their column has.
    """

    def __init__(self, coding: Coding, codes: Any) -> None:
        array = to_array("codes", codes)
        if array.ndim != 2 or array.shape[1] != coding.slots:
            raise ShapeError(f"codes: expected shape (n, {coding.slots}), the slots of the coding, got {array.shape}")
        if array.dtype.kind not in "biuf":
            raise DTypeError(f"codes: expected real numbers, got dtype {array.dtype}")
        if len(array):
            _check(coding, array)
        self.coding, self.codes = coding, array.view()
        self.codes.flags.writeable = False

    def _with(self, codes: Array) -> Columns:
        """Return Columns of codes that need no check."""
        columns = Columns.__new__(Columns)
        columns.coding, columns.codes = self.coding, codes
        return columns

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the inputs."""
        return len(self.codes), self.coding.inputs

    @property
    def dtype(self) -> Any:
        """The type of the codes, and of the inputs."""
        return self.codes.dtype

    @property
    def ndim(self) -> int:
        """2, as of a matrix."""
        return 2

    @property
    def size(self) -> int:
        """The number of the inputs of all rows."""
        return len(self.codes) * self.coding.inputs

    @property
    def values(self) -> Array:
        """The codes (n, m) without those that are indices: numbers, fractions, and the values of bags."""
        values: Array = np.delete(self.codes, self.coding.indices[:, 0], axis=1)
        return values

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Columns:
        if isinstance(rows, tuple):
            raise ShapeError(f"columns: expected the numbers of rows, got {rows!r}; numpy.asarray(columns) is a matrix")
        return self._with(np.atleast_2d(self.codes[rows]))

    def astype(self, dtype: Any) -> Columns:
        """Return the same with codes of another type, in C order; these if they are so."""
        if self.codes.dtype != dtype:
            with np.errstate(over="ignore"):
                return Columns(self.coding, self.codes.astype(dtype))
        codes = np.require(self.codes, None, ("C", "A"))
        return self if codes is self.codes else self._with(codes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        if copy is False:
            raise ValueError("columns: the inputs are made of the codes; leave out copy=False")
        return self.coding.dense(self.codes if dtype is None else self.codes.astype(dtype, copy=False))

    def __repr__(self) -> str:
        return f"Columns({len(self)} rows, {len(self.coding.columns)} columns of {self.coding.inputs} inputs)"


def coding_of(X: Any) -> Coding | None:
    """Return the coding of checked rows; None of dense ones."""
    return X.coding if isinstance(X, Columns) else None


def codes_of(X: Any) -> Any:
    """Return the array that a program reads of checked rows: their codes, or the rows themselves."""
    return X.codes if isinstance(X, Columns) else X


def _check(coding: Coding, codes: Array) -> None:
    """Raise DataError for codes that are no finite numbers, or no index of an input of their column."""
    # a NaN is its column's least and greatest number
    least, greatest = codes.min(axis=0), codes.max(axis=0)
    bad = ~(np.isfinite(least) & np.isfinite(greatest))
    slots, first, last = coding.indices.T
    cells = codes[:, slots]
    bad[slots] |= ~((first <= least[slots]) & (greatest[slots] <= last)) | (cells != np.trunc(cells)).any(axis=0)
    if not bad.any():
        return
    slot = int(np.argmax(bad))
    cells, expected = codes[:, slot], "a finite number"
    fits = np.isfinite(cells)
    for low, high in coding.indices[slots == slot, 1:].tolist():
        expected = f"a whole number from 0 to {high}{', or -1 for none' if low < 0 else ''}"
        fits = (low <= cells) & (cells <= high) & (cells == np.trunc(cells))
    row = int(np.argmin(fits))
    raise DataError(f"codes: expected {expected} in slot {slot}, got {cells[row]} at row {row}")
