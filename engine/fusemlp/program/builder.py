"""The values and calls of a program while it is built: the forward pass, the loss, and the gradients going back.

The products of members that share weights stand between what each member has of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fusemlp.program.program import Call, Program, Ref, Value
from fusemlp.program.step import Step
from fusemlp_kernels.contract import COUNTERS, NEEDS_Z, STATS, Dropout, LossSpec
from fusemlp_kernels.ops import OPS


class Builder:
    """Collects the values and calls of a program."""

    def __init__(self, step: Step) -> None:
        self.step, self.net, self.traits = step, step.net, step.traits
        self.members = step.net.members
        self.batch = step.batch_size * self.members
        self.values: dict[str, Value] = {}
        self.calls: list[Call] = []
        self.mixed = step.compute_bytes is not None
        # the type of what the matrix products read
        self.matrix = "compute" if self.mixed else "real"
        self.rules = dict(step.trained)
        self.states = range(0 if step.rule is None else step.rule.state_count)
        # Below the first layer with something to train no gradient is needed.
        self.first = min((int(short[1:]) for short in self.rules), default=self.net.layers)
        # The last layer that a gradient goes back through; one more than there are stands for the output's activation.
        self.top = self.net.layers - 1
        if step.gradient is not None:
            self.first = step.gradient - 1
            self.top += step.spec is None and self.net.activations[-1].name != "identity"
        for name, place in step.layout.places.items():
            self.add(name, place.shape, "real", "parameter")
            if self.mixed and name.startswith("w"):
                self.add(f"{name}.shadow", place.shape, "compute", "shadow")
        inputs = step.inputs
        self.x, start = Ref("x"), step.gradient or 0
        entries = [("h1" if start else "x", start)]
        entries += [("z1", 1)] if start and self.net.activations[0].name in NEEDS_Z else []
        entries += [("seed", -1)] if step.gradient is not None and step.spec is None else []
        for name, level in entries:
            self.add(name, (inputs.rows, self.net.sizes[level]), self.matrix, "data")
        if self.top == self.net.layers:
            self.add("unit", (self.net.sizes[-1],) * 2, self.matrix, "data")
        self.counters = self.add("counters", (COUNTERS,), "int64", "control")
        self.rows = self.add("rows", (self.batch,), "int64", "control") if inputs.indexed else None
        # whether a batch that is picked by row is copied first
        self.copies = inputs.indexed and not self.traits.gathers_in_load
        attacked = step.against is not None
        gathers = self.copies and not attacked and self.members == 1
        self.gathered = self.work("gathered", self.net.sizes[0]) if gathers else None
        # the rows of x, where the first layer picks its batch from it
        self.picks = None if attacked else self.rows
        # whether the calls are those of the attack
        self.attacking = False

    def add(self, name: str, shape: tuple[int, ...], dtype: str, kind: str) -> Ref:
        self.values[name] = Value(name, shape, dtype, kind)
        return Ref(name)

    def work(self, name: str, columns: int, dtype: str | None = None) -> Ref:
        return self.add(name, (self.batch, columns), dtype or self.matrix, "work")

    def call(self, op: str, label: str, products: Sequence[tuple[int, int, int]] = (), **operands: Any) -> None:
        """Add a call; an optional operand that is None is left out."""
        required = OPS[op].required
        given = {name: one for name, one in operands.items() if one is not None or name in required}
        self.calls.append(Call(op, given, label, tuple(products)))

    def weight(self, layer: int) -> Ref:
        """The weights as the matrix products read them."""
        return Ref(f"w{layer}.shadow" if self.mixed else f"w{layer}")

    def product(self, layer: int) -> tuple[int, int, int]:
        """M, N, K of a layer forward."""
        return self.batch, self.net.sizes[layer + 1], self.net.sizes[layer]

    def operands(self, layer: int) -> dict[str, Any]:
        """The matrices that a layer's product reads."""
        return {"x": Ref(f"h{layer}") if layer else self.x, "w": self.weight(layer), "b": Ref(f"b{layer}")}

    def picked(self, layer: int, rows: str = "rows") -> dict[str, Any]:
        """The operands by which the first layer finds its batch."""
        return {} if layer else {rows: self.picks, "gathered": self.gathered}

    def activation(self, layer: int) -> dict[str, Any]:
        """The operands that describe the activation after a layer."""
        chosen = self.net.activations[layer]
        return {
            "activation": chosen.name,
            "slope": chosen.fixed_slope,
            "slope_param": Ref(f"s{layer}") if chosen.name == "prelu" else None,
        }

    def slope_gradient(self, layer: int) -> Ref | None:
        """The gradient by the slope of the prelu after a layer."""
        learned = self.net.activations[layer].name == "prelu"
        return self.add(f"dslope{layer}", (1,), "real", "work") if learned else None

    def dropout(self, layer: int) -> Dropout | None:
        """The dropout after a layer, in training."""
        rate = self.net.dropouts[layer] if self.step.rule is not None and not self.attacking else 0.0
        return Dropout(rate, layer, self.step.seed) if rate else None

    def hidden(self, first: int = 0) -> None:
        """The hidden layers forward, from ``first`` on."""
        for layer in range(first, self.net.layers - 1):
            if self.members > 1:
                hidden_of_members(self, layer)
            else:
                self.linear(layer, f"h{layer + 1}", self.activation(layer))

    def linear(self, layer: int, output: str, activation: dict[str, Any]) -> Ref:
        """A layer forward, with its activation; returns its output."""
        width, name, dropout = self.net.sizes[layer + 1], activation["activation"], self.dropout(layer)
        y = self.work(output, width)
        self.call(
            "linear",
            name if dropout is None else f"{name} dropout {dropout.rate:g}",
            [self.product(layer)],
            **self.operands(layer),
            y=y,
            counters=self.counters,
            **activation,
            **self.picked(layer),
            z=self.work(f"z{layer + 1}", width) if layer >= self.first and name in NEEDS_Z else None,
            dropout=dropout,
            keep=self.work(f"keep{layer + 1}", width, "bool") if dropout and self.traits.stores_masks else None,
        )
        return y

    def gradient(self, short: str) -> Ref | None:
        """The gradient by a trained tensor; None if it is not trained."""
        if short not in self.rules:
            return None
        return self.add(f"d{short}", self.step.layout.places[short].shape, "real", "gradient")

    def weight_of_rows(self) -> Ref | None:
        """The weight of each row, if there is one."""
        inputs = self.step.inputs
        return self.add("weight", (inputs.rows,), "real", "data") if inputs.weighted else None

    def loss_operands(self, spec: LossSpec) -> dict[str, Any]:
        """The operands of the loss and its gradient, but for those of the last layer.

        With ``scaled`` the gradient is multiplied by the loss scale in ``hyper``.
        """
        step, net, inputs, last = self.step, self.net, self.step.inputs, self.net.layers - 1
        if step.privacy is not None:
            spec = replace(spec, reduction="rows")
        outputs, gradient = net.sizes[-1], self.first < net.layers
        integer = spec.kind == "cross_entropy" and not spec.soft
        shape, dtype = ((), "int64") if integer else ((outputs,), "real")
        # a resident loop reads the targets through the rows
        counted = not self.attacking
        copied = self.copies and not step.resident and counted
        ridge = step.ridge if counted else None
        return {
            "target": self.add("target", (inputs.rows, *shape), dtype, "data"),
            "counters": self.counters,
            "stats": self.add("stats", (STATS,), "float64", "control") if counted else None,
            "loss": spec,
            **self.activation(last),
            "hyper": Ref("hyper") if step.scaled and self.rules else None,
            "ridge": ridge,
            "shares": self.add("shares", (1,), "float64", "work") if ridge else None,
            "weight": self.weight_of_rows(),
            "class_weight": self.add("class_weight", (outputs,), "real", "control") if inputs.class_weighted else None,
            "rows": self.rows,
            "target_rows": self.add("target_rows", (self.batch, *shape), dtype, "work") if copied else None,
            "weight_rows": self.add("weight_rows", (self.batch,), "real", "work")
            if copied and inputs.weighted
            else None,
            "dz": self.work(f"dz{net.layers}", outputs) if gradient else None,
            "dslope": self.slope_gradient(last) if gradient else None,
        }

    def loss(self, spec: LossSpec) -> None:
        """The last layer, the loss and its gradient: one call where the backend can, else two."""
        last, operands = self.net.layers - 1, self.loss_operands(spec)
        if self.members > 1:
            self.call("loss_grad", spec.kind, z=heads_of_members(self, f"z{last + 1}"), **operands)
        elif self.net.sizes[-1] <= self.traits.widest_fused_output:
            layer = {**self.operands(last), **self.picked(last, rows="x_rows")}
            self.call("linear_loss_grad", spec.kind, [self.product(last)], **layer, **operands)
        else:
            z = self.linear(last, f"z{self.net.layers}", {"activation": "identity"})
            self.call("loss_grad", spec.kind, z=z, **operands)

    def grad_input(self, layer: int) -> None:
        """From dz of ``layer`` to dz of the layer before it, or to dx; after the last layer through its activation."""
        before, end = layer - 1, self.net.layers
        inputs, outputs = self.net.sizes[layer], self.net.sizes[min(layer + 1, end)]
        # the data has no activation
        activation = self.activation(before) if layer else {"activation": "identity"}
        name, dropout = activation["activation"], self.dropout(before) if layer else None
        seeded = layer == self.top and self.step.spec is None
        self.call(
            "grad_input",
            name,
            [(self.batch, inputs, outputs)],
            dz=Ref("seed" if seeded else f"dz{layer + 1}"),
            w=self.weight(layer) if layer < end else Ref("unit"),
            y=self.x if layer == 0 else Ref(f"h{layer}" if layer < end else "y"),
            dz_prev=self.work(f"dz{layer}" if layer else "dx", inputs),
            **activation,
            z=Ref(f"z{layer}") if name in NEEDS_Z else None,
            dslope=self.slope_gradient(before) if layer else None,
            dropout=dropout,
            counters=self.counters if dropout else None,
            keep=Ref(f"keep{layer}") if dropout and self.traits.stores_masks else None,
        )

    def by_weight(self, layer: int) -> tuple[int, int, int]:
        """M, N, K of the gradient by a layer's weights."""
        return self.net.sizes[layer + 1], self.net.sizes[layer], self.batch

    def having(self, kinds: str) -> list[int]:
        """The layers with a trained tensor of one of these kinds."""
        return [layer for layer in range(self.net.layers) if any(f"{kind}{layer}" in self.rules for kind in kinds)]

    def program(self) -> Program:
        """The program of what was collected."""
        trained, shorts = [*self.rules], tuple(self.step.layout.places)
        arenas = {"params": shorts}
        if self.step.rule is not None:
            arenas["grads"] = tuple(f"d{short}" for short in trained)
            for index in self.states:
                arenas[f"state{index}"] = tuple(f"{short}.state{index}" for short in trained)
            if self.mixed:
                arenas["shadow"] = tuple(f"{short}.shadow" for short in trained if short[0] == "w")
        step = self.step
        return Program(
            self.values,
            tuple(self.calls),
            arenas,
            frozenset(trained),
            step.real_bytes,
            step.compute_bytes,
            step.resident,
            step.sharding,
        )


