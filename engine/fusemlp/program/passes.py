"""Changes of a training step: batches moved by an attack, clipped rows, noise, a penalty, the sum over processes; and
one call in place of those of a narrow network."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusemlp.describe.adversarial import Adversary
from fusemlp.program.builder import Pass, Step
from fusemlp.program.lowering import plain, reading
from fusemlp.program.program import COLLECTIVE, Call, Program, Ref, Sharding, Value
from fusemlp_kernels.contract import Noise, Perturbation, Ridge

# The operands of the output layer's call that ``train_narrow`` has too, and those of the layers' calls.
_OF_STEP = ("rows", "target", "counters", "stats", "loss", "weight", "class_weight")
_OF_LAYER = ("w", "b", "activation", "slope")


def passes_against(adversary: Adversary) -> tuple[Pass, ...]:
    """Return the passes of a training against an adversary; none if it changes no inputs."""
    attack = adversary.plain
    return () if attack is None else (BatchAttack(attack.steps, attack.perturbation()),)


@dataclass(frozen=True)
class BatchAttack:
    """Steps along the gradient by the inputs, after which the training step reads ``adv`` in place of x.

    Nothing is dropped or counted in them.
    """

    steps: int
    change: Perturbation

    def __call__(self, program: Program, step: Step) -> Program:
        """Return the program of training on the moved batch."""
        assert step.spec is not None
        spec = replace(step.spec, accuracy=False)
        # as in a loop the loss reads its targets through the rows
        by_inputs = plain(step._replace(spec=spec, rule=None, gradient=0, resident=True))
        uncounted = [reading(call.but(stats=None), "adv") for call in by_inputs.calls]
        operands = {"x": Ref("x"), "counters": Ref("counters"), "change": self.change}
        if "rows" in program.values:
            operands["rows"] = Ref("rows")
        moving = [Call("perturb", {**operands, "start": Ref("adv")}, "start")]
        for _ in range(self.steps):
            moving += [*uncounted, Call("perturb", {**operands, "dx": Ref("dx"), "adv": Ref("adv")}, self.change.norm)]
        inputs = by_inputs.values["dx"]
        values = {**by_inputs.values, **program.values, "adv": Value("adv", inputs.shape, inputs.dtype, "work")}
        values.pop("gathered", None)
        return replace(program, values=values, calls=(*moving, *(reading(call, "adv") for call in program.calls)))


@dataclass(frozen=True)
class Penalty:
    """The penalty ``ridge``, for a loop over steps: its divisor is the sum of the weights of a batch's rows."""

    ridge: Ridge

    def __call__(self, program: Program, step: Step) -> Program:
        """Return the program whose loss counts the weights of rows, with ``penalty`` before the update."""
        calls = [
            call.but(ridge=self.ridge) if {"loss", "stats"} <= call.operands.keys() else call for call in program.calls
        ]
        # models of one launch have the same calls, whatever their numbers
        penalised = self.ridge.strength != 0.0 or step.traits.resident is not None
        if penalised and calls[-1].op == "update":
            weights = [short for short, _ in step.trained if short[0] == "w"]
            coded = {} if step.inputs.coding is None else {"w0": {"coding": step.inputs.coding}}
            layers = tuple({"w": Ref(short), "dw": Ref(f"d{short}"), **coded.get(short, {})} for short in weights)
            common = {"ridge": self.ridge, "counters": Ref("counters"), "stats": Ref("stats")}
            calls.insert(-1, Call("penalty", {"layers": layers, **common}, "ridge"))
        return replace(program, calls=tuple(calls))


