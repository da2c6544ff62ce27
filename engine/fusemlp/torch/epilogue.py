"""The parts of a step between its kernel calls that no kernel does: torch computes them on the kernels' memory.

Each is a call without arguments in a ``Runnable``, after the output layer's ``linear`` or before the ``update``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fusemlp.torch.modules import Reading, as_module
from fusemlp_kernels.contract import LAST_LOSS

Run = Callable[[], object]


@dataclass
class Running:
    """The number of rows in the batch that runs, and the module's output for them where the program notes it."""

    rows: int = 0
    output: Tensor | None = None


def bind_output(running: Running, reading: Reading, z: Any, slope: Any) -> Run:
    """Return the call that notes the module's output, from z (capacity, N) of the last Linear.

    ``slope``: the parameter of a PReLU at the end, else None.
    """
    z = torch.as_tensor(z)
    finish = _after_linear(reading, None if slope is None else torch.as_tensor(slope))

    def run() -> None:
        running.output = finish(z[: running.rows].clone())

    return torch.no_grad()(run)


def _after_linear(reading: Reading, slope: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the function of the parts after the last Linear."""
    activation = as_module(reading.network.activations[-1])

    def finish(z: Tensor) -> Tensor:
        y: Tensor = activation(z) if slope is None else functional.prelu(z, slope)
        if reading.log_softmax:
            y = y.log_softmax(1)
        return y.squeeze(1) if reading.squeezes else y

    return finish


def bind_weighted_loss(running: Running, operands: dict[str, Any], pos_weight: Sequence[float]) -> Run:
    """Return a ``loss_grad`` for BCEWithLogitsLoss(pos_weight): with p for a pos_weight, s(z) for the sigmoid, the loss
    of z and its target t has the gradient (1 + (p - 1) t) s(z) - p t."""
    z, dz, target, stats = (torch.as_tensor(operands[name]) for name in ("z", "dz", "target", "stats"))
    weight = torch.tensor(pos_weight, dtype=z.dtype, device=z.device)
    less, reduction, (_, outputs) = weight - 1.0, operands["loss"].reduction, z.shape
    # the kernels read a row up to its pitch
    pitch = dz.stride(0)
    whole = dz if pitch == outputs else dz.as_strided((len(dz), pitch), (pitch, 1))

    def run() -> None:
        rows = running.rows
        t = target[:rows]
        stats[LAST_LOSS] = functional.binary_cross_entropy_with_logits(
            z[:rows], t, pos_weight=weight, reduction=reduction
        )
        gradient = torch.sigmoid(z[:rows]).mul_(torch.addcmul(torch.ones_like(t), less, t)).sub_(weight * t)
        if reduction == "mean":
            gradient.div_(rows * outputs)
        if rows < len(dz) or pitch > outputs:
            whole.zero_()
        dz[:rows] = gradient

    return torch.no_grad()(run)


def bind_clipping(gradients: Sequence[Any], most: float) -> Run:
    """Return the call that clips the common norm of all gradients, for optimizers with several updates in a step."""
    views = [torch.as_tensor(one) for one in gradients]
    # torch clips the grad of its parameters
    for view in views:
        view.grad = view.detach()

    def run() -> None:
        clip_grads_with_norm_(views, most, get_total_norm(views))

    return run
