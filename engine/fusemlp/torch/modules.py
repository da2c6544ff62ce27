"""Read a torch module as a multi-layer perceptron, or report the part that cannot be fused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fusemlp.describe.network import MLP, Activation
from fusemlp.torch.tracing import Part, trace_parts
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DTypeError
from fusemlp_kernels.pointwise import ACTIVATIONS

# With f(a z) = a f(z) for a >= 0, dropout before the activation equals dropout after it.
HOMOGENEOUS = ("identity", "relu", "leaky_relu", "prelu")
# Classes of torch.nn without options that the kernels have as activations.
PLAIN: dict[type[nn.Module], str] = {
    getattr(nn, row.torch): name
    for name, row in ACTIVATIONS.items()
    if row.torch and name not in ("identity", "leaky_relu", "prelu")
}
_NAMED = ", ".join(row.torch for name, row in ACTIVATIONS.items() if row.torch and name != "identity")
SUPPORTED = f"Linear, {_NAMED}, Identity, Dropout and Flatten, in nn.Sequential or in a forward that torch.fx can trace"
INSTEAD = {
    "Softmax": "leave it out: CrossEntropyLoss takes logits and applies the softmax itself",
    "LogSoftmax": "leave it out and use CrossEntropyLoss, which takes logits",
    "BatchNorm1d": "fold it into the Linear before it, or train that part with eager PyTorch",
    "LayerNorm": "leave it out, or use FusedLinear within an eager module",
    "Conv2d": "keep the convolutions eager and use FusedMLP for the layers behind them",
    "ELU": "use SiLU or GELU",
    "Hardtanh": "use Tanh",
    "ReLU6": "use ReLU",
    "OptimizedModule": "fuse the module that was compiled: module._orig_mod",
    "DataParallel": "fuse the module inside: module.module",
    "DistributedDataParallel": "fuse the module inside: module.module; one device is trained",
}


@dataclass(frozen=True, eq=False)
class Slot:
    """The place of a parameter: ``path`` as in ``named_parameters``; the attribute ``name`` of ``owner``."""

    path: str
    owner: nn.Module
    name: str

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that is there now."""
        found = self.owner._parameters[self.name]
        assert found is not None
        return found


@dataclass(frozen=True, eq=False)
class Reading:
    """A module as a network. ``slots`` maps short names (w0, b0, s0, as far as present) to the places of parameters.

    ``flattens``: x may have more than two dimensions. ``squeezes``: one output comes out as (m,), not (m, 1).
    """

    network: MLP
    slots: dict[str, Slot]
    flattens: bool
    squeezes: bool


