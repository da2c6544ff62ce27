"""Predictions, losses and accuracies of an engine's network on data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fusemlp.describe.elsewhere import knows_names
from fusemlp.describe.metrics import Judged, Metric, as_metrics
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.batches import Batches
from fusemlp.inputs.targets import Examples, Targets
from fusemlp.runtime.inference import Evaluation, Inference
from fusemlp.runtime.members import MeanEvaluation, combined
from fusemlp.runtime.memory import Memory
from fusemlp.runtime.normalising import Normalising
from fusemlp.runtime.paths import path_gradient
from fusemlp_kernels.contract import LossSpec
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, ShapeError

_BY_ITSELF = "rows go through in blocks whose size is chosen by itself; leave it out"
# Arguments of Keras's methods.
OF_PREDICT = {
    "x": "it is called X here",
    "batch_size": _BY_ITSELF,
    "verbose": "it prints nothing; leave it out",
    "callbacks": "callbacks are for fit; leave it out",
    "return_dict": "evaluate returns a mapping; leave it out",
}


class Predicting(Normalising):
    """The part of an engine that reads its parameters and changes nothing."""

    class_weight: Any | None

    @knows_names(OF_PREDICT, call="predict(X)")
    def predict(self, X: Any) -> Array:
        """Predict the targets of X (n, K).

        cross_entropy: class indices (n,) int64. binary_cross_entropy: 0 or 1, (n,) for one output, else (n, N). Other
        losses: values (n, N), or (n,) for one output; for poisson the expected counts.
        """
        outputs = self.outputs(X)
        if self.loss.kind == "cross_entropy":
            return np.asarray(outputs.argmax(axis=1))
        if self.loss.kind == "binary_cross_entropy":
            outputs = (outputs > 0.0).astype(np.int64)
        elif self.loss.kind == "poisson":
            outputs = np.exp(outputs)
        return outputs[:, 0] if outputs.shape[1] == 1 else outputs

    @knows_names(OF_PREDICT, call="predict_proba(X)")
    def predict_proba(self, X: Any) -> Array:
        """Return probabilities (n, N) for X (n, K): of the classes, or of each label; one logit gives (n, 2).

        Raises ArgumentError if the loss is no cross-entropy.
        """
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
        """Return the last layer's outputs (n, N) for X (n, K): logits, if the loss is a cross-entropy.

        Those of a network with members are of the mean prediction: logits of the mean probability.
        """
        found = self._rows_out(X)
        return combined(self.loss.kind, found) if self.network.members > 1 else found

    def member_outputs(self, X: Any) -> Array:
        """Return the last layer's outputs (n, members, N) for X (n, K)."""
        found = self._rows_out(X)
        return found if self.network.members > 1 else found[:, None]

    def _rows_out(self, X: Any) -> Array:
        X = self.features("X", X)
        self.check_measured()
        return self._inference.outputs(X)

    @knows_names(OF_PREDICT, call="input_gradient(X, y)")
    def input_gradient(self, X: Any, y: Any = None, *, output: Any = None) -> Array:
        """Return gradients by the inputs, (n, K) of the engine's type, for X (n, K); nothing is dropped.

        With y (as in ``fit``): row i is the gradient of the loss of that row alone, ``evaluate(X[i : i + 1], y[i : i +
        1])["loss"]``, so the number of rows and other rows do not matter; rows of an ignored class have zeros.

        Without y: of one output of each row, before the loss's softmax or sigmoid; ``output`` as in ``chosen``. With
        normalised inputs the gradients are by the raw ones.

        Raises ArgumentError, ShapeError, DTypeError or DataError, before anything has been computed.
        """
        self.network.check_single("X", "the gradient by the inputs")
        if y is None:
            X = self.features("X", X)
            self.check_measured()
            return self._inference.input_gradient(X, {"seed": self.seeds(self.chosen(X, output))})
        if output is not None:
            raise ArgumentError("output: the loss of y reads all outputs; leave output or y out")
        data = self.examples(X, y, None)
        self.check_measured()
        spec, values = self.spec_for(data.targets), data.targets.values
        summed = replace(spec, reduction="sum")
        found = self._inference.input_gradient(data.X, {"target": values}, summed, self.class_weight)
        if spec.reduction == "mean" and spec.kind != "cross_entropy":
            found /= self.network.sizes[-1]
        elif spec.reduction == "mean" and self.class_weight is not None and not spec.soft:
            labels = self.on_host(values)
            counted = labels != spec.ignore_index
            own = self.on_host(self.class_weight)[np.where(counted, labels, 0)]
            found *= np.divide(counted, own, out=np.zeros_like(own), where=own > 0)[:, None]
        return found

    def path_gradient(self, X: Array, baseline: Array, output: Array, points: Array, weights: Array) -> Array:
        """Return ``paths.path_gradient`` of one output of each of the checked rows X, ``output`` (n,)."""
        self.network.check_single("X", "the gradient by the inputs")
        return path_gradient(self._inference, X, baseline, self.seeds(output), points, weights)

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
        given, last = np.asarray(output), max(outputs, 1 + single) - 1
        if given.dtype.kind not in "iu":
            raise ArgumentTypeError(f"output: expected the index of an output, or one a row, got {output!r}")
        if given.shape not in ((), (len(X),)):
            raise ShapeError(f"output: expected one index, or {len(X)}, one a row, got shape {given.shape}")
        if given.min() < 0 or given.max() > last:
            raise ArgumentError(f"output: expected an index from 0 to {last}, got {output!r}")
        return np.broadcast_to(given.astype(np.int64), len(X))

    def seeds(self, output: Array) -> Array:
        """Return (n, N): the weights of a row's outputs in the explained one, whose index is ``output`` (n,).

        It is what the loss takes: the logit of a class, the logarithm of a count. Of one logit class 0 has its minus.
        """
        if self._has_one_logit:
            return np.asarray(np.where(output == 1, 1, -1)[:, None], self._real)
        return np.asarray(output[:, None] == np.arange(self.network.sizes[-1]), self._real)

    @property
    def _has_one_logit(self) -> bool:
        return self.loss.kind == "binary_cross_entropy" and self.network.sizes[-1] == 1

    def outputs_of(self, X: Any, layers: int) -> Array:
        """Return the outputs (n, N) of the first ``layers`` layers for checked rows X (n, K)."""
        self.network.check_single("layers", "the output of hidden layers")
        return self._inference.outputs(X, self._inference.first(layers))

    @knows_names(OF_PREDICT, call="evaluate(X, y)")
    def evaluate(
        self,
        X: Any,
        y: Any = None,
        sample_weight: Any = None,
        *,
        metrics: Iterable[str | Metric] = (),
        steps: int | None = None,
    ) -> dict[str, float]:
        """Return the loss of X (n, K) and y, without dropout, for classes the accuracy, and ``metrics`` by name.

        Without y, X yields batches as in ``fit``; they are collected, ``steps`` of them (by default len(X)).

        Returns {"loss": ...} or {"loss": ..., "accuracy": ...}. Hits are not weighted. One-hot targets of mse, mae
        and huber count as classes. metrics: of ``fusemlp.describe.metrics.METRICS``, such as ["auc", "f1"]; they weigh
        rows by ``sample_weight``.
        """
        data = self._rows_of(X, y, sample_weight, steps)
        self.check_measured()
        asked = as_metrics("metrics", metrics, self.kind_of(data.targets)) if metrics else ()
        spec = self.spec_for(data.targets)
        evaluation = self._evaluation(self._inference, data, spec, repeated=False)
        return {**evaluation.of(self._inference.trained), **self.figures(data, asked)}

    def _evaluation(
        self, inference: Inference, data: Examples, spec: LossSpec, *, repeated: bool
    ) -> Evaluation | MeanEvaluation:
        if self.network.members > 1:
            return MeanEvaluation(inference, data, spec, self.class_weight)
        return Evaluation(inference, data, spec, self.class_weight, repeated)

    def _rows_of(self, X: Any, y: Any, weight: Any, steps: int | None) -> Examples:
        if y is not None and steps is None:
            return self.examples(X, y, weight)
        if y is not None:
            raise ArgumentError(f"steps: it counts batches, and X and y are arrays; leave it out, got {steps!r}")
        if weight is not None:
            raise ArgumentError("sample_weight: the batches bring their own; let them be (x, y, sample_weight)")
        return Batches("X", X, steps, "steps").collected(self)

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

    def figures(self, data: Examples, metrics: Sequence[Metric]) -> dict[str, float]:
        """Return these metrics of checked rows, by name."""
        if not metrics:
            return {}
        judged = self.judged(data)
        return {metric.name: metric.of(judged) for metric in metrics}

    def judged(self, data: Examples) -> Judged:
        """Return the truth of checked rows beside predictions and scores; rows of an ignored class are left out."""
        kind, truth = self.kind_of(data.targets), np.asarray(self.on_host(data.targets.values))
        weight = None if data.weight is None else np.asarray(self.on_host(data.weight))
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
        memory = self._inference.memory
        if apart:
            real, compute = memory.real_bytes, memory.compute_bytes
            memory = Memory(self.network, self._backend, 0, item_bytes=real, compute_bytes=compute)
        inference, data = Inference(self.network, memory), data._replace(X=self.normalised(data.X))
        return self._evaluation(inference, data, self.spec_for(data.targets), repeated=True)

    def dead_units(self, X: Any) -> dict[str, float]:
        """Return for each hidden relu layer ("layer 1", ...) the share of units that are zero for every row of X.

        Of a network with members none is looked at.
        """
        if self.network.members > 1:
            return {}
        features = self.features("X", X)
        self.check_measured()
        hidden = enumerate(self.network.activations[:-1])
        relu = [layer for layer, activation in hidden if activation.name == "relu"]
        return {f"layer {layer + 1}": self._inference.silent(features, layer) for layer in relu}

    def spec_for(self, targets: Targets) -> LossSpec:
        """Return the loss of these targets. Raises ArgumentError if it does not take them."""
        return self.loss.spec(accuracy=self.counts_hits(targets), soft=targets.soft)
