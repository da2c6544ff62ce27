"""Fused layers as modules, with autograd, for use inside a larger network: both passes are the contract's ops.

A pass is bound once for each shape, and runs in the tensors' own memory: nothing is copied in or out, and any number of
calls may wait for their backward pass. ``torch.compile`` cannot trace them: in its programs the two passes are
operators of ``torch.library``.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fusemlp.describe.checks import as_count
from fusemlp.describe.conflicts import check_together
from fusemlp.describe.network import MLP, Activation, as_activation
from fusemlp.runtime.plans import TRAITS, open_backend, torch_backend
from fusemlp.torch.modules import as_module
from fusemlp_kernels.contract import ACTIVATIONS, BATCH_INDEX, COUNTERS, NEEDS_Z, Dropout, UpdateRule
from fusemlp_kernels.errors import DTypeError, ShapeError
from fusemlp_kernels.pointwise import ACTIVATIONS as ROWS
from fusemlp_kernels.pointwise import evaluate

PRECISIONS = {torch.float32: "fp32", torch.float64: "fp64"}
# grad_weight uses only the rule's accumulation.
ONE_BATCH = UpdateRule("sgd")
# Shapes and options of a module whose passes stay bound: two for each number of rows in training.
MOST_KEYS = 8
# Functions of the kernels' formulas.
FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    **{name: getattr(torch, name) for name in ("abs", "exp", "log1p", "sigmoid", "sign", "sqrt", "tanh")},
    "maximum": lambda x, other: x.clamp(min=other),
    "minimum": lambda x, other: x.clamp(max=other),
    "normal_cdf": torch.special.ndtr,
    "normal_pdf": lambda x: torch.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi),
    "step": lambda x, below: torch.where(x > 0, 1.0, torch.where(x <= 0, below, x)),
}
# Derivatives, times a gradient, for which torch has one kernel: from dy, from y or z, and from the slope.
ATEN: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "relu": lambda dy, y, slope: torch.ops.aten.threshold_backward(dy, y, 0.0),
    "leaky_relu": lambda dy, y, slope: torch.ops.aten.leaky_relu_backward(dy, y, slope, True),
    "sigmoid": lambda dy, y, slope: torch.ops.aten.sigmoid_backward(dy, y),
    "tanh": lambda dy, y, slope: torch.ops.aten.tanh_backward(dy, y),
    "gelu": lambda dy, z, slope: torch.ops.aten.gelu_backward(dy, z),
    "silu": lambda dy, z, slope: torch.ops.aten.silu_backward(dy, z),
    "elu": lambda dy, y, alpha: torch.ops.aten.elu_backward(dy, alpha, 1.0, 1.0, True, y),
    "mish": lambda dy, z, slope: torch.ops.aten.mish_backward(dy, z),
}


class Bindings:
    """The bound passes of a module that no thread is running, by everything that they depend on.

    A copy of the module, or a pickled one, binds its own.
    """

    def __init__(self) -> None:
        self._idle: dict[Any, list[Any]] = {}
        self._looking = threading.Lock()

    def __reduce__(self) -> Any:
        return Bindings, ()

    def run(self, chain: Chain, describe: Callable[..., Any], *columns: Sequence[Tensor | None]) -> None:
        """Run the calls of ``describe(chain, *columns)``; a column has tensors or None."""
        tensors = [None if tensor is None else tensor.contiguous() for column in columns for tensor in column]
        first: Any = tensors[0]
        backend = _opened(first.device, first.dtype)
        if not backend.traits.on_host:
            _bind(
                backend, chain, describe, columns, [tensor if tensor is None else tensor.detach() for tensor in tensors]
            )
            return
        key = describe, chain, first.dtype, *[None if tensor is None else tensor.shape for tensor in tensors]
        with self._looking:
            idle = self._idle.setdefault(key, [])
            if len(self._idle) > MOST_KEYS:
                del self._idle[next(iter(self._idle))]
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
        if 0 in addresses and len(first):
            raise DTypeError(f"x: expected a tensor with memory of its own, got {type(first).__name__}")
        # The outputs are new tensors in each call, so a bound pass holds nothing between calls.
        try:
            run, counters = idle.pop()
        except IndexError:
            arrays = [None if tensor is None else tensor.new_empty(tensor.shape).numpy() for tensor in tensors]
            run, counters = _bind(backend, chain, describe, columns, arrays)
        counters[BATCH_INDEX] = chain.batch_index
        run(addresses)
        idle.append((run, counters))


@dataclass(frozen=True)
class Chain:
    """A stack of layers: the activation, the dropout rate and the presence of a bias of each."""

    activations: tuple[Activation, ...]
    rates: tuple[float, ...]
    biased: tuple[bool, ...]
    seed: int
    batch_index: int = field(compare=False)
    bindings: Bindings = field(compare=False)

    def grouped(self, values: Any) -> list[tuple[Any, Any, Any]]:
        """Group flat values as (weight, bias or None, slope or None) for each layer."""
        rest = iter(values)
        return [
            (next(rest), next(rest) if biased else None, next(rest) if activation.name == "prelu" else None)
            for activation, biased in zip(self.activations, self.biased, strict=True)
        ]

    def operands(self, layer: int, slope: Any) -> dict[str, Any]:
        """Return the operands that describe a layer's activation and dropout."""
        activation, rate = self.activations[layer], self.rates[layer]
        described: dict[str, Any] = {"activation": activation.name}
        if activation.fixed_slope is not None:
            described["slope"] = activation.fixed_slope
        if slope is not None:
            described["slope_param"] = slope
        return {**described, "dropout": Dropout(rate, layer, self.seed) if rate else None}


