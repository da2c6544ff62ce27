"""The calls of a training step that is against attacks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from fusemlp.describe.adversarial import Attack as AttackOfInputs
from fusemlp.describe.hardening import TRADES, Free, Hardening
from fusemlp.describe.intervals import IBP
from fusemlp.program.program import Ref
from fusemlp_kernels.contract import LossSpec, Perturbation, Ramp

if TYPE_CHECKING:
    from fusemlp.program.builder import Builder


class Attack(NamedTuple):
    """Steps that move the batch to where its loss is larger, before it is trained on; nothing is dropped in them.

    ``carried``: no such steps; the step's own backward pass moves what is added to the inputs of the next step.
    ``beta``: the step trains on the batch, and on beta times the divergence of the outputs of the moved batch from its
    own, which the steps raise too.
    """

    steps: int
    change: Perturbation
    carried: bool = False
    beta: float | None = None


class Intervals(NamedTuple):
    """Training with intervals of the inputs; ``bounded``: the inputs have a least and a greatest value."""

    ramp: Ramp
    bounded: bool


def lowered(against: AttackOfInputs | Hardening | IBP, first: int, last: int) -> Attack | Intervals:
    """Return what a step is told of a training against attacks that began at update ``first``, ends before ``last``."""
    if isinstance(against, IBP):
        ramp = Ramp(against.eps, against.kappa, against.warmup, against.ramp, first, max(1, last - first))
        return Intervals(ramp, against.bounds is not None)
    beta = against.beta if isinstance(against, TRADES) else None
    return Attack(against.plain.steps, against.plain.perturbation(), isinstance(against, Free), beta)


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


def trades(build: Builder, attack: Attack, beta: float) -> None:
    """The last layer, its loss, and all calls for the moved batch; the batch's gradient has yet to go back."""
    last, first, x, spec = build.net.layers - 1, build.first, build.x, build.step.spec
    assert spec is not None
    rows: dict[str, Any] = {"rows": build.rows, "counters": build.counters}
    logits = build.linear(last, f"z{last + 1}", {"activation": "identity"})
    weight = build.weight_of_rows()
    scale = Ref("hyper") if build.step.scaled else None
    common: dict[str, Any] = {"z": logits, "loss": spec, "weight": weight, "hyper": scale, **rows}
    place = build.x, build.picks, build.gathered
    build.x, build.picks, build.gathered = build.work("adv", build.net.sizes[0]), None, None
    build.side = ".adv"
    build.call("perturb", "start", x=x, start=build.x, change=attack.change, **rows)

    def other() -> dict[str, Any]:
        build.hidden()
        moved = build.linear(last, f"z{last + 1}.adv", {"activation": "identity"})
        return {"other": moved, "dother": build.work(f"dz{last + 1}.adv", build.net.sizes[-1]), **common}

    build.first = -1
    for _ in range(attack.steps):
        build.call("divergence", "", **other(), strength=1.0)
        for layer in range(last, -1, -1):
            build.grad_input(layer)
        build.call("perturb", attack.change.norm, x=x, dx=Ref("dx"), adv=build.x, change=attack.change, **rows)
    build.first = first
    moved = other()
    build.call("loss_grad", spec.kind, z=logits, **build.loss_operands(spec))
    dz = Ref(f"dz{last + 1}") if first < build.net.layers else None
    build.call("divergence", f"{beta:g}", **moved, strength=beta, stats=Ref("stats"), dz=dz)
    for layer in range(last, first, -1):
        build.grad_input(layer)
    build.side, build.x, build.picks, build.gathered = "", *place


def magnitudes(build: Builder) -> None:
    """The magnitudes of the weights, which are those of the step."""
    for layer in range(build.net.layers):
        size = build.add(f"size{layer}", (build.net.sizes[layer + 1], build.net.sizes[layer]), "real", "work")
        build.call("magnitudes", "", w=Ref(f"w{layer}"), out=size)


