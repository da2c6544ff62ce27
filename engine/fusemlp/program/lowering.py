"""From a network, a loss and an optimizer to the program of a training step, or of the forward pass alone.

Encodings, normalisation and residual blocks are calls beside the products. The encoding of the inputs is the first
call, and the other calls read what it gives in place of x. Back to the inputs, the gradient by the encoded ones goes
through the same op.

A layer that has a norm keeps its product, and what follows it becomes calls. Forward, ``normalise`` does the rest of
the layer, and ``add`` ends a block. Backward, the gradients of the two ways into a block are added, and
``grad_normalise`` goes on from there. A layer whose output goes into a block is cut in two even without a norm, since
its activation's derivative comes after that sum.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from fusemlp.describe.optimizers import Optimizer
from fusemlp.program.builder import Builder, MembersBuilder, Step
from fusemlp.program.layout import REMEMBERED
from fusemlp.program.program import Call, Program, Ref, Value
from fusemlp_kernels.contract import OWN, TensorRule, UpdateRule, batch_parts
from fusemlp_kernels.ops import OPS


def trained_by(optimizer: Optimizer, names: Mapping[str, str]) -> tuple[tuple[str, TensorRule], ...]:
    """Return the tensors that an optimizer trains, as ``Step.trained`` has them; ``names``: see ``short_names``."""
    options = [(short, *optimizer.options_for(name)) for short, name in names.items()]
    return tuple([(short, changes) for short, trainable, changes in options if trainable])


def lower(step: Step) -> Program:
    """Return the program of a step. The models of a fleet share it, so it is remembered."""
    # without dropout no call has the seed, and models that differ in it alone have one program
    return lowered(step if any(step.net.dropouts) else step._replace(seed=0))


@lru_cache(maxsize=REMEMBERED)
def lowered(step: Step) -> Program:
    """Return the program of a step as it is."""
    program = plain(step)
    for change in step.passes:
        program = change(program, step)
    return fuse(program, step)


def plain(step: Step) -> Program:
    """Return the program of a step before its passes."""
    whole, step = step, step._replace(net=step.net.without_encoding)
    build = MembersBuilder(step) if step.net.members > 1 else Builder(step)
    for layer in range(step.gradient or 0, step.layers or build.last):
        build.hidden(layer)
    if step.spec is not None and step.spec.kind == OWN:
        build.own_loss(step.spec)
    elif step.spec is not None:
        build.loss(step.spec)
    elif step.layers is None and (step.gradient is None or build.top > build.last):
        build.outputs("y", build.activation(build.last))
    build.backward()
    if step.rule is not None:
        if build.rules:
            build.weight_gradients(step.rule)
        build.update(step.rule)
    return encode(blocks(build.program(), step), whole)


def fuse(program: Program, step: Step) -> Program:
    """Return the program with ``grad_weight_update`` for its last two calls, or with their common work cut.

    The latter is the norm of the gradients, which ``grad_weight`` computes for clipping, or the stretches of a large
    batch. Gradients that another call changes, or the caller, have another norm: their program stays as it is.
    """
    rule, written = step.rule, {name for call in program.calls[:-2] for name in call.writes}
    tail = tuple(call.op for call in program.calls[-2:])
    if rule is None or step.keep_gradients or tail != ("grad_weight", "update"):
        return program
    factors = any("r" in layer for layer in program.calls[-2].operands["layers"])
    if factors or any(program.values[name].kind == "gradient" for name in written):
        return program
    *others, gradients, update = program.calls
    if step.scaled or rule.clip_norm is not None or rule.accumulate > 1:
        if (rule.clip_norm is None and not step.scaled) or step.resident or not step.traits.norms_gradients:
            return program
        norm = {"norm": Value("norm", (1,), "float64", "work")}
        calls = [call.but(norm=Ref("norm")) for call in (gradients, update)]
        return replace(program, values={**program.values, **norm}, calls=(*others, *calls))
    weights = sum(step.layout.places[short].size for short in program.trainable)
    batch = step.batch_size * step.net.members
    parts = 1 if step.resident else min(step.most_parts, batch_parts(step.traits, batch, weights))
    if parts > 1:
        cut = {"parts": parts, "part": step.layout.size}
        gradients = replace(gradients.but(**cut), label=f"in {parts} parts")
        return replace(program, calls=(*others, gradients, update.but(**cut)))
    if rule.kind not in step.traits.fused_updates or "noise" in update.operands:
        return program
    values = {name: value for name, value in program.values.items() if value.kind != "gradient"}
    return replace(program, values=values, calls=(*others, _fused(gradients, update, step)))


def _fused(gradients: Call, update: Call, step: Step) -> Call:
    """Return the call that updates each tensor where its gradient is computed."""
    rules, states = dict(step.trained), len(update.operands["states"])

    def tensor(gradient: Ref | None, prefix: str, param: str) -> dict[str, Any]:
        if gradient is None:
            return {param: None}
        short = gradient.name.removeprefix("d")
        state = tuple(Ref(f"{short}.state{index}") for index in range(states))
        return {param: Ref(short), f"{prefix}state": state, f"{prefix}rule": rules[short]}

    layers = []
    for layer in gradients.operands["layers"]:
        inputs = {name: value for name, value in layer.items() if name not in ("dw", "db")}
        fused = {**inputs, **tensor(layer["dw"], "w_", "w"), **tensor(layer["db"], "b_", "b")}
        if "shadow" in update.operands and layer["dw"] is not None:
            fused["w_shadow"] = Ref(f"{fused['w'].name}.shadow")
        layers.append(fused)
    slopes = tuple(
        {"dslope": slope["dslope"], **tensor(slope["grad"], "", "param")} for slope in gradients.operands["slopes"]
    )
    clock = {name: update.operands[name] for name in ("rule", "counters", "hyper", "rates")}
    operands = {"layers": tuple(layers), "slopes": slopes, **clock}
    return Call("grad_weight_update", operands, update.label, gradients.products)


# The changes of a product's call where the rest of its layer is a call of its own.
_PLAIN = {"activation": "identity", **dict.fromkeys(("slope", "slope_param", "z", "dslope", "dropout", "keep"))}
_HIDDEN, _GRADIENT = re.compile(r"h(\d+)"), re.compile(r"dz(\d+)")
_REST = ("activation", "slope", "dropout", "counters", "keep")


def blocks(program: Program, step: Step) -> Program:
    """Return the program of a step with the norms and the residual blocks of its network."""
    net = step.net
    if not (net.norms or net.blocks):
        return program
    build = _Blocks(program, step)
    calls = [*build.opening(), *(new for call in program.calls for new in build.changed(call))]
    return replace(program, values=build.values, calls=tuple(calls))


class _Blocks:
    """The values and the changed calls of a program; layers are counted from 1, as in h1."""

    def __init__(self, program: Program, step: Step) -> None:
        self.step, self.net, self.values = step, step.net, dict(program.values)
        self.ends = {last + 1: first for first, last in self.net.blocks}
        self.starts = {first: last + 1 for first, last in self.net.blocks}
        # the layers whose rest is a call of its own after their product: a block's last one has nothing but a sum
        norms = {layer + 1 for layer, norm in enumerate(self.net.norms) if norm is not None}
        self.cut = (norms | self.starts.keys()) - self.ends.keys()
        self.rest: dict[int, dict[str, Any]] = {}
        # without a rule there is nothing but the gradient by the inputs
        self.trained = {} if step.rule is None else dict(step.trained)

    def like(self, name: str, other: str) -> Ref:
        """A value as another one."""
        self.values[name] = replace(self.values[other], name=name, kind="work")
        return Ref(name)

    def opening(self) -> Iterator[Call]:
        """Yield the rest of the first layer, where the program begins behind its product (``Step.gradient`` 1)."""
        if self.step.gradient == 1 and 1 in self.cut:
            self.values["u1"] = replace(self.values["h1"], name="u1")
            self.values.pop("z1", None)
            self.like("h1", "u1")
            activation = self.net.activations[0]
            slope = {} if activation.fixed_slope is None else {"slope": activation.fixed_slope}
            yield self.normalise(Call("linear", {"activation": activation.name, **slope}, activation.name), 1)

    def changed(self, call: Call) -> Iterator[Call]:
        """Yield what takes the place of a call."""
        if call.op == "linear" and (hidden := _HIDDEN.fullmatch(call.operands["y"].name)):
            yield from self.forward(call, int(hidden[1]))
        elif call.op == "grad_input" and (gradient := _GRADIENT.fullmatch(call.operands["dz_prev"].name)):
            yield from self.backward(call, int(gradient[1]))
        else:
            yield call

    def forward(self, call: Call, layer: int) -> Iterator[Call]:
        """The calls of a layer: its product, then the rest of it, or the sum that ends a block."""
        h = f"h{layer}"
        if layer in self.ends:
            yield call.but(y=self.like(f"r{layer}", h))
            skip = Ref(f"h{self.ends[layer]}")
            yield Call("add", {"a": Ref(f"r{layer}"), "b": skip, "y": Ref(h)}, f"input of layer {self.ends[layer] + 1}")
        elif layer in self.cut:
            self.values.pop(f"z{layer}", None)
            u = self.like(f"u{layer}", h)
            yield replace(call.but(**_PLAIN, y=u), label="identity")
            yield self.normalise(call, layer)
        else:
            yield call

    def normalise(self, call: Call, layer: int) -> Call:
        """The rest of a layer whose whole is ``call``."""
        norm, rest = self.net.norm(layer - 1), dict[str, Any](x=Ref(f"u{layer}"))
        if norm is not None:
            names = {"g": f"g{layer - 1}", "b": f"c{layer - 1}"}
            rest |= {"eps": norm.eps, "centred": norm.centred}
            rest |= {operand: Ref(name) for operand, name in names.items() if name in self.values}
        rest |= {name: call.operands[name] for name in _REST if name in call.operands}
        self.rest[layer] = rest
        label = call.label if norm is None else f"{norm.kind} {call.label}"
        return Call("normalise", {**rest, "y": Ref(f"h{layer}")}, label)

    def backward(self, call: Call, layer: int) -> Iterator[Call]:
        """The calls from dz of a layer to dz of the one before, whose number is ``layer``."""
        dz, skips = f"dz{layer}", layer in self.starts
        if layer in self.cut:
            call = replace(call.but(**_PLAIN, counters=None), label="identity")
        output = self.like(f"t{layer}" if skips else f"dh{layer}" if layer in self.cut else dz, dz)
        yield call.but(dz_prev=output)
        if skips:
            total = self.like(f"dh{layer}" if layer in self.cut else dz, dz)
            yield Call("add", {"a": output, "b": Ref(f"dz{self.starts[layer]}"), "y": total}, "both ways")
            output = total
        if layer in self.cut:
            yield self.grad_normalise(layer, output)

    def grad_normalise(self, layer: int, dy: Ref) -> Call:
        """Back through the rest of a layer."""
        rest, gradients = self.rest[layer], {}
        for operand, short in (("dg", f"g{layer - 1}"), ("db", f"c{layer - 1}")):
            if short in self.trained:
                shape = self.step.layout.places[short].shape
                self.values[f"d{short}"] = Value(f"d{short}", shape, "real", "gradient")
                gradients[operand] = Ref(f"d{short}")
        norm = self.net.norm(layer - 1)
        label = rest["activation"] if norm is None else norm.kind
        common = {"rule": self.step.rule or UpdateRule("sgd"), "counters": Ref("counters")}
        return Call("grad_normalise", {**rest, "dy": dy, "dx": Ref(f"dz{layer}"), **gradients, **common}, label)


def encode(program: Program, step: Step) -> Program:
    """Return the program of a step, lowered for encoded inputs, with the encoding of its network."""
    encoding, x, gradient = step.net.encoding, program.values.get("x"), program.values.get("dx")
    if encoding is None or x is None:
        return program
    batch, inputs = step.batch_size * step.net.members, step.net.sizes[0]
    # in 16 bits coordinates would lose what tells them apart
    values = {**program.values, "x": replace(x, shape=(x.shape[0], inputs), dtype="real")}
    values.pop("gathered", None)
    values["waves"] = Value("waves", (batch, step.net.widths[0]), x.dtype, "work")
    operands = {"x": Ref("x"), "counters": Ref("counters"), "octaves": encoding.octaves, "inputs": encoding.inputs}
    if "rows" in values:
        operands["rows"] = Ref("rows")
    label = f"{encoding.kind} {encoding.octaves}"
    calls = [
        Call("encode", {**operands, "y": Ref("waves")}, label),
        *(reading(call, "waves") for call in program.calls),
    ]
    if gradient is not None:
        values["dwaves"] = replace(gradient, name="dwaves")
        values["dx"] = replace(gradient, shape=(batch, inputs))
        calls = [call.but(dz_prev=Ref("dwaves")) if Ref("dx") in call.operands.values() else call for call in calls]
        calls.append(Call("encode", {**operands, "dy": Ref("dwaves"), "dx": Ref("dx")}, label))
    return replace(program, values=values, calls=tuple(calls))


def reading(call: Call, batch: str) -> Call:
    """Return a call that reads a batch, whole, where it read x by its rows."""

    def read(operands: Mapping[str, Any], rows: str) -> Mapping[str, Any]:
        changed = {
            name: Ref(batch) if value in (Ref("x"), Ref("gathered")) else value for name, value in operands.items()
        }
        if changed == operands:
            return operands
        return {name: value for name, value in changed.items() if name not in (rows, "gathered")}

    operands = dict(read(call.operands, OPS[call.op].by_name["x"].rows if "x" in call.operands else ""))
    if "layers" in operands:
        operands["layers"] = tuple(read(layer, "rows") for layer in operands["layers"])
    return replace(call, operands=operands)
