"""The update at the end of a fused step, for sets of parameters that share a rule, a learning rate and a clock.

A single set uses the update that the lowering chose. Several sets use one ``update`` each, over the same arenas, with
their own segments, hyper and counters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fusemlp.describe.schedules import Constant
from fusemlp.program.layout import Layout
from fusemlp.program.program import Call, Ref, resolve
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


class UpdateSet:
    """Parameters with a common update: ``decays`` is the weight decay of each, ``count`` the updates so far."""

    def __init__(
        self, rule: UpdateRule, rate: float, count: int, decays: Mapping[str, float], table: RateTable
    ) -> None:
        self.rule = rule
        self.decays = decays
        self.count = count
        self.rate = rate
        self.table = table
        table.counters[UPDATE_COUNT] = count
        table.follow(UNIT_RATE, rate, count=count)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate from the next update on: the clock multiplies the table's, which is 1, by it."""
        self.rate = rate
        self.table.hyper[RATE_SCALE] = rate
        self.table.hyper[LEARNING_RATE] = rate

    def cover(self) -> None:
        """Make the table ready for a step."""
        self.table.cover(UNIT_RATE, 1)


class Clocks:
    """Tables of rates, with hyper and counters, for any number of sets; the arrays of the first are the engine's."""

    def __init__(self, memory: Memory) -> None:
        self._backend = memory.backend
        self._arrays = [(memory.hyper, memory.rates, memory.counters)]
        self._tables: dict[tuple[int, UpdateRule], RateTable] = {}

    def get(self, index: int, rule: UpdateRule) -> RateTable:
        """Return the table of set ``index`` under ``rule``."""
        while len(self._arrays) <= index:
            allocate, rows = self._backend.allocate, len(self._arrays[0][1])
            rates = allocate(rows * RATE_COLUMNS, "float64").reshape(rows, RATE_COLUMNS)
            self._arrays.append((allocate(HYPER, "float64"), rates, allocate(COUNTERS, "int64")))
        key = (index, rule)
        if key not in self._tables:
            # the arrays no longer hold the table of another rule
            self._tables = {known: table for known, table in self._tables.items() if known[0] != index}
            self._tables[key] = RateTable(self._backend, rule, *self._arrays[index])
        return self._tables[key]


def bind_updates(bound: BoundProgram, sets: list[UpdateSet], layout: Layout) -> list[Callable[[], object]]:
    """Return the calls that replace the last call of ``bound``, for the current rules of ``sets``."""
    last = bound.program.calls[-1]
    if last.op == "grad_weight_update":
        (only,) = sets
        operands = _with_rule(last, only)
        return [bound.backend.bind(last.op, **resolve(operands, bound.arrays.__getitem__))]
    runs = []
    for one in sets:
        segments = tuple(
            Segment(place.offset, place.size, TensorRule(1.0, one.decays[short]))
            for short, place in layout.places.items()
            if short in one.decays
        )
        runs.append(
            bound.backend.bind(
                "update",
                params=bound.arrays["params"],
                grads=bound.arrays["grads"],
                states=tuple(bound.arrays[f"state{index}"] for index in range(one.rule.state_count)),
                segments=segments,
                rule=one.rule,
                hyper=one.table.hyper,
                rates=one.table.rates,
                counters=one.table.counters,
            )
        )
    return runs


def _with_rule(call: Call, one: UpdateSet) -> dict[str, Any]:
    """Return the operands of a ``grad_weight_update`` under the rule of ``one``."""

    def tensor(layer: Mapping[str, Any], kind: str) -> dict[str, Any]:
        if layer[kind] is None:
            return {}
        short = layer[kind].name
        return {f"{kind}_state": _states(short, one.rule), f"{kind}_rule": TensorRule(1.0, one.decays[short])}

    layers = tuple({**layer, **tensor(layer, "w"), **tensor(layer, "b")} for layer in call.operands["layers"])
    slopes = tuple(
        {
            **slope,
            "state": _states(slope["param"].name, one.rule),
            "rule": TensorRule(1.0, one.decays[slope["param"].name]),
        }
        for slope in call.operands["slopes"]
    )
    return {**call.operands, "layers": layers, "slopes": slopes, "rule": one.rule}


def _states(short: str, rule: UpdateRule) -> tuple[Ref, ...]:
    return tuple(Ref(f"{short}.state{index}") for index in range(rule.state_count))
