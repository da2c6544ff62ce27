"""Decide what a recipe leaves open: by rules, and by small trainings whose errors of held-out rows say what helps."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from fusemlp.datasets.dataset import Dataset
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import FOLDS, Fold, fit_preprocessor, folds, hold_out, network_ends, network_inputs
from fusemlp.describe.checks import as_count, as_patience, check_choice
from fusemlp.describe.conflicts import CONFLICTS, in_use, obstacles_to
from fusemlp.describe.losses import as_loss
from fusemlp.describe.network import MLP
from fusemlp.fleet.fleet import Fleet
from fusemlp.fleet.results import default_models
from fusemlp.inputs.arrays import Array
from fusemlp.runtime.plans import AT_ONCE, TRAITS, cpu_threads, first_available
from fusemlp.runtime.ranks import started
from fusemlp.tables import descriptions
from fusemlp.tables import recipe as recipes
from fusemlp.tables.descriptions import is_private, trains_plainly
from fusemlp.tables.recipe import FitRecipe, ModelRecipe, TableRecipe, given_options
from fusemlp_kernels.errors import ArgumentError, DataError

Fit = TypeVar("Fit", bound=FitRecipe)
Recipe = TypeVar("Recipe", bound=TableRecipe)

# Rows and folds of the trainings; epochs at most, and those without a better loss of held-out rows.
ROWS, TRIALS, TRIAL_EPOCHS, TRIAL_PATIENCE = 20_000, 3, 60, 5
# A target with at least this skewness may be learned in logarithms.
SKEWED = 1.0
# Scalings of features, of which the first needs no reason, and the second this many rows.
SCALES, LEAST_CUT = ("robust", "piecewise"), 200

# Share of a time limit for all trials; epochs that it should leave each model of an ensemble, and the batches and the
# share of the limit by which an epoch is timed. A share of it is for what follows the training, and as much remains for
# the training however long the preparation took.
SHARE, LEAST_EPOCHS, BATCHES, TIMING, LEAST = 0.2, 10, 100, 0.05, 0.1


def filled_in(recipe: Fit, *, table: bool, validates: bool) -> Fit:
    """Return the recipe with the epochs where they are not given; check them and early stopping."""
    epochs, patience = recipe.epochs, recipe.early_stopping
    if epochs is None:
        long = table and not (getattr(recipe, "adversarial", None) == "ibp" or is_private(recipe))
        epochs = recipes.TABLE_EPOCHS if long else recipes.DEFAULT_EPOCHS
    as_count("epochs", epochs)
    if patience is not None and as_patience("early_stopping", patience, minimum=0) and not validates:
        raise ArgumentError("early_stopping: it watches the validation loss, and --validation-fraction is 0")
    return replace(recipe, epochs=epochs)


def with_patience(recipe: Recipe, rows: int, *, validates: bool) -> Recipe:
    """Return the recipe with early stopping where it is not given, and without where nothing is validated, or by IBP.

    A large table leaves it open, and waits by itself; ``rows``: see ``with_preset``.
    """
    given, large = recipe.early_stopping is not None, rows >= recipes.LARGE_BATCHES[-1][0]
    if not validates or (recipe.adversarial == "ibp" and not given):
        return replace(recipe, early_stopping=0)
    return recipe if given or large else replace(recipe, early_stopping=recipes.PATIENCE)


def models_of(recipe: TableRecipe, dataset: Dataset, gaps: str, notes: list[str], *, new: bool) -> int:
    """Return the number of models that the recipe trains on a data set; a ``new`` training takes the default.

    A note tells of a default that ``gaps`` in the targets of its rows lower.
    """
    if recipe.models is not None:
        return as_count("models", recipe.models)
    plain = trains_plainly(recipe) and not as_loss(recipe.loss or "mse").numpy_only
    merges = new and dataset.roles and plain
    models = default_models(len(dataset.y), _plain_network(recipe)) if merges else 1
    if models == 1 or not gaps:
        return models
    notes.append(f"1 model instead of {models}, because targets are missing")
    return 1


def reads_codes(recipe: ModelRecipe) -> bool:
    """Return whether the first layer of the recipe's network can read codes: see ``Columns``."""
    traits = TRAITS.get(first_available() if recipe.backend == "auto" else recipe.backend)
    # attacks move inputs, and noise and clipped rows read them
    return trains_plainly(recipe) and traits is not None and traits.reads_codes


