"""Predictions, losses and accuracies of an engine's network on data."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusemlp.describe.losses import Loss
from fusemlp.describe.network import MLP
from fusemlp.inputs import device as device_data
from fusemlp.inputs.targets import Targets, are_one_hot
from fusemlp.runtime.inference import Evaluation, Inference
from fusemlp.runtime.memory import Memory
from fusemlp_kernels.contract import Backend
from fusemlp_kernels.errors import ArgumentError

Array = np.ndarray[Any, Any]


class Predicting:
    """The part of an engine that reads its parameters and changes nothing."""

    network: MLP
    loss: Loss
    _backend: Backend
    _real: np.dtype[Any]
    _inference: Inference
    _class_weight: Any | None

    def predict(self, X: Any) -> Array:
        """Predict the targets of X (n, K).

        cross_entropy: class indices (n,) int64. binary_cross_entropy: 0 or 1, (n,) for one output, else (n, N). Other
        losses: values (n, N), or (n,) for one output; for poisson the expected counts.
        """
        outputs = self._outputs(X)
        if self.loss.kind == "cross_entropy":
            return np.asarray(outputs.argmax(axis=1))
        if self.loss.kind == "binary_cross_entropy":
            outputs = (outputs > 0.0).astype(np.int64)
        elif self.loss.kind == "poisson":
            outputs = np.exp(outputs)
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs

    def predict_proba(self, X: Any) -> Array:
        """Return probabilities (n, N) for X (n, K): of the classes, or of each label; one logit gives (n, 2).

        Raises ArgumentError if the loss is no cross-entropy.
        """
        if not self.loss.is_classification:
            raise ArgumentError(
                f"loss: predict_proba needs cross_entropy or binary_cross_entropy, this engine has {self.loss.kind!r}; "
                "use predict"
            )
        from scipy.special import expit

        outputs = self._outputs(X)
        if self.loss.kind == "cross_entropy":
            # In place: SciPy's softmax takes longer to identify the kind of array than to compute.
            with np.errstate(invalid="ignore"):
                outputs -= outputs.max(axis=1, keepdims=True)
            np.exp(outputs, out=outputs)
            outputs /= outputs.sum(axis=1, keepdims=True)
            return outputs
        if outputs.shape[1] == 1:
            return np.asarray(np.hstack([expit(-outputs), expit(outputs)]))
        return np.asarray(expit(outputs))

    def _outputs(self, X: Any) -> Array:
        return self._inference.outputs(self.features("X", X))

    def evaluate(self, X: Any, y: Any, sample_weight: Any = None) -> dict[str, float]:
        """Return the loss of X (n, K) and y, without dropout, and for classes the accuracy.

        Returns {"loss": ...} or {"loss": ..., "accuracy": ...}. Hits are not weighted. One-hot targets of mse, mae
        and huber count as classes.
        """
        features = self.features("X", X)
        targets = self.targets("y", y, rows=len(features))
        weight = self.weights("sample_weight", sample_weight, rows=len(features))
        return self.evaluate_checked(features, targets, weight)

    def evaluate_checked(self, X: Any, targets: Targets, weight: Any | None) -> dict[str, float]:
        """Return ``evaluate`` of checked arrays."""
        spec = self.loss.spec(accuracy=self.counts_hits(targets), soft=targets.soft)
        return self._inference.evaluate(X, targets.values, weight, spec, self._class_weight)

    def evaluation(self, X: Any, targets: Targets, weight: Any | None, *, apart: bool) -> Evaluation:
        """Return a repeatable ``evaluate_checked`` of the same arrays. With ``apart`` the parameters are copied first:
        the result serves all engines with these layers and this loss, and keeps no reference to this one."""
        mine = self._inference
        memory = mine.memory
        if apart:
            mixed = memory.shadow is not None
            memory = Memory(self.network, self._backend, 0, item_bytes=mine.real_bytes, mixed=mixed)
        inference = Inference(self.network, memory, real_bytes=mine.real_bytes, compute_bytes=mine.compute_bytes)
        spec = self.loss.spec(accuracy=self.counts_hits(targets), soft=targets.soft)
        return Evaluation(inference, X, targets.values, weight, spec, self._class_weight)

    def dead_units(self, X: Any) -> dict[str, float]:
        """Return for each hidden relu layer ("layer 1", ...) the share of units that are zero for every row of X."""
        silent = self._inference.silent_units(self.features("X", X))
        return {
            f"layer {index + 1}": float(units.mean())
            for index, units in enumerate(silent)
            if self.network.activations[index].name == "relu"
        }

    def features(self, argument: str, X: Any, *, check_finite: bool = True) -> Any:
        """Return X as a checked (n, K) array of the engine's type; on the device, of the device's array type."""
        return device_data.features(
            self._backend, argument, X, width=self.network.sizes[0], dtype=self._real, check_finite=check_finite
        )

    def targets(self, argument: str, y: Any, *, rows: int) -> Targets:
        """Return y as checked targets."""
        return device_data.targets(
            self._backend, argument, y, self.loss, outputs=self.network.sizes[-1], rows=rows, dtype=self._real
        )

    def weights(self, argument: str, weight: Any, *, rows: int) -> Any | None:
        """Return sample weights (n,), or None."""
        return (
            None
            if weight is None
            else device_data.weights(self._backend, argument, weight, rows=rows, dtype=self._real)
        )

    def on_host(self, array: Any) -> Array:
        """Return a result of ``features``, ``targets`` or ``weights`` in host memory."""
        return device_data.on_host(self._backend, array)

    def largest(self, array: Any) -> float:
        """Return the greatest absolute value in one of those."""
        return device_data.largest(self._backend, array)

    def counts_hits(self, targets: Targets) -> bool:
        """Return whether these targets have an accuracy."""
        if self.loss.is_classification:
            return True
        return self.loss.kind in ("mse", "mae", "huber") and are_one_hot(self.on_host(targets.values))
