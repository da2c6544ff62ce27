"""``fit``: checks its arguments, binds them to the engine and makes the epoch loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.callbacks import announce, checked_callbacks, exits
from fusemlp.describe.checks import as_count, check_choice, check_flag
from fusemlp.describe.metrics import METRICS, Metric, as_metrics
from fusemlp.inputs.arrays import Array, to_array
from fusemlp.program.lowering import Inputs
from fusemlp.runtime.backends import row_order as shuffled
from fusemlp.runtime.memory import on_device
from fusemlp.runtime.normalising import InputScaleWarning
from fusemlp.training.history import History, fresh_state, resumed_state
from fusemlp.training.loop import EpochLoop, Steps, epochs_at_once
from fusemlp.training.policy import FitPolicy
from fusemlp.training.validation import Validation
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from fusemlp.inputs.targets import Examples, Targets
    from fusemlp.runtime.session import Session


def fit(
    engine: Session,
    X: Any,
    y: Any,
    *,
    epochs: int,
    sample_weight: Any = None,
    validation_data: tuple[Any, ...] | None = None,
    metrics: Iterable[str | Metric] = (),
    early_stopping: int | None = None,
    monitor: str | None = None,
    callbacks: Iterable[Any] = (),
    shuffle: bool = True,
    drop_last: bool = False,
    row_order: Callable[[int], Any] | None = None,
    resume: bool = False,
) -> History:
    """Train ``engine`` on X (n, K) and y for ``epochs`` passes.

    y: (n,) class indices or (n, N) probabilities for cross_entropy, (n, N) from 0 to 1 for binary_cross_entropy,
    (n, N) values for the others; (n,) stands for (n, 1). sample_weight: (n,), at least 0. Arrays may be in host memory
    or on the engine's device (torch tensors, CuPy arrays, all with ``__dlpack__`` or ``__cuda_array_interface__``).
    The kernels read device arrays in place, or copy them once if their type or strides do not suit. An engine with
    ``normalise=True`` measures the X of its first fit, and trains on a scaled copy.

    validation_data: (Xv, yv) or (Xv, yv, weights), evaluated after each epoch, also by ``metrics``: of classes "auc",
    "f1", "balanced_accuracy", "log_loss", of numbers "mae", "rmse", "r2", "pinball"; the history has them as "val_auc".
    early_stopping: after this many epochs without a better ``monitor`` (val_loss), stop and restore the best weights.
    monitor: the quantity of the history that early stopping, best epoch and ReduceOnPlateau follow, such as "val_auc".
    callbacks: objects like ``Callback``, or like Keras's (``fusemlp.callbacks``); metrics that they or ``monitor``
    name need not be in ``metrics``.

    The order of the rows is a function of seed and epoch. ``shuffle=False`` keeps the rows as they are; ``row_order``
    is a function from the epoch to a permutation of range(n). A last short batch is trained on unless ``drop_last``.
    ``resume=True`` goes on with the call that a checkpoint was written in, given the same data; ``epochs`` counts from
    the beginning of that call.

    Ctrl-C ends training after the batch and raises KeyboardInterrupt; the parameters and the history are kept. Raises
    ShapeError, DTypeError, DataError, ArgumentError before anything has changed, and DivergenceError when the loss is
    no longer finite, with the engine back at the last good epoch. Warns (InputScaleWarning) of X far from unit scale.
    """
    epochs = as_count("epochs", epochs, minimum=1)
    for argument, flag in (("shuffle", shuffle), ("drop_last", drop_last), ("resume", resume)):
        check_flag(argument, flag)
    data = engine.examples(X, y, sample_weight)
    count = len(data.X)
    listeners = checked_callbacks(callbacks)
    validation = checked_validation(engine, validation_data)
    if validation is not None:
        named = [monitor, *(getattr(getattr(one, "listener", None), "monitor", None) for one in listeners)]
        validation = with_metrics(engine, validation, metrics, named)
    elif list(metrics):
        raise ArgumentError(f"metrics: they are of validation rows; give validation_data=(Xv, yv) too, got {metrics!r}")
    patience = None if early_stopping is None else as_count("early_stopping", early_stopping, minimum=1)
    if patience is not None and validation is None and monitor is None:
        raise ArgumentError("early_stopping: it watches val_loss, so validation_data=(Xv, yv) is needed too")
    names = logged(engine, data.targets, validation)
    check_monitor(monitor, names)
    announce(listeners, names, epochs)
    if drop_last and count < engine.batch_size:
        raise ArgumentError(
            f"drop_last: {count} rows do not fill one batch of {engine.batch_size}; nothing would be trained"
        )
    state = engine.fit_state
    first_epoch = state.epoch if resume and state is not None else engine.epochs_trained
    loop = fit_checked(
        engine,
        data,
        epochs=epochs,
        validation=validation,
        patience=patience,
        monitor=monitor,
        drop_last=drop_last,
        # a function of the user's is asked when its epoch comes
        at_once=None if row_order is None else 1,
        callbacks=listeners,
        order=_order(count, shuffle, row_order, first_epoch),
        resume=resume,
    )
    _warn(engine, data, epochs * loop.batches)
    with exits(listeners, engine):
        return loop.run()


def logged(engine: Session, targets: Targets, validation: Validation | None) -> list[str]:
    """Return the names of an epoch's logs, in their order."""
    names = ["loss", *(["accuracy"] if engine.counts_hits(targets) else [])]
    if validation is not None:
        names += ["val_loss", *(["val_accuracy"] if engine.counts_hits(validation.data.targets) else [])]
        names += [f"val_{metric.name}" for metric in validation.metrics]
    return [*names, "learning_rate"]


