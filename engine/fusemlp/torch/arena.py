"""Tie a module and its optimizer to an engine's arenas: the torch tensors become views of them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fusemlp.runtime.memory import Memory
from fusemlp.torch.modules import Reading, Slot
from fusemlp.torch.optimizers import MOMENTS
from fusemlp_kernels.errors import ArgumentError, ShapeError


def as_tensor(array: Any) -> Tensor:
    """Return a backend's array as a tensor over the same memory."""
    return array if isinstance(array, Tensor) else torch.from_numpy(array)


class Tie:
    """The parameters of a module and the moments of its optimizer, as views of ``memory``.

    ``parameters`` and ``slots`` are by the program's short names. The optimizer never gets moments of frozen or absent
    tensors.
    """

    def __init__(self, reading: Reading, optimizer: Optimizer, kind: str, memory: Memory) -> None:
        self.optimizer = optimizer
        self.kind = kind
        self.slots: dict[str, Slot] = reading.slots
        self.parameters: dict[str, nn.Parameter] = {short: slot.parameter for short, slot in reading.slots.items()}
        self.views = {short: as_tensor(memory.arrays[short]) for short in self.slots}
        self.moments = {
            short: tuple(as_tensor(memory.arrays[f"{short}.state{i}"]) for i in range(len(memory.states)))
            for short in self.slots
        }
        self.has_state = bool(memory.states)
        double = torch.get_default_dtype() == torch.float64
        # Adam's count of updates in torch's own type, one element a parameter.
        self.steps = np.zeros(len(self.slots), np.float64 if double else np.float32)
        self._step_views = {
            short: torch.from_numpy(self.steps[index : index + 1])[0] for index, short in enumerate(self.slots)
        }
        self.position = {short: index for index, short in enumerate(self.slots)}

    def move_parameters(self) -> None:
        """Copy the parameters into the arena and make them views of it."""
        for short, parameter in self.parameters.items():
            view = self.views[short]
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = None
        self.pointers = [(parameter, parameter.data_ptr()) for parameter in self.parameters.values()]

    def holds(self) -> bool:
        """Return whether every parameter is still the view from ``move_parameters``."""
        return all(parameter.data_ptr() == pointer for parameter, pointer in self.pointers)

    def check_parameters(self, reading: Reading) -> None:
        """Raise ArgumentError, with the parameter's name, unless all are the fused ones in their place in the arena."""
        for short, slot in reading.slots.items():
            if short not in self.parameters or slot.parameter is not self.parameters[short]:
                raise ArgumentError(f"module: {slot.path} is not the parameter that was fused; call fuse again")
        if len(reading.slots) != len(self.slots):
            raise ArgumentError("module: has lost parameters since it was fused; call fuse again")
        for (parameter, pointer), slot in zip(self.pointers, self.slots.values(), strict=True):
            if parameter.data_ptr() != pointer:
                raise ArgumentError(
                    f"module: the memory of {slot.path} was replaced after fuse (module.to(...), param.data = ..., or "
                    "another fuse); call fuse again, or copy values in place with param.data.copy_(...)"
                )

    def check_state(self, shorts: Collection[str]) -> None:
        """Raise ShapeError for a moment in ``optimizer.state`` with a wrong shape."""
        for short in shorts:
            state = self.optimizer.state.get(self.parameters[short], {})
            for name, view in zip(MOMENTS[self.kind], self.moments[short], strict=False):
                found = state.get(name)
                if found is not None and found.shape != view.shape:
                    raise ShapeError(
                        f"optimizer.state: {name} of {self.slots[short].path} has shape {tuple(found.shape)}, expected "
                        f"{tuple(view.shape)}"
                    )

    def adopt_state(self, shorts: Collection[str]) -> None:
        """Copy the optimizer's state of these parameters into the arenas and replace it with views."""
        if not self.has_state:
            return
        for short in shorts:
            state = self.optimizer.state[self.parameters[short]]
            for name, view in zip(MOMENTS[self.kind], self.moments[short], strict=False):
                found = state.get(name)
                if found is view:
                    continue
                if found is None:
                    view.zero_()
                else:
                    view.copy_(found)
                state[name] = view
            if self.kind == "adam":
                count = self._step_views[short]
                found = state.get("step")
                if found is not count:
                    self.steps[self.position[short]] = 0.0 if found is None else float(found)
                    state["step"] = count

    def watched_state(self, shorts: Collection[str]) -> list[tuple[Any, Any, Any]]:
        """Return triples (mapping, key, value); while they hold, the optimizer's state is the views of the arenas."""
        entries: list[tuple[Any, Any, Any]] = []
        if self.has_state:
            for short in shorts:
                state = self.optimizer.state[self.parameters[short]]
                entries.append((self.optimizer.state, self.parameters[short], state))
                entries.extend((state, name, state[name]) for name in MOMENTS[self.kind][: len(self.moments[short])])
                if self.kind == "adam":
                    entries.append((state, "step", state["step"]))
        return entries

    def count(self, short: str) -> int:
        """Return the number of updates of a parameter by its optimizer's count."""
        return int(self.steps[self.position[short]])
