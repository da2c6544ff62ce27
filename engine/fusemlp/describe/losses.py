"""Losses as frozen descriptions; ``fusemlp_kernels.reference.loss_grad`` has the formulas.

``reduction="mean"`` is the (weighted) mean over rows for cross_entropy, and over all elements for the others;
"sum" is the sum. ``M`` rows, ``N`` outputs. ``missing=True`` of the element-wise losses and of ``GaussianNLL``, on the
NumPy backend: a target that is NaN has no loss and no gradient, and the mean is over the targets that are there.
"""

import inspect
import numbers
import pickle
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from decimal import Decimal
from functools import cached_property, partial
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Self, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from fusemlp.describe.checks import as_number, check_choice, check_keys, function_name
from fusemlp.describe.conflicts import Features, check_together, in_use
from fusemlp.describe.description import Description, Flag, OpenFraction, Positive, Share, stored
from fusemlp.describe.network import MLP
from fusemlp_kernels.contract import DISTRIBUTIONS, OWN, LossSpec
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, ShapeError

Array = npt.NDArray[Any]

ClassWeights = Collection[float] | Mapping[int, float]
"""A weight for each class; descriptions hold a tuple."""

REDUCTIONS = ("mean", "sum")
LossLike: TypeAlias = "str | Loss | Callable[..., Any]"
"""A loss by its name, an object, or a function of the caller's (``OwnLoss``)."""

_NAMES_ELSEWHERE = {
    **dict.fromkeys(("categorical_crossentropy", "sparse_categorical_crossentropy", "log_loss"), "cross_entropy"),
    **dict.fromkeys(("bce", "binary_crossentropy"), "binary_cross_entropy"),
    **dict.fromkeys(("squared_error", "mean_squared_error", "l2"), "mse"),
    **dict.fromkeys(("absolute_error", "mean_absolute_error", "l1"), "mae"),
    "smooth_l1": "huber",
    "pinball": "quantile",
}


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
class Loss(Description, family="loss"):
    """The base class of all losses."""

    takes_logits: ClassVar[str] = ""
    # whether targets are classes; ``predict`` then returns classes
    is_classification: ClassVar[bool] = False
    # whether it is a function of the caller's (the op own_loss), not a kernel
    on_host: ClassVar[bool] = False
    _: KW_ONLY
    reduction: Annotated[str, partial(check_choice, choices=REDUCTIONS)] = "mean"

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Invert ``to_config``."""
        if config.get("kind") == OWN:
            check_keys("loss", {"like": None, **config}, ("kind", "name", "like"))
            like = cls.from_config(config["like"]) if "like" in config else None
            return cast(Self, OwnLoss(name=stored("loss.name", config["name"], str), like=like))
        # older files do not have it
        known = {"missing": False} if issubclass(LOSSES.get(config.get("kind", ""), Loss), ElementLoss) else {}
        return super().from_config({**known, **config})

    @property
    def class_weight(self) -> ClassWeights | None:
        """A weight for each class; only cross_entropy has them."""
        return None

    @property
    def numpy_only(self) -> bool:
        """True if backend="auto" means numpy: no other computes it, or it is a function, which may be of arrays."""
        return self.on_host or self.kind in DISTRIBUTIONS or getattr(self, "missing", False)

    @property
    def answers(self) -> "Loss":
        """The loss as whose outputs predictions read those of the network."""
        return self

    @cached_property
    def uses(self) -> Features:
        """The features that it uses, for ``conflicts``."""
        classes, gaps = self.kind == "cross_entropy", getattr(self, "missing", False)
        named = f"missing=True of {self.kind}" if gaps else self.kind
        used = {"missing": named if gaps else None, self.kind: True}
        used |= dict.fromkeys(("batch loss", "numpy loss"), named if self.numpy_only else None)
        used["no classes"] = None if classes else self.kind
        return in_use(sum=self.reduction if self.reduction != "mean" else None, **used)

    def spec(self, *, accuracy: bool, soft: bool = False) -> LossSpec:
        """Return the loss for the kernels: ``accuracy`` counts hits, ``soft`` is for rows of probabilities."""
        if soft and self.kind != "cross_entropy":
            raise ArgumentError(f"soft: only cross_entropy takes probabilities as targets, not {self.kind}")
        return LossSpec(self.kind, soft=soft, accuracy=accuracy, **self.shared(LossSpec))

    @property
    def width(self) -> int:
        """The number of outputs for a target."""
        return 1

    def point(self, outputs: int) -> int | None:
        """Return the output that predicts the only target; None if there are several."""
        return 0 if outputs == self.width else None

    def transform(self, outputs: Array) -> Array:
        """Return predictions (n,) or (n, ...) of outputs (n, N)."""
        return outputs

    def judged(self, predicted: Array) -> tuple[Array, float]:
        """Return the predictions that scores judge, and the quantile that they are."""
        return predicted, getattr(self, "q", 0.5)

    def check_given(self) -> None:
        """Raise ArgumentError if it is a function of the caller's that a file does not hold."""

    def check_weights(self, argument: str) -> None:
        """Raise ArgumentError, naming the ``argument``, if the loss takes no weights of rows."""

    def check_network(self, net: MLP) -> None:
        """Refuse a network whose outputs this loss cannot take; raises ArgumentError or ShapeError."""
        activation = net.activations[-1].name
        check_together({**net.uses, **self.uses})
        if self.takes_logits and activation != "identity":
            raise ArgumentError(
                f"output_activation: {self.kind} takes {self.takes_logits}; expected 'identity', got {activation!r}"
            )
        if net.sizes[-1] % self.width or (self.kind == "quantiles" and net.sizes[-1] > self.width):
            raise ShapeError(
                f"loss: {self.kind} needs {self.width} outputs for a target, the network has {net.sizes[-1]}; make the "
                f"last of sizes {self.width}"
            )


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """Softmax cross-entropy of logits (M, N >= 2) with class indices (M,) or rows of probabilities (M, N).

    ``label_smoothing`` in [0, 1] mixes the uniform distribution into the target (Szegedy et al., 2016).
    ``class_weight`` has one weight >= 0 a class: a sequence, or a mapping of the indices 0 to N - 1.
    Rows whose class index is ``ignore_index`` weigh nothing.
    """

    kind = "cross_entropy"
    takes_logits = "logits and applies the softmax itself (predict_proba does too)"
    is_classification = True
    _: KW_ONLY
    label_smoothing: Share = 0.0
    class_weight: Annotated[ClassWeights, _check_weights] | None = None
    ignore_index: Annotated[int, _check_label] | None = None

    def spec(self, *, accuracy: bool, soft: bool = False) -> LossSpec:
        if soft and self.ignore_index is not None:
            raise ArgumentError(
                f"ignore_index: {self.ignore_index} is a class index, and the targets are rows of "
                "probabilities; leave it None, or give class indices as targets"
            )
        return super().spec(accuracy=accuracy, soft=soft)

    def transform(self, outputs: Array) -> Array:
        return np.asarray(outputs.argmax(axis=1))

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
class ElementLoss(Loss):
    """The base class of losses that are means or sums over the targets of all rows."""

    _: KW_ONLY
    missing: Flag = False