def fit_checked(
    engine: Session,
    data: Examples,
    *,
    epochs: int,
    validation: Validation | None,
    patience: int | None,
    monitor: str | None = None,
    rows: Array | None = None,
    drop_last: bool = False,
    bound: Steps | None = None,
    at_once: int | None = None,
    callbacks: Sequence[Any] = (),
    order: Callable[[int], Array] | None = None,
    resume: bool = False,
    taken_in: Any | None = None,
) -> EpochLoop[FitPolicy]:
    """Return the loop of a ``fit`` of checked arrays, on ``rows`` (m,) int64 of them if given.

    ``taken_in``: X as the network takes it, if the caller has it.
    ``bound`` has room for the rows of ``at_once`` epochs; the caller runs its steps. ``order`` is a function from the
    epoch to the rows; by default their order depends on the seed.
    """
    count = len(data.X) if rows is None else len(rows)
    batch_size = min(engine.batch_size, count)
    batches = count // batch_size if drop_last else -(-count // batch_size)
    state = resumed_state(engine, epochs, batches, count) if resume else fresh_state(engine, epochs, batches)
    if not resume:
        state.monitor = monitor or ""
    elif state.monitor != (monitor or ""):
        raise ArgumentError(
            f"monitor: the fit that is resumed follows {state.monitor or None!r}, got {monitor!r}; give the same"
        )

    def by_seed(epoch: int) -> Array:
        shuffled_rows = shuffled(engine.backend, engine.plan, count, engine.seed, epoch)
        return shuffled_rows if rows is None else rows[shuffled_rows]

    data = data._replace(X=engine.take_in(data.X) if taken_in is None else taken_in)
    policy = FitPolicy(
        engine,
        data.X,
        state,
        engine.spec_for(data.targets),
        by_seed if order is None else order,
        last_epoch=(state.history.epochs[0] if state.history.epochs else state.epoch) + epochs,
        validation=validation,
        patience=patience,
        resumes=resume,
    )
    resident = engine.plan == "resident"
    if at_once is None:
        at_once = epochs_at_once(engine, epochs, count, asked=validation is not None or bool(callbacks) or not resident)
    if bound is None:
        backend = engine.memory.backend
        given = on_device(backend, data.arrays)
        given["rows"] = backend.allocate(at_once * batches * batch_size, "int64")
        bound = engine.bind(
            Inputs(len(data.X), indexed=True, weighted=data.weight is not None),
            policy.spec,
            policy.rule,
            batch_size,
            given,
            resident_batches=batches if resident else None,
            epochs=at_once,
        )
    return EpochLoop(engine, bound, policy, state, batch_size, batches, at_once, callbacks)