class _Layer:
    """A Linear and the parts after it, during the reading."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self.activation: Part | None = None
        self.dropout: Part | None = None


def read_module(module: nn.Module, *, always_drops: bool = False) -> Reading:
    """Return the network of ``module`` in its present mode: eval mode turns dropout off.

    ``always_drops`` keeps the rates of train mode.

    Raises ArgumentError with the path of a part that cannot be fused.
    """
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError(f"module: expected a torch.nn.Module such as nn.Sequential(...), got {module!r}")
    _refuse_hooks(module)
    parts = list(_parts(module, ""))
    layers: list[_Layer] = []
    flattens = squeezes = False
    for part in parts:
        if squeezes:
            raise ArgumentError(f"module: {part}: nothing can follow the squeeze of the output")
        if part.kind == "flatten":
            flattens = flattens or not layers
        elif part.kind == "squeeze":
            squeezes = True
        elif part.kind == "linear":
            layers.append(_Layer(part))
        elif not layers:
            raise ArgumentError(f"module: {part}: only Flatten and Identity can stand before the first Linear")
        elif part.kind == "dropout":
            _add_dropout(layers[-1], part)
        else:
            _add_activation(layers[-1], part)
    if not layers:
        raise ArgumentError("module: has no Linear; there is nothing to train")
    if layers[-1].dropout is not None:
        raise ArgumentError(
            f"module: {layers[-1].dropout}: dropout behind the last Linear would drop outputs; remove it"
        )
    network = _network(layers, always_drops)
    if squeezes and network.sizes[-1] != 1:
        raise ArgumentError(f"module: squeezes {network.sizes[-1]} outputs; only one output can be squeezed")
    return Reading(network, _slots(layers), flattens, squeezes)


def _parts(module: nn.Module, path: str) -> Iterator[Part]:
    """Yield the parts of the module in order."""
    if type(module).forward is nn.Sequential.forward:
        for name, child in module.named_children():
            yield from _parts(child, f"{path}.{name}" if path else name)
        return
    part = part_of(module, path)
    if part is not None:
        yield part
    elif type(module).__module__.startswith("torch.") or not isinstance(type(module).forward, type(_parts)):
        raise refused(module, path)
    else:
        for inner in trace_parts(module, path):
            if isinstance(inner, Part):
                yield inner
            else:
                yield from _parts(*inner)


def part_of(module: nn.Module, path: str) -> Part | None:
    """Return a module of torch's own as a part if the kernels have it, else None.

    Raises ArgumentError for options that the kernels lack.
    """
    kind = type(module)
    options: Any = module
    if kind is nn.Linear:
        return Part("linear", path, "Linear", module)
    if kind is nn.Dropout:
        if not 0.0 <= options.p < 1.0:
            raise ArgumentError(f"module: {path}: Dropout(p={options.p}) drops everything; expected 0 <= p < 1")
        return Part("dropout", path, "Dropout", module)
    if kind is nn.Flatten:
        if (options.start_dim, options.end_dim) != (1, -1):
            raise ArgumentError(
                f"module: {path}: Flatten(start_dim={options.start_dim}, end_dim={options.end_dim}); only "
                "Flatten(1, -1), which keeps the rows, can be fused"
            )
        return Part("flatten", path, "Flatten")
    if kind is nn.LeakyReLU:
        if options.negative_slope < 0.0:
            raise ArgumentError(
                f"module: {path}: LeakyReLU({options.negative_slope}): expected a slope >= 0; use PReLU"
            )
        return Part("activation", path, "LeakyReLU", activation=Activation("leaky_relu", options.negative_slope))
    if kind is nn.PReLU:
        if options.num_parameters != 1:
            raise ArgumentError(
                f"module: {path}: PReLU({options.num_parameters}): one slope a layer can be fused; use PReLU()"
            )
        return Part("activation", path, "PReLU", module, activation=Activation("prelu"))
    if kind is nn.GELU and options.approximate != "none":
        raise ArgumentError(
            f"module: {path}: GELU(approximate={options.approximate!r}): only the exact GELU() can be fused"
        )
    if kind in PLAIN:
        return Part("activation", path, kind.__name__, activation=Activation(PLAIN[kind]))
    if kind is nn.Identity:
        return Part("activation", path, "Identity", activation=Activation("identity"))
    return None


def refused(module: nn.Module, path: str) -> ArgumentError:
    """Return the error for a module that cannot be fused."""
    kind = type(module).__name__
    where = f"{path}: {kind}" if path else kind
    advice = INSTEAD.get(kind, "remove it, or keep the model eager and use FusedLinear or FusedMLP within it")
    return ArgumentError(f"module: {where} cannot be fused; {advice}. What can be fused: {SUPPORTED}")


def _refuse_hooks(module: nn.Module) -> None:
    for path, one in module.named_modules():
        if any(_hooks(one)):
            name = f"{path}: {type(one).__name__}" if path else type(one).__name__
            raise ArgumentError(f"module: {name} has hooks, which a fused step would not run; remove them")


def _add_dropout(layer: _Layer, part: Part) -> None:
    if layer.dropout is not None:
        raise ArgumentError(f"module: {part}: a second dropout on one layer, after {layer.dropout}; keep one")
    layer.dropout = part


def _add_activation(layer: _Layer, part: Part) -> None:
    assert part.activation is not None
    if part.activation.name == "identity":
        return
    if layer.activation is not None:
        raise ArgumentError(f"module: {part}: a second activation on one layer, after {layer.activation}; keep one")
    if layer.dropout is not None and part.activation.name not in HOMOGENEOUS:
        raise ArgumentError(f"module: {part} after {layer.dropout}: put the Dropout behind the activation")
    layer.activation = part


def _network(layers: list[_Layer], always_drops: bool) -> MLP:
    activations, rates = [], []
    sizes = [_linear(layers[0]).in_features]
    for layer in layers:
        linear = _linear(layer)
        if linear.in_features != sizes[-1]:
            raise ArgumentError(f"module: {layer.part} takes {linear.in_features} features, it is given {sizes[-1]}")
        sizes.append(linear.out_features)
        chosen = None if layer.activation is None else layer.activation.activation
        activations.append(chosen or Activation("identity"))
        dropout = None if layer.dropout is None else layer.dropout.module
        rates.append(
            float(dropout.p) if isinstance(dropout, nn.Dropout) and (dropout.training or always_drops) else 0.0
        )
    return MLP(sizes, activation=activations[:-1], output_activation=activations[-1], dropout=rates[:-1], init="torch")


def _linear(layer: _Layer) -> nn.Linear:
    assert isinstance(layer.part.module, nn.Linear)
    return layer.part.module


def _slots(layers: list[_Layer]) -> dict[str, Slot]:
    slots: dict[str, Slot] = {}
    for index, layer in enumerate(layers):
        linear = _linear(layer)
        slots[f"w{index}"] = Slot(_join(layer.part.path, "weight"), linear, "weight")
        if linear.bias is not None:
            slots[f"b{index}"] = Slot(_join(layer.part.path, "bias"), linear, "bias")
        if layer.activation is not None and isinstance(layer.activation.module, nn.PReLU):
            slots[f"s{index}"] = Slot(_join(layer.activation.path, "weight"), layer.activation.module, "weight")
    seen: dict[int, str] = {}
    for slot in slots.values():
        parameter = slot.owner._parameters.get(slot.name)
        if not isinstance(parameter, nn.Parameter):
            raise ArgumentError(f"module: {slot.path} is {type(parameter).__name__}, expected a parameter of its own")
        if id(parameter) in seen:
            raise ArgumentError(
                f"module: {slot.path} and {seen[id(parameter)]} are one tensor; tied parameters cannot be fused: give "
                "each layer its own"
            )
        seen[id(parameter)] = slot.path
    return slots


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def check_tensors(reading: Reading) -> tuple[torch.dtype, torch.device]:
    """Return the element type and device of all parameters; raises ArgumentError or DTypeError if they differ."""
    slots = list(reading.slots.values())
    first = slots[0].parameter
    for slot in slots:
        parameter = slot.parameter
        if parameter.dtype not in (torch.float32, torch.float64):
            raise DTypeError(
                f"module: {slot.path} is {parameter.dtype}, expected torch.float32 or torch.float64; use module.float()"
            )
        if parameter.dtype != first.dtype or parameter.device != first.device:
            raise ArgumentError(
                f"module: {slot.path} is {parameter.dtype} on {parameter.device}, {slots[0].path} is {first.dtype} on "
                f"{first.device}; bring the whole module to one type and device with module.to(...)"
            )
        if parameter._backward_hooks:
            raise ArgumentError(
                f"module: {slot.path} has gradient hooks, which a fused step would not run; remove them"
            )
    return first.dtype, first.device


def watched(module: nn.Module) -> list[tuple[Any, str, Any]]:
    """Return triples (mapping, key, value); while every mapping holds its value, the module has not changed."""
    entries: list[tuple[Any, str, Any]] = []
    for one in module.modules():
        entries.extend((one._modules, name, child) for name, child in one._modules.items())
        entries.extend((one._parameters, name, parameter) for name, parameter in one._parameters.items())
        names = {nn.Dropout: ("p", "training"), nn.LeakyReLU: ("negative_slope",), nn.GELU: ("approximate",)}
        entries.extend((one.__dict__, name, one.__dict__[name]) for name in names.get(type(one), ()))
        if not type(one).__module__.startswith("torch."):
            # A traced forward may depend on its module's attributes, but not on the mode.
            own = (name for name in one.__dict__ if not name.startswith("_") and name != "training")
            entries.extend((one.__dict__, name, one.__dict__[name]) for name in own)
    return entries


def containers(module: nn.Module) -> list[tuple[Any, int]]:
    """Return pairs (children or hooks of a module, their number), to detect additions."""
    entries: list[tuple[Any, int]] = []
    for one in module.modules():
        if one._modules:
            entries.append((one._modules, len(one._modules)))
        entries.extend((hooks, 0) for hooks in _hooks(one))
    return entries


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
