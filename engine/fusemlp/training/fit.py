"""``fit``: makes the plan, binds the rows, makes the epoch loop and runs it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fusemlp.callbacks import exits
from fusemlp.describe.adversarial import Attack
from fusemlp.describe.conflicts import check_together
from fusemlp.describe.elsewhere import knows_names
from fusemlp.describe.intervals import IBP
from fusemlp.describe.metrics import Metric
from fusemlp.program.adversarial import lowered
from fusemlp.program.step import Inputs
from fusemlp.training.data import FitData, Stream, fit_data
from fusemlp.training.history import History, fresh_state, resumed_state
from fusemlp.training.intervals import add_worst_case
from fusemlp.training.loop import EpochLoop, Steps, epochs_at_once
from fusemlp.training.plan import FitPlan
from fusemlp.training.policy import FitPolicy
from fusemlp.training.rows import batches_of, order_of, sampled_rows
from fusemlp_kernels.errors import ArgumentError

if TYPE_CHECKING:
    from fusemlp.inputs.targets import Examples
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
    adversarial: Attack | IBP | None = None,
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
    ``IBP(eps)``: train for certified accuracy; the history is of the rows as they are.

    Ctrl-C ends training after the batch and raises KeyboardInterrupt; the parameters and the history are kept. Raises
    ShapeError, DTypeError, DataError, ArgumentError before anything has changed, and DivergenceError when the loss, or
    val_loss, is no longer finite, with the engine back at the last good epoch. Later batches of an iterable are checked
    when they come. Warns (InputScaleWarning) of X far from unit scale.
    """
    arguments = locals()
    plan = FitPlan(**{field.name: arguments[field.name] for field in fields(FitPlan) if field.init})
    beside = {"sample_weight": sample_weight, "validation_data": validation_data}
    check_together({**engine.uses, **plan.uses(engine.optimizer.schedule, batches=y is None, **beside)})
    engine.check_accounting()
    if plan.resume and plan.batch_size not in (None, engine.batch_size):
        raise ArgumentError(
            f"batch_size: the fit that is resumed has batches of {engine.batch_size} rows, got {batch_size}; leave it "
            "out"
        )
    data = fit_data(engine, plan, X, y, sample_weight, validation_data)
    engine.take_batches_of(plan.batch_size or engine.batch_size)
    loop = fit_loop(engine, plan, data)
    if data.batches is None:
        engine.let_go_with((X, y, sample_weight))
    _warn(engine, data.of_rank, plan.epochs * loop.batches, streamed=data.batches is not None)
    with exits(plan.callbacks, engine):
        return loop.run()


def fit_loop(
    engine: Session,
    plan: FitPlan,
    data: FitData,
    *,
    bound: Steps | None = None,
    at_once: int | None = None,
    deadline: float | None = None,
) -> EpochLoop[FitPolicy]:
    """Return the loop of a fit on checked rows.

    ``bound`` has room for the rows of ``at_once`` epochs; the caller runs its steps. ``deadline``: of this fit, where
    several share the plan's.
    """
    count, adversary, memory = data.count, plan.adversary, engine.memory
    size, on_host = min(engine.batch_size, count), memory.backend.traits.on_host
    batches = batches_of(engine, count, size, drop_last=plan.drop_last) if data.batches is None else data.batches.steps
    state = resumed_state(engine, plan, batches, rows=count) if plan.resume else fresh_state(engine, plan, batches)
    last_epoch = state.first_epoch + plan.epochs
    order, sampled = data.order, sampled_rows(engine, state, count, batches, last_epoch)
    if sampled is not None:
        order, size = sampled.order, sampled.size
    begun = settles = 0
    if adversary.ramps:
        begun = state.begun(engine.update_count, batches)
        # a fit resumed with more epochs keeps the ramp of its first call
        settles = state.first_epoch + adversary.settled(plan.epochs, (state.total_updates - begun) // batches)
    train = data.train._replace(X=engine.take_in(data.train.X) if data.taken_in is None else data.taken_in)
    policy = FitPolicy(
        engine,
        plan,
        train.X,
        state,
        engine.spec_for(train.targets),
        order_of(engine, count, data.rows, order),
        last_epoch=last_epoch,
        validation=data.validation,
        deadline=plan.deadline if deadline is None else deadline,
        settles=settles,
        draws_ahead=order is None and not on_host,
    )
    against = lowered(adversary)
    resident = engine.plan == "resident" and (on_host or against is None) and not adversary.ramps
    members = engine.network.members
    if sampled is not None or adversary.ramps or plan.row_order is not None or data.batches is not None:
        # rows are drawn, and a function of the user's is asked, when their epoch comes
        at_once = 1
    elif at_once is None:
        decided = data.validation is not None or policy.patience is not None or bool(plan.callbacks)
        asked = decided or not resident or engine.ranks is not None
        at_once = epochs_at_once(engine, plan.epochs, count * members, asked=asked)
    if data.batches is not None:
        bound = Stream(engine, data, data.batches)
    elif bound is None:
        program = engine.bind_fit(
            Inputs(len(train.X), indexed=True, weighted=train.weight is not None),
            policy.spec,
            policy.rule,
            size,
            train.arrays,
            batches=batches,
            epochs=at_once,
            resident=resident,
            against=against,
            keep_gradients=adversary.ramps,
        )
        add_worst_case(engine, program, adversary, first=begun, updates=state.total_updates - begun)
        bound = program
    return EpochLoop(engine, bound, policy, state, size * members, batches, at_once, plan.callbacks)


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
