"""The parts of a step between its kernel calls that no kernel does: torch computes them on the kernels' memory.

Each is a call without arguments in a ``Runnable``, after the output layer's ``linear`` or before the ``update``.

The update at the end of a fused step, for sets of parameters that share a rule, a learning rate and a clock.

A single set uses the update that the lowering chose. Several sets use one ``update`` each, over the same arenas, with
their own segments, hyper and counters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fusemlp.describe.schedules import Constant
from fusemlp.program.layout import Layout
from fusemlp.program.program import Ref, resolve
from fusemlp.runtime.memory import Memory
from fusemlp.runtime.programs import BoundProgram
from fusemlp.runtime.rates import RateTable
from fusemlp.torch.modules import Reading, as_module
from fusemlp_kernels.contract import (
    COUNTERS,
    HYPER,
    LAST_LOSS,
    LEARNING_RATE,
    RATE_COLUMNS,
    RATE_SCALE,
    UPDATE_COUNT,
    Segment,
    TensorRule,
    UpdateRule,
)

Run = Callable[[], object]


@dataclass
class Running:
    """The number of rows in the batch that runs, and the module's output for them where the program notes it."""

    rows: int = 0
    output: Tensor | None = None


def bind_output(running: Running, reading: Reading, z: Any, slope: Any) -> Run:
    """Return the call that notes the module's output, from z (capacity, N) of the last Linear.

    ``slope``: the parameter of a PReLU at the end, else None.
    """
    z = torch.as_tensor(z)
    finish = _after_linear(reading, None if slope is None else torch.as_tensor(slope))

    def run() -> None:
        running.output = finish(z[: running.rows].clone())

    return torch.no_grad()(run)


def _after_linear(reading: Reading, slope: Tensor | None) -> Callable[[Tensor], Tensor]:
    """Return the function of the parts after the last Linear."""
    activation = as_module(reading.network.activations[-1])

    def finish(z: Tensor) -> Tensor:
        y: Tensor = activation(z) if slope is None else functional.prelu(z, slope)
        if reading.log_softmax:
            y = y.log_softmax(1)
        return y.squeeze(1) if reading.squeezes else y

    return finish


def bind_weighted_loss(running: Running, operands: dict[str, Any], pos_weight: Sequence[float]) -> Run:
    """Return a ``loss_grad`` for BCEWithLogitsLoss(pos_weight): with p for a pos_weight, s(z) for the sigmoid, the loss
    of z and its target t has the gradient (1 + (p - 1) t) s(z) - p t."""
    z, dz, target, stats = (torch.as_tensor(operands[name]) for name in ("z", "dz", "target", "stats"))
    weight = torch.tensor(pos_weight, dtype=z.dtype, device=z.device)
    less, reduction, (_, outputs) = weight - 1.0, operands["loss"].reduction, z.shape
    # the kernels read a row up to its pitch
    pitch = dz.stride(0)
    whole = dz if pitch == outputs else dz.as_strided((len(dz), pitch), (pitch, 1))

    def run() -> None:
        rows = running.rows
        t = target[:rows]
        stats[LAST_LOSS] = functional.binary_cross_entropy_with_logits(
            z[:rows], t, pos_weight=weight, reduction=reduction
        )
        gradient = torch.sigmoid(z[:rows]).mul_(torch.addcmul(torch.ones_like(t), less, t)).sub_(weight * t)
        if reduction == "mean":
            gradient.div_(rows * outputs)
        if rows < len(dz) or pitch > outputs:
            whole.zero_()
        dz[:rows] = gradient

    return torch.no_grad()(run)


def bind_clipping(gradients: Sequence[Any], most: float) -> Run:
    """Return the call that clips the common norm of all gradients, for optimizers with several updates in a step."""
    views = [torch.as_tensor(one) for one in gradients]
    # torch clips the grad of its parameters
    for view in views:
        view.grad = view.detach()

    def run() -> None:
        clip_grads_with_norm_(views, most, get_total_norm(views))

    return run


