"""From a network, a loss and an optimizer to the program of a training step, or of the forward pass alone.

A step of L layers is L forward calls (the last with loss and dz), L - 1 ``grad_input`` and one grouped
``grad_weight_update`` at the end, when nothing reads the old weights any more: 2L calls. Clipping and accumulation
need the gradients of the whole network at once: then ``grad_weight`` and ``update`` stand at the end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fusemlp.describe.network import MLP
from fusemlp.program.layout import RATE_ROWS, REMEMBERED, Layout, short_names
from fusemlp.program.program import Call, Program, Ref, Value
from fusemlp_kernels.contract import (
    COUNTERS,
    HYPER,
    NEEDS_Z,
    RATE_COLUMNS,
    STATS,
    Dropout,
    LossSpec,
    Ridge,
    Segment,
    TensorRule,
    Traits,
    UpdateRule,
    batch_parts,
)

# Return, for a parameter's state_dict name, if it is trained, and its changes to the optimizer's rule.
OptionsFor = Callable[[str], tuple[bool, TensorRule]]


@dataclass(frozen=True)
class Inputs:
    """The data that a program is given.

    ``rows`` examples; with ``indexed`` a batch is picked from them by row index, else they are the batch.
    ``weighted``: there is a weight for each row. ``class_weighted``: the loss has class weights.
    """

    rows: int
    indexed: bool = False
    weighted: bool = False
    class_weighted: bool = False


class _Builder:
    """Collects the values and calls of a program."""

    def __init__(
        self, net: MLP, batch_size: int, traits: Traits, layout: Layout, inputs: Inputs, *, mixed: bool = False
    ) -> None:
        self.net = net
        self.batch = batch_size
        self.traits = traits
        self.inputs = inputs
        self.layout = layout
        self.values: dict[str, Value] = {}
        self.calls: list[Call] = []
        self.mixed = mixed
        # the type of what the matrix products read
        self.matrix = "compute" if mixed else "real"
        for name, place in layout.places.items():
            self.add(name, place.shape, "real", "parameter")
            if mixed and name.startswith("w"):
                self.add(f"{name}.shadow", place.shape, "compute", "shadow")
        self.x = self.add("x", (inputs.rows, net.sizes[0]), self.matrix, "data")
        self.counters = self.add("counters", (COUNTERS,), "int64", "control")
        self.rows = self.add("rows", (batch_size,), "int64", "control") if inputs.indexed else None
        copied = inputs.indexed and not traits.gathers_in_load
        self.gathered = self.add("gathered", (batch_size, net.sizes[0]), self.matrix, "work") if copied else None

    def add(self, name: str, shape: tuple[int, ...], dtype: str, kind: str) -> Ref:
        self.values[name] = Value(name, shape, dtype, kind)
        return Ref(name)

    def work(self, name: str, columns: int, dtype: str | None = None) -> Ref:
        return self.add(name, (self.batch, columns), dtype or self.matrix, "work")

    def weight(self, layer: int) -> Ref:
        """The weights as the matrix products read them."""
        return Ref(f"w{layer}.shadow" if self.mixed else f"w{layer}")

    def from_rows(self) -> dict[str, Any]:
        """Return the operands by which the first layer finds its batch."""
        found: dict[str, Any] = {}
        if self.rows is not None:
            found["rows"] = self.rows
        if self.gathered is not None:
            found["gathered"] = self.gathered
        return found

    def input_of(self, layer: int) -> Ref:
        return self.x if layer == 0 else Ref(f"h{layer}")

    def activation(self, layer: int) -> dict[str, Any]:
        """The operands that describe the activation behind a layer."""
        chosen = self.net.activations[layer]
        operands: dict[str, Any] = {"activation": chosen.name}
        if chosen.name == "leaky_relu":
            operands["slope"] = chosen.slope
        if chosen.name == "prelu":
            operands["slope_param"] = Ref(f"s{layer}")
        return operands

    def product(self, layer: int, *, order: str) -> tuple[int, int, int]:
        """M, N, K of a layer's product: forward, by the input ("input"), or by the weights ("weight")."""
        inputs, outputs = self.net.sizes[layer], self.net.sizes[layer + 1]
        return {
            "forward": (self.batch, outputs, inputs),
            "input": (self.batch, inputs, outputs),
            "weight": (outputs, inputs, self.batch),
        }[order]

    def linear(self, layer: int, *, output: str, keep_z: bool, dropout: Dropout | None = None) -> None:
        """A layer forward, with its activation."""
        width = self.net.sizes[layer + 1]
        operands: dict[str, Any] = {
            "x": self.input_of(layer),
            "w": self.weight(layer),
            "b": Ref(f"b{layer}"),
            "y": self.work(output, width),
            "counters": self.counters,
            **self.activation(layer),
        }
        label = self.net.activations[layer].name
        if layer == 0:
            operands |= self.from_rows()
        if keep_z and self.net.activations[layer].name in NEEDS_Z:
            operands["z"] = self.work(f"z{layer + 1}", width)
        if dropout is not None:
            operands["dropout"] = dropout
            label += f" dropout {dropout.rate:g}"
            if self.traits.stores_masks:
                operands["keep"] = self.work(f"keep{layer + 1}", width, "bool")
        self.calls.append(Call("linear", operands, label, (self.product(layer, order="forward"),)))

    def loss(
        self,
        spec: LossSpec,
        *,
        with_gradient: bool,
        hyper: Ref | None = None,
        ridge: Ridge | None = None,
        resident: bool = False,
    ) -> None:
        """The last layer, the loss and its gradient: one call where the backend can, else two.

        ``hyper``: the gradient is multiplied by its loss scale. A ``resident`` loop reads the targets through the rows.
        """
        net, last = self.net, self.net.layers - 1
        outputs = net.sizes[-1]
        integer = spec.kind == "cross_entropy" and not spec.soft
        shape = (self.inputs.rows,) if integer else (self.inputs.rows, outputs)
        dtype = "int64" if integer else "real"
        operands: dict[str, Any] = {
            "target": self.add("target", shape, dtype, "data"),
            "counters": self.counters,
            "stats": self.add("stats", (STATS,), "float64", "control"),
            "loss": spec,
            **self.activation(last),
        }
        if hyper is not None:
            operands["hyper"] = hyper
        if ridge is not None:
            operands |= {"ridge": ridge, "shares": self.add("shares", (1,), "float64", "work")}
        if self.inputs.weighted:
            operands["weight"] = self.add("weight", (self.inputs.rows,), "real", "data")
        if self.inputs.class_weighted:
            operands["class_weight"] = self.add("class_weight", (outputs,), "real", "control")
        if self.rows is not None:
            operands["rows"] = self.rows
            if not self.traits.gathers_in_load and not resident:
                batch_shape = (self.batch, *shape[1:])
                operands["target_rows"] = self.add("target_rows", batch_shape, dtype, "work")
                if self.inputs.weighted:
                    operands["weight_rows"] = self.add("weight_rows", (self.batch,), "real", "work")
        operands["dz"] = self.work(f"dz{net.layers}", outputs) if with_gradient else None
        if with_gradient and net.activations[last].name == "prelu":
            operands["dslope"] = self.add(f"dslope{last}", (1,), "real", "work")
        product = (self.product(last, order="forward"),)
        if outputs <= self.traits.widest_fused_output:
            layer = {"x": self.input_of(last), "w": self.weight(last), "b": Ref(f"b{last}")}
            if last == 0 and self.rows is not None:
                layer["x_rows"] = self.rows
            if last == 0 and self.gathered is not None:
                layer["gathered"] = self.gathered
            self.calls.append(Call("linear_loss_grad", {**layer, **operands}, spec.kind, product))
            return
        z = self.work(f"z{net.layers}", outputs)
        layer = {"x": self.input_of(last), "w": self.weight(last), "b": Ref(f"b{last}"), "y": z}
        if last == 0:
            layer |= self.from_rows()
        forward = {**layer, "activation": "identity", "counters": self.counters}
        self.calls.append(Call("linear", forward, "identity", product))
        self.calls.append(Call("loss_grad", {"z": z, **operands}, spec.kind))


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
    real_bytes: int,
    compute_bytes: int | None = None,
    scaled: bool = False,
    keep_gradients: bool = False,
    most_parts: int = 1,
    resident: bool = False,
    ridge: Ridge | None = None,
) -> Program:
    """The program of one training step over batches of ``batch_size`` rows.

    ``resident``: the calls run in one loop over many steps; ``ridge``: a penalty beside the loss, for such a loop.

    ``compute_bytes``: bytes of an element that the matrix products read, if they do not read the parameters.
    ``scaled``: the gradients carry the loss scale, and a batch in which they overflow is skipped.

    ``most_parts``: into how many parts the gradients may cut the batch (``contract.batch_parts``).

    With ``keep_gradients`` its last two calls are ``grad_weight`` and ``update``, on every backend and for every
    optimizer: between them the gradients can be read and changed.
    """
    options = tuple((short, *options_for(name)) for short, name in short_names(net).items())
    return _training(
        net,
        spec,
        rule,
        options,
        batch_size,
        traits,
        layout,
        inputs,
        # without dropout no call has the seed, and models that differ in it alone have one program
        seed=seed if any(net.dropouts) else 0,
        real_bytes=real_bytes,
        compute_bytes=compute_bytes,
        scaled=scaled,
        keep_gradients=keep_gradients,
        most_parts=most_parts,
        resident=resident,
        ridge=ridge,
    )


