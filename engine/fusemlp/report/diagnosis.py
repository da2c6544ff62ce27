"""Find common problems of a training in its history and its units, and suggest remedies."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

# Overfitting: the validation loss rises by this share above its best while the training loss falls, and ends above it.
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
# Unfinished training: of at least this many epochs the last fifth lowers the validation loss by this share or more.
MANY_EPOCHS = 50
UNFINISHED = 0.05
# Or early stopping ends it on the way of a schedule to its end, and the rate has this share of its highest.
LOWERED = 0.1
# No learning: the training loss ends above this share of that of a constant prediction, and no more than this multiple
# of a constant prediction's share of the rows are right. A loss above this multiple of it needs no FEWEST_EPOCHS.
CONSTANT = 0.99
RIGHT = 1.5
BLOWN_UP = 2.0
# Remedies as the command line has them, and as Python has them.
REMEDIES = {
    "early stopping": ("early stopping (--early-stopping 10)", "early stopping (fit(early_stopping=10))"),
    "dropout": ("--dropout 0.2", "MLP(dropout=0.2)"),
    "weight decay": ("more --weight-decay", "more weight decay (AdamW(weight_decay=0.1))"),
    "data": ("more data", "more data"),
    "leaky": ("--activation leaky_relu or prelu", "MLP(activation='leaky_relu') or 'prelu'"),
    "lower rate": ("a lower learning rate (--lr)", "a lower learning rate (lr= of the optimizer)"),
    "higher rate": ("a higher learning rate (--lr; fusemlp lr-find)", "a higher learning rate (engine.lr_find(X, y))"),
    "clipping": ("--clip-norm 1", "clip_norm=1.0 of the optimizer"),
    "scaling": ("--scale standard", "inputs of unit scale (Engine(normalise=True))"),
    "epochs": ("more --epochs", "more epochs"),
    "schedule": ("--early-stopping 0", "fit without early_stopping"),
}


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
    waited: bool = False,
    chance_loss: float | None = None,
    in_use: Collection[str] = (),
    python: bool = True,
) -> list[Finding]:
    """Return all that is found in a history and, if given, in the shares of ``dead`` units by layer.

    ``divergence``: the error that ended the training; ``waited``: it stopped early. ``python``: remedies as Python has
    them, not the command line. ``in_use``: the names in ``REMEDIES`` of those that the training has, which no finding
    advises. The others: see ``_overfitting`` and ``_no_learning``.
    """
    diverged = Finding("divergence", divergence) if divergence else None
    findings = [diverged, _exploding_loss(history), _slow_training(history)]
    overfitting = _overfitting(history, restored, best_epoch)
    if not any(findings):
        findings.append(_no_learning(history, chance_loss) or _unfinished(history, waited, overfitting is not None))
    findings += [overfitting, _dead_units(dead or {})]
    unwanted = {*in_use, *(["early stopping"] if early_stopping else [])}
    return [_in_words(finding, python, unwanted) for finding in findings if finding is not None]


def _in_words(finding: Finding, python: bool, in_use: Collection[str]) -> Finding:
    """Return a finding whose remedies, names in ``REMEDIES``, are in words, without those in use."""
    words = {name: REMEDIES[name][int(python)] for name in finding.remedies if name not in in_use}
    if "early stopping" in words and finding.epoch is not None:
        words["early stopping"] = f"early stopping (here: {'epochs=' if python else '--epochs '}{finding.epoch})"
    return replace(finding, remedies=tuple(words.values()))


def _exploding_loss(history: Mapping[str, Sequence[float]]) -> Finding | None:
    """Find a training loss that ends more than ``EXPLODED`` above its first value."""
    losses = history.get("loss", ())
    if len(losses) < 2 or not losses[-1] > losses[0] + EXPLODED * abs(losses[0]):
        return None
    best = min(range(len(losses)), key=losses.__getitem__)
    message = f"the training loss rose from {losses[0]:.4g} in epoch 1 to {losses[-1]:.4g}"
    figures = {"first_loss": losses[0], "last_loss": losses[-1]}
    return Finding("exploding loss", message, ("lower rate", "clipping", "scaling"), best + 1, figures)


def _slow_training(history: Mapping[str, Sequence[float]]) -> Finding | None:
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
    return Finding("slow training", message, ("higher rate", "epochs"), None, {"fall": share})


def _no_learning(history: Mapping[str, Sequence[float]], chance_loss: float | None) -> Finding | None:
    """Find a training that ends no better than a constant prediction, and is not just slow: halved or rising losses.

    ``chance_loss``: the loss where all classes are equally probable; None if the loss has none.
    """
    losses = history.get("loss", ())
    if chance_loss is None or len(losses) < 2 or not losses[-1] > CONSTANT * chance_loss:
        return None
    right = next((history[name][-1] for name in ("val_accuracy", "accuracy") if name in history), None)
    if right is not None and right > RIGHT * math.exp(-chance_loss):
        return None
    if losses[-1] > losses[0] / 2 and all(after < before for before, after in pairwise(losses)):
        return None
    if len(losses) < FEWEST_EPOCHS and max(losses) <= BLOWN_UP * chance_loss:
        return None
    message = f"the training loss ended at {losses[-1]:.4g}, a constant prediction has {chance_loss:.4g}"
    if right is not None:
        message += f"; {right:.1%} of the {'validation' if 'val_accuracy' in history else 'training'} rows are right"
    figures = {"last_loss": losses[-1], "chance_loss": chance_loss}
    return Finding("no learning", message, ("lower rate", "scaling"), None, figures)


def _unfinished(history: Mapping[str, Sequence[float]], waited: bool, overfits: bool) -> Finding | None:
    """Find a training of many epochs that ends while its validation loss falls, or early in a schedule with an end."""
    losses, rates = history.get("val_loss", ()), history.get("learning_rate", ())
    late, lately = len(losses) // 5, rates[-FEWEST_EPOCHS:]
    if waited:
        # a rate that has an end falls by a growing share of itself, unlike exponential
        shares = [after / before if before else 1.0 for before, after in pairwise(lately)]
        falls = len(lately) == FEWEST_EPOCHS and shares[-1] < shares[0] - 1e-9 and max(shares) < 1.0
        if overfits or not falls or lately[-1] <= LOWERED * max(rates):
            return None
        share = lately[-1] / max(rates)
        message = f"early stopping ended it in epoch {len(rates)}, with the learning rate at {share:.0%} of its highest"
        return Finding("unfinished training", message, ("schedule",), None, {"rate": share})
    if len(losses) < MANY_EPOCHS:
        return None
    before, after = min(losses[:-late]), min(losses[-late:])
    if not before or not before - after > UNFINISHED * abs(before):
        return None
    share = (before - after) / abs(before)
    message = f"the validation loss still fell, by {share:.1%} in the last {late} of {len(losses)} epochs"
    return Finding("unfinished training", message, ("epochs", "higher rate"), None, {"fall": share})


def _overfitting(history: Mapping[str, Sequence[float]], restored: bool, best_epoch: int | None) -> Finding | None:
    """Find overfitting: training improves and validation does not.

    The criterion: the last validation loss is more than ``RISE`` above its minimum while the training loss fell since
    then, to below it, or the accuracies differ by more than ``ACCURACY_GAP``. ``restored``: the best weights were
    restored, those of ``best_epoch`` (from 1; None: of the lowest validation loss).
    """
    training, validation = history.get("loss", ()), history.get("val_loss", ())
    if not validation:
        return None
    best = min(range(len(validation)), key=validation.__getitem__)
    lowest, last = validation[best], validation[-1]
    rising = last > lowest + RISE * abs(lowest) and training[-1] < min(training[best], last)
    right, right_validation = history.get("accuracy", ()), history.get("val_accuracy", ())
    gap = right[-1] - right_validation[-1] if right and right_validation else 0.0
    if not rising and not gap > ACCURACY_GAP:
        return None
    remedies = ("early stopping", "dropout", "weight decay", "data")
    figures = {"loss_gap": last - training[-1], "best_val_loss": lowest, "last_val_loss": last}
    if right and right_validation:
        figures["accuracy_gap"] = gap
    if not rising:
        message = f"{right[-1]:.1%} of the training rows are right, but only {right_validation[-1]:.1%} in validation"
        return Finding("overfitting", message, remedies, None, figures)
    epoch = best + 1
    message = (
        f"after epoch {epoch} the validation loss rose from {lowest:.4g} to {last:.4g} while the training loss fell "
        f"to {training[-1]:.4g}"
    )
    if restored:
        message += f"; the weights of epoch {best_epoch or epoch} were restored"
    return Finding("overfitting", message, () if restored else remedies, epoch, figures)


def _dead_units(fractions: Mapping[str, float]) -> Finding | None:
    """Find layers with a share of units that are zero for every row, and learn nothing, above ``DEAD_FRACTION``."""
    high = {layer: share for layer, share in fractions.items() if share > DEAD_FRACTION}
    if not high:
        return None
    listed = ", ".join(f"{share:.0%} of {layer}" for layer, share in high.items())
    message = f"relu units that are zero for every training row: {listed}"
    return Finding("dead units", message, ("leaky", "lower rate"), None, dict(fractions))
