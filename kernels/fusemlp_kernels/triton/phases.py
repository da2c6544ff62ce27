"""Reading a model's calls as the phases of the resident kernel."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusemlp_kernels.contract import LossSpec, Ridge, Segment, UpdateRule
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.triton.launch import Tensor

Operands = Mapping[str, Any]
Calls = Sequence[tuple[str, Operands]]


class Phases:
    """A step's calls, read in their order: the kernel's ``phases`` with their layers; the operands of the layers
    forward, and by layer those of the calls that go back to it; and the trained tensors in ``params``, the arena.

    A method for each op returns why no phase can do such a call, None for one that can.

    Raises ArgumentError for a call that no phase can do, and for calls that are no step.
    """

    def __init__(self, op: str, calls: Calls, params: Tensor) -> None:
        self.phases: list[tuple[str, int]] = []
        self.forward: list[Operands] = []
        self.backward: dict[int, Operands] = {}
        self.segments: Sequence[Segment] = ()
        self._params = params
        # the layers, by the places of dz and of the slopes' gradients
        self._layer_at: dict[int, int] = {}
        self._before = ""
        kinds: dict[str, Callable[[Operands], str | None]] = {
            "linear": self._linear, "linear_loss_grad": self._loss, "grad_input": self._grad_input,
            "grad_weight": self._grad_weight, "grad_weight_update": self._grad_weight_update,
            "penalty": self._penalty, "update": self._update, "advance": self._advance,
        }  # fmt: skip
        for index, (name, operands) in enumerate(calls):
            refusal = kinds[name](operands) if name in kinds else "the kernel has no phase for it"
            if refusal is not None:
                raise ArgumentError(f"{op}: calls[{index}]: {name}: {refusal}; run the calls one by one")
            self._before = name
        names = [name for name, _ in calls]
        if "linear_loss_grad" not in names or self.phases[-1][0] != "tick":
            raise ArgumentError(
                f"{op}: calls: expected a step with linear_loss_grad that ends with grad_weight_update, update or "
                f"advance, got {', '.join(names)}"
            )
        self.loss: LossSpec = self.forward[-1]["loss"]
        self.ridge: Ridge = self.forward[-1].get("ridge") or Ridge()
        self.rule: UpdateRule = calls[-1][1]["rule"]

    def values(self) -> list[Tensor]:
        """The arrays of the workspace that the kernel writes, in order."""
        values = [operands.get(name) for operands in self.forward for name in ("y", "z", "dz")]
        values += [operands["dz_prev"] for operands in self.backward.values()]
        return [value for value in values if value is not None]

    def _linear(self, operands: Operands) -> str | None:
        if self.forward:
            below = self.forward[-1]
            if not _are_same(operands["x"], below.get("y")):
                return "its x is not the output of the linear before it"
            if len(below["w"]) != operands["w"].shape[1]:
                return f"w: expected {len(below['w'])} columns, as x has, got {operands['w'].shape[1]}"
        self.phases.append(("forward", len(self.forward)))
        self.forward.append(operands)
        return None

    def _loss(self, operands: Operands) -> str | None:
        if (refusal := self._linear(operands)) is not None:
            return refusal
        if operands["loss"].reduction == "rows":
            return "the kernel trains without privacy"
        kind = "entropy" if operands["loss"].kind == "cross_entropy" else "elementwise"
        last = len(self.forward) - 1
        # the divisor of the loss follows from data and parameters
        self.phases = [("measure", last), *self.phases[:-1], (kind, last)]
        self._writes(operands, "dz", last)
        return None

    def _grad_input(self, operands: Operands) -> str | None:
        above = self._layer_of(operands["dz"])
        if not above or not _are_same(operands["w"], self.forward[above]["w"]):
            return "its dz and w are not those of a layer above the first"
        self.phases.append(("backward", above - 1))
        self.backward[above - 1] = operands
        self._writes(operands, "dz_prev", above - 1)
        return None

    def _writes(self, operands: Operands, name: str, layer: int) -> None:
        for array in (operands.get(name), operands.get("dslope")):
            if array is not None:
                self._layer_at[array.data_ptr()] = layer

    def _layer_of(self, gradient: Tensor) -> int | None:
        return self._layer_at.get(gradient.data_ptr())

    def _grad_weight(self, operands: Operands) -> str | None:
        layers = [self._layer_of(part["dz"]) for part in operands["layers"]]
        for layer, part in zip(layers, operands["layers"], strict=True):
            if layer is None or not _are_same(part["x"], self.forward[layer]["x"]):
                return "its dz and x are not those of a layer"
        # a layer's phase has its slope too
        layers += [self._layer_of(slope["dslope"]) for slope in operands.get("slopes", ())]
        if None in layers:
            return "no layer before it has its dslope"
        self.phases += [("gradients", layer) for layer in dict.fromkeys(layers) if layer is not None]
        return None

    def _grad_weight_update(self, operands: Operands) -> str | None:
        found = []
        for layer in operands["layers"]:
            found += [(layer[name], layer[f"{name}_rule"]) for name in "wb" if layer[name] is not None]
        found += [(slope["param"], slope["rule"]) for slope in operands.get("slopes", ())]
        segments = [
            Segment(place_in(tensor, self._params), len(tensor) * tensor.stride(0), rule) for tensor, rule in found
        ]
        self.segments = sorted(segments, key=lambda segment: segment.offset)
        refusal = self._grad_weight(operands)
        self.phases += [("update", 0), ("tick", 0)]
        return refusal

    def _penalty(self, operands: Operands) -> str | None:
        return None if self._before == "grad_weight" else "it does not follow grad_weight"

    def _update(self, operands: Operands) -> str | None:
        if operands.get("noise") is not None:
            return "the kernel trains without privacy"
        if self._before not in ("grad_weight", "penalty"):
            return "it does not follow grad_weight or penalty"
        self.segments = operands["segments"]
        self.phases += [("update", 0), ("tick", 0)]
        return None

    def _advance(self, operands: Operands) -> str | None:
        self.phases.append(("tick", 0))
        return None


def _are_same(array: Tensor, other: Tensor | None) -> bool:
    return other is not None and array.data_ptr() == other.data_ptr()


def place_in(tensor: Tensor, arena: Tensor) -> int:
    """Return the first element of a tensor in an arena."""
    return (tensor.data_ptr() - arena.data_ptr()) // arena.element_size()
