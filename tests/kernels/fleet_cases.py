"""Fleets for the tests of ``train_fleet``: models with numbers of their own.

The arenas have gaps between the tensors that hold 77, and the rows of matrices the padding of the backend, zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
from calls import SLOPED
from fleet_oracle import Oracle
from memory import base_of, place

from fusemlp_kernels import contract as c
from fusemlp_kernels.clock import hyper_at, rate_table

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

    rule: c.UpdateRule
    loss: c.LossSpec
    seed: int = 0
    rate: float = 0.0
    decay: float = 0.0
    lr_factor: float = 1.0
    slope: float = 0.1
    rows: int = 13
    ridge: c.Ridge | None = None
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
    are rows for this many, and accounts of them. On Triton a run is one launch of ``train_fleet``, or of
    ``train_resident`` with the operands ``others``."""

    def __init__(self, variant, shape, models, op="train_fleet", epochs=None, **others):
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
        self.counters = place(np.zeros((count, c.COUNTERS)), "plain", np.int64)
        self.hyper = place(np.stack([hyper_at(model.rule, model.rates[0]) for model in models]), "plain")
        rates = [[model.rate_at(updates) for updates in range(UPDATES)] for model in models]
        tables = [rate_table(model.rule, own) for model, own in zip(models, rates, strict=True)]
        self.rates = place(np.stack(tables), "plain")
        self.stats = place(np.zeros((count, c.STATS)), "plain")
        accounts = None if epochs is None else np.full((count, epochs, c.STATS), GAP_VALUE)
        self.epoch_stats = None if accounts is None else place(accounts, "plain")
        for index, model in enumerate(models):
            total = self.epochs * model.rows
            self.rows[index, :total] = np.random.default_rng(model.seed).integers(0, shape.data, total)
            walk = shape.batch, model.rows, min(shape.batch, model.rows)
            self.counters[index, [c.ROW_STEP, c.ROW_TOTAL, c.ROW_COUNT]] = walk
        self.work = place(np.full((count, WORK), GAP_VALUE), "plain", variant.compute)
        for array in (self.shadow, self.work, self.x):
            base_of(array).compute = True
        writes = [*self.states, *([] if variant.device.on_host else [self.work])]
        self.arenas = {
            "params": self.params, "grads": self.gradients, "counters": self.counters, "hyper": self.hyper,
            "rates": self.rates, "stats": self.stats, **{f"state{at}": state for at, state in enumerate(self.states)},
            **({"shadow": self.shadow} if variant.output_unit else {}),
        }  # fmt: skip
        self.alone = op == "train_resident"
        if self.alone:
            self.run = variant.bind(op, writes, **self.operands_of_one(), **others)
        elif variant.device.backend == "triton":
            self.run = variant.bind(op, writes, **self.operands(), **others)
        else:
            # elsewhere the models train one after another
            each = [variant.bind("train_resident", writes, **self.operands_of_one(index)) for index in range(count)]
            self.run = lambda steps: [run(count) for run, count in zip(each, steps, strict=True)]

    def check_a_step(self):
        """Make a step of each model: it is the oracle's, within its bounds."""
        steps = [Oracle(self, index) for index in range(len(self.models))]
        self.run(1 if self.alone else [1] * len(steps))
        for step in steps:
            step.check()

    def stretch(self, arena, name):
        """A tensor with the padding between its rows, flat."""
        offset, size, pitch = self.places[name]
        return arena[offset : offset + (size[0] * pitch if len(size) == 2 else size[0])]

    def matrix(self, stretch, name):
        """A tensor without that padding."""
        _, size, pitch = self.places[name]
        return stretch.reshape(size[0], pitch)[:, : size[1]] if len(size) == 2 else stretch

    def tensor(self, arena, name):
        return self.matrix(self.stretch(arena, name), name)

    def tensor_rule(self, model, name):
        decay = model.decay if name[0] == "w" else 0.0
        return c.TensorRule(model.lr_factor if name[0] == "b" else 1.0, decay)

    def operands(self):
        calls = [self.calls(index) for index in range(len(self.models))]
        operands = {"rows": self.rows, "batch": self.shape.batch, "epoch_stats": self.epoch_stats}
        return {"calls": calls, "arenas": self.arenas, **operands}

    def calls(self, index):
        """(op, operands) of each call of a model's step, as the engine's lowering makes them of a network."""
        model, shape, traits, end = self.models[index], self.shape, self.variant.traits, 0
        arenas = {name: arena[index] for name, arena in self.arenas.items()}
        rules = {name: self.tensor_rule(model, name) for name in self.places if name not in shape.frozen}
        last, rows, counters = len(shape.activations) - 1, self.rows[index], arenas["counters"]
        first = min((int(name[1:]) for name in rules), default=last + 1)
        dropouts = [c.Dropout(model.rate, at, model.seed) if model.rate else None for at in range(last)]
        kept = {}

        def tensor(name, arena="params"):
            return self.tensor(arenas[arena], name)

        def states(name):
            return tuple(tensor(name, f"state{number}") for number in range(len(self.states)))

        def work(name, *size, dtype="compute"):
            """Make a value of the step."""
            nonlocal end
            if dtype != "compute" or self.variant.device.on_host:
                kind = {"compute": self.variant.real, "real": self.variant.real}.get(dtype, dtype)
                kept[name] = place(np.full(size, GAP_VALUE), "plain", kind)
            else:
                begin, pitch = end, _up(size[1], traits.row_multiple)
                end = begin + _up(size[0] * pitch, STEP)
                assert end <= WORK
                memory = self.work[index, begin : begin + size[0] * pitch]
                kept[name] = memory.reshape(size[0], pitch)[:, : size[1]]
            return kept[name]

        def layer(at):
            activation = shape.activations[at]
            slope = {"slope": model.slope} if activation in SLOPED else {}
            slope |= {"slope_param": tensor(f"s{at}")} if activation == "prelu" else {}
            return {"activation": activation, **slope}

        def weights(at):
            return {"w": tensor(f"w{at}", "shadow" if "shadow" in arenas else "params")}

        def source(at, name):
            if at:
                return {"x": outputs[at]}
            return {"x": self.x, name: rows} | ({} if traits.gathers_in_load else {"gathered": outputs[0]})

        def dropped(at):
            operands = {"dropout": dropouts[at], "counters": counters} if dropouts[at] else {}
            return operands | ({"keep": kept[f"keep{at}"]} if f"keep{at}" in kept else {})

        outputs = {0: self.x if traits.gathers_in_load else work("gathered", shape.batch, shape.sizes[0])}
        calls = []
        for at in range(last):
            size = shape.batch, shape.sizes[at + 1]
            outputs[at + 1] = work(f"h{at}", *size)
            if shape.activations[at] in c.NEEDS_Z and at >= first:
                work(f"z{at}", *size)
            if dropouts[at] and traits.stores_masks:
                work(f"keep{at}", *size, dtype="bool")
            z = {"z": kept[f"z{at}"]} if f"z{at}" in kept else {}
            operands = source(at, "rows") | weights(at) | {"b": tensor(f"b{at}"), "y": outputs[at + 1]}
            calls.append(("linear", {**operands, "counters": counters, **layer(at), **z, **dropped(at)}))
        dz = {last: work(f"dz{last}", shape.batch, shape.sizes[-1]) if first <= last else None}
        loss = {"target": self.target, "weight": self.weight, "class_weight": self.class_weight}
        loss = {name: array for name, array in loss.items() if array is not None} | {"loss": model.loss, "rows": rows}
        if dz[last] is not None and shape.activations[last] == "prelu":
            loss["dslope"] = work(f"dslope{last}", 1, dtype="real")
        # models of one launch all have a penalty, or none
        together = [model] if self.variant.device.on_host else self.models
        penalised = any(one.ridge is not None and one.ridge.strength for one in together)
        ridge = model.ridge or (c.Ridge() if penalised else None)
        if ridge is not None:
            loss["ridge"] = ridge
        loss |= {"dz": dz[last], "counters": counters, "stats": arenas["stats"], "b": tensor(f"b{last}")}
        calls.append(("linear_loss_grad", source(last, "x_rows") | weights(last) | loss | layer(last)))
        for at in range(last - 1, first - 1, -1):
            dz[at] = work(f"dz{at}", shape.batch, shape.sizes[at + 1])
            operands = {"dz": dz[at + 1], **weights(at + 1), "y": outputs[at + 1], "dz_prev": dz[at]}
            operands |= {"z": kept[f"z{at}"]} if f"z{at}" in kept else {}
            if shape.activations[at] == "prelu":
                operands["dslope"] = work(f"dslope{at}", 1, dtype="real")
            calls.append(("grad_input", operands | layer(at) | dropped(at)))
        clock = {"rule": model.rule, **{name: arenas[name] for name in ("counters", "hyper", "rates")}}
        if not rules:
            return [*calls, ("advance", clock)]
        rule = model.rule
        whole = rule.clip_norm is not None or rule.accumulate > 1 or penalised or rule.kind not in traits.fused_updates

        def trained(name):
            kind = name[0]
            if whole:
                return {f"d{kind}": tensor(name, "grads") if name in rules else None}
            if name not in rules:
                return {kind: None}
            shadow = {"w_shadow": tensor(name, "shadow")} if "shadow" in arenas and kind == "w" else {}
            return {kind: tensor(name), f"{kind}_state": states(name), f"{kind}_rule": rules[name], **shadow}

        layers, slopes = [], []
        for at in range(first, last + 1):
            if {f"w{at}", f"b{at}"} & rules.keys():
                operands = {"x": outputs[at], "dz": dz[at]} | (
                    {"rows": rows} if not at and traits.gathers_in_load else {}
                )
                layers.append({**operands, **trained(f"w{at}"), **trained(f"b{at}")})
            if (name := f"s{at}") in rules:
                update = {"param": tensor(name), "state": states(name), "rule": rules[name]}
                slopes.append({"dslope": kept[f"dslope{at}"], **({"grad": tensor(name, "grads")} if whole else update)})
        grouped = {"layers": tuple(layers), "slopes": tuple(slopes)}
        if not whole:
            return [*calls, ("grad_weight_update", {**grouped, **clock})]
        calls.append(("grad_weight", {**grouped, "rule": rule, "counters": counters}))
        if penalised:
            pulled = tuple({"w": tensor(name), "dw": tensor(name, "grads")} for name in rules if name[0] == "w")
            calls.append(
                ("penalty", {"layers": pulled, "ridge": ridge, "counters": counters, "stats": arenas["stats"]})
            )
        segments = tuple(
            c.Segment(self.places[name][0], self.stretch(arenas["params"], name).size, rules[name]) for name in rules
        )
        flat = {name: arenas[name] for name in ("params", "grads", "shadow") if name in arenas}
        flat["states"] = tuple(arenas[f"state{number}"] for number in range(len(self.states)))
        return [*calls, ("update", {**flat, "segments": segments, **clock})]

    def operands_of_one(self, index=0):
        """One model's, for ``train_resident``."""
        operands = self.operands()
        one = {"calls": operands["calls"][index], "rows": self.rows[index]}
        one["arenas"] = {name: arena[index] for name, arena in operands["arenas"].items()}
        return {**operands, **one, "epoch_stats": None if self.epoch_stats is None else self.epoch_stats[index]}

    def everything(self):
        """Copies of all that a step may change."""
        arrays = {**self.arenas, "epoch_stats": self.epoch_stats}
        return {name: np.array(array) for name, array in arrays.items() if array is not None}

    def check_gaps(self):
        """Assert that the gaps between tensors are unchanged, and the padding between their rows is zero."""
        for index in range(len(self.models)):
            for arena in (self.params, *self.states):
                gaps = np.ones(self.size, bool)
                for name, (offset, _, _) in self.places.items():
                    stretch = self.stretch(arena[index], name)
                    gaps[offset : offset + stretch.size] = False
                    padding = np.ones(stretch.size, bool)
                    self.matrix(padding, name)[...] = False
                    assert not stretch[padding].any(), f"{name}: the padding is not zero"
                assert (arena[index][gaps] == GAP_VALUE).all()


def varied(model, count):
    """Return ``count`` models like ``model``, no two with the same numbers."""
    models = []
    for index in range(count):
        rates, rule, loss = tuple(rate * (1.0 + 0.3 * index) for rate in model.rates), model.rule, model.loss
        betas = {"beta1": rule.beta1 * 0.99**index, "beta2": rule.beta2 * 0.999**index}
        rule = replace(rule, **betas, momentum=rule.momentum * 0.95**index)
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
