"""Export the network as an ONNX graph for other runtimes.

Input ``x`` (rows, K), any number of rows, float32 (double from an engine of precision fp64). Outputs, in this order:

- ``logits`` (rows, N) for the cross-entropies, ``output`` (rows, N) for the other losses: the output layer, after its
  activation; of a network with members, ``engine.outputs``: those of the mean prediction
- ``prediction``: the result of ``engine.predict``, shapes included
- ``probabilities``: the result of ``engine.predict_proba``; only for the cross-entropies

The graph of an engine with ``normalise=True`` scales the inputs. With ``classes``, ``prediction`` holds these labels.
With a ``Preprocessor`` the graph takes the features as they are in the data, with NaN for a missing number, fills in
and scales them itself, and ``prediction`` holds labels, or values in original units. If features are words, each
feature has an input of its own (rows, 1) with its name, as converters of scikit-learn's pipelines have it: numbers in
the graph's type, words as strings without spaces around them, "" for a missing one. An unseen word counts as it does in
``predict``. A date has a number for each of its parts. Dropout is left out.

The graph uses operators of opset 18 (ONNX 1.13, onnxruntime 1.14), for words those of ai.onnx.ml 3, so older runtimes
read it too. Its metadata entry ``fusemlp`` describes network and loss as JSON, the entry ``preprocessor`` the scaling
in the graph. A feature that is called as an output or a parameter has an input with an underscore after its name.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp._version import __version__
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.checks import caller_level
from fusemlp.describe.network import Activation
from fusemlp.inputs.arrays import Array
from fusemlp.report.onnx_features import INPUT, network_input
from fusemlp.runtime.files import check_finite, checked_metadata, target_file, write_atomically
from fusemlp.runtime.scaling import MEAN, SCALE
from fusemlp.runtime.session import Session
from fusemlp_kernels.errors import ArgumentError, MissingLibraryError
from fusemlp_kernels.pointwise import ACTIVATIONS as ROWS
from fusemlp_kernels.pointwise import lines

HINT = 'pip install "fusemlp[onnx]"'
OPSET, ML_OPSET, IR_VERSION = 18, 3, 8
OUTPUTS = ("logits", "output", "prediction", "probabilities")
# The limit of a protobuf message, less room for the graph.
MOST_BYTES = 2**31 - 2**20
# Features are scaled in float32: a mean of this many standard deviations costs 2**-24 of it, 6e-4.
FARTHEST = 1e4
# Operators for the arithmetic and the functions of the kernels' formulas.
ARITHMETIC: dict[type[ast.operator], str] = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Div: "Div"}
FUNCTIONS = {
    "abs": "Abs", "exp": "Exp", "maximum": "Max", "minimum": "Min", "sigmoid": "Sigmoid", "sign": "Sign",
    "sqrt": "Sqrt", "tanh": "Tanh",
}  # fmt: skip


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
    own = checked_metadata(metadata, {"fusemlp"} if preprocessor is None else {"fusemlp", "preprocessor"})
    engine.scaling.check_measured()
    try:
        importlib.import_module("onnx")
    except ModuleNotFoundError as error:
        raise MissingLibraryError(f"to_onnx: it needs the library onnx: {HINT}") from error
    parameters, scale = engine.memory.evaluated_tensors(), engine.scaling.tensors
    check_finite(parameters, "ONNX file")
    size = sum(array.nbytes for array in parameters.values())
    if size > MOST_BYTES:
        raise ArgumentError(
            f"to_onnx: the parameters take {size / 2**30:.1f} GiB, and one ONNX file holds 2; use engine.save(path)"
        )
    if preprocessor is not None:
        _warn_of_blurred(preprocessor, parameters["0.weight"].dtype)
    graph = _Graph(next(iter(parameters.values())).dtype, {*parameters, *scale, *OUTPUTS})
    if preprocessor is None:
        name = graph.given(INPUT, graph.real, engine.network.sizes[0])
    else:
        own["preprocessor"] = preprocessor.to_json()
        name = network_input(graph, preprocessor)
    if scale:
        centred = graph.add("Sub", name, graph.constant(scale[MEAN], MEAN))
        name = graph.add("Div", centred, graph.constant(scale[SCALE], SCALE))
    if engine.network.members > 1:
        name = _mean_of_members(graph, name, engine, parameters)
    else:
        for layer, activation in enumerate(engine.network.activations):
            layer_names = f"{2 * layer}.weight", f"{2 * layer}.bias"
            name = graph.add("Gemm", name, *(graph.constant(parameters[one], one) for one in layer_names), transB=1)
            name = graph.activation(name, activation, parameters.get(f"{2 * layer + 1}.weight"))
    _add_outputs(graph, name, engine, preprocessor, labels)
    return graph.to_bytes(engine, own)


def _mean_of_members(graph: _Graph, name: str, engine: Session, parameters: Mapping[str, Array]) -> str:
    """Append the layers of a network with members, arrays (members, rows, N), and their mean prediction, which is that
    of ``runtime.forward.combined``; return its name."""
    net, kind = engine.network, engine.loss.kind

    def factor(tensor: str) -> str:
        return graph.constant(parameters[tensor].reshape(net.members, 1, -1), tensor)

    for layer, activation in enumerate(net.activations):
        at = f"{2 * layer}."
        weight, hidden = parameters[at + "weight"], layer < net.layers - 1
        if hidden:
            name, transposed = graph.add("Mul", name, factor(at + "r")), weight.T
        else:
            transposed = weight.reshape(net.members, -1, weight.shape[1]).swapaxes(1, 2)
        name = graph.add("MatMul", name, graph.constant(transposed, at + "weight"))
        name = graph.add("Mul", name, factor(at + "s")) if hidden else name
        name = graph.activation(graph.add("Add", name, factor(at + "bias")), activation, None)
    if kind == "cross_entropy":
        return graph.log_mean_exp(graph.add("LogSoftmax", name, axis=2), net.members)
    if kind == "binary_cross_entropy":
        # the logarithms of the probabilities of 1 and of 0
        ones, zeros = (graph.add("Neg", graph.add("Softplus", one)) for one in (graph.add("Neg", name), name))
        return graph.add("Sub", *(graph.log_mean_exp(one, net.members) for one in (ones, zeros)))
    if kind == "poisson":
        return graph.log_mean_exp(name, net.members)
    return graph.add("ReduceMean", name, graph.constant(np.array([0])), keepdims=0)


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
    several = engine.loss.kind == "binary_cross_entropy" and outputs > 1
    if not engine.loss.is_classification or several:
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


class _Graph:
    """The nodes, constants, inputs and outputs of a graph of one element type.

    ``reserved`` are names that no input may have.
    """

    def __init__(self, real: np.dtype[Any], reserved: Iterable[str]) -> None:
        from onnx import helper, numpy_helper

        self.helper = helper
        self.from_array = numpy_helper.from_array
        self.real = real
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.taken = set(reserved)

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        name = output or self._free(f"{operator.lower()}_{len(self.nodes)}")
        self.nodes.append(self.helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def _free(self, name: str) -> str:
        """Return the name, with underscores after it if it is taken, and take it."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def given(self, name: str, dtype: Any, width: int) -> str:
        """Append an input (rows, width) of the graph and return its name."""
        self.inputs.append(self.value(self._free(name), dtype, width))
        found: str = self.inputs[-1].name
        return found

    def constant(self, value: Any, name: str | None = None) -> str:
        """Append a constant: real numbers in the graph's type, integers and strings unchanged."""
        array = np.asarray(value)
        if array.dtype.kind == "f":
            largest = np.abs(array, where=np.isfinite(array), out=np.zeros_like(array)).max(initial=0.0)
            if largest > np.finfo(self.real).max:
                raise ArgumentError(
                    f"preprocessor: the scaling has values of up to {largest:.3g}, too large for the graph's "
                    f"{self.real}; divide such a column by a constant, or export an engine of precision fp64"
                )
            array = array.astype(self.real)
        elif array.dtype.kind == "U":
            array = array.astype(object)
        name = name or self._free(f"constant_{len(self.constants)}")
        self.constants.append(self.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def cast(self, name: str, dtype: Any) -> str:
        return self.add("Cast", name, to=self.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def value(self, name: str, dtype: Any, *shape: int) -> Any:
        """Return the declaration of an input or output of the graph: ``shape`` is that of a row."""
        kind = np.dtype(object if np.dtype(dtype).kind == "U" else dtype)
        return self.helper.make_tensor_value_info(name, self.helper.np_dtype_to_tensor_dtype(kind), ["rows", *shape])

    def activation(self, z: str, activation: Activation, slope: Array | None) -> str:
        row, fixed = ROWS[activation.name], activation.fixed_slope
        if row.onnx:
            learned = [self.constant(slope)] if row.learned else []
            options: dict[str, Any] = {} if fixed is None else {"alpha": fixed}
            return self.add(row.onnx, z, *learned, **options)
        known = {"z": z}
        for name, value in lines(row.value, "y"):
            known[name] = self._expression(value, known)
        return known["y"]

    def _expression(self, node: ast.expr, known: Mapping[str, str]) -> str:
        """Append the operators of a formula's expression over ``known`` outputs; returns the name of its output."""
        match node:
            case ast.Name(id=name):
                return known[name]
            case ast.Constant(value=float() | int() as value):
                return self.constant(float(value))
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return self.add("Neg", self._expression(operand, known))
            case ast.BinOp(left=left, op=op, right=right):
                return self.add(ARITHMETIC[type(op)], self._expression(left, known), self._expression(right, known))
            case ast.Call(func=ast.Name(id=name), args=arguments):
                inputs = [self._expression(argument, known) for argument in arguments]
                if name == "normal_cdf":
                    return self._normal_cdf(*inputs)
                if name == "sigmoid" and self.real == np.float64:
                    return self._exact_sigmoid(*inputs)
                if name == "log1p":
                    return self.add("Log", self.add("Add", *inputs, self.constant(1.0)))
                if name in FUNCTIONS:
                    return self.add(FUNCTIONS[name], *inputs)
        raise ArgumentError(f"engine: ONNX has no operator for {ast.unparse(node)!r} in the formula of its activation")

    def _normal_cdf(self, z: str) -> str:
        """Append ``(1 + erf(z / sqrt(2))) / 2``, with Erf in float32, because onnxruntime has no double Erf."""
        scaled = self.add("Mul", z, self.constant(math.sqrt(0.5)))
        if self.real == np.float64:
            erf = self.cast(self.add("Erf", self.cast(scaled, np.float32)), np.float64)
        else:
            erf = self.add("Erf", scaled)
        return self.add("Mul", self.add("Add", erf, self.constant(1.0)), self.constant(0.5))

    def _exact_sigmoid(self, z: str) -> str:
        """Append ``1 / (1 + exp(-z))``: onnxruntime makes ``z * Sigmoid(z)`` an operator that has no double."""
        one = self.constant(1.0)
        return self.add("Div", one, self.add("Add", one, self.add("Exp", self.add("Neg", z))))

    def log_mean_exp(self, name: str, count: int) -> str:
        """Append the logarithm of the mean of the exponentials over the first of ``count`` parts."""
        summed = self.add("ReduceLogSumExp", name, self.constant(np.array([0])), keepdims=0)
        return self.add("Sub", summed, self.constant(math.log(count)))

    def to_bytes(self, engine: Session, metadata: Mapping[str, str]) -> bytes:
        helper = self.helper
        domains = {"": OPSET, **{node.domain: ML_OPSET for node in self.nodes if node.domain}}
        model = helper.make_model(
            helper.make_graph(self.nodes, "fusemlp", self.inputs, self.outputs, self.constants),
            producer_name="fusemlp",
            producer_version=__version__,
            opset_imports=[helper.make_opsetid(domain, opset) for domain, opset in domains.items()],
            ir_version=IR_VERSION,
        )
        about = engine.description()
        own = json.dumps({name: about[name] for name in ("version", "network", "loss")})
        helper.set_model_props(model, {"fusemlp": own, **metadata})
        content: bytes = model.SerializeToString()
        return content


def _add_outputs(
    graph: _Graph, name: str, engine: Session, preprocessor: Preprocessor | None, labels: Array | None
) -> None:
    """Append the outputs of the module's docstring; ``name`` is the output of the last layer."""
    width, loss = engine.network.sizes[-1], engine.loss
    raw = graph.add("Identity", name, output="logits" if loss.is_classification else "output")
    graph.outputs.append(graph.value(raw, graph.real, width))
    coded = loss.kind == "cross_entropy" or labels is not None
    if coded and width > 1:
        found, kind = graph.add("ArgMax", raw, axis=1, keepdims=0), np.dtype(np.int64)
    elif loss.kind == "binary_cross_entropy":
        found, kind = graph.cast(graph.add("Greater", raw, graph.constant(0.0)), np.int64), np.dtype(np.int64)
    else:
        found, kind = (graph.add("Exp", raw) if loss.kind == "poisson" else raw), graph.real
    if labels is None and preprocessor is not None:
        scaled = graph.add("Mul", found, graph.constant(np.array(preprocessor.target_scale, np.float64)))
        found = graph.add("Add", scaled, graph.constant(np.array(preprocessor.target_shift, np.float64)))
        if preprocessor.target_log:
            found = graph.add("Exp", found)
    if width == 1:
        found = graph.add("Squeeze", found, graph.constant(np.array([1])))
    if labels is not None:
        kind = graph.real if labels.dtype.kind == "f" else labels.dtype
        found = graph.add("Gather", graph.constant(labels), found)
    graph.add("Identity", found, output="prediction")
    flat = width == 1 or (coded and width > 1)
    graph.outputs.append(graph.value("prediction", kind, *(() if flat else (width,))))
    if loss.kind == "cross_entropy":
        graph.outputs.append(graph.value(graph.add("Softmax", raw, output="probabilities", axis=1), graph.real, width))
    elif loss.kind == "binary_cross_entropy":
        if width > 1:
            graph.add("Sigmoid", raw, output="probabilities")
        else:
            both = [graph.add("Sigmoid", graph.add("Neg", raw)), graph.add("Sigmoid", raw)]
            graph.add("Concat", *both, output="probabilities", axis=1)
        graph.outputs.append(graph.value("probabilities", graph.real, max(width, 2)))
