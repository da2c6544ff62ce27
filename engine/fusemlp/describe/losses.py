"""Losses as frozen descriptions; ``fusemlp_kernels.reference.loss_grad`` has the formulas.

``reduction="mean"`` is the (weighted) mean over rows for cross_entropy, and over all elements for the others;
"sum" is the sum. ``M`` rows, ``N`` outputs.
"""

import numbers
from collections.abc import Collection, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar

from fusemlp.describe.checks import as_number, check_choice
from fusemlp.describe.conflicts import Features, check_together, in_use
from fusemlp.describe.description import Description, OpenFraction, Positive, from_config
from fusemlp.describe.network import MLP
from fusemlp_kernels.contract import LossSpec
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, ShapeError

ClassWeights = Collection[float] | Mapping[int, float]
"""A weight for each class; descriptions hold a tuple."""

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
class Loss(Description):
    """The base class of all losses."""

    takes_logits: ClassVar[str] = ""
    _: KW_ONLY
    reduction: Annotated[str, partial(check_choice, choices=REDUCTIONS)] = "mean"

    @property
    def is_classification(self) -> bool:
        """True if targets are classes; ``predict`` then returns classes."""
        return self.kind in ("cross_entropy", "binary_cross_entropy")

    @property
    def class_weight(self) -> ClassWeights | None:
        """A weight for each class; only cross_entropy has them."""
        return None

    @cached_property
    def uses(self) -> Features:
        """The features that it uses, for ``conflicts``."""
        classes = self.kind == "cross_entropy"
        return in_use(
            sum=self.reduction if self.reduction != "mean" else None, **{"no classes": None if classes else self.kind}
        )

    def spec(self, *, accuracy: bool, soft: bool = False) -> LossSpec:
        """Return the loss for the kernels: ``accuracy`` counts hits, ``soft`` is for rows of probabilities."""
        if soft and self.kind != "cross_entropy":
            raise ArgumentError(f"soft: only cross_entropy takes probabilities as targets, not {self.kind}")
        return LossSpec(self.kind, soft=soft, accuracy=accuracy, **self.shared(LossSpec))

    def check_network(self, net: MLP) -> None:
        """Refuse a network whose outputs this loss cannot take; raises ArgumentError or ShapeError."""
        given = net.activations[-1].name
        check_together({**net.uses, **self.uses})
        if self.takes_logits and given != "identity":
            raise ArgumentError(
                f"output_activation: {self.kind} takes {self.takes_logits}; expected 'identity', got {given!r}"
            )


def _check_label(argument: str, value: object) -> int:
    """Return the index as an int. Any whole number is valid: torch's default -100, or one of the classes."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentTypeError(f"{argument}: expected a whole number or None, got {value!r}")
    return int(value)


def _check_weights(argument: str, given: object) -> tuple[float, ...]:
    if isinstance(given, Mapping):
        if set(given) != set(range(len(given))):
            raise ArgumentError(
                f"{argument}: a mapping needs every class index from 0 on as its keys, got {list(given)!r}"
            )
        given = [given[index] for index in range(len(given))]
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ArgumentTypeError(f"{argument}: expected one number for each class, got {given!r}")
    weights = tuple(as_number(f"{argument}[{i}]", one, low=0.0) for i, one in enumerate(given))
    if not any(weights):
        raise ArgumentError(f"{argument}: expected at least one weight above 0, got {list(weights)!r}")
    return weights


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy of logits (M, N >= 2) with class indices (M,) or rows of probabilities (M, N).

    ``label_smoothing`` in [0, 1] mixes the uniform distribution into the target (Szegedy et al., 2016).
    ``class_weight`` has one weight >= 0 a class: a sequence, or a mapping of the indices 0 to N - 1.
    Rows whose class index is ``ignore_index`` weigh nothing.
    """

    kind = "cross_entropy"
    takes_logits = "logits and applies the softmax itself (predict_proba does too)"
    _: KW_ONLY
    label_smoothing: Annotated[float, partial(as_number, low=0.0, high=1.0)] = 0.0
    class_weight: Annotated[ClassWeights, _check_weights] | None = None
    ignore_index: Annotated[int, _check_label] | None = None

    def spec(self, *, accuracy: bool, soft: bool = False) -> LossSpec:
        if soft and self.ignore_index is not None:
            raise ArgumentError(
                f"ignore_index: {self.ignore_index} is a class index, and the targets are rows of "
                "probabilities; leave it None, or give class indices as targets"
            )
        return super().spec(accuracy=accuracy, soft=soft)

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
    delta: Positive = 1.0


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
    q: OpenFraction = 0.5

    def shared(self, other: Any) -> dict[str, Any]:
        return {**super().shared(other), "quantile": self.q}


LOSSES: dict[str, type[Loss]] = {
    cls.kind: cls for cls in (CrossEntropy, BinaryCrossEntropy, MSE, MAE, Huber, Poisson, Quantile)
}


def as_loss(value: str | Loss) -> Loss:
    """Return the loss for a name or an object; a name stands for the default options."""
    if isinstance(value, Loss):
        return value
    expected = "a name such as 'mse' or an object such as MSE()"
    return LOSSES[check_choice("loss", value, LOSSES, expected=expected, elsewhere=_NAMES_ELSEWHERE)]()


def loss_from_config(config: Mapping[str, Any]) -> Loss:
    """Invert ``to_config``."""
    return from_config("loss", LOSSES, config)
