"""Assemble the loop of a fit from checked arguments: its position, the order of its rows, its policy and steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from fusemlp.describe.intervals import IBP
from fusemlp.describe.privacy import sampling_rate, steps_of_an_epoch
from fusemlp.program.adversarial import lowered
from fusemlp.program.step import Inputs
from fusemlp.runtime.binding import bind_fit
from fusemlp.training.intervals import add_worst_case
from fusemlp.training.loop import EpochLoop, Steps, epochs_at_once
from fusemlp.training.orders import of_epoch
from fusemlp.training.policy import FitPolicy
from fusemlp.training.private import PoissonRows
from fusemlp.training.trainer import fresh_state, resumed_state

if TYPE_CHECKING:
    from fusemlp.describe.adversarial import Attack
    from fusemlp.inputs.arrays import Array
    from fusemlp.inputs.targets import Examples
    from fusemlp.training.trainer import Trainer
    from fusemlp.training.validation import Validation


def fit_checked(
    engine: Trainer,
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
    against: Attack | IBP | None = None,
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
    told = epochs, batches, monitor or "", None if against is None else against.to_config()
    state = resumed_state(engine, *told, rows=count) if resume else fresh_state(engine, *told)
    first_epoch = state.history.epochs[0] if state.history.epochs else state.epoch
    if engine.privacy is not None:
        engine.ledger.sample(count, sampling_rate(count, batch_size), batch_size, engine.update_count)
        now = engine.update_count - state.batch - state.epoch * batches
        updates = {epoch: now + epoch * batches for epoch in range(first_epoch, first_epoch + epochs)}
        sampled = PoissonRows(count, batch_size, engine.ledger.seed, updates)
        order, batch_size, at_once = sampled.order, sampled.size, 1
    data = data._replace(X=engine.scaling.take_in(data.X) if taken_in is None else taken_in)
    on_host = engine.memory.backend.traits.on_host
    begun = settles = 0
    attack = None
    if isinstance(against, IBP):
        # waits for a device
        begun = engine.update_count - state.batch - (state.epoch - first_epoch) * batches
        # a fit resumed with more epochs keeps the ramp of its first call
        settles = first_epoch + against.settled(epochs, (state.total_updates - begun) // batches)
        at_once = 1
    elif against is not None:
        attack = lowered(against)
    policy = FitPolicy(
        engine,
        data.X,
        state,
        engine.inputs.spec_for(data.targets),
        of_epoch(engine, count, rows, order),
        last_epoch=first_epoch + epochs,
        validation=validation,
        patience=patience,
        resumes=resume,
        deadline=deadline,
        settles=settles,
        draws_ahead=order is None and not on_host,
    )
    resident = engine.plan == "resident" and (on_host or against is None) and not isinstance(against, IBP)
    members = engine.network.members
    if at_once is None:
        decided = validation is not None or patience is not None or bool(callbacks)
        asked = decided or not resident or engine.ranks is not None
        at_once = epochs_at_once(engine, epochs, count * members, asked=asked)
    if bound is None:
        inputs = Inputs(len(data.X), indexed=True, weighted=data.weight is not None)
        bound = bind_fit(
            engine,
            inputs,
            policy.spec,
            policy.rule,
            batch_size,
            data.arrays,
            batches=batches,
            epochs=at_once,
            resident=resident,
            against=attack,
            keep_gradients=isinstance(against, IBP),
        )
        if isinstance(against, IBP):
            add_worst_case(engine, bound, against, first=begun, updates=state.total_updates - begun)
    return EpochLoop(engine, bound, policy, state, batch_size * members, batches, at_once, callbacks)
