"""Check arrays on the engine's device, and use them there without a copy.

A valid array returns as the backend's own array over the same memory. An invalid one, or one that needs a check of
every row, is copied to the host once and passed to the checks of ``arrays``. They raise the same errors as for host
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
    """Return ``as_features`` of a device array: (n, width), on the device if it is valid."""
    native = backend.adopt(value)
    if native is None:
        return as_features(argument, value, width=width, dtype=dtype, check_finite=check_finite)
    if _shape(native)[1:] == (width,) and len(native) and (not check_finite or _fits(backend, native, dtype)):
        return native
    return as_features(argument, backend.to_host(native), width=width, dtype=dtype, check_finite=check_finite)


def targets(backend: Backend, argument: str, value: Any, loss: Loss, *, outputs: int, rows: int, dtype: Any) -> Targets:
    """Return ``as_targets`` of a device array. Rows of probabilities and labels with an ignored index go to the host,
    because their checks read every row."""
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
    """Return ``as_weights`` of a device array, (n,)."""
    native = backend.adopt(value)
    if native is None:
        return as_weights(argument, value, rows=rows, dtype=dtype)
    column = _column(native)
    if column is not None and len(column) == rows and not backend.is_integer(column):
        low, high = backend.extent(column)
        # The bound keeps the sum of the rows finite.
        if low >= 0.0 and 0.0 < high <= np.finfo(dtype).max / rows:
            return column
    return as_weights(argument, backend.to_host(native), rows=rows, dtype=dtype)


def on_host(backend: Backend, array: Any) -> Array:
    """Return the array in host memory, without a copy if it is there."""
    return array if isinstance(array, np.ndarray) else backend.to_host(array)


def largest(backend: Backend, array: Any) -> float:
    """Return the greatest absolute value."""
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
    """Return whether all elements are from ``lowest`` to ``highest`` and finite in ``dtype``."""
    low, high = backend.extent(native)
    most = float(np.finfo(dtype).max)
    return max(lowest, -most) <= low and high <= min(highest, most)