@cache
def _opened(device: torch.device, dtype: torch.dtype) -> Any:
    precision = PRECISIONS.get(dtype)
    if precision is None:
        raise DTypeError(f"x: expected torch.float32 or torch.float64, got {dtype}")
    return open_backend(torch_backend(device.type), str(device), precision)


def _bind(
    backend: Any, chain: Chain, describe: Callable[..., Any], columns: Sequence[Sequence[Any]], arrays: Sequence[Any]
) -> Any:
    """Return the bound calls over ``arrays``, those of the columns in order, and their counters; a GPU runs them."""
    # give each call its own dropout masks
    counters = backend.allocate(COUNTERS, "int64")
    counters[BATCH_INDEX] = chain.batch_index
    rest = iter(arrays)
    described = describe(chain, *[[*islice(rest, len(column))] for column in columns])
    if backend.traits.on_host:
        calls = [(op, {"counters": counters, **operands}) for op, operands in described]
        return backend.bind_calls(calls, arrays), counters
    for op, operands in described:
        backend.bind(op, counters=counters, **operands)()
    return None


class Intermediates(NamedTuple):
    """The results of a forward pass: each layer's output, and what its backward pass needs beside that."""

    outputs: list[Tensor]
    pre: list[Tensor | None]
    keeps: list[Tensor | None]


def _allocate(chain: Chain, x: Tensor, parameters: Sequence[Tensor]) -> Intermediates:
    """Return uninitialised tensors; x may be one of ``torch.compile``, without values."""
    stores = any(chain.rates) and TRAITS[torch_backend(x.device.type)].stores_masks
    kept = Intermediates([], [], [])
    for index, (weight, _, _) in enumerate(chain.grouped(parameters)):
        shape = x.shape[0], weight.shape[0]
        kept.outputs.append(x.new_empty(shape))
        kept.pre.append(x.new_empty(shape) if chain.activations[index].name in NEEDS_Z else None)
        kept.keeps.append(x.new_empty(shape, dtype=torch.bool) if chain.rates[index] and stores else None)
    return kept


def _forward(chain: Chain, x: Tensor, parameters: Sequence[Tensor]) -> Intermediates:
    """Run the layers over x (m, K)."""
    kept = _allocate(chain, x, parameters)
    weights, biases, slopes = zip(*chain.grouped(parameters), strict=True)
    b = [x.new_zeros(len(w)) if bias is None else bias for w, bias in zip(weights, biases, strict=True)]
    chain.bindings.run(chain, _forward_calls, [x], *kept, weights, b, slopes)
    return kept


