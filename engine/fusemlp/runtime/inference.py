"""Predictions, losses and accuracies of an engine's network on data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fusemlp.describe.losses import Loss
from fusemlp.describe.metrics import Judged, Metric, as_metrics
from fusemlp.describe.network import MLP
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.examples import DeviceInputs, Examples, UserBatches
from fusemlp.runtime.forward import Evaluation, ForwardPass, MeanEvaluation, combined
from fusemlp.runtime.memory import Memory
from fusemlp.runtime.paths import path_gradient
from fusemlp.runtime.scaling import Scaling
from fusemlp_kernels.contract import LossSpec
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, ShapeError


class Inference:
    """Predictions of a network, its losses and metrics on data; ``Engine`` documents them. It changes no parameter.

    ``class_weight`` are the loss's, on the device.
    """

    def __init__(
        self, network: MLP, loss: Loss, memory: Memory, inputs: DeviceInputs, scaling: Scaling, class_weight: Any | None
    ) -> None:
        self.network, self.loss, self.inputs, self.scaling = network, loss, inputs, scaling
        self.class_weight, self.forward = class_weight, ForwardPass(network, memory, scaling)

    def predict(self, X: Any) -> Array:
        """Return the predicted targets of X (n, K)."""
        outputs = self.outputs(X)
        if self.loss.kind == "cross_entropy":
            return np.asarray(outputs.argmax(axis=1))
        if self.loss.kind == "binary_cross_entropy":
            outputs = (outputs > 0.0).astype(np.int64)
        elif self.loss.kind == "poisson":
            outputs = np.exp(outputs)
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs

    def predict_proba(self, X: Any) -> Array:
        """Return probabilities (n, N) for X (n, K); one logit gives (n, 2)."""
        if not self.loss.is_classification:
            raise ArgumentError(
                f"loss: predict_proba needs cross_entropy or binary_cross_entropy, this engine has {self.loss.kind!r}; "
                "use predict"
            )
        outputs = self.outputs(X)
        if self.loss.kind == "cross_entropy":
            # In place: SciPy's softmax takes longer to identify the kind of array than to compute.
            with np.errstate(invalid="ignore"):
                outputs -= outputs.max(axis=1, keepdims=True)
            np.exp(outputs, out=outputs)
            outputs /= outputs.sum(axis=1, keepdims=True)
            return outputs
        from scipy.special import expit

        if outputs.shape[1] == 1:
            return np.asarray(np.hstack([expit(-outputs), expit(outputs)]))
        return np.asarray(expit(outputs))

    def outputs(self, X: Any) -> Array:
        """Return the last layer's outputs (n, N) for X (n, K); with members those of the mean prediction."""
        return combined(self.loss.kind, self.member_outputs(X))

    def member_outputs(self, X: Any) -> Array:
        """Return the last layer's outputs (n, members, N) for X (n, K)."""
        X = self.inputs.features("X", X)
        self.scaling.check_measured()
        return self.forward.outputs(X)

    def input_gradient(self, X: Any, y: Any = None, *, output: Any = None) -> Array:
        """Return the gradient (n, K) of the loss of each row, or without y of its ``output``."""
        self.network.check_single("X", "the gradient by the inputs")
        if y is None:
            X = self.inputs.features("X", X)
            self.scaling.check_measured()
            return self.forward.input_gradient(X, {"seed": self.seeds(self.chosen(X, output))})
        if output is not None:
            raise ArgumentError("output: the loss of y reads all outputs; leave output or y out")
        data = self.inputs.examples(X, y, None)
        self.scaling.check_measured()
        spec, values = self.inputs.spec_for(data.targets), data.targets.values
        summed = replace(spec, reduction="sum")
        gradient = self.forward.input_gradient(data.X, {"target": values}, summed, self.class_weight)
        if spec.reduction == "mean" and spec.kind != "cross_entropy":
            gradient /= self.network.sizes[-1]
        elif spec.reduction == "mean" and self.class_weight is not None and not spec.soft:
            labels = self.inputs.on_host(values)
            counted = labels != spec.ignore_index
            factors = self.inputs.on_host(self.class_weight)[np.where(counted, labels, 0)]
            gradient *= np.divide(counted, factors, out=np.zeros_like(factors), where=factors > 0)[:, None]
        return gradient

    def path_gradient(self, X: Array, baseline: Array, output: Array, points: Array, weights: Array) -> Array:
        """Return ``paths.path_gradient`` of one output of each of the checked rows X, ``output`` (n,)."""
        self.network.check_single("X", "the gradient by the inputs")
        return path_gradient(self.forward, X, baseline, self.seeds(output), points, weights)

    def chosen(self, X: Any, output: Any = None) -> Array:
        """Return (n,) int64: the index of the output that is explained of each of the checked rows X.

        ``output`` is the index of a class or target, or (n,) one for each row; None stands for the predicted class, or
        for the only target. One logit has the classes 0 and 1. Raises ArgumentError, ArgumentTypeError or ShapeError.
        """
        outputs, single = self.network.sizes[-1], self._has_one_logit
        if output is None:
            if single or self.loss.kind == "cross_entropy":
                return np.asarray(self.predict(X))
            if outputs > 1:
                raise ArgumentError(f"output: the network has {outputs} outputs; give the index of one, output=0")
            output = 0
        indices, last = np.asarray(output), max(outputs, 1 + single) - 1
        if indices.dtype.kind not in "iu":
            raise ArgumentTypeError(f"output: expected the index of an output, or one a row, got {output!r}")
        if indices.shape not in ((), (len(X),)):
            raise ShapeError(f"output: expected one index, or {len(X)}, one a row, got shape {indices.shape}")
        if indices.min() < 0 or indices.max() > last:
            raise ArgumentError(f"output: expected an index from 0 to {last}, got {output!r}")
        return np.broadcast_to(indices.astype(np.int64), len(X))

    def seeds(self, output: Array) -> Array:
        """Return (n, N): the weights of a row's outputs in the explained one, whose index is ``output`` (n,).

        It is what the loss takes: the logit of a class, the logarithm of a count. Of one logit class 0 has its minus.
        """
        if self._has_one_logit:
            return np.asarray(np.where(output == 1, 1, -1)[:, None], self.inputs.real)
        return np.asarray(output[:, None] == np.arange(self.network.sizes[-1]), self.inputs.real)

    @property
    def _has_one_logit(self) -> bool:
        return self.loss.kind == "binary_cross_entropy" and self.network.sizes[-1] == 1

    def outputs_of(self, X: Any, layers: int) -> Array:
        """Return the outputs (n, N) of the first ``layers`` layers for checked rows X (n, K)."""
        self.network.check_single("layers", "the output of hidden layers")
        return self.forward.outputs(X, self.forward.first(layers))[:, 0]

    def evaluate(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        metrics: Iterable[str | Metric] = (),
        steps: int | None = None,
    ) -> dict[str, float]:
        """Return the loss of rows or batches, for classes the accuracy, and ``metrics`` by name."""
        data = self._rows_of(X, y, sample_weight, steps)
        self.scaling.check_measured()
        asked = as_metrics("metrics", metrics, self.inputs.kind_of(data.targets)) if metrics else ()
        spec = self.inputs.spec_for(data.targets)
        evaluation = self._evaluation(self.forward, data, spec, repeated=False)
        return {**evaluation.of(self.forward.trained), **self.figures(data, asked)}

    def _evaluation(
        self, forward: ForwardPass, data: Examples, spec: LossSpec, *, repeated: bool
    ) -> Evaluation | MeanEvaluation:
        if self.network.members > 1:
            return MeanEvaluation(forward, data, spec, self.class_weight)
        return Evaluation(forward, data, spec, self.class_weight, repeated)

    def _rows_of(self, X: Any, y: Any, weight: Any, steps: int | None) -> Examples:
        if y is not None and steps is None:
            return self.inputs.examples(X, y, weight)
        if y is not None:
            raise ArgumentError(f"steps: it counts batches, and X and y are arrays; leave it out, got {steps!r}")
        if weight is not None:
            raise ArgumentError("sample_weight: the batches bring their own; let them be (x, y, sample_weight)")
        return UserBatches("X", X, steps, "steps").collected(self.inputs)

    def figures(self, data: Examples, metrics: Sequence[Metric]) -> dict[str, float]:
        """Return these metrics of checked rows, by name."""
        if not metrics:
            return {}
        judged = self.judged(data)
        return {metric.name: metric.of(judged) for metric in metrics}

    def judged(self, data: Examples) -> Judged:
        """Return the truth of checked rows beside predictions and scores; rows of an ignored class are left out."""
        kind, truth = self.inputs.kind_of(data.targets), np.asarray(self.inputs.on_host(data.targets.values))
        weight = None if data.weight is None else np.asarray(self.inputs.on_host(data.weight))
        if kind == "numbers":
            predicted = self.predict(data.X).reshape(truth.shape)
            return Judged(truth, predicted, None, weight, getattr(self.loss, "q", 0.5))
        scores = self.predict_proba(data.X) if self.loss.is_classification else self.predict(data.X)
        if kind == "labels":
            return Judged(truth.astype(np.int64), (scores > 0.5).astype(np.int64), scores, weight)
        if truth.ndim == 2:
            truth = truth[:, 0].astype(np.int64) if truth.shape[1] == 1 else truth.argmax(axis=1)
        kept = truth != getattr(self.loss, "ignore_index", None)
        if not kept.all():
            truth, scores, weight = truth[kept], scores[kept], None if weight is None else weight[kept]
        return Judged(truth, scores.argmax(axis=1), scores, weight)

    def evaluation(self, data: Examples, *, apart: bool) -> Evaluation | MeanEvaluation:
        """Return a repeatable ``evaluate`` of the same arrays. With ``apart`` the parameters are copied first:
        the result serves all engines with these layers and this loss, and keeps no reference to this one."""
        memory = self.forward.memory
        if apart:
            real, compute = memory.real_bytes, memory.compute_bytes
            memory = Memory(self.network, self.inputs.backend, 0, item_bytes=real, compute_bytes=compute)
        forward, data = ForwardPass(self.network, memory), data._replace(X=self.scaling.normalised(data.X))
        return self._evaluation(forward, data, self.inputs.spec_for(data.targets), repeated=True)

    def dead_units(self, X: Any) -> dict[str, float]:
        """Return for each hidden relu layer the share of units that are zero for every row of X."""
        if self.network.members > 1:
            return {}
        features = self.inputs.features("X", X)
        self.scaling.check_measured()
        hidden = enumerate(self.network.activations[:-1])
        relu = [layer for layer, activation in hidden if activation.name == "relu"]
        return {f"layer {layer + 1}": self.forward.silent(features, layer) for layer in relu}
