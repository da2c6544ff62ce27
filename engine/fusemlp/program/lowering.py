"""From a network, a loss and an optimizer to the program of a training step, or of the forward pass alone.

A step of L layers is L forward calls (the last with loss and dz), L - 1 ``grad_input`` and one grouped
``grad_weight_update`` at the end, when nothing reads the old weights any more: 2L calls. Clipping and accumulation
need the gradients of the whole network at once: then ``grad_weight`` and ``update`` stand at the end. Privacy puts
``clip_examples`` before them. Adversarial training begins with the calls that move the batch. The members of a network
are rows of the batch, one after another, and each product stands between what they have of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from fusemlp.describe.network import MLP
from fusemlp.program import adversarial, members
from fusemlp.program.builder import Builder
from fusemlp.program.layout import RATE_ROWS, REMEMBERED, Layout, short_names
from fusemlp.program.program import Program
from fusemlp.program.step import Inputs, Step
from fusemlp.program.updates import update
from fusemlp_kernels.contract import HYPER, RATE_COLUMNS, LossSpec, TensorRule, Traits, UpdateRule

# Return, for a parameter's state_dict name, if it is trained, and its changes to the optimizer's rule.
OptionsFor = Callable[[str], tuple[bool, TensorRule]]


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
    if step.against is not None:
        adversarial.attack(build, step.against)
    build.hidden(step.gradient or 0)
    if step.spec is not None:
        build.loss(step.spec)
    elif step.net.members > 1:
        members.heads(build, "y")
    elif step.gradient is None or build.top > last:
        build.linear(last, "y", build.activation(last))
    if step.net.members > 1:
        if step.rule is not None:
            members.back(build)
    else:
        for layer in range(build.top, build.first, -1):
            build.grad_input(layer)
    if step.rule is not None:
        update(build, step.rule)
    return build.program()