def with_class_decay(recipe: Recipe, dataset: Dataset) -> Recipe:
    """Return the recipe with the weight decay of Adam for a table's classes where none is given."""
    takes = dataset.task == "classification" and recipe.optimizer == "adam" and dataset.roles
    return replace(recipe, weight_decay=recipes.CLASS_DECAY) if takes and recipe.weight_decay is None else recipe


def with_batch(recipe: Recipe, rows: int) -> Recipe:
    """Return the recipe with the rows of a step, its rate and average; ``rows``: see ``with_preset``."""
    if recipe.batch_size is not None:
        return recipe
    averages = ("ema", f"{recipe.plan} plan") not in CONFLICTS and recipe.optimizer in ("adam", "adamw")
    for least, size, rate in recipes.LARGE_BATCHES if averages and trains_plainly(recipe) else ():
        # a given rate belongs to the usual rows of a step
        if rows >= least and (rate is None or recipe.lr is None):
            average = recipes.AVERAGE if recipe.ema is None else recipe.ema
            return replace(recipe, batch_size=size, lr=recipe.lr if rate is None else rate, ema=average)
    return replace(recipe, batch_size=recipes.BATCH)


def with_preset(recipe: Recipe, rows: int, *, classify: bool, validates: bool = True) -> tuple[Recipe, int, list[str]]:
    """Return the recipe with the fields of its preset, the number of members, and a note on the choice.

    ``rows`` are those of a table beside the test rows, 0 for other data; ``classify``: the target holds classes;
    ``validates``: rows are held out. No preset stands for auto, but for a training of the caller's own design.
    """
    given, obstacles = given_options(recipe).keys(), _obstacles_to_tabm(recipe)
    name = "auto" if recipe.preset is None else check_choice("preset", recipe.preset, recipes.PRESETS)
    note = f"preset tabm: {recipes.MEMBERS} members share the weights of one network"
    if name == "tabm":
        for option, reason in obstacles.items():
            raise ArgumentError(f"{option}: the preset tabm does not take it: {reason}")
        note += ", as asked for"
    else:
        reason = ""
        if not recipes.LEAST_ROWS <= rows <= recipes.MOST_ROWS:
            reason = f"tabm is for {recipes.LEAST_ROWS:,} to {recipes.MOST_ROWS:,} rows, and these are {rows:,}"
        elif not classify:
            reason = "tabm is for classes, one a row, and the target holds others; --preset tabm takes them too"
        elif obstacles:
            reason = f"tabm does not take what was given for {', '.join(obstacles)}"
        # a resumed run has its preset in its options; with a time limit the members' training is too long
        designed = not given.isdisjoint({*recipes.TABM, "models", "resume", "time_limit"} - recipes.PACE)
        if name == "plain" or (recipe.preset is None and (designed or reason)):
            return recipe, 1, []
        if reason:
            return recipe, 1, [f"preset plain: {reason}"]
        note += f", chosen for classes of {rows:,} rows; --preset plain takes less time"
    # an epoch has LEAST_STEPS steps at least, unless that takes batches of less than the plain recipe's rows
    size = 1 << (rows // recipes.LEAST_STEPS).bit_length() >> 1
    size = max(recipes.BATCH, min(recipes.TABM["batch_size"], size))
    changes = {name: value for name, value in {**recipes.TABM, "batch_size": size}.items() if name not in given}
    # rate and average belong to their optimizer
    left = {*(("lr", "ema") if "optimizer" in given else ()), *(() if validates else ("early_stopping",))}
    changes = {name: value for name, value in changes.items() if name not in left}
    words = ", ".join(f"{name} {value[0] if name == 'hidden' else value}" for name, value in changes.items())
    note += f"; in place of defaults it has {words}" if words else ""
    return replace(recipe, preset="tabm", models=1, **changes), recipes.MEMBERS, [note]


# The fields of features that members do not go with, where they have other names.
_FIELDS = {
    **{"prelu": "activation", "no hidden layer": "hidden", "output activation": "output_activation"},
    **{"privacy": "dp_epsilon", "ranks": "preset", "cupy": "backend"},
}


def _obstacles_to_tabm(recipe: TableRecipe) -> dict[str, str]:
    """Return the fields that the preset does not go with, and why."""
    others = {
        "models": ((recipe.models or 1) > 1, "it is one network whose members share weights; leave it out"),
        "transfer_from": (recipe.transfer_from is not None, "that run has its own network; leave it out"),
    }
    training = in_use(privacy=is_private(recipe), adversarial=recipe.adversarial, ranks=started())
    uses = {**_plain_network(recipe).uses, **training, "members": recipes.MEMBERS, recipe.backend: True}
    rows = obstacles_to("members", uses).items()
    reasons = {_FIELDS.get(feature, feature): words.partition(": ")[2] for feature, words in rows}
    return {name: words for name, (stands, words) in others.items() if stands} | reasons


def _plain_network(recipe: ModelRecipe) -> MLP:
    """Return the recipe's network, without members, of one input and output."""
    return descriptions.network((1, *descriptions.hidden_widths(recipe.hidden), 1), recipe)


def most_epochs(recipe: ModelRecipe) -> int:
    """Return the most epochs of all trials that decide what the recipe leaves open."""
    return 2 * TRIALS * TRIAL_EPOCHS * ((recipe.scale is None) + (recipe.log_target is None))


def decide(
    recipe: TableRecipe, dataset: Dataset, rows: Array, loss: str, *, seed: int, most_words: int | None
) -> tuple[str, bool, list[str]]:
    """Return the recipe's scale and log_target, decided where they are None, and a note on each that was tried.

    ``loss`` is the kind. The trials take ``SHARE`` of the recipe's time limit, and see at most ``ROWS`` of ``rows``.
    The targets of a regression are compared in their own units. ``most_words``: see ``Preprocessor.fit``.
    """
    # a fleet takes rows with all targets
    whole = rows[~np.isnan(dataset.y[rows]).any(axis=1)] if dataset.gaps else rows
    some, notes = np.random.default_rng(seed).permutation(whole)[:ROWS], list[str]()
    if recipe.scale is None and len(whole) < LEAST_CUT <= len(rows):
        reason = f"they take {LEAST_CUT} rows with all targets, and {len(whole)} of {len(rows)} have them"
        notes.append(f"no trials decide --scale: {reason}; choose it yourself (--scale)")
    rows = whole
    regression = dataset.task == "regression"
    # other losses have other units, or a user who knows what the targets are
    scale, log_target = recipe.scale, recipe.log_target if loss == "mse" and regression else bool(recipe.log_target)
    # two choices, two trainings each
    limit = None if recipe.time_limit is None else recipe.time_limit * SHARE / 4
    parts = _parts(dataset, some, seed)

    def helps(options: Sequence[tuple[str, bool]], texts: Sequence[str]) -> bool:
        """Return whether the second option has the smaller error, and note the text of the better one."""
        errors = []
        for option, logarithms in options:
            scaled = {"scale": option, "log_targets": logarithms, "most_words": most_words}
            preprocessor = fit_preprocessor(dataset, some, loss=loss, **scaled)
            first, last = network_ends(preprocessor, loss)
            widths = first, *descriptions.hidden_widths(recipe.hidden), last
            network = descriptions.network(widths, recipe)
            optimizer, machine = descriptions.optimizer(recipe), descriptions.engine_options(recipe)
            fleet = Fleet(network, loss, optimizer, vary={"seed": range(TRIALS)}, **machine)
            errors.append(_error(dataset, some, parts, preprocessor, fleet, limit))
        plain, changed = errors
        better = changed < plain
        if math.isnan(plain + changed):
            notes.append("time limit: too short for the trials that decide --scale and --log-target")
        # where both diverge, nothing was learned
        elif math.isfinite(min(errors)):
            least, most = sorted(errors)
            measure = f"{'rmse' if regression else 'loss'} of held-out rows {least:.4g}, against {most:.4g}"
            notes.append(texts[better].format(measure))
        return better

    if scale is None:
        tries = parts and len(rows) >= LEAST_CUT
        if tries:
            cut = fit_preprocessor(dataset, some, loss=loss, scale="piecewise")
            tries = any(knots is not None for knots in cut.feature_knots)
        texts = (
            "numbers are not cut into pieces: {} with pieces (--scale piecewise cuts them anyway)",
            "numbers are cut into pieces: {} without pieces (--scale robust leaves them whole)",
        )
        scale = SCALES[bool(tries) and helps([(name, bool(log_target)) for name in SCALES], texts)]
    if log_target is None:
        tries = parts and _may_be_logarithms(dataset, rows)
        texts = (
            "the target is learned as it is: {} in logarithms (--log-target takes these anyway)",
            "the target is learned in logarithms: {} without them (--no-log-target leaves them out)",
        )
        log_target = bool(tries) and helps([(scale, False), (scale, True)], texts)
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
    if engine.plan in AT_ONCE and not on_host:
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
    """Return kept and held-out indices of ``rows`` for each trial, by groups or times if any; none of too few rows."""
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


def _may_be_logarithms(dataset: Dataset, rows: Array) -> bool:
    """Return whether the targets of a regression are positive and skewed."""
    targets = dataset.y[rows].astype(np.float64)
    if targets.ndim > 1 or targets.min() <= 0:
        return False
    centred = targets - targets.mean()
    deviation = float(np.sqrt(np.mean(centred**2)))
    return deviation > 0 and float(np.mean(centred**3)) / deviation**3 >= SKEWED


def _error(
    dataset: Dataset,
    rows: Array,
    parts: Sequence[Fold],
    preprocessor: Preprocessor,
    fleet: Fleet,
    time_limit: float | None,
) -> float:
    """Return the rmse, or loss, of held-out rows: infinite if a model diverged, NaN if the time was too short."""
    by_loss, labels = preprocessor.task != "regression", dataset.y[rows]
    # several targets weigh alike
    units = labels.std(axis=0) if labels.ndim > 1 else 1.0
    X = network_inputs(preprocessor, dataset.X, fleet.first.precision, rows, codes=True)
    kept, held_out = ([part[place] for part in parts] for place in (0, 1))
    results = fleet.fit(
        X,
        preprocessor.encode_targets(labels),
        epochs=TRIAL_EPOCHS,
        early_stopping=TRIAL_PATIENCE,
        rows=kept,
        validation_rows=held_out,
        time_limit=time_limit,
    )
    total = 0.0
    for member, held in zip(results.members, held_out, strict=True):
        if member.status == "diverged":
            return math.inf
        if len(member.history.epochs) <= TRIAL_PATIENCE:
            return math.nan
        if by_loss:
            total += member.scores["val_loss"] * len(held)
        else:
            predicted = preprocessor.decode_predictions(member.engine.predict(X[held]))
            errors = (predicted - labels[held]) / np.where(units == 0, 1.0, units)
            total += float(np.sum(errors**2)) / predicted[0].size
    mean = total / sum(map(len, held_out))
    return mean if by_loss else float(np.sqrt(mean))
