"""Optimizers as frozen descriptions; ``fusemlp_kernels.reference.update`` has the arithmetic.

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

from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from typing import Annotated, Any, Self

from fusemlp.describe.checks import as_number, check_choice, knows_names_of
from fusemlp.describe.conflicts import Features, in_use
from fusemlp.describe.description import Count, Description, Flag, Fraction, NonNegative, Positive
from fusemlp.describe.network import MLP
from fusemlp.describe.schedules import Schedule, as_schedule
from fusemlp_kernels.contract import TensorRule, UpdateRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

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
        own, weight_decay = self.own_options(name), self.weight_decay
        if own.weight_decay is not None:
            weight_decay = own.weight_decay
        elif not self.decay_biases and not _is_weight(name):
            weight_decay = 0.0
        return own.trainable, TensorRule(own.lr_factor, weight_decay)

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
