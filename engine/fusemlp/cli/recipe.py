"""Turn options into descriptions of network, loss and optimizer, checked against the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, TypeVar

from fusemlp.cli.commands import TrainOptions
from fusemlp.cli.defaults import is_private
from fusemlp.cli.fields import one_of
from fusemlp.cli.options import FitOptions, ModelOptions, StepOptions
from fusemlp.describe.checks import as_count, as_number, check_choice
from fusemlp.describe.losses import LOSSES, Loss, as_loss
from fusemlp.describe.network import MLP, SLOPES, Activation, as_activation
from fusemlp.describe.optimizers import OPTIMIZERS, Optimizer
from fusemlp.describe.privacy import DPSGD, steps_of_an_epoch
from fusemlp.describe.schedules import SCHEDULES, Schedule
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.class_weights import balanced
from fusemlp_kernels.errors import ArgumentError

Described = TypeVar("Described")

DEFAULT_WIDTH = 128
# The options of each kind of description, with the names that fields and errors have there.
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
}


def _chosen(options: ModelOptions, what: str, kind: str, known: Mapping[str, type]) -> dict[str, Any]:
    """Return the given options as fields of the description ``known[kind]``; refuse one that only others have."""
    check_choice(what, kind, known)
    chosen = {}
    for name, spellings in _FIELDS[what].items():
        value = getattr(options, name)
        if value is None or value is False:
            continue
        owners = {owner: field.name for owner, cls in known.items() for field in fields(cls) if field.name in spellings}
        if kind not in owners:
            have = "has" if len(owners) == 1 else "have"
            raise ArgumentError(f"{name}: only {one_of(owners, 'and')} {have} it, and the {what} is {kind}")
        chosen[owners[kind]] = value
    return chosen


def _made(what: str, described: Callable[..., Described], *rate: float | Schedule, **given: Any) -> Described:
    """Return a description; its errors name the option in place of the field."""
    try:
        return described(*rate, **given)
    except ArgumentError as error:
        field, _, rest = str(error).partition(": ")
        option = next((name for name, spellings in _FIELDS[what].items() if field in spellings), field)
        raise ArgumentError(f"{option}: {rest}") from None


def engine_options(options: ModelOptions) -> dict[str, Any]:
    """Return the arguments of an engine or a fleet that say how and where it computes."""
    names = ("batch_size", "seed", "backend", "device", "precision", "plan")
    # the preprocessor scales the inputs
    return {**{name: getattr(options, name) for name in names}, "normalise": False}


def hidden_widths(given: Sequence[str] | None) -> tuple[int, ...]:
    """Return the widths of the hidden layers; ``--hidden 128,64`` equals ``--hidden 128 --hidden 64``."""
    if given is None:
        return (DEFAULT_WIDTH,)
    words = [word.strip() for part in given for word in part.split(",")]
    if words == ["none"]:
        return ()
    if not all(word.lstrip("+-").isdecimal() for word in words):
        raise ArgumentError(f"hidden: expected whole numbers such as 128,64, or none, got {','.join(given)!r}")
    return tuple(as_count("hidden", int(word)) for word in words)


def _numbers(argument: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ArgumentError(f"{argument}: expected a number, or several as in 0.2,0.5, got {text!r}") from None


def network(sizes: Sequence[int], options: StepOptions, *, init: str = "auto", members: int = 1) -> MLP:
    """Return the network of these widths; ``slope`` of the options applies to the activations that have one."""
    activations = [as_activation("activation", name.strip()) for name in options.activation.split(",")]
    if options.slope is not None:
        if not any(one.name in SLOPES for one in activations):
            raise ArgumentError(
                f"slope: only {one_of(SLOPES, 'and')} have one, and activation is {options.activation!r}"
            )
        activations = [Activation(one.name, options.slope) if one.name in SLOPES else one for one in activations]
    dropouts = _numbers("dropout", options.dropout)
    return MLP(
        sizes,
        activation=activations if len(activations) > 1 else activations[0],
        output_activation=options.output_activation,
        dropout=dropouts if len(dropouts) > 1 else dropouts[0],
        init=init,
        members=members,
    )


def loss_name(options: ModelOptions, task: str, classes: int) -> str:
    """Return the given loss, or the task's default; an error for a wrong loss names the right ones.

    ``classes`` is 0 for a regression.
    """
    classify = task == "classification"
    name = options.loss or ("cross_entropy" if classify else "mse")
    if as_loss(name).is_classification and not classify:
        raise ArgumentError(
            f"loss: {name!r} is for classes, and this is a regression; use mse, mae, huber, quantile or poisson, or "
            "say --task classification"
        )
    if name in ("poisson", "quantile") and classify:
        raise ArgumentError(
            f"loss: {name!r} is for numbers, and the target holds classes; use cross_entropy, or say --task regression"
        )
    if name == "binary_cross_entropy" and classes != 2:
        raise ArgumentError(f"loss: {name!r} is for two classes, and the target has {classes}; use cross_entropy")
    if options.class_weight is not None and not classify:
        raise ArgumentError("class_weight: only classes have weights, and this is a regression")
    return name


def class_weights(given: str | None, codes: Array, classes: int) -> list[float] | None:
    """Return a weight for each class: as given, or balanced: rows / (present classes * rows of the class)."""
    if given is None:
        return None
    if given != "balanced":
        weights = [as_number("class_weight", number, low=0.0) for number in _numbers("class_weight", given)]
        if len(weights) != classes:
            raise ArgumentError(
                f"class_weight: expected balanced, or {classes} numbers, one for each class, got {given!r}"
            )
        return weights
    return balanced(codes, classes)


def loss(options: ModelOptions, name: str, weights: list[float] | None) -> Loss:
    """Return the loss ``name``; cross_entropy takes class weights, other losses get weights of the rows instead."""
    given = _chosen(options, "loss", name, LOSSES)
    if name == "cross_entropy":
        given["class_weight"] = weights
    return _made("loss", LOSSES[name], **given)


def optimizer(options: ModelOptions, schedule: Schedule | None = None) -> Optimizer:
    """Return the optimizer with ``schedule`` (None: the constant rate of the options)."""
    given = _chosen(options, "optimizer", options.optimizer, OPTIMIZERS)
    described = OPTIMIZERS[options.optimizer]
    if "betas" in given:
        usual: Any = described()
        asked = zip((options.beta1, options.beta2), usual.betas, strict=True)
        given["betas"] = tuple(default if one is None else one for one, default in asked)
    given |= {name: getattr(options, name) for name in ("clip_norm", "ema", "accumulate", "decay_biases")}
    rate = learning_rate(options) if schedule is None else schedule
    return _made("optimizer", described, rate, **given)


def learning_rate(options: ModelOptions) -> float:
    """Return the given rate, or the optimizer's default."""
    if options.lr is not None:
        return as_number("lr", options.lr, low=0.0, low_open=True)
    usual: Any = OPTIMIZERS[check_choice("optimizer", options.optimizer, OPTIMIZERS)]()
    return float(usual.lr)


