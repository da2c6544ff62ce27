"""The calls of a training step that is against attacks."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from fusemlp.describe.adversarial import Adversary
from fusemlp.program.program import Ref
from fusemlp_kernels.contract import Perturbation

if TYPE_CHECKING:
    from fusemlp.program.builder import Builder


class Attack(NamedTuple):
    """Steps that move the batch to where its loss is larger, before it is trained on; nothing is dropped in them."""

    steps: int
    change: Perturbation


def lowered(against: Adversary) -> Attack | None:
    """Return what a step is told of a training against an attack; None if it changes no inputs."""
    return None if against.plain is None else Attack(against.plain.steps, against.plain.perturbation())


def attack(build: Builder, attack: Attack) -> None:
    """Move the batch; what follows reads it in place of x."""
    first, spec = build.first, build.step.spec
    assert spec is not None
    rows: dict[str, Any] = {"rows": build.rows, "counters": build.counters, "change": attack.change}
    x, build.x = build.x, build.work("adv", build.net.sizes[0])
    build.call("perturb", "start", x=x, start=build.x, **rows)
    # the gradient goes back to the inputs
    build.first = -1
    build.attacking = True
    for _ in range(attack.steps):
        build.hidden()
        build.loss(replace(spec, accuracy=False))
        for layer in range(build.top, -1, -1):
            build.grad_input(layer)
        build.call("perturb", attack.change.norm, x=x, dx=Ref("dx"), adv=build.x, **rows)
    build.first, build.attacking = first, False
