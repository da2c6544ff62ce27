"""Fleets for the tests of ``train_fleet``: models with numbers of their own, and the oracle's step of each.

The arenas have gaps between the tensors that hold 77, and the rows of matrices the padding of the backend, zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from memory import place
from step_bounds import TwoBytes, traced
from tolerance import U32, assert_within, update_bound

from fusemlp_kernels import reference
from fusemlp_kernels.clock import hyper_at
from fusemlp_kernels.contract import (
    BATCH_INDEX,
    COUNTERS,
    LAST_LOSS,
    LEARNING_RATE,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_STEP,
    ROW_TOTAL,
    STATS,
    UPDATE_COUNT,
    Dropout,
    LossSpec,
    ResidentLayer,
    ScheduleSpec,
    Segment,
    TensorRule,
    UpdateRule,
)
from fusemlp_kernels.philox import dropout_keep

GAP_VALUE = 77.0
# What a tensor begins at a multiple of, in elements, so that there are gaps.
STEP = 64


@dataclass(frozen=True)
class Model:
    """What one model of a fleet has of its own."""

    rule: UpdateRule
    loss: LossSpec
    seed: int = 0
    rate: float = 0.0
    decay: float = 0.0
    lr_factor: float = 1.0
    slope: float = 0.1
    rows: int = 13


@dataclass(frozen=True)
class Shape:
    """What the models of a fleet have in common."""

    sizes: tuple[int, ...] = (5, 7, 3)
    activations: tuple[str, ...] = ("tanh", "identity")
    batch: int = 5
    data: int = 17
    weighted: bool = False
    class_weighted: bool = False
    frozen: frozenset[str] = field(default_factory=frozenset)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


class Fleet:
    """Arrays of a fleet on the host, bound to a backend; ``run`` takes the steps of each model."""

    def __init__(self, variant: Any, shape: Shape, models: list[Model], op: str = "train_fleet") -> None:
        self.variant, self.shape, self.models = variant, shape, models
        real, count = variant.real, len(models)
        multiple = variant.traits.row_multiple
        rng = np.random.default_rng(11)
        self.places: dict[str, tuple[int, tuple[int, ...], int]] = {}
        end = STEP
        for index, (k, n) in enumerate(zip(shape.sizes, shape.sizes[1:], strict=False)):
            tensors: dict[str, tuple[int, ...]] = {f"w{index}": (n, k), f"b{index}": (n,)}
            if shape.activations[index] == "prelu":
                tensors[f"s{index}"] = (1,)
            for name, size in tensors.items():
                pitch = _up(k, multiple) if len(size) == 2 else 1
                self.places[name] = end, size, pitch
                end = _up(end + (n * pitch if len(size) == 2 else size[0]) + 3, STEP)
        self.size = end
        states = models[0].rule.state_count
        self.params = place(np.full((count, end), GAP_VALUE), "plain", real)
        self.gradients = place(np.full((count, end), GAP_VALUE), "plain", real)
        self.states = tuple(place(np.full((count, end), GAP_VALUE), "plain", real) for _ in range(states))
        self.shadow = place(np.full((count, end), GAP_VALUE), "plain", variant.compute)
        for index, model in enumerate(models):
            own = np.random.default_rng(100 + model.seed)
            for name, (_, size, _) in self.places.items():
                values = own.normal(size=size) * 0.5 if name[0] != "s" else np.full(size, 0.25)
                for arena in (self.params, self.shadow):
                    self.stretch(arena[index], name)[...] = 0.0
                    self.tensor(arena[index], name)[...] = values
                for arena in (self.gradients, *self.states):
                    self.stretch(arena[index], name)[...] = 0.0
        loss = models[0].loss
        x = variant.rounded(rng.normal(size=(shape.data, shape.sizes[0])))
        self.x = place(x, "owned", variant.compute)
        outputs = shape.sizes[-1]
        if loss.kind == "cross_entropy" and not loss.soft:
            self.target = rng.integers(0, outputs, shape.data)
            if loss.ignore_index is not None:
                self.target[::5] = loss.ignore_index
        elif loss.kind == "cross_entropy":
            self.target = rng.dirichlet(np.ones(outputs), shape.data).astype(real)
        elif loss.kind == "binary_cross_entropy":
            self.target = rng.integers(0, 2, (shape.data, outputs)).astype(real)
        else:
            self.target = rng.uniform(0.0, 2.0, (shape.data, outputs)).astype(real)
        self.target = place(self.target, "plain")
        self.weight = place(rng.random(shape.data), "plain", real) if shape.weighted else None
        self.class_weight = place(rng.uniform(0.5, 2.0, outputs), "plain", real) if shape.class_weighted else None
        batches = max(_up(model.rows, shape.batch) for model in models)
        self.rows = place(np.full((count, batches), -1), "plain", np.int64)
        self.counters = place(np.zeros((count, COUNTERS)), "plain", np.int64)
        self.hyper = place(np.stack([hyper_at(model.rule, 0) for model in models]), "plain")
        self.stats = place(np.zeros((count, STATS)), "plain")
        for index, model in enumerate(models):
            self.rows[index, : model.rows] = np.random.default_rng(model.seed).integers(0, shape.data, model.rows)
            walk = shape.batch, model.rows, min(shape.batch, model.rows)
            self.counters[index, [ROW_STEP, ROW_TOTAL, ROW_COUNT]] = walk
        self.run = variant.bind(op, **(self.operands() if op == "train_fleet" else self.operands_of_one()))

    def stretch(self, arena: Any, name: str) -> Any:
        """A tensor with the padding between its rows, flat."""
        offset, size, pitch = self.places[name]
        return arena[offset : offset + (size[0] * pitch if len(size) == 2 else size[0])]

    def tensor(self, arena: Any, name: str) -> Any:
        _, size, pitch = self.places[name]
        flat = self.stretch(arena, name)
        return flat.reshape(size[0], pitch)[:, : size[1]] if len(size) == 2 else flat

    def tensor_rule(self, model: Model, name: str) -> TensorRule:
        decay = model.decay if name[0] == "w" else 0.0
        return TensorRule(model.lr_factor if name[0] == "b" else 1.0, decay)

    def layers(self, model: Model) -> tuple[ResidentLayer, ...]:
        sizes, last = self.shape.sizes, len(self.shape.activations) - 1
        return tuple(
            ResidentLayer(
                sizes[index], sizes[index + 1], self.places[f"w{index}"][0], self.places[f"b{index}"][0], name,
                slope=model.slope if name == "leaky_relu" else 0.0,
                slope_at=self.places[f"s{index}"][0] if name == "prelu" else None,
                dropout=Dropout(model.rate, index, model.seed) if model.rate and index < last else None,
            )
            for index, name in enumerate(self.shape.activations)
        )  # fmt: skip

    def segments(self, model: Model) -> tuple[Segment, ...]:
        return tuple(
            Segment(offset, self.stretch(self.params[0], name).size, self.tensor_rule(model, name))
            for name, (offset, _, _) in self.places.items()
            if name not in self.shape.frozen
        )

    def operands(self) -> dict[str, Any]:
        shadowed = {"shadow": self.shadow} if self.variant.output_unit else {}
        return {
            "x": self.x, "target": self.target, "rows": self.rows, "batch": self.shape.batch, "weight": self.weight,
            "class_weight": self.class_weight, "layers": [self.layers(model) for model in self.models],
            "params": self.params, "gradients": self.gradients, "states": self.states, **shadowed,
            "segments": [self.segments(model) for model in self.models],
            "rules": [model.rule for model in self.models], "losses": [model.loss for model in self.models],
            "counters": self.counters, "hyper": self.hyper, "stats": self.stats,
        }  # fmt: skip

    def operands_of_one(self) -> dict[str, Any]:
        """The first model's, for ``train_resident``."""
        given = self.operands()
        one = {"layers": given["layers"][0], "segments": given["segments"][0]}
        one |= {"rule": given.pop("rules")[0], "loss": given.pop("losses")[0]}
        for name in ("rows", "params", "gradients", "counters", "hyper", "stats", "shadow"):
            if name in given:
                one[name] = given[name][0]
        return {**given, **one, "states": tuple(state[0] for state in self.states)}

    def everything(self) -> dict[str, Any]:
        """Copies of all that a step may change."""
        arrays = {"params": self.params, "gradients": self.gradients, "counters": self.counters, "hyper": self.hyper}
        arrays |= {"stats": self.stats, "shadow": self.shadow}
        arrays |= {f"state{index}": state for index, state in enumerate(self.states)}
        return {name: np.array(array) for name, array in arrays.items()}

    def check_gaps(self) -> None:
        """What lies between the tensors holds what it held, and the padding between their rows zeros."""
        for index in range(len(self.models)):
            for arena in (self.params, *self.states):
                gaps = np.ones(self.size, bool)
                for name, (offset, _, _) in self.places.items():
                    stretch = self.stretch(arena[index], name)
                    gaps[offset : offset + stretch.size] = False
                    padding = np.array(stretch)
                    self.tensor_of(padding, name)[...] = 0.0
                    assert not padding.any(), f"{name}: the padding is not zero"
                assert (arena[index][gaps] == GAP_VALUE).all()

    def tensor_of(self, stretch: Any, name: str) -> Any:
        _, size, pitch = self.places[name]
        return stretch.reshape(size[0], pitch)[:, : size[1]] if len(size) == 2 else stretch


