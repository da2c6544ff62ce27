"""Train a table by a recipe: one model, or several of one kind that are merged, judged by rows that no model saw."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fusemlp.datasets.dataset import Dataset
from fusemlp.describe.adversarial import as_adversary
from fusemlp.describe.conflicts import check_together
from fusemlp.describe.losses import Quantiles
from fusemlp.describe.metrics import METRICS, Judged, Metric, metrics_for
from fusemlp.engine import Engine
from fusemlp.fleet.results import Member, merged, merged_members, scores_of
from fusemlp.inputs.arrays import Array
from fusemlp.report.evidence import guarantees
from fusemlp.report.metrics import MOST_NUMBERS, baselines, quantile_figures, scalars, score, worse_than
from fusemlp.report.uncertainty import COVERAGE, HeldOut, Temperature, judged, scale_logits, summary
from fusemlp.tables import defaults, descriptions, transfer
from fusemlp.tables.preparation import Prepared, decisions, prepare
from fusemlp.tables.recipe import TableRecipe
from fusemlp.training.trainer import History
from fusemlp_kernels.errors import ArgumentError, DivergenceError, unknown_name

# The share of a time limit for the training before a final fit, whose rows are more.
BEFORE_FINAL_FIT = 0.4


@dataclass(frozen=True, eq=False)
class Trained:
    """A training that has ended; ``engine`` is the model, of several models the merged one.

    ``models`` has the ``record_of`` each of several models. ``held_out`` are the errors of rows that no model was
    trained on, and ``temperature`` divides the logits of ``engine`` and ``final``: None without such rows. ``final`` is
    the model of all rows, with its epochs and rows. ``failure``: the loss was not finite, and the engine is back at the
    last good epoch; ``final_failure``: that of the final fit.
    """

    prepared: Prepared
    engine: Engine
    models: Sequence[Mapping[str, Any]] = ()
    held_out: HeldOut | None = None
    temperature: Temperature | None = None
    final: tuple[Engine, dict[str, int]] | None = None
    interrupted: bool = False
    failure: DivergenceError | None = None
    final_failure: DivergenceError | None = None


@dataclass(frozen=True, eq=False)
class Listeners:
    """The listeners of a training.

    ``callbacks`` see the epochs of one model. ``model`` gets each of several models that has ended, and ``merged`` the
    one that was made of them; ``say`` gets lines, and ``final`` the epochs of all models before a final fit.
    """

    callbacks: Sequence[Any] = ()
    model: Callable[[Member], object] | None = None
    merged: Callable[[Engine], object] = lambda engine: None
    say: Callable[[str], object] = lambda line: None
    final: Callable[[int], object] = lambda epochs: None


def train_table(
    recipe: TableRecipe,
    dataset: Dataset,
    *,
    source: transfer.Source | None = None,
    listeners: Listeners | None = None,
) -> Trained:
    """Train the recipe's model on a data set, of too few rows without validation.

    ``source`` is the run of ``transfer_from``, which the data set has been read by.

    Raises the errors of all fields before anything is trained, and DivergenceError when the loss is no longer finite.
    """
    if source is not None:
        recipe = source.filled(recipe, same_target=dataset.task == source.preprocessor.task)
    validates = dataset.validation is not None or recipe.validation_fraction > 0
    recipe = defaults.filled_in(recipe, table=bool(dataset.roles), validates=validates)
    prepared = prepare(recipe, dataset, source=source, needs_rows=False)
    prepared = settled(prepared)
    trained = train(prepared, new_engine(prepared), listeners=listeners or Listeners())
    if trained.failure is not None:
        raise trained.failure
    return trained


def settled(prepared: Prepared) -> Prepared:
    """Return a training with the models that fit the time limit, and a recipe with what the data decided, checked."""
    watched(prepared)
    seconds = defaults.seconds_left(prepared.began, prepared.recipe.time_limit)
    if seconds is not None and prepared.models > 1:
        fleet, notes = prepared.fleet(rows=len(prepared.train), epochs=1), [*prepared.tried]
        models = defaults.models_within(seconds, fleet, prepared.train.X, prepared.train.y, notes)
        prepared = replace(prepared, models=models, folds=prepared.folds[:models], tried=tuple(notes))
    return replace(prepared, recipe=replace(prepared.recipe, models=prepared.models, **decisions(prepared)))


@dataclass(frozen=True, kw_only=True)
class InUnits(Metric):
    """A score of numbers in their original units, which ``decode`` returns."""

    decode: Callable[[Array], Array]

    def of_rows(self, rows: Judged) -> float:
        return super().of_rows(replace(rows, truth=self.decode(rows.truth), predicted=self.decode(rows.predicted)))


def watched(prepared: Prepared) -> dict[str, Any]:
    """Return the arguments of ``fit`` for the recipe's ``metric``; a score of numbers is in their original units."""
    recipe, preprocessor, loss, validates = prepared.recipe, prepared.preprocessor, prepared.loss, prepared.validates
    metric = recipe.metric
    if metric is None:
        return {}
    numbers = preprocessor.task == "regression"
    of_training = ["loss"] if numbers else ["loss", "accuracy"]
    several = {"regression": "numbers", "multilabel": "labels"}
    kind = several.get(preprocessor.task, "classes" if loss.is_classification else "one-hot rows")
    metrics = metrics_for(kind) if validates else {}
    names = [f"val_{name}" for name in (*of_training, *metrics)] if validates else of_training
    if metric.startswith("val_") and not validates:
        raise ArgumentError(f"metric: {metric!r} is of validation rows, and there are none")
    bare = metric.removeprefix("val_")
    if (bare == "accuracy" and numbers) or (bare in METRICS and ("numbers" in METRICS[bare].kinds) != numbers):
        judged, holds = ("classes", "numbers") if numbers else ("numbers", "classes")
        raise ArgumentError(
            f"metric: {metric!r} is a score of {judged}, and the target holds {holds}; expected one of: "
            f"{', '.join(dict.fromkeys([*metrics, *names]))}"
        )
    short = f"val_{metric}" if metric in metrics else metric
    if short not in (monitors := [*dict.fromkeys([*names, *of_training])]):
        raise unknown_name("metric", metric, monitors, prefix="val_")
    score = metrics.get(short.removeprefix("val_"))
    if score is None or not numbers:
        return {"monitor": short}
    return {"monitor": short, "metrics": [InUnits(**vars(score), decode=preprocessor.decode_predictions)]}