def _box(build: Builder, names: Sequence[str], level: int) -> dict[str, Any]:
    """Two values of a row each, of the inputs or of a layer's outputs, by the names of operands."""
    return {name: build.work(f"{name}{level}", build.net.sizes[level]) for name in names}


def worst_case(build: Builder, intervals: Intervals, spec: LossSpec) -> None:
    """The loss of the worst logits of each row, and its gradients; that of the rows themselves is shrunk.

    Centres c and radii r of the inputs of a layer give those of its pre-activations, w c + b and |w| r.
    """
    net, last = build.net, build.net.layers - 1
    clock: dict[str, Any] = {"counters": build.counters, "ramp": intervals.ramp}
    names = ("reach", "least", "most") if intervals.bounded else ("reach",)
    columns: dict[str, Any] = {name: build.add(name, (net.sizes[0],), "real", "control") for name in names}
    inputs = _box(build, ("centre", "radius"), 0)
    build.call("ball", "", x=Ref("x"), rows=build.rows, **inputs, **columns, **clock)
    for layer in range(net.layers):
        nothing = build.add(f"nothing{layer}", (net.sizes[layer + 1],), "real", "control")
        z = _box(build, ("zc", "zr"), layer + 1)
        ways = (
            ("centre", "zc", build.weight(layer), Ref(f"b{layer}")),
            ("radius", "zr", Ref(f"size{layer}"), nothing),
        )
        for name, output, w, b in ways:
            given = {"x": inputs[name], "w": w, "b": b, "y": z[output], "activation": "identity"}
            build.call("linear", "identity", [build.product(layer)], **given, counters=build.counters)
        if layer < last:
            ends, inputs = _box(build, ("low", "high"), layer + 1), _box(build, ("centre", "radius"), layer + 1)
            activation = build.activation(layer)
            build.call("box", activation["activation"], **z, **ends, **inputs, **activation)
    gradients = _box(build, ("dzc", "dzr"), last + 1)
    build.attacking = True
    loss = build.loss_operands(replace(spec, accuracy=False)) | gradients | {"dz": Ref(f"dz{last + 1}")}
    build.attacking = False
    build.call("worst_loss_grad", "", **z, **loss, ramp=intervals.ramp)
    for layer in range(last, build.first, -1):
        before = _box(build, ("dzc", "dzr"), layer)
        for name, w, y in (("dzc", build.weight(layer), "centre"), ("dzr", Ref(f"size{layer}"), "radius")):
            given = {"dz": gradients[name], "w": w, "y": Ref(f"{y}{layer}"), "dz_prev": before[name]}
            build.call("grad_input", "identity", [build.product(layer)], **given, activation="identity")
        gradients, activation = before, build.activation(layer - 1)
        own: dict[str, Any] = {name: Ref(f"{name}{layer}") for name in ("zc", "zr", "low", "high")}
        own |= {"dc": before["dzc"], "dr": before["dzr"]}
        build.call("box_grad", activation["activation"], **own, **activation)


def add_carried(build: Builder, attack: Attack) -> None:
    """Add what is carried to the batch; what follows reads the sum in place of x."""
    delta = build.add("delta", (build.batch, build.net.sizes[0]), build.matrix, "control")
    x, build.x = build.x, build.work("adv", build.net.sizes[0])
    rows: dict[str, Any] = {"rows": build.rows, "counters": build.counters}
    build.call("perturb", "start", x=x, start=build.x, delta=delta, change=attack.change, **rows)
    # the gradient goes back to the inputs
    build.first = -1


def move_carried(build: Builder, attack: Attack) -> None:
    """Move what is carried; the bounds are those of the inputs."""
    change = replace(attack.change, low=-math.inf, high=math.inf)
    rows: dict[str, Any] = {"rows": build.rows, "counters": build.counters}
    build.call("perturb", change.norm, x=None, dx=Ref("dx"), carried=Ref("delta"), change=change, **rows)
