"""Read a torch optimizer: the update rule of each parameter group, and the names of its moments."""

from __future__ import annotations

from operator import itemgetter
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop

from fusemlp.describe.checks import as_number
from fusemlp_kernels.contract import UpdateRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

REFUSED = ("dampening", "amsgrad", "maximize", "differentiable", "capturable")
# Why the kernels lack an option.
REASONS = {
    "amsgrad": " (it keeps a third moment, the kernels' updates keep two)",
    "centered": " (it keeps the mean gradient too)",
    "momentum": " (its velocity comes after the division by the root)",
}
# The options of a group's rule, by kind; "lr" is read separately, because schedulers change it often.
OPTIONS = {
    "sgd": itemgetter("momentum", "weight_decay", "nesterov", "dampening", "maximize", "differentiable"),
    "adam": itemgetter("betas", "eps", "weight_decay", "decoupled_weight_decay", *REFUSED[1:]),
    "rmsprop": itemgetter("alpha", "eps", "weight_decay", "momentum", "centered", *REFUSED[2:]),
}
# torch's names of the state arenas; None is one that torch's optimizer lacks. RMSprop is Adam with a first beta of 0
# and bias corrections of 1.
MOMENTS: dict[str, tuple[str | None, ...]] = {
    "sgd": ("momentum_buffer",),
    "adam": ("exp_avg", "exp_avg_sq"),
    "rmsprop": (None, "square_avg"),
}
KINDS = {SGD: "sgd", Adam: "adam", AdamW: "adam", RMSprop: "rmsprop"}
# The rule of a parameter group without its learning rate, and the weight decay.
GroupRule = tuple[UpdateRule, float]


def optimizer_kind(optimizer: Any) -> str:
    """Return the key in ``OPTIONS``; raises ArgumentTypeError for other optimizers."""
    kind = type(optimizer)
    if kind not in KINDS:
        given = f"{kind.__name__} cannot be fused" if isinstance(optimizer, Optimizer) else f"got {optimizer!r}"
        raise ArgumentTypeError(
            f"optimizer: {given}; expected torch.optim.SGD, Adam, AdamW or RMSprop (no subclass). With another "
            "optimizer use FusedMLP in an eager loop"
        )
    return KINDS[kind]


def read_rate(value: Any, index: int) -> float:
    """Return a group's learning rate, a number or a tensor of one."""
    return as_number(f"optimizer.param_groups[{index}]['lr']", float(value), low=0.0)


def read_group(kind: str, group: dict[str, Any], index: int) -> GroupRule:
    """Return the rule of a parameter group; raises ArgumentError with the group and option that cannot be fused."""
    where = f"optimizer.param_groups[{index}]"
    refused = (*REFUSED, "momentum", "centered") if kind == "rmsprop" else REFUSED
    for name in refused:
        if value := group.get(name):
            reason = REASONS.get(name, "")
            raise ArgumentError(f"{where}: {name}={value} cannot be fused{reason}; set it to {type(value)()}")

    def number(name: str) -> float:
        return as_number(f"{where}[{name!r}]", group[name], low=0.0)

    if kind == "sgd":
        rule = UpdateRule("sgd", momentum=number("momentum"), nesterov=bool(group["nesterov"]))
        if rule.nesterov and not rule.momentum:
            raise ArgumentError(f"{where}: nesterov needs a momentum above 0, got {group['momentum']}")
    elif kind == "rmsprop":
        alpha = as_number(f"{where}['alpha']", group["alpha"], low=0.0, high=1.0, high_open=True)
        rule = UpdateRule("adam", beta1=0.0, beta2=alpha, eps=number("eps"))
    else:
        beta1, beta2 = (as_number(f"{where}['betas']", b, low=0.0, high=1.0, high_open=True) for b in group["betas"])
        decoupled = bool(group["decoupled_weight_decay"])
        rule = UpdateRule("adam", beta1=beta1, beta2=beta2, eps=number("eps"), decoupled=decoupled)
    return rule, number("weight_decay")


def groups_of(optimizer: Optimizer, module: nn.Module) -> dict[Tensor, int]:
    """Return the group of each parameter; raises ArgumentError for one that is not the module's."""
    known = set(module.parameters())
    found: dict[Tensor, int] = {}
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if parameter not in known:
                raise ArgumentError(
                    f"optimizer.param_groups[{index}]['params'][{position}], of shape {tuple(parameter.shape)}, is no "
                    "parameter of the module; make the optimizer from module.parameters()"
                )
            found[parameter] = index
    return found
