"""From a network, a loss and an optimizer to the program of a training step, or of the forward pass alone."""

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

from fusemlp.describe.optimizers import Optimizer
from fusemlp.program.builder import Builder, MembersBuilder
from fusemlp.program.layout import REMEMBERED
from fusemlp.program.passes.blocks import blocks, encode
from fusemlp.program.program import Call, Program, Ref, Value
from fusemlp.program.step import Step
from fusemlp_kernels.contract import OWN, TensorRule, batch_parts


def trained_by(optimizer: Optimizer, names: Mapping[str, str]) -> tuple[tuple[str, TensorRule], ...]:
    """Return the tensors that an optimizer trains, as ``Step.trained`` has them; ``names``: see ``short_names``."""
    trained = []
    for short, name in names.items():
        trainable, changes = optimizer.options_for(name)
        if trainable:
            trained.append((short, changes))
    return tuple(trained)


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
