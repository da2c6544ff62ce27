"""An ONNX graph that is built node by node, and its part that turns features into the network's inputs.

The nodes of the features, which come as in the data, do what ``Preprocessor.transform_features`` does.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fusemlp._version import __version__
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.scaling import CLIP, KNEE, Knots, limits
from fusemlp.datasets.textfiles import MISSING
from fusemlp.describe.blocks import Frequency, LayerNorm, Normalisation
from fusemlp.describe.network import Activation
from fusemlp.inputs.arrays import Array
from fusemlp.runtime.session import Session
from fusemlp_kernels.errors import ArgumentError, MissingLibraryError
from fusemlp_kernels.pointwise import ACTIVATIONS as ROWS
from fusemlp_kernels.pointwise import lines

INPUT = "x"
OPSET, ML_OPSET, IR_VERSION = 18, 3, 8
# Operators for the arithmetic and the functions of the kernels' formulas.
ARITHMETIC: dict[type[ast.operator], str] = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Div: "Div"}
FUNCTIONS = {
    "abs": "Abs", "exp": "Exp", "maximum": "Max", "minimum": "Min", "sigmoid": "Sigmoid", "sign": "Sign",
    "sqrt": "Sqrt", "tanh": "Tanh",
}  # fmt: skip


class Graph:
    """The nodes, constants, inputs and outputs of a graph of one element type; no input has a ``reserved`` name."""

    def __init__(self, real: np.dtype[Any], reserved: Iterable[str]) -> None:
        try:
            self.helper = importlib.import_module("onnx.helper")
            self.from_array = importlib.import_module("onnx.numpy_helper").from_array
        except ModuleNotFoundError as error:
            raise MissingLibraryError(
                "to_onnx: it needs the library onnx: pip install onnx (or 'fusemlp[onnx]')"
            ) from error
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
        free = self._free(name)
        self.inputs.append(self.value(free, dtype, width))
        return free

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

    def columns(self, name: str, places: Iterable[int]) -> str:
        return self.add("Gather", name, self.constant(np.array([*places])), axis=1)

    def cast(self, name: str, dtype: Any) -> str:
        return self.add("Cast", name, to=self.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def value(self, name: str, dtype: Any, *shape: int) -> Any:
        """Return the declaration of an input or output of the graph: ``shape`` is that of a row."""
        kind = np.dtype(object if np.dtype(dtype).kind == "U" else dtype)
        return self.helper.make_tensor_value_info(name, self.helper.np_dtype_to_tensor_dtype(kind), ["rows", *shape])

    def encoded(self, x: str, encoding: Frequency, inputs: int) -> str:
        """Append the waves of ``inputs`` columns x; the period of 2 is taken out before pi, which rounds."""
        each = self.add("Reshape", x, self.constant(np.array([0, inputs, 1, 1])))
        t = self.add("Mul", each, self.constant(2.0 ** np.arange(encoding.octaves)[:, None]))
        turns = self.add("Round", self.add("Mul", t, self.constant(0.5)))
        rest = self.add("Sub", t, self.add("Mul", turns, self.constant(2.0)))
        angle = self.add("Mul", rest, self.constant(math.pi))
        joined = self.add("Concat", self.add("Sin", angle), self.add("Cos", angle), axis=3)
        flat = self.add("Reshape", joined, self.constant(np.array([0, 2 * inputs * encoding.octaves])))
        return self.add("Concat", x, flat, axis=1) if encoding.inputs else flat

    def normalised(self, z: str, norm: Normalisation, weight: str, *bias: str) -> str:
        if isinstance(norm, LayerNorm):
            return self.add("LayerNormalization", z, weight, *bias, epsilon=norm.eps)
        # an operator of its own only from opset 23 on
        mean = self.add("ReduceMean", self.add("Mul", z, z), self.constant(np.array([1])))
        root = self.add("Sqrt", self.add("Add", mean, self.constant(norm.eps)))
        return self.add("Mul", self.add("Div", z, root), weight)

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
        return bytes(model.SerializeToString())


def has_words(preprocessor: Preprocessor) -> bool:
    return any(words is not None for words in preprocessor.categories)


def network_input(graph: Graph, preprocessor: Preprocessor) -> str:
    """Append the graph's inputs and the preprocessing, and return the output with the network's inputs.

    Numbers alone come in one input ``x`` (rows, features). With words each feature has an input (rows, 1) of its name.
    """
    names, categories = preprocessor.feature_names, preprocessor.categories
    numbers = [column for column, words in enumerate(categories) if words is None]
    blocks: list[str] = []
    # The indices of each feature's inputs in the blocks one after another.
    places: dict[int, list[int]] = {}
    count = 0
    if has_words(preprocessor):
        types = [graph.real if words is None else str for words in categories]
        inputs_of = [graph.given(name, dtype, 1) for name, dtype in zip(names, types, strict=True)]
        x = _joined(graph, [inputs_of[column] for column in numbers]) if numbers else ""
    else:
        inputs_of, x = [], graph.given(INPUT, graph.real, len(names))
    if numbers:
        filled, missing = _filled(graph, x, preprocessor, numbers)
        cut = [column for column in numbers if preprocessor.pieces(column) > 1]
        whole = [column for column in numbers if column not in cut]
        for some, append in ((whole, _scaled), (cut, _by_pieces)):
            if some:
                columns = filled
                if some != numbers:
                    places_of = graph.constant(np.array([numbers.index(column) for column in some]))
                    columns = graph.add("Gather", filled, places_of, axis=1)
                blocks.append(append(graph, columns, preprocessor, some))
            for column in some:
                places[column] = list(range(count, count + preprocessor.pieces(column)))
                count += preprocessor.pieces(column)
        if missing and any(preprocessor.missing_inputs):
            blocks.append(graph.cast(missing, graph.real))
            for index, column in enumerate(numbers):
                places[column] += [count + index] * preprocessor.missing_inputs[column]
            count += len(numbers)
    for column, words in enumerate(categories):
        if words is not None:
            inputs = preprocessor.word_inputs(column)
            width = 1 + int(inputs.max())
            blocks += [_one_hot(graph, inputs_of[column], words, inputs, width)] if width else []
            places[column] = list(range(count, count + width))
            count += width
    order = [index for column in range(len(names)) for index in places[column]]
    joined = _joined(graph, blocks)
    if order == list(range(count)):
        return joined
    return graph.add("Gather", joined, graph.constant(np.array(order)), axis=1)


def _joined(graph: Graph, columns: list[str]) -> str:
    return columns[0] if len(columns) == 1 else graph.add("Concat", *columns, axis=1)


def _filled(graph: Graph, x: str, preprocessor: Preprocessor, numbers: list[int]) -> tuple[str, str]:
    """Replace missing cells, NaN, by the medians of the training rows; return also the output that is true for them."""
    fill = [preprocessor.feature_fill[column] for column in numbers] if preprocessor.feature_fill else [None]
    if None in fill:
        # A preprocessor of an earlier release refuses missing cells; the graph answers NaN.
        return x, ""
    missing = graph.add("IsNaN", x)
    return graph.add("Where", missing, graph.constant(np.array(fill, np.float64)), x), missing


def _scaled(graph: Graph, x: str, preprocessor: Preprocessor, numbers: list[int]) -> str:
    """Append the scaling of the columns of numbers: ``scaling.statistics``, ``clipped``, or by quantiles."""
    if preprocessor.scale == "quantile":
        return _by_quantiles(graph, x, [at for at in preprocessor.feature_knots if at is not None])
    shift = graph.constant(np.array(preprocessor.feature_shift, np.float64)[numbers])
    scale = graph.constant(np.array(preprocessor.feature_scale, np.float64)[numbers])
    scaled = graph.add("Div", graph.add("Sub", x, shift), scale)
    if preprocessor.scale not in ("robust", "piecewise"):
        return scaled
    # The square stays finite in float32.
    far = graph.add("Clip", scaled, graph.constant(-1e15), graph.constant(1e15))
    ratio = graph.add("Div", far, graph.constant(KNEE))
    # asinh; onnxruntime has none in double precision
    size = graph.add("Log", graph.add("Add", graph.add("Abs", ratio), _root_of_one_and_square(graph, ratio)))
    tails = graph.add("Mul", graph.add("Mul", graph.add("Sign", ratio), size), graph.constant(KNEE))
    return graph.add("Div", tails, _root_of_one_and_square(graph, graph.add("Div", tails, graph.constant(CLIP))))


def _root_of_one_and_square(graph: Graph, x: str) -> str:
    return graph.add("Sqrt", graph.add("Add", graph.add("Mul", x, x), graph.constant(1.0)))


def _by_pieces(graph: Graph, x: str, preprocessor: Preprocessor, cut: list[int]) -> str:
    """Append the inputs of columns that are cut into pieces: ``scaling.by_pieces``."""
    edges = [np.array((preprocessor.feature_knots[column] or ((),))[0]) for column in cut]
    column = np.repeat(np.arange(len(cut)), [len(points) - 1 for points in edges])
    low, high = (np.concatenate(some) for some in zip(*(limits(len(points) - 1) for points in edges), strict=True))
    starts, widths = np.concatenate([p[:-1] for p in edges]), np.concatenate([np.diff(p) for p in edges])
    wide = graph.add("Gather", x, graph.constant(column), axis=1)
    inside = graph.add("Div", graph.add("Sub", wide, graph.constant(starts)), graph.constant(widths))
    return graph.add("Min", graph.add("Max", inside, graph.constant(low)), graph.constant(high))


def _by_quantiles(graph: Graph, x: str, knots: Sequence[Knots]) -> str:
    """Append straight lines between the knots: the first score, and the rise over each piece up to x."""
    widest = max(len(points) for points, _ in knots)
    starts, widths, slopes = (np.zeros((len(knots), widest)) for _ in range(3))
    for column, (points, scores) in enumerate(knots):
        pieces = len(points) - 1
        starts[column, :pieces], widths[column, :pieces] = points[:-1], np.diff(points)
        slopes[column, :pieces] = np.diff(scores) / np.diff(points)
    wide = graph.add("Unsqueeze", x, graph.constant(np.array([2])))
    within = graph.add("Max", graph.add("Sub", wide, graph.constant(starts)), graph.constant(0.0))
    risen = graph.add("Mul", graph.add("Min", within, graph.constant(widths)), graph.constant(slopes))
    rise = graph.add("ReduceSum", risen, graph.constant(np.array([2])), keepdims=0)
    return graph.add("Add", rise, graph.constant(np.array([scores[0] for _, scores in knots])))


def _one_hot(graph: Graph, x: str, words: tuple[str, ...], inputs: npt.NDArray[np.int64], width: int) -> str:
    """Append the ``width`` inputs of a column of words; ``inputs`` are those of ``word_inputs``."""
    unseen = int(inputs[-1])
    known = dict(zip(words, inputs.tolist(), strict=False))
    absent = known.get("", unseen)
    known = {text: absent for text in sorted(MISSING)} | known
    code = graph.add(
        "LabelEncoder",
        x,
        domain="ai.onnx.ml",
        keys_strings=list(known),
        values_int64s=list(known.values()),
        default_int64=unseen,
    )
    # The words without an input have the code -1, which is equal to no input.
    return graph.cast(graph.add("Equal", code, graph.constant(np.arange(width))), graph.real)
