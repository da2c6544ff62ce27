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

from __future__ import annotations

import math
import numbers
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import numpy as np

from fusemlp.describe.checks import as_count, as_number, check_choice, check_keys, freeze
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

Array = np.ndarray[Any, Any]
PlateauState = tuple[float, int, float]
"""Best value so far, epochs without an improvement, factor on the learning rate."""

PLATEAU_START: PlateauState = (math.inf, 0, 1.0)

# torch's OneCycleLR: the rate starts at a 25th of the peak and ends at a 10000th of where it started.
_ONE_CYCLE_END = 1.0 / 25.0 / 1e4


@dataclass(frozen=True)
class Schedule(ABC):
    """The base of all schedules; a subclass is a frozen dataclass with ``kind`` and ``after_warmup``."""

    kind: ClassVar[str]
    # whether the rate stays the same after the warm-up
    constant: ClassVar[bool] = False
    warmup: int | float = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if isinstance(self.warmup, numbers.Integral):
            freeze(self, warmup=as_count("warmup", self.warmup, minimum=0))
            return
        try:
            freeze(self, warmup=as_number("warmup", self.warmup, low=0.0, high=1.0, high_open=True))
        except ArgumentError as error:
            raise ArgumentError(
                f"{error}; give an int for a number of updates, a float for a share of the training"
            ) from None

    @abstractmethod
    def after_warmup(self, t: Array) -> Any:
        """The rates after ``t`` (n,) int64 updates since the warm-up: (n,), or one for all. At least 0.

        ``t`` may go past the end of the training: tables are filled ahead.
        """

    def over(self, total_updates: int | None) -> Self:
        """The schedule with its lengths as numbers of updates, for a training of ``total_updates`` (None: not known).

        Raises ArgumentError where a length depends on that number and it is not known.
        """
        return replace(self, **self._lengths(total_updates))

    def _lengths(self, total_updates: int | None) -> dict[str, int]:
        return {"warmup": self.warmup_updates(total_updates)}

    def rates(self, first: int, count: int) -> Array:
        """The learning rates of ``count`` updates, of which the first follows ``first`` others: (count,) float64.

        For schedules whose lengths are numbers of updates (``over``). Raises ArgumentError where a rate is negative
        or NaN.
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
        """The learning rate of the update that follows ``t`` others."""
        return float(self.rates(t, 1)[0])

    def warmup_updates(self, total_updates: int | None) -> int:
        """The length of the warm-up in updates."""
        if isinstance(self.warmup, int):
            return self.warmup
        if self.warmup == 0.0:
            return 0
        return round(self.warmup * _known("warmup", self.warmup, total_updates))

    def to_config(self) -> dict[str, Any]:
        """JSON-able; ``schedule_from_config`` is its inverse."""
        return {"kind": self.kind, **asdict(self)}


def _known(argument: str, value: object, total_updates: int | None) -> int:
    if total_updates is None:
        raise ArgumentError(
            f"{argument}: {value!r} depends on the length of the training, which only fit knows; "
            f"give {argument} as a number of updates"
        )
    return total_updates


def _steps(schedule: Cosine | OneCycle, total_updates: int | None) -> int:
    """The length of the part after the warm-up, at least 1."""
    if schedule.steps is not None:
        return schedule.steps
    return max(1, _known("steps", None, total_updates) - schedule.warmup_updates(total_updates))


def _each(function: Callable[[float], float], values: Array) -> Array:
    """A function of Python's of each value: its results do not depend on the table, as those of SIMD code may."""
    return np.fromiter(map(function, values.tolist()), np.float64, len(values))


def _powers(base: float, exponents: Array) -> Array:
    """``base`` to each of the exponents, the largest float where that is too large for one."""

    def power(exponent: float) -> float:
        try:
            return math.pow(base, exponent)
        except OverflowError:
            return sys.float_info.max

    return _each(power, exponents)


def _half_cosine(start: Any, end: Any, done: Array) -> Array:
    """Half a cosine wave from ``start`` (done = 0) to ``end`` (done = 1)."""
    rates: Array = end + (start - end) * (1.0 + _each(math.cos, math.pi * done)) / 2.0
    return rates


def _check_rate(argument: str, value: object) -> float:
    return as_number(argument, value, low=0.0)


@dataclass(frozen=True)
class Constant(Schedule):
    """The same rate ``lr`` throughout."""

    kind = "constant"
    constant = True
    lr: float

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze(self, lr=_check_rate("lr", self.lr))

    def after_warmup(self, t: Array) -> float:
        return self.lr


