"""Small trainings that decide how a table is prepared: the errors of held-out rows say what helps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from fusemlp.datasets.load import Dataset
from fusemlp.datasets.parts import FOLDS, Fold, folds, hold_out
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.fleet.fleet import Fleet
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import DataError

# Rows and folds of the trainings; epochs at most, and those without a better loss of held-out rows.
ROWS, TRIALS, EPOCHS, PATIENCE = 5_000, 3, 60, 5
# A target with at least this skewness may be learned in logarithms.
SKEWED = 1.0
# Scalings of features, of which the first needs no reason, and the second this many rows, but not more than this many
# inputs of all rows: half a gigabyte in fp32.
SCALES, MANY_ROWS, MOST_INPUTS = ("robust", "piecewise"), 200, 1 << 27

Prepare = Callable[..., Preprocessor]
Make = Callable[[Preprocessor], Fleet]


def chosen(
    dataset: Dataset,
    rows: Array,
    prepare: Prepare,
    fleet: Make,
    *,
    scale: str | None,
    log_target: bool | None,
    seed: int,
) -> tuple[str, bool, list[str]]:
    """Return scale and log_target where they are None, and a note on each that was tried.

    ``prepare(dataset, rows, scale=..., log_targets=...)`` makes a preprocessor of training rows, and ``fleet`` an
    untrained fleet of ``TRIALS`` seeds for it. The trainings see at most ``ROWS`` of ``rows``. The targets of a
    regression are compared in their own units.
    """
    some = np.random.default_rng(seed).permutation(rows)[:ROWS]
    notes: list[str] = []

    parts = _parts(dataset, some, seed)

    def errors(options: Sequence[tuple[str, bool]]) -> list[float]:
        made = (prepare(dataset, some, scale=one, log_targets=logarithms) for one, logarithms in options)
        return [_error(dataset, some, parts, one, fleet) for one in made]

    def tell(found: tuple[float, float], note: str) -> None:
        # where both diverge, nothing was learned
        if math.isfinite(min(found)):
            notes.append(note)

    if scale is None:
        scale = SCALES[0]
        if parts and len(rows) >= MANY_ROWS and _has_pieces(dataset, some, prepare):
            plain, cut = errors([(one, bool(log_target)) for one in SCALES])
            scale = SCALES[cut < plain]
            of = "loss" if dataset.task == "classification" else "rmse"
            tell(
                (plain, cut),
                f"numbers {'cut into pieces' if cut < plain else 'scaled as they are'}: {of} of held-out rows "
                f"{cut:.4g} in pieces, {plain:.4g} without (--scale {SCALES[cut >= plain]} decides otherwise)",
            )
    if log_target is None:
        log_target = False
        if parts and _may_be_logarithms(dataset, rows):
            plain, logarithms = errors([(scale, False), (scale, True)])
            log_target = logarithms < plain
            tell(
                (plain, logarithms),
                f"target learned {'in logarithms' if log_target else 'as it is'}: rmse of held-out rows "
                f"{logarithms:.4g} in logarithms, {plain:.4g} without "
                f"({'--no-log-target' if log_target else '--log-target'} decides otherwise)",
            )
    return scale, log_target, notes


def _parts(dataset: Dataset, rows: Array, seed: int) -> list[Fold]:
    """Return kept and held-out rows for each trial, as indices of ``rows``: whole groups, or the last ones, where the
    data set has groups or times. Empty if there are too few."""
    if len(rows) < 2 * FOLDS:
        return []
    if dataset.groups is None and dataset.times is None:
        return list(folds(dataset.y[rows], TRIALS, seed=seed, stratify=dataset.task == "classification"))
    try:
        cut = [hold_out(dataset, rows, fraction=1 / TRIALS, seed=seed + trial) for trial in range(TRIALS)]
    except DataError:
        # one group, or one time
        return []
    return [(np.flatnonzero(np.isin(rows, kept)), np.flatnonzero(np.isin(rows, held))) for kept, held in cut]


def _has_pieces(dataset: Dataset, rows: Array, prepare: Prepare) -> bool:
    made = prepare(dataset, rows, scale="piecewise", log_targets=False)
    return any(at is not None for at in made.feature_knots) and made.width * len(dataset.y) <= MOST_INPUTS


def _may_be_logarithms(dataset: Dataset, rows: Array) -> bool:
    if dataset.task == "classification":
        return False
    targets = dataset.y[rows].astype(np.float64)
    return targets.ndim == 1 and bool(targets.min() > 0) and _skewness(targets) >= SKEWED


def _skewness(values: Array) -> float:
    centred = values - values.mean()
    deviation = float(np.sqrt(np.mean(centred**2)))
    return float(np.mean(centred**3)) / deviation**3 if deviation > 0 else 0.0


def _error(dataset: Dataset, rows: Array, parts: Sequence[Fold], made: Preprocessor, fleet: Make) -> float:
    """Return the error of the held-out rows: root mean square, or the loss; infinite if a model diverged."""
    classify = made.classes is not None
    X, labels = made.transform_features(dataset.X[rows]), dataset.y[rows]
    kept, held_out = ([part[place] for part in parts] for place in (0, 1))
    results = fleet(made).fit(
        X, made.encode_targets(labels), epochs=EPOCHS, early_stopping=PATIENCE, rows=kept, validation_rows=held_out
    )
    total = 0.0
    for member, held in zip(results.members, held_out, strict=True):
        if member.status == "diverged":
            return math.inf
        if classify:
            total += member.scores["val_loss"] * len(held)
        else:
            found = made.decode_predictions(member.engine.predict(X[held]))
            total += float(np.sum((found - labels[held]) ** 2)) / found[0].size
    mean = total / sum(map(len, held_out))
    return mean if classify else float(np.sqrt(mean))