def _mixed(build: Builder, layer: int) -> Any:
    """The operands of what members do before the product of ``layer``: after that of the layer before it, if any,
    and without factors r for the heads."""
    dropout = build.dropout(layer - 1) if layer else None
    activation = build.activation(layer - 1) if layer else {}
    return {
        "x": Ref(f"u{layer}") if layer else build.x,
        "rows": None if layer else build.rows,
        "s": Ref(f"s{layer - 1}") if layer else None,
        "b": Ref(f"b{layer - 1}") if layer else None,
        "r": Ref(f"r{layer}") if layer < build.net.layers - 1 else None,
        **{name: activation.get(name) for name in ("activation", "slope")},
        "dropout": dropout,
    }


def _mix(build: Builder, layer: int) -> Ref:
    """The inputs of a layer's product, for all members."""
    given, width = _mixed(build, layer), build.net.sizes[layer]
    y, dropout = build.work(f"h{layer}", width), given["dropout"]
    label = given["activation"] or ""
    build.call(
        "affine_members",
        label if dropout is None else f"{label} dropout {dropout.rate:g}",
        y=y,
        **given,
        counters=build.counters,
        keep=build.work(f"keep{layer}", width, "bool") if dropout and build.traits.stores_masks else None,
    )
    return y


def hidden_of_members(build: Builder, layer: int) -> None:
    """A hidden layer up to its product, which has no bias."""
    width = build.net.sizes[layer + 1]
    build.call(
        "linear",
        "",
        [build.product(layer)],
        x=_mix(build, layer),
        w=build.weight(layer),
        b=build.add(f"zeros{layer}", (width,), "real", "control"),
        y=build.work(f"u{layer + 1}", width),
        activation="identity",
    )


