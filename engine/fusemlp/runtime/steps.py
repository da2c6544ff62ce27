"""The programs of training steps, bound to an engine's memory and to arrays; and steps on batches of the caller."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from fusemlp.describe.conflicts import check_together
from fusemlp.inputs.columns import codes_of, coding_of
from fusemlp.program import lowering
from fusemlp.program.program import Program
from fusemlp.program.step import Inputs, Pass, Step
from fusemlp.runtime.forward import member_rows
from fusemlp.runtime.own_loss import caller_of
from fusemlp.runtime.programs import BoundProgram
from fusemlp.runtime.ranks import Ranks
from fusemlp.runtime.session import Session
from fusemlp.runtime.shards import ShardedProgram
from fusemlp_kernels import contract
from fusemlp_kernels.coding import Coding
from fusemlp_kernels.contract import LossSpec, UpdateRule
from fusemlp_kernels.errors import ArgumentError, DivergenceError, ShapeError


@dataclass(frozen=True)
class TrainingStep:
    """A training step beside its engine: its data, loss and rule, in batches of ``batch_size`` rows.

    ``resident``: the step of a loop over steps. ``passes`` change the program before those of the engine. With
    ``keep_gradients`` the last of its calls is ``update`` alone, and the one before it leaves the gradients in the
    engine's memory.
    """

    inputs: Inputs
    spec: LossSpec
    rule: UpdateRule
    batch_size: int
    resident: bool = False
    passes: tuple[Pass, ...] = ()
    keep_gradients: bool = False


def program_of_fit(engine: Session, passes: tuple[Pass, ...] = (), *, resident: bool) -> Program:
    """Return the program of a training step in ``fit``."""
    spec = engine.loss.spec(accuracy=engine.loss.is_classification)
    inputs, size = Inputs(engine.batch_size, indexed=True), engine.batch_size
    return lower(engine, TrainingStep(inputs, spec, engine.optimizer.rule(), size, resident, passes))


def lower(engine: Session, training: TrainingStep) -> Program:
    """Return the program of a training step, or of a loop over steps, with the loss's class weights."""
    weighted, memory = engine.class_weight is not None, engine.memory
    step = Step(
        engine.network,
        engine.sharding.rows(training.batch_size),
        memory.backend.traits,
        memory.layout,
        replace(training.inputs, class_weighted=True) if weighted else training.inputs,
        training.spec,
        memory.real_bytes,
        memory.compute_bytes,
        training.rule,
        lowering.trained_by(engine.optimizer, engine.network),
        engine.seed,
        scaled=engine.precision == "fp16",
        most_parts=memory.gradient_parts,
        keep_gradients=training.keep_gradients,
        resident=training.resident,
        passes=(*training.passes, *engine.passes),
    )
    return lowering.lower(step)


def bind(
    engine: Session, training: TrainingStep, data: Mapping[str, Any], *, batches: int = 1, epochs: int = 1
) -> BoundProgram:
    """Return a training step bound to the engine's memory and to the arrays in ``data`` (x, target, weight).

    There is room for the rows of ``epochs`` epochs of this many ``batches``, unless ``data`` has them.

    Raises ArgumentError for an optimizer with another state than the one that the engine was made with.
    """
    if training.rule.states != engine.state_names:
        kept = [", ".join(states) or "no state" for states in (training.rule.states, engine.state_names)]
        raise ArgumentError(
            f"optimizer: it keeps {kept[0]}, and the engine was made for one that keeps {kept[1]}; make a new "
            "engine, and give it the weights by load_state_dict"
        )
    engine.take_rule(training.rule)
    arrays, backend = dict(data), engine.memory.backend
    if engine.class_weight is not None:
        arrays["class_weight"] = engine.class_weight
    if training.inputs.indexed and "rows" not in arrays:
        count = epochs * batches * training.batch_size * engine.network.members
        arrays["rows"] = backend.allocate(count, "int64")
    if training.resident and epochs > 1:
        epoch_stats = backend.allocate(epochs * contract.STATS, "float64")
        arrays["epoch_stats"] = backend.view(epoch_stats, 0, (epochs, contract.STATS), contract.STATS)
    program = lower(engine, training)
    if program.calls_back:
        arrays["function"] = caller_of(engine.inputs)
    placed, plan = (program, engine.memory, engine.programs.workspace, arrays), engine.plan
    if isinstance(engine.ranks, Ranks):
        return ShardedProgram(engine.ranks, *placed, plan=plan)
    if training.passes and plan == "resident" and not training.resident:
        # a step against attacks is many launches
        plan = backend.traits.stepwise
    return BoundProgram(*placed, plan=plan)


