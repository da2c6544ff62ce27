"""``fit``: checks its arguments, binds them to the engine and makes the epoch loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.callbacks import ProgressBar, announce, checked_callbacks, exits
from fusemlp.describe.adversarial import Attack
from fusemlp.describe.checks import as_count, as_deadline, as_number, caller_level, check_flag
from fusemlp.describe.intervals import IBP
from fusemlp.describe.metrics import Metric
from fusemlp.inputs.batches import Batches
from fusemlp.runtime.attacking import check_within
from fusemlp.training.adversarial import check_adversarial
from fusemlp.training.agreement import check_alike, parts_of, same_order
from fusemlp.training.assembling import fit_checked
from fusemlp.training.data import by_class, split
from fusemlp.training.history import History
from fusemlp.training.intervals import check_labels
from fusemlp.training.orders import checked_order
from fusemlp.training.private import check_private
from fusemlp.training.streaming import Stream
from fusemlp.training.validation import Validation, as_patience, check_monitor, checked_validation, logged, with_metrics
from fusemlp_kernels.errors import ArgumentError

if TYPE_CHECKING:
    from fusemlp.inputs.targets import Examples
    from fusemlp.training.trainer import Trainer

_TO_ENGINE = "it belongs to the engine: Engine(net, loss=..., optimizer=Adam(lr=0.001), batch_size=32, seed=0)"
_TO_LOADER = "fit starts no workers; give a torch DataLoader, which has num_workers"
# Arguments of fit in Keras, scikit-learn and other libraries.
ELSEWHERE = {
    "x": "it is called X here: fit(X, y, epochs=20)",
    "initial_epoch": "it is not needed: epochs go on from engine.epochs_trained, and epochs= counts further ones; "
    "fit(resume=True) ends a fit that was cut off",
    "validation_freq": "validation follows every epoch; leave it out",
    "validation_batch_size": "validation chooses its batches by itself; leave it out",
    **dict.fromkeys(("workers", "use_multiprocessing", "max_queue_size"), _TO_LOADER),
    **dict.fromkeys(("loss", "optimizer", "seed", "precision", "backend", "device", "plan"), _TO_ENGINE),
    **dict.fromkeys(("lr", "learning_rate"), _TO_ENGINE),
    "random_state": "it is the engine's seed: Engine(net, seed=0)",
    "patience": "it is called early_stopping here: fit(early_stopping=5)",
    "eval_set": "it is called validation_data here: validation_data=(Xv, yv)",
    "weight": "it is called sample_weight here",
    "max_iter": "it is called epochs here",
    "nb_epoch": "it is called epochs here",
}


def fit(
    engine: Trainer,
    X: Any,
    y: Any,
    *,
    epochs: int,
    batch_size: int | None,
    sample_weight: Any,
    class_weight: Any,
    validation_data: Any,
    validation_split: float,
    validation_steps: int | None,
    steps_per_epoch: int | None,
    metrics: Iterable[str | Metric] | None,
    early_stopping: int | None,
    monitor: str | None,
    callbacks: Iterable[Any] | None,
    verbose: int,
    shuffle: bool,
    drop_last: bool,
    row_order: Callable[[int], Any] | None,
    resume: bool,
    time_limit: float | None,
    adversarial: Attack | IBP | None,
) -> History:
    """Train on checked arguments; see ``Engine.fit``."""
    deadline = as_deadline("time_limit", time_limit)
    epochs = as_count("epochs", epochs, minimum=1)
    for argument, flag in (("shuffle", shuffle), ("drop_last", drop_last), ("resume", resume)):
        check_flag(argument, flag)
    size = engine.batch_size if batch_size is None else as_count("batch_size", batch_size)
    if resume and size != engine.batch_size:
        raise ArgumentError(
            f"batch_size: the fit that is resumed has batches of {engine.batch_size} rows, got {size}; leave it out"
        )
    share = as_number("validation_split", validation_split, low=0.0, high=1.0, high_open=True)
    if share and validation_data is not None:
        raise ArgumentError("validation_split: validation_data has the validation rows already; give one of the two")
    if verbose not in (0, 1, 2):
        raise ArgumentError(f"verbose: expected 0 (silent), 1 (a bar) or 2 (a line an epoch), got {verbose!r}")
    given = checked_callbacks(() if callbacks is None else callbacks)
    if engine.privacy is not None:
        check_private(
            engine.optimizer.schedule,
            {"y": y is None, "shuffle": not shuffle, "row_order": row_order, "drop_last": drop_last},
            class_weight,
            validates=bool(share) or validation_data is not None,
            stops=early_stopping is not None,
            monitors=[monitor, *_monitors(given)],
        )
    if adversarial is not None:
        check_adversarial(engine, adversarial, batches=y is None)
    state = engine.fit_state
    first_epoch = state.epoch if resume and state is not None else engine.epochs_trained
    batches, parts = None, parts_of(engine, X, steps_per_epoch, first_epoch) if y is None else None
    if y is None:
        arrays = {"sample_weight": sample_weight, "validation_split": share or None, "batch_size": batch_size}
        _refuse_with_batches({**arrays, "row_order": row_order, "drop_last": drop_last or None})
        batches = Batches("X", X, steps_per_epoch, "steps_per_epoch", first_epoch, parts)
        engine.scaling.check_measured()
        data = batches.next(engine.inputs, keep=True)
    else:
        if steps_per_epoch is not None:
            raise ArgumentError(
                "steps_per_epoch: an epoch goes through all rows of X, in batches of batch_size; it is for batches, "
                f"fit(batches, steps_per_epoch=...), got {steps_per_epoch!r}"
            )
        data = engine.inputs.examples(X, y, sample_weight)
        if adversarial is not None:
            check_within(engine, "X", data.X, adversarial)
    validation = checked_validation(engine, validation_data, steps=validation_steps)
    if share:
        data, held = split(engine, data, share)
        validation = Validation(held)
    if isinstance(adversarial, IBP):
        check_labels(data.targets)
    weighted = by_class(engine, class_weight, data, whole=batches is None)
    if batches is None:
        data = weighted(data)
    count = len(data.X)
    listeners = [*given, *(checked_callbacks(ProgressBar(lines=verbose == 2)) if verbose else ())]
    instead = "validation_split=0.2"
    monitors = [monitor, *_monitors(listeners)]
    validation = with_metrics(engine, data.targets, validation, metrics or (), monitors, instead)
    patience = as_patience(early_stopping, validation or monitor, instead)
    names = logged(engine, data.targets, validation)
    check_monitor(monitor, names)
    announce(listeners, names, epochs)
    if drop_last and count < size:
        raise ArgumentError(f"drop_last: {count} rows do not fill one batch of {size}; nothing would be trained")
    order = checked_order(count, shuffle, row_order, first_epoch) if batches is None else lambda epoch: np.arange(0)
    if engine.ranks is not None:
        told = {
            "epochs": epochs,
            "batch_size": size,
            "early_stopping": patience,
            "monitor": monitor,
            "resume": resume,
            "metrics": [] if validation is None else [one.name for one in validation.metrics],
            "drop_last": drop_last,
            "shuffle": shuffle,
            "steps_per_epoch": None if batches is None else batches.steps,
        }
        check_alike(engine, engine.ranks, data, validation, told, whole=parts is None)
        if row_order is not None and order is not None:
            order = partial(same_order, engine.ranks, order)
    engine.take_batches_of(size)
    loop = fit_checked(
        engine,
        data,
        epochs=epochs,
        validation=validation,
        patience=patience,
        monitor=monitor,
        drop_last=drop_last,
        # a function of the user's is asked when its epoch comes
        at_once=None if row_order is None and batches is None else 1,
        # ranks have read the rows of their shards of a whole batch, and the first may be short
        bound=None
        if batches is None
        else Stream(engine, batches, data, weighted, count if parts is None else X.batch_rows),
        batches=None if batches is None else batches.steps,
        callbacks=listeners,
        order=order,
        resume=resume,
        deadline=deadline,
        against=adversarial,
    )
    if batches is None:
        engine.programs.let_go_with((X, y, sample_weight))
    own = data.X if parts is None else data.X[parts[1](np.arange(count)) == parts[0].rank]
    _warn(engine, data._replace(X=own), epochs * loop.batches, streamed=batches is not None)
    with exits(listeners, engine):
        return loop.run()


def _monitors(callbacks: Iterable[Any]) -> list[Any]:
    """Return the quantities that callbacks follow; None for one that follows none."""
    return [getattr(getattr(one, "listener", None), "monitor", None) for one in callbacks]


def _refuse_with_batches(given: Mapping[str, Any]) -> None:
    mends = {
        "sample_weight": "let them be (x, y, sample_weight)",
        "validation_split": "give validation_data",
        "batch_size": "it is that of the batches; set it where they are made",
        "row_order": "they come in their own order",
        "drop_last": "leave the last one out where they are made",
    }
    for name, value in given.items():
        if value is not None:
            raise ArgumentError(f"{name}: it is for arrays X and y, and without y X yields batches; {mends[name]}")


def _warn(engine: Trainer, data: Examples, batches: int, *, streamed: bool) -> None:
    rows, accumulate, labels = len(data.X), engine.optimizer.accumulate, data.targets.values
    found = []
    if accumulate > batches:
        found.append(
            f"accumulate: an update takes {accumulate} batches and this fit has only {batches}: it may end without "
            "one; train for more epochs or lower accumulate"
        )
    if engine.batch_size > rows and not streamed:
        found.append(f"batch_size: {engine.batch_size} is more than the {rows} rows of X; batches of {rows} are used")
    if engine.loss.kind == "cross_entropy" and not data.targets.soft and rows > 1 and not streamed:
        least, greatest = engine.inputs.extent(labels)
        if least == greatest:
            found.append(f"y: every label is {least:.0f}; a classifier needs examples of two classes")
    for message in found:
        warnings.warn(message, stacklevel=caller_level())
    if rows:
        engine.scaling.warn("X", data.X)