class Oracle:
    """A model's next step through the oracle, from the state that the fleet has now."""

    def __init__(self, fleet: Fleet, index: int) -> None:
        self.fleet, self.index, self.model = fleet, index, fleet.models[index]
        self.before = {name: self._exact(fleet.params, name) for name in fleet.places}
        self.states = [{name: self._exact(state, name) for name in fleet.places} for state in fleet.states]
        self.carried = {name: self._exact(fleet.gradients, name) for name in fleet.places}
        self.counters = np.array(fleet.counters[index])

    def _exact(self, arena: Any, name: str) -> Any:
        return np.array(self.fleet.tensor(arena[self.index], name), np.float64)

    def check(self) -> None:
        """The step that has been made is the oracle's, within the bounds of its operations."""
        fleet, model, shape = self.fleet, self.model, self.fleet.shape
        offset, count, batch_index = (int(self.counters[at]) for at in (ROW_OFFSET, ROW_COUNT, BATCH_INDEX))
        rows = np.array(fleet.rows[self.index, offset : offset + count])
        short = TwoBytes() if fleet.variant.output_unit else None
        layers, keeps = [], []
        for index, name in enumerate(shape.activations):
            rate = model.rate if index < len(shape.activations) - 1 else 0.0
            slope = self.before.get(f"s{index}", model.slope if name == "leaky_relu" else 0.0)
            w = fleet.variant.rounded(self.before[f"w{index}"]).astype(np.float64)
            layers.append(reference.Layer(w, self.before[f"b{index}"], name, slope, rate))
            width = shape.sizes[index + 1]
            keeps.append(dropout_keep(rate, index, model.seed, batch_index, count, width) if rate else None)
        weight = None if fleet.weight is None else np.array(fleet.weight[rows], np.float64)
        classes = None if fleet.class_weight is None else np.array(fleet.class_weight, np.float64)
        batch = reference.Batch(
            np.array(fleet.x[rows], np.float64), np.array(fleet.target[rows]), weight, classes, keeps
        )
        found = traced(layers, model.loss, batch, short=short, products=fleet.variant.products)
        assert_within(fleet.stats[self.index, LAST_LOSS], found.loss, found.loss_bound)
        self._check_update(found, batch_index)

    def _check_update(self, found: Any, batch_index: int) -> None:
        fleet, rule = self.fleet, self.model.rule
        names = list(fleet.places)
        grads = dict(zip(names, [g for layer in found.grads for g in layer], strict=True))
        errors = dict(zip(names, [e for layer in found.bounds for e in layer], strict=True))
        every = rule.accumulate
        if batch_index % every:
            grads = {name: g + self.carried[name] for name, g in grads.items()}
            errors = {name: e + 2.0 * U32 * np.abs(grads[name]) for name, e in errors.items()}
        trained = [name for name in names if name not in fleet.shape.frozen]
        if (batch_index + 1) % every:
            for name in trained:
                assert_within(fleet.tensor(fleet.gradients[self.index], name), grads[name], errors[name])
        factor, relative = _clipping(rule, [grads[n] / every for n in trained], [errors[n] / every for n in trained])
        updates = int(self.counters[UPDATE_COUNT])
        rate = reference.learning_rate(rule.schedule, updates)
        for name in names:
            now = fleet.tensor(fleet.params[self.index], name)
            if name not in trained or (batch_index + 1) % every:
                np.testing.assert_array_equal(now, self.before[name].astype(now.dtype))
                continue
            g = factor * grads[name] / every
            error = (factor * errors[name] / every + np.abs(g) * (relative + 3.0 * U32)) * (1.0 + relative)
            args = rule, fleet.tensor_rule(self.model, name), self.before[name], g
            own = tuple(state[name] for state in self.states)
            new, new_states = reference.update(*args, own, updates, rate)
            limit, state_limits = update_bound(*args, own, updates, rate, error)
            assert_within(now, new, limit)
            for arena, wanted, allowed in zip(fleet.states, new_states, state_limits, strict=True):
                assert_within(fleet.tensor(arena[self.index], name), wanted, allowed)
        following = hyper_at(rule, int(fleet.counters[self.index, UPDATE_COUNT]))
        assert_within(fleet.hyper[self.index, LEARNING_RATE], following[LEARNING_RATE], 1e-12 * rule.schedule.base)


