"""Fused layers with autograd, for use inside a larger network: forward and backward are the contract's ops.

Every call binds the ops to the tensors' own memory, so nothing is copied in or out, and any number of calls may wait
for their backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusemlp.describe.network import Activation
from fusemlp.runtime.backends import open_backend, torch_backend
from fusemlp_kernels.contract import BATCH_INDEX, COUNTERS, NEEDS_Z, Backend, Dropout, UpdateRule
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
        if activation.name == "leaky_relu":
            described["slope"] = activation.slope
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
        self._like = like
        self._counters = self.backend.allocate(COUNTERS, "int64")
        self._counters[BATCH_INDEX] = chain.batch_index

    def new(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return an uninitialised tensor, of the computation's element type by default."""
        return self._like.new_empty(shape, dtype=dtype)

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


class ChainFunction(torch.autograd.Function):
    """The forward and backward pass of a ``Chain`` over x (m, K).

    Parameters come after x, for each layer: weight (N, K), the bias (N,) where it has one, the slope (1,) of a PReLU.
    """

    @staticmethod
    def forward(ctx: Any, chain: Chain, x: Tensor, *parameters: Tensor) -> Tensor:
        memory = _Memory(x, chain)
        inputs, pre, keeps = [x.detach().contiguous()], [], []
        for index, (weight, bias, slope) in enumerate(chain.grouped(parameters)):
            shape = len(x), len(weight)
            described = chain.operands(index, slope)
            y = memory.new(*shape)
            z = memory.new(*shape) if chain.activations[index].name in NEEDS_Z else None
            stored = described["dropout"] is not None and memory.backend.traits.stores_masks
            keep = memory.new(*shape, dtype=torch.bool) if stored else None
            b = memory.new(len(weight)).zero_() if bias is None else bias
            memory.run("linear", x=inputs[-1], w=weight, b=b, y=y, z=z, keep=keep, **described)
            inputs.append(y)
            pre.append(z)
            keeps.append(keep)
        ctx.chain = chain
        ctx.save_for_backward(*inputs, *pre, *keeps, *parameters)
        return inputs[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        chain: Chain = ctx.chain
        count = len(chain.activations)
        saved = iter(ctx.saved_tensors)
        inputs, pre, keeps = ([*islice(saved, size)] for size in (count + 1, count, count))
        layers = chain.grouped(saved)
        memory = _Memory(dy, chain)
        _, needs_x, *needs = ctx.needs_input_grad
        wanted = chain.grouped(needs)
        slopes: list[Tensor | None] = [None] * count
        dz, slopes[-1] = _through_activation(chain.activations[-1], dy, inputs[-1], pre[-1], layers[-1][2])
        gradients: list[tuple[Tensor | None, ...]] = [(None, None, None)] * count
        # Stop below the first layer that needs a gradient, unless x needs one.
        first = 0 if needs_x else next(index for index, layer in enumerate(wanted) if any(layer))
        for index in reversed(range(first, count)):
            weight, _, _ = layers[index]
            dw = torch.empty_like(weight, memory_format=torch.contiguous_format) if wanted[index][0] else None
            db = memory.new(len(weight)) if wanted[index][1] else None
            layer = {"dw": dw, "db": db, "dz": dz, "x": inputs[index]}
            memory.run("grad_weight", layers=(layer,), slopes=(), rule=ONE_BATCH)
            gradients[index] = dw, db, slopes[index]
            if index == first and not needs_x:
                break
            dz_prev = memory.new(*inputs[index].shape)
            before: dict[str, Any] = {"activation": "identity"}
            if index:
                slope = layers[index - 1][2]
                slopes[index - 1] = None if slope is None else memory.new(1)
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
        return None, dz if needs_x else None, *flat


def _through_activation(
    activation: Activation, dy: Tensor, y: Tensor, z: Tensor | None, slope: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return dz of the last layer and its slope's gradient; no op of the contract takes an external gradient."""
    name, dy = activation.name, dy.contiguous()
    if name == "identity":
        return dy, None
    if name == "prelu":
        assert z is not None and slope is not None
        dz, terms = torch.where(z > 0, dy, dy * slope), dy * z.clamp(max=0.0)
        return dz.contiguous(), terms.sum().reshape(1)
    backward = getattr(torch.ops.aten, "threshold_backward" if name == "relu" else f"{name}_backward")
    options = {"relu": (0.0,), "leaky_relu": (activation.slope, True)}.get(name, ())
    dz = backward(dy, y if z is None else z, *options)
    return dz, None
