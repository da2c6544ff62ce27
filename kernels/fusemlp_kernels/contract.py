"""The kernel contract: what every backend computes, over which arrays, and who may alias whom.

Notation: ``M`` batch rows, ``K`` inputs, ``N`` outputs of a layer; arrays are row-major; weights are ``(N, K)``;
``real`` is the type of parameters, gradients and optimizer state (float32, or float64 where the backend offers it);
``compute`` is the type of what the matrix products read: float16 or bfloat16 in those precisions, else ``real``. ``dz``
is the gradient of the step's loss with respect to a layer's pre-activation ``z = x @ w.T + b``.

A backend turns a call of the step program into something that can be run again and again without looking anything
up: ``bind(op, **operands)`` checks and resolves everything once and returns a callable without arguments. Binding may
allocate scratch memory; running may not. The same callables serve the engine's plans and the public launchers.

``ops`` lists the operands of every op, their shapes and what is read and written. ``None`` stands for an operand that
is left out.

``train_resident`` runs the calls of a step as many times as its callable is told, and walks rows as below whatever the
traits say; ``train_fleet``, of Triton alone, does so for several models in one launch. Besides what the calls do, stats
sums BATCH_LOSSES and PENALTIES.

Advancing the clock: BATCH_INDEX grows by one; if an update was applied UPDATE_COUNT grows by one and hyper receives
the learning rate and the bias corrections of the next update; if one was skipped, SKIPPED and SKIPPED_IN_A_ROW grow by
one.

The host computes the rates ahead of the launches that read them (``clock.rate_table``). rates[0] holds FIRST_UPDATE and
ROWS_FILLED, at most R; row 1 + i holds the learning rate and the two bias corrections of the update that follows
FIRST_UPDATE + i others. The clock copies the row of UPDATE_COUNT into hyper, the learning rate times hyper[RATE_SCALE].
The last filled row stands for all updates after it, so a constant rate needs one row.

A backend with ``Traits.walks_rows`` also takes ``rows`` of several batches, one behind the other: the batch is the M
rows from counters[ROW_OFFSET] on. If counters[ROW_STEP] is not 0, the clock moves ROW_OFFSET on by it, back to 0 where
ROW_TOTAL is reached, and sets ROW_COUNT to what is left of ROW_TOTAL, at most ROW_STEP: an epoch needs nothing from
the host.

Where ``rows`` has entries of -1 (padding), they come last. Labels are classes in range(N) or the ignored index: who
binds a call checks them, a backend need not.

NaN goes through every op as NaN. A zero normaliser (all weights zero) gives loss 0 and dz 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

import numpy as np

from fusemlp_kernels import pointwise
from fusemlp_kernels.errors import unknown_name

ACTIVATIONS = tuple(pointwise.ACTIVATIONS)
# The derivatives of the others are computed from the output.
NEEDS_Z = frozenset(name for name, row in pointwise.ACTIVATIONS.items() if row.needs_z)
LOSSES = pointwise.LOSS_NAMES

# counters, int64
(
    BATCH_INDEX,
    UPDATE_COUNT,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_TOTAL,
    ROW_STEP,
    SKIPPED,
    SKIPPED_IN_A_ROW,
    COUNTERS,
) = range(9)
# hyper, float64: of the update that comes next; the loss scale, and how many updates it has stood
(
    LEARNING_RATE,
    BIAS_CORRECTION_1,
    BIAS_CORRECTION_2,
    RATE_SCALE,
    LOSS_SCALE,
    GOOD_UPDATES,
    HYPER,
) = range(7)
# rates, float64: the first row says which update the second row is of, and how many rows are filled after the first
FIRST_UPDATE, ROWS_FILLED = range(2)
# ... which have the columns LEARNING_RATE, BIAS_CORRECTION_1, BIAS_CORRECTION_2
RATE_COLUMNS = 3
# Dynamic loss scaling (Micikevicius et al., "Mixed precision training", 2018): where it starts, and how long it waits.
FIRST_LOSS_SCALE = 65536.0
GROWTH_INTERVAL = 2000
# So many skipped batches in a row are no accident of the scale any more.
SKIPPED_LIMIT = 25
# The most parts that the gradients cut a batch into.
MOST_PARTS = 16
# stats, float64: the last step's loss; then sums since they were last cleared: loss times normaliser (the loss itself
# where the reduction is "sum"), normalisers, right answers and how many were asked for; by ``train_resident`` alone:
# of each batch its loss times its rows, and its ridge times its rows
LAST_LOSS, LOSS_SUM, NORM_SUM, CORRECT, SCORED, BATCH_LOSSES, PENALTIES, STATS = range(8)


@dataclass(frozen=True)
class Dropout:
    """Inverted dropout: element (row, col) is kept and scaled by 1 / (1 - rate), or is zero; see ``philox``."""

    rate: float
    layer: int
    seed: int


@dataclass(frozen=True)
class LossSpec(pointwise.LossOptions):
    """A loss and its options; the meaning of each is in ``reference.loss_grad``.

    ``reduction`` "mean" divides by the sum of the row weights (times N for the element-wise losses), "sum" does not
    divide. ``soft`` says that a cross-entropy's targets are rows of probabilities. ``accuracy`` says that hits are
    counted into ``stats``.
    """

    kind: str
    reduction: str = "mean"
    label_smoothing: float = 0.0
    ignore_index: int | None = None
    soft: bool = False
    _: KW_ONLY
    accuracy: bool = False

    @property
    def option(self) -> float:
        """The number that the formula of the loss names; 0 where there is none."""
        row = pointwise.LOSSES.get(self.kind)
        return 0.0 if row is None or row.option is None else float(getattr(self, row.option))


class ScheduleSpec:
    """A schedule as pickles of release 0.1 hold it inside an ``UpdateRule``; read where they are loaded."""


@dataclass(frozen=True)
class UpdateRule(pointwise.Hyperparameters):
    """An optimizer: ``kind`` "sgd" or a name of ``pointwise.OPTIMIZERS``; ``convention`` "torch" or "scikit-learn" (see
    ``reference.update``)."""

    kind: str
    _: KW_ONLY
    nesterov: bool = False
    decoupled: bool = False
    convention: str = "torch"
    clip_norm: float | None = None
    accumulate: int = 1

    @property
    def name(self) -> str:
        """The optimizer's name in ``pointwise.OPTIMIZERS``."""
        if self.kind != "sgd" or not self.momentum:
            return self.kind
        return "nesterov" if self.nesterov else "momentum"

    @property
    def code(self) -> int:
        """The optimizer's number for the kernels; raises ArgumentError where there is no such optimizer."""
        if self.name not in pointwise.OPTIMIZERS:
            raise unknown_name("rule: kind", self.kind, pointwise.OPTIMIZERS)
        return list(pointwise.OPTIMIZERS).index(self.name)

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the arrays shaped like the parameters that the optimizer keeps."""
        return list(pointwise.OPTIMIZERS.values())[self.code].states

    @property
    def state_count(self) -> int:
        """How many arrays shaped like the parameters the optimizer keeps."""
        return len(self.states)


@dataclass(frozen=True)
class TensorRule:
    """What one parameter tensor changes of the optimizer's rule."""

    lr_factor: float = 1.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Segment:
    """A tensor's stretch of the flat arena, in elements."""

    offset: int
    size: int
    rule: TensorRule