@dataclass(frozen=True)
class BinaryCrossEntropy(ElementLoss):
    """Sigmoid cross-entropy of logits (M, N), element by element: one label, or N, each 0 or 1."""

    kind = "binary_cross_entropy"
    takes_logits = "logits and applies the sigmoid itself (predict_proba does too)"
    is_classification = True

    def transform(self, outputs: Array) -> Array:
        return (outputs > 0.0).astype(np.int64)


@dataclass(frozen=True)
class MSE(ElementLoss):
    """``(y - target) ** 2``."""

    kind = "mse"


@dataclass(frozen=True)
class MAE(ElementLoss):
    """``|y - target|``."""

    kind = "mae"


@dataclass(frozen=True)
class Huber(ElementLoss):
    """``e**2 / 2`` where the error ``|e| <= delta``, ``delta * (|e| - delta / 2)`` beyond (Huber, 1964)."""

    kind = "huber"
    delta: Positive = 1.0


@dataclass(frozen=True)
class Poisson(ElementLoss):
    """``exp(z) - target * z``: the negative log-likelihood of counts whose log mean is the output ``z``."""

    kind = "poisson"
    takes_logits = "the logarithm of the mean"

    def transform(self, outputs: Array) -> Array:
        return np.exp(outputs)


@dataclass(frozen=True)
class Quantile(ElementLoss):
    """``max(q * e, (q - 1) * e)`` of ``e = target - y``.

    The constant that minimises it is the ``q``-quantile, 0 < q < 1 (Koenker and Bassett, 1978).
    """

    kind = "quantile"
    q: OpenFraction = 0.5

    def shared(self, other: Any) -> dict[str, Any]:
        return {**super().shared(other), "quantile": self.q}


