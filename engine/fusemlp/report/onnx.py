"""Export the network as an ONNX graph for other runtimes.

Input ``x`` (rows, K), any number of rows, float32 (double from an engine of precision fp64). Outputs, in this order:

- ``logits`` (rows, N) for the cross-entropies, ``output`` (rows, N) for the other losses: the output layer, after its
  activation; of a network with members, ``engine.outputs``: those of the mean prediction
- ``prediction``: the result of ``engine.predict``, shapes included
- ``probabilities``: the result of ``engine.predict_proba``; only for the cross-entropies
- ``std``: the standard deviations, shaped like ``prediction``; only for the loss gaussian

The graph of an engine with ``normalise=True`` scales the inputs. With ``classes``, ``prediction`` holds these labels.
With a ``Preprocessor`` the graph takes the features as they are in the data, with NaN for a missing number or one of
``missing_words``, fills in and scales them itself, and ``prediction`` holds labels, or values in original units. If
features are words, each feature has an input of its own (rows, 1) with its name, as converters of scikit-learn's
pipelines have it: numbers in the graph's type, words as strings without spaces around them, "" or one of
``missing_words`` for a missing one. An unseen word counts as it does in ``predict``. A date has a number for each of
its parts. Dropout is left out.

The graph uses operators of opset 18 (ONNX 1.13, onnxruntime 1.14), for words those of ai.onnx.ml 3, so older runtimes
read it too. Its metadata entry ``fusemlp`` describes network and loss as JSON, the entry ``preprocessor`` the scaling
in the graph. A feature that is called as an output or a parameter has an input with an underscore after its name.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.blocks import Frequency, Normalisation
from fusemlp.describe.checks import caller_level
from fusemlp.describe.losses import GaussianNLL, Quantiles
from fusemlp.describe.network import MLP, layer_of
from fusemlp.inputs.arrays import Array
from fusemlp.report.onnx_graph import INPUT, Graph, Tensor, network_input
from fusemlp.runtime.files import check_finite, checked_metadata, target_file, write_atomically
from fusemlp.runtime.forward import last_layers
from fusemlp.runtime.scaling import MEAN, SCALE
from fusemlp.runtime.session import Session
from fusemlp_kernels.errors import ArgumentError

OUTPUTS = ("logits", "output", "prediction", "probabilities", "std")
# The limit of a protobuf message, less room for the graph.
MOST_BYTES = 2**31 - 2**20
# Features are scaled in float32: a mean of this many standard deviations costs 2**-24 of it, 6e-4.
FARTHEST = 1e4


def to_onnx(
    engine: Session,
    path: str | Path,
    *,
    preprocessor: Preprocessor | None = None,
    classes: Sequence[Any] | Array | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the graph of ``engine`` to ``path`` atomically; see ``Engine.to_onnx``."""
    write_atomically(target_file(path), onnx_bytes(engine, preprocessor, metadata, classes=classes))


def onnx_bytes(
    engine: Session,
    preprocessor: Preprocessor | None = None,
    metadata: Mapping[str, str] | None = None,
    *,
    classes: Sequence[Any] | Array | None = None,
) -> bytes:
    """Return the content of the file of ``to_onnx``."""
    labels = _labels(engine, preprocessor, classes)
    about = checked_metadata(metadata, {"fusemlp"} if preprocessor is None else {"fusemlp", "preprocessor"})
    engine.scaling.check_measured()
    parameters, scale = engine.memory.evaluated_tensors(), engine.scaling.tensors
    check_finite(parameters, "ONNX file")
    size = sum(array.nbytes for array in parameters.values())
    if size > MOST_BYTES:
        taken = f"the parameters take {size / 2**30:.1f} GiB"
        raise ArgumentError(f"to_onnx: {taken}, and one ONNX file holds 2; use engine.save(path)")
    if preprocessor is not None:
        _warn_of_blurred(preprocessor, parameters["0.weight"].dtype)
    graph = Graph(next(iter(parameters.values())).dtype, {*parameters, *scale, *OUTPUTS})
    if preprocessor is None:
        x = graph.given(INPUT, graph.real, engine.network.sizes[0])
    else:
        about["preprocessor"] = preprocessor.to_json()
        x = network_input(graph, preprocessor)
    if scale:
        x = (x - graph.constant(scale[MEAN], MEAN)) / graph.constant(scale[SCALE], SCALE)
    if engine.network.encoding is not None:
        x = _encoded(graph, x, engine.network.encoding, engine.network.sizes[0])
    if engine.network.members > 1:
        y = _mean_of_members(graph, x, engine, parameters)
    else:
        x, y = _last_layer(graph, x, engine.network, parameters)
    _add_outputs(graph, x, y, engine, preprocessor, labels)
    return graph.to_bytes(engine, about)