@lru_cache(maxsize=REMEMBERED)
def _training(
    net: MLP,
    spec: LossSpec,
    rule: UpdateRule,
    tensors: tuple[tuple[str, bool, TensorRule], ...],
    batch_size: int,
    traits: Traits,
    layout: Layout,
    inputs: Inputs,
    *,
    seed: int,
    real_bytes: int,
    compute_bytes: int | None,
    scaled: bool,
    keep_gradients: bool,
    most_parts: int,
    resident: bool,
    ridge: Ridge | None,
) -> Program:
    """``lower_training``, remembered: a fleet asks for the same program for each of its models."""
    build = _Builder(net, batch_size, traits, layout, inputs, mixed=compute_bytes is not None)
    options = {short: (trainable, changes) for short, trainable, changes in tensors}
    trained = {short for short, trainable, _ in tensors if trainable}
    layers = range(net.layers)
    # Below the first layer with something to train no gradient is needed.
    first = next((layer for layer in layers if trained & {f"{kind}{layer}" for kind in "wbs"}), net.layers)

    for layer in layers[:-1]:
        rate = net.dropouts[layer]
        build.linear(
            layer,
            output=f"h{layer + 1}",
            keep_z=layer >= first,
            dropout=Dropout(rate, layer, seed) if rate else None,
        )
    hyper = build.add("hyper", (HYPER,), "float64", "control")
    build.add("rates", (1 + RATE_ROWS, RATE_COLUMNS), "float64", "control")
    build.loss(
        spec,
        with_gradient=first < net.layers,
        hyper=hyper if scaled and trained else None,
        ridge=ridge,
        resident=resident,
    )
    for layer in range(net.layers - 1, first, -1):
        _grad_input(build, layer, seed)
    _weights(
        build,
        rule,
        options,
        trained,
        first,
        hyper,
        scaled=scaled,
        keep_gradients=keep_gradients,
        most_parts=1 if resident else most_parts,
        ridge=ridge,
        resident=resident,
    )
    states = tuple(f"state{i}" for i in range(rule.state_count))
    arenas = {
        "params": tuple(layout.places),
        "grads": tuple(f"d{short}" for short in layout.places if short in trained),
    }
    arenas |= {state: tuple(f"{short}.{state}" for short in layout.places if short in trained) for state in states}
    if build.mixed:
        arenas["shadow"] = tuple(f"{short}.shadow" for short in layout.places if short in trained and short[0] == "w")
    return Program(build.values, tuple(build.calls), arenas, frozenset(trained), real_bytes, compute_bytes, resident)


