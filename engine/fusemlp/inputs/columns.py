"""Columns of a table as codes: the rows of X without its zeros."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusemlp.inputs.arrays import Array
from fusemlp_kernels.coding import Coding


class Columns:
    """Rows (n, K) of inputs, held as ``codes`` (n, ``coding.slots``); ``numpy.asarray`` makes them dense.

    An index or a slice of rows, or an array of row numbers, gives Columns of these rows.
    """

    def __init__(self, coding: Coding, codes: Array) -> None:
        self.coding, self.codes = coding, codes

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

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: Any) -> Columns:
        return Columns(self.coding, self.codes[rows])

    def astype(self, dtype: Any) -> Columns:
        """Return the same with codes of another type, in C order; these if they are so."""
        codes = np.require(self.codes, dtype, ("C", "A"))
        return self if codes is self.codes else Columns(self.coding, codes)

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
