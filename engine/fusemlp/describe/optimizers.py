"""Optimizers and learning rate schedules as frozen descriptions.

``fusemlp_kernels.reference.update`` has the arithmetic; the formula of each schedule stands here and nowhere else.

The meaning of every option is torch's. ``convention="scikit-learn"`` keeps the learning rate inside SGD's
velocity and adds Adam's epsilon before the bias correction, as scikit-learn's networks do.

Options of all of them, by keyword:

- ``lr``: a learning rate >= 0, or a schedule
- ``weight_decay``: coupled (an L2 penalty in the gradient) for SGD and Adam, decoupled for AdamW
- ``clip_norm``: gradients with a greater global norm are scaled down to this norm
- ``ema``: 0, or the decay of a moving average of the parameters, such as 0.999 (Polyak and Juditsky, 1992): training
  goes on from the parameters, and all else reads the average: ``predict``, validation, ``state_dict``, files
- ``accumulate``: the number of batches whose mean gradient makes one update
- ``decay_biases``: False excludes all but the weights of layers from weight decay
- ``per_parameter``: a mapping of patterns (as in file names: ``0.*``, ``*.bias``) to ``ParameterOptions``;
  the first pattern that matches a parameter's name decides
"""

import math
import numbers
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Self

import numpy as np

from fusemlp.describe.checks import as_count, as_number, check_choice, knows_names_of, names_absent
from fusemlp.describe.conflicts import Features, in_use
from fusemlp.describe.description import Count, Description, Flag, Fraction, NonNegative, OpenFraction, Positive
from fusemlp.describe.network import MLP
from fusemlp_kernels.contract import TensorRule, UpdateRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

Array = np.ndarray[Any, Any]
PlateauState = tuple[float, int, float]
"""Best value so far, epochs without an improvement, factor on the learning rate."""

PLATEAU_START: PlateauState = (math.inf, 0, 1.0)

# Schedules of earlier releases.
GONE = ("flat_cosine", "coslog4")


def kind_of_today(kind: Any) -> Any:
    """Return the kind of a schedule; a cosine, with a warning, for those of earlier releases."""
    if kind not in GONE:
        return kind
    warnings.warn(f"lr: {kind} is gone; a training that goes on has a cosine", stacklevel=2)
    return "cosine"


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
    """The base of all schedules; a subclass is a frozen dataclass with ``kind`` and ``after_warmup``.

    A schedule gives the rate as a function of ``t``, the number of updates applied so far. All lengths are in updates,
    not epochs. ``warmup`` stands in front of any schedule: over that many updates the rate grows linearly to the first
    rate of the schedule, which then begins. An int is a number of updates, a float below 1 a share of the whole
    training. ``steps=None`` is what remains of it after the warm-up: ``fit`` knows.

    The host computes a table of rates ahead of the updates that read them, so any Python function is a schedule:

        @dataclass(frozen=True)
        class InverseRoot(Schedule):
            kind = "inverse_root"
            lr: float

            def after_warmup(self, t):
                return self.lr / np.sqrt(1 + t)

    To load a checkpoint with it, enter the class first: ``SCHEDULES["inverse_root"] = InverseRoot``.
    """

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
        """Return the schedule of a configuration; for one of earlier releases see ``kind_of_today``."""
        if (kind := config.get("kind")) in GONE:
            kept = {name: value for name, value in config.items() if name != "flat_fraction"}
            config = {"final": 0.0, **kept, "kind": kind_of_today(kind)}
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


CONVENTIONS = ("torch", "scikit-learn")


@dataclass(frozen=True)
class ParameterOptions(Description):
    """Options of some parameters that override the optimizer's.

    ``trainable=False`` freezes them; ``lr_factor`` multiplies the learning rate; ``weight_decay``, unless None,
    replaces the optimizer's and overrides ``decay_biases``.
    """

    trainable: Flag = True
    lr_factor: NonNegative = 1.0
    weight_decay: NonNegative | None = None


