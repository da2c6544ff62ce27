"""Fused layers with autograd, for use inside a larger network: forward and backward are the contract's ops.

Every call binds the ops to the tensors' own memory, so nothing is copied in or out, and any number of calls may wait
for their backward pass. ``torch.compile`` cannot trace them: in its programs the two passes are operators of
``torch.library``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusemlp.describe.network import Activation
from fusemlp.runtime.backends import TRAITS, open_backend, torch_backend
from fusemlp_kernels.contract import ACTIVATIONS, BATCH_INDEX, COUNTERS, NEEDS_Z, Backend, Dropout, UpdateRule
from fusemlp_kernels.errors import DTypeError
from fusemlp_kernels.pointwise import ACTIVATIONS as ROWS
from fusemlp_kernels.pointwise import evaluate

PRECISIONS = {torch.float32: "fp32", torch.float64: "fp64"}
# grad_weight uses only the rule's accumulation.
ONE_BATCH = UpdateRule("sgd")
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


@dataclass(frozen=True)
class Chain:
    """A stack of layers: the activation, the dropout rate and the presence of a bias of each."""

    activations: tuple[Activation, ...]
    rates: tuple[float, ...]
    biased: tuple[bool, ...]
    seed: int = 0
    batch_index: int = 0

    def grouped(self, values: Any) -> list[tuple[Any, Any, Any]]:
        """Group flat values as (weight, bias or None, slope or None) for each layer."""
        rest = iter(values)
        return [
            (next(rest), next(rest) if biased else None, next(rest) if activation.name == "prelu" else None)
            for activation, biased in zip(self.activations, self.biased, strict=True)
        ]

    def operands(self, layer: int, slope: Tensor | None) -> dict[str, Any]:
        """Return the operands that describe a layer's activation and dropout."""
        activation, rate = self.activations[layer], self.rates[layer]
        described: dict[str, Any] = {"activation": activation.name}
        if activation.fixed_slope is not None:
            described["slope"] = activation.fixed_slope
        if slope is not None:
            described["slope_param"] = slope
        return {**described, "dropout": Dropout(rate, layer, self.seed) if rate else None}


@cache
def _opened(name: str, device: str, precision: str) -> Backend:
    return open_backend(name, device, precision)


class _Memory:
    """Binds a backend's ops to tensors, with a chain's counters, which give each call its own dropout masks."""

    def __init__(self, like: Tensor, chain: Chain) -> None:
        precision = PRECISIONS.get(like.dtype)
        if precision is None:
            raise DTypeError(f"x: expected torch.float32 or torch.float64, got {like.dtype}")
        self.backend = _opened(torch_backend(like.device.type), str(like.device), precision)
        self._counters = self.backend.allocate(COUNTERS, "int64")
        self._counters[BATCH_INDEX] = chain.batch_index

    def see(self, value: Any) -> Any:
        """Return ``value`` with the backend's arrays over the memory of the tensors in it."""
        if isinstance(value, Tensor):
            return value.detach().numpy() if self.backend.traits.on_host else value.detach()
        if isinstance(value, dict):
            return {name: self.see(one) for name, one in value.items()}
        return tuple(map(self.see, value)) if isinstance(value, tuple) else value

    def run(self, op: str, **operands: Any) -> None:
        """Bind an op and run it."""
        call = self.backend.bind(op, counters=self._counters, **self.see(operands))
        with np.errstate(all="ignore"):
            call()


class Kept(NamedTuple):
    """The results of a forward pass: each layer's output, and what its backward pass needs beside that."""

    outputs: list[Tensor]
    pre: list[Tensor | None]
    keeps: list[Tensor | None]


def _allocate(chain: Chain, x: Tensor, parameters: Sequence[Tensor]) -> Kept:
    """Return uninitialised tensors; x may be one of ``torch.compile``, without values."""
    stores = TRAITS[torch_backend(x.device.type)].stores_masks
    kept = Kept([], [], [])
    for index, (weight, _, _) in enumerate(chain.grouped(parameters)):
        shape = x.shape[0], weight.shape[0]
        kept.outputs.append(x.new_empty(shape))
        kept.pre.append(x.new_empty(shape) if chain.activations[index].name in NEEDS_Z else None)
        kept.keeps.append(x.new_empty(shape, dtype=torch.bool) if chain.rates[index] and stores else None)
    return kept


