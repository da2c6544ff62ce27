"""The optimizers over the arenas of a crew, with the formulas and the order of operations of ``numpy.update``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fusemlp_kernels.contract import BIAS_CORRECTION_1, BIAS_CORRECTION_2, LEARNING_RATE, TensorRule, UpdateRule
from fusemlp_kernels.numpy import blas
from fusemlp_kernels.numpy.activations import BLOCK, Array, Run, in_sequence, nothing
from fusemlp_kernels.numpy.batched.common import Models, spans
from fusemlp_kernels.numpy.update import ALIGNMENT_BYTES, merged

# What the host knows of an update before it: float64 numbers, one a model.
Settings = dict[str, Array]


def bind_update(models: Models, members: Sequence[int], hyper: Array) -> Run:
    """Clip, and update what the segments name, from the gradients in their arena; hyper (members, ``HYPER``)."""
    count, real = len(members), models.params.dtype
    rules = [models.rules[member] for member in members]
    gradients = [models.gradients[member] for member in members]
    limits = [rule.clip_norm for rule in rules]
    norms = [] if limits[0] is None else [blas.norm(one) for one in gradients]
    every = rules[0].accumulate
    columns = (("rate", LEARNING_RATE), ("first", BIAS_CORRECTION_1), ("second", BIAS_CORRECTION_2))
    settings = {name: hyper[:, column] for name, column in columns}
    scales = np.empty((count, 1), real)
    scaling = [(scales[places], models.gradients[fleet]) for places, fleet in spans(members)]
    updates = in_sequence(_bind_stretches(models, members, rules, settings))

    def update() -> None:
        scale = [1.0 / every] * count
        for place, limit in enumerate(limits):
            if limit is not None:
                # in this order a NaN stays
                scale[place] *= min(limit / (norms[place]() * scale[place] + 1e-6), 1.0)
        if any(one != 1.0 for one in scale):
            scales[:, 0] = scale
            for factor, arena in scaling:
                np.multiply(arena, factor, out=arena)
        updates()
        for place, one in enumerate(scale):
            if one != one:
                # a norm that was NaN must not stay between the tensors, where no gradient is written
                gradients[place].fill(0.0)

    return updates if every == 1 and limits[0] is None else update


def _bind_stretches(
    models: Models, members: Sequence[int], rules: Sequence[UpdateRule], settings: Settings
) -> list[Run]:
    alignment = ALIGNMENT_BYTES // models.params.itemsize
    lists = [merged(models.segments[member], alignment) for member in members]
    places_of = [[(start, stop) for start, stop, _ in one] for one in lists]
    if any(one != places_of[0] for one in places_of) or not _empty_between(models, members):
        lists = [[(one.offset, one.offset + one.size, one.rule) for one in models.segments[m]] for m in members]
    elif len(lists[0]) == 1:
        # whole arenas lie behind one another without gaps
        lists = [[(0, models.params.shape[1], one[0][2])] for one in lists]
    runs: list[Run] = []
    for at, (start, stop, _) in enumerate(lists[0]):
        numbers = Numbers(rules, [one[at][2] for one in lists], settings, models.params.dtype)
        runs.append(numbers.prepare)
        for places, fleet in spans(members):
            for columns, part in _blocks(start, stop, fleet):
                arrays = (models.params, models.gradients, *models.states)
                block = [array[part, columns] for array in arrays]
                here = slice(part.start - fleet.start + places.start, part.stop - fleet.start + places.start)
                runs.append(numbers.bind(block[0], block[1], tuple(block[2:]), here))
    return runs


def _empty_between(models: Models, members: Sequence[int]) -> bool:
    """Whether there are zeros between the tensors, which stay zeros in every update."""
    gaps = models.between(members[0])
    return not any(array[member][gaps].any() for array in (models.params, *models.states) for member in members)


def _blocks(start: int, stop: int, fleet: slice) -> list[tuple[slice, slice]]:
    """Blocks that stay in the cache between the passes: (columns, models)."""
    width = min(stop - start, BLOCK)
    height = max(1, BLOCK // max(width, 1))
    return [
        (slice(left, min(left + width, stop)), slice(top, min(top + height, fleet.stop)))
        for top in range(fleet.start, fleet.stop, height)
        for left in range(start, stop, max(width, 1))
    ]


class Number:
    """A number that each member has of its own, rounded as a single number would be."""

    def __init__(self, count: int, real: np.dtype[Any], values: Sequence[float] | None = None) -> None:
        self._column = np.zeros((count, 1), real)
        self._single = self._column[0].reshape(())
        self.same = True
        if values is not None:
            self.write(np.array(values, np.float64))

    def write(self, values: Array) -> None:
        """Take over the numbers of all members, (members,) float64."""
        np.copyto(self._column[:, 0], values, casting="same_kind")
        # a single factor takes half the time of a column of them
        self.same = len(values) == 1 or bool((self._column == self._single).all())

    def of(self, places: slice) -> tuple[Array, Array]:
        """For arrays (members, elements): what to use where the numbers differ, and where they are the ``same``."""
        return self._column[places], self._single


class Numbers:
    """The numbers of an update of one stretch of the arena."""

    def __init__(
        self, rules: Sequence[UpdateRule], tensors: Sequence[TensorRule], settings: Settings, real: np.dtype[Any]
    ) -> None:
        self._rule = rules[0]
        self._settings = settings
        self._factors = np.array([tensor.lr_factor for tensor in tensors], np.float64)
        self._decays = np.array([tensor.weight_decay for tensor in tensors], np.float64)
        self._decay = bool(self._decays.any())
        self._eps = np.array([rule.eps for rule in rules])

        def number(values: Sequence[float] | None = None) -> Number:
            return Number(len(rules), real, values)

        self._beta1, self._rest1 = number([r.beta1 for r in rules]), number([1.0 - r.beta1 for r in rules])
        self._beta2, self._rest2 = number([r.beta2 for r in rules]), number([1.0 - r.beta2 for r in rules])
        self._momentum = number([rule.momentum for rule in rules])
        self._coupled = number([tensor.weight_decay for tensor in tensors])
        self._rate, self._shrink, self._scale, self._shift = (number() for _ in range(4))
        self._now, self._root = np.empty(len(rules)), np.empty(len(rules))

    def prepare(self) -> None:
        """Of the update that comes next."""
        now, root = self._now, self._root
        np.multiply(self._settings["rate"], self._factors, out=now)
        if self._decay and self._rule.decoupled:
            np.multiply(now, self._decays, out=root)
            np.subtract(1.0, root, out=root)
            self._shrink.write(root)
        if self._rule.kind != "adam":
            self._rate.write(now)
            return
        np.sqrt(self._settings["second"], out=root)
        np.multiply(now, root, out=now)
        np.divide(now, self._settings["first"], out=now)
        self._scale.write(now)
        if self._rule.convention == "scikit-learn":
            self._shift.write(self._eps)
        else:
            np.multiply(self._eps, root, out=root)
            self._shift.write(root)

    def bind(self, p: Array, g: Array, state: tuple[Array, ...], places: slice) -> Run:
        """The update of the members in ``places``; all arrays (members, elements), g and the states written too."""
        s = np.empty(p.shape, p.dtype)
        decay = self._bind_decay(p, g, s, places)
        rule = self._rule
        if rule.kind == "adam":
            return self._bind_adam(p, g, state, s, places, decay)
        if state:
            return self._bind_momentum(p, g, state[0], s, places, decay)
        rate, rates = self._rate, self._rate.of(places)

        def sgd() -> None:
            decay()
            np.multiply(g, rates[rate.same], s)
            np.subtract(p, s, p)

        return sgd

    def _bind_decay(self, p: Array, g: Array, s: Array, places: slice) -> Run:
        if not self._decay:
            return nothing
        if self._rule.decoupled:
            shrink, shrinks = self._shrink, self._shrink.of(places)
            return lambda: np.multiply(p, shrinks[shrink.same], p)
        coupled = self._coupled.of(places)[self._coupled.same]

        def decays() -> None:
            np.multiply(p, coupled, s)
            np.add(g, s, g)

        return decays

    def _bind_adam(self, p: Array, g: Array, state: tuple[Array, ...], s: Array, places: slice, decay: Run) -> Run:
        m, v = state
        fixed = (self._beta1, self._rest1, self._beta2, self._rest2)
        beta1, rest1, beta2, rest2 = (number.of(places)[number.same] for number in fixed)
        scale, scales, shift, shifts = self._scale, self._scale.of(places), self._shift, self._shift.of(places)
        multiply, add = np.multiply, np.add

        def adam() -> None:
            decay()
            multiply(m, beta1, m)
            multiply(g, rest1, s)
            add(m, s, m)
            multiply(v, beta2, v)
            multiply(g, g, s)
            multiply(s, rest2, s)
            add(v, s, v)
            np.sqrt(v, s)
            add(s, shifts[shift.same], s)
            np.divide(m, s, s)
            multiply(s, scales[scale.same], s)
            np.subtract(p, s, p)

        return adam

    def _bind_momentum(self, p: Array, g: Array, velocity: Array, s: Array, places: slice, decay: Run) -> Run:
        own, nesterov = self._rule.convention == "scikit-learn", self._rule.nesterov
        momentum = self._momentum.of(places)[self._momentum.same]
        rate, rates = self._rate, self._rate.of(places)
        multiply = np.multiply
        onto = np.subtract if own else np.add

        def momentum_sgd() -> None:
            decay()
            if own:
                multiply(g, rates[rate.same], g)
            multiply(velocity, momentum, velocity)
            onto(velocity, g, velocity)
            if nesterov:
                multiply(velocity, momentum, s)
                onto(s, g, s)
            else:
                np.copyto(s, velocity)
            if own:
                np.add(p, s, p)
            else:
                multiply(s, rates[rate.same], s)
                np.subtract(p, s, p)

        return momentum_sgd
