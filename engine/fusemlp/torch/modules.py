"""Read a torch module as a multi-layer perceptron, or report the part that cannot be fused; and make one."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusemlp.describe.blocks import NORMS, Frequency, Normalisation
from fusemlp.describe.checks import as_kind
from fusemlp.describe.network import MLP, NORM, Activation, rolled
from fusemlp.inputs.arrays import Array
from fusemlp.torch.trace import Part, Skip, inner_path, trace_parts
from fusemlp_kernels.errors import ArgumentError, DTypeError
from fusemlp_kernels.pointwise import ACTIVATIONS

# The kernels' names of torch's activations.
NAMES: dict[type[nn.Module], str] = {getattr(nn, row.torch): name for name, row in ACTIVATIONS.items() if row.torch}
_ROWS = {kind: ACTIVATIONS[name] for kind, name in NAMES.items()}
_NORMS: dict[type[nn.Module], type[Normalisation]] = {getattr(nn, row.torch): row for row in NORMS.values()}


def _not_negative(argument: str) -> tuple[Callable[[Any], bool], str]:
    return lambda one: getattr(one, argument) >= 0.0, f"expected {argument} >= 0"


# Modules with options: a test for those that the kernels have, and the error for the others.
LIMITS: dict[type[nn.Module], tuple[Callable[[Any], bool], str]] = {
    nn.Dropout: (lambda one: 0.0 <= one.p < 1.0, "drops everything; expected 0 <= p < 1"),
    nn.Flatten: (
        lambda one: one.start_dim in (0, 1) and one.end_dim == -1,
        "only Flatten(1), which keeps the rows, and Flatten(0) behind a single output can be fused",
    ),
    # The derivative follows from the sign of the output.
    **{kind: _not_negative(row.argument) for kind, row in _ROWS.items() if row.argument and not row.needs_z},
    nn.PReLU: (lambda one: one.num_parameters == 1, "one slope a layer can be fused; use PReLU()"),
    nn.LogSoftmax: (lambda one: one.dim in (1, -1), "only LogSoftmax(dim=1), over the classes, can be fused"),
    # above the threshold torch is the identity, which differs by 2e-9 at 20
    nn.Softplus: (lambda one: one.beta == 1.0 and one.threshold >= 20.0, "expected beta 1 and a threshold >= 20"),
    **dict.fromkeys(
        _NORMS,
        (
            lambda one: one.elementwise_affine and len(one.normalized_shape) == 1 and one.eps != 0.0,
            "expected one width, elementwise_affine=True, whose weight may be frozen, and eps > 0",
        ),
    ),
    nn.GELU: (lambda one: one.approximate == "none", "only the exact GELU() can be fused"),
}
SUPPORTED = (
    f"Linear, {', '.join(kind.__name__ for kind in (*_NORMS, *NAMES))}, Dropout, Flatten, residual connections, and "
    "LogSoftmax at the end, in nn.Sequential or in a forward that torch.fx can trace"
)
INSTEAD = {
    "Softmax": "leave it out: CrossEntropyLoss takes logits and applies the softmax itself",
    "BatchNorm1d": "fold it into the Linear before it, or train that part with eager PyTorch",
    "Conv2d": "keep the convolutions eager and use FusedMLP for the layers behind them",
    "CELU": "use ELU",
    "Hardtanh": "use Tanh",
    "ReLU6": "use ReLU",
    "OptimizedModule": "fuse the module that was compiled: module._orig_mod",
    "DataParallel": "fuse the module inside: module.module",
    "DistributedDataParallel": "fuse the module inside: module.module; one device is trained",
}


class Normalise(nn.Module):
    """Computes (x - mean) / scale of each column, as an engine with ``normalise=True`` does; both are buffers (K,)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Array, scale: Array) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("scale", torch.tensor(scale))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.scale

    def extra_repr(self) -> str:
        """Return what stands in the parentheses of ``print(module)``."""
        return str(len(self.mean))


class Waves(nn.Module):
    """Computes the waves of x (..., K), as a network with this ``encoding`` does."""

    def __init__(self, encoding: Frequency) -> None:
        super().__init__()
        self.encoding = encoding

    def forward(self, x: Tensor) -> Tensor:
        t = x[..., None] * 2.0 ** torch.arange(self.encoding.octaves, dtype=x.dtype, device=x.device)
        # without whole periods first, since pi is rounded
        angle = torch.pi * torch.fmod(t, 2.0)
        waves = torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-3)
        return torch.cat([x, waves], dim=-1) if self.encoding.inputs else waves

    def extra_repr(self) -> str:
        """Return what stands in the parentheses of ``print(module)``."""
        return repr(self.encoding)


