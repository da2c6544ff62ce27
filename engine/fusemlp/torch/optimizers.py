"""Read a torch optimizer: the update rule of each parameter group, and the names of its moments."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fusemlp_kernels.contract import UpdateRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

# The options of a group's rule; "lr" is read separately, because schedulers change it often.
OPTIONS = {
    "sgd": ("momentum", "weight_decay", "nesterov", "dampening", "maximize", "differentiable"),
    "adam": (
        "betas",
        "eps",
        "weight_decay",
        "decoupled_weight_decay",
        "amsgrad",
        "maximize",
        "differentiable",
        "capturable",
    ),
}
VALUES = {kind: itemgetter(*names) for kind, names in OPTIONS.items()}
# torch's names of the state arenas.
MOMENTS = {"sgd": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq")}


@dataclass(frozen=True)
class GroupRule:
    """The rule of a parameter group without its learning rate."""

    rule: UpdateRule
    weight_decay: float


def optimizer_kind(optimizer: Any) -> str:
    """Return "sgd" or "adam"; raises ArgumentTypeError for other optimizers and ArgumentError for hooks."""
    kind = type(optimizer)
    if kind is SGD:
        found = "sgd"
    elif kind in (Adam, AdamW):
        found = "adam"
    elif isinstance(optimizer, Optimizer):
        raise ArgumentTypeError(
            f"optimizer: {kind.__name__} cannot be fused; expected torch.optim.SGD, Adam or AdamW (no subclass). With "
            "another optimizer use FusedMLP in an eager loop"
        )
    else:
        raise ArgumentTypeError(f"optimizer: expected torch.optim.SGD, Adam or AdamW, got {optimizer!r}")
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise ArgumentError("optimizer: has step hooks, which a fused step would not run; remove them")
    return found


def group_values(kind: str, group: dict[str, Any]) -> tuple[Any, ...]:
    """Return the options of a group's rule, for the comparison with the previous step."""
    values: tuple[Any, ...] = VALUES[kind](group)
    return values


def read_rate(value: Any, index: int) -> float:
    """Return a group's learning rate."""
    rate = float(value)
    if not (rate >= 0.0 and math.isfinite(rate)):
        raise ArgumentError(f"optimizer.param_groups[{index}]['lr']: expected a finite number >= 0, got {value!r}")
    return rate


def read_group(kind: str, group: dict[str, Any], index: int) -> GroupRule:
    """Return the rule of a parameter group; raises ArgumentError with the group and option that cannot be fused."""
    options = dict(zip(OPTIONS[kind], group_values(kind, group), strict=True))
    where = f"optimizer.param_groups[{index}]"
    for name in ("amsgrad", "maximize", "differentiable", "capturable"):
        if options.get(name):
            raise ArgumentError(f"{where}: {name}=True cannot be fused; set it to False")
    numbers = {
        name: value for name, value in options.items() if name in ("momentum", "weight_decay", "dampening", "eps")
    }
    for name, value in numbers.items():
        if isinstance(value, Tensor) or not (math.isfinite(value) and value >= 0.0):
            raise ArgumentError(f"{where}[{name!r}]: expected a finite number >= 0, got {value!r}")
    if kind == "sgd":
        if options["dampening"]:
            raise ArgumentError(f"{where}: dampening={options['dampening']} cannot be fused; set it to 0")
        momentum, nesterov = float(options["momentum"]), bool(options["nesterov"])
        if nesterov and not momentum:
            raise ArgumentError(f"{where}: nesterov needs a momentum above 0, got {options['momentum']}")
        return GroupRule(UpdateRule("sgd", momentum=momentum, nesterov=nesterov), float(options["weight_decay"]))
    betas = options["betas"]
    if any(isinstance(beta, Tensor) or not 0.0 <= beta < 1.0 for beta in betas):
        raise ArgumentError(f"{where}['betas']: expected two numbers in [0, 1), got {betas!r}")
    rule = UpdateRule(
        "adam",
        beta1=float(betas[0]),
        beta2=float(betas[1]),
        eps=float(options["eps"]),
        decoupled=bool(options["decoupled_weight_decay"]),
    )
    return GroupRule(rule, float(options["weight_decay"]))


def group_of_parameter(optimizer: Optimizer) -> dict[int, int]:
    """Return the group of each parameter, by the parameter's id."""
    return {id(parameter): index for index, group in enumerate(optimizer.param_groups) for parameter in group["params"]}


def check_parameters(optimizer: Optimizer, known: set[int]) -> None:
    """Refuse a parameter that is not among the module's (``known``, ids); raises ArgumentError."""
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in known:
                raise ArgumentError(
                    f"optimizer.param_groups[{index}]['params'][{position}], of shape {tuple(parameter.shape)}, is no "
                    "parameter of the module; make the optimizer from module.parameters()"
                )
