"""Fused layers with autograd, for use inside a larger network: forward and backward are the contract's ops.

Every call binds the ops to the tensors' own memory, so nothing is copied in or out, and any number of calls may wait
for their backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusemlp.describe.network import Activation
from fusemlp.runtime.backends import open_backend, torch_backend
from fusemlp_kernels.contract import (
    BATCH_INDEX,
    COUNTERS,
    NEEDS_Z,
    Backend,
    Dropout,
    UpdateRule,
)
from fusemlp_kernels.errors import DTypeError

PRECISIONS = {torch.float32: "fp32", torch.float64: "fp64"}
# grad_weight uses only the rule's accumulation.
ONE_BATCH = UpdateRule("sgd")


@dataclass(frozen=True)
class Chain:
    """A stack of layers: the activation, the dropout rate and the presence of a bias of each."""

    activations: tuple[Activation, ...]
    rates: tuple[float, ...]
    biased: tuple[bool, ...]
    seed: int = 0
    batch_index: int = 0

    def dropout(self, layer: int) -> Dropout | None:
        """Return the layer's dropout for the kernels."""
        rate = self.rates[layer]
        return Dropout(rate, layer, self.seed) if rate else None


@cache
def _opened(name: str, device: str | None, precision: str) -> Backend:
    return open_backend(name, device, precision)


def _backend_for(x: Tensor) -> Backend:
    precision = PRECISIONS.get(x.dtype)
    if precision is None:
        raise DTypeError(f"x: expected torch.float32 or torch.float64, got {x.dtype}")
    return _opened(torch_backend(x.device.type), str(x.device), precision)


class _Memory:
    """Convert tensors to a backend's arrays, and make new ones."""

    def __init__(self, backend: Backend, like: Tensor) -> None:
        self.backend = backend
        self._like = like
        self._host = backend.traits.on_host

    def see(self, tensor: Tensor) -> Any:
        """Return the backend's array over the tensor's memory."""
        tensor = tensor.detach()
        return tensor.numpy() if self._host else tensor

    def new(self, *shape: int) -> Tensor:
        """Return an uninitialised tensor of the computation's element type."""
        return torch.empty(shape, dtype=self._like.dtype, device=self._like.device)

    def counters(self, batch_index: int) -> Any:
        """Return the control array that gives each call its own dropout masks."""
        counters = self.backend.allocate(COUNTERS, "int64")
        counters[BATCH_INDEX] = batch_index
        return counters

    def run(self, op: str, **operands: Any) -> None:
        """Bind an op and run it."""
        call = self.backend.bind(op, **{k: self.see(v) if isinstance(v, Tensor) else v for k, v in operands.items()})
        with np.errstate(all="ignore"):
            call()


