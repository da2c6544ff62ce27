"""``fit``: makes the plan, binds the rows, makes the epoch loop and runs it."""

import warnings
from typing import Any

import numpy as np

from fusemlp.callbacks.forms import exits
from fusemlp.describe.checks import caller_level
from fusemlp.describe.conflicts import check_together
from fusemlp.inputs.columns import coding_of
from fusemlp.inputs.examples import Examples
from fusemlp.program.passes.attack import passes_against
from fusemlp.program.step import Inputs
from fusemlp.runtime.programs import BoundProgram
from fusemlp.runtime.steps import TrainingStep, bind_fit
from fusemlp.training.data import FitData, Stream, fit_data, order_of
from fusemlp.training.history import History
from fusemlp.training.intervals import add_worst_case
from fusemlp.training.loop import EpochLoop, epochs_at_once
from fusemlp.training.plan import FitPlan
from fusemlp.training.trainer import Trainer, fresh_state, resumed_state
from fusemlp.training.validation import FitPolicy
from fusemlp_kernels.errors import ArgumentError

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
    **dict.fromkeys(("optimizer", "seed", "precision", "backend", "device", "plan"), _TO_ENGINE),
    **dict.fromkeys(("lr", "learning_rate"), _TO_ENGINE),
    "random_state": "it is the engine's seed: Engine(net, seed=0)",
    "patience": "it is called early_stopping here: fit(early_stopping=5)",
    "eval_set": "it is called validation_data here: validation_data=(Xv, yv)",
    "weight": "it is called sample_weight here",
    **dict.fromkeys(("max_iter", "nb_epoch"), "it is called epochs here"),
}


def fit(engine: Trainer, plan: FitPlan, X: Any, y: Any, sample_weight: Any, validation_data: Any) -> History:
    """Train on arrays, or on batches, by a plan; see ``Engine.fit``."""
    with engine.taking(plan.loss):
        beside = {"sample_weight": sample_weight, "validation_data": validation_data}
        check_together({**engine.uses, **plan.uses(engine.optimizer.schedule, batches=y is None, **beside)})
        engine.ledger.check_accounting()
        if plan.resume and plan.batch_size not in (None, engine.batch_size):
            before = f"the fit that is resumed has batches of {engine.batch_size} rows"
            raise ArgumentError(f"batch_size: {before}, got {plan.batch_size}; leave it out")
        data = fit_data(engine, plan, X, y, sample_weight, validation_data)
        engine.take_batches_of(plan.batch_size or engine.batch_size)
        loop = fit_loop(engine, plan, data)
        if data.batches is None:
            engine.programs.let_go_with((X, y, sample_weight))
        rows = data.train
        if data.share is not None:
            ranks, owner = data.share
            rows = rows._replace(X=rows.X[owner(np.arange(len(rows.X))) == ranks.rank])
        _warn(engine, rows, plan.epochs * loop.batches, streamed=data.batches is not None)
    with exits(plan.callbacks, engine):
        return loop.run()


def fit_loop(
    engine: Trainer, plan: FitPlan, data: FitData, *, together: bool = False, deadline: float | None = None
) -> EpochLoop[FitPolicy]:
    """Return the loop of a fit on checked rows, up to ``deadline`` or the plan's; ``together``: the caller binds it."""
    coding = coding_of(data.train.X)
    engine.lay_out(coding)
    count, adversary, memory = data.count, plan.adversary, engine.memory
    size, on_host = min(engine.batch_size, count), memory.backend.traits.on_host
    batches = engine.ledger.batches(count, size, drop_last=plan.drop_last)
    batches = batches if data.batches is None else data.batches.steps
    state = resumed_state(engine, plan, batches, rows=count) if plan.resume else fresh_state(engine, plan, batches)
    last_epoch = state.first_epoch + plan.epochs
    order, epochs = data.order, range(state.first_epoch, last_epoch)
    drawn = engine.ledger.draw(count, size, lambda: engine.update_count, epochs, state.begun(0, batches))
    if drawn is not None:
        order, size = drawn.order, drawn.size
    begun = settles = 0
    if adversary.ramps:
        begun = state.begun(engine.update_count, batches)
        # a fit resumed with more epochs keeps the ramp of its first call
        settles = state.first_epoch + adversary.settled(plan.epochs, (state.total_updates - begun) // batches)
    train = data.train._replace(X=engine.scaling.take_in(data.train.X) if data.taken_in is None else data.taken_in)
    policy = FitPolicy(
        engine,
        plan,
        train.X,
        state,
        engine.inputs.spec_for(train.targets),
        order_of(engine, count, data.rows, order),
        last_epoch=last_epoch,
        validation=data.validation,
        deadline=plan.deadline if deadline is None else deadline,
        settles=settles,
        draws_ahead=order is None and not on_host,
    )
    passes = passes_against(adversary)
    resident = engine.plan == "resident" and (on_host or not passes) and not adversary.ramps
    members = engine.network.members
    if drawn is not None or adversary.ramps or plan.row_order is not None or data.batches is not None:
        # rows are drawn, and a function of the user's is asked, when their epoch comes
        at_once = 1
    else:
        decided = (
            "own loss" in engine.uses
            or data.validation is not None
            or policy.patience is not None
            or bool(plan.callbacks)
        )
        asked = decided or not resident or engine.ranks.together
        at_once = epochs_at_once(engine, plan.epochs, count * members, asked=asked)
    bound: Stream | BoundProgram | None = None
    if data.batches is not None:
        bound = Stream(engine, data, data.batches)
    elif not together:
        inputs = Inputs(len(train.X), indexed=True, weighted=train.weight is not None, coding=coding)
        training = TrainingStep(
            inputs, policy.spec, policy.rule, size, resident, passes, keep_gradients=adversary.ramps
        )
        bound = bind_fit(engine, training, train.arrays, batches=batches, epochs=at_once)
        add_worst_case(engine, bound, adversary, first=begun, updates=state.total_updates - begun)
    return EpochLoop(engine, bound, policy, state, size * members, batches, at_once, plan.callbacks)


def _warn(engine: Trainer, data: Examples, batches: int, *, streamed: bool) -> None:
    rows, accumulate, labels = len(data.X), engine.optimizer.accumulate, data.targets.values
    warned = []
    if accumulate > batches:
        warned.append(
            f"accumulate: an update takes {accumulate} batches and this fit has only {batches}: it may end without "
            "one; train for more epochs or lower accumulate"
        )
    if engine.batch_size > rows and not streamed:
        warned.append(f"batch_size: {engine.batch_size} is more than the {rows} rows of X; batches of {rows} are used")
    if engine.loss.kind == "cross_entropy" and not data.targets.soft and rows > 1 and not streamed:
        least, greatest = engine.inputs.extent(labels)
        if least == greatest:
            warned.append(f"y: every label is {least:.0f}; a classifier needs examples of two classes")
    for message in warned:
        warnings.warn(message, stacklevel=caller_level())
    if rows:
        engine.scaling.warn("X", data.X)
        # one-hot rows are classes
        if not engine.inputs.counts_hits(data.targets):
            engine.scaling.warn_of_targets(engine.loss.kind, labels)
