"""Train several models of one kind as one run: a fleet of seeds, each with its own validation rows, then merged."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.cli import recipe
from fusemlp.cli.options import ModelOptions, TrainOptions
from fusemlp.datasets.load import Dataset
from fusemlp.datasets.parts import FOLDS, folds
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.engine import Engine
from fusemlp.fleet.fleet import Fleet
from fusemlp.fleet.merge import merged, merged_members
from fusemlp.fleet.results import Member
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import DivergenceError

if TYPE_CHECKING:
    from fusemlp.cli.prepare import Prepared

# A target with at least this skewness may be learned in logarithms; rows and folds of the training that decides.
SKEWED, TRIAL_ROWS, TRIAL_FOLDS, TRIAL_EPOCHS, TRIAL_PATIENCE = 1.0, 5_000, 3, 60, 5


def fleet_of(prepared: Prepared, options: ModelOptions, schedule: Any, models: int) -> Fleet:
    """Return the untrained models: those of the run's seed and the seeds after it."""
    return Fleet(
        prepared.network,
        prepared.loss,
        recipe.optimizer(options, schedule),
        options.batch_size,
        options.seed,
        vary={"seed": range(options.seed, options.seed + models)},
        backend=options.backend,
        device=options.device,
        precision=options.precision,
        plan=options.plan,
        normalise=False,
    )


def train_ensemble(
    prepared: Prepared,
    options: TrainOptions,
    epochs: int,
    scheduled: int,
    watched: Mapping[str, Any],
    told: Callable[[Member], None],
) -> tuple[Engine, list[dict[str, Any]], bool, DivergenceError | None]:
    """Train all models; return the merged engine with the mean history, a record a model, and how it ended.

    The schedule of the learning rate spans ``scheduled`` epochs; ``watched`` are the arguments of ``fit`` for
    ``--metric``; ``told`` is called with each model that has ended. The third is True after Ctrl-C, which keeps the
    models as they are then. A model that diverged is left out; the error is returned if all did.
    """
    parts = prepared.folds
    rows = min((len(one) for one, _ in parts), default=len(prepared.train))
    fleet = fleet_of(prepared, options, recipe.schedule(options, rows=rows, epochs=scheduled), prepared.models)
    given = prepared.fit_data
    if parts:
        given |= {"rows": [one for one, _ in parts], "validation_rows": [one for _, one in parts]}

    def ended(member: Member) -> None:
        if not options.quiet:
            print(f"model {member.index + 1} of {prepared.models}: {_told(member)}", file=sys.stderr)
        told(member)

    patience = options.early_stopping or None
    try:
        results = fleet.fit(
            **given, **watched, epochs=epochs, early_stopping=patience, drop_last=options.drop_last, callback=ended
        )
    except KeyboardInterrupt:
        engines = [engine for engine in fleet.engines if engine.history is not None and engine.history.epochs]
        if not engines:
            raise
        return merged(engines), [], True, None
    records = [
        {
            "seed": options.seed + member.index,
            "epochs": len(member.history.epochs),
            "best_epoch": None if member.history.best_epoch is None else member.history.best_epoch + 1,
            "status": member.status,
            **member.scores,
        }
        for member in results.members
    ]
    try:
        return merged_members(results.members), records, False, None
    except DivergenceError as error:
        return results.members[0].engine, records, False, error


def _told(member: Member) -> str:
    scores = ", ".join(f"{name} {value:.4g}" for name, value in member.scores.items())
    return f"{member.status} after {len(member.history.epochs)} epochs; {scores}"


def fit_on_all_rows(prepared: Prepared, options: TrainOptions, epochs: int) -> tuple[Engine, int]:
    """Return the model of all rows, those of a test file excepted, after ``epochs`` epochs, and the number of rows."""
    parts = [prepared.train, *([] if prepared.validation is None else [prepared.validation])]
    parts += [prepared.test] if prepared.dataset.test is None else []
    X, y = (np.concatenate([getattr(part, name) for part in parts]) for name in ("X", "y"))
    weights = [part.weight for part in parts if part.weight is not None]
    fleet = fleet_of(prepared, options, recipe.schedule(options, rows=len(X), epochs=epochs), prepared.models)
    results = fleet.fit(
        X, y, sample_weight=np.concatenate(weights) if weights else None, epochs=epochs, drop_last=options.drop_last
    )
    try:
        return merged_members(results.members), len(X)
    except DivergenceError as error:
        raise DivergenceError(f"final_fit: {error}; the model of the training rows is kept") from None


def log_pays(dataset: Dataset, rows: Array, options: ModelOptions, *, seed: int) -> tuple[bool, str]:
    """Return whether the targets are better learned in logarithms, and a note if that was tried.

    Positive, skewed targets are tried: two small trainings on at most ``TRIAL_ROWS`` of ``rows`` are compared by the
    squared error of held-out rows in original units.
    """
    targets = dataset.y[rows].astype(np.float64)
    if targets.ndim > 1 or len(rows) < 2 * FOLDS or targets.min() <= 0 or not _skewness(targets) >= SKEWED:
        return False, ""
    chosen = np.random.default_rng(seed).permutation(rows)[:TRIAL_ROWS]
    parts = folds(dataset.y[chosen], TRIAL_FOLDS, seed=seed, stratify=False)
    errors = []
    for log_targets in (False, True):
        made = Preprocessor.fit(dataset, chosen, scale=options.scale, log_targets=log_targets)
        X, y = made.transform_features(dataset.X[chosen]), made.encode_targets(dataset.y[chosen])
        widths = recipe.hidden_widths(options.hidden)
        fleet = Fleet(
            recipe.network((made.width, *widths, 1), options, init=options.init),
            "mse",
            recipe.optimizer(options),
            options.batch_size,
            vary={"seed": range(TRIAL_FOLDS)},
            backend=options.backend,
            device=options.device,
            precision=options.precision,
            plan=options.plan,
            normalise=False,
        )
        kept, held_out = ([part[place] for part in parts] for place in (0, 1))
        results = fleet.fit(
            X, y, epochs=TRIAL_EPOCHS, early_stopping=TRIAL_PATIENCE, rows=kept, validation_rows=held_out
        )
        errors.append(
            sum(
                float(np.sum((made.decode_predictions(member.engine.predict(X[held])) - dataset.y[chosen][held]) ** 2))
                for member, (_, held) in zip(results.members, parts, strict=True)
            )
        )
    count = sum(len(held) for _, held in parts)
    plain, logarithms = (float(np.sqrt(error / count)) for error in errors)
    pays = logarithms < plain
    instead = "--no-log-target" if pays else "--log-target"
    return pays, (
        f"target learned {'in logarithms' if pays else 'as it is'}: rmse of held-out rows {logarithms:.4g} in "
        f"logarithms, {plain:.4g} without ({instead} decides otherwise)"
    )


def _skewness(values: Array) -> float:
    centred = values - values.mean()
    deviation = float(np.sqrt(np.mean(centred**2)))
    return float(np.mean(centred**3)) / deviation**3 if deviation > 0 else 0.0


def described(prepared: Prepared, options: TrainOptions) -> TrainOptions:
    """Return the options with what the data decided, for the run's configuration."""
    tried = prepared.preprocessor.target_log if prepared.target_note else options.log_target
    return replace(options, models=prepared.models, log_target=tried)
