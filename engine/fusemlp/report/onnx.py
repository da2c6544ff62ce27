"""Export the network as an ONNX graph for other runtimes.

Input ``x`` (rows, K), any number of rows, float32 (double from an engine of precision fp64). Outputs, in this order:

- ``logits`` (rows, N) for the cross-entropies, ``output`` (rows, N) for the other losses: the output layer, after its
  activation
- ``prediction``: the result of ``engine.predict``, shapes included
- ``probabilities``: the result of ``engine.predict_proba``; only for the cross-entropies

With a ``Preprocessor`` the graph takes the features as they are in the data, with NaN for a missing number, fills in
and scales them itself, and ``prediction`` holds labels, or values in original units. Dropout is left out.

The graph uses operators of opset 17 (ONNX 1.12, onnxruntime 1.12), so older runtimes read it too. Its metadata entry
``fusemlp`` describes network and loss as JSON, the entry ``preprocessor`` the scaling in the graph.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp._version import __version__
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.scaling import CLIP, KNEE, Knots
from fusemlp.describe.network import Activation
from fusemlp.runtime.files import check_finite, checked_metadata, target_file, write_atomically
from fusemlp.runtime.session import Session
from fusemlp_kernels.errors import ArgumentError, MissingLibraryError
from fusemlp_kernels.pointwise import ACTIVATIONS as ROWS
from fusemlp_kernels.pointwise import lines

Array = np.ndarray[Any, Any]

HINT = "pip install 'fusemlp[onnx]'"
OPSET, IR_VERSION = 17, 8
INPUT = "x"
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
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the graph of ``engine`` to ``path`` atomically.

    ``metadata`` are entries of your own beside those of the file.

    Raises ArgumentError or ArgumentTypeError for an impossible path, for features that are words and for a network of
    more than 2 GiB, DivergenceError where parameters are no longer finite, MissingLibraryError without the library
    onnx, OSError from the disk.
    """
    write_atomically(target_file(path), onnx_bytes(engine, preprocessor, metadata))