# Of a parameter that no pattern matches.
NO_OPTIONS = ParameterOptions()
PerParameter = Mapping[str, ParameterOptions] | Iterable[tuple[str, ParameterOptions]]


def _check_rate(argument: str, value: float | Schedule) -> float | Schedule:
    as_schedule(argument, value)
    return value if isinstance(value, Schedule) else float(value)


def _check_betas(argument: str, given: object) -> tuple[float, float]:
    expected = f"{argument}: expected two numbers such as (0.9, 0.999), got"
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ArgumentTypeError(f"{expected} {given!r}")
    betas = tuple(given)
    if len(betas) != 2:
        raise ArgumentError(f"{expected} {betas!r}")
    first, second = (as_number(f"{argument}[{i}]", b, low=0.0, high=1.0, high_open=True) for i, b in enumerate(betas))
    return first, second


def _check_patterns(argument: str, given: object) -> tuple[tuple[str, ParameterOptions], ...]:
    expected = f'{argument}: expected a mapping such as {{"0.*": ParameterOptions(trainable=False)}}, got'
    pairs = given.items() if isinstance(given, Mapping) else given
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise ArgumentTypeError(f"{expected} {given!r}")
    patterns = []
    for pair in pairs:
        match pair:
            case (str(pattern), ParameterOptions() as options):
                patterns.append((pattern, options))
            case _:
                raise ArgumentTypeError(f"{expected} {pair!r}")
    return tuple(patterns)


Convention = Annotated[str, partial(check_choice, choices=CONVENTIONS)]
LearningRate = Annotated[float | Schedule, _check_rate]


@dataclass(frozen=True)
class Optimizer(Description, family="optimizer"):
    """The base class of all optimizers."""

    lr: LearningRate = 0.01
    _: KW_ONLY
    weight_decay: NonNegative = 0.0
    clip_norm: Positive | None = None
    ema: Fraction = 0.0
    accumulate: Count = 1
    decay_biases: Flag = True
    per_parameter: Annotated[PerParameter, _check_patterns] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Invert ``to_config``."""
        # older files have no average
        options = {"ema": 0.0, **config}
        if isinstance(options.get("lr"), Mapping):
            options["lr"] = Schedule.from_config(options["lr"])
        if "per_parameter" in options:
            options["per_parameter"] = [(pattern, ParameterOptions(**one)) for pattern, one in options["per_parameter"]]
        return super().from_config(options)

    @cached_property
    def schedule(self) -> Schedule:
        """The learning rate as a schedule."""
        return as_schedule("lr", self.lr)

    @cached_property
    def uses(self) -> Features:
        """The features that it uses, for ``conflicts``."""
        accumulate = self.accumulate if self.accumulate > 1 else None
        return in_use(clip_norm=self.clip_norm, accumulate=accumulate, ema=self.ema or None)

    @cached_property
    def patterns(self) -> tuple[tuple[str, ParameterOptions], ...]:
        """The pairs of ``per_parameter``; the first whose pattern matches holds."""
        return _check_patterns("per_parameter", self.per_parameter)

    def rule(self) -> UpdateRule:
        """Return the optimizer for the kernels."""
        return UpdateRule(**{"kind": self.kind, **self.shared(UpdateRule), **self._options()})

    def _options(self) -> dict[str, Any]:
        """Return fields of ``UpdateRule`` that have another name or another value here."""
        return {}

    def own_options(self, name: str) -> ParameterOptions:
        """Return the options that ``per_parameter`` has for the parameter ``name``."""
        for pattern, options in self.patterns:
            if fnmatchcase(name, pattern):
                return options
        return NO_OPTIONS

    def options_for(self, name: str) -> tuple[bool, TensorRule]:
        """Return whether the parameter ``name`` is trained, and its own part of the rule."""
        own, decays = self.own_options(name), self.decay_biases or _is_weight(name)
        weight_decay = self.weight_decay if decays else 0.0
        return own.trainable, TensorRule(own.lr_factor, weight_decay if own.weight_decay is None else own.weight_decay)

    def check_network(self, net: MLP) -> None:
        """Refuse a pattern of ``per_parameter`` that no parameter of ``net`` has; raises ArgumentError."""
        names = list(net.parameter_shapes())
        for pattern, _ in self.patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ArgumentError(
                    f"per_parameter: no parameter matches {pattern!r}; the network has: {', '.join(names)}"
                )


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with ``momentum`` in [0, 1) (Polyak, 1964), or Nesterov's (1983)."""

    kind = "sgd"
    _: KW_ONLY
    momentum: Fraction = 0.0
    nesterov: Flag = False
    convention: Convention = "torch"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise ArgumentError("nesterov: True needs momentum > 0, got momentum=0.0; try momentum=0.9")


