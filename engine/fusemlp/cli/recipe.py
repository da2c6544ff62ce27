"""Turn options into descriptions of network, loss and optimizer, checked against the data."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from fusemlp.cli.options import FitOptions, ModelOptions
from fusemlp.describe.checks import as_count, as_number
from fusemlp.describe.losses import LOSSES, Loss, as_loss
from fusemlp.describe.network import MLP, Activation, as_activation
from fusemlp.describe.optimizers import OPTIMIZERS, Optimizer
from fusemlp.describe.schedules import (
    SCHEDULES,
    Constant,
    Cosine,
    Exponential,
    OneCycle,
    ReduceOnPlateau,
    Schedule,
    StepDecay,
)
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, unknown_name

DEFAULT_WIDTH = 128
# Losses that train classes as one-hot rows.
ONE_HOT = frozenset({"mse", "mae", "huber"})
# Options that a description calls otherwise; two options make one field of the optimizer.
_FIELDS = {"quantile": "q", "beta1": "betas", "beta2": "betas"}
_LOSS_OPTIONS = ("label_smoothing", "delta", "quantile")
_OPTIMIZER_OPTIONS = ("momentum", "nesterov", "weight_decay", "beta1", "beta2", "eps")
_ONLY_FOR_SCHEDULE = {
    "lr_step": ("step",),
    "lr_gamma": ("step", "exponential", "reduce_on_plateau"),
    "lr_final": ("cosine", "one_cycle", "reduce_on_plateau"),
    "lr_patience": ("reduce_on_plateau",),
}


def _chosen(
    options: ModelOptions, names: Sequence[str], what: str, kind: str, known: Mapping[str, type]
) -> dict[str, Any]:
    """Return the given options among ``names``; refuse one without a field in the description ``known[kind]``."""
    values = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None and value is not False}
    for name in given:
        field = _FIELDS.get(name, name)
        owners = [owner for owner, cls in known.items() if field in _names(cls)]
        if kind not in owners:
            have = "has" if len(owners) == 1 else "have"
            raise ArgumentError(f"{name}: only {' and '.join(owners)} {have} it, and the {what} is {kind}")
    return {_FIELDS.get(name, name): value for name, value in given.items()}


def _names(description: type) -> set[str]:
    return {field.name for field in fields(description)}


def hidden_widths(given: Sequence[str] | None) -> tuple[int, ...]:
    """Return the widths of the hidden layers; ``--hidden 128,64`` equals ``--hidden 128 --hidden 64``."""
    if given is None:
        return (DEFAULT_WIDTH,)
    words = [word.strip() for part in given for word in part.split(",")]
    if words == ["none"]:
        return ()
    widths = []
    for word in words:
        if not word.lstrip("+-").isdecimal():
            raise ArgumentError(f"hidden: expected whole numbers such as 128,64, or none, got {','.join(given)!r}")
        widths.append(as_count("hidden", int(word), minimum=1))
    return tuple(widths)


def _numbers(argument: str, text: str) -> list[float]:
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ArgumentError(f"{argument}: expected a number, or several as in 0.2,0.5, got {text!r}") from None


def _one_or_more(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def activations(names: str, slope: float | None) -> Activation | list[Activation]:
    """Return one activation, or one a hidden layer; ``slope`` applies to leaky_relu and prelu."""
    chosen = [as_activation("activation", name.strip()) for name in names.split(",")]
    if slope is not None:
        if not any(one.slope for one in chosen):
            raise ArgumentError(f"slope: only leaky_relu and prelu have one, and activation is {names!r}")
        chosen = [Activation(one.name, slope) if one.slope else one for one in chosen]
    result: Activation | list[Activation] = _one_or_more(chosen)
    return result


def network(
    sizes: Sequence[int],
    *,
    activation: str,
    output_activation: str,
    dropout: str,
    slope: float | None = None,
    init: str = "auto",
) -> MLP:
    """Return the network of these widths; the other arguments are the command line's."""
    return MLP(
        sizes,
        activation=activations(activation, slope),
        output_activation=output_activation,
        dropout=_one_or_more(_numbers("dropout", dropout)),
        init=init,
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
    _chosen(options, _LOSS_OPTIONS, "loss", name, LOSSES)
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
    counts = np.bincount(codes, minlength=classes)
    present = int(np.count_nonzero(counts))
    return [len(codes) / (present * int(count)) if count else 0.0 for count in counts]


def loss(options: ModelOptions, name: str, weights: list[float] | None) -> Loss:
    """Return the loss ``name``; cross_entropy takes class weights, other losses get weights of the rows instead."""
    given = _chosen(options, _LOSS_OPTIONS, "loss", name, LOSSES)
    if name == "cross_entropy":
        given["class_weight"] = weights
    return LOSSES[name](**given)


def optimizer(options: ModelOptions, schedule: Schedule | None = None) -> Optimizer:
    """Return the optimizer with ``schedule`` (None: the constant rate of the options)."""
    name = options.optimizer
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    given = _chosen(options, _OPTIMIZER_OPTIONS, "optimizer", name, OPTIMIZERS)
    if "betas" in given:
        usual = _default(OPTIMIZERS[name], "betas")
        asked = (options.beta1, options.beta2)
        given["betas"] = tuple(default if one is None else one for one, default in zip(asked, usual, strict=True))
    given |= {"clip_norm": options.clip_norm, "accumulate": options.accumulate, "decay_biases": options.decay_biases}
    return OPTIMIZERS[name](learning_rate(options) if schedule is None else schedule, **given)


def _default(description: type, argument: str) -> Any:
    return inspect.signature(description).parameters[argument].default


def learning_rate(options: ModelOptions) -> float:
    """Return the given rate, or the optimizer's default."""
    if options.lr is not None:
        return as_number("lr", options.lr, low=0.0)
    if options.optimizer not in OPTIMIZERS:
        raise unknown_name("optimizer", options.optimizer, OPTIMIZERS)
    return float(_default(OPTIMIZERS[options.optimizer], "lr"))


def schedule(options: FitOptions, *, rows: int, epochs: int) -> Schedule:
    """Return the schedule, with lengths converted from epochs into updates for ``rows`` training rows.

    It fixes the length of cosine and one_cycle, so a run keeps its rates when its epochs are raised later.
    """
    kind, rate = options.schedule, learning_rate(options)
    if kind not in SCHEDULES:
        raise unknown_name("schedule", kind, SCHEDULES)
    for option, owners in _ONLY_FOR_SCHEDULE.items():
        if getattr(options, option) is not None and kind not in owners:
            raise ArgumentError(f"{option}: only for the schedules {', '.join(owners)}, and this one is {kind}")
    batch_size = min(as_count("batch_size", options.batch_size), rows)
    batches = rows // batch_size if options.drop_last else -(-rows // batch_size)
    each = batches / as_count("accumulate", options.accumulate)
    warmup = round(as_number("warmup", options.warmup, low=0.0) * each)
    behind = max(1, int(epochs * each) - warmup)
    gamma = 0.1 if options.lr_gamma is None else as_number("lr_gamma", options.lr_gamma, low=0.0, low_open=True)
    if kind == "step":
        if options.lr_step is None:
            raise ArgumentError("lr_step: the schedule step needs it: --lr-step 10 for a reduction every ten epochs")
        length = as_number("lr_step", options.lr_step, low=0.0, low_open=True)
        return StepDecay(rate, every=max(1, round(length * each)), gamma=gamma, warmup=warmup)
    if kind == "exponential":
        if options.lr_gamma is None:
            raise ArgumentError("lr_gamma: the schedule exponential needs it: --lr-gamma 0.95 for 5 % less each epoch")
        return Exponential(rate, gamma=gamma ** (1.0 / each), warmup=warmup)
    final = None if options.lr_final is None else as_number("lr_final", options.lr_final, low=0.0)
    if kind == "cosine":
        return Cosine(rate, final=final or 0.0, steps=behind, warmup=warmup)
    if kind == "one_cycle":
        return OneCycle(rate, final=final, steps=behind, warmup=warmup)
    if kind == "reduce_on_plateau":
        if final is not None and final > rate:
            raise ArgumentError(f"lr_final: expected at most the learning rate {rate!r}, got {final!r}")
        if gamma >= 1.0:
            raise ArgumentError(f"lr_gamma: expected a number above 0 and below 1 on a plateau, got {gamma!r}")
        patience = 10 if options.lr_patience is None else as_count("lr_patience", options.lr_patience)
        return ReduceOnPlateau(rate, factor=gamma, patience=patience, min_lr=final or 0.0, warmup=warmup)
    return Constant(rate, warmup=warmup)
