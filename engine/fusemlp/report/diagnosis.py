"""Find common problems of a training in its history and its units, and suggest remedies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

# Overfitting: the validation loss rises by this share above its best while the training loss falls.
RISE = 0.05
# Exploding loss: the training loss ends by more than this share above its first value.
EXPLODED = 0.25
# Overfitting: training accuracy minus validation accuracy.
ACCURACY_GAP = 0.1
DEAD_FRACTION = 0.3
# Slow training: over at least this many epochs, nearly all of them better than the one before, the loss falls by less
# than this share of its first value, and in the second half by no less than this share of the fall in the first.
FEWEST_EPOCHS = 5
SLOW = 0.1
STEADY = 0.75
# Remedies as the command line has them, and as Python has them.
REMEDIES = {
    "early stopping": ("early stopping (--early-stopping 10)", "early stopping (fit(early_stopping=10))"),
    "dropout": ("--dropout 0.2", "MLP(dropout=0.2)"),
    "weight decay": ("more --weight-decay", "more weight decay (AdamW(weight_decay=0.1))"),
    "data": ("more data", "more data"),
    "leaky": ("--activation leaky_relu or prelu", "MLP(activation='leaky_relu') or 'prelu'"),
    "lower rate": ("a lower learning rate (--lr)", "a lower learning rate (Adam(lr=...))"),
    "higher rate": ("a higher learning rate (--lr; fusemlp lr-find)", "a higher learning rate (engine.lr_find(X, y))"),
    "clipping": ("--clip-norm 1", "Adam(clip_norm=1.0)"),
    "scaling": ("--scale standard", "standardised features (mean 0, variance 1)"),
    "epochs": ("more --epochs", "more epochs"),
}
OVERFITTING_REMEDIES = ("early stopping", "dropout", "weight decay", "data")
DEAD_REMEDIES = ("leaky", "lower rate")


def _remedies(names: Sequence[str], *, python: bool) -> tuple[str, ...]:
    return tuple(REMEDIES[name][int(python)] for name in names)


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


def diagnose(
    history: Mapping[str, Sequence[float]],
    dead: Mapping[str, float] | None = None,
    *,
    divergence: str = "",
    restored: bool = False,
    best_epoch: int | None = None,
    early_stopping: bool = False,
    python: bool = True,
) -> list[Finding]:
    """Return all that is found in a history and, if given, in the shares of ``dead`` units by layer.

    ``divergence``: the error that ended the training. ``python``: remedies as Python has them, not the command line.
    The others: see ``overfitting``.
    """
    found = [
        Finding("divergence", divergence) if divergence else None,
        exploding_loss(history, python=python),
        slow_training(history, python=python),
        overfitting(history, restored=restored, best_epoch=best_epoch, early_stopping=early_stopping, python=python),
        dead_units(dead or {}, python=python),
    ]
    return [finding for finding in found if finding is not None]


def exploding_loss(history: Mapping[str, Sequence[float]], *, python: bool = False) -> Finding | None:
    """Find a training loss that ends more than ``EXPLODED`` above its first value."""
    losses = history.get("loss", ())
    if len(losses) < 2 or not losses[-1] > losses[0] + EXPLODED * abs(losses[0]):
        return None
    best = min(range(len(losses)), key=losses.__getitem__)
    message = f"the training loss rose from {losses[0]:.4g} in epoch 1 to {losses[-1]:.4g}"
    figures = {"first_loss": losses[0], "last_loss": losses[-1]}
    return Finding(
        "exploding loss",
        message,
        _remedies(("lower rate", "clipping", "scaling"), python=python),
        best + 1,
        figures,
    )


def slow_training(history: Mapping[str, Sequence[float]], *, python: bool = False) -> Finding | None:
    """Find a training whose loss falls epoch by epoch, but little, and as fast at the end as at the beginning."""
    losses, rates = history.get("loss", ()), history.get("learning_rate", ())
    if len(losses) < FEWEST_EPOCHS:
        return None
    middle = len(losses) // 2
    early, late = losses[0] - losses[middle], losses[middle] - losses[-1]
    # the halves may differ by an epoch
    pace = late / (len(losses) - 1 - middle) >= STEADY * early / middle
    falls = sum(after < before for before, after in pairwise(losses))
    little = 0.0 < losses[0] - losses[-1] < SLOW * abs(losses[0])
    if not (little and pace and falls >= 0.9 * (len(losses) - 1)):
        return None
    share = (losses[0] - losses[-1]) / abs(losses[0])
    rate = f"the learning rate of {rates[-1]:.3g}" if rates else "the learning rate"
    message = (
        f"the training loss fell by only {share:.1%} in {len(losses)} epochs, as fast at the end as at the beginning: "
        f"{rate} is too small"
    )
    return Finding("slow training", message, _remedies(("higher rate", "epochs"), python=python), None, {"fall": share})


def overfitting(
    history: Mapping[str, Sequence[float]],
    *,
    restored: bool = False,
    best_epoch: int | None = None,
    early_stopping: bool = False,
    python: bool = False,
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
        remedies = _remedies(OVERFITTING_REMEDIES[int(early_stopping) :], python=python)
        return Finding("overfitting", message, remedies, None, figures)
    epoch, remedies = best + 1, _remedies(OVERFITTING_REMEDIES[1:], python=python)
    message = (
        f"after epoch {epoch} the validation loss rose from {lowest:.4g} to {last:.4g} while the training loss fell "
        f"to {training[-1]:.4g}"
    )
    if restored:
        return Finding(
            "overfitting", f"{message}; the weights of epoch {best_epoch or epoch} were restored", (), epoch, figures
        )
    shown = f"epochs={epoch}" if python else f"--epochs {epoch}"
    return Finding("overfitting", message, (f"early stopping (here: {shown})", *remedies), epoch, figures)


def dead_units(fractions: Mapping[str, float], *, python: bool = False) -> Finding | None:
    """Find dead ReLU units: they are zero for every row and learn nothing.

    ``fractions``: for each layer the share of such units; a finding needs one above ``DEAD_FRACTION``.
    """
    high = {layer: share for layer, share in fractions.items() if share > DEAD_FRACTION}
    if not high:
        return None
    listed = ", ".join(f"{share:.0%} of {layer}" for layer, share in high.items())
    message = f"relu units that are zero for every training row: {listed}"
    return Finding("dead units", message, _remedies(DEAD_REMEDIES, python=python), None, dict(fractions))