def _grad_input(build: _Builder, layer: int, seed: int) -> None:
    """From dz of ``layer`` to dz of the layer before it."""
    before = layer - 1
    width = build.net.sizes[layer]
    rate = build.net.dropouts[before]
    name = build.net.activations[before].name
    operands: dict[str, Any] = {
        "dz": Ref(f"dz{layer + 1}"),
        "w": build.weight(layer),
        "y": Ref(f"h{layer}"),
        "dz_prev": build.work(f"dz{layer}", width),
        **build.activation(before),
    }
    if name in NEEDS_Z:
        operands["z"] = Ref(f"z{layer}")
    if name == "prelu":
        operands["dslope"] = build.add(f"dslope{before}", (1,), "real", "work")
    if rate:
        operands["dropout"] = Dropout(rate, before, seed)
        operands["counters"] = build.counters
        if build.traits.stores_masks:
            operands["keep"] = Ref(f"keep{layer}")
    build.calls.append(Call("grad_input", operands, name, (build.product(layer, order="input"),)))


def _weights(
    build: _Builder,
    rule: UpdateRule,
    options: dict[str, tuple[bool, TensorRule]],
    trained: set[str],
    first: int,
    hyper: Ref,
    *,
    scaled: bool,
    keep_gradients: bool,
    most_parts: int,
    ridge: Ridge | None,
    resident: bool,
) -> None:
    """The gradients by the parameters and the update."""
    clock: dict[str, Any] = {"rule": rule, "counters": build.counters}
    if not trained:
        build.calls.append(Call("advance", {**clock, "hyper": hyper, "rates": Ref("rates")}))
        return
    # models of one launch have the same calls, whatever their numbers
    penalised = ridge is not None and (ridge.strength != 0.0 or build.traits.resident is not None)
    whole = keep_gradients or scaled or rule.clip_norm is not None or rule.accumulate > 1 or penalised
    weights = sum(build.layout.places[short].size for short in trained)
    parts = 1 if whole else min(most_parts, batch_parts(build.traits, build.batch, weights))
    fused = rule.kind in build.traits.fused_updates and not whole and parts == 1
    for short in build.layout.places:
        shape = build.layout.places[short].shape
        if short in trained:
            if not fused:
                build.add(f"d{short}", shape, "real", "gradient")
            for index in range(rule.state_count):
                build.add(f"{short}.state{index}", shape, "real", "state")

    def tensor(short: str, kind: str) -> dict[str, Any]:
        if short not in trained:
            return {kind: None} if fused else {f"d{kind}": None}
        if not fused:
            return {f"d{kind}": Ref(f"d{short}")}
        state = tuple(Ref(f"{short}.state{index}") for index in range(rule.state_count))
        found = {kind: Ref(short), f"{kind}_state": state, f"{kind}_rule": options[short][1]}
        if build.mixed and kind == "w":
            found["w_shadow"] = Ref(f"{short}.shadow")
        return found

    layers, slopes, products = [], [], []
    for layer in range(first, build.net.layers):
        if {f"w{layer}", f"b{layer}"} & trained:
            given: dict[str, Any] = {"dz": Ref(f"dz{layer + 1}"), "x": build.input_of(layer)}
            if layer == 0 and build.gathered is not None:
                given["x"] = build.gathered
            elif layer == 0 and build.rows is not None:
                given["rows"] = build.rows
            layers.append({**given, **tensor(f"w{layer}", "w"), **tensor(f"b{layer}", "b")})
            if f"w{layer}" in trained:
                products.append(build.product(layer, order="weight"))
        slope = f"s{layer}"
        if slope in trained:
            given = {"dslope": Ref(f"dslope{layer}")}
            if fused:
                state = tuple(Ref(f"{slope}.state{index}") for index in range(rule.state_count))
                given |= {"param": Ref(slope), "state": state, "rule": options[slope][1]}
            else:
                given["grad"] = Ref(f"d{slope}")
            slopes.append(given)
    operands = {"layers": tuple(layers), "slopes": tuple(slopes), **clock}
    if fused:
        operands |= {"hyper": hyper, "rates": Ref("rates")}
        build.calls.append(Call("grad_weight_update", operands, rule.kind, tuple(products)))
        return
    # gradients that are changed before the update have another norm
    normed = build.traits.norms_gradients and not (keep_gradients or penalised or resident)
    normed = normed and (scaled or rule.clip_norm is not None)
    norm = {"norm": build.add("norm", (1,), "float64", "work")} if normed else {}
    split = {"parts": parts, "part": build.layout.size} if parts > 1 else {}
    label = f"in {parts} parts" if parts > 1 else ""
    build.calls.append(Call("grad_weight", {**operands, **norm, **split}, label, tuple(products)))
    if penalised:
        weights_of = [f"w{layer}" for layer in range(build.net.layers) if f"w{layer}" in trained]
        penalty = {
            "layers": tuple({"w": Ref(short), "dw": Ref(f"d{short}")} for short in weights_of),
            "ridge": ridge,
            "shares": Ref("shares"),
            "counters": build.counters,
            "stats": Ref("stats"),
        }
        build.calls.append(Call("penalty", penalty, "ridge"))
    segments = tuple(
        Segment(place.offset, place.size, options[short][1])
        for short, place in build.layout.places.items()
        if short in trained
    )
    update = {
        "params": Ref("params"),
        "grads": Ref("grads"),
        "states": tuple(Ref(f"state{index}") for index in range(rule.state_count)),
        "segments": segments,
        "hyper": hyper,
        "rates": Ref("rates"),
        **clock,
        **norm,
        **split,
    }
    if build.mixed:
        update["shadow"] = Ref("shadow")
    if scaled:
        update["scaled"] = True
    build.calls.append(Call("update", update, rule.kind))


@lru_cache(maxsize=REMEMBERED)
def lower_inference(
    net: MLP,
    batch_size: int,
    traits: Traits,
    layout: Layout,
    *,
    spec: LossSpec | None,
    inputs: Inputs,
    real_bytes: int,
    compute_bytes: int | None = None,
) -> Program:
    """The forward pass over ``batch_size`` rows, without dropout: with ``spec`` up to the loss, else up to y.

    There are no other numbers in it than the network's and the loss's, and the same program serves all models.
    """
    build = _Builder(net, batch_size, traits, layout, inputs, mixed=compute_bytes is not None)
    for layer in range(net.layers - 1):
        build.linear(layer, output=f"h{layer + 1}", keep_z=False)
    if spec is None:
        build.linear(net.layers - 1, output="y", keep_z=False)
    else:
        build.loss(spec, with_gradient=False)
    arenas = {"params": tuple(layout.places)}
    return Program(build.values, tuple(build.calls), arenas, frozenset(), real_bytes, compute_bytes)
