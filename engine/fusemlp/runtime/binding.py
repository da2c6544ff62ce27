"""The programs of an engine's training steps, bound to its memory and to arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fusemlp.program.adversarial import Attack
from fusemlp.program.lowering import lower_training
from fusemlp.program.program import Program
from fusemlp.program.step import Inputs
from fusemlp.runtime.bound import BoundProgram
from fusemlp.runtime.forward import member_rows
from fusemlp.runtime.ranks import Ranks
from fusemlp.runtime.sharded import ShardedProgram
from fusemlp_kernels.contract import STATS, LossSpec, Ridge, UpdateRule
from fusemlp_kernels.errors import ArgumentError

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session


def program_of_fit(engine: Session, against: Attack | None = None, *, resident: bool) -> Program:
    """Return the program of a training step in ``fit``."""
    return lower(
        engine,
        Inputs(engine.batch_size, indexed=True),
        engine.loss.spec(accuracy=engine.loss.is_classification),
        engine.optimizer.rule(),
        engine.batch_size,
        resident=resident,
        against=against,
    )


def lower(
    engine: Session,
    inputs: Inputs,
    spec: LossSpec,
    rule: UpdateRule,
    batch_size: int,
    *,
    keep_gradients: bool = False,
    resident: bool = False,
    ridge: Ridge | None = None,
    against: Attack | None = None,
) -> Program:
    """The program of a training step, or with ``resident`` of a loop over steps; with the loss's class weights.

    With ``keep_gradients`` the last of its calls is ``update`` alone, and the one before it leaves the gradients in the
    engine's memory. ``ridge``: a penalty beside the loss, for a loop.
    """
    if engine.class_weight is not None:
        inputs = replace(inputs, class_weighted=True)
    sharding = engine.sharding
    return lower_training(
        engine.network,
        spec,
        rule,
        engine.optimizer.options_for,
        batch_size if sharding is None else sharding.rows(batch_size),
        engine.memory.backend.traits,
        engine.memory.layout,
        inputs,
        seed=engine.seed,
        real_bytes=engine.memory.real_bytes,
        compute_bytes=engine.memory.compute_bytes,
        scaled=engine.precision == "fp16",
        most_parts=engine.memory.gradient_parts,
        keep_gradients=keep_gradients,
        resident=resident,
        ridge=ridge,
        privacy=engine.ledger.lowered(engine.precision),
        against=against,
        sharding=sharding,
    )


def bind(
    engine: Session,
    inputs: Inputs,
    spec: LossSpec,
    rule: UpdateRule,
    batch_size: int,
    given: Mapping[str, Any],
    *,
    resident_batches: int | None = None,
    epochs: int = 1,
    against: Attack | None = None,
    **options: Any,
) -> BoundProgram:
    """A training step bound to the engine's memory and to the arrays in ``given`` (x, target, weight).

    With ``resident_batches`` the steps run in one loop, over rows of ``epochs`` epochs of this many batches, or over
    the data as the batch. ``options`` are those of ``lower``.

    Raises ArgumentError for an optimizer with another state than the one that the engine was made with.
    """
    if rule.states != engine.state_names:
        kept = [", ".join(states) or "no state" for states in (rule.states, engine.state_names)]
        raise ArgumentError(
            f"optimizer: it keeps {kept[0]}, and the engine was made for one that keeps {kept[1]}; make a new "
            "engine, and give it the weights by load_state_dict"
        )
    engine.take_rule(rule)
    arrays = dict(given)
    if engine.class_weight is not None:
        arrays["class_weight"] = engine.class_weight
    resident = resident_batches is not None
    if resident_batches is not None:
        allocate = engine.memory.backend.allocate
        if inputs.indexed and "rows" not in arrays:
            arrays["rows"] = allocate(epochs * resident_batches * batch_size * engine.network.members, "int64")
        if epochs > 1:
            epoch_stats = allocate(epochs * STATS, "float64")
            arrays["epoch_stats"] = engine.memory.backend.view(epoch_stats, 0, (epochs, STATS), STATS)
    program = lower(engine, inputs, spec, rule, batch_size, resident=resident, against=against, **options)
    if isinstance(engine.ranks, Ranks):
        return ShardedProgram(program, engine.memory, engine.programs.workspace, arrays, engine.ranks, plan=engine.plan)
    plan = engine.plan
    if against is not None and plan == "resident" and not resident:
        # a step against attacks is many launches
        plan = engine.memory.backend.traits.plans[-2]
    return BoundProgram(program, engine.memory, engine.programs.workspace, arrays, plan=plan)


def bind_fit(
    engine: Session,
    inputs: Inputs,
    spec: LossSpec,
    rule: UpdateRule,
    batch_size: int,
    data: Mapping[str, Any],
    *,
    batches: int,
    epochs: int,
    resident: bool,
    against: Attack | None,
    keep_gradients: bool = False,
) -> BoundProgram:
    """The steps of a fit on ``data``, with room for the rows of ``epochs`` epochs of ``batches`` batches."""

    def bound(there: Mapping[str, Any]) -> BoundProgram:
        rows = engine.memory.backend.allocate(epochs * batches * batch_size * engine.network.members, "int64")
        return bind(
            engine,
            *(inputs, spec, rule, batch_size, {**there, "rows": rows}),
            resident_batches=batches if resident else None,
            epochs=epochs,
            against=against,
            keep_gradients=keep_gradients,
        )

    engine.take_rule(rule)
    told = (inputs, spec, rule, batch_size, batches, epochs, resident, against, keep_gradients)
    key = (told, engine.optimizer, engine.seed, engine.ledger.lowered(engine.precision))
    return engine.programs.again(key, data, bound, engine.ranks)


def bind_staged(engine: Session, rows: int, spec: LossSpec, *, weighted: bool) -> BoundProgram:
    """Return a training step with a batch of its own, up to ``rows`` rows, for ``run_staged``."""
    # on a GPU the resident kernel is for many steps
    batches = 1 if engine.plan == "resident" and engine.memory.backend.traits.on_host else None
    members, given = engine.network.members, dict[str, Any]()
    # a rank picks the rows of its shards
    picks = members > 1 or engine.ranks.together
    if picks:
        given["rows"] = member_rows(engine.memory.backend, rows, members)
    inputs = Inputs(rows, indexed=picks, weighted=weighted)
    return bind(engine, inputs, spec, engine.optimizer.rule(), rows, given, resident_batches=batches)