def _clipping(rule: UpdateRule, grads: list[Any], errors: list[Any]) -> tuple[float, float]:
    """The factor, and its relative error."""
    if rule.clip_norm is None:
        return 1.0, 0.0
    norm = np.sqrt(sum(np.square(g).sum() for g in grads))
    off = np.sqrt(sum(np.square(e).sum() for e in errors)) + U32 * norm * 8.0
    relative = off / max(norm - off, 1e-30) if norm + off > rule.clip_norm else 0.0
    return reference.clip_factor(grads, rule.clip_norm), relative + 4.0 * U32


def varied(model: Model, count: int) -> list[Model]:
    """So many models like ``model``, no two with the same numbers."""
    models = []
    for index in range(count):
        rule = model.rule
        schedule = replace(rule.schedule, base=rule.schedule.base * (1.0 + 0.3 * index))
        rule = replace(rule, schedule=schedule, beta1=rule.beta1 * 0.99**index, beta2=rule.beta2 * 0.999**index)
        rule = replace(rule, momentum=rule.momentum * 0.95**index)
        loss = model.loss
        if loss.kind == "cross_entropy":
            loss = replace(loss, label_smoothing=min(loss.label_smoothing + 0.01 * index, 0.5))
        models.append(
            replace(
                model, rule=rule, loss=loss, seed=model.seed + index, rate=model.rate * (1.0 - index / (2.0 * count)),
                decay=model.decay * (1.0 + index), slope=model.slope * (1.0 + 0.1 * index), rows=model.rows - index % 3,
            )
        )  # fmt: skip
    return models


CONSTANT = ScheduleSpec("constant", 0.05)
__all__ = ["CONSTANT", "Fleet", "Model", "Oracle", "Shape", "varied"]
