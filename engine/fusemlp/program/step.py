"""The data that a program is given, and the step or forward pass that it is lowered from."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from fusemlp.describe.network import MLP
from fusemlp.program.layout import Layout
from fusemlp.program.program import Program
from fusemlp_kernels.coding import Coding
from fusemlp_kernels.contract import LossSpec, TensorRule, Traits, UpdateRule

# Changes the program of a step; compared by value, as programs are remembered by their steps.
Pass: TypeAlias = "Callable[[Program, Step], Program]"


@dataclass(frozen=True)
class Inputs:
    """The data that a program is given.

    ``rows`` examples; with ``indexed`` a batch is picked from them by row index, else they are the batch. A network
    with members needs the indices: each row of the data stands there once for each member.
    ``weighted``: there is a weight for each row. ``class_weighted``: the loss has class weights. With a ``coding`` the
    rows are codes.
    """

    rows: int
    indexed: bool = False
    weighted: bool = False
    class_weighted: bool = False
    coding: Coding | None = None


class Step(NamedTuple):
    """A training step over batches of ``batch_size`` rows, of each member if the network has some; without ``rule`` a
    forward pass, without ``spec`` up to y.

    ``trained``: the changes of the rule for each tensor that is trained, by its short name.

    ``compute_bytes``: bytes of an element that the matrix products read, if they do not read the parameters.
    ``scaled``: the gradients carry the loss scale, and a batch in which they overflow is skipped.

    With ``keep_gradients`` the last two calls are ``grad_weight`` and ``update``, on every backend and for every
    optimizer: between them the gradients can be read and changed. ``most_parts``: into how many parts the gradients may
    cut the batch (``contract.batch_parts``). ``resident``: the calls run in one loop over many steps. ``passes`` change
    the program of the plain step, one after another.

    With ``gradient`` 0 a forward pass goes back to dx, the gradient by x: of the loss, or without ``spec`` of the
    outputs weighed by the data ``seed`` (batch_size, N). With ``gradient`` 1 it begins at h1, the first hidden layer's
    output, which is data (so is z1 where the derivative needs it), and ends at dz1. Nothing is dropped.
    With ``layers`` a forward pass ends at h of that number, the output of a hidden layer.
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
    gradient: int | None = None
    layers: int | None = None
    passes: tuple[Pass, ...] = ()