def onnx_bytes(
    engine: Session, preprocessor: Preprocessor | None = None, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the content of the file of ``to_onnx``."""
    own = checked_metadata(metadata, {"fusemlp"} if preprocessor is None else {"fusemlp", "preprocessor"})
    try:
        importlib.import_module("onnx")
    except ModuleNotFoundError as error:
        raise MissingLibraryError(f"to_onnx: it needs the library onnx: {HINT}") from error
    parameters = engine.state_dict()
    check_finite(parameters, "ONNX file")
    size = sum(array.nbytes for array in parameters.values())
    if size > MOST_BYTES:
        raise ArgumentError(
            f"to_onnx: the parameters take {size / 2**30:.1f} GiB, and one ONNX file holds 2; use engine.save(path)"
        )
    if preprocessor is not None:
        _check_preprocessor(preprocessor, parameters["0.weight"].dtype)
    graph = _Graph(next(iter(parameters.values())).dtype)
    name = INPUT
    if preprocessor is not None:
        own["preprocessor"] = preprocessor.to_json()
        name = graph.filled(name, preprocessor)
        name = graph.scaled(name, preprocessor)
        name = graph.marked(name, preprocessor)
    for layer, activation in enumerate(engine.network.activations):
        layer_names = f"{2 * layer}.weight", f"{2 * layer}.bias"
        name = graph.add("Gemm", name, *(graph.constant(parameters[one], one) for one in layer_names), transB=1)
        name = graph.activation(name, activation, parameters.get(f"{2 * layer + 1}.weight"))
    _add_outputs(graph, name, engine, preprocessor)
    given = engine.network.sizes[0] if preprocessor is None else len(preprocessor.feature_names)
    return graph.to_bytes(engine, own, given)


def _check_preprocessor(preprocessor: Preprocessor, real: np.dtype[Any]) -> None:
    words = [
        name
        for name, categories in zip(preprocessor.feature_names, preprocessor.categories, strict=True)
        if categories is not None
    ]
    if words:
        raise ArgumentError(
            f"preprocessor: the features {', '.join(map(repr, words))} are words, and the graph's input holds numbers; "
            "export the network alone, whose inputs are the columns as transform_features leaves them"
        )
    ratios = np.abs(preprocessor.feature_shift) / np.array(preprocessor.feature_scale)
    if real == np.float32 and ratios.max() > FARTHEST:
        column = int(np.argmax(ratios))
        warnings.warn(
            f"preprocessor: the feature {preprocessor.feature_names[column]!r} lies {ratios[column]:.2g} times its "
            f"scale from zero, which costs the graph's float32 input {ratios[column] * 2**-24:.1g} of that scale; "
            "subtract a constant from it in the data, or export an engine of precision fp64",
            stacklevel=3,
        )


class _Graph:
    """The nodes, constants and outputs of a graph of one element type."""

    def __init__(self, real: np.dtype[Any]) -> None:
        from onnx import helper, numpy_helper

        self.helper = helper
        self.from_array = numpy_helper.from_array
        self.real = real
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.outputs: list[Any] = []
        # The output that is true for the input's missing cells.
        self.missing = ""

    def add(self, operator: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Append a node and return the name of its output."""
        name = output or f"{operator.lower()}_{len(self.nodes)}"
        self.nodes.append(self.helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, value: Any, name: str | None = None) -> str:
        """Append a constant: real numbers in the graph's type, integers and strings unchanged."""
        array = np.asarray(value)
        if array.dtype.kind == "f":
            array = array.astype(self.real)
        elif array.dtype.kind == "U":
            array = array.astype(object)
        name = name or f"constant_{len(self.constants)}"
        self.constants.append(self.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def cast(self, name: str, dtype: Any, output: str | None = None) -> str:
        return self.add("Cast", name, output=output, to=self.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def value(self, name: str, dtype: Any, *shape: int) -> Any:
        """Return the declaration of an input or output of the graph: ``shape`` is that of a row."""
        kind = np.dtype(object if np.dtype(dtype).kind == "U" else dtype)
        return self.helper.make_tensor_value_info(name, self.helper.np_dtype_to_tensor_dtype(kind), ["rows", *shape])

    def activation(self, z: str, activation: Activation, slope: Array | None) -> str:
        match activation.name:
            case "relu":
                return self.add("Relu", z)
            case "leaky_relu":
                return self.add("LeakyRelu", z, alpha=activation.slope)
            case "prelu":
                return self.add("PRelu", z, self.constant(slope))
        known = {"z": z}
        for name, value in lines(ROWS[activation.name].value, "y"):
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

    def filled(self, name: str, preprocessor: Preprocessor) -> str:
        """Append the replacement of missing cells, NaN in the input, by the medians of the training rows."""
        if None in preprocessor.feature_fill or not preprocessor.feature_fill:
            # A preprocessor of an earlier release refuses missing cells; the graph answers NaN.
            return name
        fill = self.constant(np.array(preprocessor.feature_fill, np.float64), "feature_fill")
        self.missing = self.add("IsNaN", name)
        return self.add("Where", self.missing, fill, name)

    def scaled(self, name: str, preprocessor: Preprocessor) -> str:
        """Append the scaling of the features."""
        if preprocessor.feature_knots:
            return self._by_quantiles(name, [at for at in preprocessor.feature_knots if at is not None])
        shift = self.constant(np.array(preprocessor.feature_shift, np.float64), "feature_shift")
        scale = self.constant(np.array(preprocessor.feature_scale, np.float64), "feature_scale")
        name = self.add("Div", self.add("Sub", name, shift), scale)
        if preprocessor.scale != "robust":
            return name
        # The square stays finite in float32.
        far = self.add("Clip", name, self.constant(-1e15), self.constant(1e15))
        ratio = self.add("Div", far, self.constant(KNEE))
        # asinh; onnxruntime has none in double precision
        root = self._root_of_one_and_square(ratio)
        size = self.add("Log", self.add("Add", self.add("Abs", ratio), root))
        tails = self.add("Mul", self.add("Mul", self.add("Sign", ratio), size), self.constant(KNEE))
        return self.add("Div", tails, self._root_of_one_and_square(self.add("Div", tails, self.constant(CLIP))))

    def _root_of_one_and_square(self, name: str) -> str:
        return self.add("Sqrt", self.add("Add", self.add("Mul", name, name), self.constant(1.0)))

    def _by_quantiles(self, name: str, knots: Sequence[Knots]) -> str:
        """Append straight lines between the knots: the first score, and the rise over each piece up to x."""
        widest = max(len(points) for points, _ in knots)
        starts, widths, slopes = (np.zeros((len(knots), widest)) for _ in range(3))
        for column, (points, scores) in enumerate(knots):
            pieces = len(points) - 1
            starts[column, :pieces], widths[column, :pieces] = points[:-1], np.diff(points)
            slopes[column, :pieces] = np.diff(scores) / np.diff(points)
        wide = self.add("Unsqueeze", name, self.constant(np.array([2])))
        within = self.add("Max", self.add("Sub", wide, self.constant(starts)), self.constant(0.0))
        risen = self.add("Mul", self.add("Min", within, self.constant(widths)), self.constant(slopes))
        rise = self.add("ReduceSum", risen, self.constant(np.array([2])), keepdims=0)
        return self.add("Add", rise, self.constant(np.array([scores[0] for _, scores in knots])))

    def marked(self, name: str, preprocessor: Preprocessor) -> str:
        """Append the columns that mark missing cells, each after the scaled column ``name`` of its feature."""
        marks = preprocessor.missing_inputs
        if not any(marks):
            return name
        both = self.add("Concat", name, self.cast(self.missing, self.real), axis=1)
        order = [index for column, mark in enumerate(marks) for index in (column, len(marks) + column)[: 1 + mark]]
        return self.add("Gather", both, self.constant(np.array(order)), axis=1)

    def to_bytes(self, engine: Session, metadata: Mapping[str, str], width: int) -> bytes:
        helper = self.helper
        given = self.value(INPUT, self.real, width)
        model = helper.make_model(
            helper.make_graph(self.nodes, "fusemlp", [given], self.outputs, self.constants),
            producer_name="fusemlp",
            producer_version=__version__,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
        )
        about = engine.description()
        own = json.dumps({name: about[name] for name in ("version", "network", "loss")})
        helper.set_model_props(model, {"fusemlp": own, **metadata})
        content: bytes = model.SerializeToString()
        return content


def _add_outputs(graph: _Graph, name: str, engine: Session, preprocessor: Preprocessor | None) -> None:
    """Append the outputs of the module's docstring; ``name`` is the output of the last layer."""
    width, loss = engine.network.sizes[-1], engine.loss
    raw = graph.add("Identity", name, output="logits" if loss.is_classification else "output")
    graph.outputs.append(graph.value(raw, graph.real, width))
    classes = None if preprocessor is None else preprocessor.classes
    coded = loss.kind == "cross_entropy" or classes is not None
    if coded and width > 1:
        found, kind = graph.add("ArgMax", raw, axis=1, keepdims=0), np.dtype(np.int64)
    elif loss.kind == "binary_cross_entropy":
        found, kind = graph.cast(graph.add("Greater", raw, graph.constant(0.0)), np.int64), np.dtype(np.int64)
    else:
        found, kind = (graph.add("Exp", raw) if loss.kind == "poisson" else raw), graph.real
    if classes is None and preprocessor is not None:
        scaled = graph.add("Mul", found, graph.constant(np.array(preprocessor.target_scale, np.float64)))
        found = graph.add("Add", scaled, graph.constant(np.array(preprocessor.target_shift, np.float64)))
        if preprocessor.target_log:
            found = graph.add("Exp", found)
    if width == 1:
        found = graph.add("Squeeze", found, graph.constant(np.array([1])))
    if classes is not None:
        labels = np.array(classes)
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