def _last_layer(graph: Graph, x: Tensor, net: MLP, parameters: Mapping[str, Array]) -> tuple[Tensor, Tensor]:
    """Append the layers of a network without members; return the input and the output of the last."""
    starts, inputs = {last: first for first, last in net.blocks}, []
    for layer, activation in enumerate(net.activations):
        inputs.append(x)
        weight, bias, *rest = [graph.constant(parameters[key], key) for key in parameters if layer_of(key) == layer]
        x = graph.add("Gemm", x, weight, bias, transB=1)
        if (norm := net.norm(layer)) is not None:
            x = _normalised(graph, x, norm, *rest)
        x = graph.activation(x, activation, *rest)
        x = x + inputs[starts[layer]] if layer in starts else x
    return inputs[-1], x


def _encoded(graph: Graph, x: Tensor, encoding: Frequency, inputs: int) -> Tensor:
    """Append the waves of ``inputs`` columns x; the period of 2 is taken out before pi, which rounds."""
    each = graph.add("Reshape", x, np.array([0, inputs, 1, 1]))
    t = each * 2.0 ** np.arange(encoding.octaves)[:, None]
    angle = (t - graph.add("Round", t * 0.5) * 2.0) * np.pi
    waves = graph.add("Concat", graph.add("Sin", angle), graph.add("Cos", angle), axis=3)
    flat = graph.add("Reshape", waves, np.array([0, 2 * inputs * encoding.octaves]))
    return graph.joined([x, flat]) if encoding.inputs else flat


def _normalised(graph: Graph, z: Tensor, norm: Normalisation, weight: Tensor, *bias: Tensor) -> Tensor:
    """Append the normalisation of rows z; without a mean it is an operator of its own only from opset 23 on."""
    if norm.centred:
        return graph.add("LayerNormalization", z, weight, *bias, epsilon=norm.eps)
    return z / graph.add("Sqrt", graph.add("ReduceMean", z * z, np.array([1])) + norm.eps) * weight


def _deviations(graph: Graph, hidden: Tensor, raw: Tensor, engine: Session, loss: GaussianNLL) -> Tensor:
    """Append ``GaussianNLL.std`` of the outputs ``raw``, or of merged models of those by ``hidden``, the last input."""
    net, models, last = engine.network, 1, 2 * (engine.network.layers - 1)
    width = net.sizes[-1] // 2
    if engine.merged_biases is not None and last:
        models, state = len(engine.merged_biases), engine.memory.evaluated_tensors()
        layer = last_layers(state[f"{last}.weight"], state[f"{last}.bias"], engine.merged_biases)
        raw = graph.add("Gemm", hidden, *map(graph.constant, layer), transB=1)
    first = [model * 2 * width + at for model in range(models) for at in range(width)]
    std = graph.add("Max", graph.add("Softplus", raw.columns([at + width for at in first])), loss.eps**0.5)
    if models == 1:
        return std
    means, std = (graph.add("Reshape", part, np.array([0, models, width])) for part in (raw.columns(first), std))
    centred = means - graph.add("ReduceMean", means, np.array([1]))
    return graph.add("Sqrt", graph.add("ReduceMean", std * std + centred * centred, np.array([1]), keepdims=0))


def _mean_of_members(graph: Graph, x: Tensor, engine: Session, parameters: Mapping[str, Array]) -> Tensor:
    """Append layers with members, arrays (members, rows, N), and ``runtime.forward.combined``; return its output."""
    net, kind = engine.network, engine.loss.kind

    def factor(tensor: str) -> Tensor:
        return graph.constant(parameters[tensor].reshape(net.members, 1, -1), tensor)

    for layer, activation in enumerate(net.activations):
        at = f"{2 * layer}."
        weight, hidden = parameters[at + "weight"], layer < net.layers - 1
        if hidden:
            x, transposed = x * factor(at + "r"), weight.T
        else:
            transposed = weight.reshape(net.members, -1, weight.shape[1]).swapaxes(1, 2)
        x = graph.add("MatMul", x, graph.constant(transposed, at + "weight"))
        x = x * factor(at + "s") if hidden else x
        x = graph.activation(x + factor(at + "bias"), activation)
    if kind == "cross_entropy":
        return graph.log_mean_exp(graph.add("LogSoftmax", x, axis=2), net.members)
    if kind == "binary_cross_entropy":
        # the logarithms of the probabilities of 1 and of 0
        one, zero = (graph.log_mean_exp(-graph.add("Softplus", z), net.members) for z in (-x, x))
        return one - zero
    if kind == "poisson":
        return graph.log_mean_exp(x, net.members)
    return graph.add("ReduceMean", x, np.array([0]), keepdims=0)