def fit_arguments(prepared: Prepared) -> dict[str, Any]:
    """Return the arguments of ``fit``, with folds those of a fleet's: the rows, and how a model is trained on them."""
    recipe, train, validation = prepared.recipe, prepared.train, prepared.validation
    arguments = {
        "X": train.X,
        "y": train.y,
        "sample_weight": train.weight,
        "validation_data": None if validation is None else (validation.X, validation.y, validation.weight),
        **watched(prepared),
        "epochs": recipe.epochs,
        "early_stopping": recipe.patience if prepared.validates else None,
        "drop_last": recipe.drop_last,
    }
    if prepared.folds:
        arguments["rows"], arguments["validation_rows"] = map(list, zip(*prepared.folds, strict=True))
    return arguments


def new_engine(prepared: Prepared) -> Engine:
    """Return the engine of a new training; ArgumentError for an attack that it cannot be trained against."""
    recipe = prepared.recipe
    assert recipe.epochs is not None, "filled in"
    rows, epochs = len(prepared.train), recipe.epochs
    privacy = descriptions.privacy(recipe, rows=rows, epochs=epochs, validates=prepared.validates)
    engine = prepared.engine(descriptions.schedule(recipe, rows=rows, epochs=epochs), privacy=privacy)
    adversary = as_adversary("adversarial", prepared.attack(prepared.train.X))
    check_together({**engine.uses, **adversary.uses})
    return engine


