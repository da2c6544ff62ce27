"""Columns of a table, or bags of words, as codes: the rows of X without its zeros."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fusemlp.describe.checks import as_count, bytes_text
from fusemlp.inputs.arrays import Array, as_values, is_sparse, to_array
from fusemlp_kernels.coding import BAG, NUMBERS, PIECES, WORD, Coding, Column
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, DTypeError, ShapeError

_log = logging.getLogger("fusemlp")

# Sparse rows become codes if the inputs are this many times the numbers of the fullest: below it products are faster.
SAVES = 8
# Each bag has room for the numbers of the fullest row: refused from LARGE bytes on, if these are FULL times the mean.
LARGE, FULL = 1 << 30, 8


class Columns:
    """Rows (n, K) of inputs, held as ``codes`` (n, ``coding.slots``); ``numpy.asarray`` makes them dense.

    A slice, an array of row numbers or a mask gives Columns of these rows, and a row number those of one row. Codes are
    checked once: do not write into their array afterwards. ``of`` and ``from_sparse`` make them of what users have.

    Raises ShapeError, DTypeError, and DataError for NaN, infinities and codes that no input of their column has.
    """

    def __init__(self, coding: Coding, codes: Any) -> None:
        if not isinstance(coding, Coding):
            raise ArgumentTypeError(
                f"coding: expected a Coding, got {type(coding).__name__}; Columns.of and Columns.from_sparse make "
                "columns of arrays"
            )
        array = to_array("codes", codes)
        if array.ndim != 2 or array.shape[1] != coding.slots:
            raise ShapeError(f"codes: expected shape (n, {coding.slots}), the slots of the coding, got {array.shape}")
        if array.dtype.kind not in "biuf":
            raise DTypeError(f"codes: expected real numbers, got dtype {array.dtype}")
        if len(array):
            _check(coding, array)
        self.coding, self.codes = coding, array.view()
        self.codes.flags.writeable = False

    @classmethod
    def of(
        cls,
        *,
        words: Any = None,
        levels: Sequence[int] = (),
        pieces: Any = None,
        edges: Sequence[Any] = (),
        numbers: Any = None,
    ) -> Columns:
        """Return the rows of a table: words first, then numbers in pieces, then numbers that are inputs as they are.

        words: (n, w) whole numbers, -1 for none; ``levels``: how many words each column has. pieces: (n, p);
        ``edges``: the rising edges of the pieces of each column; a number beyond them continues the first piece or the
        last (Gorishniy et al., 2022). numbers: (n, m). Raises the errors of the constructor, and ArgumentError.
        """
        columns = [Column(WORD, as_count(f"levels[{at}]", count)) for at, count in enumerate(levels)]
        parts = list[Array]()

        def take(argument: str, cells: Any, width: int | None = None, of: str = "") -> Array:
            array = to_array(argument, cells)
            if array.ndim != 2 or width not in (None, array.shape[1]):
                expected = "(n, m)" if width is None else f"(n, {width}), a column for each of the {of}"
                raise ShapeError(f"{argument}: expected shape {expected}, got {array.shape}")
            rows = len(parts[0]) if parts else None
            return as_values(argument, array, width=array.shape[1], rows=rows, dtype=np.float64)

        if words is not None or levels:
            parts.append(take("words", words, len(levels), "levels"))
        cut = take("pieces", pieces, len(edges), "edges").T if pieces is not None or edges else ()
        for at, values in enumerate(cut):
            ends = to_array(f"edges[{at}]", edges[at])
            ends = ends.astype(np.float64) if ends.dtype.kind in "iuf" else np.empty(0)
            if ends.ndim != 1 or len(ends) < 2 or not (np.isfinite(ends).all() and (np.diff(ends) > 0.0).all()):
                raise ArgumentError(f"edges[{at}]: expected two or more rising finite numbers, got {edges[at]!r}")
            columns.append(Column(PIECES, len(ends) - 1))
            k = np.searchsorted(ends[1:-1], values, "right")
            parts.append(np.column_stack([k, (values - ends[k]) / (ends[k + 1] - ends[k])]))
        if numbers is not None:
            parts.append(take("numbers", numbers))
            columns.append(Column(NUMBERS, parts[-1].shape[1]))
        return cls(Coding(tuple(columns)), np.hstack(parts))

    @classmethod
    def from_sparse(cls, matrix: Any) -> Columns:
        """Return the rows of a sparse matrix of SciPy as bags, with room for the numbers of the fullest in each.

        Raises ArgumentTypeError, and DataError for NaN and infinities, or if a row far fuller than others costs memory.
        """
        if not is_sparse(matrix) or matrix.ndim != 2 or matrix.dtype.kind not in "biuf":
            raise ArgumentTypeError(f"matrix: expected a sparse matrix of SciPy with real numbers, got {matrix!r}")
        return _bags("matrix", matrix.tocsr(), np.result_type(matrix.dtype, np.float32))

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
    def size(self) -> int:
        """The number of the inputs of all rows."""
        return len(self.codes) * self.coding.inputs

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


def from_sparse(argument: str, X: Any, dtype: Any, *, codes: bool) -> Any:
    """Return a sparse matrix as Columns of a type, with ``codes`` where that is shorter, or else as a dense array."""
    if codes and X.ndim == 2 and X.dtype.kind in "biuf":
        X = X.tocsr()
        if SAVES * np.diff(X.indptr).max(initial=1) <= X.shape[1]:
            return _bags(argument, X, dtype)
    size = math.prod(X.shape) * np.dtype(dtype).itemsize
    _log.info("%s: the sparse rows become dense ones, of %s", argument, bytes_text(size))
    return X.toarray()


def _bags(argument: str, matrix: Any, dtype: np.dtype[Any]) -> Columns:
    """Return the rows of a matrix in SciPy's csr format as Columns of a type."""
    counts, (rows, inputs) = np.diff(matrix.indptr), matrix.shape
    fullest = int(counts.max(initial=1))
    # few lengths, so that batches have programs in common
    step = 1 << max(0, fullest.bit_length() - 3)
    pairs = -(-fullest // step) * step
    size = 2 * rows * pairs * np.dtype(dtype).itemsize
    if size >= LARGE and fullest > FULL * counts.mean():
        raise DataError(
            f"{argument}: row {counts.argmax()} has {fullest} numbers, and {counts.mean():.3g} are the mean: with room "
            f"for it in each row, codes take {bytes_text(size)}; shorten such rows, or give dense ones, "
            f"{argument}.toarray()"
        )
    at, column = np.repeat(np.arange(rows), counts), matrix.indices[: matrix.indptr[-1]]
    with np.errstate(over="ignore"):
        values = matrix.data[: len(at)].astype(dtype)
    bad = ~np.isfinite(values)
    if bad.any():
        first = int(np.argmax(bad))
        raise DataError(
            f"{argument}: expected finite numbers, got {values[first]} at row {at[first]}, column {column[first]}; "
            "fill in or drop missing values, and scale large ones"
        )
    codes, pair = np.full((rows, pairs, 2), (-1, 0), dtype), np.arange(len(at)) - np.repeat(matrix.indptr[:-1], counts)
    codes[at, pair, 0], codes[at, pair, 1] = column, values
    return Columns(Coding((Column(BAG, inputs, pairs),)), codes.reshape(rows, 2 * pairs))


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
