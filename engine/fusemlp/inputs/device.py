"""Check arrays on the engine's device, and use them there without a copy.

A valid array returns as the backend's own array over the same memory. An invalid one, or one that needs a check of
every row, is copied to the host once and passed to the checks of ``arrays``. They raise the same errors as for host
arrays, or return the converted host array.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusemlp.describe.losses import Loss
from fusemlp.describe.network import MLP
from fusemlp.inputs.arrays import Array, as_features, as_weights
from fusemlp.inputs.batches import holds_batches
from fusemlp.inputs.targets import Examples, Targets, are_one_hot, as_targets
from fusemlp_kernels.contract import Backend, LossSpec
from fusemlp_kernels.errors import ArgumentError, FusemlpError


class DeviceInputs:
    """Checks the user's arrays, on the host or on the device, for a network and its loss.

    Arrays of numbers become those of the type ``real``, the parameters'.
    """

    def __init__(self, network: MLP, loss: Loss, backend: Backend, real: np.dtype[Any]) -> None:
        self.network, self.loss, self.backend, self.real = network, loss, backend, real

    def features(self, argument: str, X: Any, *, check_finite: bool = True) -> Any:
        """Return X as a checked (n, K) array of the engine's type; on the device, of the device's array type."""
        width, native = self.network.sizes[0], self.backend.adopt(X)
        if native is not None:
            if _shape(native)[1:] == (width,) and len(native) and (not check_finite or self._fits(native)):
                return native
            X = self.backend.to_host(native)
        return as_features(argument, X, width=width, dtype=self.real, check_finite=check_finite)

    def targets(self, argument: str, y: Any, *, rows: int) -> Targets:
        """Return y as checked targets. Rows of probabilities and labels with an ignored index go to the host, because
        their checks read every row."""
        backend, loss, outputs, native = self.backend, self.loss, self.network.sizes[-1], self.backend.adopt(y)
        if native is not None:
            if loss.kind == "cross_entropy":
                labels = _column(native)
                if labels is not None and len(labels) == rows and backend.is_integer(labels):
                    low, high = backend.extent(labels)
                    if low >= 0 and high < outputs:
                        return Targets(labels, False)
            else:
                values = native.reshape(-1, 1) if len(_shape(native)) == 1 and outputs == 1 else native
                bounds = {"binary_cross_entropy": (0.0, 1.0), "poisson": (0.0, np.inf)}.get(loss.kind, ())
                matches = _shape(values) == (rows, outputs) and not backend.is_integer(values)
                if matches and self._fits(values, *bounds):
                    return Targets(values, False)
            y = backend.to_host(native)
        found = as_targets(argument, y, loss, outputs=outputs, rows=rows, dtype=self.real)
        # checked on the host and not converted: those on the device will do
        return found if native is None or found.values is not y else Targets(native, found.soft)

    def weights(self, argument: str, weight: Any, *, rows: int) -> Any | None:
        """Return sample weights (n,), or None."""
        if weight is None:
            return None
        backend, native = self.backend, self.backend.adopt(weight)
        if native is not None:
            column = _column(native)
            if column is not None and len(column) == rows and not backend.is_integer(column):
                low, high = backend.extent(column)
                # The bound keeps the sum of the rows finite.
                if low >= 0.0 and 0.0 < high <= np.finfo(self.real).max / rows:
                    return column
            weight = backend.to_host(native)
        return as_weights(argument, weight, rows=rows, dtype=self.real)

    def examples(
        self, X: Any, y: Any, weight: Any, names: tuple[str, str, str] = ("X", "y", "sample_weight")
    ) -> Examples:
        """Return all of these checked; error messages call them by ``names``."""
        try:
            features = self.features(names[0], X)
        except FusemlpError as error:
            if holds_batches(X):
                raise ArgumentError(
                    f"{names[1]}: leave it out: {names[0]} holds batches, which bring theirs"
                ) from error
            raise
        rows = len(features)
        return Examples(features, self.targets(names[1], y, rows=rows), self.weights(names[2], weight, rows=rows))

    def on_host(self, array: Any) -> Array:
        """Return a checked array in host memory, without a copy if it is there."""
        return array if isinstance(array, np.ndarray) else self.backend.to_host(array)

    def largest(self, array: Any) -> float:
        """Return the greatest absolute value in a checked array."""
        return max(map(abs, self.extent(array)))

    def extent(self, array: Any) -> tuple[float, float]:
        """Return the least and the greatest value in a checked array."""
        if isinstance(array, np.ndarray):
            return float(array.min()), float(array.max())
        return self.backend.extent(array)

    def counts_hits(self, targets: Targets) -> bool:
        """Return whether these targets have an accuracy."""
        if self.loss.is_classification:
            return True
        if self.loss.kind not in ("mse", "mae", "huber"):
            return False
        # most other targets on a device stay there
        values = targets.values
        return (isinstance(values, np.ndarray) or self.extent(values) == (0, 1)) and are_one_hot(self.on_host(values))

    def kind_of(self, targets: Targets) -> str | None:
        """Return which of ``fusemlp.describe.metrics.KINDS`` these targets are; None for probabilities."""
        if not self.loss.is_classification:
            return "one-hot rows" if self.counts_hits(targets) else "numbers"
        if self.loss.kind == "cross_entropy":
            return None if targets.soft else "classes"
        values = self.on_host(targets.values)
        if not ((values == 0.0) | (values == 1.0)).all():
            return None
        return "classes" if values.shape[1] == 1 else "labels"

    def spec_for(self, targets: Targets) -> LossSpec:
        """Return the loss of these targets. Raises ArgumentError if it does not take them."""
        return self.loss.spec(accuracy=self.counts_hits(targets), soft=targets.soft)

    def _fits(self, native: Any, lowest: float = -np.inf, highest: float = np.inf) -> bool:
        """Return whether all elements are from ``lowest`` to ``highest`` and finite in the engine's type."""
        low, high = self.backend.extent(native)
        most = float(np.finfo(self.real).max)
        return max(lowest, -most) <= low and high <= min(highest, most)


def _shape(native: Any) -> tuple[int, ...]:
    return tuple(int(size) for size in native.shape)


def _column(native: Any) -> Any | None:
    shape = _shape(native)
    if len(shape) == 1:
        return native
    return native.reshape(-1) if len(shape) == 2 and shape[1] == 1 else None