def _forward_calls(chain: Chain, x: Any, outputs: Any, *columns: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the calls of a forward pass; raises ShapeError if parameters do not fit together."""
    layers = zip([*x, *outputs], outputs, *columns, strict=False)
    for index, (x, y, z, keep, w, b, slope) in enumerate(layers):
        if (*b.shape, x.shape[1]) != (*w.shape,):
            raise ShapeError(
                f"layer {index}: expected weight (N, {x.shape[1]}) and bias (N,), got {(*w.shape,)} and {(*b.shape,)}"
            )
        yield "linear", {"x": x, "w": w, "b": b, "y": y, "z": z, "keep": keep, **chain.operands(index, slope)}


def _backward(
    chain: Chain,
    dy: Tensor,
    x: Tensor,
    kept: Intermediates,
    parameters: Sequence[Tensor],
    needs_x: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients by x and the parameters, None where none is needed."""
    layers, wanted = chain.grouped(parameters), chain.grouped(needs)
    weights, _, slopes = zip(*layers, strict=True)
    dz, dslope = _through_activation(chain.activations[-1], dy, kept.outputs[-1], kept.pre[-1], slopes[-1])
    # Stop below the first layer that needs a gradient, unless x needs one.
    first = 0 if needs_x else next(index for index, layer in enumerate(wanted) if any(layer))
    dzs = [*(dz.new_empty(y.shape) for y in kept.outputs[first:-1]), dz]
    dx = torch.empty_like(x) if needs_x else None
    pairs = [*zip(weights, wanted, strict=True)]
    dw = [w.new_empty(w.shape) if by_weight else None for w, (by_weight, _, _) in pairs]
    db = [w.new_empty(len(w)) if by_bias else None for w, (_, by_bias, _) in pairs]
    dslopes = [*(None if slope is None else dz.new_empty(1) for slope in slopes[:-1]), dslope]
    chain.bindings.run(chain, _backward_calls, dzs, [dx], [x], *kept, weights, slopes, dw, db, dslopes)
    gradients = itertools.chain.from_iterable(zip(dw, db, dslopes, strict=True))
    present = [parameter is not None for layer in layers for parameter in layer]
    return [dx, *itertools.compress(gradients, present)]


def _backward_calls(chain: Chain, dzs: Any, dx: Any, *columns: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the calls of a backward pass; ``dzs`` are those of the last layers."""
    x, outputs, pre, keeps, weights, slopes, dw, db, dslopes = columns
    inputs, befores = [*x, *outputs], [*dx, *dzs]
    first = len(weights) - len(dzs)
    layers: list[dict[str, Any]] = []
    for index in reversed(range(first, len(weights))):
        dz, dz_prev = befores[index - first + 1], befores[index - first]
        if dw[index] is not None or db[index] is not None:
            layers.append({"dw": dw[index], "db": db[index], "dz": dz, "x": inputs[index]})
        if dz_prev is None:
            break
        below: dict[str, Any] = {"activation": "identity"}
        if index:
            below = {"z": pre[index - 1], "keep": keeps[index - 1], "dslope": dslopes[index - 1]}
            below |= chain.operands(index - 1, slopes[index - 1])
        yield "grad_input", {"dz": dz, "w": weights[index], "y": inputs[index], "dz_prev": dz_prev, **below}
    if layers:
        yield "grad_weight", {"layers": layers, "slopes": (), "rule": ONE_BATCH}


class ChainFunction(torch.autograd.Function):
    """The forward and backward pass of a ``Chain`` over x (m, K).

    Parameters come after x, for each layer: weight (N, K), the bias (N,) where it has one, the slope (1,) of a PReLU.
    """

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, *parameters: Tensor) -> Tensor:
        x = x.contiguous()
        kept = _forward(chain, x, parameters)
        ctx.chain = chain
        ctx.save_for_backward(x, *kept.outputs, *kept.pre, *kept.keeps, *parameters)
        return kept.outputs[-1]

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        # The decorator's check costs time in every backward pass, and only create_graph needs it.
        return (once_differentiable(_gradients) if torch.is_grad_enabled() else _gradients)(ctx, dy)


def _gradients(ctx: Any, dy: Tensor) -> Any:
    count = len(ctx.chain.activations)
    x, *rest = ctx.saved_tensors
    saved = iter(rest)
    kept = Intermediates(*([*islice(saved, count)] for _ in range(3)))
    _, needs_x, *needs = ctx.needs_input_grad
    return None, *_backward(ctx.chain, dy, x, kept, [*saved], needs_x, needs)


# Of the operators of all compiled programs.
COMPILED = Bindings()

# Arguments of the operators for a chain: ``layers`` has four numbers for each, the number of the activation in the
# contract, its slope, the dropout rate, and 1 with a bias; ``masks`` are seed and batch_index, a tensor because a
# compiled program does not change with them.


def _as_chain(layers: Sequence[float], masks: Tensor | None) -> Chain:
    seed, batch_index = (0, 0) if masks is None else masks.tolist()
    codes, slopes, rates, biased = (layers[place::4] for place in range(4))
    activations = [Activation(ACTIVATIONS[int(code)], slope) for code, slope in zip(codes, slopes, strict=True)]
    return Chain(tuple(activations), tuple(rates), tuple(map(bool, biased)), seed, batch_index, COMPILED)


def _flat(kept: Intermediates) -> list[Tensor]:
    """Return the tensors of a forward pass, the last output first."""
    return [*reversed(kept.outputs), *(one for part in kept[1:] for one in part if one is not None)]


@torch.library.custom_op("fusemlp::chain", mutates_args=())
def chain_op(x: Tensor, parameters: Sequence[Tensor], layers: Sequence[float], masks: Tensor | None) -> list[Tensor]:
    """Return the output, and what the backward pass needs."""
    return _flat(_forward(_as_chain(layers, masks), x.detach().contiguous(), parameters))


@chain_op.register_fake
def _(x: Any, parameters: Any, layers: Any, masks: Any) -> list[Tensor]:
    del masks
    return _flat(_allocate(_as_chain(layers, None), x, parameters))


@torch.library.custom_op("fusemlp::chain_backward", mutates_args=())
def chain_backward_op(
    dy: Tensor,
    x: Tensor,
    kept: Sequence[Tensor],
    parameters: Sequence[Tensor],
    layers: Sequence[float],
    masks: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return the gradients that are needed, of x and the parameters in order."""
    chain = _as_chain(layers, masks)
    x = x.contiguous()
    rest = iter(kept)
    outputs = [*islice(rest, len(chain.activations))][::-1]
    # which of the optional tensors there are
    shapes = _allocate(chain, x[:0], parameters)
    pre, keeps = ([None if one is None else next(rest) for one in part] for part in shapes[1:])
    gradients = _backward(chain, dy, x, Intermediates(outputs, pre, keeps), parameters, needs[0], needs[1:])
    return [one for one, needed in zip(gradients, needs, strict=True) if needed and one is not None]


@chain_backward_op.register_fake
def _(dy: Any, x: Any, kept: Any, parameters: Any, layers: Any, masks: Any, needs: Any) -> list[Tensor]:
    del dy, kept, layers, masks
    return [
        torch.empty_like(one, memory_format=torch.contiguous_format)
        for one, needed in zip((x, *parameters), needs, strict=True)
        if needed
    ]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, parameters, ctx.layers, masks = inputs
    ctx.count = len(parameters)
    ctx.masked = masks is not None
    ctx.save_for_backward(x, *parameters, *([masks] if ctx.masked else []), *output)


def _differentiate(ctx: Any, gradients: Any) -> Any:
    x, *rest = ctx.saved_tensors
    saved = iter(rest)
    parameters = [*islice(saved, ctx.count)]
    masks = next(saved) if ctx.masked else None
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    gradients = iter(chain_backward_op(gradients[0], x, [*saved], parameters, ctx.layers, masks, needs))
    dx, *others = [next(gradients) if needed else None for needed in needs]
    return dx, others, None, None


chain_op.register_autograd(_differentiate, setup_context=_save)


def apply_chain(
    chain: Chain, x: Tensor, parameters: Sequence[Tensor], width: int, masks: Tensor | None = None
) -> Tensor:
    """Apply the chain to x (..., K), any number of rows.

    ``masks`` are its seed and batch_index, in a program that is being compiled.
    """
    if not isinstance(x, Tensor) or x.dim() < 1 or x.shape[-1] != width:
        kind = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ShapeError(f"x: expected a tensor of shape (..., {width}), got {kind}")
    for weight in parameters:
        if weight.dtype != x.dtype or weight.device != x.device:
            raise DTypeError(
                f"x: expected {weight.dtype} on {weight.device}, like the weights, got {x.dtype} on {x.device}"
            )
    rows = x if x.dim() == 2 else x.reshape(-1, width)
    if torch.compiler.is_compiling():
        described = zip(chain.activations, chain.rates, chain.biased, strict=True)
        layers = [
            number
            for activation, rate, biased in described
            for number in (float(ACTIVATIONS.index(activation.name)), activation.slope, rate, float(biased))
        ]
        y: Tensor = chain_op(rows, [*parameters], layers, masks)[0]
    else:
        run: Any = ChainFunction.apply
        y = run(chain, rows, *parameters)
    return y if x.dim() == 2 else y.reshape(*x.shape[:-1], y.shape[-1])


def _through_activation(
    activation: Activation, dy: Tensor, y: Tensor, z: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return dz of the last layer and its slope's gradient; no op of the contract takes an external gradient."""
    name, dy, row = activation.name, dy.contiguous(), ROWS[activation.name]
    if name == "identity":
        return dy, None
    if name in ATEN:
        return ATEN[name](dy, y if z is None else z, activation.slope), None
    known = {"y": y, "z": z, "slope": activation.slope if slope is None else slope}
    dz = (dy * evaluate(row.derivative, known, FUNCTIONS)).contiguous()
    if row.by_slope is None:
        return dz, None
    return dz, (dy * evaluate(row.by_slope, known, FUNCTIONS)).sum().reshape(1)


class FusedLinear(nn.Linear):
    """``act(x @ weight.T + bias)`` in one call, with autograd: nn.Linear with its parameters and initial values.

    x (..., in_features) to (..., out_features), float32, or float64 on the CPU. ``activation`` is a name of the kernel
    contract, or ``LeakyReLU(slope)``, ``PReLU(init)`` or ``ELU(alpha)`` of fusemlp; a PReLU's slope is the parameter
    ``slope``.
    Gradients of the first order only. Works under ``torch.compile``, also with ``fullgraph=True``.
    """

    slope: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        activation: str | Activation = "identity",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        as_count("in_features", in_features, minimum=1)
        as_count("out_features", out_features, minimum=1)
        chosen = as_activation("activation", activation)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = chosen
        self._bindings = Bindings()
        slope = torch.full((1,), chosen.slope, device=device, dtype=dtype)
        self.register_parameter("slope", nn.Parameter(slope) if chosen.name == "prelu" else None)

    def reset_parameters(self) -> None:
        """Draw the initial values of nn.Linear: uniform in +-1 / sqrt(in_features)."""
        super().reset_parameters()
        slope = self._parameters.get("slope")
        if slope is not None:
            nn.init.constant_(slope, self.activation.slope)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        parameters = [one for one in (self.weight, self.bias, self.slope) if one is not None]
        chain = Chain((self.activation,), (0.0,), (self.bias is not None,), 0, 0, self._bindings)
        return apply_chain(chain, x, parameters, self.in_features)

    def extra_repr(self) -> str:
        """Return the options for the printed module."""
        return f"{super().extra_repr()}, activation={self.activation.name!r}"


class FusedMLP(nn.Module):
    """A multi-layer perceptron with autograd whose layers are fused; arguments as ``fusemlp.MLP``, without blocks.

    x (..., sizes[0]) to (..., sizes[-1]). ``state_dict`` has the keys of the plain ``nn.Sequential`` of Linear and
    activations: ``0.weight``, ``0.bias``, ``2.weight``, ... Dropout works in train mode; ``seed`` decides its masks
    (None draws one from torch's generator), and every call takes the next. Gradients of the first order only. Works
    under ``torch.compile``, also with ``fullgraph=True``.
    """

    def __init__(
        self,
        sizes: Any,
        *,
        activation: Any = "relu",
        output_activation: str | Activation = "identity",
        dropout: Any = 0.0,
        seed: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network = MLP(
            sizes, activation=activation, output_activation=output_activation, dropout=dropout, init="torch"
        )
        check_together({**self.network.uses, "FusedMLP": True})
        self._seed: int | Tensor | None = None if seed is None else as_count("seed", seed, minimum=0)
        # A tensor: a compiled program would be compiled again for another number.
        self._calls = torch.zeros((), dtype=torch.int64, device="cpu")
        count = self.network.layers
        # without dropout
        self._chain = Chain(self.network.activations, (0.0,) * count, (True,) * count, 0, 0, Bindings())
        self._places = [name.split(".") for name in self.network.parameter_shapes()]
        for layer, (inputs, outputs) in enumerate(zip(self.network.sizes, self.network.sizes[1:], strict=False)):
            self.add_module(str(2 * layer), nn.Linear(inputs, outputs, device=device, dtype=dtype))
            chosen = self.network.activations[layer]
            if chosen.name == "prelu":
                self.add_module(str(2 * layer + 1), as_module(chosen, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., sizes[0]) to (..., sizes[-1])."""
        chain, masks, rates = self._chain, None, self.network.dropouts
        if self.training and any(rates):
            seed, calls = 0, 0
            if self._seed is None:
                self._seed = torch.randint(0, 1 << 62, (), device="cpu")
            self._calls += 1
            if torch.compiler.is_compiling():
                masks = torch.stack([torch.as_tensor(counter, device="cpu") for counter in (self._seed, self._calls)])
            else:
                seed, calls = int(self._seed), int(self._calls)
            chain = Chain(chain.activations, rates, chain.biased, seed, calls, chain.bindings)
        parts = self._modules
        parameters = [getattr(parts[part], name) for part, name in self._places]
        return apply_chain(chain, x, parameters, self.network.sizes[0], masks)

    def extra_repr(self) -> str:
        """Return the options for the printed module."""
        return repr(self.network)
