"""Learning rate schedules as frozen descriptions; each formula stands here and nowhere else.

A schedule gives the rate as a function of ``t``, the number of updates applied so far. All lengths are in
updates, not epochs. ``warmup`` stands in front of any schedule: over that many updates the rate grows
linearly to the first rate of the schedule, which then begins. An int is a number of updates, a float below 1
a share of the whole training. ``steps=None`` is what remains of it after the warm-up: ``fit`` knows.

The host computes a table of rates ahead of the updates that read them, so any Python function is a schedule:

    @dataclass(frozen=True)
    class InverseRoot(Schedule):
        kind = "inverse_root"
        lr: float

        def after_warmup(self, t):
            return self.lr / np.sqrt(1 + t)

To load a checkpoint with it, enter the class first: ``SCHEDULES["inverse_root"] = InverseRoot``.
"""

import math
import numbers
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Annotated, Any, ClassVar, Self

import numpy as np

from fusemlp.describe.checks import as_count, as_number
from fusemlp.describe.description import Count, Description, NonNegative, OpenFraction, Positive
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

Array = np.ndarray[Any, Any]
PlateauState = tuple[float, int, float]
"""Best value so far, epochs without an improvement, factor on the learning rate."""

PLATEAU_START: PlateauState = (math.inf, 0, 1.0)

# Schedules of earlier releases.
GONE = ("flat_cosine", "coslog4")

# torch's OneCycleLR: the rate starts at a 25th of the peak and ends at a 10000th of where it started.
_ONE_CYCLE_END = 1.0 / 25.0 / 1e4


def _check_warmup(argument: str, value: Any) -> int | float:
    if isinstance(value, numbers.Integral):
        return as_count(argument, value, minimum=0)
    try:
        return as_number(argument, value, low=0.0, high=1.0, high_open=True)
    except ArgumentError as error:
        raise ArgumentError(
            f"{error}; give an int for a number of updates, a float for a share of the training"
        ) from None