# A group's own learning rate is the factor that the clock applies to this one.
UNIT_RATE = Constant(1.0)


@dataclass
class UpdateSet:
    """Parameters with a common update: ``decays`` is the weight decay of each, ``count`` the updates so far."""

    rule: UpdateRule
    decays: Mapping[str, float]
    count: int
    table: RateTable

    def start(self, rate: float) -> None:
        """Set the clock and the learning rate."""
        self.table.counters[UPDATE_COUNT] = self.count
        self.table.follow(UNIT_RATE, rate, count=self.count)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate from the next update on: the clock multiplies the table's, which is 1, by it."""
        self.table.hyper[RATE_SCALE] = rate
        self.table.hyper[LEARNING_RATE] = rate


class Clocks:
    """Tables of rates, with hyper and counters, for any number of sets; the arrays of the first are the engine's.

    ``corrected``: the rule's bias corrections apply; else they are 1.
    """

    def __init__(self, memory: Memory, *, corrected: bool) -> None:
        self._backend = memory.backend
        self._corrected = corrected
        self._arrays = [(memory.hyper, memory.rates, memory.counters)]
        self._tables: dict[int, tuple[UpdateRule, RateTable]] = {}

    def get(self, index: int, rule: UpdateRule) -> RateTable:
        """Return the table of set ``index`` under ``rule``."""
        if index == len(self._arrays):
            allocate, rows = self._backend.allocate, len(self._arrays[0][1])
            rates = allocate(rows * RATE_COLUMNS, "float64").reshape(rows, RATE_COLUMNS)
            self._arrays.append((allocate(HYPER, "float64"), rates, allocate(COUNTERS, "int64")))
        if index not in self._tables or self._tables[index][0] != rule:
            counted = rule if self._corrected else replace(rule, kind="sgd")
            self._tables[index] = rule, RateTable(self._backend, counted, *self._arrays[index])
        return self._tables[index][1]


def bind_updates(bound: BoundProgram, sets: list[UpdateSet], layout: Layout) -> list[Callable[[], object]]:
    """Return the calls that replace the last call of ``bound``, for the current rules of ``sets``."""
    last, arrays = bound.program.calls[-1], bound.arrays
    runs = []
    for update_set in sets:
        if last.op == "update":
            operands = {
                "params": arrays["params"],
                "grads": arrays["grads"],
                "states": tuple(arrays[f"state{index}"] for index in range(update_set.rule.state_count)),
                "segments": tuple(
                    Segment(place.offset, place.size, _own_rule(update_set, short))
                    for short, place in layout.places.items()
                    if short in update_set.decays
                ),
            }
            if "norm" in last.operands:
                operands["norm"] = arrays["norm"]
        else:
            operands = resolve({**last.operands, **_with_rules(last.operands, update_set)}, arrays.__getitem__)
        clock = {
            "hyper": update_set.table.hyper,
            "rates": update_set.table.rates,
            "counters": update_set.table.counters,
            "rule": update_set.rule,
        }
        runs.append(bound.backend.bind(last.op, **{**operands, **clock}))
    return runs


def _own_rule(one: UpdateSet, short: str) -> TensorRule:
    return TensorRule(1.0, one.decays[short])


def _with_rules(operands: Mapping[str, Any], one: UpdateSet) -> dict[str, Any]:
    """Return the layers and slopes of a ``grad_weight_update`` with the tensors' rules of ``one``."""

    def rules(layer: Mapping[str, Ref | None]) -> dict[str, TensorRule]:
        named = {kind: layer[kind] for kind in ("w", "b")}
        return {f"{kind}_rule": _own_rule(one, ref.name) for kind, ref in named.items() if ref is not None}

    return {
        "layers": tuple({**layer, **rules(layer)} for layer in operands["layers"]),
        "slopes": tuple({**slope, "rule": _own_rule(one, slope["param"].name)} for slope in operands["slopes"]),
    }