@dataclass(frozen=True)
class Ridge:
    """The penalty of scikit-learn's MLPs, and what they divide by, for ``train_resident`` with the reduction "mean".

    To the loss of a batch is added ``strength`` / 2 times the squares of the trained weights, biases and slopes
    excluded, over the sum of its row weights: 1 each without weights, times their classes' for the cross-entropy of
    integer targets. ``divisor``: the loss is divided by that sum times this, None for N with the element-wise losses
    and 1 with cross-entropy. Where the sum is zero there is no penalty.
    """

    strength: float = 0.0
    divisor: float | None = None


@dataclass(frozen=True)
class ResidentLimits:
    """For which networks a backend has ``train_resident``, and for which it pays.

    At most ``layers`` layers, ``inputs``, ``width`` of the hidden layers, ``outputs``, ``batch`` rows. A model has one
    multiprocessor to itself: up to ``flops`` floating-point operations a step and model that trains at once, it is
    taken to be quicker than launching the step's calls one after another on the whole card.
    """

    layers: int
    inputs: int
    width: int
    outputs: int
    batch: int
    flops: float
    precisions: tuple[str, ...]


@dataclass(frozen=True)
class Traits:
    """What the lowering has to know of a backend; plain data, so that a plan can be printed without the backend.

    ``row_multiple``: the row pitch of the engine's matrices is a multiple of this many elements.
    ``gathers_in_load``: x[rows] needs no workspace. ``stores_masks``: dropout masks are kept from forward to backward.
    ``widest_fused_output``: the largest N for which ``linear_loss_grad`` exists; wider outputs take two calls.
    ``fused_updates``: the optimizers for which ``grad_weight_update`` is the quickest way. ``norms_gradients``:
    ``grad_weight`` knows the norm of what it writes. ``walks_rows``: an epoch's rows are given at once.
    ``split_rows``, ``split_size``: see ``batch_parts``. ``resident``: None where any network may be resident.
    """

    name: str
    row_multiple: int
    gathers_in_load: bool
    stores_masks: bool
    widest_fused_output: int
    fused_updates: tuple[str, ...]
    norms_gradients: bool
    walks_rows: bool
    split_rows: int
    split_size: int
    precisions: tuple[str, ...]
    # from the slowest to the quickest
    plans: tuple[str, ...]
    # its arrays are NumPy's
    on_host: bool = False
    resident: ResidentLimits | None = None


