"""Fleets for the tests of ``train_fleet``: models with numbers of their own.

The arenas have gaps between the tensors that hold 77, and the rows of matrices the padding of the backend, zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from fleet_oracle import Oracle
from memory import base_of, place
from step_calls import Layer, step_calls

from fusemlp_kernels.clock import hyper_at, rate_table
from fusemlp_kernels.contract import (
    COUNTERS,
    ROW_COUNT,
    ROW_STEP,
    ROW_TOTAL,
    STATS,
    Dropout,
    LossSpec,
    Ridge,
    Segment,
    TensorRule,
    UpdateRule,
)

GAP_VALUE = 77.0
# Tensors begin at multiples of this many elements, which leaves gaps.
STEP = 64
# Elements for the values of a model's step.
WORK = 1 << 13
# Updates that the tables of rates have rows for.
UPDATES = 64


@dataclass(frozen=True)
class Model:
    """The numbers of one model of a fleet."""

    rule: UpdateRule
    loss: LossSpec
    seed: int = 0
    rate: float = 0.0
    decay: float = 0.0
    lr_factor: float = 1.0
    slope: float = 0.1
    rows: int = 13
    ridge: Ridge | None = None
    # the learning rates of its updates; the last stands for those after it
    rates: tuple[float, ...] = (0.05,)

    def rate_at(self, updates):
        """Return the learning rate after this many updates."""
        return self.rates[min(updates, len(self.rates) - 1)]


@dataclass(frozen=True)
class Shape:
    """The common properties of the models of a fleet."""

    sizes: tuple[int, ...] = (5, 7, 3)
    activations: tuple[str, ...] = ("tanh", "identity")
    batch: int = 5
    data: int = 17
    weighted: bool = False
    class_weighted: bool = False
    frozen: frozenset[str] = field(default_factory=frozenset)


def _up(number, step):
    return -(-number // step) * step


class Fleet:
    """Arrays of a fleet on the host, bound to a backend; ``run`` takes the steps of each model. With ``epochs`` there
    are rows for this many, and accounts of them. On Triton a run is one launch of ``train_fleet``."""

    def __init__(self, variant, shape, models, op="train_fleet", epochs=None):
        self.variant, self.shape, self.models = variant, shape, models
        real, count = variant.real, len(models)
        multiple = variant.traits.row_multiple
        rng = np.random.default_rng(11)
        self.places = {}
        end = STEP
        for index, (k, n) in enumerate(zip(shape.sizes, shape.sizes[1:], strict=False)):
            tensors = {f"w{index}": (n, k), f"b{index}": (n,)}
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
        # a host reads contiguous rows in place
        self.x = place(x, "plain" if variant.device.on_host else "owned", variant.compute)
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
        self.epochs = epochs or 1
        length = max(_up(self.epochs * model.rows, shape.batch) for model in models)
        self.rows = place(np.full((count, length), -1), "plain", np.int64)
        self.counters = place(np.zeros((count, COUNTERS)), "plain", np.int64)
        self.hyper = place(np.stack([hyper_at(model.rule, model.rates[0]) for model in models]), "plain")
        rates = [[model.rate_at(updates) for updates in range(UPDATES)] for model in models]
        tables = [rate_table(model.rule, own) for model, own in zip(models, rates, strict=True)]
        self.rates = place(np.stack(tables), "plain")
        self.stats = place(np.zeros((count, STATS)), "plain")
        accounts = None if epochs is None else np.full((count, epochs, STATS), GAP_VALUE)
        self.epoch_stats = None if accounts is None else place(accounts, "plain")
        for index, model in enumerate(models):
            total = self.epochs * model.rows
            self.rows[index, :total] = np.random.default_rng(model.seed).integers(0, shape.data, total)
            walk = shape.batch, model.rows, min(shape.batch, model.rows)
            self.counters[index, [ROW_STEP, ROW_TOTAL, ROW_COUNT]] = walk
        self.work = place(np.full((count, WORK), GAP_VALUE), "plain", variant.compute)
        for array in (self.shadow, self.work, self.x):
            base_of(array).compute = True
        writes = [*self.states, *([] if variant.device.on_host else [self.work])]
        if op == "train_resident":
            self.run = variant.bind(op, writes, **self.operands_of_one())
        elif variant.device.backend == "triton":
            self.run = variant.bind(op, writes, **self.operands())
        else:
            # elsewhere the models train one after another
            self._each = [
                variant.bind("train_resident", writes, **self.operands_of_one(index)) for index in range(count)
            ]
            self.run = self._run_each

    def _run_each(self, steps):
        for run, count_of_steps in zip(self._each, steps, strict=True):
            run(count_of_steps)

    def stretch(self, arena, name):
        """A tensor with the padding between its rows, flat."""
        offset, size, pitch = self.places[name]
        return arena[offset : offset + (size[0] * pitch if len(size) == 2 else size[0])]

    def tensor(self, arena, name):
        _, size, pitch = self.places[name]
        flat = self.stretch(arena, name)
        return flat.reshape(size[0], pitch)[:, : size[1]] if len(size) == 2 else flat

    def tensor_rule(self, model, name):
        decay = model.decay if name[0] == "w" else 0.0
        return TensorRule(model.lr_factor if name[0] == "b" else 1.0, decay)

    def layers(self, model):
        last = len(self.shape.activations) - 1
        return [
            Layer(
                name,
                slope=model.slope,
                dropout=Dropout(model.rate, index, model.seed) if model.rate and index < last else None,
            )
            for index, name in enumerate(self.shape.activations)
        ]

    def segments(self, model):
        return tuple(
            Segment(offset, self.stretch(self.params[0], name).size, self.tensor_rule(model, name))
            for name, (offset, _, _) in self.places.items()
            if name not in self.shape.frozen
        )

    def operands(self):
        calls = [self.calls(index) for index in range(len(self.models))]
        return {
            "calls": calls, "rows": self.rows, "batch": self.shape.batch, "epoch_stats": self.epoch_stats,
            "arenas": self.arenas(),
        }  # fmt: skip

    def arenas(self):
        found = {"params": self.params, "grads": self.gradients, "counters": self.counters, "hyper": self.hyper}
        found |= {
            "rates": self.rates,
            "stats": self.stats,
            **{f"state{index}": state for index, state in enumerate(self.states)},
        }
        return {**found, "shadow": self.shadow} if self.variant.output_unit else found

    def calls(self, index):
        """One model's; where one has a penalty, all have."""
        model, end = self.models[index], 0
        tensors = {}
        arenas = {name: arena[index] for name, arena in self.arenas().items()}
        for name in self.places:
            tensors |= {name: self.tensor(arenas["params"], name), f"d{name}": self.tensor(arenas["grads"], name)}
            for number in range(len(self.states)):
                tensors[f"{name}.state{number}"] = self.tensor(arenas[f"state{number}"], name)
            if "shadow" in arenas and name[0] == "w":
                tensors[f"{name}.shadow"] = self.tensor(arenas["shadow"], name)

        def work(name, shape, dtype):
            nonlocal end
            if dtype != "compute" or self.variant.device.on_host:
                kind = {"compute": self.variant.real, "real": self.variant.real}.get(dtype, dtype)
                return place(np.full(shape, GAP_VALUE), "plain", kind)
            begin, pitch = end, _up(shape[1], self.variant.traits.row_multiple)
            end = begin + _up(shape[0] * pitch, STEP)
            assert end <= WORK
            return self.work[index, begin : begin + shape[0] * pitch].reshape(shape[0], pitch)[:, : shape[1]]

        together = [model] if self.variant.device.on_host else self.models
        penalised = any(one.ridge is not None and one.ridge.strength for one in together)
        ridge = model.ridge or (Ridge() if penalised else None)
        return step_calls(
            self.variant.traits, self.layers(model), tensors,
            {name: self.tensor_rule(model, name) for name in self.places if name not in self.shape.frozen}, work,
            batch=self.shape.batch, rule=model.rule, loss=model.loss,
            data={"x": self.x, "target": self.target, "weight": self.weight, "class_weight": self.class_weight},
            control={**arenas, "rows": self.rows[index]},
            arenas=arenas, segments=self.segments(model), ridge=ridge, penalised=penalised,
        )  # fmt: skip

    def operands_of_one(self, index=0):
        """One model's, for ``train_resident``."""
        given = self.operands()
        one = {"calls": given["calls"][index], "rows": self.rows[index]}
        one["arenas"] = {name: arena[index] for name, arena in given["arenas"].items()}
        return {**given, **one, "epoch_stats": None if self.epoch_stats is None else self.epoch_stats[index]}

    def everything(self):
        """Copies of all that a step may change."""
        arrays = {"params": self.params, "gradients": self.gradients, "counters": self.counters, "hyper": self.hyper}
        arrays |= {"stats": self.stats, "shadow": self.shadow}
        arrays |= {} if self.epoch_stats is None else {"epoch_stats": self.epoch_stats}
        arrays |= {f"state{index}": state for index, state in enumerate(self.states)}
        return {name: np.array(array) for name, array in arrays.items()}

    def check_gaps(self):
        """Assert that the gaps between tensors are unchanged, and the padding between their rows is zero."""
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

    def tensor_of(self, stretch, name):
        _, size, pitch = self.places[name]
        return stretch.reshape(size[0], pitch)[:, : size[1]] if len(size) == 2 else stretch


def varied(model, count):
    """Return ``count`` models like ``model``, no two with the same numbers."""
    models = []
    for index in range(count):
        rule = model.rule
        rates = tuple(rate * (1.0 + 0.3 * index) for rate in model.rates)
        rule = replace(rule, beta1=rule.beta1 * 0.99**index, beta2=rule.beta2 * 0.999**index)
        rule = replace(rule, momentum=rule.momentum * 0.95**index)
        loss = model.loss
        if loss.kind == "cross_entropy":
            loss = replace(loss, label_smoothing=min(loss.label_smoothing + 0.01 * index, 0.5))
        models.append(
            replace(
                model, rule=rule, loss=loss, seed=model.seed + index, rate=model.rate * (1.0 - index / (2.0 * count)),
                decay=model.decay * (1.0 + index), slope=model.slope * (1.0 + 0.1 * index), rows=model.rows - index % 3,
                rates=rates,
            )
        )  # fmt: skip
    return models


__all__ = ["Fleet", "Model", "Oracle", "Shape", "varied"]
