"""The torch loop that a fused step stands in: its loss and its optimizer, and what changes or is called in it.

Changes of the module, its loss or its optimizer are noticed before a step, in about two microseconds.
"""

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from itertools import chain
from operator import is_, itemgetter
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as modules
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim import optimizer as optimizers
from torch.utils.weak import WeakIdKeyDictionary

from fusemlp.describe.checks import as_number, function_name
from fusemlp.describe.losses import MAE, MSE, BinaryCrossEntropy, CrossEntropy, Huber, Loss, OwnLoss, Poisson
from fusemlp.torch.modules import LIMITS, Reading, hooks_of
from fusemlp_kernels.contract import UpdateRule
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
# Options that the kernels lack: the loss, the option and its only value.
FIXED: tuple[tuple[type[nn.Module], str, Any], ...] = (
    (nn.BCEWithLogitsLoss, "weight", None),
    (nn.SmoothL1Loss, "beta", 1.0),
    (nn.PoissonNLLLoss, "log_input", True),
    (nn.PoissonNLLLoss, "full", False),
)


@dataclass(frozen=True)
class PositiveWeights(BinaryCrossEntropy):
    """BCEWithLogitsLoss with ``pos_weight``, one number or one for each output; torch computes it."""

    pos_weight: tuple[float, ...] = ()


def read_loss(loss_fn: Any, reading: Reading) -> Loss:
    """Return the loss that ``loss_fn`` computes of the output of a module and of targets.

    One of the kernels', PositiveWeights, or the OwnLoss that calls ``loss_fn``. Raises ArgumentTypeError or
    ArgumentError for what is no loss, ShapeError for a ``pos_weight`` of another width than the output.
    """
    name = function_name(loss_fn)
    callable_loss = OwnLoss(name=name, function=loss_fn)
    if not isinstance(loss_fn, nn.Module):
        if isinstance(loss_fn, type) or not callable(loss_fn):
            mend = f"{name}()" if isinstance(loss_fn, type) else "nn.MSELoss(), or a function (output, target) -> loss"
            raise ArgumentTypeError(f"loss_fn: {loss_fn!r} is no loss; use {mend}")
        if not isinstance(loss_fn, FunctionType) or loss_fn not in FUNCTIONS:
            return callable_loss
        loss_fn = FUNCTIONS[loss_fn]()
    kind, options = type(loss_fn), vars(loss_fn)
    described = LOSSES.get(kind)
    if described is None:
        return callable_loss
    if options["reduction"] not in ("mean", "sum"):
        raise ArgumentError(
            f"loss_fn: {name}(reduction={options['reduction']!r}) has no single loss to go down; use 'mean' or 'sum'"
        )
    if described is CrossEntropy and reading.log_softmax != (kind is nn.NLLLoss):
        raise ArgumentError(
            f"loss_fn: {name} takes the module's output as it is, and the module ends with LogSoftmax; use NLLLoss, or "
            "leave LogSoftmax out and use CrossEntropyLoss"
            if reading.log_softmax
            else "loss_fn: NLLLoss takes log-probabilities, and the module does not end with LogSoftmax; add "
            "nn.LogSoftmax(dim=1), or use CrossEntropyLoss, which takes logits"
        )
    lacking = any(getattr(loss_fn, option) not in (only,) for owner, option, only in FIXED if owner is kind)
    if lacking or (reading.log_softmax and kind is not nn.NLLLoss):
        return callable_loss
    settings = {field.name: options[field.name] for field in fields(described) if field.name in options}
    if described is CrossEntropy and loss_fn.weight is not None:
        settings["class_weight"] = loss_fn.weight.detach().cpu().double().tolist()
    # a buffer, or a parameter in its place
    weight: Tensor | None = getattr(loss_fn, "pos_weight", None)
    if weight is None:
        return described(**settings)
    count, outputs = weight.numel(), reading.network.sizes[-1]
    if count not in (1, outputs) or weight.shape[-1:] not in ((), (count,)):
        raise ShapeError(
            f"loss_fn: pos_weight has shape {tuple(weight.shape)}, expected one number or ({outputs},), one for each "
            "output"
        )
    return PositiveWeights(**settings, pos_weight=tuple(weight.detach().cpu().double().flatten().tolist()))


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


class Group(NamedTuple):
    """The update of a parameter group: its rule, weight decay and learning rate."""

    rule: UpdateRule
    weight_decay: float
    rate: float


def form(groups: list[Group], *, of_numbers: bool) -> list[Any]:
    """Return what sets apart the updates of groups: equal rules and rates, and all but the numbers of a rule, or
    those too."""
    keys = [group[::2] for group in groups]
    return [(keys.index((r, rate)), r if of_numbers else r.name, r.decoupled, decay) for r, decay, rate in groups]


def cycled(rule: UpdateRule, value: Any) -> UpdateRule | None:
    """Return the rule with another momentum or betas, as schedulers cycle them; None where ``read_group`` must look."""
    if rule.momentum and value.__class__ is float and 0.0 < value < 1.0:
        return rule.renumbered(momentum=value)
    pair = value.__class__ is tuple and rule.kind == "adam" and [*map(type, value)] == [float, float]
    if pair and min(value) > 0.0 and max(value) < 1.0:
        return rule.renumbered(beta1=value[0], beta2=value[1])
    return None


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


def read_group(kind: str, group: dict[str, Any], index: int) -> Group:
    """Read a parameter group; raises ArgumentError with the group and option that cannot be fused."""
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
    return Group(rule, number("weight_decay"), read_rate(group["lr"], index))


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


