"""The update at the end of a fused step, for sets of parameters that share a rule, a learning rate and a clock.

A single set uses the update that the lowering chose. Several sets use one ``update`` each, over the same arenas, with
their own segments, hyper and counters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from fusemlp.program.layout import Layout
from fusemlp.program.program import Call, Ref, resolve
from fusemlp.runtime.bound import BoundProgram
from fusemlp_kernels.contract import (
    BIAS_CORRECTION_1,
    BIAS_CORRECTION_2,
    COUNTERS,
    HYPER,
    LEARNING_RATE,
    RATE_SCALE,
    UPDATE_COUNT,
    Backend,
    Segment,
    TensorRule,
    UpdateRule,
)


class UpdateSet:
    """Parameters with a common update: ``decays`` is the weight decay of each, ``count`` the updates so far."""

    def __init__(
        self, rule: UpdateRule, rate: float, count: int, decays: Mapping[str, float], hyper: Any, counters: Any
    ) -> None:
        self.rule = rule
        self.decays = decays
        self.count = count
        self.hyper = hyper
        self.counters = counters
        counters[UPDATE_COUNT] = count
        self.set_rate(rate)
        if self.rule.kind == "adam":
            self.hyper[BIAS_CORRECTION_1] = 1.0 - self.rule.beta1 ** (self.count + 1)
            self.hyper[BIAS_CORRECTION_2] = 1.0 - self.rule.beta2 ** (self.count + 1)

    def set_rate(self, rate: float) -> None:
        """Set the learning rate from the next update on: the clock's factor on the rule's rate of 1."""
        self.rate = rate
        self.hyper[RATE_SCALE] = rate
        self.hyper[LEARNING_RATE] = rate


class Clocks:
    """Arrays ``hyper`` and ``counters`` for any number of sets; the first set has the engine's own."""

    def __init__(self, backend: Backend, hyper: Any, counters: Any) -> None:
        self._backend = backend
        self._arrays = [(hyper, counters)]

    def get(self, index: int) -> tuple[Any, Any]:
        """Return the arrays of set ``index``."""
        while len(self._arrays) <= index:
            hyper, counters = self._backend.allocate(HYPER, "float64"), self._backend.allocate(COUNTERS, "int64")
            self._arrays.append((hyper, counters))
        return self._arrays[index]


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
                hyper=one.hyper,
                counters=one.counters,
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
