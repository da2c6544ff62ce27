"""The base of all losses."""

from collections.abc import Collection, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar

import numpy.typing as npt

from fusemlp.describe.checks import check_choice
from fusemlp.describe.conflicts import Features, check_together, in_use
from fusemlp.describe.description import Description
from fusemlp.describe.network import MLP
from fusemlp_kernels.contract import DISTRIBUTIONS, LossSpec
from fusemlp_kernels.errors import ArgumentError, ShapeError

Array = npt.NDArray[Any]

ClassWeights = Collection[float] | Mapping[int, float]
"""A weight for each class; descriptions hold a tuple."""

REDUCTIONS = ("mean", "sum")


@dataclass(frozen=True)
class Loss(Description):
    """The base class of all losses."""

    takes_logits: ClassVar[str] = ""
    # whether targets are classes; ``predict`` then returns classes
    is_classification: ClassVar[bool] = False
    _: KW_ONLY
    reduction: Annotated[str, partial(check_choice, choices=REDUCTIONS)] = "mean"

    @property
    def class_weight(self) -> ClassWeights | None:
        """A weight for each class; only cross_entropy has them."""
        return None

    @property
    def on_host(self) -> bool:
        """True if it is a function of the caller's (the op own_loss), not a kernel."""
        return False

    @property
    def numpy_only(self) -> bool:
        """True if no other backend computes it."""
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
        used = {"numpy loss": named if self.numpy_only else None, "missing": named if gaps else None, self.kind: True}
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
        given = net.activations[-1].name
        check_together({**net.uses, **self.uses})
        if self.takes_logits and given != "identity":
            raise ArgumentError(
                f"output_activation: {self.kind} takes {self.takes_logits}; expected 'identity', got {given!r}"
            )
        if net.sizes[-1] % self.width or (self.kind == "quantiles" and net.sizes[-1] > self.width):
            raise ShapeError(
                f"loss: {self.kind} needs {self.width} outputs for a target, the network has {net.sizes[-1]}; make the "
                f"last of sizes {self.width}"
            )
