"""Optimizers as frozen descriptions; ``fusemlp_kernels.reference.update`` has the arithmetic.

The meaning of every option is torch's. ``convention="scikit-learn"`` keeps the learning rate inside SGD's
velocity and adds Adam's epsilon before the bias correction, as scikit-learn's networks do.

Options of all of them, by keyword:

- ``lr``: a learning rate >= 0, or a schedule
- ``weight_decay``: coupled (an L2 penalty in the gradient) for SGD and Adam, decoupled for AdamW
- ``clip_norm``: gradients with a greater global norm are scaled down to this norm
- ``accumulate``: the number of batches whose mean gradient makes one update
- ``decay_biases``: False excludes the biases, and the PReLU slopes, from weight decay
- ``per_parameter``: a mapping of patterns (as in file names: ``0.*``, ``*.bias``) to ``ParameterOptions``;
  the first pattern that matches a parameter's name decides
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, ClassVar

from fusemlp.describe.checks import as_count, as_number, check_choice, check_flag, check_keys, freeze
from fusemlp.describe.network import MLP
from fusemlp.describe.schedules import Schedule, as_schedule, schedule_from_config
from fusemlp_kernels.contract import TensorRule, UpdateRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, unknown_name

CONVENTIONS = ("torch", "scikit-learn")


@dataclass(frozen=True)
class ParameterOptions:
    """Options of some parameters that override the optimizer's.

    ``trainable=False`` freezes them; ``lr_factor`` multiplies the learning rate; ``weight_decay``, unless None,
    replaces the optimizer's and overrides ``decay_biases``.
    """

    trainable: bool = True
    lr_factor: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        freeze(
            self,
            trainable=check_flag("trainable", self.trainable),
            lr_factor=as_number("lr_factor", self.lr_factor, low=0.0),
        )
        if self.weight_decay is not None:
            freeze(self, weight_decay=as_number("weight_decay", self.weight_decay, low=0.0))

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-able description; ``ParameterOptions(**config)`` inverts it."""
        return asdict(self)


PerParameter = Mapping[str, ParameterOptions] | Iterable[tuple[str, ParameterOptions]]


@dataclass(frozen=True, init=False)
class Optimizer(ABC):
    """The base class of all optimizers."""

    kind: ClassVar[str]
    lr: float | Schedule
    weight_decay: float
    clip_norm: float | None
    accumulate: int
    decay_biases: bool
    per_parameter: tuple[tuple[str, ParameterOptions], ...]

    def __init__(
        self,
        lr: float | Schedule,
        *,
        weight_decay: float,
        clip_norm: float | None,
        accumulate: int,
        decay_biases: bool,
        per_parameter: PerParameter,
    ) -> None:
        as_schedule("lr", lr)
        freeze(
            self,
            lr=lr if isinstance(lr, Schedule) else float(lr),
            weight_decay=as_number("weight_decay", weight_decay, low=0.0),
            clip_norm=None if clip_norm is None else as_number("clip_norm", clip_norm, low=0.0, low_open=True),
            accumulate=as_count("accumulate", accumulate, minimum=1),
            decay_biases=check_flag("decay_biases", decay_biases),
            per_parameter=_patterns(per_parameter),
        )

    @cached_property
    def schedule(self) -> Schedule:
        """The learning rate as a schedule."""
        return as_schedule("lr", self.lr)

    def rule(self) -> UpdateRule:
        """The optimizer for the kernels."""
        return UpdateRule(clip_norm=self.clip_norm, accumulate=self.accumulate, **self._options())

    @abstractmethod
    def _options(self) -> dict[str, Any]:
        """Return the fields of ``UpdateRule`` that only this optimizer sets."""

    def options_for(self, name: str) -> tuple[bool, TensorRule]:
        """Return whether the parameter ``name`` is trained, and its own part of the rule."""
        decays = self.decay_biases or not _is_bias_or_slope(name)
        weight_decay = self.weight_decay if decays else 0.0
        for pattern, options in self.per_parameter:
            if fnmatchcase(name, pattern):
                if options.weight_decay is not None:
                    weight_decay = options.weight_decay
                return options.trainable, TensorRule(options.lr_factor, weight_decay)
        return True, TensorRule(1.0, weight_decay)

    def check_network(self, net: MLP) -> None:
        """Refuse a pattern of ``per_parameter`` that no parameter of ``net`` has; raises ArgumentError."""
        names = list(net.parameter_shapes())
        for pattern, _ in self.per_parameter:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ArgumentError(
                    f"per_parameter: no parameter matches {pattern!r}; the network has: {', '.join(names)}"
                )

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-able description; ``optimizer_from_config`` inverts it."""
        config: dict[str, Any] = {"kind": self.kind}
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, Schedule):
                value = value.to_config()
            elif option.name == "per_parameter":
                value = [[pattern, options.to_config()] for pattern, options in value]
            elif isinstance(value, tuple):
                value = list(value)
            config[option.name] = value
        return config


@dataclass(frozen=True, init=False)
class SGD(Optimizer):
    """Stochastic gradient descent with ``momentum`` in [0, 1) (Polyak, 1964), or Nesterov's (1983)."""

    kind = "sgd"
    momentum: float
    nesterov: bool
    convention: str

    def __init__(
        self,
        lr: float | Schedule = 0.01,
        *,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        convention: str = "torch",
        clip_norm: float | None = None,
        accumulate: int = 1,
        decay_biases: bool = True,
        per_parameter: PerParameter = (),
    ) -> None:
        super().__init__(
            lr,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            accumulate=accumulate,
            decay_biases=decay_biases,
            per_parameter=per_parameter,
        )
        freeze(
            self,
            momentum=as_number("momentum", momentum, low=0.0, high=1.0, high_open=True),
            nesterov=check_flag("nesterov", nesterov),
            convention=check_choice("convention", convention, CONVENTIONS),
        )
        if self.nesterov and not self.momentum:
            raise ArgumentError("nesterov: True needs momentum > 0, got momentum=0.0; try momentum=0.9")

    def _options(self) -> dict[str, Any]:
        return {
            "kind": "sgd",
            "momentum": self.momentum,
            "nesterov": self.nesterov,
            "convention": self.convention,
        }


