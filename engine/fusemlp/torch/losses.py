"""Read a torch loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fusemlp.describe.losses import MAE, MSE, BinaryCrossEntropy, CrossEntropy, Huber, Loss, Poisson
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

# Functions with default options, as modules.
FUNCTIONS: dict[Any, type[nn.Module]] = {
    functional.cross_entropy: nn.CrossEntropyLoss,
    functional.mse_loss: nn.MSELoss,
    functional.l1_loss: nn.L1Loss,
    functional.huber_loss: nn.HuberLoss,
    functional.smooth_l1_loss: nn.SmoothL1Loss,
    functional.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
}
SUPPORTED = (
    "CrossEntropyLoss, BCEWithLogitsLoss, MSELoss, L1Loss, HuberLoss, SmoothL1Loss(beta=1) and PoissonNLLLoss, or "
    "their functions with default options"
)
INSTEAD = {
    "NLLLoss": "use CrossEntropyLoss on logits, without LogSoftmax in the module",
    "BCELoss": "use BCEWithLogitsLoss on logits, without Sigmoid in the module",
    "MultiLabelSoftMarginLoss": "use BCEWithLogitsLoss",
}


def read_loss(loss_fn: Any) -> Loss:
    """Return the loss that ``loss_fn`` computes of (output, target); raises ArgumentError if it cannot be fused."""
    if not isinstance(loss_fn, nn.Module):
        try:
            made = FUNCTIONS.get(loss_fn)
        except TypeError:
            made = None
        if made is None:
            raise ArgumentTypeError(f"loss_fn: {loss_fn!r} cannot be fused; expected one of {SUPPORTED}")
        return read_loss(made())
    kind = type(loss_fn)
    options: Any = loss_fn
    reduction = getattr(loss_fn, "reduction", "mean")
    if kind in KNOWN and reduction not in ("mean", "sum"):
        raise ArgumentError(
            f"loss_fn: {kind.__name__}(reduction={reduction!r}) has no single loss to go down; use 'mean' or 'sum'"
        )
    if kind is nn.CrossEntropyLoss:
        weight = options.weight
        return CrossEntropy(
            label_smoothing=options.label_smoothing,
            class_weight=None if weight is None else weight.detach().cpu().double().tolist(),
            ignore_index=options.ignore_index,
            reduction=reduction,
        )
    if kind is nn.BCEWithLogitsLoss:
        for name in ("weight", "pos_weight"):
            if getattr(loss_fn, name) is not None:
                raise ArgumentError(f"loss_fn: BCEWithLogitsLoss({name}=...) cannot be fused; leave {name} out")
        return BinaryCrossEntropy(reduction=reduction)
    if kind is nn.MSELoss:
        return MSE(reduction=reduction)
    if kind is nn.L1Loss:
        return MAE(reduction=reduction)
    if kind is nn.HuberLoss:
        return Huber(delta=options.delta, reduction=reduction)
    if kind is nn.SmoothL1Loss:
        if options.beta != 1.0:
            raise ArgumentError(
                f"loss_fn: SmoothL1Loss(beta={options.beta}) cannot be fused; use HuberLoss(delta=beta), which is beta "
                "times as large"
            )
        return Huber(delta=1.0, reduction=reduction)
    if kind is nn.PoissonNLLLoss:
        if not options.log_input or options.full:
            raise ArgumentError("loss_fn: PoissonNLLLoss can be fused with log_input=True and full=False only")
        return Poisson(reduction=reduction)
    advice = INSTEAD.get(kind.__name__)
    raise ArgumentError(
        f"loss_fn: {kind.__name__} cannot be fused; {advice + '; ' if advice else ''}expected one of {SUPPORTED}"
    )


KNOWN = frozenset(
    {
        nn.CrossEntropyLoss,
        nn.BCEWithLogitsLoss,
        nn.MSELoss,
        nn.L1Loss,
        nn.HuberLoss,
        nn.SmoothL1Loss,
        nn.PoissonNLLLoss,
    }
)


def watched(loss_fn: Any) -> list[tuple[Any, str, Any]]:
    """Return triples (mapping, key, value); while every mapping holds its value, the loss has not changed."""
    if not isinstance(loss_fn, nn.Module):
        return []
    names = ("reduction", "label_smoothing", "ignore_index", "delta", "beta", "log_input", "full")
    entries: list[tuple[Any, str, Any]] = [
        (loss_fn.__dict__, name, loss_fn.__dict__[name]) for name in names if name in loss_fn.__dict__
    ]
    return [*entries, *((loss_fn._buffers, name, buffer) for name, buffer in loss_fn._buffers.items())]


def class_weight(loss_fn: Any) -> Tensor | None:
    """Return the tensor of class weights; its version reveals changes in place."""
    found = getattr(loss_fn, "weight", None) if isinstance(loss_fn, nn.CrossEntropyLoss) else None
    return found if isinstance(found, Tensor) else None
