"""From a network, a loss and an optimizer to the program of a training step, or of the forward pass alone.

A step of L layers is L forward calls (the last with loss and dz), L - 1 ``grad_input`` and one grouped
``grad_weight_update`` at the end, when nothing reads the old weights any more: 2L calls. Clipping and accumulation
need the gradients of the whole network at once: then ``grad_weight`` and ``update`` stand at the end. Privacy puts
``clip_examples`` before them. Adversarial training begins with the calls that move the batch; what ``Free`` adds to a
batch is a value that stays from one step to the next. The members of a network are rows of the batch, one after
another, and each product stands between what they have of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from fusemlp.describe.network import MLP
from fusemlp.program import adversarial, members
from fusemlp.program.adversarial import Attack, Intervals
from fusemlp.program.layout import RATE_ROWS, REMEMBERED, Layout, short_names
from fusemlp.program.program import Call, Program, Ref, Value
from fusemlp.program.sharding import Sharding
from fusemlp_kernels.contract import (
    COUNTERS,
    HYPER,
    NEEDS_Z,
    RATE_COLUMNS,
    STATS,
    Dropout,
    LossSpec,
    Noise,
    Ridge,
    Segment,
    TensorRule,
    Traits,
    UpdateRule,
    batch_parts,
)
from fusemlp_kernels.ops import OPS

# Return, for a parameter's state_dict name, if it is trained, and its changes to the optimizer's rule.
OptionsFor = Callable[[str], tuple[bool, TensorRule]]


@dataclass(frozen=True)
class Inputs:
    """The data that a program is given.

    ``rows`` examples; with ``indexed`` a batch is picked from them by row index, else they are the batch. A network
    with members needs the indices: each row of the data stands there once for each member.
    ``weighted``: there is a weight for each row. ``class_weighted``: the loss has class weights.
    """

    rows: int
    indexed: bool = False
    weighted: bool = False
    class_weighted: bool = False


class Privacy(NamedTuple):
    """The largest norm of a row's gradient, and the noise of their sum."""

    clip: float
    noise: Noise