def schedule(options: FitOptions, *, rows: int, epochs: int) -> Schedule:
    """Return the schedule, with lengths converted from epochs into updates for ``rows`` training rows.

    It fixes the length of a schedule that has one, so a run keeps its rates when its epochs are raised later.
    """
    kind, rate = options.schedule, learning_rate(options)
    given = _chosen(options, "schedule", kind, SCHEDULES)
    described = SCHEDULES[kind]
    batch_size = min(as_count("batch_size", options.batch_size), rows)
    batches = rows // batch_size if options.drop_last else -(-rows // batch_size)
    if is_private(options):
        batches = steps_of_an_epoch(rows, batch_size)
    each = batches / as_count("accumulate", options.accumulate)
    given["warmup"] = round(as_number("warmup", options.warmup, low=0.0) * each)
    if "steps" in {field.name for field in fields(described)}:
        given["steps"] = max(1, int(epochs * each) - given["warmup"])
    if kind == "step":
        if options.lr_step is None:
            raise ArgumentError("lr_step: the schedule step needs it: --lr-step 10 for a reduction every ten epochs")
        length = as_number("lr_step", options.lr_step, low=0.0, low_open=True)
        given["every"] = max(1, round(length * each))
    if kind == "exponential":
        if options.lr_gamma is None:
            raise ArgumentError("lr_gamma: the schedule exponential needs it: --lr-gamma 0.95 for 5 % less each epoch")
        given["gamma"] = as_number("lr_gamma", options.lr_gamma, low=0.0, low_open=True) ** (1.0 / each)
    return _made("schedule", described, rate, **given)


def check_single(options: TrainOptions, kind: str) -> None:
    """Raise ArgumentError for what a ``kind`` training, which makes one model of the training rows, cannot do."""
    for name, given in (("models", (options.models or 1) > 1), ("final_fit", options.final_fit)):
        if given:
            raise ArgumentError(f"{name}: {kind} training makes one model of the training rows; leave it out")


def privacy(options: TrainOptions, *, rows: int, epochs: int) -> DPSGD | None:
    """Return the privacy that spends ``--dp-epsilon`` on this many training rows and epochs; None without it."""
    if not is_private(options):
        for name in ("dp_delta", "dp_clip"):
            if getattr(options, name) is not None:
                raise ArgumentError(
                    f"{name}: it is for private training; give --dp-epsilon too, such as --dp-epsilon 3"
                )
        return None
    check_single(options, "private")
    if options.drop_last:
        raise ArgumentError("drop_last: the batches of private training have no common length; leave it out")
    if options.class_weight == "balanced":
        raise ArgumentError("class_weight: balanced counts the private rows; give a number for each class")
    validates = options.validation_fraction != 0 or options.validation is not None
    if options.metric in ("loss", "accuracy") or (options.schedule == "reduce_on_plateau" and not validates):
        raise ArgumentError(
            f"metric: {options.metric or 'loss'} is of the private rows; choose one of validation rows: val_loss"
        )
    chosen = {name: getattr(options, f"dp_{name}") for name in ("epsilon", "delta", "clip")}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    return _made(
        "privacy", DPSGD.for_epsilon, rows=rows, batch_size=min(options.batch_size, rows), epochs=epochs, **chosen
    )