def checked_validation(engine: Session, given: Any, *, common: bool = False) -> Validation | None:
    """Check ``validation_data`` as ``fit`` takes it; ``common``: several models share it."""
    if given is None:
        return None
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        raise ArgumentTypeError(f"validation_data: expected (X, y) or (X, y, sample_weight), got {_described(given)}")
    weight = given[2] if len(given) == 3 else None
    names = ("validation_data[0]", "validation_data[1]", "validation_data[2]")
    data = engine.examples(given[0], given[1], weight, names)
    # the loss refuses here, not at the end of the first epoch
    engine.loss.spec(accuracy=False, soft=data.targets.soft)
    return Validation(data, common)


def check_monitor(monitor: str | None, names: Sequence[str]) -> None:
    """Raise ArgumentError unless a fit that logs ``names`` can follow ``monitor``."""
    if isinstance(monitor, str) and monitor.startswith("val_") and "val_loss" not in names:
        raise ArgumentError(f"monitor: {monitor!r} is of validation rows; give validation_data=(Xv, yv) too")
    if monitor is not None:
        check_choice("monitor", monitor, names)


def with_metrics(
    engine: Session, validation: Validation, metrics: Iterable[str | Metric], monitors: Iterable[Any]
) -> Validation:
    """Return the validation with these metrics and those that ``monitors``, such as "val_auc", name."""
    known = {f"val_{name}": name for name in METRICS}
    named = [known[one] for one in monitors if isinstance(one, str) and one in known]
    if not named and not metrics:
        return validation
    kind = engine.kind_of(validation.data.targets)
    both = (*as_metrics("metrics", named, kind), *as_metrics("metrics", metrics, kind))
    found = replace(validation, metrics=tuple({one.name: one for one in both}.values()))
    data = found.data
    if engine.normalise and engine.input_scale is None:
        # nothing is measured yet; the targets decide, and predictions of raw inputs might overflow
        data = data._replace(X=data.X * 0)
    for name, value in engine.figures(data, found.metrics).items():
        if math.isnan(value):
            raise ArgumentError(
                f"metrics: {name} is not defined on these {len(found.data.X)} validation rows: it needs rows of two "
                "classes, or two rows of numbers; give more rows, or another metric"
            )
    return found


def _described(given: Any) -> str:
    kind = type(given).__name__
    return f"{len(given)} in a {kind}" if isinstance(given, tuple | list) else kind


def _order(n: int, shuffle: bool, given: Any, first_epoch: int) -> Callable[[int], Array] | None:
    if given is None:
        identity = np.arange(n)
        return None if shuffle else lambda epoch: identity
    if not callable(given):
        raise ArgumentTypeError(
            f"row_order: expected a function from the epoch to the order of the rows, got {type(given).__name__}; "
            "for one fixed order give lambda epoch: rows"
        )

    def checked(epoch: int) -> Array:
        rows = to_array(f"row_order({epoch})", given(epoch))
        if rows.shape != (n,) or rows.dtype.kind not in "iu" or not np.array_equal(np.sort(rows), np.arange(n)):
            raise ArgumentError(
                f"row_order: expected a permutation of range({n}) for epoch {epoch}, got "
                f"{np.array2string(rows, threshold=8)}"
            )
        return rows

    # the first is checked before anything has changed, and asked for only once
    ahead = {first_epoch: checked(first_epoch)}
    return lambda epoch: ahead.pop(epoch) if epoch in ahead else checked(epoch)


def _warn(engine: Session, data: Examples, batches: int) -> None:
    rows, accumulate, labels = len(data.X), engine.optimizer.accumulate, data.targets.values
    found = []
    if accumulate > batches:
        found.append(
            f"accumulate: an update takes {accumulate} batches and this fit has only {batches}: it may end without "
            "one; train for more epochs or lower accumulate"
        )
    if engine.batch_size > rows:
        found.append(f"batch_size: {engine.batch_size} is more than the {rows} rows of X; batches of {rows} are used")
    if engine.loss.kind == "cross_entropy" and not data.targets.soft and rows > 1:
        labels = engine.on_host(labels)
        if np.all(labels == labels[0]):
            found.append(f"y: every label is {labels[0]}; a classifier needs examples of two classes")
    for message in found:
        warnings.warn(message, stacklevel=3)
    complaint = engine.scale_complaint("X", data.X)
    if complaint is not None:
        warnings.warn(complaint, InputScaleWarning, stacklevel=3)
