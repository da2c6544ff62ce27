"""The data that a program is given, and the step or forward pass that it is lowered from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from fusemlp.describe.adversarial import Adversary
from fusemlp.describe.network import MLP
from fusemlp.program.layout import Layout
from fusemlp.program.program import Sharding
from fusemlp_kernels.contract import LossSpec, Noise, Perturbation, Ridge, TensorRule, Traits, UpdateRule


class BatchAttack(NamedTuple):
    """Steps that move the batch to where its loss is larger, before it is trained on; nothing is dropped in them."""

    steps: int
    change: Perturbation


def as_batch_attack(against: Adversary) -> BatchAttack | None:
    """Return what a step is told of a training against an attack; None if it changes no inputs."""
    return None if against.plain is None else BatchAttack(against.plain.steps, against.plain.perturbation())


@dataclass(frozen=True)
class Inputs:
    """The data that a program is given.

    ``rows`` examples; with ``indexed`` a batch is picked from them by row index, else they are the batch. A network
    with members needs the indices: each row of the data stands there once for each member.
    ``weighted``: there is a weight for each row. ``class_weighted``: the loss has class weights.
    """

    rows: int
    indexed: bool = False
    weighted: bool = False
    class_weighted: bool = False


class Privacy(NamedTuple):
    """The largest norm of a row's gradient, and the noise of their sum."""

    clip: float
    noise: Noise


class Step(NamedTuple):
    """A training step over batches of ``batch_size`` rows, of each member if the network has some; without ``rule`` a
    forward pass, without ``spec`` up to y.

    ``trained``: the changes of the rule for each tensor that is trained, by its short name.

    ``compute_bytes``: bytes of an element that the matrix products read, if they do not read the parameters.
    ``scaled``: the gradients carry the loss scale, and a batch in which they overflow is skipped.

    With ``keep_gradients`` the last two calls are ``grad_weight`` and ``update``, on every backend and for every
    optimizer: between them the gradients can be read and changed. ``most_parts``: into how many parts the gradients may
    cut the batch (``contract.batch_parts``). ``resident``: the calls run in one loop over many steps; ``ridge``: a
    penalty beside the loss, for such a loop. With ``privacy`` the gradients are sums of clipped ones, with noise. With
    ``against`` the step trains on the moved batch. With
    ``sharding`` the calls before the first collective are of one shard, which has ``batch_size`` rows.

    With ``gradient`` 0 a forward pass goes back to dx, the gradient by x: of the loss, or without ``spec`` of the
    outputs weighed by the data ``seed`` (batch_size, N). With ``gradient`` 1 it begins at h1, the first hidden layer's
    output, which is data (so is z1 where the derivative needs it), and ends at dz1. Nothing is dropped.
    """

    net: MLP
    batch_size: int
    traits: Traits
    layout: Layout
    inputs: Inputs
    spec: LossSpec | None
    real_bytes: int
    compute_bytes: int | None = None
    rule: UpdateRule | None = None
    trained: tuple[tuple[str, TensorRule], ...] = ()
    seed: int = 0
    scaled: bool = False
    keep_gradients: bool = False
    most_parts: int = 1
    resident: bool = False
    ridge: Ridge | None = None
    gradient: int | None = None
    privacy: Privacy | None = None
    against: BatchAttack | None = None
    sharding: Sharding | None = None
