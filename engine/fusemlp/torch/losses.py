"""Read a torch loss."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from fusemlp.describe.losses import MAE, MSE, BinaryCrossEntropy, CrossEntropy, Huber, Loss, Poisson
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, ShapeError

# Each loss of torch, its function, and the loss here, whose options have the same names.
_TABLE: tuple[tuple[type[nn.Module], Any, type[Loss]], ...] = (
    (nn.CrossEntropyLoss, functional.cross_entropy, CrossEntropy),
    (nn.NLLLoss, functional.nll_loss, CrossEntropy),
    (nn.BCEWithLogitsLoss, functional.binary_cross_entropy_with_logits, BinaryCrossEntropy),
    (nn.MSELoss, functional.mse_loss, MSE),
    (nn.L1Loss, functional.l1_loss, MAE),
    (nn.HuberLoss, functional.huber_loss, Huber),
    (nn.SmoothL1Loss, functional.smooth_l1_loss, Huber),
    (nn.PoissonNLLLoss, functional.poisson_nll_loss, Poisson),
)
LOSSES = {kind: described for kind, _, described in _TABLE}
FUNCTIONS = {function: kind for kind, function, _ in _TABLE}
# Options that the kernels lack: the loss, the option, its only value, and advice.
FIXED: tuple[tuple[type[nn.Module], str, Any, str], ...] = (
    (nn.BCEWithLogitsLoss, "weight", None, "leave weight out"),
    (nn.SmoothL1Loss, "beta", 1.0, "use HuberLoss(delta=beta), which is beta times as large"),
    (nn.PoissonNLLLoss, "log_input", True, "use log_input=True"),
    (nn.PoissonNLLLoss, "full", False, "use full=False"),
)
INSTEAD = {
    "BCELoss": "use BCEWithLogitsLoss on logits, without Sigmoid in the module; ",
    "MultiLabelSoftMarginLoss": "use BCEWithLogitsLoss; ",
}


def read_loss(loss_fn: Any, *, log_softmax: bool = False) -> Loss:
    """Return the loss that ``loss_fn`` computes of (output, target); raises ArgumentError if it cannot be fused.

    ``log_softmax``: the module ends with LogSoftmax, which NLLLoss needs and no other loss takes.
    """
    supported = f"{', '.join(kind.__name__ for kind in LOSSES)}, or their functions with default options"
    if not isinstance(loss_fn, nn.Module):
        try:
            loss_fn = FUNCTIONS[loss_fn]()
        except (KeyError, TypeError):
            raise ArgumentTypeError(f"loss_fn: {loss_fn!r} cannot be fused; expected one of {supported}") from None
    kind, options = type(loss_fn), vars(loss_fn)
    name, described = kind.__name__, LOSSES.get(kind)
    if described is None:
        raise ArgumentError(f"loss_fn: {name} cannot be fused; {INSTEAD.get(name, '')}expected one of {supported}")
    if options["reduction"] not in ("mean", "sum"):
        raise ArgumentError(
            f"loss_fn: {name}(reduction={options['reduction']!r}) has no single loss to go down; use 'mean' or 'sum'"
        )
    for owner, option, only, advice in FIXED:
        value = getattr(loss_fn, option) if owner is kind else only
        if value is not only and value != only:
            raise ArgumentError(f"loss_fn: {name}({option}={value!r}) cannot be fused; {advice}")
    if log_softmax != (kind is nn.NLLLoss):
        raise ArgumentError(
            f"loss_fn: {name} takes the module's output as it is, and the module ends with LogSoftmax; use NLLLoss, or "
            "leave LogSoftmax out and use CrossEntropyLoss"
            if log_softmax
            else "loss_fn: NLLLoss takes log-probabilities, and the module does not end with LogSoftmax; add "
            "nn.LogSoftmax(dim=1), or use CrossEntropyLoss, which takes logits"
        )
    found = {field.name: options[field.name] for field in fields(described) if field.name in options}
    if described is CrossEntropy and loss_fn.weight is not None:
        found["class_weight"] = loss_fn.weight.detach().cpu().double().tolist()
    return described(**found)


def read_pos_weight(loss_fn: Any, outputs: int) -> tuple[float, ...] | None:
    """Return the ``pos_weight`` of a BCEWithLogitsLoss, one number for each output; None for other losses.

    Raises ShapeError unless it has one number, or one for each output.
    """
    given: Tensor | None = loss_fn.pos_weight if type(loss_fn) is nn.BCEWithLogitsLoss else None
    if given is None:
        return None
    count = given.numel()
    if count not in (1, outputs) or given.shape[-1:] not in ((), (count,)):
        raise ShapeError(
            f"loss_fn: pos_weight has shape {tuple(given.shape)}, expected one number or ({outputs},), one for each "
            "output"
        )
    values = given.detach().cpu().double().flatten().tolist()
    return tuple(values * (outputs // count))
