"""The kernel contract: the descriptions, arrays and rules that every backend shares.

Notation: ``M`` batch rows, ``K`` inputs, ``N`` outputs of a layer; arrays are row-major; weights are ``(N, K)``;
``real`` is the type of parameters, gradients and optimizer state (float32, or float64 where the backend offers it);
``compute`` is the type that the matrix products read: float16 or bfloat16 in those precisions, else ``real``. ``dz`` is
the gradient of the step's loss with respect to a layer's pre-activation ``z = x @ w.T + b``.

``ops`` lists the operands of every op: shapes, and which are read and written. None stands for an operand left out.
``bind(op, **operands)`` checks and resolves a call of the step program once, and returns a callable without arguments.
Binding may allocate scratch memory; running may not. The engine's plans and the public launchers run these callables.

``train_resident`` runs the calls of a step several times; ``train_fleet``, of Triton alone, does so for several models
in one launch. They also add up BATCH_LOSSES and PENALTIES in stats.

Advancing the clock: BATCH_INDEX grows by one; after an applied update UPDATE_COUNT grows by one and hyper receives the
learning rate, the bias corrections and the share of the next update; after a skipped one SKIPPED and SKIPPED_IN_A_ROW
grow by one.

The host computes the rates ahead of the launches that read them (``clock.rate_table``). rates[0] holds FIRST_UPDATE and
ROWS_FILLED, at most R; row 1 + i holds the learning rate, the two bias corrections and the share of update
FIRST_UPDATE + i, counted from 0. The clock copies the row of UPDATE_COUNT into hyper, the learning rate times
hyper[RATE_SCALE]. The last filled row serves all later updates, so a constant rate needs one row.

``rows`` may be those of several batches, one after another: the batch is the M rows from counters[ROW_OFFSET] on. If
counters[ROW_STEP] is not 0, the clock adds it to ROW_OFFSET, goes back to 0 at ROW_TOTAL, and sets ROW_COUNT to the
rows left of ROW_TOTAL, at most ROW_STEP: an epoch needs nothing from the host.

With the operand ``coding`` x has rows of codes (``coding.Coding``), and ``linear`` is that of the dense rows that they
stand for. w keeps its shape (N, K); its columns, the weights of an input, lie side by side. With r, the dense rows are
multiplied by the factors of their member before the product. Codes are not checked here: the caller of ``bind`` gives
indices of inputs, or -1 for none. Padding has codes 0.

Entries of -1 in ``rows`` (padding) come last. Labels are classes in range(N) or the ignored index; the caller of
``bind`` checks them.

NaN goes through every op as NaN. A zero normaliser (all weights zero) gives loss 0 and dz 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Protocol

import numpy as np

from fusemlp_kernels import philox, pointwise
from fusemlp_kernels.errors import ArgumentError, unknown_name

ACTIVATIONS = tuple(pointwise.ACTIVATIONS)
# The derivatives of the others are computed from the output.
NEEDS_Z = frozenset(name for name, row in pointwise.ACTIVATIONS.items() if row.needs_z)
LOSSES = pointwise.LOSS_NAMES
# Losses of several outputs a target, on NumPy alone; their codes follow those of ``LOSSES``.
DISTRIBUTIONS = pointwise.DISTRIBUTION_NAMES
# The kind of a loss that the op own_loss calls.
OWN = "own"

# counters, int64
BATCH_INDEX, UPDATE_COUNT, ROW_COUNT, ROW_OFFSET, ROW_TOTAL, ROW_STEP, SKIPPED, SKIPPED_IN_A_ROW, COUNTERS = range(9)
# hyper, float64: of the next update; the loss scale, and the number of updates since it last changed; the share of the
# next parameters in their average, last, since older files lack it
LEARNING_RATE, BIAS_CORRECTION_1, BIAS_CORRECTION_2, RATE_SCALE, LOSS_SCALE, GOOD_UPDATES, SHARE, HYPER = range(8)
# rates, float64: the first row; the columns of the others are LEARNING_RATE, BIAS_CORRECTION_1, BIAS_CORRECTION_2 and
# RATE_SHARE
FIRST_UPDATE, ROWS_FILLED = range(2)
RATE_SHARE, RATE_COLUMNS = 3, 4
# Dynamic loss scaling (Micikevicius et al., "Mixed precision training", 2018): first scale, and updates until it grows.
FIRST_LOSS_SCALE = 65536.0
GROWTH_INTERVAL = 2000
# After this many consecutive skips the loss scale is not to blame.
SKIPPED_LIMIT = 25
# The most parts that the gradients cut a batch into.
MOST_PARTS = 64
# stats, float64: the last step's loss; then sums since the last clearing: loss times normaliser (the loss itself with
# the reduction "sum"), normalisers, right answers, answers; in ``train_resident``, perhaps elsewhere: each batch's
# loss times its rows, and its ridge times its rows
LAST_LOSS, LOSS_SUM, NORM_SUM, CORRECT, SCORED, BATCH_LOSSES, PENALTIES, STATS = range(8)


@dataclass(frozen=True)
class Dropout:
    """Inverted dropout: element (row, col) is kept and scaled by 1 / (1 - rate), or is zero; see ``philox``."""

    rate: float
    layer: int
    seed: int

    @property
    def numbers(self) -> dict[str, Any]:
        """The numbers of the kernels of cards: the place of the random words, the least that keeps, and the factors."""
        (key0, key1), least, share = philox.seed_key(self.seed), philox.threshold(self.rate), 1.0 - self.rate
        # a rate that rounds to one drops everything
        factors = {"keep_scale": 0.0 if least == 1 << 16 else 1.0 / share, "kept_share": share}
        return {"layer": self.layer, "key0": key0, "key1": key1, "threshold": least, **factors}


NO_DROPOUT = Dropout(0.0, 0, 0)


@dataclass(frozen=True)
class LossSpec(pointwise.LossOptions):
    """A loss and its options; the meaning of each is in ``reference.loss_grad``.

    ``reduction`` "mean" divides by the sum of the row weights (times N for the element-wise losses), "sum" does not
    divide. "rows" has the statistics of "mean", but dz of each row is that of its own loss: for the element-wise losses
    divided by N. ``soft``: a cross-entropy's targets are rows of probabilities. ``accuracy``: ``stats`` counts hits.
    ``missing``, on NumPy: a target that is NaN has no loss and no gradient, and a mean divides by the sum of the
    weights of the others. ``quantiles``: those of the kind "quantiles", in rising order.
    With the kind OWN it stands for a function on the host, called ``name``: ``target`` is the type of its targets, and
    their shape without the rows.
    """

    kind: str
    reduction: str = "mean"
    label_smoothing: float = 0.0
    ignore_index: int | None = None
    soft: bool = False
    _: KW_ONLY
    accuracy: bool = False
    missing: bool = False
    quantiles: tuple[float, ...] = ()
    name: str = ""
    target: tuple[str, tuple[int, ...]] = ("real", ())

    @property
    def option(self) -> float:
        """The number that the formula of the loss reads; 0 if it reads none."""
        row = {**pointwise.LOSSES, **pointwise.DISTRIBUTIONS}.get(self.kind)
        return 0.0 if row is None or row.option is None else float(getattr(self, row.option))

    @property
    def width(self) -> int:
        """The number of outputs for a target."""
        return {"gaussian": 2, "quantiles": len(self.quantiles)}.get(self.kind, 1)

    def summands(self, outputs: int) -> int:
        """Return how many losses a row with this many outputs has the mean of."""
        return outputs // 2 if self.kind == "gaussian" else 1 if self.kind == "cross_entropy" else outputs


class ScheduleSpec:
    """A schedule inside an ``UpdateRule``, for loading pickles of release 0.1."""


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
        """The optimizer's number for the kernels; raises ArgumentError if there is no such optimizer."""
        if self.name not in pointwise.OPTIMIZERS:
            raise unknown_name("rule: kind", self.kind, pointwise.OPTIMIZERS)
        return list(pointwise.OPTIMIZERS).index(self.name)

    def renumbered(self, **numbers: float) -> UpdateRule:
        """Return ``replace(self, **numbers)``, in a fifth of its time."""
        rule = object.__new__(UpdateRule)
        vars(rule).update(vars(self), **numbers)
        return rule

    @property
    def fuses(self) -> bool:
        """True if an update needs nothing but the gradient of its own batch and element."""
        return self.accumulate == 1 and self.clip_norm is None

    @property
    def states(self) -> tuple[str, ...]:
        """The names of the arrays, shaped like the parameters, that the optimizer keeps; an average comes last."""
        return list(pointwise.OPTIMIZERS.values())[self.code].states + (pointwise.AVERAGE.states if self.ema else ())

    @property
    def state_count(self) -> int:
        """The number of ``states``."""
        return len(self.states)

    @property
    def average(self) -> int | None:
        """The number of the state that predictions read in place of the parameters; None if they read these."""
        return self.state_count - 1 if self.ema else None

    def places(self, states: Sequence[Any], spare: Any) -> tuple[Any, Any, Any]:
        """Return the first and the second array of state of the optimizer itself, and the average; ``spare`` stands
        for those that it does not have."""
        own = states[: self.average]
        first, second = (*own, spare, spare)[:2]
        return first, second, states[-1] if self.ema else spare


