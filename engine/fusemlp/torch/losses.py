"""Read a torch loss."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn
from torch.nn import functional

from fusemlp.describe.losses import MAE, MSE, BinaryCrossEntropy, CrossEntropy, Huber, Loss, Poisson
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

# Each loss of torch, its function, and the loss here, whose options have the same names.
_TABLE: tuple[tuple[type[nn.Module], Any, type[Loss]], ...] = (
    (nn.CrossEntropyLoss, functional.cross_entropy, CrossEntropy),
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
    (nn.BCEWithLogitsLoss, "pos_weight", None, "leave pos_weight out"),
    (nn.SmoothL1Loss, "beta", 1.0, "use HuberLoss(delta=beta), which is beta times as large"),
    (nn.PoissonNLLLoss, "log_input", True, "use log_input=True"),
    (nn.PoissonNLLLoss, "full", False, "use full=False"),
)
INSTEAD = {
    "NLLLoss": "use CrossEntropyLoss on logits, without LogSoftmax in the module; ",
    "BCELoss": "use BCEWithLogitsLoss on logits, without Sigmoid in the module; ",
    "MultiLabelSoftMarginLoss": "use BCEWithLogitsLoss; ",
}


def read_loss(loss_fn: Any) -> Loss:
    """Return the loss that ``loss_fn`` computes of (output, target); raises ArgumentError if it cannot be fused."""
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
    found = {field.name: options[field.name] for field in fields(described) if field.name in options}
    if kind is nn.CrossEntropyLoss and loss_fn.weight is not None:
        found["class_weight"] = loss_fn.weight.detach().cpu().double().tolist()
    return described(**found)
