"""Train on a table as an estimator's parameters say: one network, or several that are merged."""

from __future__ import annotations

import time
import warnings
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from sklearn.utils import check_consistent_length

from fusemlp.callbacks import ProgressBar
from fusemlp.datasets.dataset import Dataset
from fusemlp.datasets.load import load_features
from fusemlp.datasets.prepare import Rows, fit_data, fit_preprocessor, network_ends, rows_for, watch
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.checks import as_count, as_number
from fusemlp.engine import Engine
from fusemlp.fleet import trials
from fusemlp.fleet.fleet import Fleet
from fusemlp.fleet.merge import check_mergeable, merged_members
from fusemlp.inputs.arrays import Array
from fusemlp.report.uncertainty import HeldOut, judged
from fusemlp.sklearn import table_settings as settings
from fusemlp.sklearn.table_rows import as_table, held_out, read
from fusemlp_kernels.errors import ArgumentError

if TYPE_CHECKING:
    from fusemlp.sklearn.table import TableEstimator


class Fitted(NamedTuple):
    """A trained network, and what an estimator knows beside it: see the attributes of ``TableParameters``."""

    engine: Engine
    preprocessor: Preprocessor
    notes: tuple[str, ...]
    held_out: HeldOut | None
    temperature: float


def fitted(estimator: TableEstimator, X: Any, y: Any, sample_weight: Any, X_val: Any, y_val: Any) -> Fitted:
    """Check all arguments and parameters, and train; see ``TableEstimator.fit``."""
    if (X_val is None) != (y_val is None):
        missing = "y_val" if y_val is None else "X_val"
        raise ArgumentError(f"{missing}: it is missing; X_val and y_val belong together")
    if y is None:
        # scikit-learn's words
        raise ArgumentError(f"y: {type(estimator).__name__} requires y to be passed, but the target y is None")
    seed, loss, notes = settings.seed(estimator), estimator._checked_loss(), list[str]()
    dataset, weight = read(estimator, X, estimator._checked_targets(y), sample_weight)
    estimator._find_classes(dataset)
    labels = dataset.y
    how, shared = settings.with_preset(estimator, len(labels), notes)
    models = settings.models(how, len(labels))
    if models > 1 and estimator.callbacks:
        raise ArgumentError(f"callbacks: they see the epochs of one model, and models is {models}; leave one out")
    holds_out = estimator.early_stopping is not None and X_val is None
    training, held, cut = held_out(estimator, dataset, models if holds_out else 0, seed, notes)
    limit, began = estimator.time_limit, time.monotonic()
    if limit is not None:
        as_number("time_limit", limit, low=0.0, low_open=True)
    made = prepared(estimator, dataset, training, loss.kind, seed)
    fewest = min((len(one) for one, _ in cut), default=len(training))
    described: dict[str, Any] = {
        "loss": loss,
        "optimizer": settings.optimizer(how),
        "batch_size": min(as_count("batch_size", how.batch_size), fewest),
        "seed": seed,
        "backend": estimator.backend,
        "precision": estimator.precision,
        "normalise": False,
    }
    net = settings.network(how, network_ends(made, loss.kind), shared)
    check_mergeable(net, models)
    engine = Engine(net, **described)
    rows = partial(rows_for, made, precision=engine.precision, by_class=estimator._class_weights(labels))

    def part(chosen: Array) -> Rows:
        own = None if weight is None else weight[chosen]
        return rows(dataset.X, labels[chosen], rows=chosen, weight=own)

    train, watched = part(training), part(held) if len(held) else None
    if X_val is not None:
        labels_val = estimator._checked_targets(y_val)
        features = load_features(as_table(estimator, X_val), made, notes=notes)
        check_consistent_length(features, labels_val)
        watched = rows(features, labels_val)
    validates = watched is not None or bool(cut)
    given: dict[str, Any] = {
        "epochs": as_count("epochs", estimator.epochs),
        "early_stopping": estimator.early_stopping if validates else None,
        **watch(estimator.metric, made, loss, validates=validates),
    }

    def fleet_of(models: int) -> Fleet:
        return Fleet(net, **described, vary={"seed": range(seed, seed + models)})

    seconds = trials.seconds_left(began, limit)
    if seconds is not None and models > 1:
        models = trials.models_within(seconds, fleet_of(models), train.X, train.y, notes)
        cut = cut[:models]
    given |= fit_data(train, watched, cut) | {"time_limit": trials.seconds_left(began, limit)}
    parts = list[tuple[Engine, Array]]()
    try:
        if models > 1:
            results = fleet_of(models).fit(**given, callback=print if estimator.verbose else None)
            engine, parts = merged_members(results.members, cut)
        else:
            callbacks = [*(estimator.callbacks or ()), *([ProgressBar()] if estimator.verbose else [])]
            engine.fit(**given, callbacks=callbacks)
    except KeyboardInterrupt:
        if engine.history is None or not engine.history.stopped:
            raise
        warnings.warn("Training interrupted by user.", stacklevel=3)
    errors, temperature = judged(engine, made, train, watched, parts)
    found = 1.0 if temperature is None else temperature.value
    return Fitted(engine, made, (*dataset.notes, *notes), errors, found)


def prepared(estimator: TableEstimator, dataset: Dataset, training: Array, loss: str, seed: int) -> Preprocessor:
    """Return the preprocessor; small trainings choose the scale that is left to them."""

    def fleet(first: int, last: int) -> Fleet:
        return Fleet(
            settings.network(estimator, (first, last)),
            loss,
            settings.optimizer(estimator),
            as_count("batch_size", estimator.batch_size),
            backend=estimator.backend,
            precision=estimator.precision,
            vary={"seed": range(trials.TRIALS)},
            normalise=False,
        )

    scale, log_target, _ = trials.chosen(
        dataset,
        training,
        fleet,
        loss=loss,
        scale=estimator.scale,
        log_target=estimator.log_target,
        seed=seed,
        time_limit=estimator.time_limit,
    )
    return fit_preprocessor(dataset, training, loss=loss, scale=scale, log_targets=log_target)
