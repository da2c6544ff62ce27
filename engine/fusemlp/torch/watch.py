"""Detect a change of the fused module, its loss or its optimizer, in about a microsecond."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from torch.optim import Optimizer

from fusemlp.torch import losses, modules
from fusemlp.torch.arena import Tie


class Watch:
    """Remembers everything that a fused step depends on, except the options of the parameter groups."""

    def __init__(
        self, module: nn.Module, loss_fn: Any, optimizer: Optimizer, tie: Tie, trained: Collection[str]
    ) -> None:
        self._values = [*modules.watched(module), *losses.watched(loss_fn), *tie.watched_state(trained)]
        self._containers = modules.containers(module)
        self._parameters = [(parameter, pointer, parameter.requires_grad) for parameter, pointer in tie.pointers]
        self._weight = losses.class_weight(loss_fn)
        self._weight_version = None if self._weight is None else self._weight._version
        self._optimizer = optimizer
        self._groups = optimizer.param_groups
        self._lengths = [(group["params"], len(group["params"])) for group in self._groups]
        self._state = optimizer.state

    def unchanged(self) -> bool:
        """Return whether nothing has changed."""
        for mapping, key, value in self._values:
            if mapping.get(key) is not value:
                return False
        for children, count in self._containers:
            if len(children) != count:
                return False
        for parameter, pointer, trains in self._parameters:
            if parameter.data_ptr() != pointer or parameter.requires_grad is not trains:
                return False
        optimizer, groups = self._optimizer, self._groups
        if optimizer.param_groups is not groups or optimizer.state is not self._state:
            return False
        if len(groups) != len(self._lengths):
            return False
        for parameters, count in self._lengths:
            if len(parameters) != count:
                return False
        return self._weight is None or self._weight._version == self._weight_version