class ChainFunction(torch.autograd.Function):
    """The forward and backward pass of a ``Chain`` over x (m, K).

    Parameters come after x, for each layer: weight (N, K), the bias (N,) where it has one, the slope (1,) of a PReLU.
    """

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, *parameters: Tensor) -> Tensor:
        memory = _Memory(_backend_for(x), x)
        layers = _layers(chain, parameters)
        counters = memory.counters(chain.batch_index)
        inputs, pre, keeps = [x.detach().contiguous()], [], []
        for index, (weight, bias, slope) in enumerate(layers):
            rows, width = len(x), weight.shape[0]
            activation, dropout = chain.activations[index], chain.dropout(index)
            y = memory.new(rows, width)
            z = memory.new(rows, width) if activation.name in NEEDS_Z else None
            stored = dropout is not None and memory.backend.traits.stores_masks
            keep = torch.empty(rows, width, dtype=torch.bool, device=x.device) if stored else None
            memory.run(
                "linear",
                x=inputs[-1],
                w=weight,
                b=memory.new(width).zero_() if bias is None else bias,
                y=y,
                z=z,
                dropout=dropout,
                counters=counters,
                keep=keep,
                **_describe(activation, slope),
            )
            inputs.append(y)
            pre.append(z)
            keeps.append(keep)
        ctx.chain = chain
        ctx.keeps = keeps
        ctx.save_for_backward(*inputs, *(z for z in pre if z is not None), *parameters)
        return inputs[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        chain: Chain = ctx.chain
        count = len(chain.activations)
        saved = list(ctx.saved_tensors)
        inputs, rest = saved[: count + 1], saved[count + 1 :]
        pre: list[Tensor | None] = [
            rest.pop(0) if activation.name in NEEDS_Z else None for activation in chain.activations
        ]
        layers = _layers(chain, rest)
        memory = _Memory(_backend_for(dy), dy)
        counters = memory.counters(chain.batch_index)
        needs = ctx.needs_input_grad[2:]
        dz, last_slope = _through_activation(chain.activations[-1], dy, inputs[-1], pre[-1], layers[-1][2])
        slopes: list[Tensor | None] = [*[None] * (count - 1), last_slope]
        gradients: list[Tensor | None] = []
        dx = None
        # Stop below the first layer that needs a gradient, unless x needs one.
        wanted = _layers(chain, needs)
        first = 0 if ctx.needs_input_grad[1] else next(i for i, layer in enumerate(wanted) if any(layer))
        for index in reversed(range(count)):
            weight, bias, slope = layers[index]
            own: list[Tensor | None] = [
                None,
                *([None] if bias is not None else []),
                *([None] if slope is not None else []),
            ]
            if index >= first:
                dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[index][0] else None
                db = memory.new(len(weight)) if bias is not None and wanted[index][1] else None
                layer = {name: None if t is None else memory.see(t) for name, t in (("dw", dw), ("db", db))}
                layer |= {"dz": memory.see(dz), "x": memory.see(inputs[index])}
                memory.run("grad_weight", layers=(layer,), slopes=(), rule=ONE_BATCH, counters=counters)
                own = [dw, *([db] if bias is not None else []), *([slopes[index]] if slope is not None else [])]
            if index > first:
                before = index - 1
                dz_prev = memory.new(len(dz), weight.shape[1])
                activation, below = chain.activations[before], layers[before][2]
                slopes[before] = None if below is None else memory.new(1)
                memory.run(
                    "grad_input",
                    dz=dz,
                    w=weight,
                    y=inputs[index],
                    z=pre[before],
                    dz_prev=dz_prev,
                    dslope=slopes[before],
                    dropout=chain.dropout(before),
                    counters=counters,
                    keep=ctx.keeps[before],
                    **_describe(activation, below),
                )
                dz = dz_prev
            elif index == 0 and ctx.needs_input_grad[1]:
                dx = memory.new(*inputs[0].shape)
                memory.run("grad_input", dz=dz, w=weight, y=inputs[0], dz_prev=dx, activation="identity")
            gradients[:0] = own
        return None, dx, *gradients


def _layers(chain: Chain, values: Any) -> list[tuple[Any, Any, Any]]:
    """Group flat values as (weight, bias or None, slope or None) for each layer."""
    rest = list(values)
    layers = []
    for activation, biased in zip(chain.activations, chain.biased, strict=True):
        weight, bias = rest.pop(0), rest.pop(0) if biased else None
        layers.append((weight, bias, rest.pop(0) if activation.name == "prelu" else None))
    return layers


def _describe(activation: Activation, slope: Tensor | None) -> dict[str, Any]:
    """Return the operands of an activation."""
    described: dict[str, Any] = {"activation": activation.name}
    if activation.name == "leaky_relu":
        described["slope"] = activation.slope
    if slope is not None:
        described["slope_param"] = slope
    return described


def _through_activation(
    activation: Activation, dy: Tensor, y: Tensor, z: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return dz of the last layer and its slope's gradient; no op of the contract takes an external gradient."""
    name, aten = activation.name, torch.ops.aten
    dy = dy.contiguous()
    if name == "identity":
        return dy, None
    if name == "prelu":
        assert z is not None and slope is not None
        dz, terms = torch.where(z > 0, dy, dy * slope), dy * z.clamp(max=0.0)
        return dz.contiguous(), terms.sum().reshape(1)
    if name == "relu":
        return aten.threshold_backward(dy, y, 0.0), None
    if name == "leaky_relu":
        return aten.leaky_relu_backward(dy, y, activation.slope, True), None
    if name == "sigmoid":
        return aten.sigmoid_backward(dy, y), None
    if name == "tanh":
        return aten.tanh_backward(dy, y), None
    return getattr(aten, f"{name}_backward")(dy, z), None
