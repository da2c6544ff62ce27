"""From a network, a loss and an optimizer to the program of a training step, or of the forward pass alone."""

from collections.abc import Mapping
from functools import lru_cache

from fusemlp.describe.optimizers import Optimizer
from fusemlp.program.builder import Builder
from fusemlp.program.layout import REMEMBERED
from fusemlp.program.passes.blocks import blocks, encode
from fusemlp.program.passes.fusion import fuse
from fusemlp.program.passes.members import MembersBuilder
from fusemlp.program.program import Program
from fusemlp.program.step import Step
from fusemlp_kernels.contract import OWN, TensorRule


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
