"""Predictions, losses and accuracies of an engine's network on data, and gradients on lines of inputs.

The first layer's pre-activation is linear on a line: z1(a) = z1(0) + a * (z1(1) - z1(0)). So the products of the rows
and of the baselines with the first weights serve all points of the lines, and the average of dz1 takes one product
back: the work of a point begins at the first hidden layer, of which it needs h1 = act(z1).
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fusemlp.describe.conflicts import check_together
from fusemlp.describe.losses import GaussianNLL, Loss
from fusemlp.describe.metrics import Judged, Metric, MetricLike, as_metrics
from fusemlp.describe.network import MLP, Activation
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.examples import DeviceInputs, Examples, UserBatches
from fusemlp.program.builder import Pass
from fusemlp.program.layout import placement
from fusemlp.runtime import forward
from fusemlp.runtime.forward import Evaluate, Evaluation, ForwardPass, combined, last_layers, mean_evaluation
from fusemlp.runtime.memory import Memory, Workspace
from fusemlp.runtime.own_loss import own_evaluation
from fusemlp.runtime.scaling import Scaling
from fusemlp_kernels.contract import LossSpec, UpdateRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, ShapeError

# Elements of the widest activation of the points that a CPU takes at a time: they stay in its cache.
IN_CACHE = 1 << 17


def path_gradient(passes: ForwardPass, X: Any, baseline: Any, seed: Array, points: Array, weights: Array) -> Array:
    """Return the sum over p of weights[p] times the gradient at baseline + points[p] * (X - baseline), (n, K).

    ``X`` and ``baseline`` are checked rows (n, K), the latter perhaps one row; ``seed`` (n, N) weighs the outputs.
    """
    net = passes.net
    if net.layers == 1 or net.encoding is not None:
        total = np.zeros(X.shape, passes.real)
        for point, weight in zip(points.tolist(), weights.tolist(), strict=True):
            total += weight * passes.input_gradient(baseline + point * (X - baseline), {"seed": seed})
        return total
    head = MLP(net.sizes[:2], output_activation="identity")
    start = passes.outputs(baseline, head)
    step = passes.outputs(X, head) - start
    start = np.broadcast_to(start, step.shape)
    most = min(forward.LARGEST, IN_CACHE) if passes.memory.backend.traits.on_host else forward.LARGEST
    rows = max(1, min(len(step), most // (max(net.sizes[1:]) * len(points))))
    lines, mean = _Lines(passes, rows, points, weights), np.empty_like(step)
    for first in range(0, len(step), rows):
        part = slice(first, first + rows)
        mean[part] = lines.mean(start[part], step[part], seed[part])
    return passes.input_gradient(X, {"seed": mean}, net=head)


class _Lines:
    """The calls for ``rows`` lines with these points, and the memory between them.

    A matrix (points * rows, H) of the first hidden layer is at the same time one of (points, rows * H): so ``linear``
    with one input, the place on the lines, gives h1, and ``grad_weight``'s sum over a batch of points is the average.
    """

    def __init__(self, passes: ForwardPass, rows: int, points: Array, weights: Array) -> None:
        memory, net = passes.memory, passes.net
        self.backend, self.rows, self.weights = memory.backend, rows, weights
        backend, count, width = self.backend, len(points), net.sizes[1]
        multiple = backend.traits.row_multiple
        pitch = -(-width // multiple) * multiple
        long = rows * pitch

        def room(dtype: str, columns: int, pitch: int, lines: int = 1) -> tuple[Any, Any]:
            """Return an array (lines, columns), and the flat one that it is a view of."""
            flat = backend.allocate(lines * pitch, dtype)
            return backend.view(flat, 0, (lines, columns), pitch), flat

        self.start, start = room("real", width, pitch, rows)
        self.step, step = room("compute", width, pitch, rows)
        self.sums, sums = room("real", width, pitch, rows)
        place, _ = room("compute", 1, multiple, count)
        backend.copy_into(place, points.astype(passes.real)[:, None])
        inner = passes.lowered(net, count * rows, gradient=1)
        # the output of the product alone where the rest of the layer is a call of its own
        given = [name for name in ("u1", "h1", "z1") if name in inner.values and inner.values[name].kind == "data"]
        hidden = {name: room("compute", width, pitch, count * rows) for name in given}
        whole = {name: backend.view(flat, 0, (count, long), long) for name, (_, flat) in hidden.items()}
        activation = Activation("identity") if "u1" in whole else net.activations[0]
        self._spread = backend.bind(
            "linear",
            x=place,
            w=backend.view(step, 0, (long, 1), 1),
            b=start,
            y=whole[given[0]],
            activation=activation.name,
            slope=activation.fixed_slope or 0.0,
            **({"slope_param": memory.arrays["s0"]} if activation.name == "prelu" else {}),
            **({"z": whole["z1"]} if "z1" in whole else {}),
        )
        workspace, arrays = Workspace(backend), {name: view for name, (view, _) in hidden.items()}
        self._inner = passes.bind(inner, workspace, **arrays)
        dtype, dz = placement(inner.structure, memory.layout, row_multiple=multiple).places["dz1"]
        gradients = backend.view(workspace.arena(dtype, 0), dz.offset, (count, long), long)
        self._sum = backend.bind(
            "grad_weight",
            layers=({"dz": gradients, "x": place, "dw": None, "db": sums},),
            rule=UpdateRule("sgd"),
            counters=passes.counters,
        )

    def mean(self, start: Array, step: Array, seed: Array) -> Array:
        """Return the average of dz1 (n, H) on lines from ``start`` to ``start + step`` (n, H), ``seed`` (n, N)."""
        count = len(start)
        copy, weighed = self.backend.copy_into, self.weights[:, None, None] * seed
        copy(self.start[:count], start)
        copy(self.step[:count], step)
        seeds = np.zeros((len(self.weights), self.rows, seed.shape[1]), seed.dtype)
        seeds[:, :count] = weighed
        copy(self._inner.arrays["seed"], seeds.reshape(-1, seed.shape[1]))
        self._spread()
        self._inner.run()
        self._sum()
        return self.backend.to_host(self.sums)[:count]


class Inference:
    """Predictions of a network, its losses and metrics on data; ``Engine`` documents them. It changes no parameter.

    ``class_weight`` are the loss's, on the device. ``passes`` change its programs.
    """

    def __init__(
        self,
        network: MLP,
        loss: Loss,
        memory: Memory,
        inputs: DeviceInputs,
        scaling: Scaling,
        class_weight: Any | None,
        passes: tuple[Pass, ...],
    ) -> None:
        self.network, self.loss, self.inputs, self.scaling = network, loss, inputs, scaling
        self.class_weight, self.forward = class_weight, ForwardPass(network, memory, scaling, passes)

    def predict(self, X: Any) -> Array:
        """Return the predicted targets of X (n, K)."""
        values = self.loss.transform(self.outputs(X))
        return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values

    def predict_std(self, X: Any, merged_biases: Array | None = None) -> tuple[Array, Array]:
        """Return the predicted targets of X (n, K) and their standard deviations, of the same shape.

        Those of merged models, with ``merged_biases``, are the deviations of the mixture of their distributions.
        """
        if not isinstance(self.loss, GaussianNLL):
            raise ArgumentError(
                f"return_std: it needs the loss gaussian, this engine has {self.loss.kind!r}; make it with that"
            )
        outputs, last = self.outputs(X), self.network.layers - 1
        mean = self.loss.transform(outputs)
        if merged_biases is not None and last:
            state = self.forward.memory.evaluated_tensors()
            weight, bias = last_layers(state[f"{2 * last}.weight"], state[f"{2 * last}.bias"], merged_biases)
            hidden = self.forward.outputs(self.checked(X, codes=True), layers=last)
            outputs = (hidden @ weight.T + bias).reshape(len(hidden), -1, outputs.shape[1])
        std = self.loss.std(outputs)
        return (mean[:, 0], std[:, 0]) if mean.shape[1] == 1 else (mean, std)

    def predict_proba(self, X: Any) -> Array:
        """Return probabilities (n, N) for X (n, K); one logit gives (n, 2)."""
        loss = self.loss.answers
        if not loss.is_classification:
            raise ArgumentError(
                f"loss: predict_proba needs cross_entropy or binary_cross_entropy, this engine has {loss.kind!r}; "
                "use predict"
            )
        outputs = self.outputs(X)
        if loss.kind == "cross_entropy":
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
        outputs, members = self.forward.outputs(self.checked(X, codes=True)), self.network.members
        return outputs if members == 1 else combined(self.loss.kind, outputs, members)

    def member_outputs(self, X: Any) -> Array:
        """Return the last layer's outputs (n, members, N) for X (n, K)."""
        outputs = self.forward.outputs(self.checked(X, codes=True))
        return outputs.reshape(-1, self.network.members, outputs.shape[1])

    def checked(self, X: Any, *, codes: bool = False) -> Any:
        """Return checked rows X (n, K) for a prediction, with ``codes`` perhaps Columns."""
        rows = self.inputs.features("X", X, codes=codes)
        self.scaling.check_measured()
        return rows

    def input_gradient(self, X: Any, y: Any = None, *, output: Any = None) -> Array:
        """Return the gradient (n, K) of the loss of each row, or without y of its ``output``."""
        self.network.check_single("X", "the gradient by the inputs")
        if y is None:
            X = self.checked(X)
            return self.forward.input_gradient(X, {"seed": self.seeds(self.chosen(X, output))})
        if output is not None:
            raise ArgumentError("output: the loss of y reads all outputs; leave output or y out")
        check_together({**self.loss.uses, "loss by inputs": True})
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
        with self.forward.turn:
            return path_gradient(self.forward, X, baseline, self.seeds(output), points, weights)

    def chosen(self, X: Any, output: Any = None) -> Array:
        """Return (n,) int64: the index of the output that is explained of each of the checked rows X.

        ``output`` is the index of a class or target, or (n,) one for each row; None stands for the predicted class, or
        for the only target. One logit has the classes 0 and 1. Raises ArgumentError, ArgumentTypeError or ShapeError.
        """
        outputs, single = self.network.sizes[-1], self._has_one_logit
        if output is None:
            if single or self.loss.answers.kind == "cross_entropy":
                return np.asarray(self.predict(X))
            output = self.loss.point(outputs)
            if output is None:
                raise ArgumentError(f"output: the network has {outputs} outputs; give the index of one, output=0")
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
        return self.loss.answers.kind == "binary_cross_entropy" and self.network.sizes[-1] == 1

    def outputs_of(self, X: Any, layers: int) -> Array:
        """Return the outputs (n, N) of the first ``layers`` layers for checked rows X (n, K)."""
        self.network.check_single("layers", "the output of hidden layers")
        return self.forward.outputs(X, layers=layers)

    def evaluate(
        self, X: Any, y: Any, weight: Any = None, metrics: Iterable[MetricLike] = (), steps: int | None = None
    ) -> dict[str, float]:
        """Return the loss of rows or batches, for classes the accuracy, and ``metrics`` by name."""
        data = self._rows_of(X, y, weight, steps)
        self.scaling.check_measured()
        kind, hits = self.inputs.kind_of(data.targets), not self.loss.on_host
        asked = as_metrics("metrics", metrics, kind, counts_hits=hits) if metrics else ()
        spec = self.inputs.spec_for(data.targets)
        with self.forward.turn:
            evaluate = self._evaluation(self.forward, data, spec, repeated=False)
            return {**evaluate(self.forward.trained), **self.figures(data, asked)}

    def _evaluation(self, forward: ForwardPass, data: Examples, spec: LossSpec, *, repeated: bool) -> Evaluate:
        if self.loss.on_host:
            return own_evaluation(forward, data, self.inputs)
        if self.network.members > 1:
            return mean_evaluation(forward, data, spec, self.class_weight)
        return Evaluation(forward, data, spec, self.class_weight, repeated)

    def _rows_of(self, X: Any, y: Any, weight: Any, steps: int | None) -> Examples:
        if y is not None and steps is None:
            return self.inputs.examples(X, y, weight, codes=True)
        if y is not None:
            raise ArgumentError(f"steps: it counts batches, and X and y are arrays; leave it out, got {steps!r}")
        if weight is not None:
            raise ArgumentError("sample_weight: the batches bring their own; let them be (x, y, sample_weight)")
        return UserBatches("X", X, steps, "steps").collected(self.inputs)

    def figures(self, data: Examples, metrics: Sequence[Metric]) -> dict[str, float]:
        """Return these metrics of checked rows, by name."""
        if not metrics:
            return {}
        judged: Any = None if all(metric.of_outputs for metric in metrics) else self.judged(data)
        raw: list[Array] = []
        if any(metric.of_outputs for metric in metrics):
            raw = [self.inputs.on_host(data.targets.values), self.outputs(data.X)]
        return {metric.name: metric.of(*raw) if metric.of_outputs else metric.of_rows(judged) for metric in metrics}

    def judged(self, data: Examples) -> Judged:
        """Return the truth of checked rows beside predictions and scores; rows of an ignored class are left out."""
        kind, truth = self.inputs.kind_of(data.targets), np.asarray(self.inputs.on_host(data.targets.values))
        weight = None if data.weight is None else np.asarray(self.inputs.on_host(data.weight))
        if kind == "numbers":
            predicted, quantile = self.loss.judged(self.predict(data.X))
            return Judged(truth, predicted.reshape(truth.shape), None, weight, quantile)
        scores = self.predict_proba(data.X) if self.loss.is_classification else self.predict(data.X)
        if kind == "labels":
            return Judged.of_labels(truth, scores, weight)
        if truth.ndim == 2:
            truth = truth[:, 0].astype(np.int64) if truth.shape[1] == 1 else truth.argmax(axis=1)
        kept = truth != getattr(self.loss, "ignore_index", None)
        if not kept.all():
            truth, scores, weight = truth[kept], scores[kept], None if weight is None else weight[kept]
        return Judged(truth, scores.argmax(axis=1), scores, weight)

    def evaluation(self, data: Examples, *, apart: bool = False, spec: LossSpec | None = None) -> Evaluate:
        """Return a repeatable ``evaluate`` of the same arrays, by ``spec`` if given. With ``apart`` the parameters are
        copied first: the result serves all engines with these layers and this loss, and keeps no reference to this."""
        memory = self.forward.memory
        if apart:
            memory = memory.of_parameters(self.network)
        forward, data = ForwardPass(self.network, memory), data._replace(X=self.scaling.normalised(data.X))
        return self._evaluation(forward, data, spec or self.inputs.spec_for(data.targets), repeated=True)

    def dead_units(self, X: Any, *, decays: bool = False) -> dict[str, float]:
        """Return for each hidden relu layer the share of units that are zero for every row of X; see ``silent``."""
        if self.network.members > 1:
            return {}
        features = self.checked(X, codes=True)
        hidden = enumerate(self.network.activations[:-1])
        relu = [layer for layer, activation in hidden if activation.name == "relu"]
        with self.forward.turn:
            return {f"layer {layer + 1}": self.forward.silent(features, layer, decays=decays) for layer in relu}