def bind_fit(
    engine: Session, training: TrainingStep, data: Mapping[str, Any], *, batches: int, epochs: int
) -> BoundProgram:
    """Return the steps of a fit as ``bind`` does, or the program of the last fit."""
    engine.take_rule(training.rule)
    key = (training, batches, epochs, engine.optimizer, engine.seed, engine.passes)
    bound = partial(bind, engine, training, batches=batches, epochs=epochs)
    return engine.programs.again(key, data, bound, engine.ranks, engine.network)


def bind_staged(
    engine: Session, rows: int, spec: LossSpec, *, weighted: bool, coding: Coding | None = None
) -> BoundProgram:
    """Return a training step with a batch of its own, up to ``rows`` rows, for ``run_staged``."""
    # on a GPU the resident kernel is for many steps
    resident = engine.plan == "resident" and engine.memory.backend.traits.on_host
    members, data = engine.network.members, dict[str, Any]()
    # a rank picks the rows of its shards
    picks = members > 1 or engine.ranks.together
    if picks:
        data["rows"] = member_rows(engine.memory.backend, rows, members)
    inputs = Inputs(rows, indexed=picks, weighted=weighted, coding=coding)
    return bind(engine, TrainingStep(inputs, spec, engine.optimizer.rule(), rows, resident), data)


# Steps between two checks of the loss scaling in ``step``: a check waits for the device.
SCALING_CHECKS = 32


def step(engine: Session, x: Any, y: Any, sample_weight: Any = None) -> Any:
    """Make one update from 1 to ``batch_size`` rows; see ``Engine.step``."""
    programs = engine.programs
    if not programs.staged:
        check_together({**engine.uses, "step": True})
    x = engine.inputs.features("x", x, check_finite=False, codes=True)
    count, coding = len(x), coding_of(x)
    if engine.coded != (coding is not None):
        engine.lay_out(coding)
        programs = engine.programs
    if count > engine.batch_size:
        raise ShapeError(
            f"x: expected 1 to {engine.batch_size} rows (batch_size), got {count}; "
            "make the engine with a larger batch_size, or use fit"
        )
    targets = engine.inputs.targets("y", y, rows=count)
    weight = engine.inputs.weights("sample_weight", sample_weight, rows=count)
    if programs.stepping is None or programs.stepping[0] is not engine.optimizer:
        programs.stepping = engine.optimizer, engine.optimizer.schedule.over(None)
        programs.staged.clear()
    if not programs.staged and not engine.update_count:
        engine.scaling.check_measured()
        engine.scaling.warn("x", x)
    kind = targets.values.shape[1:], targets.values.dtype, weight is not None, coding
    if kind not in programs.staged:
        spec, weighted = replace(engine.inputs.spec_for(targets), accuracy=False), weight is not None
        programs.staged[kind] = bind_staged(engine, engine.batch_size, spec, weighted=weighted, coding=coding)
    bound = programs.staged[kind]
    try:
        engine.rates.cover(programs.stepping[1], 1)
        run_staged(engine, bound, engine.scaling.normalised(x), targets.values, weight)
    except BaseException:
        # Ctrl-C too: only the device knows whether there was an update
        engine.rates.forget()
        raise
    if engine.precision == "fp16":
        programs.unchecked_steps += 1
        if programs.unchecked_steps == SCALING_CHECKS:
            # waits for the device
            check_scaling(engine, engine.memory.counters, engine.memory.hyper)
    return bound.backend.scalar(bound.arrays["stats"], contract.LAST_LOSS)


def run_staged(engine: Session, bound: BoundProgram, x: Any, target: Any, weight: Any | None) -> None:
    """Copy checked rows into a program that has a batch of its own, as many as it holds or fewer, and run it."""
    copy, arrays, count = bound.backend.copy_into, bound.arrays, len(x)
    short, counters = count < len(arrays["x"]), arrays["counters"]
    counters[contract.ROW_STEP], counters[contract.ROW_COUNT] = 0, count * engine.network.members
    for name, array in (("x", codes_of(x)), ("target", target), ("weight", weight)):
        if array is not None:
            copy(arrays[name][:count], array)
            if short:
                arrays[name][count:] = 0
    if "rows" not in arrays:
        bound.run()
        return
    # rows that a fit walks through: it goes on where it was
    before = counters[contract.ROW_OFFSET] + 0
    counters[contract.ROW_OFFSET] = 0
    try:
        bound.run()
    finally:
        counters[contract.ROW_OFFSET] = before


def check_scaling(engine: Session, counters: Any, hyper: Any) -> None:
    """Raise DivergenceError if the gradients overflow at every loss scale, by these counters and hyper."""
    engine.programs.unchecked_steps = 0
    skipped = int(counters[contract.SKIPPED_IN_A_ROW])
    if skipped >= contract.SKIPPED_LIMIT:
        raise DivergenceError(
            f"loss: the gradients overflowed in {skipped} batches in a row, down to a loss scale of "
            f"{float(hyper[contract.LOSS_SCALE]):.3g}; lower the learning rate, scale the features, or use "
            "precision='bf16' or 'fp32'"
        )
