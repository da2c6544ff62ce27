"""What tends to go wrong with a training, read off its history and its units, and what helps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

# The validation loss has risen by this share above its best while the training loss fell.
RISE = 0.05
# Right answers in training minus those in validation.
ACCURACY_GAP = 0.1
DEAD_FRACTION = 0.3
OVERFITTING_REMEDIES = ("early stopping (--early-stopping 10)", "--dropout 0.2", "more --weight-decay", "more data")
DEAD_REMEDIES = ("--activation leaky_relu or prelu", "a lower learning rate (--lr)")


@dataclass(frozen=True)
class Finding:
    """Something found: its name, what was seen, what helps. ``epoch`` (from 1) is when it began, if it did."""

    name: str
    message: str
    remedies: tuple[str, ...] = ()
    epoch: int | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def to_config(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self)

    def __str__(self) -> str:
        helps = f"; what helps: {', '.join(self.remedies)}" if self.remedies else ""
        return f"{self.name}: {self.message}{helps}"


def overfitting(history: Mapping[str, Sequence[float]], *, restored: bool = False) -> Finding | None:
    """Training that goes on getting better while validation does not.

    Found where the validation loss at the end is more than ``RISE`` above its lowest while the training loss fell since
    then, or where the accuracies differ by more than ``ACCURACY_GAP``. ``restored``: the best weights were put back.
    """
    training, validation = history.get("loss", ()), history.get("val_loss", ())
    if not validation:
        return None
    best = min(range(len(validation)), key=validation.__getitem__)
    lowest, last = validation[best], validation[-1]
    rising = last > lowest + RISE * abs(lowest) and training[-1] < training[best]
    right, right_validation = history.get("accuracy", ()), history.get("val_accuracy", ())
    gap = right[-1] - right_validation[-1] if right and right_validation else 0.0
    if not rising and not gap > ACCURACY_GAP:
        return None
    figures = {"loss_gap": last - training[-1], "best_val_loss": lowest, "last_val_loss": last}
    if right and right_validation:
        figures["accuracy_gap"] = gap
    if not rising:
        message = f"{right[-1]:.1%} of the training rows are right, but only {right_validation[-1]:.1%} in validation"
        return Finding("overfitting", message, OVERFITTING_REMEDIES, None, figures)
    message = (
        f"after epoch {best + 1} the validation loss rose from {lowest:.4g} to {last:.4g} while the training loss fell "
        f"to {training[-1]:.4g}"
    )
    if restored:
        return Finding(
            "overfitting", f"{message}; the weights of epoch {best + 1} were restored", (), best + 1, figures
        )
    remedies = (f"early stopping (here: --epochs {best + 1})", *OVERFITTING_REMEDIES[1:])
    return Finding("overfitting", message, remedies, best + 1, figures)


def dead_units(fractions: Mapping[str, float]) -> Finding | None:
    """ReLU units that are zero for every row, so that nothing in them is learned any more.

    ``fractions``: for each layer the share of such units; found where one is above ``DEAD_FRACTION``.
    """
    high = {layer: share for layer, share in fractions.items() if share > DEAD_FRACTION}
    if not high:
        return None
    listed = ", ".join(f"{share:.0%} of {layer}" for layer, share in high.items())
    message = f"relu units that are zero for every training row: {listed}"
    return Finding("dead units", message, DEAD_REMEDIES, None, dict(fractions))


def divergence(message: str) -> Finding:
    """A loss that stopped being a finite number; ``message`` is the error's."""
    return Finding("divergence", message)