@dataclass(frozen=True)
class TensorRule:
    """One parameter tensor's own part of the optimizer's rule."""

    lr_factor: float = 1.0
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Segment:
    """A tensor's stretch of the flat arena, in elements; that of a matrix may tell its ``columns`` and its ``pitch``,
    the elements from one row to the next."""

    offset: int
    size: int
    rule: TensorRule
    columns: int = 0
    pitch: int = 0


@dataclass(frozen=True)
class Ridge:
    """The penalty and the divisor of scikit-learn's MLPs, for ``train_resident`` with the reduction "mean".

    The penalty of a batch is ``strength`` / 2 times the squares of the trained weights, without biases and slopes, over
    the sum of the batch's row weights: 1 each without weights, times their classes' for the cross-entropy of integer
    targets. A zero sum gives no penalty. The loss is divided by that sum times ``divisor``; None stands for N with the
    element-wise losses, for 1 with cross-entropy.
    """

    strength: float = 0.0
    divisor: float | None = None


@dataclass(frozen=True)
class Noise:
    """Gaussian noise for the sum of clipped gradients (Abadi et al., "Deep learning with differential privacy", 2016).

    The gradient g of a tensor becomes (g + ``deviation`` * z) / ``divisor`` with z standard normal: see
    ``philox.normal``, whose key is ``seed``, and whose elements are a tensor's without gaps between its rows.
    """

    deviation: float
    divisor: float
    seed: int

    def check(self, rule: UpdateRule) -> None:
        """Raise ArgumentError for an optimizer that does not take one batch's gradients as they are."""
        if not rule.fuses:
            raise ArgumentError("noise: it is for one batch's clipped gradients; leave out clip_norm and accumulate")