@dataclass(frozen=True)
class StepDecay(Schedule):
    """``lr * gamma ** (t // every)``: the rate falls by ``gamma`` after every ``every`` updates."""

    kind = "step"
    lr: float
    every: int = field(kw_only=True)
    gamma: float = field(default=0.1, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze(
            self,
            lr=_check_rate("lr", self.lr),
            every=as_count("every", self.every, minimum=1),
            gamma=as_number("gamma", self.gamma, low=0.0, low_open=True),
        )

    def after_warmup(self, t: Array) -> Array:
        return self.lr * _powers(self.gamma, t // self.every)


@dataclass(frozen=True)
class Exponential(Schedule):
    """``lr * gamma ** t``: the rate is multiplied by ``gamma`` after each update."""

    kind = "exponential"
    lr: float
    gamma: float = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze(
            self,
            lr=_check_rate("lr", self.lr),
            gamma=as_number("gamma", self.gamma, low=0.0, low_open=True),
        )

    def after_warmup(self, t: Array) -> Array:
        return self.lr * _powers(self.gamma, t)


@dataclass(frozen=True)
class Cosine(Schedule):
    """Half a cosine from ``lr`` to ``final`` over ``steps`` updates (Loshchilov and Hutter, 2017)."""

    kind = "cosine"
    lr: float
    final: float = field(default=0.0, kw_only=True)
    steps: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze(self, lr=_check_rate("lr", self.lr), final=_check_rate("final", self.final))
        if self.steps is not None:
            freeze(self, steps=as_count("steps", self.steps, minimum=1))

    def _lengths(self, total_updates: int | None) -> dict[str, int]:
        return {**super()._lengths(total_updates), "steps": _steps(self, total_updates)}

    def after_warmup(self, t: Array) -> Array:
        assert self.steps is not None
        return _half_cosine(self.lr, self.final, np.minimum(t / self.steps, 1.0))


@dataclass(frozen=True)
class OneCycle(Schedule):
    """Half a cosine up from ``peak / 25`` to ``peak``, another down to ``final`` (Smith and Topin, 2018).

    ``peak_fraction`` is the share of ``steps`` before the peak; ``final`` is ``peak / 250000`` unless given.
    """

    kind = "one_cycle"
    peak: float
    steps: int | None = field(default=None, kw_only=True)
    peak_fraction: float = field(default=0.3, kw_only=True)
    final: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze(
            self,
            peak=_check_rate("peak", self.peak),
            peak_fraction=as_number(
                "peak_fraction", self.peak_fraction, low=0.0, high=1.0, low_open=True, high_open=True
            ),
        )
        if self.steps is not None:
            freeze(self, steps=as_count("steps", self.steps, minimum=1))
        if self.final is not None:
            freeze(self, final=_check_rate("final", self.final))

    def _lengths(self, total_updates: int | None) -> dict[str, int]:
        return {**super()._lengths(total_updates), "steps": _steps(self, total_updates)}

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
    lr: float
    factor: float = field(default=0.1, kw_only=True)
    patience: int = field(default=10, kw_only=True)
    min_lr: float = field(default=0.0, kw_only=True)
    min_delta: float = field(default=1e-4, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze(
            self,
            lr=_check_rate("lr", self.lr),
            factor=as_number("factor", self.factor, low=0.0, high=1.0, low_open=True, high_open=True),
            patience=as_count("patience", self.patience, minimum=1),
            min_lr=_check_rate("min_lr", self.min_lr),
            min_delta=as_number("min_delta", self.min_delta, low=0.0),
        )
        if self.min_lr > self.lr:
            raise ArgumentError(f"min_lr: expected at most lr = {self.lr!r}, got {self.min_lr!r}")

    def after_warmup(self, t: Array) -> float:
        return self.lr


def plateau_step(schedule: ReduceOnPlateau, state: PlateauState, value: float) -> PlateauState:
    """The state after an epoch that ended with the loss ``value``; NaN is no improvement."""
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


def schedule_from_config(config: Mapping[str, Any]) -> Schedule:
    """The inverse of ``to_config``."""
    cls = SCHEDULES[check_choice("schedule", config.get("kind"), SCHEDULES)]
    check_keys("schedule", config, ("kind", *(option.name for option in fields(cls))))
    return cls(**{name: value for name, value in config.items() if name != "kind"})


def as_schedule(argument: str, value: float | Schedule) -> Schedule:
    """The schedule that a learning rate or an object stands for; ``argument`` is what an error calls it."""
    if isinstance(value, Schedule):
        return value
    if isinstance(value, numbers.Real):
        return Constant(_check_rate(argument, value))
    raise ArgumentTypeError(
        f"{argument}: expected a learning rate such as 0.1 or a schedule such as Cosine(0.1), got {value!r}"
    )