def _check_quantiles(argument: str, given: object) -> tuple[float, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ArgumentTypeError(f"{argument}: expected numbers such as [0.1, 0.5, 0.9], got {given!r}")
    levels = [as_number(argument, level, low=0.0, high=1.0, low_open=True, high_open=True) for level in given]
    if not levels or any(low >= high for low, high in pairwise(levels)):
        raise ArgumentError(f"{argument}: expected at least one number, in rising order, got {levels!r}")
    return tuple(levels)


@dataclass(frozen=True)
class Quantiles(Loss):
    """The mean of the losses ``Quantile`` of one target, for each number of ``q``, in rising order.

    The network has an output for each. The middle quantile, the nearest to 0.5, is its output; each other one is a
    step from its neighbour, log(1 + exp(output)), so that they never cross (increments as in Park et al., "Learning
    quantile functions without quantile crossing for distribution-free time series forecasting", 2022). ``predict``
    returns the quantiles (M, Q). On the NumPy backend.
    """

    kind = "quantiles"
    takes_logits = "steps between quantiles and makes them positive itself (predict does too)"
    q: Annotated[tuple[float, ...], _check_quantiles] = (0.1, 0.5, 0.9)

    @property
    def width(self) -> int:
        return len(self.q)

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each quantile, such as q97.5: different quantiles have different names."""
        return tuple(f"q{(100 * Decimal(repr(level))).normalize():f}" for level in self.q)

    @property
    def middle(self) -> int:
        """The place of the quantile that is the nearest to the median."""
        return min(range(len(self.q)), key=lambda at: abs(self.q[at] - 0.5))

    def point(self, outputs: int) -> int:
        return self.middle

    def judged(self, predicted: Array) -> tuple[Array, float]:
        return predicted.reshape(len(predicted), -1)[:, self.middle], self.q[self.middle]

    def transform(self, outputs: Array) -> Array:
        steps, at, quantiles = np.logaddexp(0, outputs), self.middle, outputs.copy()
        # one step after another: rounding keeps their order
        for below in range(at - 1, -1, -1):
            quantiles[:, below] = quantiles[:, below + 1] - steps[:, below]
        for above in range(at + 1, len(self.q)):
            quantiles[:, above] = quantiles[:, above - 1] + steps[:, above]
        return quantiles

    def shared(self, other: Any) -> dict[str, Any]:
        return {**super().shared(other), "quantiles": self.q}


@dataclass(frozen=True)
class GaussianNLL(ElementLoss):
    """``(log(v) + (mean - target)**2 / v) / 2``: the negative log-likelihood of normal targets, without its constant.

    For N targets the network has 2 N outputs: means, then raw deviations s, of which ``v = max(log(1 + exp(s))**2,
    eps)`` (Nix and Weigend, "Estimating the mean and variance of the target probability distribution", 1994). Softplus
    grows like s, in the units of the target; the exponential would make one large s overflow. The gradient passes
    through the floor ``eps``, as in torch's ``GaussianNLLLoss``. On the NumPy backend.
    """

    kind = "gaussian"
    takes_logits = "means and raw deviations, which it makes positive itself (predict does too)"
    width = 2
    eps: Positive = 1e-6

    def transform(self, outputs: Array) -> Array:
        return outputs[:, : outputs.shape[1] // 2]

    def std(self, outputs: Array) -> Array:
        """Return the standard deviations (n, N) of outputs (n, 2 N), or of equal mixtures those of (n, models, 2 N)."""
        means, raw = np.split(outputs, 2, axis=-1)
        std = np.asarray(np.maximum(np.logaddexp(0, raw), self.eps**0.5))
        return std if std.ndim == 2 else np.sqrt(np.mean(std**2, axis=1) + np.var(means, axis=1))


@dataclass(frozen=True)
class OwnLoss(Loss):
    """A function of the caller's: ``function(outputs, targets) -> (loss, gradient)``, or with ``weights`` too.

    ``outputs`` (M, N) are of the engine's type, after the last activation. ``targets`` (M, ...) are as ``fit`` was
    given them: real numbers of the engine's type, or int64. ``weights`` (M,), or None without, go to a parameter of
    this name. ``loss`` is a number, and ``gradient`` (M, N) its gradient by the outputs; ``fusemlp.check_gradient``
    compares the two. Files hold the ``name`` alone: the function is None then until the caller gives it again.
    ``like``: the loss as whose outputs predictions read those of the network, such as CrossEntropy() for classes.
    """

    kind = OWN
    on_host = True
    _: KW_ONLY
    # the function decides
    reduction: str = field(default="mean", init=False, repr=False)
    name: str
    function: Callable[..., Any] | None = None
    takes_weights: bool = False
    like: Loss | None = None

    @classmethod
    def of(cls, function: Callable[..., Any], like: Loss | None = None) -> "OwnLoss":
        """Return the loss that calls ``function``; raises ArgumentTypeError for one that takes other arguments."""
        name = function_name(function)
        try:
            signature = inspect.signature(function)
            takes_weights = "weights" in signature.parameters
            signature.bind(None, None, **({"weights": None} if takes_weights else {}))
        except (TypeError, ValueError) as error:
            raise ArgumentTypeError(
                f"loss: {name!r} is called with outputs, targets and, if it has a parameter of this name, weights "
                f"({error}); bind its other parameters by functools.partial"
            ) from error
        return cls(name=name, function=function, takes_weights=takes_weights, like=like)

    @property
    def answers(self) -> Loss:
        return self if self.like is None else self.like

    def transform(self, outputs: Array) -> Array:
        return outputs if self.like is None else self.like.transform(outputs)

    @cached_property
    def uses(self) -> Features:
        named = f"a function such as {self.name!r}"
        return in_use(**{"no classes": self.name, "batch loss": named, "function": named})

    def spec(self, *, accuracy: bool, soft: bool = False) -> LossSpec:
        return LossSpec(self.kind, name=self.name)

    def check_given(self) -> None:
        if self.function is None:
            raise ArgumentError(
                f"loss: the engine was trained with {self.name!r}, a function, which files do not hold; give it: "
                f"load(path, loss={self.name}), or fit(X, y, epochs=20, loss={self.name}); an estimator takes it by "
                f"set_params(loss={self.name})"
            )

    def check_weights(self, argument: str) -> None:
        if not self.takes_weights:
            raise ArgumentError(
                f"{argument}: the loss {self.name!r} takes outputs and targets alone; give it a parameter weights"
            )

    def to_config(self) -> dict[str, Any]:
        like = {} if self.like is None else {"like": self.like.to_config()}
        return {"kind": self.kind, "name": self.name, **like}

    def __deepcopy__(self, memo: Any) -> "OwnLoss":
        return self

    @property
    def pickles(self) -> bool:
        """True if the function can be pickled: one of a module, not a lambda."""
        try:
            pickle.dumps(self.function)
        except (pickle.PicklingError, AttributeError, TypeError):
            return False
        return True

    def __getstate__(self) -> dict[str, Any]:
        """Return what a pickle holds: the function if it pickles, else its name."""
        return vars(self) if self.pickles else {**vars(self), "function": None}


LOSSES: dict[str, type[Loss]] = {
    cls.kind: cls
    for cls in (CrossEntropy, BinaryCrossEntropy, MSE, MAE, Huber, Poisson, Quantile, Quantiles, GaussianNLL)
}
Loss.kinds = LOSSES


def as_loss(value: LossLike) -> Loss:
    """Return the loss for a name, which stands for the default options, an object, or a function of the caller's."""
    if isinstance(value, Loss) and value.kind in (*LOSSES, OWN):
        return value
    if str(getattr(value, "__module__", "")).startswith("torch."):
        name = getattr(value, "__name__", type(value).__name__)
        raise ArgumentTypeError(
            f"loss: torch's {name} computes on tensors; give a name such as 'mse', or train the module with "
            "fusemlp.torch.fuse"
        )
    if callable(value) and not isinstance(value, type):
        return OwnLoss.of(value)
    expected = "a name such as 'mse', an object such as MSE(), or a function f(outputs, targets) -> (loss, gradient)"
    return LOSSES[check_choice("loss", value, LOSSES, expected=expected, elsewhere=_NAMES_ELSEWHERE)]()
