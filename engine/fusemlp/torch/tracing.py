"""Trace a module's ``forward`` into a chain of parts with ``torch.fx``.

The traced graph must be a chain: one input, each result used once. A forward that reads ``self.training`` gives two
graphs, one a mode, and they must be equal.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

from fusemlp.describe.network import Activation
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.pointwise import ACTIVATIONS


@dataclass(frozen=True, eq=False)
class Part:
    """One operation of a module: kind "linear", "activation", "dropout", "flatten" or "squeeze".

    ``module`` has the parameters or the rate; ``activation`` is the kernels' activation.
    """

    kind: str
    path: str
    name: str
    module: nn.Module | None = None
    activation: Activation | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.name}" if self.path else self.name


FUNCTIONS: dict[Any, str] = {
    torch.relu: "relu",
    torch.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    **{
        getattr(functional, name): name
        for name, row in ACTIVATIONS.items()
        if row.torch and row.by_slope is None and hasattr(functional, name)
    },
}
METHODS = {"relu": "relu", "relu_": "relu", "sigmoid": "sigmoid", "tanh": "tanh"}
NOTHING = ("contiguous", "clone")


def trace_parts(module: nn.Module, path: str) -> Iterator[Part | tuple[nn.Module, str]]:
    """Return the parts of ``module.forward`` in order; modules in it as (module, path).

    Raises ArgumentError, with the operation's name, if it is no chain or cannot be fused.
    """
    flags = [(one, one.training) for one in module.modules()]
    try:
        module.train()
        graph = _graph(module, path)
        module.eval()
        other = _graph(module, path)
    finally:
        for one, flag in flags:
            one.training = flag
    if [_key(node) for node in graph.nodes] != [_key(node) for node in other.nodes]:
        raise ArgumentError(
            f"module: {_name(module, path)}: forward does different things in train and eval mode; use nn.Dropout for "
            "dropout (functional.dropout cannot be fused), and nothing else that depends on the mode"
        )
    return _chain(graph, module, path)


def _graph(module: nn.Module, path: str) -> fx.Graph:
    try:
        return fx.Tracer().trace(module)
    except Exception as error:
        raise ArgumentError(
            f"module: {_name(module, path)}: torch.fx cannot trace its forward ({error}); write it as nn.Sequential, "
            "or without control flow that depends on values"
        ) from error


def _key(node: fx.Node) -> tuple[str, str, str]:
    return node.op, str(node.target), str((node.args, node.kwargs))


def _name(module: nn.Module, path: str) -> str:
    return f"{path}: {type(module).__name__}" if path else type(module).__name__


def _chain(graph: fx.Graph, module: nn.Module, path: str) -> Iterator[Part | tuple[nn.Module, str]]:
    where = _name(module, path)
    current: fx.Node | None = None
    for node in graph.nodes:
        if node.op == "placeholder":
            if current is None:
                current = node
            elif node.users or not node.args:
                raise ArgumentError(f"module: {where}: forward takes a second input, {node.target!r}; one can be fused")
            continue
        if node.op == "output":
            if node.args[0] is not current:
                raise ArgumentError(f"module: {where}: forward must return the one result of its last operation")
            return
        if _is_shape(node):
            continue
        inputs = [one for one in node.all_input_nodes if not _is_shape(one)]
        if node.op == "get_attr" or inputs != [current]:
            raise ArgumentError(
                f"module: {where}: {node.format_node() or node.name}: a branch or a second operand; only a chain of "
                "layers can be fused. Keep the model eager and use FusedLinear or FusedMLP within it"
            )
        if node.op == "call_module":
            target = str(node.target)
            yield module.get_submodule(target), f"{path}.{target}" if path else target
        else:
            part = _operation(node, where)
            if part is not None:
                yield part
        current = node


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


def _operation(node: fx.Node, where: str) -> Part | None:
    """Return a function or method as a part, None if it does not change a matrix."""
    if node.op == "call_method":
        label = f"{where}: Tensor.{node.target}"
        name = METHODS.get(str(node.target))
    else:
        called: Any = node.target
        label = f"{where}: {getattr(called, '__name__', called)}"
        name = FUNCTIONS.get(called)
    if name is not None:
        return _activation(node, name, label)
    if node.op == "call_method" and node.target in NOTHING:
        return None
    called_name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    rest = node.args[1:]
    if called_name == "flatten" and _only_rows(rest, node.kwargs):
        return Part("flatten", label, "flatten")
    if called_name in ("view", "reshape") and _keeps_rows(rest):
        return Part("flatten", label, str(called_name))
    if called_name == "squeeze" and (rest in ((1,), (-1,)) or node.kwargs.get("dim") in (1, -1)):
        return Part("squeeze", label, "squeeze")
    raise ArgumentError(
        f"module: {label} cannot be fused; use nn.Dropout for dropout, nn.Linear for products, and for activations "
        "relu, leaky_relu, sigmoid, tanh, gelu and silu"
    )


def _activation(node: fx.Node, name: str, label: str) -> Part:
    options = {key: value for key, value in node.kwargs.items() if key not in ("input", "inplace")}
    slope: Any = 0.0
    if name == "leaky_relu":
        slope = options.pop("negative_slope", node.args[1] if len(node.args) > 1 else 0.01)
        if not isinstance(slope, int | float) or slope < 0.0:
            raise ArgumentError(f"module: {label}: expected a fixed slope >= 0, got {slope}")
    if name == "gelu" and options.get("approximate", "none") == "none":
        options.pop("approximate", None)
    if options:
        raise ArgumentError(f"module: {label}: the options {options} cannot be fused")
    return Part("activation", label, name, activation=Activation(name, slope))


def _only_rows(rest: tuple[Any, ...], options: dict[str, Any]) -> bool:
    start = rest[0] if rest else options.get("start_dim", 0)
    end = rest[1] if len(rest) > 1 else options.get("end_dim", -1)
    return bool(start == 1 and end == -1)


def _keeps_rows(rest: tuple[Any, ...]) -> bool:
    """Return whether a call flattens all but the rows: ``x.view(x.size(0), -1)``."""
    shape = rest[0] if len(rest) == 1 and isinstance(rest[0], tuple | list) else rest
    return len(shape) == 2 and isinstance(shape[0], fx.Node) and _is_shape(shape[0]) and shape[1] == -1