def _forward(chain: Chain, x: Tensor, parameters: Sequence[Tensor]) -> Kept:
    """Run the layers over x (m, K), contiguous."""
    memory, kept = _Memory(x, chain), _allocate(chain, x, parameters)
    for index, (weight, bias, slope) in enumerate(chain.grouped(parameters)):
        b = x.new_zeros(len(weight)) if bias is None else bias
        y, z, keep = (one[index] for one in kept)
        described = chain.operands(index, slope)
        memory.run("linear", x=kept.outputs[index - 1] if index else x, w=weight, b=b, y=y, z=z, keep=keep, **described)
    return kept


def _backward(
    chain: Chain, dy: Tensor, x: Tensor, kept: Kept, parameters: Sequence[Tensor], needs_x: bool, needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients by x and the parameters, None where none is needed."""
    count = len(chain.activations)
    inputs, pre, keeps = [x, *kept.outputs], kept.pre, kept.keeps
    layers = chain.grouped(parameters)
    memory = _Memory(dy, chain)
    wanted = chain.grouped(needs)
    slopes: list[Tensor | None] = [None] * count
    dz, slopes[-1] = _through_activation(chain.activations[-1], dy, inputs[-1], pre[-1], layers[-1][2])
    gradients: list[tuple[Tensor | None, ...]] = [(None, None, None)] * count
    # Stop below the first layer that needs a gradient, unless x needs one.
    first = 0 if needs_x else next(index for index, layer in enumerate(wanted) if any(layer))
    for index in reversed(range(first, count)):
        weight, _, _ = layers[index]
        dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[index][0] else None
        db = dz.new_empty(len(weight)) if wanted[index][1] else None
        layer = {"dw": dw, "db": db, "dz": dz, "x": inputs[index]}
        memory.run("grad_weight", layers=(layer,), slopes=(), rule=ONE_BATCH)
        gradients[index] = dw, db, slopes[index]
        if index == first and not needs_x:
            break
        dz_prev = dz.new_empty(inputs[index].shape)
        before: dict[str, Any] = {"activation": "identity"}
        if index:
            slope = layers[index - 1][2]
            slopes[index - 1] = None if slope is None else dz.new_empty(1)
            before = {
                **chain.operands(index - 1, slope),
                "z": pre[index - 1],
                "keep": keeps[index - 1],
                "dslope": slopes[index - 1],
            }
        memory.run("grad_input", dz=dz, w=weight, y=inputs[index], dz_prev=dz_prev, **before)
        dz = dz_prev
    flat = [
        g
        for layer, own in zip(layers, gradients, strict=True)
        for one, g in zip(layer, own, strict=True)
        if one is not None
    ]
    return [dz if needs_x else None, *flat]


class ChainFunction(torch.autograd.Function):
    """The forward and backward pass of a ``Chain`` over x (m, K).

    Parameters come after x, for each layer: weight (N, K), the bias (N,) where it has one, the slope (1,) of a PReLU.
    """

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, *parameters: Tensor) -> Tensor:
        x = x.detach().contiguous()
        kept = _forward(chain, x, parameters)
        ctx.chain = chain
        ctx.save_for_backward(x, *kept.outputs, *kept.pre, *kept.keeps, *parameters)
        return kept.outputs[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        chain: Chain = ctx.chain
        count = len(chain.activations)
        x, *rest = ctx.saved_tensors
        saved = iter(rest)
        kept = Kept(*([*islice(saved, count)] for _ in range(3)))
        _, needs_x, *needs = ctx.needs_input_grad
        return None, *_backward(chain, dy, x, kept, [*saved], needs_x, needs)


# The operators' arguments for a chain: the numbers of the activations in the contract and their slopes, the rates, the
# presence of biases, and seed and batch_index as a tensor, since a compiled program does not change with them.


def _as_chain(
    activations: Sequence[int], slopes: Sequence[float], rates: Sequence[float], biased: Sequence[bool],
    masks: Tensor | None,
) -> Chain:  # fmt: skip
    seed, batch_index = (0, 0) if masks is None else masks.tolist()
    named = [Activation(ACTIVATIONS[code], slope) for code, slope in zip(activations, slopes, strict=True)]
    return Chain(tuple(named), tuple(rates), tuple(biased), seed, batch_index)


def _flat(kept: Kept) -> list[Tensor]:
    """Return the tensors of a forward pass, the last output first."""
    return [*reversed(kept.outputs), *(one for part in kept[1:] for one in part if one is not None)]


@torch.library.custom_op("fusemlp::chain", mutates_args=())
def chain_op(
    x: Tensor, parameters: Sequence[Tensor], activations: Sequence[int], slopes: Sequence[float],
    rates: Sequence[float], biased: Sequence[bool], masks: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    """Return the output, and what the backward pass needs."""
    chain = _as_chain(activations, slopes, rates, biased, masks)
    return _flat(_forward(chain, x.detach().contiguous(), parameters))


@chain_op.register_fake
def _(x: Any, parameters: Any, activations: Any, slopes: Any, rates: Any, biased: Any, masks: Any) -> list[Tensor]:
    del masks
    return _flat(_allocate(_as_chain(activations, slopes, rates, biased, None), x, parameters))


@torch.library.custom_op("fusemlp::chain_backward", mutates_args=())
def chain_backward_op(
    dy: Tensor, x: Tensor, kept: Sequence[Tensor], parameters: Sequence[Tensor], activations: Sequence[int],
    slopes: Sequence[float], rates: Sequence[float], biased: Sequence[bool], masks: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:  # fmt: skip
    """Return the gradients that are needed, of x and the parameters in order."""
    chain = _as_chain(activations, slopes, rates, biased, masks)
    x = x.contiguous()
    rest = iter(kept)
    outputs = [*islice(rest, len(activations))][::-1]
    # which of the optional tensors there are
    shapes = _allocate(chain, x[:0], parameters)
    pre, keeps = ([None if one is None else next(rest) for one in part] for part in shapes[1:])
    found = _backward(chain, dy, x, Kept(outputs, pre, keeps), parameters, needs[0], needs[1:])
    return [one for one, needed in zip(found, needs, strict=True) if needed and one is not None]


@chain_backward_op.register_fake
def _(
    dy: Any, x: Any, kept: Any, parameters: Any, activations: Any, slopes: Any, rates: Any, biased: Any, masks: Any,
    needs: Any,
) -> list[Tensor]:  # fmt: skip
    del dy, kept, activations, slopes, rates, biased, masks
    return [
        torch.empty_like(one, memory_format=torch.contiguous_format)
        for one, needed in zip((x, *parameters), needs, strict=True)
        if needed
    ]


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, parameters, *ctx.described, masks = inputs
    ctx.count = len(parameters)
    ctx.masked = masks is not None
    ctx.save_for_backward(x, *parameters, *([masks] if ctx.masked else []), *output)


def _differentiate(ctx: Any, gradients: Any) -> Any:
    x, *rest = ctx.saved_tensors
    saved = iter(rest)
    parameters = [*islice(saved, ctx.count)]
    masks = next(saved) if ctx.masked else None
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    dy = gradients[0]
    found = iter(chain_backward_op(dy, x, [*saved], parameters, *ctx.described, masks, needs))
    dx, *others = [next(found) if needed else None for needed in needs]
    return dx, others, None, None, None, None, None


chain_op.register_autograd(_differentiate, setup_context=_save)


def apply_chain(chain: Chain, x: Tensor, parameters: Sequence[Tensor], masks: Tensor | None) -> Tensor:
    """Apply the chain to x (m, K); ``masks`` are its seed and batch_index, in a program that is being compiled."""
    if not torch.compiler.is_compiling():
        call: Any = ChainFunction.apply
        y: Tensor = call(chain, x, *parameters)
        return y
    codes = [ACTIVATIONS.index(one.name) for one in chain.activations]
    slopes = [one.slope for one in chain.activations]
    output: list[Tensor] = chain_op(x, [*parameters], codes, slopes, [*chain.rates], [*chain.biased], masks)
    return output[0]


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