@dataclass(frozen=True)
class Perturbation:
    """Limits of what ``perturb`` does to inputs x: ``eps`` in the norm "inf" or "2", and bounds ``low`` and ``high``.

    ``step`` is the length of a step, in the same norm. ``seed`` is that of a random start; None: x itself.
    """

    eps: float
    step: float
    norm: str = "inf"
    low: float = -math.inf
    high: float = math.inf
    seed: int | None = None


@dataclass(frozen=True)
class ResidentLimits:
    """The largest network that a kernel of a backend's ``train_resident`` takes, and what a step takes there and in
    launches.

    ``width`` is that of the hidden layers, of which there are ``hidden`` or more, ``batch`` the rows of a batch. A
    model has one multiprocessor to itself: its step takes ``step`` seconds, and one for each ``speed`` floating-point
    operations. In launches on the whole card it takes ``launch`` seconds for each, and ``element`` for each element
    along the products' reductions, which run one after another.
    """

    kernel: str
    layers: int
    inputs: int
    width: int
    outputs: int
    batch: int
    precisions: tuple[str, ...]
    step: float
    speed: float
    launch: float = 0.0
    element: float = 0.0
    hidden: int = 0

    def resident_seconds(self, flops: int) -> float:
        """Return the time of a step of ``flops`` operations in the resident kernel."""
        return self.step + flops / self.speed

    def graph_seconds(self, sizes: Sequence[int], batch: int) -> float:
        """Return the time of a step in launches, for a network of these widths, inputs first."""
        reductions = sum(sizes[:-1]) + sum(sizes[2:]) + batch
        return 2 * (len(sizes) - 1) * self.launch + reductions * self.element


