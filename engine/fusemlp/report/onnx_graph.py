"""An ONNX graph that is built by arithmetic, and its part that turns features into the network's inputs.

The nodes of the features, which come as in the data, do what ``Preprocessor.transform_features`` does.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fusemlp._version import __version__
from fusemlp.datasets.cells import CLIP, KNEE, Knots, limits
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.textfiles import MISSING, stand_ins
from fusemlp.describe.network import Activation
from fusemlp.runtime.session import Session
from fusemlp_kernels.errors import ArgumentError, MissingLibraryError
from fusemlp_kernels.pointwise import ACTIVATIONS as ROWS
from fusemlp_kernels.pointwise import evaluate

INPUT = "x"
OPSET, ML_OPSET, IR_VERSION = 18, 3, 8
# Operators for the functions of the kernels' formulas.
FUNCTIONS = {
    "abs": "Abs", "exp": "Exp", "maximum": "Max", "minimum": "Min", "sigmoid": "Sigmoid", "sign": "Sign",
    "sqrt": "Sqrt", "tanh": "Tanh",
}  # fmt: skip


class Tensor:
    """The output of a node, or an input of the graph; arithmetic with it appends nodes."""

    def __init__(self, graph: Graph, name: str) -> None:
        self.graph, self.name = graph, name

    def __neg__(self) -> Tensor:
        return self.graph.add("Neg", self)

    def __add__(self, other: Any) -> Tensor:
        return self.graph.add("Add", self, other)

    def __sub__(self, other: Any) -> Tensor:
        return self.graph.add("Sub", self, other)

    def __rsub__(self, other: Any) -> Tensor:
        return self.graph.add("Sub", other, self)

    def __mul__(self, other: Any) -> Tensor:
        return self.graph.add("Mul", self, other)

    def __truediv__(self, other: Any) -> Tensor:
        return self.graph.add("Div", self, other)

    def __rtruediv__(self, other: Any) -> Tensor:
        return self.graph.add("Div", other, self)

    __radd__, __rmul__ = __add__, __mul__

    def columns(self, places: Iterable[int]) -> Tensor:
        return self.graph.add("Gather", self, np.array([*places]), axis=1)


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

    def add(self, operator: str, *inputs: Any, **attributes: Any) -> Tensor:
        """Append a node, and return its output; inputs that are no tensors of the graph become constants."""
        return self._append(operator, self._free(f"{operator.lower()}_{len(self.nodes)}"), inputs, attributes)

    def _append(self, operator: str, name: str, inputs: Sequence[Any], attributes: Mapping[str, Any]) -> Tensor:
        tensors = [value if isinstance(value, Tensor) else self.constant(value) for value in inputs]
        names = [tensor.name for tensor in tensors]
        self.nodes.append(self.helper.make_node(operator, names, [name], name=name, **attributes))
        return Tensor(self, name)

    def _free(self, name: str) -> str:
        """Return the name, with underscores after it if it is taken, and take it."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def given(self, name: str, dtype: Any, width: int) -> Tensor:
        """Append an input (rows, width) of the graph, and return it."""
        free = self._free(name)
        self.inputs.append(self._declared(free, dtype, width))
        return Tensor(self, free)

    def result(self, name: str, value: Tensor, dtype: Any, *shape: int) -> Tensor:
        """Make a tensor an output of the graph, and return it; ``shape`` is that of a row."""
        self.outputs.append(self._declared(name, dtype, *shape))
        return self._append("Identity", name, [value], {})

    def _declared(self, name: str, dtype: Any, *shape: int) -> Any:
        kind = np.dtype(object if np.dtype(dtype).kind == "U" else dtype)
        return self.helper.make_tensor_value_info(name, self.helper.np_dtype_to_tensor_dtype(kind), ["rows", *shape])

    def constant(self, value: Any, name: str | None = None) -> Tensor:
        """Append a constant: numbers and real arrays in the graph's type, arrays of integers and strings unchanged."""
        array = np.asarray(float(value) if isinstance(value, int) else value)
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
        return Tensor(self, name)

    def cast(self, tensor: Tensor, dtype: Any) -> Tensor:
        return self.add("Cast", tensor, to=self.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def joined(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the columns of tensors beside one another."""
        return tensors[0] if len(tensors) == 1 else self.add("Concat", *tensors, axis=1)

    def activation(self, z: Tensor, activation: Activation, *slope: Tensor) -> Tensor:
        row, fixed = ROWS[activation.name], activation.fixed_slope
        if row.onnx:
            options: dict[str, Any] = {} if fixed is None else {"alpha": fixed}
            return self.add(row.onnx, z, *(slope if row.learned else ()), **options)
        functions: dict[str, Callable[..., Tensor]] = {
            **{name: partial(self.add, operator) for name, operator in FUNCTIONS.items()},
            "log1p": lambda t: self.add("Log", t + 1.0),
            "normal_cdf": self._normal_cdf,
        }
        if self.real == np.float64:
            # onnxruntime makes ``z * Sigmoid(z)`` an operator that has no double
            functions["sigmoid"] = lambda t: 1.0 / (self.add("Exp", -t) + 1.0)
        tensor: Tensor = evaluate(row.value, {"z": z}, functions)
        return tensor

    def _normal_cdf(self, z: Tensor) -> Tensor:
        """Append ``(1 + erf(z / sqrt(2))) / 2``, with Erf in float32, because onnxruntime has no double Erf."""
        erf = self.add("Erf", self.cast(z * math.sqrt(0.5), np.float32))
        return (self.cast(erf, self.real) + 1.0) * 0.5

    def log_mean_exp(self, tensor: Tensor, count: int) -> Tensor:
        """Append the logarithm of the mean of the exponentials over the first of ``count`` parts."""
        return self.add("ReduceLogSumExp", tensor, np.array([0]), keepdims=0) - math.log(count)

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


def network_input(graph: Graph, preprocessor: Preprocessor) -> Tensor:
    """Append the graph's inputs and the preprocessing, and return the network's inputs.

    Numbers alone come in one input ``x`` (rows, features). With words each feature has an input (rows, 1) of its name.
    """
    names, categories = preprocessor.feature_names, preprocessor.categories
    numbers = [column for column, words in enumerate(categories) if words is None]
    # Blocks of the network's inputs, and the feature that each of these comes from.
    blocks: list[Tensor] = []
    features: list[int] = []
    if has_words(preprocessor):
        types = [graph.real if words is None else str for words in categories]
        cells = [graph.given(name, dtype, 1) for name, dtype in zip(names, types, strict=True)]
        x = graph.joined([cells[column] for column in numbers]) if numbers else None
    else:
        cells, x = [], graph.given(INPUT, graph.real, len(names))
    if x is not None:
        filled, missing = _filled(graph, x, preprocessor, numbers)
        cut = [column for column in numbers if preprocessor.pieces(column) > 1]
        whole = [column for column in numbers if column not in cut]
        for some, append in ((whole, _scaled), (cut, _by_pieces)):
            if some:
                chosen = filled if some == numbers else filled.columns(map(numbers.index, some))
                blocks.append(append(graph, chosen, preprocessor, some))
                features += [column for column in some for _ in range(preprocessor.pieces(column))]
        marked = [column for column, mark in enumerate(preprocessor.missing_inputs) if mark]
        if missing is not None and marked:
            blocks.append(graph.cast(missing.columns(map(numbers.index, marked)), graph.real))
            features += marked
    for column, words in enumerate(categories):
        if words is not None and (width := preprocessor.widths[column]):
            blocks.append(_one_hot(graph, cells[column], preprocessor, column))
            features += [column] * width
    order = np.argsort(features, kind="stable").tolist()
    joined = graph.joined(blocks)
    return joined if order == sorted(order) else joined.columns(order)


def _filled(graph: Graph, x: Tensor, preprocessor: Preprocessor, numbers: list[int]) -> tuple[Tensor, Tensor | None]:
    """Replace missing cells, NaN, by the medians of the training rows; return also the tensor that is true for them."""
    fill = [preprocessor.feature_fill[column] for column in numbers] if preprocessor.feature_fill else [None]
    if None in fill:
        # A preprocessor of an earlier release refuses missing cells; the graph answers NaN.
        return x, None
    missing = graph.add("IsNaN", x)
    # the words are those of cells, not of parts of dates
    cells = np.array(preprocessor.feature_names)[numbers] == np.array(preprocessor.sources)[numbers]
    for value in stand_ins(preprocessor.missing_words)[1]:
        if abs(value) <= float(np.finfo(graph.real).max):
            missing = graph.add("Or", missing, graph.add("Equal", x, np.where(cells, value, np.nan)))
    return graph.add("Where", missing, np.array(fill, np.float64), x), missing


def _scaled(graph: Graph, x: Tensor, preprocessor: Preprocessor, numbers: list[int]) -> Tensor:
    """Append the scaling of the columns of numbers: ``cells.statistics``, ``clipped``, or by quantiles."""
    if preprocessor.scale == "quantile":
        return _by_quantiles(graph, x, [at for at in preprocessor.feature_knots if at is not None])
    shift, scale = np.array([preprocessor.feature_shift, preprocessor.feature_scale], np.float64)[:, numbers]
    scaled: Tensor = (x - shift) / scale
    if preprocessor.scale not in ("robust", "piecewise"):
        return scaled

    def root(tensor: Tensor) -> Tensor:
        return graph.add("Sqrt", tensor * tensor + 1.0)

    # The square stays finite in float32.
    ratio = graph.add("Clip", scaled, -1e15, 1e15) / KNEE
    # asinh; onnxruntime has none in double precision
    tails = graph.add("Sign", ratio) * graph.add("Log", graph.add("Abs", ratio) + root(ratio)) * KNEE
    return tails / root(tails / CLIP)


def _by_pieces(graph: Graph, x: Tensor, preprocessor: Preprocessor, cut: list[int]) -> Tensor:
    """Append the inputs of columns that are cut into pieces: ``cells.by_pieces``."""
    edges = [np.array((preprocessor.feature_knots[column] or ((),))[0]) for column in cut]
    column = np.repeat(np.arange(len(cut)), [len(points) - 1 for points in edges])
    low, high = (np.concatenate(some) for some in zip(*(limits(len(points) - 1) for points in edges), strict=True))
    starts, widths = np.concatenate([p[:-1] for p in edges]), np.concatenate([np.diff(p) for p in edges])
    inside = (x.columns(column) - starts) / widths
    return graph.add("Min", graph.add("Max", inside, low), high)


def _by_quantiles(graph: Graph, x: Tensor, knots: Sequence[Knots]) -> Tensor:
    """Append straight lines between the knots: the first score, and the rise over each piece up to x."""
    widest = max(len(points) for points, _ in knots)
    starts, widths, slopes = (np.zeros((len(knots), widest)) for _ in range(3))
    for column, (points, scores) in enumerate(knots):
        pieces = len(points) - 1
        starts[column, :pieces], widths[column, :pieces] = points[:-1], np.diff(points)
        slopes[column, :pieces] = np.diff(scores) / np.diff(points)
    within = graph.add("Max", graph.add("Unsqueeze", x, np.array([2])) - starts, 0.0)
    risen = graph.add("Min", within, widths) * slopes
    rise = graph.add("ReduceSum", risen, np.array([2]), keepdims=0)
    return rise + np.array([scores[0] for _, scores in knots])


def _one_hot(graph: Graph, x: Tensor, preprocessor: Preprocessor, column: int) -> Tensor:
    """Append the inputs of a column of words."""
    inputs = preprocessor.word_inputs(column)
    unseen = int(inputs[-1])
    known = dict(zip(preprocessor.categories[column] or (), inputs.tolist(), strict=False))
    absent = known.get("", unseen)
    gone, _ = stand_ins(preprocessor.missing_words)
    known = dict.fromkeys(sorted(MISSING), absent) | known | dict.fromkeys(gone, absent)
    code = graph.add(
        "LabelEncoder",
        x,
        domain="ai.onnx.ml",
        keys_strings=list(known),
        values_int64s=list(known.values()),
        default_int64=unseen,
    )
    # The words without an input have the code -1, which is equal to no input.
    return graph.cast(graph.add("Equal", code, np.arange(preprocessor.widths[column])), graph.real)
