"""Turn a recipe into descriptions of network, loss, optimizer, schedule, privacy and attack, checked against data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from inspect import signature
from typing import Any, TypeVar

import numpy as np

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.adversarial import IBP, Attack
from fusemlp.describe.checks import as_count, as_number, check_choice, listed
from fusemlp.describe.conflicts import check_together
from fusemlp.describe.losses import LOSSES, Loss, as_loss
from fusemlp.describe.network import BY_LAYER, MLP, SLOPES, Activation, as_activation
from fusemlp.describe.optimizers import OPTIMIZERS, SCHEDULES, Optimizer, Schedule
from fusemlp.describe.privacy import DPSGD, steps_of_an_epoch
from fusemlp.inputs.arrays import Array, balanced
from fusemlp.report.evidence import image_shape
from fusemlp.tables import recipe as recipes
from fusemlp.tables.recipe import FitRecipe, ModelRecipe, StepRecipe, TableRecipe, given_options, one_of
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

Described = TypeVar("Described")

# The fields that are arguments of the network; the encoding of a table is that of its text.
_OF_NETWORK = signature(MLP).parameters.keys() - {"sizes", "members", "encoding"}
# The fields of each kind of description, with the names that they and their errors have there.
_FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "loss": {"label_smoothing": ("label_smoothing",), "delta": ("delta",), "quantile": ("q",)},
    "optimizer": {
        **{name: (name,) for name in ("momentum", "nesterov", "weight_decay", "eps")},
        **{"beta1": ("betas", "betas[0]"), "beta2": ("betas", "betas[1]")},
    },
    "schedule": {
        "lr_step": ("every",),
        "lr_gamma": ("gamma", "factor"),
        "lr_final": ("final", "min_lr"),
        "lr_patience": ("patience",),
    },
    "privacy": {"dp_epsilon": ("epsilon",), "dp_delta": ("delta",), "dp_clip": ("clip",)},
    "attack": {"attack_eps": ("eps",), "attack_steps": ("steps",), "attack_norm": ("norm",)},
}


def is_private(recipe: ModelRecipe) -> bool:
    """Return whether the recipe trains with differential privacy."""
    return getattr(recipe, "dp_epsilon", None) is not None


def trains_plainly(recipe: ModelRecipe) -> bool:
    """Return whether small trainings may decide for the recipe: not with privacy, and not against attacks."""
    return not is_private(recipe) and getattr(recipe, "adversarial", None) is None


def _chosen(recipe: ModelRecipe, what: str, kind: str, known: Mapping[str, type]) -> dict[str, Any]:
    """Return the given fields as those of the description ``known[kind]``; refuse one that only others have."""
    check_choice(what, kind, known)
    chosen = {}
    for name, spellings in _FIELDS[what].items():
        value = getattr(recipe, name)
        if value is None or value is False:
            continue
        owners = {owner: field.name for owner, cls in known.items() for field in fields(cls) if field.name in spellings}
        if kind not in owners:
            have = "has" if len(owners) == 1 else "have"
            raise ArgumentError(
                f"{name}: only {one_of(owners, 'and')} {have} it, and the {what} is {kind}; leave it out"
            )
        chosen[owners[kind]] = value
    return chosen


def _made(what: str, described: Callable[..., Described], *rate: float | Schedule, **given: Any) -> Described:
    """Return a description; its errors name the recipe's field in place of its own."""
    try:
        return described(*rate, **given)
    except (ArgumentError, ArgumentTypeError) as error:
        field, _, rest = str(error).partition(": ")
        option = next((name for name, spellings in _FIELDS[what].items() if field in spellings), field)
        raise type(error)(f"{option}: {rest}") from None


def _check_free(recipe: ModelRecipe, what: str) -> None:
    """Raise ArgumentError for fields beside an object that has them."""
    for name in _FIELDS[what]:
        if getattr(recipe, name) not in (None, False):
            raise ArgumentError(f"{name}: the object given as {what} has it; set it there")


def engine_options(recipe: ModelRecipe) -> dict[str, Any]:
    """Return the arguments of an engine or a fleet that say how and where it computes."""
    names = ("batch_size", "seed", "backend", "device", "precision", "plan")
    # the preprocessor scales the inputs
    return {**{name: getattr(recipe, name) for name in names}, "normalise": False}


