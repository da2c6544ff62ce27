"""Detect a change of the fused module, its loss or its optimizer, in about two microseconds."""

from __future__ import annotations

from itertools import chain
from operator import is_
from typing import Any

from torch import nn
from torch.nn.modules import module as modules
from torch.optim import Optimizer
from torch.optim import optimizer as optimizers

from fusemlp.torch.modules import LIMITS, hooks_of

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
        for one in inside:
            # A traced forward may depend on its module's attributes.
            if one in losses or type(one) in LIMITS or not type(one).__module__.startswith("torch."):
                options += [(vars(one), name) for name in vars(one) if not name.startswith("_")]
        self._owners, self._names = zip(*options, strict=True)
        held = [mapping for one in inside for mapping in (one._modules, one._parameters, one._buffers) if mapping]
        self._held = [one.values() for one in (optimizer.state, *optimizer.state.values(), *held)]
        self._objects = [*chain.from_iterable(self._held), *map(dict.get, self._owners, self._names), *END]
        of_modules = map(hooks_of, module.modules())
        self._hooks = [*chain(*of_modules, *other_hooks(loss_fn, optimizer).values())]
        self._parameters = [(one, one.data_ptr(), one.requires_grad) for one in module.parameters()]
        self._weights = [(buffer, buffer._version) for one in losses for buffer in one.buffers()]
        lists = (optimizer.param_groups, *(group["params"] for group in optimizer.param_groups))
        self._lists = [(one, len(one)) for one in lists]

    def unchanged(self) -> bool:
        """Return whether nothing has changed."""
        for parameter, pointer, trains in self._parameters:
            if parameter.data_ptr() != pointer or parameter.requires_grad is not trains:
                return False
            # None until the first hook
            if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                return False
        for one, length in self._lists:
            if len(one) != length:
                return False
        for buffer, version in self._weights:
            if buffer._version != version:
                return False
        objects = chain(chain.from_iterable(self._held), map(dict.get, self._owners, self._names), END)
        return all(map(is_, objects, self._objects)) and not any(self._hooks)