@dataclass(frozen=True)
class Schedule(Description, ABC, family="schedule"):
    """The base of all schedules; a subclass is a frozen dataclass with ``kind`` and ``after_warmup``."""

    # whether the rate stays the same after the warm-up
    constant: ClassVar[bool] = False
    _: KW_ONLY
    warmup: Annotated[int | float, _check_warmup] = 0

    @abstractmethod
    def after_warmup(self, t: Array) -> Any:
        """The rates after ``t`` (n,) int64 updates since the warm-up: (n,), or one for all. At least 0.

        ``t`` may go past the end of the training: tables are filled ahead.
        """

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return the schedule of a configuration; a cosine, with a warning, for those of earlier releases."""
        if config.get("kind") in GONE:
            warnings.warn(f"lr: {config['kind']} is gone; a training that goes on has a cosine", stacklevel=2)
            kept = {name: value for name, value in config.items() if name != "flat_fraction"}
            config = {"final": 0.0, **kept, "kind": "cosine"}
        return super().from_config(config)

    def over(self, total_updates: int | None) -> Self:
        """Return the schedule with lengths in updates, for a training of ``total_updates`` (None: not known).

        Raises ArgumentError if a length depends on that number and it is not known.
        """
        lengths: dict[str, Any] = {"warmup": self.warmup_updates(total_updates)}
        if getattr(self, "steps", 0) is None:
            lengths["steps"] = max(1, _known("steps", None, total_updates) - lengths["warmup"])
        return replace(self, **lengths)

    def rates(self, first: int, count: int) -> Array:
        """Return the learning rates of ``count`` updates, the first after ``first`` others: (count,) float64.

        Lengths must be numbers of updates (``over``). Raises ArgumentError if a rate is negative or NaN.
        """
        assert isinstance(self.warmup, int) or self.warmup == 0.0
        warmup = int(self.warmup)
        t = np.arange(first, first + count)
        rates = np.empty(count)
        # what lies past the end of the training may overflow
        with np.errstate(all="ignore"):
            rates[:] = self.after_warmup(np.maximum(t - warmup, 0))
        if first < warmup:
            rates *= np.minimum((t + 1) / warmup, 1.0)
        # in this form a NaN is refused too
        if not rates.min() >= 0.0:
            worst = int(np.argmin(rates >= 0.0))
            raise ArgumentError(
                f"lr: {self!r} gave the rate {rates[worst]} after {first + worst} updates; a rate is at least 0"
            )
        return rates

    def at(self, t: int) -> float:
        """Return the learning rate of the update after ``t`` others."""
        return float(self.rates(t, 1)[0])

    def warmup_updates(self, total_updates: int | None) -> int:
        """Return the length of the warm-up in updates."""
        if isinstance(self.warmup, int) or self.warmup == 0.0:
            return int(self.warmup)
        return round(self.warmup * _known("warmup", self.warmup, total_updates))


def _known(argument: str, value: object, total_updates: int | None) -> int:
    if total_updates is None:
        raise ArgumentError(
            f"{argument}: {value!r} depends on the length of the training, which only fit knows; "
            f"give {argument} as a number of updates"
        )
    return total_updates


def _each(function: Callable[[float], float], values: Array) -> Array:
    """Apply a Python function to each value; unlike SIMD code, it gives a value the same result in every table."""
    return np.fromiter(map(function, values.tolist()), np.float64, len(values))


def _powers(base: float, exponents: Array) -> Array:
    """Return ``base`` to each of the exponents, and the largest float in place of an overflow."""

    def power(exponent: float) -> float:
        try:
            return math.pow(base, exponent)
        except OverflowError:
            return sys.float_info.max

    return _each(power, exponents)


def _half_cosine(start: Any, end: Any, done: Array) -> Array:
    """Return half a cosine wave from ``start`` (done = 0) to ``end`` (done = 1)."""
    rates: Array = end + (start - end) * (1.0 + _each(math.cos, math.pi * done)) / 2.0
    return rates


@dataclass(frozen=True)
class Constant(Schedule):
    """The same rate ``lr`` throughout."""

    kind = "constant"
    constant = True
    lr: NonNegative

    def after_warmup(self, t: Array) -> float:
        return self.lr


@dataclass(frozen=True)
class StepDecay(Schedule):
    """``lr * gamma ** (t // every)``: the rate falls by ``gamma`` after every ``every`` updates."""

    kind = "step"
    lr: NonNegative
    _: KW_ONLY
    every: Count
    gamma: Positive = 0.1

    def after_warmup(self, t: Array) -> Array:
        return self.lr * _powers(self.gamma, t // self.every)


@dataclass(frozen=True)
class Exponential(Schedule):
    """``lr * gamma ** t``: the rate is multiplied by ``gamma`` after each update."""

    kind = "exponential"
    lr: NonNegative
    _: KW_ONLY
    gamma: Positive

    def after_warmup(self, t: Array) -> Array:
        return self.lr * _powers(self.gamma, t)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from ``lr`` to ``final`` over ``steps`` updates (Loshchilov and Hutter, 2017)."""

    kind = "cosine"
    lr: NonNegative
    _: KW_ONLY
    final: NonNegative = 0.0
    steps: Count | None = None

    def after_warmup(self, t: Array) -> Array:
        assert self.steps is not None
        return _half_cosine(self.lr, self.final, np.minimum(t / self.steps, 1.0))


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Half a cosine up from ``peak / 25`` to ``peak``, another down to ``final`` (Smith and Topin, 2018).

    ``peak_fraction`` is the share of ``steps`` before the peak; ``final`` is ``peak / 250000`` unless given.
    """

    kind = "one_cycle"
    peak: NonNegative
    _: KW_ONLY
    steps: Count | None = None
    peak_fraction: OpenFraction = 0.3
    final: NonNegative | None = None

    def after_warmup(self, t: Array) -> Array:
        """torch's OneCycleLR: the peak at ``peak_fraction * steps - 1``, ``final`` from ``steps - 1`` on."""
        assert self.steps is not None
        top, last = self.peak_fraction * self.steps - 1.0, self.steps - 1.0
        final = self.peak * _ONE_CYCLE_END if self.final is None else self.final
        rising = (t <= top) & (top > 0)
        falls = np.where(t < last, np.minimum((t - top) / (last - top), 1.0), 1.0)
        start, end = np.where(rising, self.peak / 25.0, self.peak), np.where(rising, self.peak, final)
        return _half_cosine(start, end, np.where(rising, t / top, falls))


@dataclass(frozen=True)
class ReduceOnPlateau(Schedule):
    """The rate ``lr``, multiplied by ``factor`` when the validation loss stops improving, down to ``min_lr``.

    At the end of an epoch the loss counts as better when it is less than the best by more than ``min_delta``;
    after ``patience`` epochs in a row without that the rate is reduced and the count begins anew. The caller
    keeps the state: ``PLATEAU_START``, then what ``plateau_step`` returns.
    """

    kind = "reduce_on_plateau"
    constant = True
    lr: NonNegative
    _: KW_ONLY
    factor: OpenFraction = 0.1
    patience: Count = 10
    min_lr: NonNegative = 0.0
    min_delta: NonNegative = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_lr > self.lr:
            raise ArgumentError(f"min_lr: expected at most lr = {self.lr!r}, got {self.min_lr!r}")

    def after_warmup(self, t: Array) -> float:
        return self.lr


def plateau_step(schedule: ReduceOnPlateau, state: PlateauState, value: float) -> PlateauState:
    """Return the state after an epoch that ended with the loss ``value``; NaN is no improvement."""
    best, wait, scale = state
    if value < best - schedule.min_delta:
        return value, 0, scale
    wait += 1
    if wait < schedule.patience:
        return best, wait, scale
    floor = schedule.min_lr / schedule.lr if schedule.lr else 0.0
    return best, 0, max(scale * schedule.factor, floor)


SCHEDULES: dict[str, type[Schedule]] = {
    cls.kind: cls for cls in (Constant, StepDecay, Exponential, Cosine, OneCycle, ReduceOnPlateau)
}
Schedule.kinds = SCHEDULES


def as_schedule(argument: str, value: float | Schedule) -> Schedule:
    """Return the schedule for a learning rate or an object; errors call it ``argument``."""
    if isinstance(value, Schedule):
        return value
    if isinstance(value, numbers.Real):
        return Constant(as_number(argument, value, low=0.0))
    raise ArgumentTypeError(
        f"{argument}: expected a learning rate such as 0.1 or a schedule such as Cosine(0.1), got {value!r}"
    )
