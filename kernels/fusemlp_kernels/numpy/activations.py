"""Activations as passes over row blocks that stay in the cache, from the formulas of ``pointwise``."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from fusemlp_kernels import pointwise
from fusemlp_kernels.errors import unknown_name
from fusemlp_kernels.numpy import functions
from fusemlp_kernels.numpy.tables import Array

# Elements of a block: with its scratch it fits the second-level cache of any machine of the last ten years.
BLOCK = 1 << 15
OPERATORS = {ast.Add: np.add, ast.Sub: np.subtract, ast.Mult: np.multiply, ast.Div: np.divide}


def activate(name: str, y: Array, z: Array, slope: Any) -> list[Callable[[], object]]:
    """The passes of ``y = act(z)``; y (M, N), perhaps z itself. ``slope``: a number, or (1,), read at each run.

    Raises ArgumentError for a name without a formula.
    """
    if name not in pointwise.ACTIVATIONS:
        raise unknown_name("activation", name, pointwise.ACTIVATIONS)
    lines = _lines(pointwise.ACTIVATIONS[name].value)
    rows, columns = y.shape
    height = max(1, BLOCK // max(columns, 1))
    scratch: list[Array] = []
    passes: list[Callable[[], object]] = []
    for start in range(0, rows if columns else 0, height):
        out = y[start : start + height]
        bound = _Passes({"z": out if z is y else z[start : start + height], "slope": slope}, scratch)
        for line, value in lines:
            bound.values[line] = bound.of(value, out if line == "y" else None)
        passes += bound.runs
    return passes


@functools.cache
def _lines(formula: str) -> list[pointwise.Line]:
    return pointwise.lines(formula, "y")


class _Passes:
    """The passes of a formula over one block, each into an array of ``scratch`` or a given one."""

    def __init__(self, values: dict[str, Any], scratch: list[Array]) -> None:
        self.values, self.scratch, self.used = values, scratch, 0
        self.runs: list[Callable[[], object]] = []

    def of(self, node: ast.expr, out: Array | None = None) -> Any:
        """The array, or number, that an expression is after the passes; in ``out`` if that is given."""
        function: Callable[..., object]
        operands: list[ast.expr]
        match node:
            case ast.Constant(value=value):
                return float(value)  # type: ignore[arg-type]
            case ast.Name(id=name) if out is None or self.values[name] is out:
                return self.values[name]
            case ast.Name(id=name):
                function, operands = np.positive, [node]
            case ast.BinOp(left=left, op=op, right=right):
                function, operands = OPERATORS[type(op)], [left, right]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                function, operands = np.negative, [operand]
            case ast.Call(func=ast.Name(id=name), args=operands) if name in pointwise.FUNCTIONS:
                function = getattr(functions, name, None) or getattr(np, name)
            case _:
                raise ValueError(f"formula: NumPy has no pass for {ast.unparse(node)!r}")
        given = [self.values[one.id] if isinstance(one, ast.Name) else self.of(one) for one in operands]
        if not any(isinstance(one, np.ndarray) for one in given):
            result = function(*given)
            return float(result)  # type: ignore[arg-type]
        if out is None:
            out = self._scratch()
        self.runs.append(functools.partial(function, *given, out=out))
        return out

    def _scratch(self) -> Array:
        """The next array of scratch, as large as the block."""
        shape = self.values["z"].shape
        if self.used == len(self.scratch):
            self.scratch.append(np.empty(shape, self.values["z"].dtype))
        self.used += 1
        return self.scratch[self.used - 1][: shape[0]]
