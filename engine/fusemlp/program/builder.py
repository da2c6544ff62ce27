"""A training step or forward pass, and its plain program: its values, and its calls in order.

A step of L layers is L forward calls (the last with loss and dz), L - 1 ``grad_input``, ``grad_weight`` and ``update``.
Further features of a training change this program afterwards: see ``passes``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from fusemlp.describe.network import MLP
from fusemlp.program.layout import RATE_ROWS, Layout
from fusemlp.program.program import Call, Program, Ref, Value
from fusemlp_kernels import contract
from fusemlp_kernels.coding import Coding
from fusemlp_kernels.contract import Dropout, LossSpec, Segment, TensorRule, Traits, UpdateRule
from fusemlp_kernels.ops import OPS

# Changes the program of a step; compared by value, as programs are remembered by their steps.
Pass: TypeAlias = "Callable[[Program, Step], Program]"


@dataclass(frozen=True)
class Inputs:
    """The data that a program is given.

    ``rows`` examples; with ``indexed`` a batch is picked from them by row index, else they are the batch. A network
    with members needs the indices: each row of the data stands there once for each member.
    ``weighted``: there is a weight for each row. ``class_weighted``: the loss has class weights. With a ``coding`` the
    rows are codes.
    """

    rows: int
    indexed: bool = False
    weighted: bool = False
    class_weighted: bool = False
    coding: Coding | None = None


class Step(NamedTuple):
    """A training step over batches of ``batch_size`` rows, of each member if the network has some; without ``rule`` a
    forward pass, without ``spec`` up to y.

    ``trained``: the changes of the rule for each tensor that is trained, by its short name.

    ``compute_bytes``: bytes of an element that the matrix products read, if they do not read the parameters.
    ``scaled``: the gradients carry the loss scale, and a batch in which they overflow is skipped.

    With ``keep_gradients`` the last two calls are ``grad_weight`` and ``update``, on every backend and for every
    optimizer: between them the gradients can be read and changed. ``most_parts``: into how many parts the gradients may
    cut the batch (``contract.batch_parts``). ``resident``: the calls run in one loop over many steps. ``passes`` change
    the program of the plain step, one after another.

    With ``gradient`` 0 a forward pass goes back to dx, the gradient by x: of the loss, or without ``spec`` of the
    outputs weighed by the data ``seed`` (batch_size, N). With ``gradient`` 1 it begins at h1, the first hidden layer's
    output, which is data (so is z1 where the derivative needs it), and ends at dz1. Nothing is dropped.
    With ``layers`` a forward pass ends at h of that number, the output of a hidden layer.
    """

    net: MLP
    batch_size: int
    traits: Traits
    layout: Layout
    inputs: Inputs
    spec: LossSpec | None
    real_bytes: int
    compute_bytes: int | None = None
    rule: UpdateRule | None = None
    trained: tuple[tuple[str, TensorRule], ...] = ()
    seed: int = 0
    scaled: bool = False
    keep_gradients: bool = False
    most_parts: int = 1
    resident: bool = False
    gradient: int | None = None
    layers: int | None = None
    passes: tuple[Pass, ...] = ()


class Builder:
    """Collects the values and calls of a step's program."""

    def __init__(self, step: Step) -> None:
        self.step, self.net, self.traits = step, step.net, step.traits
        self.batch = step.batch_size * step.net.members
        self.last = step.net.layers - 1
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
        self.top = self.last
        if step.gradient is not None:
            self.first = step.gradient - 1
        by_outputs = self.first < self.net.layers and (step.spec is None or step.spec.kind == contract.OWN)
        self.top += by_outputs and self.net.activations[-1].name != "identity"
        for name, place in step.layout.places.items():
            self.add(name, place.shape, "real", "parameter")
            if self.mixed and name.startswith("w"):
                self.add(f"{name}.shadow", place.shape, "compute", "shadow")
        inputs, start = step.inputs, step.gradient or 0
        # what a row of the data has: the inputs, or codes of them
        self.slots = self.net.sizes[0] if inputs.coding is None else inputs.coding.slots
        entries = [("h1" if start else "x", start)]
        entries += [("z1", 1)] if start and self.net.activations[0].name in contract.NEEDS_Z else []
        entries += [("seed", -1)] if step.gradient is not None and step.spec is None else []
        for name, level in entries:
            self.add(name, (inputs.rows, self.net.sizes[level] if level else self.slots), self.matrix, "data")
        if self.top == self.net.layers:
            # the gradient by the outputs goes through the activation alone
            self.add("unit", (self.net.sizes[-1],) * 2, self.matrix, "data")
        self.counters = self.add("counters", (contract.COUNTERS,), "int64", "control")
        self.rows = self.add("rows", (self.batch,), "int64", "control") if inputs.indexed else None
        # a batch that is picked by row may be copied first
        copies = inputs.indexed and not self.traits.gathers_in_load and self.gathers()
        self.gathered = self.work("gathered", self.slots) if copies else None

    def gathers(self) -> bool:
        """Return whether the first product may have a copy of the rows of its batch."""
        return True

    def add(self, name: str, shape: tuple[int, ...], dtype: str, kind: str) -> Ref:
        self.values[name] = Value(name, shape, dtype, kind)
        return Ref(name)

    def work(self, name: str, columns: int, dtype: str | None = None) -> Ref:
        return self.add(name, (self.batch, columns), dtype or self.matrix, "work")

    def call(self, op: str, label: str, products: Sequence[tuple[int, int, int]] = (), **operands: Any) -> None:
        """Add a call; an optional operand that is None is left out."""
        required = OPS[op].required
        present = {name: value for name, value in operands.items() if value is not None or name in required}
        self.calls.append(Call(op, present, label, tuple(products)))

    def weight(self, layer: int) -> Ref:
        """The weights as the matrix products read them."""
        return Ref(f"w{layer}.shadow" if self.mixed else f"w{layer}")

    def product(self, layer: int) -> tuple[int, int, int]:
        """M, N, K of a layer forward."""
        return self.batch, self.net.sizes[layer + 1], self.net.sizes[layer] if layer else self.slots

    def by_weight(self, layer: int) -> tuple[int, int, int]:
        """M, N, K of the gradient by a layer's weights."""
        return self.net.sizes[layer + 1], self.net.sizes[layer] if layer else self.slots, self.batch

    def having(self, kinds: str) -> list[int]:
        """The layers with a trained tensor of one of these kinds."""
        return [layer for layer in range(self.net.layers) if any(f"{kind}{layer}" in self.rules for kind in kinds)]

    def operands(self, layer: int) -> dict[str, Any]:
        """The matrices that a layer's product reads."""
        coded = {} if layer or self.step.inputs.coding is None else {"coding": self.step.inputs.coding}
        return {"x": Ref(f"h{layer}" if layer else "x"), "w": self.weight(layer), "b": Ref(f"b{layer}"), **coded}

    def picked(self, layer: int, rows: str = "rows") -> dict[str, Any]:
        """The operands by which the first layer finds its batch."""
        return {} if layer else {rows: self.rows, "gathered": self.gathered}

    def activation(self, layer: int) -> dict[str, Any]:
        """The operands that describe the activation after a layer."""
        activation = self.net.activations[layer]
        return {
            "activation": activation.name,
            "slope": activation.fixed_slope,
            "slope_param": Ref(f"s{layer}") if activation.name == "prelu" else None,
        }

    def slope_gradient(self, layer: int) -> Ref | None:
        """The gradient by the slope of the prelu after a layer."""
        learned = self.net.activations[layer].name == "prelu"
        return self.add(f"dslope{layer}", (1,), "real", "work") if learned else None

    def dropout(self, layer: int) -> Dropout | None:
        """The dropout after a layer, in training."""
        rate = self.net.dropouts[layer] if self.step.rule is not None else 0.0
        return Dropout(rate, layer, self.step.seed) if rate else None

    def hidden(self, layer: int) -> None:
        """A hidden layer forward."""
        self.linear(layer, f"h{layer + 1}", self.activation(layer))

    def outputs(self, name: str, activation: dict[str, Any]) -> Ref:
        """The output layer forward."""
        return self.linear(self.last, name, activation)

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
            z=self.work(f"z{layer + 1}", width) if layer >= self.first and name in contract.NEEDS_Z else None,
            dropout=dropout,
            keep=self.work(f"keep{layer + 1}", width, "bool") if dropout and self.traits.stores_masks else None,
        )
        return y

    def weight_of_rows(self) -> Ref | None:
        """The weight of each row, if there is one."""
        inputs = self.step.inputs
        return self.add("weight", (inputs.rows,), "real", "data") if inputs.weighted else None

    def loss_operands(self, spec: LossSpec) -> dict[str, Any]:
        """The operands of the loss and its gradient, but for those of the last layer.

        With ``scaled`` the gradient is multiplied by the loss scale in ``hyper``.
        """
        step, net, inputs = self.step, self.net, self.step.inputs
        outputs, gradient = net.sizes[-1], self.first < net.layers
        integer = spec.kind == "cross_entropy" and not spec.soft
        shape, dtype = ((), "int64") if integer else ((outputs // spec.width,), "real")
        return {
            "target": self.add("target", (inputs.rows, *shape), dtype, "data"),
            "counters": self.counters,
            "stats": self.add("stats", (contract.STATS,), "float64", "control"),
            "loss": spec,
            **self.activation(self.last),
            "hyper": Ref("hyper") if step.scaled and self.rules else None,
            "weight": self.weight_of_rows(),
            "class_weight": self.add("class_weight", (outputs,), "real", "control") if inputs.class_weighted else None,
            "rows": self.rows,
            "dz": self.work(f"dz{net.layers}", outputs) if gradient else None,
            "dslope": self.slope_gradient(self.last) if gradient else None,
        }

    def loss(self, spec: LossSpec) -> None:
        """The last layer, the loss and its gradient: one call where the backend can, else two."""
        operands = self.loss_operands(spec)
        # a layer of codes is no product
        coded = self.net.layers == 1 and self.step.inputs.coding is not None
        if self.net.sizes[-1] <= self.traits.widest_fused_output and not coded:
            layer = {**self.operands(self.last), **self.picked(self.last, rows="x_rows")}
            self.call("linear_loss_grad", spec.kind, [self.product(self.last)], **layer, **operands)
        else:
            z = self.outputs(f"z{self.net.layers}", {"activation": "identity"})
            self.call("loss_grad", spec.kind, z=z, **operands)

    def own_loss(self, spec: LossSpec) -> None:
        """The outputs, and the caller's loss and its gradient by them."""
        dtype, shape = spec.target
        rows = self.step.inputs.rows
        self.call(
            "own_loss",
            spec.name,
            y=self.outputs("y", self.activation(self.last)),
            dy=self.work(f"dz{self.top + 1}", self.net.sizes[-1]),
            target=self.add("target", (rows, *shape), dtype, "data"),
            counters=self.counters,
            stats=self.add("stats", (contract.STATS,), "float64", "control"),
            function=self.add("function", (), "function", "control"),
            hyper=Ref("hyper") if self.step.scaled and self.rules else None,
            weight=self.weight_of_rows(),
            rows=self.rows,
        )

    def backward(self) -> None:
        """From dz of the last layer to that of the first with something to train, or to the inputs."""
        for layer in range(self.top, self.first, -1):
            self.grad_input(layer)

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
            y=Ref("y" if layer == end else f"h{layer}" if layer else "x"),
            dz_prev=self.work(f"dz{layer}" if layer else "dx", inputs),
            **activation,
            z=Ref(f"z{layer}") if name in contract.NEEDS_Z else None,
            dslope=self.slope_gradient(before) if layer else None,
            dropout=dropout,
            counters=self.counters if dropout else None,
            keep=Ref(f"keep{layer}") if dropout and self.traits.stores_masks else None,
        )

    def gradient(self, short: str) -> Ref | None:
        """The gradient by a trained tensor; None if it is not trained."""
        if short not in self.rules:
            return None
        return self.add(f"d{short}", self.step.layout.places[short].shape, "real", "gradient")

    def weight_gradients(self, rule: UpdateRule) -> None:
        """The gradients by all that is trained, in one call."""
        layers = []
        for layer in self.having("wb"):
            x: dict[str, Any] = {"x": Ref(f"h{layer}") if layer else self.gathered or Ref("x")}
            if not layer and self.rows is not None and self.gathered is None:
                x["rows"] = self.rows
            if not layer and self.step.inputs.coding is not None:
                x["coding"] = self.step.inputs.coding
            by_tensor = {f"d{kind}": self.gradient(f"{kind}{layer}") for kind in "wb"}
            layers.append({"dz": Ref(f"dz{layer + 1}"), **x, **by_tensor})
        slopes = [{"dslope": Ref(f"dslope{layer}"), "grad": self.gradient(f"s{layer}")} for layer in self.having("s")]
        products = [self.by_weight(layer) for layer in self.having("w")]
        common = {"rule": rule, "counters": self.counters}
        self.call("grad_weight", "", products, layers=tuple(layers), slopes=tuple(slopes), **common)

    def update(self, rule: UpdateRule) -> None:
        """The optimizer over all gradients, or the clock alone."""
        hyper = self.add("hyper", (contract.HYPER,), "float64", "control")
        rates = self.add("rates", (1 + RATE_ROWS, contract.RATE_COLUMNS), "float64", "control")
        clock: dict[str, Any] = {"rule": rule, "counters": self.counters, "hyper": hyper, "rates": rates}
        if not self.rules:
            self.call("advance", "", **clock)
            return
        segments = []
        for short, changes in self.rules.items():
            place = self.step.layout.places[short]
            segments.append(Segment(place.offset, place.size, changes, place.columns, place.pitch))
            for index in self.states:
                self.add(f"{short}.state{index}", place.shape, "real", "state")
        self.call(
            "update",
            rule.kind,
            params=Ref("params"),
            grads=Ref("grads"),
            states=tuple(Ref(f"state{index}") for index in self.states),
            segments=tuple(segments),
            **clock,
            shadow=Ref("shadow") if self.mixed else None,
            scaled=True if self.step.scaled else None,
        )

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
        step, calls = self.step, tuple(self.calls)
        sizes = step.real_bytes, step.compute_bytes
        return Program(self.values, calls, arenas, frozenset(trained), *sizes, resident=step.resident)


class MembersBuilder(Builder):
    """Builds the program of a network whose members share weights: each product stands between what members have.

    The members are rows of the batch, one after another. Before the product of layer l a row is multiplied by its
    member's r, and after it by s, to which b is added (Wen, Tran and Ba, "BatchEnsemble", 2020); each member has its
    output layer. ``affine_members`` picks the rows; a first product of codes does so itself, has the factors r within
    it, and they their gradients with the weights.
    """

    def gathers(self) -> bool:
        """Return whether the first product has a copy of the rows of its batch."""
        return self.step.inputs.coding is not None

    def hidden(self, layer: int) -> None:
        """A hidden layer up to its product, which has no bias."""
        width, operands = self.net.sizes[layer + 1], self.operands(layer)
        operands["b"] = self.add(f"zeros{layer}", (width,), "real", "control")
        if layer == 0 and self.gathers():
            operands |= {"r": Ref("r0"), "counters": self.counters, **self.picked(0)}
        else:
            operands["x"] = self.mix(layer)
        y = self.work(f"u{layer + 1}", width)
        self.call("linear", "", [self.product(layer)], **operands, y=y, activation="identity")

    def outputs(self, name: str, activation: dict[str, Any]) -> Ref:
        """The output layer of each member."""
        last = self.last
        h, z = self.mix(last), self.work(name, self.net.sizes[-1])
        self.call("linear_members", "", [self.product(last)], x=h, w=self.weight(last), b=Ref(f"b{last}"), z=z)
        return z

    def loss(self, spec: LossSpec) -> None:
        """The output layer of each member, the loss and its gradient."""
        z = self.outputs(f"z{self.net.layers}", {})
        self.call("loss_grad", spec.kind, z=z, **self.loss_operands(spec))

    def mixing(self, layer: int) -> dict[str, Any]:
        """The operands of what members do before the product of ``layer``: after that of the layer before it, if any,
        and without factors r for the output layers."""
        activation = self.activation(layer - 1) if layer else {}
        return {
            "x": Ref(f"u{layer}" if layer else "x"),
            "rows": None if layer else self.rows,
            "s": Ref(f"s{layer - 1}") if layer else None,
            "b": Ref(f"b{layer - 1}") if layer else None,
            "r": Ref(f"r{layer}") if layer < self.last else None,
            **{name: activation.get(name) for name in ("activation", "slope")},
            "dropout": self.dropout(layer - 1) if layer else None,
        }

    def mix(self, layer: int) -> Ref:
        """The inputs of a layer's product, for all members."""
        mixing, width = self.mixing(layer), self.net.sizes[layer]
        y, dropout, label = self.work(f"h{layer}", width), mixing["dropout"], mixing["activation"] or ""
        self.call(
            "affine_members",
            label if dropout is None else f"{label} dropout {dropout.rate:g}",
            y=y,
            **mixing,
            counters=self.counters,
            keep=self.work(f"keep{layer}", width, "bool") if dropout and self.traits.stores_masks else None,
        )
        return y

    def backward(self) -> None:
        """From dz of the output layers through the products, to the gradients by what members have of their own."""
        # a product of codes is the end
        for layer in range(self.last, self.gathers() - 1, -1):
            # is anything trained below?
            if not any(int(short[1:]) < layer or short == f"r{layer}" for short in self.rules):
                return
            outputs, inputs = self.net.sizes[layer + 1], self.net.sizes[layer]
            dy, products = self.work(f"dh{layer}", inputs), [(self.batch, inputs, outputs)]
            if layer == self.last:
                dz = Ref(f"dz{layer + 1}")
                self.call("grad_input_members", "", products, dz=dz, w=self.weight(layer), dx=dy)
            else:
                ends: dict[str, Any] = {"y": Ref(f"h{layer}"), "dz_prev": dy, "activation": "identity"}
                dz = Ref(f"du{layer + 1}")
                self.call("grad_input", "identity", products, dz=dz, w=self.weight(layer), **ends)
            mixing = self.mixing(layer)
            self.call(
                "grad_affine_members",
                mixing["activation"] or "",
                dy=dy,
                **mixing,
                dx=self.work(f"du{layer}", inputs) if layer else None,
                ds=self.gradient(f"s{layer - 1}"),
                db=self.gradient(f"b{layer - 1}"),
                dr=self.gradient(f"r{layer}"),
                keep=Ref(f"keep{layer}") if mixing["dropout"] and self.traits.stores_masks else None,
                rule=self.step.rule,
                counters=self.counters,
            )

    def weight_gradients(self, rule: UpdateRule) -> None:
        """The gradients by the output layers of the members, and by the shared weights."""
        last, common = self.last, {"rule": rule, "counters": self.counters}
        if {f"w{last}", f"b{last}"} & self.rules.keys():
            products = [self.by_weight(last)] if f"w{last}" in self.rules else []
            by_head = {"dw": self.gradient(f"w{last}"), "db": self.gradient(f"b{last}")}
            self.call(
                "grad_weight_members", "", products, dz=Ref(f"dz{last + 1}"), x=Ref(f"h{last}"), **by_head, **common
            )
        shared = [layer for layer in self.having("w") if layer < last]
        layers: list[dict[str, Any]] = [
            {"dz": Ref(f"du{layer + 1}"), "x": Ref(f"h{layer}"), "dw": self.gradient(f"w{layer}"), "db": None}
            for layer in shared
        ]
        if self.gathers() and {"w0", "r0"} & self.rules.keys():
            if 0 not in shared:
                layers.insert(0, {"dz": Ref("du1"), "dw": None, "db": None})
            factors = {"r": Ref("r0"), "w": self.weight(0), "dr": self.gradient("r0")}
            layers[0] |= {"x": self.gathered, "coding": self.step.inputs.coding, **factors}
        if layers:
            products = [self.by_weight(layer) for layer in shared]
            self.call("grad_weight", "", products, layers=tuple(layers), slopes=(), **common)
