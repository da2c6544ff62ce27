"""From a network, a loss and an optimizer to the program of a training step, or of the forward pass alone."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from fusemlp.describe.network import MLP
from fusemlp.program.builder import Builder
from fusemlp.program.layout import REMEMBERED, Layout, short_names
from fusemlp.program.passes.blocks import blocks
from fusemlp.program.passes.encoding import encode
from fusemlp.program.passes.fusion import fuse
from fusemlp.program.passes.members import MembersBuilder
from fusemlp.program.program import Program
from fusemlp.program.step import Inputs, Step
from fusemlp_kernels.contract import OWN, LossSpec, TensorRule, Traits, UpdateRule

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
    options = {"rule": rule, "trained": tuple(trained), "seed": seed, **others}
    return lower(Step(net, batch_size, traits, layout, inputs, spec, **options))


@lru_cache(maxsize=REMEMBERED)
def lower(step: Step) -> Program:
    """Return the program of a step; the models of a fleet share it, so it is remembered."""
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
