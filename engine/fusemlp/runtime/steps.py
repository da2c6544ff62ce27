"""The programs of training steps, bound to an engine's memory and to arrays, and those over several ranks.

A step of several ranks has a rank's shards of the batch, a collective, and the update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from fusemlp.describe.conflicts import check_together
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.columns import codes_of, coding_of
from fusemlp.program import lowering
from fusemlp.program.builder import Inputs, Pass, Step
from fusemlp.program.program import ORDERED, Call, Program, Sharding, resolve
from fusemlp.runtime.forward import member_rows
from fusemlp.runtime.memory import Memory
from fusemlp.runtime.own_loss import caller_of
from fusemlp.runtime.plans import LOOPED
from fusemlp.runtime.programs import BoundProgram
from fusemlp.runtime.ranks import Ranks, tree_sum
from fusemlp.runtime.session import Session
from fusemlp_kernels import contract
from fusemlp_kernels.coding import Coding
from fusemlp_kernels.contract import Backend, LossSpec, UpdateRule
from fusemlp_kernels.errors import DivergenceError, ShapeError

# Steps between two checks of the loss scaling in ``step``: a check waits for the device.
SCALING_CHECKS = 32
# Bytes of a message before its gradients, and of which its length is a multiple: gradients are aligned.
HEAD, UNIT = 64, 256
# More layers than a network has.
LAYERS = 1 << 12
# Elements of int64 of which rows in memory have a multiple.
PITCH = 16


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
        lowering.trained_by(engine.optimizer, memory.names),
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
    engine.take_rule(training.rule)
    memory = engine.memory
    arrays, backend = dict(data), memory.backend
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
    placed, plan = (program, memory, engine.programs.workspace, arrays), engine.plan
    if isinstance(engine.ranks, Ranks):
        return ShardedProgram(engine.ranks, *placed, plan=plan)
    if training.passes and plan in LOOPED and not training.resident:
        # a step against attacks is many launches
        plan = backend.traits.stepwise
    return BoundProgram(*placed, plan=plan)


def bind_fit(
    engine: Session, training: TrainingStep, data: Mapping[str, Any], *, batches: int, epochs: int
) -> BoundProgram:
    """Return the steps of a fit as ``bind`` does, or on a device the program of the last fit."""
    if engine.inputs.backend.traits.on_host:
        return bind(engine, training, data, batches=batches, epochs=epochs)
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


class _Messages:
    """Rows (count, length) of memory, each with statistics in float64 and then gradients of ``size`` elements."""

    def __init__(self, memory: Memory, count: int, size: int) -> None:
        head, unit = HEAD // memory.real_bytes, UNIT // memory.real_bytes
        length = -(-(head + size) // unit) * unit
        # of the type of the gradients: to kernels a view as another type is memory that they do not know
        self.rows: Array = memory.backend.allocate(count * length, "real").reshape(count, length)
        self.heads = self.rows[:, :head]
        self.grads: list[Array] = [row[head : head + size] for row in self.rows]
        self.stats: list[Array] = [row.view(memory.stats.dtype)[: contract.STATS] for row in self.heads]

    def add(self) -> tuple[Array, Array]:
        """Return the sums of the gradients and of the statistics, which take the place of the first."""
        return tree_sum(self.grads), tree_sum(self.stats)


class ShardedProgram(BoundProgram):
    """A step of this rank and the others: the calls before the collective for its shards, then the update.

    The arguments after ``ranks`` are those of ``BoundProgram``. ``counters`` and ``rows`` are those of whole batches,
    alike on all ranks. So is the memory after a step. On the host the calls of all shards are one launch; on a device
    each shard has its own.
    """

    def __init__(self, ranks: Ranks, program: Program, *placed: Any, plan: str) -> None:
        self._ranks, self._sharding = ranks, program.sharding
        super().__init__(program, *placed, plan=plan)
        if self._resident:
            self.chunk = max(1, self.chunk // self._sharding.own)
        ranks.programs.add(self)

    def _bound(self, memory: Memory, plan: str) -> tuple[Callable[..., object], ...]:
        program, backend = self.program, self.backend
        before = program.before_reduction
        size = program.values["rows"].shape[0]
        firsts = self._sharding.firsts(self._ranks.rank, size)
        collect, update = program.calls[len(before) :]
        # on a device a shard's gradients are those of its own mean, and so are those of a function
        means = any("loss" in call.operands and call.operands["loss"].reduction != "sum" for call in before)
        weighs = program.calls_back or (means and not backend.traits.on_host)
        sums = _Sums(memory, self._ranks, self._sharding, collect.operands["rule"].accumulate, weighs=weighs)
        shards = [memory.layout.views(backend, grads) for grads in sums.own.grads]
        arrays = [
            {**self.arrays, "stats": stats, **{f"d{name}": view for name, view in views.items()}}
            for views, stats in zip(shards, sums.own.stats, strict=True)
        ]
        gradients: tuple[Callable[..., object], ...]
        if backend.traits.on_host:
            gradients = (self._loop(memory, before, arrays, firsts),)
        else:
            parts = _Parts(backend, self.arrays["counters"], self.arrays["rows"], firsts, size)
            gradients = (sums.clear, parts.take, *self._launches(before, arrays, parts))
        return *gradients, sums.add, backend.bind(update.op, **resolve(update.operands, self.arrays.__getitem__))

    def _loop(
        self, memory: Memory, calls: tuple[Call, ...], arrays: list[dict[str, Any]], firsts: tuple[int, ...]
    ) -> Callable[..., object]:
        """Return the calls of all shards, as one launch."""
        return self.backend.bind(
            "train_resident",
            calls=[(call.op, resolve(call.operands, one.__getitem__)) for one in arrays for call in calls],
            rows=self.arrays["rows"],
            batch=self.program.values["rows"].shape[0],
            arenas=memory.arenas,
            shards=firsts,
        )

    def _launches(
        self, calls: tuple[Call, ...], arrays: list[dict[str, Any]], parts: _Parts
    ) -> list[Callable[..., object]]:
        """Return the calls of one shard after another."""
        runs, first = [], self._ranks.rank * self._sharding.own
        for place, one in enumerate(arrays):
            own = {**one, "rows": parts.rows[place], "counters": parts.counters[place]}
            for call in calls:
                operands = resolve(call.operands, own.__getitem__)
                dropout = operands.get("dropout")
                if dropout is not None:
                    # kernels count the rows of a mask from 0, so each shard of the batch has another layer's mask
                    operands["dropout"] = replace(dropout, layer=dropout.layer + LAYERS * (first + place))
                runs.append(self.backend.bind(call.op, **operands))
        return runs

    def run_many(self, count: int) -> None:
        """``count`` steps one after another."""
        if not self._resident:
            super().run_many(count)
            return
        for _ in range(count):
            self._eager()


class _Sums:
    """The gradients and statistics of a rank's shards, and their way into the memory of all ranks.

    ``every``: the batches of an update. ``weighs``: the gradients of a shard are those of the mean over its own rows,
    and become those of the mean over all: sum(n_s g_s) / sum(n_s), n being the normaliser of the loss.
    """

    def __init__(self, memory: Memory, ranks: Ranks, sharding: Sharding, every: int, *, weighs: bool) -> None:
        self._memory, self._ranks = memory, ranks
        self._every, self._weighs, self._on_host = every, weighs, memory.backend.traits.on_host
        self.own = _Messages(memory, sharding.own, memory.layout.size)
        # of each rank its sum
        collects = sharding.reduce == ORDERED and ranks.world > 1
        self._received = _Messages(memory, ranks.world if collects else 0, memory.layout.size)

    def clear(self) -> None:
        """Begin the statistics of the shards anew."""
        self.own.heads[:] = 0.0

    # NumPy would warn of what overflows
    @np.errstate(all="ignore")
    def add(self) -> None:
        """Add the gradients and statistics of all shards, and hand them to the update."""
        memory, ranks, into = self._memory, self._ranks, self._memory.grads
        if self._weighs:
            for gradients, counted in zip(self.own.grads, self.own.stats, strict=True):
                gradients *= counted[contract.NORM_SUM]
        grads, stats = self.own.add()
        if self._received.grads:
            ranks.all_gather(self._received.rows, self.own.rows[0])
            grads, stats = self._received.add()
        elif ranks.world > 1:
            ranks.add(grads, stats)
        if self._weighs:
            # where no row counts, the gradient is 0
            count = stats[contract.NORM_SUM] + (stats[contract.NORM_SUM] == 0.0)
            grads /= count
            stats[contract.LAST_LOSS] = stats[contract.LOSS_SUM] / count
        if self._on_host and memory.counters[contract.BATCH_INDEX] % self._every != 0:
            into += grads
        elif self._on_host or self._every == 1:
            into[:] = grads
        else:
            # the host does not know the number of the batch
            into.masked_fill_(memory.counters[contract.BATCH_INDEX] % self._every == 0, 0.0)
            into += grads
        memory.stats[contract.LAST_LOSS] = stats[contract.LAST_LOSS]
        totals = memory.stats[contract.LOSS_SUM :]
        totals += stats[contract.LOSS_SUM :]
        if self._on_host:
            self.clear()


class _Parts:
    """The rows of a batch that each of a rank's shards has, on a device: ``rows`` (shards, size) int64, -1 after the
    last, and ``counters`` (shards, COUNTERS) for its calls. A shard begins with its row of ``firsts`` of the batch.
    """

    def __init__(self, backend: Backend, counters: Any, rows: Any, firsts: tuple[int, ...], size: int) -> None:
        self._batch_counters, self._batch_rows, self._size = counters, rows, size

        def table(columns: int) -> Any:
            pitch = -(-columns // PITCH) * PITCH
            return backend.view(backend.allocate(len(firsts) * pitch, "int64"), 0, (len(firsts), columns), pitch)

        self.rows, self.counters = table(size), table(contract.COUNTERS)
        self._starts = backend.from_host(np.array(firsts, np.int64))
        self._places, places = table(size), np.add.outer(np.array(firsts), np.arange(size))
        backend.copy_into(self._places, places)

    def take(self) -> None:
        """Take the batch that begins at counters[ROW_OFFSET]."""
        counters, rows = self._batch_counters, self._batch_rows
        count = counters[contract.ROW_COUNT]
        at = (self._places + counters[contract.ROW_OFFSET]).clamp_(max=len(rows) - 1)
        self.rows.copy_(rows.take(at).masked_fill_(self._places >= count, -1))
        self.counters[:, contract.BATCH_INDEX].copy_(counters[contract.BATCH_INDEX])
        self.counters[:, contract.ROW_COUNT].copy_((count - self._starts).clamp_(0, self._size))