@dataclass(frozen=True)
class NarrowLimits:
    """The largest network that a backend's ``train_narrow`` and ``predict_narrow`` take: its hidden layers, by
    precision the most inputs and units of a hidden layer, and its outputs. A step runs in ``programs``, each of which
    takes ``rows`` of a batch at a time."""

    layers: int
    widths: tuple[tuple[str, int], ...]
    outputs: int
    rows: int
    programs: int

    def parts(self, batch: int) -> int:
        """Return the number of programs for a batch, each of which has a sum of the gradients."""
        return max(1, min(self.programs, -(-batch // self.rows)))


@dataclass(frozen=True)
class Traits:
    """The facts about a backend that the lowering reads; plain data, so a plan can be printed without the backend.

    ``row_multiple``: the row pitch of the engine's matrices is a multiple of this many elements.
    ``gathers_in_load``: x[rows] needs no workspace. ``stores_masks``: dropout masks are kept from forward to backward.
    ``widest_fused_output``: the largest N for which ``linear_loss_grad`` exists; wider outputs take two calls.
    ``fused_updates``: the optimizers for which ``grad_weight_update`` is the fastest. ``norms_gradients``:
    ``grad_weight`` knows the norm of the gradients. ``split_rows``, ``split_size``: see ``batch_parts``.
    ``plans``: from the slowest to the fastest. ``on_host``: arrays are NumPy's. ``resident``: None if any network may
    be resident. ``card``, ``chip``: the limits of these plans. ``narrow``: None without ``train_narrow``.
    ``reads_codes``: a first layer takes the operand ``coding``.
    """

    name: str
    row_multiple: int
    widest_fused_output: int
    fused_updates: tuple[str, ...]
    precisions: tuple[str, ...]
    plans: tuple[str, ...]
    gathers_in_load: bool = False
    stores_masks: bool = False
    norms_gradients: bool = False
    split_rows: int = 0
    split_size: int = 0
    on_host: bool = False
    resident: ResidentLimits | None = None
    card: ResidentLimits | None = None
    chip: ResidentLimits | None = None
    narrow: NarrowLimits | None = None
    reads_codes: bool = False

    def looped(self, plan: str) -> ResidentLimits | None:
        """Return the limits of a plan with many steps a launch."""
        return {"card": self.card, "chip": self.chip}.get(plan, self.resident)

    @property
    def stepwise(self) -> str:
        """The fastest plan that starts the calls of any step."""
        return next(plan for plan in reversed(self.plans) if plan in ("graph", "eager"))


def resident_refusal(
    limits: ResidentLimits | None, name: str, sizes: Sequence[int], batch: int, precision: str, others: Sequence[str]
) -> str | None:
    """Return why the kernel of backend ``name`` with these limits takes no network of these widths, inputs first; None
    if it does.

    ``others``: words for what the steps have beside plain layers.
    """
    if limits is None:
        return None
    kernel = f"the {name} backend's {limits.kernel}"
    if others:
        return f"{kernel} trains without {others[0]}"
    for what, count, most in (
        ("layers", len(sizes) - 1, limits.layers),
        ("inputs", sizes[0], limits.inputs),
        ("units in a hidden layer", max(sizes[1:-1], default=0), limits.width),
        ("outputs", sizes[-1], limits.outputs),
        ("rows in a batch", batch, limits.batch),
    ):
        if count > most:
            return f"{count} {what} are more than the {most} of {kernel}"
    if precision not in limits.precisions:
        return f"{kernel} is for {', '.join(limits.precisions)}, not for {precision}"
    if len(sizes) - 2 < limits.hidden:
        return f"{kernel} needs {limits.hidden} hidden layer, got {len(sizes) - 2}"
    return None


def narrow_refusal(traits: Traits, sizes: Sequence[int], activations: Sequence[Any], precision: str) -> str | None:
    """Return why a backend has no ``train_narrow`` for a network of these widths, inputs first, and activations of
    hidden layers; None if it has."""
    limits = traits.narrow
    if limits is None:
        return f"the {traits.name} backend has no narrow kernel"
    kernel, widths = f"the {traits.name} backend's narrow kernel", dict(limits.widths)
    if precision not in widths:
        return f"{kernel} is for {', '.join(widths) or 'other cards'}, not for {precision}"
    hidden = len(sizes) - 2
    if not 1 <= hidden <= limits.layers:
        return f"{kernel} takes 1 to {limits.layers} hidden layers, not {hidden}"
    for what, count, most in (
        ("inputs or units in a layer", max(sizes[:-1]), widths[precision]),
        ("outputs", sizes[-1], limits.outputs),
    ):
        if count > most:
            return f"{count} {what} are more than the {most} of {kernel}"
    if len(set(activations)) > 1:
        return f"{kernel} takes one activation for all hidden layers"
    return None


def step_flops(sizes: Sequence[int], batch: int) -> int:
    """Return the floating-point operations of a step's matrix products; a multiplication and an addition are two."""
    products = [2 * batch * inputs * outputs for inputs, outputs in itertools.pairwise(sizes)]
    # a step has no gradient by the data
    return 3 * sum(products) - products[0]


def batch_parts(traits: Traits, rows: int, weights: int) -> int:
    """Return the number of parts into which the gradients by ``weights`` parameters cut a batch of ``rows``.

    With a long batch and few weights, tiles of the weights alone do not keep a GPU busy; ``split_size`` weights do. A
    part has at least ``split_rows`` rows; 0: never cut.
    """
    if not traits.split_rows or not weights:
        return 1
    return max(1, min(rows // traits.split_rows, traits.split_size // weights, MOST_PARTS))


class Backend(Protocol):
    """One device's implementation of the contract. ``Any`` stands for the backend's own array type."""

    traits: Traits
    device: str

    def allocate(self, size: int, dtype: str) -> Any:
        """Return a flat, zeroed, 256-byte aligned array of "real", "compute", "float64", "int64" or "bool"."""

    def view(self, flat: Any, offset: int, shape: tuple[int, ...], pitch: int) -> Any:
        """Return a (rows, columns) or (columns,) view of ``flat`` from ``offset`` on, rows ``pitch`` elements apart."""

    def adopt(self, array: Any) -> Any | None:
        """Return ``array`` as the backend's own type over the same memory; None if that is not the device's.

        ``array`` may have ``__cuda_array_interface__`` or ``__dlpack__``.
        """

    def extent(self, array: Any) -> tuple[float, float]:
        """Return the least and the greatest element, NaN if one is; waits for the device. The array is not empty."""

    def is_integer(self, array: Any) -> bool:
        """Return True if the elements are integers or bool."""

    def from_host(self, array: Any, dtype: str | None = None) -> Any:
        """Return a host array, or an adopted one, on the device, as ``dtype`` ("compute") if given.

        An adopted array is copied only if its type or its rows do not suit the kernels.
        """

    def to_host(self, array: Any) -> np.ndarray[Any, Any]:
        """Return a contiguous NumPy copy."""

    def read(self, *arrays: Any) -> list[np.ndarray[Any, Any]]:
        """Return float64 host copies of small arrays on the device, perhaps flat, and wait for it once."""

    def place(self, array: Any) -> Any:
        """Return where an adopted array lies: two that lie in the same place are the same to a bound call."""

    def copy_into(self, destination: Any, source: Any) -> None:
        """Write a host array, or an adopted one, into a device array of the same shape; does not wait for the device.

        The host array may change when this returns.
        """

    def bind(self, op: str, **operands: Any) -> Callable[..., object]:
        """Return the call, to be run any number of times; ``train_resident`` and ``train_fleet`` take the steps.

        On the host it also takes ``arrays``, those of the program by name, and ``memo``, a dict that stays with calls
        which differ in nothing but their arrays, and in the numbers of their operand ``rule``: what is kept in it makes
        binding them again cheap. It appends to ``numbers``, a list, the float64 array of the ``HYPERPARAMETERS`` that
        each run reads, for a caller that changes them.
        """

    def scalar(self, array: Any, index: int) -> Any:
        """Return a copy of one element of a "float64" array as a 0-d "real" array; does not wait for the device."""

    def capture(self, run: Callable[[], object], times: int) -> Callable[[], object]:
        """Return a call that starts the work of ``times`` runs at once, for backends with the plan "graph".

        ``run`` has run before; capturing does not run it.
        """

    def follow(self) -> None:
        """Let the current stream wait for what this backend was last asked for on another one.

        Not while it is captured: a graph cannot wait for work outside.
        """

    def synchronize(self) -> None:
        """Wait until all started work has ended; raises the device's errors."""
