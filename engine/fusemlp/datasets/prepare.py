"""Prepare rows of a data set for a training: fit the preprocessing, encode the labels, make the network's inputs.

The command line and the estimators of tables share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fusemlp.datasets.load import Dataset
from fusemlp.datasets.memory import check_memory
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import DataError

# Losses that train classes as one-hot rows.
ONE_HOT = frozenset({"mse", "mae", "huber"})
_PIECE = 2**15


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows for the engine: X (n, inputs), y for the loss, and ``labels`` as in the data."""

    X: Array
    y: Array
    labels: Array
    weight: Array | None = None

    def __len__(self) -> int:
        return len(self.X)


def fit_preprocessor(dataset: Dataset, rows: npt.ArrayLike, *, loss: str, **options: Any) -> Preprocessor:
    """Return a Preprocessor of the training ``rows`` with targets as ``loss`` takes them."""
    return Preprocessor.fit(dataset, rows, one_hot_targets=loss in ONE_HOT, scale_targets=loss != "poisson", **options)


def network_ends(preprocessor: Preprocessor, loss: str) -> tuple[int, int]:
    """Return the widths of the network's first and last layer."""
    return preprocessor.width, 1 if loss == "binary_cross_entropy" else preprocessor.outputs


def rows_for(
    preprocessor: Preprocessor,
    X: Array,
    labels: Array,
    *,
    precision: str,
    rows: Array | None = None,
    weight: Array | None = None,
) -> Rows:
    """Return rows of X as ``load_data`` gives them (``rows`` are their indices, None for all) for an engine."""
    inputs = network_inputs(preprocessor, X, precision, rows)
    return Rows(inputs, preprocessor.encode_targets(labels), labels, weight)


def network_inputs(preprocessor: Preprocessor, X: Array, precision: str, rows: Array | None = None) -> Array:
    """Return the inputs of rows (None: all) in the network's type, a piece at a time: float64 takes twice the memory.

    Raises DataError, before it takes the memory, if there is not enough.
    """
    count = len(X) if rows is None else len(rows)
    check_memory(preprocessor, count, precision)
    inputs = np.empty((count, preprocessor.width), np.float64 if precision == "fp64" else np.float32)
    finite = True
    try:
        with np.errstate(over="ignore"):
            for start in range(0, count, _PIECE):
                piece = inputs[start : start + _PIECE]
                given = slice(start, start + _PIECE) if rows is None else rows[start : start + _PIECE]
                piece[:] = preprocessor.transform_features(X[given])
                finite = finite and bool(np.isfinite(piece).all())
    except DataError:
        # Its message has the row in the piece.
        finite = False
    # The engine's error names a value that float32 cannot hold.
    return inputs if finite else preprocessor.transform_features(X if rows is None else X[rows])
