"""Trace a module's ``forward`` into a chain of modules with ``torch.fx``.

The traced graph must be a chain: one input, each result used once, but for sums with an earlier result, a residual
connection. A forward that reads ``self.training`` is traced in the present mode, and again when that has changed.
"""

import inspect
import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional

from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.pointwise import ACTIVATIONS

# Activations that are functions as well; a learned slope would be a second operand.
_BY_NAME = [name for name, row in ACTIVATIONS.items() if row.torch and not row.by_slope and name != "identity"]
# Functions and methods by name, and the modules that do the same.
FUNCTIONS: dict[str, Any] = {
    "flatten": nn.Flatten,
    "log_softmax": nn.LogSoftmax,
    **{name: getattr(nn, str(ACTIVATIONS[name].torch)) for name in _BY_NAME},
}


class Part(NamedTuple):
    """One operation of a module: ``module`` computes it, ``path`` leads to it.

    ``line``: the line of a forward that calls it, as a beginning of an error; empty in ``nn.Sequential``.
    """

    path: str
    module: Any
    line: str = ""

    def __str__(self) -> str:
        kind = type(self.module).__name__
        return f"{self.path}: {kind}" if self.path else kind


@dataclass(frozen=True)
class Skip:
    """The module of a part that is an end of a residual connection: where it begins, or its sum."""

    begins: bool


def inner_path(path: str, name: str) -> str:
    """Return the path of a child or parameter of the module at ``path``."""
    return f"{path}.{name}" if path else name


class _Tracer(fx.Tracer):
    """Goes into the user's modules, and not into those of this package."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return type(module).__module__.startswith("fusemlp.") or super().is_leaf_module(module, path)


def _graph(part: Part) -> fx.Graph:
    tracer = _Tracer()
    tracer.record_stack_traces = True
    try:
        return tracer.trace(part.module)
    except Exception as error:
        # not the inner workings of torch.fx, in which most such errors are
        reason = "it branches or loops on a value" if isinstance(error, fx.proxy.TraceError) else str(error)
        raise ArgumentError(
            f"module: {part}: {_line_of_error(error)}torch.fx cannot trace its forward: {reason}; write "
            "it as nn.Sequential, or without control flow that depends on values"
        ) from error


# Code of these folders is not the user's.
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


def _line(node: fx.Node) -> str:
    """Return the line of the user's code that made a node, as ``file.py:12 (x = x + y): ``; empty if unknown."""
    return _last(re.findall(r'File "(.*)", line (\d+), in .*(?:\n    (.*))?', node.stack_trace or ""))


def _line_of_error(error: Exception) -> str:
    """Return the last line of the user's code in a traceback, as ``_line``."""
    return _last([(frame.filename, frame.lineno, frame.line) for frame in extract_tb(error.__traceback__)])


def _line_of_forward(part: Part) -> str:
    """Return the line on which a module's forward begins, as ``_line``."""
    code = inspect.unwrap(type(part.module).forward).__code__
    return _last([(code.co_filename, code.co_firstlineno, "")])


def _last(places: Sequence[tuple[str, Any, str | None]]) -> str:
    for file, line, code in reversed(places):
        if not file.startswith(_LIBRARIES):
            return f"{file}:{line}{f' ({code})' if code else ''}: "
    return ""


def trace_parts(part: Part) -> list[Part]:
    """Return the children and functions that ``forward`` calls, in order.

    Functions are modules that do the same, and there is a ``Skip`` at both ends of a residual connection.

    Raises ArgumentError, with the operation's name, if it is no chain or cannot be fused.
    """
    parts: list[Part] = []
    # the number of parts up to a result
    lengths: dict[fx.Node, int] = {}
    current: fx.Node | None = None
    for node in _graph(part).nodes:
        if node.op == "placeholder":
            if current is None:
                current = node
                lengths[node] = 0
            elif node.users or not node.args:
                raise ArgumentError(
                    f"module: {part}: {_line_of_forward(part)}forward takes a second input, {node.target!r}; one can "
                    "be fused"
                )
            continue
        if node.op == "output":
            if node.args[0] is not current:
                raise ArgumentError(
                    f"module: {part}: {_line_of_forward(part)}forward must return the one result of its last operation"
                )
            break
        if _is_shape(node):
            continue
        inputs = [source for source in node.all_input_nodes if not _is_shape(source)]
        if _is_sum(node) and len(inputs) == 2 and current in inputs:
            (start,) = {*inputs} - {current}
            path, line = f"{part}: residual connection", _line(node)
            parts.insert(lengths[start], Part(path, Skip(begins=True), line))
            parts.append(Part(path, Skip(begins=False), line))
        elif node.op == "get_attr" or inputs != [current]:
            raise ArgumentError(
                f"module: {part}: {_line(node)}a branch or a second operand; only a chain of layers and residual "
                "connections such as x + self.block(x) can be fused. Keep the model eager and use FusedLinear or "
                "FusedMLP within it"
            )
        elif node.op == "call_module":
            target = str(node.target)
            parts.append(Part(inner_path(part.path, target), part.module.get_submodule(target), _line(node)))
        else:
            parts.append(_operation(node, part))
        current = node
        lengths[node] = len(parts)
    return parts


def _is_sum(node: fx.Node) -> bool:
    """Return whether the node adds tensors: ``x + y``, ``torch.add(x, y)`` or ``x.add(y)``."""
    return node.target in (operator.add, torch.add, "add") and not node.kwargs


def _is_shape(node: fx.Node) -> bool:
    """Return whether the node is a size: ``x.size(0)``, ``x.shape``, ``len(x)``, or an item of one."""
    if node.op == "call_method" and node.target == "size":
        return True
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_shape(node.args[0])
    return node.target is len


def _operation(node: fx.Node, part: Part) -> Part:
    """Return a function or method as the module that does the same."""
    called: Any = node.target
    name = called if isinstance(called, str) else getattr(called, "__name__", str(called))
    label, line = f"{part}: {name}", _line(node)
    of_torch = isinstance(called, str) or called in (getattr(torch, name, None), getattr(functional, name, None))
    unused = ("input", "_stacklevel") if node.kwargs.get("dtype") else ("input", "_stacklevel", "dtype")
    rest, options = node.args[1:], {key: value for key, value in node.kwargs.items() if key not in unused}
    if of_torch and name in ("contiguous", "clone"):
        return Part(label, nn.Identity())
    if of_torch and name in ("view", "reshape") and _keeps_rows(rest):
        return Part(label, nn.Flatten())
    if of_torch and name == "squeeze" and (rest in ((1,), (-1,)) or options.get("dim") in (1, -1)):
        return Part(label, nn.Flatten(0))
    if name == "flatten" and not rest:
        # The module's default is 1, the function's 0.
        options = {"start_dim": 0, **options}
    if of_torch and name.removesuffix("_") in FUNCTIONS:
        try:
            return Part(label, FUNCTIONS[name.removesuffix("_")](*rest, **options), line)
        except TypeError as error:
            raise ArgumentError(f"module: {part}: {line}{name} cannot be fused with these options") from error
    raise ArgumentError(
        f"module: {part}: {line}{name} cannot be fused; use nn.Dropout for dropout, nn.Linear for products, and for "
        f"activations {', '.join(_BY_NAME)}"
    )


def _keeps_rows(rest: tuple[Any, ...]) -> bool:
    """Return whether a call flattens all but the rows: ``x.view(x.size(0), -1)``."""
    shape = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    return len(shape) == 2 and isinstance(shape[0], fx.Node) and _is_shape(shape[0]) and shape[1] == -1