# Closes the sequence of watched objects, so that a longer one differs.
END = (object(),)


def other_hooks(loss_fn: Any, optimizer: Optimizer) -> dict[str, tuple[Any, ...]]:
    """Return the containers of the hooks outside the module that a fused step would not run, by owner."""
    kinds = "forward", "forward_pre", "backward", "backward_pre"
    of_all = tuple(getattr(modules, f"_global_{kind}_hooks") for kind in kinds)
    of_optimizers = optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks
    return {
        f"loss_fn: {type(loss_fn).__name__} has hooks": hooks_of(loss_fn) if type(loss_fn) in LOSSES else (),
        "optimizer: has step hooks": (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks),
        "module: torch.nn.modules.module has hooks for all modules": of_all,
        "optimizer: torch.optim.optimizer has step hooks for all optimizers": of_optimizers,
    }


class Watch:
    """Remembers everything that a fused step depends on, except the options of the parameter groups."""

    def __init__(self, module: nn.Module, loss_fn: Any, optimizer: Optimizer) -> None:
        # torch calls any other
        losses = [loss_fn] if type(loss_fn) in LOSSES else []
        inside = [*module.modules(), *losses]
        options = [(vars(optimizer), name) for name in ("param_groups", "state")]
        for inner in inside:
            # A traced forward may depend on its module's attributes.
            if inner in losses or type(inner) in LIMITS or not type(inner).__module__.startswith("torch."):
                options += [(vars(inner), name) for name in vars(inner) if not name.startswith("_")]
        self._owners, self._names = zip(*options, strict=True)
        held = [
            mapping for inner in inside for mapping in (inner._modules, inner._parameters, inner._buffers) if mapping
        ]
        self._held = [mapping.values() for mapping in (optimizer.state, *optimizer.state.values(), *held)]
        self._objects = [*chain.from_iterable(self._held), *map(dict.get, self._owners, self._names), *END]
        of_modules = map(hooks_of, module.modules())
        self._hooks = [*chain(*of_modules, *other_hooks(loss_fn, optimizer).values())]
        self._parameters = [
            (parameter, parameter.data_ptr(), parameter.requires_grad) for parameter in module.parameters()
        ]
        weights = [weight for loss in losses for weight in (*loss.buffers(), *loss.parameters())]
        self._weights = [(weight, weight._version) for weight in weights]
        lists = (optimizer.param_groups, *(group["params"] for group in optimizer.param_groups))
        self._lists = [(entries, len(entries)) for entries in lists]

    def unchanged(self) -> bool:
        """Return whether nothing has changed."""
        for parameter, pointer, trains in self._parameters:
            if parameter.data_ptr() != pointer or parameter.requires_grad is not trains:
                return False
            # None until the first hook
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return False
        for entries, length in self._lists:
            if len(entries) != length:
                return False
        for weight, version in self._weights:
            if weight._version != version:
                return False
        objects = chain(chain.from_iterable(self._held), map(dict.get, self._owners, self._names), END)
        return all(map(is_, objects, self._objects)) and not any(self._hooks)


# The step of each parameter that one updates.
_FUSED: Any = WeakIdKeyDictionary()
_CLIPPERS = {"clip_grad_norm_": "clip_grad_norm", "clip_grad_value_": None}


def watch_clipping(step: object, parameters: Iterable[Tensor]) -> None:
    """From now on torch's functions that clip gradients report these parameters where they have none."""
    reference = weakref.ref(step)
    for parameter in parameters:
        _FUSED[parameter] = reference
    _watch_torch()


@functools.cache
def _watch_torch() -> None:
    """Put a check into torch's clipping functions: also where user code has imported them by name."""
    for name, option in _CLIPPERS.items():
        function: Any = getattr(torch.nn.utils, name)
        free = function.__code__.co_freevars
        if "func" in free:
            # torch's wrapper without gradients, around the function ``func``
            cell = function.__closure__[free.index("func")]
            cell.cell_contents = _checked(cell.cell_contents, name, option)
        else:
            setattr(torch.nn.utils, name, _checked(function, name, option))


def _checked(function: Callable[..., Any], name: str, option: str | None) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(parameters: Any, *args: Any, **options: Any) -> Any:
        if not torch.compiler.is_compiling():
            parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
            _check_gradients(parameters, name, option)
        return function(parameters, *args, **options)

    return run


def _check_gradients(parameters: list[Any], name: str, option: str | None) -> None:
    """Raise ArgumentError if no parameter has a gradient and a fused step has used them; warn if some have one."""
    missing = [one for one in parameters if one.grad is None and one.requires_grad and one in _FUSED and _FUSED[one]()]
    if not missing:
        return
    mend = f"pass {option}=max_norm to fuse" if option else "use fuse's clip_grad_norm, or FusedMLP in an eager loop"
    words = f"{name}: {len(missing)} parameters have no gradient, since a fused step updates them and stores none"
    if all(one.grad is None for one in parameters):
        raise ArgumentError(f"{words}; {mend}")
    warnings.warn(f"{words}, and only the others are clipped; {mend}", stacklevel=5)


def warn_of_autocast(dtype: torch.dtype) -> None:
    """Warn that autocast does not reach a fused step."""
    other = "; fuse(precision='tf32') uses a GPU's tensor cores" if dtype == torch.float32 else ""
    warnings.warn(
        f"autocast has no effect on a fused step, which computes in {dtype}, the module's type; call the step outside "
        f"autocast{other}",
        stacklevel=3,
    )
