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
    prepared: Prepared, options: TrainOptions, initial: Sequence[Mapping[str, Array]] = (), *, rows: int, epochs: int
) -> Fleet:
    """Return the untrained models: those of the run's seed and the seeds after it; ``initial`` as of ``Fleet``.

    The schedule of the learning rate spans ``epochs`` epochs of ``rows`` rows.
    """
    return Fleet(
        prepared.network,
        prepared.loss,
        prepared.optimizer(options, recipe.schedule(options, rows=rows, epochs=epochs)),
        vary={"seed": range(options.seed, options.seed + prepared.models)},
        initial=initial,
        **recipe.engine_options(options),
    )


def train_ensemble(
    prepared: Prepared,
    options: TrainOptions,
    given: Mapping[str, Any],
    scheduled: int,
    seconds: float | None,
    told: Callable[[Member], None],
) -> tuple[Engine, list[dict[str, Any]], bool, DivergenceError | None, list[tuple[Engine, Array]]]:
    """Train all models; return a merged engine with the mean history, a record a model, how it ended, and models with
    the rows of their folds.

    ``given`` are the arguments of ``fit``; the schedule of the learning rate spans ``scheduled`` epochs; ``seconds``
    are a limit; ``told`` is called with each model that has ended. The third is True after Ctrl-C, which keeps the
    models as they are then. A model that diverged is left out; the error is returned if all did.
    """
    rows = min((len(one) for one, _ in prepared.folds), default=len(prepared.train))
    fleet = fleet_of(prepared, options, transfer.initial(prepared, options, given), rows=rows, epochs=scheduled)

    def tell(member: Member) -> None:
        if not options.quiet:
            print(f"model {member.index + 1} of {prepared.models}: {_told(member)}", file=sys.stderr)
        told(member)

    try:
        results = fleet.fit(**given, callback=tell, time_limit=seconds)
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
        engine, held = merged_members(results.members, prepared.folds)
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
    fleet = fleet_of(prepared, options, rows=len(prepared.train), epochs=1)
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
    given: dict[str, Any] = {"X": X, "y": y, "sample_weight": np.concatenate(weights) if weights else None}
    given |= {"epochs": epochs, "drop_last": options.drop_last, "time_limit": seconds}
    if prepared.network.members > 1:
        engine = prepared.engine(options, recipe.schedule(options, rows=len(X), epochs=epochs))
        engine.fit(**given)
        return engine, len(X)
    fleet = fleet_of(prepared, options, transfer.initial(prepared, options, given), rows=len(X), epochs=epochs)
    results = fleet.fit(**given)
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
