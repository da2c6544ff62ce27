"""Losses as frozen descriptions; ``fusemlp_kernels.reference.loss_grad`` has the formulas.

``reduction="mean"`` is the (weighted) mean over rows for cross_entropy, and over all elements for the others;
"sum" is the sum. ``M`` rows, ``N`` outputs.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

from fusemlp.describe.checks import as_number, check_choice, check_keys, freeze
from fusemlp.describe.network import MLP
from fusemlp_kernels.contract import LossSpec
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, ShapeError, unknown_name

REDUCTIONS = ("mean", "sum")
_NAMES_ELSEWHERE = {
    "categorical_crossentropy": "cross_entropy",
    "sparse_categorical_crossentropy": "cross_entropy",
    "log_loss": "cross_entropy",
    "bce": "binary_cross_entropy",
    "squared_error": "mse",
    "mean_squared_error": "mse",
    "l2": "mse",
    "absolute_error": "mae",
    "mean_absolute_error": "mae",
    "l1": "mae",
    "smooth_l1": "huber",
    "pinball": "quantile",
}


@dataclass(frozen=True)
class Loss:
    """The base class of all losses."""

    kind: ClassVar[str]
    takes_logits: ClassVar[str] = ""
    reduction: str = field(default="mean", kw_only=True)

    def __post_init__(self) -> None:
        check_choice("reduction", self.reduction, REDUCTIONS)

    @property
    def is_classification(self) -> bool:
        """True if targets are classes; ``predict`` then returns classes."""
        return self.kind in ("cross_entropy", "binary_cross_entropy")

    @property
    def class_weight(self) -> tuple[float, ...] | None:
        """A weight for each class; only cross_entropy has them."""
        return None

    def spec(self, *, accuracy: bool, soft: bool = False) -> LossSpec:
        """Return the loss for the kernels: ``accuracy`` counts hits, ``soft`` is for rows of probabilities."""
        if soft and self.kind != "cross_entropy":
            raise ArgumentError(f"soft: only cross_entropy takes probabilities as targets, not {self.kind}")
        return LossSpec(self.kind, reduction=self.reduction, soft=soft, accuracy=accuracy, **self._options())

    def _options(self) -> dict[str, Any]:
        """Return the fields of ``LossSpec`` that only this loss sets."""
        return {}

    def check_network(self, net: MLP) -> None:
        """Refuse a network whose outputs this loss cannot take; raises ArgumentError or ShapeError."""
        given = net.activations[-1].name
        if self.takes_logits and given != "identity":
            raise ArgumentError(
                f"output_activation: {self.kind} takes {self.takes_logits}; expected 'identity', got {given!r}"
            )

    def to_config(self) -> dict[str, Any]:
        """Return a JSON-able description; ``loss_from_config`` inverts it."""
        config = {"kind": self.kind, **asdict(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in config.items()}


@dataclass(frozen=True, init=False)
class CrossEntropy(Loss):
    """Softmax cross-entropy of logits (M, N >= 2) with class indices (M,) or rows of probabilities (M, N).

    ``label_smoothing`` in [0, 1] mixes the uniform distribution into the target (Szegedy et al., 2016).
    ``class_weight`` has one weight >= 0 a class: a sequence, or a mapping of the indices 0 to N - 1.
    Rows whose class index is ``ignore_index`` weigh nothing.
    """

    kind = "cross_entropy"
    takes_logits = "logits and applies the softmax itself (predict_proba does too)"
    label_smoothing: float = 0.0
    class_weight: tuple[float, ...] | None = None
    ignore_index: int | None = None

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        class_weight: Iterable[float] | Mapping[int, float] | None = None,
        ignore_index: int | None = None,
        reduction: str = "mean",
    ) -> None:
        freeze(
            self,
            label_smoothing=as_number("label_smoothing", label_smoothing, low=0.0, high=1.0),
            class_weight=None if class_weight is None else _class_weights(class_weight),
            ignore_index=None if ignore_index is None else _label(ignore_index),
            reduction=check_choice("reduction", reduction, REDUCTIONS),
        )

    def spec(self, *, accuracy: bool, soft: bool = False) -> LossSpec:
        if soft and self.ignore_index is not None:
            raise ArgumentError(
                f"ignore_index: {self.ignore_index} is a class index, and the targets are rows of "
                "probabilities; leave it None, or give class indices as targets"
            )
        return super().spec(accuracy=accuracy, soft=soft)

    def _options(self) -> dict[str, Any]:
        return {"label_smoothing": self.label_smoothing, "ignore_index": self.ignore_index}

    def check_network(self, net: MLP) -> None:
        super().check_network(net)
        outputs = net.sizes[-1]
        if outputs < 2:
            raise ArgumentError(
                f"loss: cross_entropy needs at least 2 outputs, the network has {outputs}; widen the last of "
                "sizes to the number of classes, or use binary_cross_entropy"
            )
        if self.class_weight is not None and len(self.class_weight) != outputs:
            raise ShapeError(
                f"class_weight: expected {outputs} weights, one for each output, got {len(self.class_weight)}"
            )


@dataclass(frozen=True)
class BinaryCrossEntropy(Loss):
    """Sigmoid cross-entropy of logits (M, N), element by element: one label, or N, each 0 or 1."""

    kind = "binary_cross_entropy"
    takes_logits = "logits and applies the sigmoid itself (predict_proba does too)"


@dataclass(frozen=True)
class MSE(Loss):
    """``(y - target) ** 2``."""

    kind = "mse"


@dataclass(frozen=True)
class MAE(Loss):
    """``|y - target|``."""

    kind = "mae"


@dataclass(frozen=True)
class Huber(Loss):
    """``e**2 / 2`` where the error ``|e| <= delta``, ``delta * (|e| - delta / 2)`` beyond (Huber, 1964)."""

    kind = "huber"
    delta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze(self, delta=as_number("delta", self.delta, low=0.0, low_open=True))

    def _options(self) -> dict[str, Any]:
        return {"delta": self.delta}


@dataclass(frozen=True)
class Poisson(Loss):
    """``exp(z) - target * z``: the negative log-likelihood of counts whose log mean is the output ``z``."""

    kind = "poisson"
    takes_logits = "the logarithm of the mean"


@dataclass(frozen=True)
class Quantile(Loss):
    """``max(q * e, (q - 1) * e)`` of ``e = target - y``.

    The constant that minimises it is the ``q``-quantile, 0 < q < 1 (Koenker and Bassett, 1978).
    """

    kind = "quantile"
    q: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        freeze(self, q=as_number("q", self.q, low=0.0, high=1.0, low_open=True, high_open=True))

    def _options(self) -> dict[str, Any]:
        return {"quantile": self.q}


LOSSES: dict[str, type[Loss]] = {
    cls.kind: cls for cls in (CrossEntropy, BinaryCrossEntropy, MSE, MAE, Huber, Poisson, Quantile)
}


def _label(value: object) -> int:
    """Return the index as an int. Any whole number is valid: torch's default -100, or one of the classes."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentTypeError(f"ignore_index: expected a whole number or None, got {value!r}")
    return int(value)