@dataclass(frozen=True)
class _Adam(Optimizer):
    """The options that Adam and AdamW have in common."""

    lr: LearningRate = 1e-3
    _: KW_ONLY
    betas: Annotated[tuple[float, float], _check_betas] = (0.9, 0.999)
    eps: Positive = 1e-8

    def _options(self) -> dict[str, Any]:
        beta1, beta2 = self.betas
        return {"kind": "adam", "beta1": beta1, "beta2": beta2}


@dataclass(frozen=True)
class Adam(_Adam):
    """Adam (Kingma and Ba, 2015): ``betas`` in [0, 1) average the gradient and its square, ``eps`` > 0."""

    kind = "adam"
    _: KW_ONLY
    convention: Convention = "torch"


@dataclass(frozen=True)
class AdamW(_Adam):
    """Adam with decoupled weight decay, a factor ``1 - lr * weight_decay`` (Loshchilov and Hutter, 2019)."""

    kind = "adamw"
    _: KW_ONLY
    weight_decay: NonNegative = 0.01

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "decoupled": True}


OPTIMIZERS: dict[str, type[Optimizer]] = {cls.kind: cls for cls in (SGD, Adam, AdamW)}
Optimizer.kinds = OPTIMIZERS
# Arguments of Keras's optimizers.
_ELSEWHERE = {
    "learning_rate": "it is called lr here: Adam(lr=0.001)",
    "beta_1": "it is called betas here: Adam(betas=(0.9, 0.999))",
    "beta_2": "it is called betas here: Adam(betas=(0.9, 0.999))",
    "epsilon": "it is called eps here: Adam(eps=1e-7)",
    "use_ema": "give the decay alone: Adam(ema=0.99)",
    "ema_momentum": "it is called ema here: Adam(ema=0.99)",
    **dict.fromkeys(("clipnorm", "global_clipnorm"), "it is called clip_norm here"),
    "gradient_accumulation_steps": "it is called accumulate here",
    "decay": "lr takes a schedule: Adam(lr=Exponential(0.001, gamma=0.999))",
}
names_absent(Optimizer, {"learning_rate": "it is called lr; callbacks change it by engine.set_learning_rate(0.001)"})
for _cls in OPTIMIZERS.values():
    knows_names_of(_cls, _ELSEWHERE)


def _is_weight(name: str) -> bool:
    """Tell by a parameter's name: layer l's weight has the number 2l, a PReLU's slope 2l + 1."""
    number, _, tensor = name.partition(".")
    return tensor == "weight" and number.isdigit() and int(number) % 2 == 0


def as_optimizer(value: str | Optimizer) -> Optimizer:
    """Return the optimizer for a name (sgd, adam, adamw) or an object; a name stands for the defaults."""
    if isinstance(value, Optimizer):
        return value
    expected = "a name such as 'adam' or an object such as SGD(lr=0.1)"
    return OPTIMIZERS[check_choice("optimizer", value, OPTIMIZERS, expected=expected)]()
