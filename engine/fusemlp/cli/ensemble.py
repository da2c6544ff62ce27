"""Train several models of one kind as one run: a fleet of seeds, each with its own validation rows, then merged."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.cli import recipe, transfer
from fusemlp.cli.commands import TrainOptions
from fusemlp.cli.options import ModelOptions
from fusemlp.datasets.load import Dataset
from fusemlp.engine import Engine
from fusemlp.fleet import trials
from fusemlp.fleet.fleet import Fleet
from fusemlp.fleet.merge import merged, merged_members
from fusemlp.fleet.results import Member
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import DivergenceError

if TYPE_CHECKING:
    from fusemlp.cli.prepare import Prepared


def fleet_of(
    prepared: Prepared, options: TrainOptions, schedule: Any, models: int, initial: Sequence[Mapping[str, Array]] = ()
) -> Fleet:
    """Return the untrained models: those of the run's seed and the seeds after it; ``initial`` as of ``Fleet``."""
    return Fleet(
        prepared.network,
        prepared.loss,
        prepared.optimizer(options, schedule),
        vary={"seed": range(options.seed, options.seed + models)},
        initial=initial,
        **recipe.engine_options(options),
    )


def train_ensemble(
    prepared: Prepared,
    options: TrainOptions,
    epochs: int,
    scheduled: int,
    watched: Mapping[str, Any],
    seconds: float | None,
    told: Callable[[Member], None],
) -> tuple[Engine, list[dict[str, Any]], bool, DivergenceError | None, list[tuple[Engine, Array]]]:
    """Train all models; return a merged engine with the mean history, a record a model, how it ended, and models with
    the rows of their folds.

    The schedule of the learning rate spans ``scheduled`` epochs; ``watched`` are the arguments of ``fit`` for
    ``--metric``; ``seconds`` are a limit; ``told`` is called with each model that has ended. The third is True after
    Ctrl-C, which keeps the models as they are then. A model that diverged is left out; the error is returned if all
    did.
    """
    parts = prepared.folds
    rows = min((len(one) for one, _ in parts), default=len(prepared.train))
    given = prepared.fit_data
    initial = transfer.initial(prepared, options, given, watched, prepared.models)
    schedule = recipe.schedule(options, rows=rows, epochs=scheduled)
    fleet = fleet_of(prepared, options, schedule, prepared.models, initial)

    def tell(member: Member) -> None:
        if not options.quiet:
            print(f"model {member.index + 1} of {prepared.models}: {_told(member)}", file=sys.stderr)
        told(member)

    patience = options.early_stopping or None
    try:
        results = fleet.fit(
            **given,
            **watched,
            epochs=epochs,
            early_stopping=patience,
            drop_last=options.drop_last,
            callback=tell,
            time_limit=seconds,
        )
    except KeyboardInterrupt:
        begun = [engine for engine in fleet.engines if engine.history is not None and engine.history.epochs]
        if not begun:
            raise
        return merged(begun), [], True, None, []
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
        engine, held = merged_members(results.members, parts)
    except DivergenceError as error:
        return results.members[0].engine, records, False, error, []
    return engine, records, False, None, held


def _told(member: Member) -> str:
    scores = ", ".join(f"{name} {value:.4g}" for name, value in member.scores.items())
    return f"{member.status} after {len(member.history.epochs)} epochs; {scores}"


def within(prepared: Prepared, options: TrainOptions) -> Prepared:
    """Return what has the models that the time limit is enough for, and a note if these are fewer."""
    seconds = trials.seconds_left(prepared.began, options.time_limit)
    if seconds is None or prepared.models == 1:
        return prepared
    fleet = fleet_of(prepared, options, recipe.schedule(options, rows=len(prepared.train), epochs=1), prepared.models)
    notes = [*prepared.tried]
    models = trials.models_within(seconds, fleet, prepared.train.X, prepared.train.y, notes)
    return replace(prepared, models=models, folds=prepared.folds[:models], tried=tuple(notes))


def fit_on_all_rows(
    prepared: Prepared, options: TrainOptions, epochs: int, seconds: float | None
) -> tuple[Engine, int]:
    """Return the model of all rows, those of a test file excepted, after ``epochs`` epochs, and the number of rows."""
    parts = [prepared.train, *([] if prepared.validation is None else [prepared.validation])]
    parts += [prepared.test] if prepared.dataset.test is None else []
    X, y = (np.concatenate([getattr(part, name) for part in parts]) for name in ("X", "y"))
    weights = [part.weight for part in parts if part.weight is not None]
    data: dict[str, Any] = {"X": X, "y": y, "sample_weight": np.concatenate(weights) if weights else None}
    initial = transfer.initial(prepared, options, data, {}, prepared.models)
    schedule = recipe.schedule(options, rows=len(X), epochs=epochs)
    if prepared.network.members > 1:
        engine = prepared.engine(options, schedule)
        engine.fit(**data, epochs=epochs, drop_last=options.drop_last, time_limit=seconds)
        return engine, len(X)
    fleet = fleet_of(prepared, options, schedule, prepared.models, initial)
    results = fleet.fit(**data, epochs=epochs, drop_last=options.drop_last, time_limit=seconds)
    try:
        return merged_members(results.members)[0], len(X)
    except DivergenceError as error:
        raise DivergenceError(f"final_fit: {error}; the model of the training rows is kept") from None


def decided(
    dataset: Dataset, rows: Array, options: ModelOptions, loss: str, *, seed: int
) -> tuple[str, bool, list[str]]:
    """Return the scale, whether targets are learned in logarithms, and notes; small trainings decide what is open."""

    def fleet(first: int, last: int) -> Fleet:
        return Fleet(
            recipe.network((first, *recipe.hidden_widths(options.hidden), last), options, init=options.init),
            loss,
            recipe.optimizer(options),
            vary={"seed": range(trials.TRIALS)},
            **recipe.engine_options(options),
        )

    classes = dataset.task == "classification"
    # other losses have other units, or a user who knows what the targets are
    log_target = options.log_target if loss == "mse" and not classes else bool(options.log_target)
    limit = options.time_limit if isinstance(options, TrainOptions) else None
    return trials.chosen(
        dataset, rows, fleet, loss=loss, scale=options.scale, log_target=log_target, seed=seed, time_limit=limit
    )


def decisions(prepared: Prepared) -> dict[str, Any]:
    """Return the options that the data decided, for a run's configuration."""
    made = prepared.preprocessor
    log_target = made.target_log if made.classes is None else None
    return {"scale": made.scale, "log_target": log_target, "weight_decay": prepared.weight_decay}


def described(prepared: Prepared, options: TrainOptions) -> TrainOptions:
    """Return the options with what the data decided."""
    return replace(options, **{**prepared.preset, "models": prepared.models, **decisions(prepared)})
