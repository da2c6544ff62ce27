"""A narrow network on wide batches: the forward and the backward pass of a step as one call."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusemlp.program.program import Call, Program, Ref
from fusemlp.program.step import Step

# The operands of the output layer's call that the one call has too, and those of the layers' calls.
_OF_STEP = ("rows", "target", "counters", "stats", "loss", "weight", "class_weight")
_OF_LAYER = ("w", "b", "activation", "slope")


@dataclass(frozen=True)
class Narrow:
    """The calls of a step up to its update as ``train_narrow``, which sums the gradients in parts.

    A step with other calls, such as one against attacks, stays as it is.
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