def heads_of_members(build: Builder, output: str) -> Ref:
    """The output layer of each member."""
    last = build.net.layers - 1
    h, z = _mix(build, last), build.work(output, build.net.sizes[-1])
    build.call("linear_members", "", [build.product(last)], x=h, w=build.weight(last), b=Ref(f"b{last}"), z=z)
    return z


def back_through_members(build: Builder) -> None:
    """From dz of the heads to the gradients by all that members have of their own, and by the products."""
    last, rule = build.net.layers - 1, build.step.rule
    common: dict[str, Any] = {"rule": rule, "counters": build.counters}
    for layer in range(last, -1, -1):
        outputs, inputs = build.net.sizes[layer + 1], build.net.sizes[layer]
        # what is trained below
        needed = any(int(short[1:]) < layer or short == f"r{layer}" for short in build.rules)
        if not needed:
            return
        dy = build.work(f"dh{layer}", inputs)
        products = [(build.batch, inputs, outputs)]
        if layer == last:
            dz = Ref(f"dz{layer + 1}")
            build.call("grad_input_members", "", products, dz=dz, w=build.weight(layer), dx=dy)
        else:
            h, dz = Ref(f"h{layer}"), Ref(f"du{layer + 1}")
            ends: dict[str, Any] = {"y": h, "dz_prev": dy, "activation": "identity"}
            build.call("grad_input", "identity", products, dz=dz, w=build.weight(layer), **ends)
        mixing = _mixed(build, layer)
        names: dict[str, str] = {"ds": f"s{layer - 1}", "db": f"b{layer - 1}", "dr": f"r{layer}"}
        by_own: dict[str, Any] = {name: build.gradient(short) for name, short in names.items()}
        build.call(
            "grad_affine_members",
            mixing["activation"] or "",
            dy=dy,
            **mixing,
            dx=build.work(f"du{layer}", inputs) if layer else None,
            **by_own,
            keep=Ref(f"keep{layer}") if mixing["dropout"] and build.traits.stores_masks else None,
            **common,
        )


def gradients_of_members(build: Builder, **clock: Any) -> tuple[dict[str, Any], ...]:
    """The layers of ``grad_weight`` whose weights are shared; the call for the heads is made here."""
    last = build.net.layers - 1
    if {f"w{last}", f"b{last}"} & build.rules.keys():
        head = {"dz": Ref(f"dz{last + 1}"), "x": Ref(f"h{last}")}
        by_head = {"dw": build.gradient(f"w{last}"), "db": build.gradient(f"b{last}")}
        products = [build.by_weight(last)] if f"w{last}" in build.rules else []
        build.call("grad_weight_members", "", products, **head, **by_head, **clock)
    return tuple(
        {"dz": Ref(f"du{layer + 1}"), "x": Ref(f"h{layer}"), "dw": build.gradient(f"w{layer}"), "db": None}
        for layer in build.having("w")
        if layer < last
    )
