"""Checks of arrays that already lie on the engine's device: they are looked at there, and go in without a copy.

What is right is returned as the backend's own array over the same memory. What is not, or needs a look at every row, is
read to the host once and given to the checks of ``validation``: they say what is wrong, in the same words for all
arrays, or return the converted host array.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusemlp.describe.losses import Loss
from fusemlp.inputs.arrays import as_features, as_weights
from fusemlp.inputs.targets import Targets, as_targets
from fusemlp_kernels.contract import Backend

Array = np.ndarray[Any, Any]


def features(backend: Backend, argument: str, value: Any, *, width: int, dtype: Any, check_finite: bool = True) -> Any:
    """``as_features`` of an array on the device: (n, width), on the device if nothing is wrong with it."""
    native = backend.adopt(value)
    if native is None:
        return as_features(argument, value, width=width, dtype=dtype, check_finite=check_finite)
    if _shape(native)[1:] == (width,) and len(native) and (not check_finite or _fits(backend, native, dtype)):
        return native
    return as_features(argument, backend.to_host(native), width=width, dtype=dtype, check_finite=check_finite)


def targets(backend: Backend, argument: str, value: Any, loss: Loss, *, outputs: int, rows: int, dtype: Any) -> Targets:
    """``as_targets`` of an array on the device. Rows of probabilities, and labels that may be ignored, come from the
    host: their checks look at every row."""
    native = backend.adopt(value)
    if native is None:
        return as_targets(argument, value, loss, outputs=outputs, rows=rows, dtype=dtype)
    shape = _shape(native)
    if loss.kind == "cross_entropy":
        labels = _column(native)
        if labels is not None and len(labels) == rows and backend.is_integer(labels):
            low, high = backend.extent(labels)
            if low >= 0 and high < outputs:
                return Targets(labels, False)
    else:
        values = native.reshape(-1, 1) if len(shape) == 1 and outputs == 1 else native
        lowest, highest = {"binary_cross_entropy": (0.0, 1.0), "poisson": (0.0, np.inf)}.get(
            loss.kind, (-np.inf, np.inf)
        )
        matches = _shape(values) == (rows, outputs) and not backend.is_integer(values)
        if matches and _fits(backend, values, dtype, lowest, highest):
            return Targets(values, False)
    return as_targets(argument, backend.to_host(native), loss, outputs=outputs, rows=rows, dtype=dtype)


def weights(backend: Backend, argument: str, value: Any, *, rows: int, dtype: Any) -> Any:
    """``as_weights`` of an array on the device, (n,)."""
    native = backend.adopt(value)
    if native is None:
        return as_weights(argument, value, rows=rows, dtype=dtype)
    column = _column(native)
    if column is not None and len(column) == rows and not backend.is_integer(column):
        low, high = backend.extent(column)
        # the bound keeps the sum of the rows below the largest number
        if low >= 0.0 and 0.0 < high <= np.finfo(dtype).max / rows:
            return column
    return as_weights(argument, backend.to_host(native), rows=rows, dtype=dtype)


def on_host(backend: Backend, array: Any) -> Array:
    """The array in host memory: itself, where it is there."""
    return array if isinstance(array, np.ndarray) else backend.to_host(array)


def largest(backend: Backend, array: Any) -> float:
    """The greatest absolute value."""
    if isinstance(array, np.ndarray):
        return float(np.abs(array).max())
    return max(abs(bound) for bound in backend.extent(array))


def _shape(native: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in native.shape)


def _column(native: Any) -> Any | None:
    shape = _shape(native)
    if len(shape) == 1:
        return native
    return native.reshape(-1) if len(shape) == 2 and shape[1] == 1 else None


def _fits(backend: Backend, native: Any, dtype: Any, lowest: float = -np.inf, highest: float = np.inf) -> bool:
    """Whether all elements are numbers that ``dtype`` holds, from ``lowest`` to ``highest``."""
    low, high = backend.extent(native)
    most = float(np.finfo(dtype).max)
    return max(lowest, -most) <= low and high <= min(highest, most)