def _class_weights(given: object) -> tuple[float, ...]:
    if isinstance(given, Mapping):
        if set(given) != set(range(len(given))):
            raise ArgumentError(
                f"class_weight: a mapping needs every class index from 0 on as its keys, got {list(given)!r}"
            )
        given = [given[index] for index in range(len(given))]
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ArgumentTypeError(f"class_weight: expected one number for each class, got {given!r}")
    weights = tuple(as_number(f"class_weight[{i}]", one, low=0.0) for i, one in enumerate(given))
    if not any(weights):
        raise ArgumentError(f"class_weight: expected at least one weight above 0, got {list(weights)!r}")
    return weights


def as_loss(value: str | Loss) -> Loss:
    """Return the loss for a name or an object; a name stands for the default options."""
    if isinstance(value, Loss):
        return value
    if not isinstance(value, str):
        raise ArgumentTypeError(f"loss: expected a name such as 'mse' or an object such as MSE(), got {value!r}")
    if value in _NAMES_ELSEWHERE:
        raise ArgumentError(f"loss: unknown name {value!r}; it is called {_NAMES_ELSEWHERE[value]!r} here")
    if value not in LOSSES:
        raise unknown_name("loss", value, LOSSES)
    return LOSSES[value]()


def loss_from_config(config: Mapping[str, Any]) -> Loss:
    """Invert ``to_config``."""
    cls = LOSSES[check_choice("loss", config.get("kind"), LOSSES)]
    check_keys("loss", config, ("kind", *(option.name for option in fields(cls))))
    return cls(**{name: value for name, value in config.items() if name != "kind"})