@dataclass(frozen=True, init=False)
class Adam(Optimizer):
    """Adam (Kingma and Ba, 2015): ``betas`` in [0, 1) average the gradient and its square, ``eps`` > 0."""

    kind = "adam"
    betas: tuple[float, float]
    eps: float
    convention: str

    def __init__(
        self,
        lr: float | Schedule = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        convention: str = "torch",
        clip_norm: float | None = None,
        accumulate: int = 1,
        decay_biases: bool = True,
        per_parameter: PerParameter = (),
    ) -> None:
        super().__init__(
            lr,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            accumulate=accumulate,
            decay_biases=decay_biases,
            per_parameter=per_parameter,
        )
        freeze(
            self,
            betas=_betas(betas),
            eps=as_number("eps", eps, low=0.0, low_open=True),
            convention=check_choice("convention", convention, CONVENTIONS),
        )

    def _options(self) -> dict[str, Any]:
        beta1, beta2 = self.betas
        return {
            "kind": "adam",
            "beta1": beta1,
            "beta2": beta2,
            "eps": self.eps,
            "convention": self.convention,
        }


@dataclass(frozen=True, init=False)
class AdamW(Optimizer):
    """Adam with decoupled weight decay, a factor ``1 - lr * weight_decay`` (Loshchilov and Hutter, 2019)."""

    kind = "adamw"
    betas: tuple[float, float]
    eps: float

    def __init__(
        self,
        lr: float | Schedule = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        clip_norm: float | None = None,
        accumulate: int = 1,
        decay_biases: bool = True,
        per_parameter: PerParameter = (),
    ) -> None:
        super().__init__(
            lr,
            weight_decay=weight_decay,
            clip_norm=clip_norm,
            accumulate=accumulate,
            decay_biases=decay_biases,
            per_parameter=per_parameter,
        )
        freeze(self, betas=_betas(betas), eps=as_number("eps", eps, low=0.0, low_open=True))

    def _options(self) -> dict[str, Any]:
        beta1, beta2 = self.betas
        return {"kind": "adam", "beta1": beta1, "beta2": beta2, "eps": self.eps, "decoupled": True}


OPTIMIZERS: dict[str, type[SGD] | type[Adam] | type[AdamW]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}


def _betas(given: object) -> tuple[float, float]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ArgumentTypeError(f"betas: expected two numbers such as (0.9, 0.999), got {given!r}")
    betas = tuple(given)
    if len(betas) != 2:
        raise ArgumentError(f"betas: expected two numbers such as (0.9, 0.999), got {betas!r}")
    first, second = (as_number(f"betas[{i}]", b, low=0.0, high=1.0, high_open=True) for i, b in enumerate(betas))
    return first, second


def _patterns(given: object) -> tuple[tuple[str, ParameterOptions], ...]:
    pairs = given.items() if isinstance(given, Mapping) else given
    expected = 'expected a mapping such as {"0.*": ParameterOptions(trainable=False)}'
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):
        raise ArgumentTypeError(f"per_parameter: {expected}, got {given!r}")
    patterns = []
    for pair in pairs:
        match pair:
            case (str(pattern), ParameterOptions() as options):
                patterns.append((pattern, options))
            case _:
                raise ArgumentTypeError(f"per_parameter: {expected}, got {pair!r}")
    return tuple(patterns)


def _is_bias_or_slope(name: str) -> bool:
    """Return the short name: layer l's tensors have the number 2l, its PReLU slope 2l + 1."""
    number, _, tensor = name.partition(".")
    return tensor == "bias" or int(number) % 2 == 1


def as_optimizer(value: str | Optimizer) -> Optimizer:
    """Return the optimizer for a name (sgd, adam, adamw) or an object; a name stands for the defaults."""
    if isinstance(value, Optimizer):
        return value
    if not isinstance(value, str):
        raise ArgumentTypeError(
            f"optimizer: expected a name such as 'adam' or an object such as SGD(lr=0.1), got {value!r}"
        )
    if value not in OPTIMIZERS:
        raise unknown_name("optimizer", value, OPTIMIZERS)
    return OPTIMIZERS[value]()


def optimizer_from_config(config: Mapping[str, Any]) -> Optimizer:
    """Invert ``to_config``."""
    cls = OPTIMIZERS[check_choice("optimizer", config.get("kind"), OPTIMIZERS)]
    check_keys("optimizer", config, ("kind", *(option.name for option in fields(cls))))
    options = {name: value for name, value in config.items() if name != "kind"}
    if isinstance(options["lr"], Mapping):
        options["lr"] = schedule_from_config(options["lr"])
    options["per_parameter"] = [(pattern, ParameterOptions(**changes)) for pattern, changes in options["per_parameter"]]
    return cls(**options)