@dataclass(frozen=True)
class ClipAndNoise:
    """The largest norm of a row's gradient, and the noise of their sum (``DPSGD``)."""

    clip: float
    noise: Noise

    def __call__(self, program: Program, step: Step) -> Program:
        """Return the program with ``clip_examples`` before the gradients by the parameters, and noise in the update."""
        calls: list[Call] = []
        for call in program.calls:
            if "loss" in call.operands:
                call = call.but(loss=replace(call.operands["loss"], reduction="rows"))
            if call.op == "grad_weight":
                calls.append(self._clipping(call))
            if call.op == "update":
                call = call.but(noise=self.noise, rows=Ref("rows") if "rows" in program.values else None)
            calls.append(call)
        return replace(program, calls=tuple(calls))

    def _clipping(self, gradients: Call) -> Call:
        layers = tuple(
            {
                **{name: value for name, value in layer.items() if name not in ("dw", "db")},
                **{f"{kind}_trained": layer[f"d{kind}"] is not None for kind in "wb"},
            }
            for layer in gradients.operands["layers"]
        )
        operands = {"layers": layers, "clip": self.clip, "counters": gradients.operands["counters"]}
        return Call("clip_examples", operands, f"{self.clip:g}")


def sums_over(sharding: Sharding) -> tuple[Pass, ...]:
    """Return the passes of a training over these shards; none where one process trains alone."""
    return (SumOverRanks(sharding),) if sharding else ()


@dataclass(frozen=True)
class SumOverRanks:
    """The sum of gradients and statistics over the shards of ``sharding``."""

    sharding: Sharding

    def __call__(self, program: Program, step: Step) -> Program:
        """Return the program of one shard up to ``all_reduce``, after which comes the update of all."""
        *others, update = program.calls
        rule = update.operands["rule"]
        # batches are accumulated once their shards are added
        calls = [call.but(rule=replace(rule, accumulate=1)) if "rule" in call.operands else call for call in others]
        operands = {"grads": Ref("grads"), "stats": Ref("stats"), "rule": rule, "counters": Ref("counters")}
        collective = [Call(COLLECTIVE, operands, str(self.sharding))] if update.op == "update" else []
        return replace(program, calls=(*calls, *collective, update), sharding=self.sharding)


@dataclass(frozen=True)
class Narrow:
    """The calls of a step up to its update as ``train_narrow``, for a narrow network on wide batches, and those of
    predictions as ``predict_narrow``.

    The gradients are summed in parts. A step with other calls, such as one against attacks, stays as it is.
    """

    def __call__(self, program: Program, step: Step) -> Program:
        """Return the program of two calls, or of one."""
        depth, names = step.net.layers, [call.op for call in program.calls]
        forward, middle, end = program.calls[:depth], names[depth:-2], names[-2:]
        layers = [{name: call.operands[name] for name in _OF_LAYER if name in call.operands} for call in forward]
        products = tuple(product for call in program.calls for product in call.products)
        values = {name: value for name, value in program.values.items() if value.kind != "work"}
        if names == ["linear"] * depth and depth > 1 and step.layers is None and step.inputs.coding is None:
            values["y"] = program.values["y"]
            operands = {"x": forward[0].operands["x"], "layers": tuple(layers), "y": forward[-1].operands["y"]}
            return replace(program, values=values, calls=(Call("predict_narrow", operands, "", products),))
        whole = ["linear"] * (depth - 1) + ["linear_loss_grad"], ["grad_weight", "update"]
        limits = step.traits.narrow
        if limits is None or (names[:depth], end) != whole or set(middle) - {"grad_input"} or step.keep_gradients:
            return program
        gradients, update = program.calls[-2:]
        for layer, entry in enumerate(layers):
            shorts = {f"d{kind}": f"{kind}{layer}" for kind in "wb"}
            entry |= {name: Ref(f"d{short}") if short in program.trainable else None for name, short in shorts.items()}
        last = forward[-1].operands
        parts = min(step.most_parts, limits.parts(step.batch_size))
        cut = {"parts": parts, "part": step.layout.size}
        operands = {
            **{name: last[name] for name in _OF_STEP if name in last},
            **{"x": forward[0].operands["x"], "layers": tuple(layers), "rule": gradients.operands["rule"], **cut},
        }
        calls = Call("train_narrow", operands, f"in {parts} parts", products), update.but(**cut)
        return replace(program, values=values, calls=calls)