class AddInput(nn.Module):
    """Stands in ``ResidualSequential`` for a sum with the input of the module called ``start``."""

    def __init__(self, start: str) -> None:
        super().__init__()
        self.start = start

    def extra_repr(self) -> str:
        """Return what stands in the parentheses of ``print(module)``."""
        return f"{self.start!r}"


class ResidualSequential(nn.Sequential):
    """An ``nn.Sequential`` with residual blocks, each from the module that its ``AddInput`` names to this one."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (rows, K) to (rows, N)."""
        inputs = {}
        for name, module in self._modules.items():
            inputs[name] = x
            x = x + inputs[module.start] if isinstance(module, AddInput) else module(x)
        return x


class Slot(NamedTuple):
    """A parameter, and its path as in ``named_parameters``."""

    path: str
    parameter: nn.Parameter


@dataclass(frozen=True, eq=False)
class Reading:
    """A module as a network. ``slots`` are its parameters by short names (w0, b0, g0), as far as present.

    ``flattens``: x may have more than two dimensions. ``squeezes``: one output comes out as (m,), not (m, 1).
    ``normalise`` scales the inputs. ``log_softmax``: LogSoftmax follows the network's last layer.
    ``dtype`` and ``device`` are those of all parameters.
    """

    network: MLP
    slots: dict[str, Slot]
    flattens: bool
    squeezes: bool
    normalise: Normalise | None
    log_softmax: bool
    dtype: torch.dtype
    device: torch.device


@dataclass
class _Layer:
    """A Linear and the parts after it, during the reading."""

    linear: Part
    norm: Part | None = None
    activation: Part | None = None
    dropout: Part | None = None
    # the end of a residual connection after them
    skip: Part | None = None


def as_module(activation: Activation, **factory: Any) -> nn.Module:
    """Return torch's module of an activation; ``factory``: the dtype and device of its parameters."""
    row = ACTIVATIONS[activation.name]
    slope = {row.argument: activation.slope} if row.argument else {}
    module: nn.Module = getattr(nn, str(row.torch))(**slope, **(factory if row.learned else {}))
    return module


def as_sequential(net: MLP, scale: Any, dtype: torch.dtype) -> nn.Sequential:
    """Return new modules for a network without members, after those that scale and encode its inputs."""
    module = ResidualSequential() if net.blocks else nn.Sequential()
    starts = {last: first for first, last in net.blocks}
    if scale is not None:
        module.add_module("normalise", Normalise(scale.mean, scale.scale))
    if net.encoding is not None:
        module.add_module("encoding", Waves(net.encoding))
    for layer, (inputs, outputs) in enumerate(pairwise(net.widths)):
        module.add_module(str(2 * layer), nn.Linear(inputs, outputs, dtype=dtype))
        norm, chosen, name = net.norm(layer), net.activations[layer], str(2 * layer + 1)
        if norm is not None:
            module.add_module(f"{2 * layer}{NORM}", getattr(nn, norm.torch)(outputs, eps=norm.eps, dtype=dtype))
        if chosen.name != "identity":
            module.add_module(name, as_module(chosen, dtype=dtype))
        if net.dropouts[layer]:
            module.add_module(f"{name}_dropout", nn.Dropout(net.dropouts[layer]))
        if layer in starts:
            module.add_module(f"{name}_sum", AddInput(str(2 * starts[layer])))
    return module