def train(prepared: Prepared, engine: Engine, *, listeners: Listeners, scheduled: int | None = None) -> Trained:
    """Train to the end, the time limit, Ctrl-C, or a loss that is not finite; then judge, and fit to all rows.

    ``engine`` is new or at a checkpoint; several models begin anew, with a schedule of ``scheduled`` epochs if given.
    """
    recipe, arguments, parts = prepared.recipe, fit_arguments(prepared), list[tuple[Engine, Array]]()
    seconds = defaults.seconds_left(prepared.began, recipe.time_limit)
    if seconds is not None and recipe.final_fit:
        seconds *= BEFORE_FINAL_FIT
    if prepared.models > 1:
        arguments |= {"time_limit": seconds}
        trained, parts = _train_models(prepared, arguments, scheduled or arguments["epochs"], listeners)
        listeners.merged(trained.engine)
    else:
        trained = train_model(prepared, engine, listeners, seconds)
    if trained.failure is not None:
        return trained
    held_out, temperature = judged(trained.engine, prepared.preprocessor, prepared.train, prepared.validation, parts)
    trained = replace(trained, held_out=held_out, temperature=temperature)
    if not recipe.final_fit or trained.interrupted:
        return trained
    try:
        final = _fit_to_all_rows(trained, listeners)
    except DivergenceError as error:
        return replace(trained, final_failure=error)
    except KeyboardInterrupt:
        warnings.warn("the final fit was interrupted: the model of the training rows is kept", stacklevel=2)
        return trained
    if temperature is not None:
        scale_logits(final[0], temperature.value)
    return replace(trained, final=final)


def initial_parameters(
    prepared: Prepared, data: Mapping[str, Any], say: Callable[[str], object]
) -> Sequence[Mapping[str, Array]]:
    """Return each model's initial parameters, none without a source; ``probe`` trains them on ``data`` of a fit."""
    recipe = prepared.recipe
    if prepared.start is None or not recipe.probe:
        return () if prepared.start is None else prepared.start.parameters[: prepared.models]
    states, losses = [], []
    name = "val_loss" if data.get("validation_data") is not None or "validation_rows" in data else "loss"
    watched = {argument: data[argument] for argument in ("monitor", "metrics") if argument in data}
    for index in range(prepared.models):
        kept, held = prepared.folds[index] if "rows" in data else (slice(None), None)
        X, y, weight = _picked(data, kept)
        validation = data.get("validation_data") if held is None else _picked(data, held)
        schedule = descriptions.schedule(recipe, rows=len(X), epochs=recipe.probe)
        engine = prepared.engine(schedule, seed=recipe.seed + index)
        engine.load_state_dict({**engine.state_dict(), **prepared.start.parameters[index]})
        try:
            history = engine.probe(
                X,
                y,
                epochs=recipe.probe,
                batch_size=min(recipe.batch_size, len(X)),
                sample_weight=weight,
                validation_data=validation,
                early_stopping=recipe.patience if name == "val_loss" else None,
                drop_last=recipe.drop_last,
                **watched,
            )
            losses.append(min(history.history[name]))
        except DivergenceError as error:
            warnings.warn(f"the probe diverged, and the training starts where it was before: {error}", stacklevel=2)
        states.append(engine.state_dict())
    if losses:
        say(f"probe: {name} {np.mean(losses):.4g}")
    return states


def _picked(data: Mapping[str, Any], rows: Any) -> tuple[Any, ...]:
    return tuple(None if data[name] is None else data[name][rows] for name in ("X", "y", "sample_weight"))


