"""Calls of a step that do the work of several: gradients and update in one, or all that a narrow network needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from fusemlp.program.program import Call, Program, Ref, Value
from fusemlp.program.step import Step
from fusemlp_kernels.contract import batch_parts

# The operands of the output layer's call that ``train_narrow`` has too, and those of the layers' calls.
_OF_STEP = ("rows", "target", "counters", "stats", "loss", "weight", "class_weight")
_OF_LAYER = ("w", "b", "activation", "slope")


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


@dataclass(frozen=True)
class Narrow:
    """The calls of a step up to its update as ``train_narrow``, for a narrow network on wide batches.

    The gradients are summed in parts. A step with other calls, such as one against attacks, stays as it is.
    """

    def __call__(self, program: Program, step: Step) -> Program:
        """Return the program of two calls."""
        depth, names = step.net.layers, [call.op for call in program.calls]
        forward, middle, end = program.calls[:depth], names[depth:-2], names[-2:]
        whole = ["linear"] * (depth - 1) + ["linear_loss_grad"], ["grad_weight", "update"]
        limits = step.traits.narrow
        if limits is None or (names[:depth], end) != whole or set(middle) - {"grad_input"} or step.keep_gradients:
            return program
        gradients, update = program.calls[-2:]
        layers = []
        for layer, call in enumerate(forward):
            shared = {name: call.operands[name] for name in _OF_LAYER if name in call.operands}
            shorts = {f"d{kind}": f"{kind}{layer}" for kind in "wb"}
            trained = {name: Ref(f"d{short}") if short in program.trainable else None for name, short in shorts.items()}
            layers.append({**shared, **trained})
        last = forward[-1].operands
        parts = min(step.most_parts, limits.parts(step.batch_size))
        cut = {"parts": parts, "part": step.layout.size}
        operands = {
            **{name: last[name] for name in _OF_STEP if name in last},
            **{"x": forward[0].operands["x"], "layers": tuple(layers), "rule": gradients.operands["rule"], **cut},
        }
        products = tuple(product for call in program.calls for product in call.products)
        calls = Call("train_narrow", operands, f"in {parts} parts", products), update.but(**cut)
        values = {name: value for name, value in program.values.items() if value.kind != "work"}
        return replace(program, values=values, calls=calls)
