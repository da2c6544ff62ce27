"""Small trainings that decide how a table is prepared: the errors of held-out rows say what helps."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np

from fusemlp.datasets.dataset import Dataset
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import FOLDS, Fold, fit_preprocessor, folds, hold_out, network_ends
from fusemlp.fleet.fleet import Fleet
from fusemlp.inputs.arrays import Array
from fusemlp.runtime.backends import cpu_threads
from fusemlp_kernels.errors import DataError

# Rows and folds of the trainings; epochs at most, and those without a better loss of held-out rows.
ROWS, TRIALS, EPOCHS, PATIENCE = 20_000, 3, 60, 5
# A target with at least this skewness may be learned in logarithms.
SKEWED = 1.0
# Scalings of features, of which the first needs no reason, and the second this many rows, but not more than this many
# inputs of all rows: half a gigabyte in fp32.
SCALES, MANY_ROWS, MOST_INPUTS = ("robust", "piecewise"), 200, 1 << 27

# Share of a time limit for all trials; epochs that it should leave each model of an ensemble, and the batches and the
# share of the limit by which an epoch is timed. A share of it is for what follows the training, and as much remains for
# the training however long the preparation took.
SHARE, LEAST_EPOCHS, BATCHES, TIMING, LEAST = 0.2, 10, 100, 0.05, 0.1


def chosen(
    dataset: Dataset,
    rows: Array,
    fleet: Callable[[int, int], Fleet],
    *,
    loss: str,
    scale: str | None,
    log_target: bool | None,
    seed: int,
    time_limit: float | None = None,
) -> tuple[str, bool, list[str]]:
    """Return scale and log_target where they are None, and a note on each that was tried.

    ``fleet`` makes an untrained fleet of ``TRIALS`` seeds of the widths of its first and last layer, for the kind of
    ``loss``. The trials take ``SHARE`` of ``time_limit`` seconds. They see at most ``ROWS`` of ``rows``. The targets of
    a regression are compared in their own units.
    """
    some = np.random.default_rng(seed).permutation(rows)[:ROWS]
    notes: list[str] = []
    # two choices, two trainings each
    limit = None if time_limit is None else time_limit * SHARE / 4
    parts = _parts(dataset, some, seed)

    def errors(options: Sequence[tuple[str, bool]]) -> list[float]:
        preprocessor = (fit_preprocessor(dataset, some, loss=loss, scale=one, log_targets=log) for one, log in options)
        return [_error(dataset, some, parts, one, fleet(*network_ends(one, loss)), limit) for one in preprocessor]

    def tell(found: tuple[float, float], note: str) -> None:
        if math.isnan(sum(found)):
            notes.append("time limit: too short for the trials that decide --scale and --log-target")
        # where both diverge, nothing was learned
        elif math.isfinite(min(found)):
            notes.append(note)

    if scale is None:
        scale = SCALES[0]
        if parts and len(rows) >= MANY_ROWS and _has_pieces(dataset, some, loss):
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


def seconds_left(began: float, limit: float | None) -> float | None:
    """Return what is left for training of a limit in seconds since ``began``, as ``time.monotonic`` tells it."""
    return None if limit is None else max(LEAST * limit, began + (1.0 - LEAST) * limit - time.monotonic())


def models_within(seconds: float, fleet: Fleet, X: Array, y: Array, notes: list[str]) -> int:
    """Return how many of a fleet's models have time for ``LEAST_EPOCHS`` epochs each, and note if these are fewer.

    At least two are, and one a core. The first is trained to time an epoch of these rows, as ``fit`` takes them.
    """
    engine, some = fleet.first, BATCHES * fleet.first.batch_size
    on_host = engine.memory.backend.traits.on_host
    if engine.plan == "resident" and not on_host:
        # all in one launch
        return len(fleet)
    with warnings.catch_warnings():
        # the training itself warns of its rows
        warnings.simplefilter("ignore")
        engine.fit(X[: engine.batch_size], y[: engine.batch_size], epochs=1)
        before, began = engine.update_count, time.monotonic()
        engine.fit(X[:some], y[:some], epochs=1, time_limit=TIMING * seconds)
    taken = time.monotonic() - began
    done = (engine.update_count - before) * engine.optimizer.accumulate * engine.batch_size
    epoch = taken * len(X) / max(1, min(done, len(X)))
    workers = cpu_threads() if on_host and engine.plan == "resident" else 1
    models = max(2, workers, int(workers * seconds / (LEAST_EPOCHS * epoch)))
    if models < len(fleet):
        notes.append(f"time limit: {models} of {len(fleet)} models are trained, so that each has time to learn")
    return min(len(fleet), models)


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


def _has_pieces(dataset: Dataset, rows: Array, loss: str) -> bool:
    made = fit_preprocessor(dataset, rows, loss=loss, scale="piecewise")
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


def _error(
    dataset: Dataset,
    rows: Array,
    parts: Sequence[Fold],
    preprocessor: Preprocessor,
    fleet: Fleet,
    time_limit: float | None,
) -> float:
    """Return the error of the held-out rows: root mean square, or the loss.

    Infinite if a model diverged, NaN if the time was too short for more than ``PATIENCE`` epochs.
    """
    classify = preprocessor.classes is not None
    X, labels = preprocessor.transform_features(dataset.X[rows]), dataset.y[rows]
    kept, held_out = ([part[place] for part in parts] for place in (0, 1))
    results = fleet.fit(
        X,
        preprocessor.encode_targets(labels),
        epochs=EPOCHS,
        early_stopping=PATIENCE,
        rows=kept,
        validation_rows=held_out,
        time_limit=time_limit,
    )
    total = 0.0
    for member, held in zip(results.members, held_out, strict=True):
        if member.status == "diverged":
            return math.inf
        if len(member.history.epochs) <= PATIENCE:
            return math.nan
        if classify:
            total += member.scores["val_loss"] * len(held)
        else:
            predicted = preprocessor.decode_predictions(member.engine.predict(X[held]))
            total += float(np.sum((predicted - labels[held]) ** 2)) / predicted[0].size
    mean = total / sum(map(len, held_out))
    return mean if classify else float(np.sqrt(mean))
