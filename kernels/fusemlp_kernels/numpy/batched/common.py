"""What the members of a crew have in common, and where their numbers lie."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fusemlp_kernels.contract import LossSpec, ResidentLayer, Ridge, Segment, UpdateRule
from fusemlp_kernels.numpy.activations import Array


@dataclass(frozen=True)
class Models:
    """The operands of the contract's ``train_fleet``."""

    x: Array
    target: Array
    weight: Array | None
    class_weight: Array | None
    rows: Array
    layers: Sequence[Sequence[ResidentLayer]]
    params: Array
    gradients: Array
    states: tuple[Array, ...]
    segments: Sequence[Sequence[Segment]]
    rules: Sequence[UpdateRule]
    losses: Sequence[LossSpec]
    ridges: Sequence[Ridge]
    counters: Array
    hyper: Array
    rates: Array
    stats: Array
    history: Array | None

    def structure(self, model: int) -> Hashable:
        """What models must have in common for their steps to be the same calls."""
        rule, loss = self.rules[model], self.losses[model]
        return (
            (rule.kind, rule.nesterov, rule.decoupled, rule.convention, rule.clip_norm is None, rule.accumulate),
            replace(loss, label_smoothing=float(loss.label_smoothing != 0.0), delta=1.0, quantile=0.5),
            self.ridges[model].strength != 0.0,
            tuple(layer.dropout is None for layer in self.layers[model]),
            tuple(segment.rule.weight_decay != 0.0 for segment in self.segments[model]),
        )

    def trained(self, model: int) -> frozenset[int]:
        """Where the tensors that are trained begin."""
        return frozenset(segment.offset for segment in self.segments[model])

    def between(self, model: int) -> Array:
        """Which elements of its arenas lie between the tensors that are trained: (size,) bool."""
        gaps = np.ones(self.params.shape[1], np.bool_)
        for segment in self.segments[model]:
            gaps[segment.offset : segment.offset + segment.size] = False
        return gaps


def stretches(keys: Sequence[Hashable]) -> list[slice]:
    """Neighbours with equal keys, as slices of their places."""
    found: list[slice] = []
    for place, key in enumerate(keys):
        if found and keys[place - 1] == key:
            found[-1] = slice(found[-1].start, place + 1)
        else:
            found.append(slice(place, place + 1))
    return found


def spans(members: Sequence[int]) -> list[tuple[slice, slice]]:
    """Stretches of the crew whose models are neighbours in the fleet: (places in the crew, places in the fleet)."""
    found = stretches([member - place for place, member in enumerate(members)])
    return [(span, slice(members[span.start], members[span.stop - 1] + 1)) for span in found]


def rows_of(places: slice, height: int) -> slice:
    """The rows of these members where batches of ``height`` rows lie behind one another."""
    return slice(places.start * height, places.stop * height)
