"""Tie a module and its optimizer to an engine's arenas: the torch tensors become views of them."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from fusemlp.runtime.memory import Memory
from fusemlp.torch.modules import Reading
from fusemlp.torch.optimizers import MOMENTS
from fusemlp_kernels.errors import ArgumentError, ShapeError


class Tie:
    """The parameters of a module and the moments of its optimizer, as views of ``memory``.

    ``slots`` and the collections of ``shorts`` are by the program's short names. The optimizer never gets moments of
    frozen or absent tensors.
    """

    def __init__(self, reading: Reading, optimizer: Optimizer, kind: str, memory: Memory) -> None:
        self.optimizer = optimizer
        self.slots = reading.slots
        double = torch.get_default_dtype() == torch.float64
        # The count of updates in torch's own type, one element a parameter; SGD has none.
        self.steps = np.zeros(len(self.slots), np.float64 if double else np.float32)
        self._arrays = memory.arrays
        self._pointers: dict[str, int] = {}
        # The optimizer's state of each parameter: a view by torch's name.
        self._state: dict[str, dict[str, Tensor]] = {}
        for index, short in enumerate(self.slots):
            views = [torch.as_tensor(memory.arrays[f"{short}.state{i}"]) for i in range(len(memory.states))]
            named = zip(MOMENTS[kind], views, strict=False)
            self._state[short] = {name: view for name, view in named if name is not None}
            if kind != "sgd":
                self._state[short]["step"] = torch.from_numpy(self.steps[index : index + 1])[0]

    def move_parameters(self) -> None:
        """Copy the parameters into the arena and make them views of it."""
        for short, (_, parameter) in self.slots.items():
            view = torch.as_tensor(self._arrays[short])
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = None
            self._pointers[short] = parameter.data_ptr()

    def holds(self) -> bool:
        """Return whether every parameter is still the view from ``move_parameters``."""
        return all(self.slots[short].parameter.data_ptr() == pointer for short, pointer in self._pointers.items())

    def check_parameters(self, reading: Reading) -> None:
        """Raise ArgumentError, with the parameter's name, unless all are the fused ones in their place in the arena."""
        for short, (path, parameter) in reading.slots.items():
            if short not in self.slots or parameter is not self.slots[short].parameter:
                raise ArgumentError(f"module: {path} is not the parameter that was fused; call fuse again")
            if parameter.data_ptr() != self._pointers.get(short, parameter.data_ptr()):
                raise ArgumentError(
                    f"module: the memory of {path} was replaced after fuse (module.to(...), param.data = ..., or "
                    "another fuse); call fuse again, or copy values in place with param.data.copy_(...)"
                )
        if len(reading.slots) != len(self.slots):
            raise ArgumentError("module: has lost parameters since it was fused; call fuse again")

    def check_state(self, shorts: Collection[str]) -> None:
        """Raise ShapeError for a moment in ``optimizer.state`` with a wrong shape."""
        for short in shorts:
            path, parameter = self.slots[short]
            state = self.optimizer.state.get(parameter, {})
            for name, view in self._state[short].items():
                found = getattr(state.get(name), "shape", view.shape)
                if found != view.shape:
                    raise ShapeError(
                        f"optimizer.state: {name} of {path} has shape {tuple(found)}, expected {tuple(view.shape)}"
                    )

    def adopt_state(self, shorts: Collection[str]) -> None:
        """Copy the optimizer's state of these parameters into the arenas and replace it with views."""
        for short in shorts:
            for name, view in self._state[short].items():
                state = self.optimizer.state[self.slots[short].parameter]
                found = state.get(name)
                if found is not view:
                    view.copy_(torch.as_tensor(0.0 if found is None else found))
                    state[name] = view
