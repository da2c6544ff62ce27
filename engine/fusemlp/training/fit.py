"""``fit``: checks its arguments, binds them to the engine and makes the epoch loop."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.callbacks import ProgressBar, announce, checked_callbacks, exits
from fusemlp.describe.adversarial import Attack
from fusemlp.describe.checks import as_count, as_deadline, as_number, check_choice, check_flag
from fusemlp.describe.elsewhere import knows_names
from fusemlp.describe.hardening import Free, Hardening
from fusemlp.describe.intervals import IBP
from fusemlp.describe.metrics import METRICS, Metric, as_metrics
from fusemlp.describe.privacy import sampling_rate, steps_of_an_epoch
from fusemlp.inputs.arrays import Array, to_array
from fusemlp.inputs.batches import Batches, are_batches
from fusemlp.inputs.blocks import Blocks
from fusemlp.program.adversarial import lowered
from fusemlp.program.step import Inputs
from fusemlp.runtime.attacking import check_within
from fusemlp.runtime.backends import row_order as shuffled
from fusemlp.training.adversarial import check_adversarial
from fusemlp.training.data import by_class, split
from fusemlp.training.history import History, fresh_state, resumed_state
from fusemlp.training.intervals import check_labels, write_limits
from fusemlp.training.loop import EpochLoop, Steps, epochs_at_once
from fusemlp.training.policy import FitPolicy
from fusemlp.training.private import PoissonRows, check_private
from fusemlp.training.replays import Replays
from fusemlp.training.streaming import Stream
from fusemlp.training.validation import Validation
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from fusemlp.inputs.targets import Examples, Targets
    from fusemlp.runtime.ranks import Ranks
    from fusemlp.runtime.session import Session

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


@knows_names(ELSEWHERE, call="fit(X, y, epochs=20)")
def fit(
    engine: Session,
    X: Any,
    y: Any = None,
    *,
    epochs: int,
    batch_size: int | None = None,
    sample_weight: Any = None,
    class_weight: Any = None,
    validation_data: Any = None,
    validation_split: float = 0.0,
    validation_steps: int | None = None,
    steps_per_epoch: int | None = None,
    metrics: Iterable[str | Metric] | None = (),
    early_stopping: int | None = None,
    monitor: str | None = None,
    callbacks: Iterable[Any] | None = (),
    verbose: int = 0,
    shuffle: bool = True,
    drop_last: bool = False,
    row_order: Callable[[int], Any] | None = None,
    resume: bool = False,
    time_limit: float | None = None,
    adversarial: Attack | Hardening | IBP | None = None,
) -> History:
    """Train ``engine`` on X (n, K) and y for ``epochs`` passes, or on batches.

    y: (n,) class indices or (n, N) probabilities for cross_entropy, (n, N) from 0 to 1 for binary_cross_entropy,
    (n, N) values for the others; (n,) stands for (n, 1). sample_weight: (n,), at least 0. Arrays may be in host memory
    or on the engine's device (torch tensors, CuPy arrays, all with ``__dlpack__`` or ``__cuda_array_interface__``).
    The kernels read device arrays in place, or copy them once if their type or strides do not suit. An engine with
    ``normalise=True`` measures the X of its first fit, and trains on a scaled copy. On a GPU the engine keeps program,
    graphs and data there for another fit on arrays of the same shapes; ``engine.release()`` gives them back.

    Without y, X yields batches (x, y) or (x, y, sample_weight): a generator, a list, a torch DataLoader, any iterable,
    or ``fusemlp.Blocks`` of files larger than memory.
    An epoch is ``steps_per_epoch`` batches, by default len(X); an iterable that ends begins again. One update takes
    one batch, of any size; ``engine.batch_size`` does not matter.

    batch_size: the rows of an update, from now on (``engine.batch_size`` changes); None: as before.
    class_weight: a mapping from classes to weights (1 for others), one weight for each class, or "balanced". It
    multiplies the weights of the training rows; validation is without it.

    validation_data: (Xv, yv) or (Xv, yv, weights), or batches, of which ``validation_steps`` are collected once;
    evaluated after each epoch, also by ``metrics``: of classes "auc", "f1", "balanced_accuracy", "log_loss", of numbers
    "mae", "rmse", "r2", "pinball"; the history has them as "val_auc". Accuracy is always logged for classes.
    validation_split: the share of the rows, the last ones, to validate on in place of validation_data.
    early_stopping: after this many epochs without a better ``monitor`` (val_loss), stop and restore the best weights.
    monitor: the quantity of the history that early stopping, best epoch and ReduceOnPlateau follow, such as "val_auc".
    callbacks: objects like ``Callback``, or like Keras's (``fusemlp.callbacks``); metrics that they or ``monitor``
    name need not be in ``metrics``. verbose: 1 shows a bar on stderr, 2 a line an epoch, 0 nothing.

    The order of the rows is a function of seed and epoch. ``shuffle=False`` keeps the rows as they are; ``row_order``
    is a function from the epoch to a permutation of range(n). A last short batch is trained on unless ``drop_last``.
    A private engine draws the rows of each step, and logs epsilon; ``fusemlp.DPSGD`` says how.
    ``resume=True`` goes on with the call that a checkpoint was written in, given the same data; ``epochs`` counts from
    the beginning of that call. ``time_limit``: end training, as early stopping does, when this call has taken this many
    seconds; the launch that runs, the first at least, is finished.

    ``adversarial``, ``PGD(eps)`` or ``FGSM(eps)``: train on each batch as this attack changes it, at the parameters of
    the step and without dropout. ``loss`` and ``accuracy`` of the history are of that; validation is of rows unchanged.
    ``Free(eps, repeats=4)``: change it by the gradients that training computes, with 4 updates on each batch.
    ``TRADES(eps, beta=6.0)``: add beta times the divergence of the outputs of attacked rows from their own to the loss.
    ``IBP(eps)``: train for certified accuracy; the history is of the rows as they are.

    Ctrl-C ends training after the batch and raises KeyboardInterrupt; the parameters and the history are kept. Raises
    ShapeError, DTypeError, DataError, ArgumentError before anything has changed, and DivergenceError when the loss is
    no longer finite, with the engine back at the last good epoch. Later batches of an iterable are checked when they
    come. Warns (InputScaleWarning) of X far from unit scale.
    """
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
    batches, parts = None, _parts_of(engine, X, steps_per_epoch, first_epoch) if y is None else None
    if y is None:
        arrays = {"sample_weight": sample_weight, "validation_split": share or None, "batch_size": batch_size}
        _refuse_with_batches({**arrays, "row_order": row_order, "drop_last": drop_last or None})
        batches = Batches("X", X, steps_per_epoch, "steps_per_epoch", first_epoch, parts)
        engine.check_measured()
        data = batches.next(engine, keep=True)
    else:
        if steps_per_epoch is not None:
            raise ArgumentError(
                "steps_per_epoch: an epoch goes through all rows of X, in batches of batch_size; it is for batches, "
                f"fit(batches, steps_per_epoch=...), got {steps_per_epoch!r}"
            )
        data = engine.examples(X, y, sample_weight)
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
    asked = () if metrics is None else metrics
    if validation is not None:
        validation = with_metrics(engine, validation, asked, [monitor, *_monitors(listeners)])
    elif asked and (found := as_metrics("metrics", asked, engine.kind_of(data.targets))):
        raise ArgumentError(
            "metrics: they are of validation rows; give validation_data=(Xv, yv) or validation_split=0.2 too, got "
            f"{[one.name for one in found]}"
        )
    patience = None if early_stopping is None else as_count("early_stopping", early_stopping, minimum=1)
    if patience is not None and validation is None and monitor is None:
        raise ArgumentError(
            "early_stopping: it watches val_loss, so validation_data=(Xv, yv) or validation_split=0.2 is needed too"
        )
    names = logged(engine, data.targets, validation)
    check_monitor(monitor, names)
    announce(listeners, names, epochs)
    if drop_last and count < size:
        raise ArgumentError(f"drop_last: {count} rows do not fill one batch of {size}; nothing would be trained")
    order = _order(count, shuffle, row_order, first_epoch) if batches is None else lambda epoch: np.arange(0)
    if engine.ranks is not None:
        told: dict[str, Any] = {
            "epochs": epochs,
            "batch_size": size,
            "early_stopping": patience,
            "monitor": monitor,
            "resume": resume,
        }
        told["metrics"] = [] if validation is None else [one.name for one in validation.metrics]
        told |= {
            "drop_last": drop_last,
            "shuffle": shuffle,
            "steps_per_epoch": None if batches is None else batches.steps,
        }
        check_ranks(engine, engine.ranks, data, validation, told, whole=parts is None)
        if row_order is not None and order is not None:
            order = partial(_same_on, engine.ranks, order)
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
        engine.let_go_with((X, y, sample_weight))
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


def logged(engine: Session, targets: Targets, validation: Validation | None) -> list[str]:
    """Return the names of an epoch's logs, in their order."""
    names = ["loss", *(["accuracy"] if engine.counts_hits(targets) else [])]
    names += [] if engine.privacy is None else ["epsilon"]
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
    batches: int | None = None,
    at_once: int | None = None,
    callbacks: Sequence[Any] = (),
    order: Callable[[int], Array] | None = None,
    resume: bool = False,
    taken_in: Any | None = None,
    deadline: float = math.inf,
    against: Attack | Hardening | IBP | None = None,
) -> EpochLoop[FitPolicy]:
    """Return the loop of a ``fit`` of checked arrays, on ``rows`` (m,) int64 of them if given.

    ``taken_in``: X as the network takes it, if the caller has it.
    ``bound`` has room for the rows of ``at_once`` epochs; the caller runs its steps. It may have its own data, in
    ``batches`` batches an epoch, and ``data`` is the first of them. ``order`` is a function from the
    epoch to the rows; by default their order depends on the seed.
    """
    count = len(data.X) if rows is None else len(rows)
    batch_size = min(engine.batch_size, count)
    if engine.privacy is not None:
        batches = steps_of_an_epoch(count, batch_size)
    elif batches is None:
        batches = count // batch_size if drop_last else -(-count // batch_size)
    if isinstance(against, Free):
        trained = batches * batch_size
        batches, at_once = batches * against.repeats, 1
    state = resumed_state(engine, epochs, batches, count) if resume else fresh_state(engine, epochs, batches)
    told = None if against is None else against.to_config()
    if not resume:
        state.monitor, state.adversarial, state.reduce = monitor or "", told, reduction(engine)
    elif state.reduce != reduction(engine):
        raise ArgumentError(
            f"reduce: the fit that is resumed has reduce={state.reduce or None!r}, got {reduction(engine) or None!r}; "
            "go on with the same: torchrun --nproc-per-node 1 -m fusemlp train --resume RUN, or in a script that "
            "torchrun starts load_checkpoint(..., distributed=True, reduce=...); where it was None, without torchrun"
        )
    elif state.monitor != (monitor or ""):
        raise ArgumentError(
            f"monitor: the fit that is resumed follows {state.monitor or None!r}, got {monitor!r}; give the same"
        )
    elif state.adversarial != told:
        raise ArgumentError(
            f"adversarial: the fit that is resumed trains against {state.adversarial}, got {told}; give the same"
        )

    def by_seed(epoch: int) -> Array:
        shuffled_rows = shuffled(engine.backend, engine.plan, count, engine.seed, epoch)
        return shuffled_rows if rows is None else rows[shuffled_rows]

    first_epoch = state.history.epochs[0] if state.history.epochs else state.epoch
    if engine.privacy is not None:
        seed = engine.sample_privately(count, sampling_rate(count, batch_size))
        now = engine.update_count - state.batch - state.epoch * batches
        updates = {epoch: now + epoch * batches for epoch in range(first_epoch, first_epoch + epochs)}
        sampled = PoissonRows(count, batch_size, seed, updates)
        order, batch_size, at_once = sampled.order, sampled.size, 1
    data = data._replace(X=engine.take_in(data.X) if taken_in is None else taken_in)
    of_epoch = by_seed if order is None else order
    if engine.network.members > 1:
        # members of one data row follow one another
        single = of_epoch

        def of_epoch(epoch: int) -> Array:
            return np.repeat(single(epoch), engine.network.members)

    on_host = engine.memory.backend.traits.on_host
    begun = settles = 0
    if isinstance(against, IBP):
        # waits for a device
        begun = engine.update_count - state.batch - (state.epoch - first_epoch) * batches
        # a fit resumed with more epochs keeps the ramp of its first call
        settles = first_epoch + against.settled(epochs, (state.total_updates - begun) // batches)
    policy = FitPolicy(
        engine,
        data.X,
        state,
        engine.spec_for(data.targets),
        of_epoch,
        last_epoch=first_epoch + epochs,
        validation=validation,
        patience=patience,
        resumes=resume,
        deadline=deadline,
        settles=settles,
        draws_ahead=order is None and not on_host,
    )
    resident = engine.plan == "resident" and (on_host or against is None)
    members = engine.network.members
    if at_once is None:
        decided = validation is not None or patience is not None or bool(callbacks)
        asked = decided or not resident or engine.ranks is not None
        at_once = epochs_at_once(engine, epochs, count * members, asked=asked)
    if bound is None:
        inputs = Inputs(len(data.X), indexed=True, weighted=data.weight is not None)
        bound = made = engine.bind_fit(
            inputs,
            policy.spec,
            policy.rule,
            batch_size,
            data.arrays,
            batches=batches,
            epochs=at_once,
            resident=resident,
            against=None if against is None else lowered(against, begun, state.total_updates),
        )
        if isinstance(against, IBP):
            write_limits(engine, against, made.arrays)
        engine.keep_carried(bound.arrays["delta"] if isinstance(against, Free) else None, resume=resume)
        if isinstance(against, Free):
            bound = Replays(made, against.repeats, trained)
    return EpochLoop(engine, bound, policy, state, batch_size * members, batches, at_once, callbacks)


def _parts_of(
    engine: Session, X: Any, steps: int | None, first_epoch: int
) -> tuple[Ranks, Callable[[Array], Array]] | None:
    """Return how ranks share the reading of blocks; DistributedError if theirs differ, or where they begin."""
    ranks, sharding = engine.ranks, engine.sharding
    if ranks is None or sharding is None or not isinstance(X, Blocks):
        return None
    ranks.check_same({**X.described(), "steps_per_epoch": steps, "the first epoch": first_epoch})
    return ranks, partial(sharding.owner, batch_size=X.batch_rows)


def check_ranks(
    engine: Session,
    ranks: Ranks,
    data: Examples,
    validation: Validation | None,
    told: Mapping[str, Any],
    *,
    whole: bool = True,
) -> None:
    """Raise DistributedError if not all ranks have the same data, state and arguments; ``whole``: each has all of X."""
    things = dict(told)
    for kind, rows in (("", data), ("validation ", None if validation is None else validation.data)):
        if rows is not None:
            found = {
                f"{kind}{name}": array for name, array in (("y", rows.targets.values), ("sample_weight", rows.weight))
            }
            found |= {f"{kind}X": rows.X} if whole or kind else {}
            things |= {name: None if array is None else engine.on_host(array) for name, array in found.items()}
    state = None if engine.fit_state is None else (engine.fit_state.epoch, engine.fit_state.batch)
    things |= {"the position in the fit": state, "the count of updates": engine.update_count}
    parameters = engine.on_host(engine.memory.params)
    ranks.check_same({**things, "the parameters": parameters, "the optimizer's schedule": engine.optimizer.schedule})


def reduction(engine: Session) -> str:
    """Return how the gradients of several processes are added; "" if there is one."""
    return "" if engine.sharding is None else engine.sharding.reduce


def checked_validation(
    engine: Session, given: Any, *, common: bool = False, steps: int | None = None
) -> Validation | None:
    """Check ``validation_data`` as ``fit`` takes it; ``common``: several models share it."""
    if given is not None and are_batches(given):
        data = Batches("validation_data", given, steps, "validation_steps").collected(engine)
        engine.loss.spec(accuracy=False, soft=data.targets.soft)
        return Validation(data, common)
    if steps is not None:
        raise ArgumentError(
            f"validation_steps: it counts the batches of validation_data, got {steps!r} without such; all rows of "
            "arrays are validated on"
        )
    if given is None:
        return None
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        raise ArgumentTypeError(
            f"validation_data: expected (X, y) or (X, y, sample_weight), or batches of them, got {_described(given)}"
        )
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
    unmeasured = engine.normalise and engine.input_scale is None
    if unmeasured:
        # for this look alone: predictions of raw inputs might overflow
        engine.input_scale = engine.measured(found.data.X)
    try:
        figures = engine.figures(found.data, found.metrics)
    finally:
        if unmeasured:
            engine.input_scale = None
    for name, value in figures.items():
        if math.isnan(value):
            raise ArgumentError(
                f"metrics: {name} is not defined on these {len(found.data.X)} validation rows: it needs rows of two "
                "classes, or two rows of numbers; give more rows, or another metric"
            )
    return found


def _described(given: Any) -> str:
    kind = type(given).__name__
    return f"{len(given)} in a {kind}" if isinstance(given, tuple | list) else kind


def _same_on(ranks: Ranks, order: Callable[[int], Array], epoch: int) -> Array:
    """Return the user's order of an epoch; DistributedError if ranks have others."""
    found = order(epoch)
    ranks.check_same({f"row_order({epoch})": found})
    return found


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


def _warn(engine: Session, data: Examples, batches: int, *, streamed: bool) -> None:
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
        least, greatest = engine.extent(labels)
        if least == greatest:
            found.append(f"y: every label is {least:.0f}; a classifier needs examples of two classes")
    for message in found:
        # past fit and its check of names
        warnings.warn(message, stacklevel=4)
    if rows:
        engine.warn_of_scale("X", data.X, stacklevel=5)