def hooks_of(module: nn.Module) -> tuple[Any, ...]:
    """Return the containers of the hooks that a fused step would not run."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def refuse_hooks(owner: str, *containers: Any) -> None:
    """Raise ArgumentError if one of the containers has hooks."""
    if any(containers):
        raise ArgumentError(f"{owner}, which a fused step would not run; remove them")


def read_module(module: nn.Module, *, for_engine: bool = False) -> Reading:
    """Return the network of ``module`` in its present mode: eval mode turns dropout off.

    ``for_engine`` keeps the rates of train mode, and lets the module start with Normalise.

    Raises ArgumentError with the path of a part that cannot be fused, ArgumentError or DTypeError for parameters.
    """
    as_kind("module", module, nn.Module, "a torch.nn.Module such as nn.Sequential(...)")
    for path, child in module.named_modules():
        refuse_hooks(f"module: {Part(path, child)} has hooks", *hooks_of(child))
    layers: list[_Layer] = []
    blocks: list[tuple[int, int]] = []
    flattens = squeezes = log_softmax = False
    normalise: Normalise | None = None
    encoding: Frequency | None = None
    for part in _parts(Part("", module)):
        kind = type(part.module)
        if kind is nn.Identity:
            continue
        if squeezes or log_softmax:
            end = "LogSoftmax" if log_softmax else "the squeeze of the output"
            raise ArgumentError(f"module: {part}: nothing can follow {end}")
        if kind is Skip:
            _connect(part, layers, blocks)
        elif kind is nn.Linear:
            layers.append(_Layer(part))
        elif kind is nn.Flatten and part.module.start_dim == 1:
            flattens = flattens or not layers
        elif kind is Waves and not layers and encoding is None:
            encoding = part.module.encoding
        elif kind is Normalise and not layers and encoding is None and for_engine:
            normalise = part.module
        elif kind is Normalise:
            raise ArgumentError(
                f"module: {part} cannot be fused: scale the rows before the step: fuse(module[1:], ...) and "
                "step(module[0](x), y)"
            )
        elif not layers:
            raise ArgumentError(
                f"module: {part}: only Flatten(1), Identity and Waves can stand before the first Linear"
            )
        elif kind is nn.Flatten:
            squeezes = True
        elif kind is nn.LogSoftmax:
            log_softmax = True
        else:
            what = "dropout" if kind is nn.Dropout else "norm" if kind in _NORMS else "activation"
            _add(layers[-1], what, part)
    if not layers:
        raise ArgumentError("module: has no Linear; there is nothing to train")
    last = layers[-1]
    if last.dropout is not None:
        raise ArgumentError(f"module: {last.dropout}: dropout behind the last Linear would drop outputs; remove it")
    if last.norm is not None:
        raise ArgumentError(f"module: {last.norm}: the outputs of the last Linear cannot be normalised; remove it")
    if last.skip is not None:
        raise _unfit(last.skip, "has no Linear after it; add the output layer")
    network = _network(layers, blocks, for_engine, encoding)
    if squeezes and network.sizes[-1] != 1:
        raise ArgumentError(f"module: squeezes {network.sizes[-1]} outputs; only one output can be squeezed")
    slots = _slots(layers)
    first = slots["w0"].parameter
    return Reading(network, slots, flattens, squeezes, normalise, log_softmax, first.dtype, first.device)


def _parts(part: Part) -> Iterator[Part]:
    """Yield the parts of a module in order; raises ArgumentError for one that the kernels lack."""
    path, module, line = part
    kind = type(module)
    if kind in (nn.Linear, Normalise, Skip, Waves) or kind in NAMES or kind in LIMITS:
        fits, words = LIMITS.get(kind, (None, ""))
        if fits is not None and not fits(module):
            raise ArgumentError(f"module: {line}{f'{path}: ' if path else ''}{module!r}: {words}")
        yield part
        return
    if kind.forward is nn.Sequential.forward:
        inner: Iterable[Part] = (Part(inner_path(path, name), child, line) for name, child in module._modules.items())
    elif kind.__module__.startswith("torch.") or not isinstance(kind.forward, FunctionType):
        advice = INSTEAD.get(
            kind.__name__, "remove it, or keep the model eager and use FusedLinear or FusedMLP within it"
        )
        raise ArgumentError(f"module: {line}{part} cannot be fused; {advice}. What can be fused: {SUPPORTED}")
    else:
        inner = trace_parts(part)
    for child in inner:
        yield from _parts(child)


def _add(layer: _Layer, what: str, part: Part) -> None:
    """Note the norm, the activation or the dropout of a layer.

    Raises ArgumentError for a second one, for a wrong order, and beside an end of a residual connection.
    """
    if layer.skip is not None:
        raise _unfit(layer.skip, f"has {part} at its beginning or after its sum; only a Linear can stand there")
    before = getattr(layer, what)
    if before is not None:
        raise ArgumentError(f"module: {part}: a second {what} on one layer, after {before}; keep one")
    if what == "norm":
        later = layer.activation or layer.dropout
        if later is not None:
            raise ArgumentError(f"module: {part} after {later}: put it between the Linear and its activation")
        width = layer.linear.module.out_features
        if part.module.normalized_shape[0] != width:
            raise ArgumentError(f"module: {part}: {part.module!r} is given {width} features")
    # With f(a z) = a f(z) for a >= 0, dropout before the activation equals dropout after it.
    elif layer.dropout is not None and not _ROWS[type(part.module)].homogeneous:
        raise ArgumentError(f"module: {part} after {layer.dropout}: put the Dropout behind the activation")
    setattr(layer, what, part)


def _unfit(skip: Part, words: str) -> ArgumentError:
    return ArgumentError(
        f"module: {skip.line}{skip.path}: the block {words}. What can be fused is x + f(x) behind a hidden layer; "
        "f has two Linears or more, all but the last of one width, and the last of that of x, without an activation; "
        "else keep the model eager and use FusedLinear within it"
    )


def _connect(part: Part, layers: list[_Layer], blocks: list[tuple[int, int]]) -> None:
    """Begin or end a residual block; ``blocks`` has -1 for the last layer of one that has begun.

    Raises ArgumentError for one that is no ``Residual`` of a network.
    """
    if not layers:
        raise _unfit(part, "adds the inputs of the module; put a Linear before it")
    begun = bool(blocks) and blocks[-1][1] < 0
    layers[-1].skip = part
    if part.module.begins:
        if begun:
            raise _unfit(part, "stands within another, or across it")
        blocks.append((len(layers), -1))
        return
    start = blocks[-1][0]
    blocks[-1] = start, len(layers) - 1
    if len(layers) < start + 2:
        raise _unfit(part, "has fewer than two Linears")
    extra = layers[-1].norm or layers[-1].activation or layers[-1].dropout
    if extra is not None:
        raise _unfit(part, f"has {extra} after its last Linear; remove it")
    widths = [layer.linear.module.out_features for layer in layers[start - 1 :]]
    if widths[-1] != widths[0] or len({*widths[1:-1]}) > 1:
        raise _unfit(part, f"has the widths {widths}")


def _network(
    layers: list[_Layer], blocks: list[tuple[int, int]], always_drops: bool, encoding: Frequency | None
) -> MLP:
    activations, rates, norms = [], [], []
    sizes = [layers[0].linear.module.in_features]
    for layer in layers:
        linear, drop = layer.linear.module, layer.dropout and layer.dropout.module
        if linear.in_features != sizes[-1]:
            raise ArgumentError(f"module: {layer.linear} takes {linear.in_features} features, it is given {sizes[-1]}")
        sizes.append(linear.out_features)
        chosen = nn.Identity() if layer.activation is None else layer.activation.module
        argument = _ROWS[type(chosen)].argument
        activations.append(Activation(NAMES[type(chosen)], getattr(chosen, argument) if argument else None))
        rates.append(drop.p if drop is not None and (drop.training or always_drops) else 0.0)
        norm = layer.norm and layer.norm.module
        # RMSNorm's None is the eps of its input's type
        norms.append(norm and _NORMS[type(norm)](norm.eps or torch.finfo(norm.weight.dtype).eps))
    if encoding is not None:
        sizes[0], rest = divmod(sizes[0], encoding.width(1))
        if rest:
            raise ArgumentError(
                f"module: {layers[0].linear} takes {layers[0].linear.module.in_features} features, expected "
                f"{encoding.width(1)} waves of each input ({encoding!r})"
            )
    return MLP(
        rolled(sizes, blocks),
        activation=activations[:-1],
        output_activation=activations[-1],
        dropout=rates[:-1],
        init="torch",
        norm=norms[:-1],
        encoding=encoding,
    )


def _slots(layers: list[_Layer]) -> dict[str, Slot]:
    """Return the parameters by short names; raises ArgumentError or DTypeError for one that cannot be fused."""
    slots: dict[str, Slot] = {}
    seen: dict[int, str] = {}
    first: Slot | None = None
    for index, layer in enumerate(layers):
        places = [("w", "weight", layer.linear), ("b", "bias", layer.linear)]
        if layer.norm is not None:
            places += [(kind, name, layer.norm) for kind, name, _ in _NORMS[type(layer.norm.module)].tensors]
        if layer.activation is not None and isinstance(layer.activation.module, nn.PReLU):
            places.append(("s", "weight", layer.activation))
        for short, name, part in places:
            if getattr(part.module, name) is None:
                continue
            slot = Slot(inner_path(part.path, name), getattr(part.module, name))
            first = first or slot
            _check_parameter(slot, first)
            if id(slot.parameter) in seen:
                raise ArgumentError(
                    f"module: {slot.path} and {seen[id(slot.parameter)]} are one tensor; tied parameters cannot be "
                    "fused: give each layer its own"
                )
            seen[id(slot.parameter)] = slot.path
            slots[f"{short}{index}"] = slot
    return slots


def _check_parameter(slot: Slot, first: Slot) -> None:
    path, parameter = slot
    if not isinstance(parameter, nn.Parameter):
        raise ArgumentError(f"module: {path} is {type(parameter).__name__}, expected a parameter of its own")
    if parameter.dtype not in (torch.float32, torch.float64):
        raise DTypeError(
            f"module: {path} is {parameter.dtype}, expected torch.float32 or torch.float64; use module.float()"
        )
    if parameter.dtype != first.parameter.dtype or parameter.device != first.parameter.device:
        raise ArgumentError(
            f"module: {path} is {parameter.dtype} on {parameter.device}, {first.path} is {first.parameter.dtype} on "
            f"{first.parameter.device}; bring the whole module to one type and device with module.to(...)"
        )
    hooks = parameter._backward_hooks, parameter._post_accumulate_grad_hooks
    refuse_hooks(f"module: {path} has gradient hooks", *hooks)