def _labels(engine: Session, preprocessor: Preprocessor | None, classes: Any) -> Array | None:
    """Return the labels of the classes, or None for a graph that predicts numbers."""
    if preprocessor is not None:
        if classes is not None:
            raise ArgumentError("classes: the preprocessor has the classes; leave one of the two out")
        return None if preprocessor.classes is None else np.array(preprocessor.classes)
    if classes is None:
        return None
    labels = np.array(list(classes))
    outputs = engine.network.sizes[-1]
    loss = engine.loss.answers
    if not loss.is_classification or (loss.kind == "binary_cross_entropy" and outputs > 1):
        raise ArgumentError(f"classes: a row of this engine has no single class (loss {engine.loss!r}); leave it out")
    if labels.shape != (max(outputs, 2),):
        raise ArgumentError(f"classes: expected {max(outputs, 2)} labels, got {len(labels)}: {classes!r}")
    return labels


def _warn_of_blurred(preprocessor: Preprocessor, real: np.dtype[Any]) -> None:
    """Warn of a feature whose differences float32 cannot hold."""
    ratios = np.abs(preprocessor.feature_shift) / np.array(preprocessor.feature_scale)
    for place, at in enumerate(preprocessor.feature_knots if preprocessor.scale == "piecewise" else ()):
        if at is not None:
            # the scale of its narrowest piece
            ratios[place] = np.abs(at[0]).max() / np.diff(at[0]).min()
    if real == np.float32 and ratios.max() > FARTHEST:
        column = int(np.argmax(ratios))
        warnings.warn(
            f"preprocessor: the feature {preprocessor.feature_names[column]!r} lies {ratios[column]:.2g} times its "
            f"scale from zero, which costs the graph's float32 input {ratios[column] * 2**-24:.1g} of that scale; "
            "subtract a constant from it in the data, or export an engine of precision fp64",
            stacklevel=caller_level(),
        )


def _quantiles(graph: Graph, raw: Tensor, loss: Quantiles) -> Tensor:
    """Append ``Quantiles.transform`` of the outputs ``raw``."""
    steps = [graph.add("Softplus", raw).columns([at]) for at in range(len(loss.q))]
    columns = [raw.columns([loss.middle])]
    for below in reversed(steps[: loss.middle]):
        columns.insert(0, columns[0] - below)
    for above in steps[loss.middle + 1 :]:
        columns.append(columns[-1] + above)
    return graph.joined(columns)


def _add_outputs(
    graph: Graph, hidden: Tensor, y: Tensor, engine: Session, preprocessor: Preprocessor | None, labels: Array | None
) -> None:
    """Append the outputs of the module's docstring; ``hidden`` is the input of the last layer, y its output."""
    width, loss = engine.network.sizes[-1], engine.loss.answers
    raw = graph.result("logits" if loss.is_classification else "output", y, graph.real, width)
    coded = width > 1 and (loss.kind == "cross_entropy" or labels is not None)
    kind = graph.real
    if coded:
        answer, kind = graph.add("ArgMax", raw, axis=1, keepdims=0), np.dtype(np.int64)
    elif loss.kind == "binary_cross_entropy":
        answer, kind = graph.cast(graph.add("Greater", raw, 0.0), np.int64), np.dtype(np.int64)
    elif isinstance(loss, Quantiles):
        answer = _quantiles(graph, raw, loss)
    else:
        answer = graph.add("Exp", raw) if loss.kind == "poisson" else raw
    if isinstance(loss, GaussianNLL):
        width //= 2
        answer, std = raw.columns(range(width)), _deviations(graph, hidden, raw, engine, loss)
    shape = () if coded or width == 1 else (width,)

    def flat(values: Tensor) -> Tensor:
        return graph.add("Squeeze", values, np.array([1])) if width == 1 else values

    if preprocessor is not None and labels is None and not loss.is_classification:
        scale, shift = np.array([preprocessor.target_scale, preprocessor.target_shift], np.float64)
        answer = answer * scale + shift
        answer = graph.add("Exp", answer) if preprocessor.target_log else answer
    answer = flat(answer)
    if labels is not None:
        kind = graph.real if labels.dtype.kind == "f" else labels.dtype
        answer = graph.add("Gather", labels, answer)
    graph.result("prediction", answer, kind, *shape)
    if isinstance(loss, GaussianNLL):
        graph.result("std", flat(std if preprocessor is None else std * scale), graph.real, *shape)
    if loss.kind == "cross_entropy":
        graph.result("probabilities", graph.add("Softmax", raw, axis=1), graph.real, width)
    elif loss.kind == "binary_cross_entropy":
        both = graph.add("Sigmoid", raw) if width > 1 else graph.joined([graph.add("Sigmoid", z) for z in (-raw, raw)])
        graph.result("probabilities", both, graph.real, max(width, 2))
