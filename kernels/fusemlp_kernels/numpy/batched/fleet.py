"""Binding ``train_fleet``, and ``train_resident`` as a fleet of one, where nothing is compiled."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fusemlp_kernels.alike import check_alike, check_steps
from fusemlp_kernels.contract import (
    BATCH_INDEX,
    ROW_STEP,
    STATS,
    LossSpec,
    ResidentLayer,
    Ridge,
    Segment,
    UpdateRule,
)
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.numpy.activations import Array
from fusemlp_kernels.numpy.batched.common import Models
from fusemlp_kernels.numpy.batched.crew import Crew

# Up to so many operations a step it is quicker to make the steps of several models together than each by itself: 1.8
# times at 0.3 million, 1.3 times at 1.6 million, not at all at 3 million (two cores of a Xeon, fp32, Adam).
QUICKER_FLOPS = 2.5e6
# What the members of a crew work in together: more would not stay in the cache from one step to the next.
CREW_BYTES = 1 << 23
# More members bring nothing: a call's own time is a small part of what it computes then.
CREW_MEMBERS = 32
# Crews that are kept bound, besides those of all models at work.
SPARE_CREWS = 8


def bind_train_fleet(
    *,
    x: Array,
    target: Array,
    rows: Array,
    batch: int,
    layers: Sequence[Sequence[ResidentLayer]],
    params: Array,
    gradients: Array,
    states: tuple[Array, ...],
    segments: Sequence[Sequence[Segment]],
    rules: Sequence[UpdateRule],
    losses: Sequence[LossSpec],
    counters: Array,
    hyper: Array,
    rates: Array,
    stats: Array,
    weight: Array | None = None,
    class_weight: Array | None = None,
    history: Array | None = None,
    ridges: Sequence[Ridge] | None = None,
) -> Callable[[Sequence[int]], object]:
    """The contract's ``train_fleet``, in crews."""
    check_alike("train_fleet", layers, segments, rules, losses, ridges)
    if history is not None and (history.ndim != 3 or history.shape[::2] != (len(layers), STATS)):
        raise ArgumentError(f"train_fleet: history: expected shape ({len(layers)}, any, {STATS}), got {history.shape}")
    if len(states) != rules[0].state_count:
        raise ArgumentError(
            f"train_fleet: states: {rules[0].kind} keeps {rules[0].state_count} arrays of state, got {len(states)}"
        )
    models = Models(
        x=x,
        target=target,
        weight=weight,
        class_weight=class_weight,
        rows=rows,
        layers=layers,
        params=params,
        gradients=gradients,
        states=states,
        segments=segments,
        rules=rules,
        losses=losses,
        ridges=[Ridge()] * len(layers) if ridges is None else ridges,
        counters=counters,
        hyper=hyper,
        rates=rates,
        stats=stats,
        history=history,
    )
    return _Fleet(models, batch).run


def bind_train_resident(
    *,
    layers: Sequence[ResidentLayer],
    segments: Sequence[Segment],
    rule: UpdateRule,
    loss: LossSpec,
    states: tuple[Array, ...],
    history: Array | None = None,
    ridge: Ridge | None = None,
    **arrays: Any,
) -> Callable[[int], object]:
    """The contract's ``train_resident``: a fleet of one."""
    own = ("rows", "params", "gradients", "counters", "hyper", "rates", "stats")
    run = bind_train_fleet(
        layers=[layers],
        segments=[segments],
        rules=[rule],
        losses=[loss],
        states=tuple(state[None] for state in states),
        history=None if history is None else history[None],
        ridges=None if ridge is None else [ridge],
        **{name: array[None] if name in own else array for name, array in arrays.items()},
    )
    return lambda steps: run([steps])


class _Fleet:
    """The models, and the crews that they have been in."""

    def __init__(self, models: Models, batch: int) -> None:
        self._models, self._batch = models, batch
        self._structures = [models.structure(model) for model in range(len(models.layers))]
        size = models.params.shape[1] * (2 + len(models.states))
        size += batch * (models.x.shape[1] + 4 * sum(layer.outputs for layer in models.layers[0]))
        self._most = max(1, min(CREW_MEMBERS, CREW_BYTES // (size * models.params.itemsize)))
        self._crews: OrderedDict[tuple[tuple[int, ...], int], Crew] = OrderedDict()

    def run(self, steps: Sequence[int]) -> None:
        """Make the steps of each model."""
        models = self._structures
        check_steps("train_fleet", steps, len(models))
        alike: dict[Any, list[int]] = {}
        for model, count in enumerate(steps):
            if count:
                counters = self._models.counters[model]
                height = min(int(counters[ROW_STEP]) or self._batch, self._batch)
                phase = int(counters[BATCH_INDEX]) % self._models.rules[model].accumulate
                alike.setdefault((models[model], height, phase), []).append(model)
        with np.errstate(all="ignore"):
            for (_, height, _), members in alike.items():
                for start in range(0, len(members), self._most):
                    self._together(members[start : start + self._most], height, steps)

    def _together(self, members: Sequence[int], height: int, steps: Sequence[int]) -> None:
        done, left = 0, list(members)
        while left:
            following = min(steps[member] for member in left)
            self._crew(tuple(left), height).run(following - done)
            done, left = following, [member for member in left if steps[member] > following]

    def _crew(self, members: tuple[int, ...], height: int) -> Crew:
        key = members, height
        if key not in self._crews:
            self._crews[key] = Crew(self._models, members, height)
            while len(self._crews) > SPARE_CREWS + 2 * len(self._structures) // self._most:
                self._crews.popitem(last=False)
        self._crews.move_to_end(key)
        return self._crews[key]
