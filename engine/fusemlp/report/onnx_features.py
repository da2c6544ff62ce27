"""The part of an ONNX graph that turns features, as they are in the data, into the network's inputs.

Its nodes are those of ``Preprocessor.transform_features``, and of ``datasets.dataset`` for words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.scaling import CLIP, KNEE, Knots, limits
from fusemlp.datasets.textfiles import MISSING

INPUT = "x"


class Graph(Protocol):
    """The graph that the nodes are appended to."""

    real: np.dtype[Any]

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str: ...
    def cast(self, name: str, dtype: Any) -> str: ...
    def constant(self, value: Any) -> str: ...
    def given(self, name: str, dtype: Any, width: int) -> str: ...


def has_words(preprocessor: Preprocessor) -> bool:
    return any(words is not None for words in preprocessor.categories)


def network_input(graph: Graph, preprocessor: Preprocessor) -> str:
    """Append the graph's inputs and the preprocessing, and return the output with the network's inputs.

    Numbers alone come in one input ``x`` (rows, features). With words every feature has an input of its own (rows, 1)
    that is called as it is.
    """
    names, categories = preprocessor.feature_names, preprocessor.categories
    numbers = [column for column, words in enumerate(categories) if words is None]
    blocks: list[str] = []
    # The indices of each feature's inputs in the blocks one after another.
    places: dict[int, list[int]] = {}
    count = 0
    if has_words(preprocessor):
        types = [graph.real if words is None else str for words in categories]
        given = [graph.given(name, dtype, 1) for name, dtype in zip(names, types, strict=True)]
        x = _joined(graph, [given[column] for column in numbers]) if numbers else ""
    else:
        given, x = [], graph.given(INPUT, graph.real, len(names))
    if numbers:
        filled, missing = _filled(graph, x, preprocessor, numbers)
        cut = [column for column in numbers if preprocessor.pieces(column) > 1]
        whole = [column for column in numbers if column not in cut]
        for some, append in ((whole, _scaled), (cut, _by_pieces)):
            if some:
                own = filled if some == numbers else graph.add("Gather", filled, _indices(graph, numbers, some), axis=1)
                blocks.append(append(graph, own, preprocessor, some))
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
            blocks += [_one_hot(graph, given[column], words, inputs, width)] if width else []
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
    """Append the scaling of the columns of numbers: ``scaling.statistics``, ``clipped`` and ``by_quantiles``."""
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


def _indices(graph: Graph, columns: list[int], some: list[int]) -> str:
    return graph.constant(np.array([columns.index(column) for column in some]))


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