def train_model(prepared: Prepared, engine: Engine, listeners: Listeners, seconds: float | None = None) -> Trained:
    """Train one model, in ``seconds`` at most."""
    recipe, arguments, resumes = prepared.recipe, fit_arguments(prepared), engine.fit_state is not None
    interrupted, failure = False, None
    try:
        if not resumes and recipe.probe:
            engine.load_state_dict(*initial_parameters(prepared, arguments, listeners.say))
        engine.fit(
            **arguments,
            callbacks=listeners.callbacks,
            resume=resumes,
            time_limit=seconds,
            adversarial=prepared.attack(prepared.train.X),
        )
    except KeyboardInterrupt:
        if engine.history is None or not engine.history.stopped:
            raise
        interrupted = True
    except DivergenceError as error:
        failure = error
    return Trained(prepared, engine, interrupted=interrupted, failure=failure)


def _train_models(
    prepared: Prepared, arguments: Mapping[str, Any], scheduled: int, listeners: Listeners
) -> tuple[Trained, list[tuple[Engine, Array]]]:
    """Train several models; return the merged one with the mean history, and models with the rows of their folds.

    Ctrl-C keeps the models as they are then. A model that diverged is left out; the training failed if all did.
    """
    recipe = prepared.recipe
    rows = min((len(kept) for kept, _ in prepared.folds), default=len(prepared.train))
    initial = initial_parameters(prepared, arguments, listeners.say)
    fleet = prepared.fleet(rows=rows, epochs=scheduled, initial=initial)
    try:
        results = fleet.fit(**arguments, callback=listeners.model)
    except KeyboardInterrupt:
        histories = [(recipe.seed + index, engine, engine.history) for index, engine in enumerate(fleet.engines)]
        begun = [(seed, engine, history) for seed, engine, history in histories if history and history.epochs]
        if not begun:
            raise
        records = [record_of(seed, history, "interrupted", scores_of(history)) for seed, _, history in begun]
        return Trained(prepared, merged([engine for _, engine, _ in begun]), records, interrupted=True), []
    records = [
        record_of(recipe.seed + member.index, member.history, member.status, member.scores)
        for member in results.members
    ]
    try:
        engine, parts = merged_members(results.members, prepared.folds)
    except DivergenceError as error:
        return Trained(prepared, results.members[0].engine, records, failure=error), []
    return Trained(prepared, engine, records), parts


def record_of(seed: int, history: History, status: str, scores: Mapping[str, float]) -> dict[str, Any]:
    """Return the record of one of several models: its end, its scores and its curves."""
    best = None if history.best_epoch is None else history.best_epoch + 1
    ending = {"seed": seed, "epochs": len(history.epochs), "best_epoch": best, "status": status}
    return {**ending, **scores, "history": history.history}


def _fit_to_all_rows(trained: Trained, listeners: Listeners) -> tuple[Engine, dict[str, int]]:
    """Return the model of all rows but a test set's own, after as many epochs as were best, and these counts."""
    prepared, recipe = trained.prepared, trained.prepared.recipe
    history = trained.engine.history
    best = None if history is None else history.best_epoch
    epochs = recipe.epochs if best is None else best + 1
    assert epochs is not None, "filled in"
    parts = [prepared.train, prepared.validation, prepared.test if prepared.dataset.test is None else None]
    rows = [part for part in parts if part is not None]
    X, y = (np.concatenate([getattr(part, name) for part in rows]) for name in ("X", "y"))
    weights = [part.weight for part in rows if part.weight is not None]
    arguments: dict[str, Any] = {"X": X, "y": y, "sample_weight": np.concatenate(weights) if weights else None}
    listeners.final(prepared.models * epochs)
    seconds = defaults.seconds_left(prepared.began, recipe.time_limit)
    arguments |= {"epochs": epochs, "drop_last": recipe.drop_last, "time_limit": seconds}
    initial = initial_parameters(prepared, arguments, listeners.say)
    if prepared.network.members > 1 or prepared.loss.numpy_only:
        engine = prepared.engine(descriptions.schedule(recipe, rows=len(X), epochs=epochs))
        if recipe.probe:
            engine.load_state_dict(*initial)
        engine.fit(**arguments)
    else:
        results = prepared.fleet(rows=len(X), epochs=epochs, initial=initial).fit(**arguments)
        try:
            engine = merged_members(results.members)[0]
        except DivergenceError as error:
            raise DivergenceError(f"final_fit: {error}; the model of the training rows is kept") from None
    return engine, {"epochs": len((engine.history or History()).epochs), "rows": len(X)}


