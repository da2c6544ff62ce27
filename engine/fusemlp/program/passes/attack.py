"""Training against an attack: the calls that move a batch to where its loss is larger, before the step on it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fusemlp.describe.adversarial import Adversary
from fusemlp.program.lowering import plain
from fusemlp.program.passes.blocks import reading
from fusemlp.program.program import Call, Program, Ref, Value
from fusemlp.program.step import Pass, Step
from fusemlp_kernels.contract import Perturbation


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