def hidden_widths(hidden: Any) -> tuple[int, ...]:
    """Return the widths of the hidden layers: of numbers, or of words such as "128,64", one or several."""
    if hidden is None:
        return (recipes.DEFAULT_WIDTH,)
    parts = [hidden] if isinstance(hidden, str) or not isinstance(hidden, Iterable) else list(hidden)
    if not all(isinstance(part, str) for part in parts):
        return tuple(as_count("hidden", width) for width in parts)
    words = [word.strip() for part in parts for word in part.split(",")]
    if words in (["none"], []):
        return ()
    if not all(word.lstrip("+-").isdecimal() for word in words):
        raise ArgumentError(f"hidden: expected whole numbers such as 128,64, or none, got {','.join(parts)!r}")
    return tuple(as_count("hidden", int(word)) for word in words)


def _numbers(argument: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ArgumentError(f"{argument}: expected a number, or several as in 0.2,0.5, got {text!r}") from None


def by_layers(argument: str, value: Any) -> Any:
    """Return a value for all hidden layers, or a list with one for each, of a text such as relu,tanh or 0.2,0.5."""
    if not isinstance(value, str):
        return value
    parts = _numbers(argument, value) if argument == "dropout" else [word.strip() for word in value.split(",")]
    return parts if len(parts) > 1 else parts[0]


def network(sizes: Sequence[int], recipe: StepRecipe, *, members: int = 1) -> MLP:
    """Return the network of these widths; the recipe's ``slope`` is that of the activations that have one."""
    arguments = {field.name: getattr(recipe, field.name) for field in fields(recipe) if field.name in _OF_NETWORK}
    arguments |= {name: by_layers(name, arguments[name]) for name in BY_LAYER}
    activation: Any = arguments["activation"]
    if recipe.slope is not None:
        several = isinstance(activation, Iterable) and not isinstance(activation, str)
        activations = [as_activation("activation", part) for part in (activation if several else [activation])]
        if not any(part.name in SLOPES for part in activations):
            raise ArgumentError(f"slope: only {one_of(SLOPES, 'and')} have one, got activation {recipe.activation!r}")
        activations = [Activation(part.name, recipe.slope) if part.name in SLOPES else part for part in activations]
        arguments["activation"] = activations if several else activations[0]
    return MLP(sizes, members=members, **arguments)


def loss_name(recipe: ModelRecipe, task: str, classes: int) -> str:
    """Return the kind of the recipe's loss or the task's default, checked; ``classes`` is 0 for a regression."""
    classify, usual = (
        task == "classification",
        {"classification": "cross_entropy", "multilabel": "binary_cross_entropy"},
    )
    chosen = as_loss(recipe.loss or usual.get(task, "mse"))
    check_together({**chosen.uses, "table": True})
    name = chosen.kind
    if task == "multilabel" and name != usual[task]:
        raise ArgumentError(f"loss: {name!r} is not for several labels a row; leave it out, or train on one target")
    if as_loss(name).is_classification and task == "regression":
        raise ArgumentError(
            f"loss: {name!r} is for classes, and this is a regression; use mse, mae, huber, quantile, poisson, "
            "quantiles or gaussian, or train on classes: --task classification, TableClassifier"
        )
    if name in ("poisson", "quantile", "quantiles", "gaussian") and classify:
        raise ArgumentError(
            f"loss: {name!r} is for numbers, and the target holds classes; use cross_entropy, binary_cross_entropy, "
            "mse, mae or huber, or train on numbers: --task regression, TableRegressor"
        )
    if name == "binary_cross_entropy" and classify and classes != 2:
        raise ArgumentError(f"loss: {name!r} is for two classes, and the target has {classes}; use cross_entropy")
    if name == "gaussian" and recipe.log_target:
        raise ArgumentError(
            "log_target: the loss gaussian learns the deviation of the target, not of its logarithm; leave it out, or "
            "use quantiles"
        )
    if recipe.class_weight is not None and not classify:
        raise ArgumentError(f"class_weight: only classes, one a row, have weights, and this is a training for {task}")
    return name


def class_weights(asked: Any, codes: Array, labels: Sequence[Any]) -> list[float] | None:
    """Return a weight for each of the classes ``labels``: as given, or balanced: rows / (present classes * rows of the
    class). A mapping gives those of some classes, and 1 to the others."""
    if asked is None:
        return None
    if isinstance(asked, str) and asked == "balanced":
        return balanced(codes, len(labels))
    if isinstance(asked, Mapping):
        for label in asked:
            if label not in labels:
                known = one_of(map(repr, labels), "and")
                raise ArgumentError(f"class_weight: {label!r} is none of the classes {known}")
        return [as_number("class_weight", asked.get(label, 1.0), low=0.0) for label in labels]
    numbers = _numbers("class_weight", asked) if isinstance(asked, str) else list(asked)
    weights = [as_number("class_weight", number, low=0.0) for number in numbers]
    if len(weights) != len(labels):
        each = f"{len(labels)} numbers, for {listed(labels)} in this order"
        raise ArgumentError(f"class_weight: expected balanced, or {each}; got {asked!r}")
    return weights


def loss(recipe: ModelRecipe, name: str, weights: list[float] | None, *, missing: bool = False) -> Loss:
    """Return the loss ``name``, of which cross_entropy takes class weights; ``missing``: NaN in targets is valid."""
    decided: dict[str, Any] = {"missing": True} if missing else {}
    if weights is not None and name == "cross_entropy":
        decided["class_weight"] = weights
    if isinstance(recipe.loss, Loss):
        _check_free(recipe, "loss")
        if "class_weight" in decided and recipe.loss.class_weight is not None:
            raise ArgumentError("class_weight: the object given as loss has it; set it there")
        return replace(recipe.loss, **decided)
    chosen = _chosen(recipe, "loss", name, LOSSES)
    if isinstance(chosen.get("q"), str):
        numbers = _numbers("quantile", chosen["q"])
        chosen["q"] = numbers[0] if name == "quantile" and len(numbers) == 1 else numbers
    if name == "quantile" and isinstance(chosen.get("q"), Sequence):
        raise ArgumentError("quantile: the loss quantile learns one; for several take --loss quantiles")
    return _made("loss", LOSSES[name], **chosen, **decided)


def optimizer(recipe: ModelRecipe, schedule: Schedule | None = None) -> Optimizer:
    """Return the optimizer with ``schedule`` (None: the rate of the recipe)."""
    rate = learning_rate(recipe) if schedule is None else schedule
    names = ("clip_norm", "ema", "accumulate", "decay_biases")
    if isinstance(recipe.optimizer, Optimizer):
        _check_free(recipe, "optimizer")
        changed = given_options(recipe)
        changes: Any = {"lr": rate, **{name: changed[name] for name in names if name in changed}}
        return replace(recipe.optimizer, **changes)
    arguments = _chosen(recipe, "optimizer", recipe.optimizer, OPTIMIZERS)
    described = OPTIMIZERS[recipe.optimizer]
    if "betas" in arguments:
        usual: Any = described()
        betas = zip((recipe.beta1, recipe.beta2), usual.betas, strict=True)
        arguments["betas"] = tuple(default if beta is None else beta for beta, default in betas)
    arguments |= {name: value for name in names if (value := getattr(recipe, name)) is not None}
    return _made("optimizer", described, rate, **arguments)


def learning_rate(recipe: ModelRecipe) -> float | Schedule:
    """Return the given rate or schedule, or the optimizer's."""
    if recipe.lr is not None:
        return recipe.lr if isinstance(recipe.lr, Schedule) else as_number("lr", recipe.lr, low=0.0, low_open=True)
    if isinstance(recipe.optimizer, Optimizer):
        return recipe.optimizer.lr
    return OPTIMIZERS[check_choice("optimizer", recipe.optimizer, OPTIMIZERS)]().lr


def schedule(recipe: FitRecipe, *, rows: int, epochs: int) -> Schedule:
    """Return the schedule, with lengths converted from epochs into updates for ``rows`` training rows.

    It fixes the length of a schedule that has one, so a run keeps its rates when its epochs are raised later.
    """
    kind, rate = recipe.schedule, learning_rate(recipe)
    if isinstance(rate, Schedule):
        if kind != "constant" or recipe.warmup:
            raise ArgumentError(f"schedule: lr is a schedule already, {rate}; give one of the two")
        return rate
    arguments = _chosen(recipe, "schedule", kind, SCHEDULES)
    described = SCHEDULES[kind]
    batch_size = min(as_count("batch_size", recipe.batch_size), rows)
    batches = rows // batch_size if recipe.drop_last else -(-rows // batch_size)
    if is_private(recipe):
        batches = steps_of_an_epoch(rows, batch_size)
    each = batches / as_count("accumulate", recipe.accumulate)
    arguments["warmup"] = round(as_number("warmup", recipe.warmup, low=0.0) * each)
    if "steps" in {field.name for field in fields(described)}:
        arguments["steps"] = max(1, int(epochs * each) - arguments["warmup"])
    if kind == "step":
        if recipe.lr_step is None:
            raise ArgumentError("lr_step: the schedule step needs it: --lr-step 10 for a reduction every ten epochs")
        arguments["every"] = max(1, round(as_number("lr_step", recipe.lr_step, low=0.0, low_open=True) * each))
    if kind == "exponential":
        if recipe.lr_gamma is None:
            raise ArgumentError("lr_gamma: the schedule exponential needs it: --lr-gamma 0.95 for 5 % less each epoch")
        arguments["gamma"] = as_number("lr_gamma", recipe.lr_gamma, low=0.0, low_open=True) ** (1.0 / each)
    return _made("schedule", described, rate, **arguments)


def privacy(recipe: TableRecipe, *, rows: int, epochs: int, validates: bool) -> DPSGD | None:
    """Return the privacy that spends ``dp_epsilon`` on this many training rows and epochs; None without it."""
    if not is_private(recipe):
        for name in ("dp_delta", "dp_clip"):
            if getattr(recipe, name) is not None:
                raise ArgumentError(f"{name}: it is for private training; give --dp-epsilon too: --dp-epsilon 3")
        return None
    if recipe.drop_last:
        raise ArgumentError("drop_last: the batches of private training have no common length; leave it out")
    if isinstance(recipe.class_weight, str) and recipe.class_weight == "balanced":
        raise ArgumentError("class_weight: balanced counts the private rows; give a number for each class")
    if recipe.metric in ("loss", "accuracy") or (recipe.schedule == "reduce_on_plateau" and not validates):
        raise ArgumentError(f"metric: {recipe.metric or 'loss'} is of the private rows; choose --metric val_loss")
    names = "epsilon", "delta", "clip"
    chosen = {name: value for name in names if (value := getattr(recipe, f"dp_{name}")) is not None}
    size = min(recipe.batch_size, rows)
    return _made("privacy", DPSGD.for_epsilon, rows=rows, batch_size=size, epochs=epochs, **chosen)


def attack(
    options: Any, preprocessor: Preprocessor, X: Array, cells: Array, option: str = "adversarial"
) -> Attack | IBP | None:
    """Return the attack of an option on rows X, as the network takes them, or None; ArgumentError for what cannot be.

    ``cells`` are the rows scored under it, as in the data. Pixels that are not scaled stay within the ends of X.
    """
    kind: Any = getattr(options, option)
    kinds: Mapping[str, type[Any]] = recipes.HARDENINGS if option == "adversarial" else recipes.ATTACKS
    if kind is None or isinstance(kind, Attack | IBP):
        mend = f"give --{option} too, such as --{option} pgd" if kind is None else "the object given has it"
        for name in _FIELDS["attack"]:
            if getattr(options, name) is not None:
                raise ArgumentError(f"{name}: it is of an attack; {mend}")
        if kind is not None:
            _check_columns(option, preprocessor, cells)
        return kind
    # trainings of earlier releases
    if kind in ("free", "trades"):
        raise ArgumentError(f"{option}: {kind} is gone; train against pgd, which takes its place")
    check_choice(option, kind, kinds)
    if options.attack_eps is None:
        raise ArgumentError("attack_eps: say how far an input may move, in units after --scale: --attack-eps 0.1")
    chosen = _chosen(options, "attack", kind, kinds)
    _check_columns(option, preprocessor, cells)
    within = image_shape(preprocessor) is not None and preprocessor.scale == "none"
    bounds = (float(X.min()), float(X.max())) if within and X.min() < X.max() else None
    made: Attack | IBP = _made("attack", kinds[kind], **chosen, bounds=bounds)
    return made


def _check_columns(option: str, preprocessor: Preprocessor, cells: Array) -> None:
    """Refuse words, dates, missing cells and pieces: their inputs do not move by themselves."""
    names, sources = preprocessor.feature_names, preprocessor.sources
    gaps: Any = preprocessor.missing_inputs if any(preprocessor.missing_inputs) else np.isnan(cells).any(axis=0)
    unfit: dict[str, Iterable[bool]] = {
        "words": [words is not None for words in preprocessor.categories],
        "dates": [name != source for name, source in zip(names, sources, strict=True)],
        "missing cells": gaps,
        "pieces of numbers (--scale piecewise)": [preprocessor.pieces(at) > 1 for at in range(len(names))],
    }
    for what, columns in unfit.items():
        if named := list(dict.fromkeys(repr(name) for name, holds in zip(sources, columns, strict=False) if holds)):
            raise ArgumentError(
                f"{option}: a small change of an input means nothing for {what}, which are inputs of "
                f"{one_of(named[:3], 'and')}{' and others' if len(named) > 3 else ''}; take complete "
                "columns of numbers alone, with --drop in train, and --scale standard, minmax or none"
            )