def report_of(trained: Trained) -> tuple[dict[str, Any], Judged | None]:
    """Return the report of a training as JSON-able values, and the predictions of its test rows.

    A diverged training has neither scores nor predictions.
    """
    prepared, engine = trained.prepared, trained.engine
    history, preprocessor = engine.history or History(), prepared.preprocessor
    best = None if history.best_epoch is None else history.best_epoch + 1
    dead = engine.dead_units(prepared.train.X)
    divergence = "" if trained.failure is None else str(trained.failure)
    in_use = history.in_use if preprocessor.scale == "none" else [*history.in_use, "scaling"]
    known = {"divergence": divergence, "early_stopping": prepared.recipe.patience is not None, "in_use": in_use}
    report: dict[str, Any] = {
        "task": prepared.dataset.task,
        "epochs": len(history.epochs),
        "best_epoch": best,
        "stopped": history.stopped,
        "interrupted": trained.interrupted,
        "diverged": trained.failure is not None,
        "seconds": sum(history.seconds),
        "final": {name: values[-1] for name, values in history.history.items()},
        "dead_units": dead,
        "diagnosis": [asdict(finding) for finding in history.diagnose(dead, **known, python=False)],
    }
    report |= engine.ledger.report(engine.update_count)
    tested = _judged(trained, report) if trained.failure is None else None
    if prepared.start is not None:
        report["from"] = prepared.start.about
    if trained.models:
        report["models"] = list(trained.models)
    if trained.final is not None:
        report["final_fit"] = trained.final[1]
    return report, tested


def _judged(trained: Trained, report: dict[str, Any]) -> Judged | None:
    """Enter scores of the test rows and errors of held-out rows, and return the predictions of the former."""
    prepared, engine = trained.prepared, trained.engine
    preprocessor, test, tested = prepared.preprocessor, prepared.test, None
    if test is not None:
        report["test"], tested = score(engine, preprocessor, test.X, test.labels, test.weight)
        cells, _, rows = prepared.test_rows
        how = prepared.attack(test.X)
        report |= guarantees(engine, preprocessor, how, test.X, cells[rows], test.labels, test.weight)
        seen = prepared.seen(MOST_NUMBERS // max(1, len(preprocessor.classes or ())))
        weights = prepared.recipe.class_weight
        balanced = isinstance(weights, str) and weights == "balanced"
        report |= {"judged_by": "balanced_accuracy"} if balanced else {}
        report["baselines"] = baselines(preprocessor, *seen, test.X, test.labels, balanced=balanced)
        if isinstance(engine.loss, Quantiles):
            constant = np.quantile(np.asarray(seen[1], np.float64), engine.loss.q)
            scores = quantile_figures(engine.loss, np.tile(constant, (len(test.X), 1)), test.labels.reshape(-1, 1))
            report["baselines"]["constant"]["quantiles"] = scores
        if (start := prepared.start) is not None and not start.about["new_output_layer"]:
            earlier, _ = score(start.engine, preprocessor, test.X, test.labels, test.weight)
            report["baselines"]["earlier"] = scalars(earlier)
        report["worse_than"] = list(worse_than(report))
    if trained.temperature is not None:
        report["temperature"] = trained.temperature.value
    if (held_out := trained.held_out) is not None:
        report["held_out"] = held_out.to_config()
        if tested is not None and test is not None and held_out.reaches(COVERAGE):
            report["intervals"] = summary(engine, preprocessor, test.X, held_out, tested)
    return tested
