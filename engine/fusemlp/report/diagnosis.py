"""Find common problems of a training in its history and its units, and suggest remedies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

# Overfitting: the validation loss rises by this share above its best while the training loss falls.
RISE = 0.05
# Overfitting: training accuracy minus validation accuracy.
ACCURACY_GAP = 0.1
DEAD_FRACTION = 0.3
OVERFITTING_REMEDIES = ("early stopping (--early-stopping 10)", "--dropout 0.2", "more --weight-decay", "more data")
DEAD_REMEDIES = ("--activation leaky_relu or prelu", "a lower learning rate (--lr)")


@dataclass(frozen=True)
class Finding:
    """A finding: its name, the evidence and the remedies. ``epoch`` (from 1): its start, if known."""

    name: str
    message: str
    remedies: tuple[str, ...] = ()
    epoch: int | None = None
    figures: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        helps = f"; what helps: {', '.join(self.remedies)}" if self.remedies else ""
        return f"{self.name}: {self.message}{helps}"


def overfitting(
    history: Mapping[str, Sequence[float]],
    *,
    restored: bool = False,
    best_epoch: int | None = None,
    early_stopping: bool = False,
) -> Finding | None:
    """Find overfitting: training improves and validation does not.

    The criterion: the last validation loss is more than ``RISE`` above its minimum while the training loss fell since
    then, or the accuracies differ by more than ``ACCURACY_GAP``. ``restored``: the best weights were restored,
    those of ``best_epoch`` (from 1; None: of the lowest validation loss). ``early_stopping``: it was on, so no remedy.
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
        return Finding("overfitting", message, OVERFITTING_REMEDIES[int(early_stopping) :], None, figures)
    epoch, remedies = best + 1, OVERFITTING_REMEDIES[1:]
    message = (
        f"after epoch {epoch} the validation loss rose from {lowest:.4g} to {last:.4g} while the training loss fell "
        f"to {training[-1]:.4g}"
    )
    if restored:
        return Finding(
            "overfitting", f"{message}; the weights of epoch {best_epoch or epoch} were restored", (), epoch, figures
        )
    return Finding("overfitting", message, (f"early stopping (here: --epochs {epoch})", *remedies), epoch, figures)


def dead_units(fractions: Mapping[str, float]) -> Finding | None:
    """Find dead ReLU units: they are zero for every row and learn nothing.

    ``fractions``: for each layer the share of such units; a finding needs one above ``DEAD_FRACTION``.
    """
    high = {layer: share for layer, share in fractions.items() if share > DEAD_FRACTION}
    if not high:
        return None
    listed = ", ".join(f"{share:.0%} of {layer}" for layer, share in high.items())
    message = f"relu units that are zero for every training row: {listed}"
    return Finding("dead units", message, DEAD_REMEDIES, None, dict(fractions))
