"""Notice before a fused step: changes of the module, its loss or its optimizer, in about two microseconds, and
calls of PyTorch that do nothing beside it."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Iterable
from itertools import chain
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from torch.optim import Optimizer
from torch.optim import optimizer as optimizers
from torch.utils.weak import WeakIdKeyDictionary

from fusemlp.torch.modules import LIMITS, hooks_of
from fusemlp_kernels.errors import ArgumentError

# Closes the sequence of watched objects, so that a longer one differs.
END = (object(),)


def other_hooks(loss_fn: Any, optimizer: Optimizer) -> dict[str, tuple[Any, ...]]:
    """Return the containers of the hooks outside the module that a fused step would not run, by owner."""
    kinds = "forward", "forward_pre", "backward", "backward_pre"
    of_all = tuple(getattr(modules, f"_global_{kind}_hooks") for kind in kinds)
    of_optimizers = optimizers._global_optimizer_pre_hooks, optimizers._global_optimizer_post_hooks
    return {
        f"loss_fn: {type(loss_fn).__name__} has hooks": hooks_of(loss_fn) if isinstance(loss_fn, nn.Module) else (),
        "optimizer: has step hooks": (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks),
        "module: torch.nn.modules.module has hooks for all modules": of_all,
        "optimizer: torch.optim.optimizer has step hooks for all optimizers": of_optimizers,
    }


class Watch:
    """Remembers everything that a fused step depends on, except the options of the parameter groups."""

    def __init__(self, module: nn.Module, loss_fn: Any, optimizer: Optimizer) -> None:
        losses = [loss_fn] if isinstance(loss_fn, nn.Module) else []
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
        self._weights = [(buffer, buffer._version) for loss in losses for buffer in loss.buffers()]
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
        for buffer, version in self._weights:
            if buffer._version != version:
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
    missing = [one for one in parameters if one.grad is None and one.requires_grad and _is_fused(one)]
    if not missing:
        return
    mend = f"pass {option}=max_norm to fuse" if option else "use fuse's clip_grad_norm, or FusedMLP in an eager loop"
    words = f"{name}: {len(missing)} parameters have no gradient, since a fused step updates them and stores none"
    if all(one.grad is None for one in parameters):
        raise ArgumentError(f"{words}; {mend}")
    warnings.warn(f"{words}, and only the others are clipped; {mend}", stacklevel=5)


def _is_fused(parameter: Tensor) -> bool:
    return (reference := _FUSED.get(parameter)) is not None and reference() is not None


def warn_of_autocast(dtype: torch.dtype) -> None:
    """Warn that autocast does not reach a fused step."""
    other = "; fuse(precision='tf32') uses a GPU's tensor cores" if dtype == torch.float32 else ""
    warnings.warn(
        f"autocast has no effect on a fused step, which computes in {dtype}, the module's type; call the step outside "
        f"autocast{other}",
        stacklevel=3,
    )