def resident_refusal(traits: Traits, sizes: Sequence[int], batch: int, precision: str) -> str | None:
    """Why a network with these widths, inputs first, has no ``train_resident`` on a backend; None if it has."""
    limits = traits.resident
    if limits is None:
        return None
    hidden = max(sizes[1:-1], default=0)
    for what, given, most in (
        ("layers", len(sizes) - 1, limits.layers),
        ("inputs", sizes[0], limits.inputs),
        ("units in a hidden layer", hidden, limits.width),
        ("outputs", sizes[-1], limits.outputs),
        ("rows in a batch", batch, limits.batch),
    ):
        if given > most:
            return f"{given} {what} are more than the {most} of the {traits.name} backend's resident kernel"
    if precision not in limits.precisions:
        return f"the {traits.name} backend's resident kernel is for {', '.join(limits.precisions)}, not for {precision}"
    return None


def step_flops(sizes: Sequence[int], batch: int) -> int:
    """Floating-point operations of a training step's matrix products, a multiplication and an addition being two."""
    products = [2 * batch * inputs * outputs for inputs, outputs in itertools.pairwise(sizes)]
    # nobody needs the gradient by the data
    return 3 * sum(products) - products[0]


def batch_parts(traits: Traits, rows: int, weights: int) -> int:
    """Into how many parts the gradients by ``weights`` parameters cut a batch of ``rows``.

    Where the batch is long and the weights are few, tiles of the weights alone do not keep a GPU busy: there are
    ``split_size`` weights or more in the tiles that do. A part has at least ``split_rows`` rows; 0: never cut.
    """
    if not traits.split_rows or not weights:
        return 1
    return max(1, min(rows // traits.split_rows, traits.split_size // weights, MOST_PARTS))


class Backend(Protocol):
    """One device's implementation of the contract. ``Any`` stands for the backend's own array type."""

    traits: Traits
    device: str

    def allocate(self, size: int, dtype: str) -> Any:
        """A flat, zeroed, 256-byte aligned array; dtype is "real", "compute", "float64", "int64" or "bool"."""

    def view(self, flat: Any, offset: int, shape: tuple[int, ...], pitch: int) -> Any:
        """A (rows, columns) or (columns,) view of ``flat`` from element ``offset``, rows ``pitch`` elements apart."""

    def adopt(self, array: Any) -> Any | None:
        """``array`` as the backend's own type over the same memory, where that is the device's; None for all others.

        Understood are the device's own arrays and what has ``__cuda_array_interface__`` or ``__dlpack__``.
        """

    def extent(self, array: Any) -> tuple[float, float]:
        """The least and the greatest element of an array that is not empty, NaN if one is; waits for the device."""

    def is_integer(self, array: Any) -> bool:
        """Whether the elements are integers; bool counts as one."""

    def from_host(self, array: Any, dtype: str | None = None) -> Any:
        """The array on the device (itself, where it is there), as ``dtype`` ("compute") where given.

        ``array`` is a host's, or one that was adopted: that is copied only where its type or its rows do not suit the
        kernels.
        """

    def to_host(self, array: Any, out: np.ndarray[Any, Any] | None = None) -> np.ndarray[Any, Any]:
        """A contiguous NumPy copy, in ``out`` where that is given."""

    def copy_into(self, destination: Any, source: Any) -> None:
        """Write a host array, or an adopted one, into a device array of the same shape."""

    def bind(self, op: str, **operands: Any) -> Callable[..., object]:
        """The call, ready to be run any number of times; those of ``train_resident`` and ``train_fleet`` take steps."""

    def scalar(self, array: Any, index: int) -> Any:
        """One element of a "float64" array as a 0-d "real" array of its own; does not wait for the device."""

    def capture(self, run: Callable[[], object], times: int) -> Callable[[], object]:
        """What ``times`` runs start, to be started by one call, for backends with the plan "graph".

        ``run`` has run before and is not run by this.
        """

    def synchronize(self) -> None:
        """Wait until everything that was started has ended; raises what went wrong on the device."""
