"""The update at the end of a fused step, for sets of parameters that share a rule, a learning rate and a clock.

A single set uses the update that the lowering chose. Several sets use one ``update`` each, over the same arenas, with
their own segments, hyper and counters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from fusemlp.describe.schedules import Constant
from fusemlp.program.layout import Layout
from fusemlp.program.program import Ref, resolve
from fusemlp.runtime.bound import BoundProgram
from fusemlp.runtime.memory import Memory
from fusemlp.runtime.rates import RateTable
from fusemlp_kernels.contract import (
    COUNTERS,
    HYPER,
    LEARNING_RATE,
    RATE_COLUMNS,
    RATE_SCALE,
    UPDATE_COUNT,
    Segment,
    TensorRule,
    UpdateRule,
)

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
    for one in sets:
        if last.op == "update":
            operands = {
                "params": arrays["params"],
                "grads": arrays["grads"],
                "states": tuple(arrays[f"state{index}"] for index in range(one.rule.state_count)),
                "segments": tuple(
                    Segment(place.offset, place.size, _own_rule(one, short))
                    for short, place in layout.places.items()
                    if short in one.decays
                ),
            }
            if "norm" in last.operands:
                operands["norm"] = arrays["norm"]
        else:
            operands = resolve({**last.operands, **_with_rules(last.operands, one)}, arrays.__getitem__)
        clock = {"hyper": one.table.hyper, "rates": one.table.rates, "counters": one.table.counters, "rule": one.rule}
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