class Step(NamedTuple):
    """A training step over batches of ``batch_size`` rows, of each member if the network has some; without ``rule`` a
    forward pass, without ``spec`` up to y.

    ``trained``: the changes of the rule for each tensor that is trained, by its short name.

    ``compute_bytes``: bytes of an element that the matrix products read, if they do not read the parameters.
    ``scaled``: the gradients carry the loss scale, and a batch in which they overflow is skipped.

    With ``keep_gradients`` the last two calls are ``grad_weight`` and ``update``, on every backend and for every
    optimizer: between them the gradients can be read and changed. ``most_parts``: into how many parts the gradients may
    cut the batch (``contract.batch_parts``). ``resident``: the calls run in one loop over many steps; ``ridge``: a
    penalty beside the loss, for such a loop. With ``privacy`` the gradients are sums of clipped ones, with noise. With
    ``attack`` the step trains on the moved batch, with ``intervals`` on the worst case beside the batch. With
    ``sharding`` the calls before the first collective are of one shard, which has ``batch_size`` rows.

    With ``gradient`` 0 a forward pass goes back to dx, the gradient by x: of the loss, or without ``spec`` of the
    outputs weighed by the data ``seed`` (batch_size, N). With ``gradient`` 1 it begins at h1, the first hidden layer's
    output, which is data (so is z1 where the derivative needs it), and ends at dz1. Nothing is dropped.
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
    ridge: Ridge | None = None
    gradient: int | None = None
    privacy: Privacy | None = None
    attack: Attack | None = None
    sharding: Sharding | None = None
    intervals: Intervals | None = None


def lower_training(
    net: MLP,
    spec: LossSpec,
    rule: UpdateRule,
    options_for: OptionsFor,
    batch_size: int,
    traits: Traits,
    layout: Layout,
    inputs: Inputs,
    *,
    seed: int,
    **others: Any,
) -> Program:
    """Return the program of one training step; ``others`` are the other fields of ``Step``."""
    trained = []
    for short, name in short_names(net).items():
        trainable, changes = options_for(name)
        if trainable:
            trained.append((short, changes))
    # without dropout no call has the seed, and models that differ in it alone have one program
    seed = seed if any(net.dropouts) else 0
    given = {"rule": rule, "trained": tuple(trained), "seed": seed, **others}
    return lower(Step(net, batch_size, traits, layout, inputs, spec, **given))


@lru_cache(maxsize=REMEMBERED)
def lower(step: Step) -> Program:
    """Return the program of a step; the models of a fleet share it, so it is remembered."""
    build, last = Builder(step), step.net.layers - 1
    if step.rule is not None:
        build.add("hyper", (HYPER,), "float64", "control")
        build.add("rates", (1 + RATE_ROWS, RATE_COLUMNS), "float64", "control")
    # where nothing is trained, there is nothing to do for
    intervals = step.intervals if build.rules else None
    if intervals is not None:
        adversarial.magnitudes(build)
    if step.attack is not None and build.beta is None:
        (adversarial.add_carried if step.attack.carried else adversarial.attack)(build, step.attack)
    build.hidden(step.gradient or 0)
    if step.attack is not None and build.beta is not None:
        adversarial.trades(build, step.attack, build.beta)
    elif step.spec is not None:
        build.loss(step.spec)
    elif step.net.members > 1:
        members.heads(build, "y")
    elif step.gradient is None or build.top > last:
        build.linear(last, "y", build.activation(last))
    if intervals is not None and step.spec is not None:
        adversarial.worst_case(build, intervals, step.spec)
    if step.net.members > 1:
        if step.rule is not None:
            members.back(build)
    else:
        for layer in range(build.top, build.first, -1):
            build.grad_input(layer)
    if step.attack is not None and step.attack.carried:
        adversarial.move_carried(build, step.attack)
    if step.rule is not None:
        build.update(step.rule)
    return build.program()


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
        given = [("h1" if start else "x", start)]
        given += [("z1", 1)] if start and self.net.activations[0].name in NEEDS_Z else []
        given += [("seed", -1)] if step.gradient is not None and step.spec is None else []
        for name, level in given:
            self.add(name, (inputs.rows, self.net.sizes[level]), self.matrix, "data")
        if self.top == self.net.layers:
            self.add("unit", (self.net.sizes[-1],) * 2, self.matrix, "data")
        self.counters = self.add("counters", (COUNTERS,), "int64", "control")
        self.rows = self.add("rows", (self.batch,), "int64", "control") if inputs.indexed else None
        # whether a batch that is picked by row is copied first
        self.copies = inputs.indexed and not self.traits.gathers_in_load
        self.beta = None if step.attack is None else step.attack.beta
        # those that a gradient by weights is summed over
        self.batches = 1 + (self.beta is not None) + 2 * (step.intervals is not None)
        attacked = step.attack is not None and self.beta is None
        gathers = self.copies and not attacked and self.members == 1
        self.gathered = self.work("gathered", self.net.sizes[0]) if gathers else None
        # the rows of x, where the first layer picks its batch from it
        self.picks = None if attacked else self.rows
        # whether the calls are those of the attack
        self.attacking = False
        # the end of the names of what the calls make: of the batch, or of the moved one beside it
        self.side = ""

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
        return {"x": Ref(f"h{layer}{self.side}") if layer else self.x, "w": self.weight(layer), "b": Ref(f"b{layer}")}

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
        return self.add(f"dslope{layer}{self.side}", (1,), "real", "work") if learned else None

    def dropout(self, layer: int) -> Dropout | None:
        """The dropout after a layer, in training."""
        rate = self.net.dropouts[layer] if self.step.rule is not None and not self.attacking else 0.0
        return Dropout(rate, layer, self.step.seed) if rate else None

    def hidden(self, first: int = 0) -> None:
        """The hidden layers forward, from ``first`` on."""
        for layer in range(first, self.net.layers - 1):
            if self.members > 1:
                members.hidden(self, layer)
            else:
                self.linear(layer, f"h{layer + 1}{self.side}", self.activation(layer))

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
            z=self.work(f"z{layer + 1}{self.side}", width) if layer >= self.first and name in NEEDS_Z else None,
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
            self.call("loss_grad", spec.kind, z=members.heads(self, f"z{last + 1}"), **operands)
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
            dz=Ref("seed" if seeded else f"dz{layer + 1}{self.side}"),
            w=self.weight(layer) if layer < end else Ref("unit"),
            y=self.x if layer == 0 else Ref(f"h{layer}{self.side}" if layer < end else "y"),
            dz_prev=self.work(f"dz{layer}{self.side}" if layer else "dx", inputs),
            **activation,
            z=Ref(f"z{layer}{self.side}") if name in NEEDS_Z else None,
            dslope=self.slope_gradient(before) if layer else None,
            dropout=dropout,
            counters=self.counters if dropout else None,
            keep=Ref(f"keep{layer}") if dropout and self.traits.stores_masks else None,
        )

    def update(self, rule: UpdateRule) -> None:
        """The gradients by the parameters and the update."""
        step, places = self.step, self.step.layout.places
        clock: dict[str, Any] = {"rule": rule, "counters": self.counters}
        applied: dict[str, Any] = {"hyper": Ref("hyper"), "rates": Ref("rates")}
        if not self.rules:
            self.call("advance", "", **clock, **applied)
            return
        # models of one launch have the same calls, whatever their numbers
        penalised = step.ridge is not None and (step.ridge.strength != 0.0 or self.traits.resident is not None)
        clipped = step.scaled or rule.clip_norm is not None
        private = step.privacy
        sharding = step.sharding
        changed = step.keep_gradients or penalised or sharding is not None or self.members > 1
        whole = changed or clipped or rule.accumulate > 1
        parts = 1
        if not (whole or step.resident or step.intervals):
            weights = sum(places[short].size for short in self.rules)
            parts = min(step.most_parts, batch_parts(self.traits, self.batch, weights))
        one = (self.batches == 1 or self.traits.on_host) and parts == 1 and private is None
        fused = rule.kind in self.traits.fused_updates and not whole and one
        for short in self.rules:
            shape = places[short].shape
            if not fused:
                self.add(f"d{short}", shape, "real", "gradient")
            for index in self.states:
                self.add(f"{short}.state{index}", shape, "real", "state")
        shared = self.members > 1
        gradients: dict[str, Any] = {
            "layers": members.gradients(self, **clock)
            if shared
            else tuple(self.layer_gradient(layer, fused=fused) for layer in self.having("wb")),
            "slopes": tuple(
                {**self.slope_gradients(layer), **self.tensor("s", layer, fused=fused)}
                for layer in self.having("s")
                if not shared
            ),
            **clock,
        }
        if private is not None:
            self.call(
                "clip_examples",
                f"{private.clip:g}",
                layers=tuple(
                    {
                        **self.inputs(layer),
                        "w_trained": f"w{layer}" in self.rules,
                        "b_trained": f"b{layer}" in self.rules,
                    }
                    for layer in self.having("wb")
                ),
                clip=private.clip,
                counters=self.counters,
            )
        if sharding is not None:
            gradients["rule"] = replace(rule, accumulate=1)
        heads = [self.net.layers - 1] if shared else []
        products = [self.by_weight(layer) for layer in self.having("w") if layer not in heads]
        if fused:
            self.call("grad_weight_update", rule.kind, products, **gradients, **applied)
            return
        # gradients that are changed before the update have another norm
        normed = self.traits.norms_gradients and clipped and not (changed or step.resident)
        common: dict[str, Any] = {"norm": self.add("norm", (1,), "float64", "work")} if normed else {}
        if parts > 1:
            common |= {"parts": parts, "part": step.layout.size}
        if not shared or gradients["layers"]:
            self.call("grad_weight", f"in {parts} parts" if parts > 1 else "", products, **gradients, **common)
        if penalised:
            self.call(
                "penalty",
                "ridge",
                layers=tuple({"w": Ref(f"w{layer}"), "dw": Ref(f"dw{layer}")} for layer in self.having("w")),
                ridge=step.ridge,
                shares=Ref("shares"),
                counters=self.counters,
                stats=Ref("stats"),
            )
        if sharding is not None:
            reduced: dict[str, Any] = {"grads": Ref("grads"), "stats": Ref("stats"), "rule": rule}
            op = "reduce_scatter" if sharding.slices else "all_reduce"
            self.call(op, str(sharding), **reduced, counters=self.counters)
            if sharding.slices and clipped:
                # the norm is that of all gradients, added in one order, and tells of an overflow in any
                self.call("all_gather", "", grads=Ref("grads"), rule=rule, counters=self.counters)
        self.call(
            "update",
            rule.kind,
            params=Ref("params"),
            grads=Ref("grads"),
            states=tuple(Ref(f"state{index}") for index in self.states),
            segments=tuple(
                Segment(place.offset, place.size, changes, place.shape[-1], place.pitch)
                for place, changes in ((places[short], changes) for short, changes in self.rules.items())
            ),
            **applied,
            **clock,
            **common,
            shadow=Ref("shadow") if self.mixed else None,
            scaled=True if step.scaled else None,
            noise=None if private is None else private.noise,
            rows=None if private is None else self.rows,
        )
        if sharding is not None and sharding.slices:
            average = None if rule.average is None else Ref(f"state{rule.average}")
            self.call("all_gather", "", params=Ref("params"), average=average, rule=rule, counters=self.counters)

    def by_weight(self, layer: int) -> tuple[int, int, int]:
        """M, N, K of the gradient by a layer's weights."""
        return self.net.sizes[layer + 1], self.net.sizes[layer], self.batch * self.batches

    def having(self, kinds: str) -> list[int]:
        """The layers with a trained tensor of one of these kinds."""
        return [layer for layer in range(self.net.layers) if any(f"{kind}{layer}" in self.rules for kind in kinds)]

    def slope_gradients(self, layer: int) -> dict[str, Any]:
        """The gradients by a slope, one for each batch."""
        names = {"dslope": f"dslope{layer}", "dslope2": f"dslope{layer}.adv"}
        return {operand: Ref(name) for operand, name in names.items() if name in self.values}

    def inputs(self, layer: int) -> dict[str, Any]:
        """The operands of which the gradients by a layer's weights and biases are made."""
        given: dict[str, Any] = {"dz": Ref(f"dz{layer + 1}"), "x": Ref(f"h{layer}")}
        if layer == 0:
            given["x"] = self.gathered or self.x
            if self.picks is not None and self.gathered is None:
                given["rows"] = self.picks
        if self.beta is not None:
            given |= {"dz2": Ref(f"dz{layer + 1}.adv"), "x2": Ref(f"h{layer}.adv" if layer else "adv")}
        if self.step.intervals is not None:
            others = {"dz2": "dzc", "dspread": "dzr"}
            given |= {operand: Ref(f"{name}{layer + 1}") for operand, name in others.items()}
            given |= {"x2": Ref(f"centre{layer}"), "radius": Ref(f"radius{layer}"), "signs": Ref(f"w{layer}")}
        return given

    def layer_gradient(self, layer: int, *, fused: bool) -> dict[str, Any]:
        """One of the ``layers`` of the gradients by weights and biases."""
        return {**self.inputs(layer), **self.tensor("w", layer, fused=fused), **self.tensor("b", layer, fused=fused)}

    def tensor(self, kind: str, layer: int, *, fused: bool) -> dict[str, Any]:
        """The operands of a tensor where its gradient is computed; ``fused``: and applied."""
        short = f"{kind}{layer}"
        names = (
            ("grad", "param", "state", "rule") if kind == "s" else (f"d{kind}", kind, f"{kind}_state", f"{kind}_rule")
        )
        gradient, param, state, rule = names
        if short not in self.rules:
            return {param if fused else gradient: None}
        if not fused:
            return {gradient: Ref(f"d{short}")}
        states = tuple(Ref(f"{short}.state{index}") for index in self.states)
        found = {param: Ref(short), state: states, rule: self.rules[short]}
        return {**found, "w_shadow": Ref(f"{short}.shadow")} if self.mixed and kind == "w" else found

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
