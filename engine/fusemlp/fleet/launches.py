"""Fleets on a backend that trains several models in one launch: their memory, and their steps side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.callbacks import deferred_interrupt
from fusemlp.program.lowering import Inputs
from fusemlp.program.placement import placement
from fusemlp.program.program import Program
from fusemlp.runtime.bound import walk_rows
from fusemlp.runtime.memory import Memory, new_arenas
from fusemlp.runtime.plans import choose_plan, resident_chunk, shares_launches
from fusemlp.training.fit import fit_checked
from fusemlp.training.loop import ROWS_AT_ONCE, EpochLoop, epochs_at_once
from fusemlp.training.policy import FitPolicy
from fusemlp.training.validation import Validation
from fusemlp_kernels.contract import STATS, step_flops
from fusemlp_kernels.errors import DivergenceError

if TYPE_CHECKING:
    from fusemlp.engine import Engine
    from fusemlp.inputs.targets import Targets

Array = np.ndarray[Any, Any]

# Most rows of all the models of one launch: 128 MiB.
GROUP_ROWS = 1 << 24


def signature(engine: Engine) -> tuple[Any, ...]:
    """What engines have in common that can train in one launch."""
    net = engine.network
    trained = tuple(name for name in net.parameter_shapes() if engine.optimizer.options_for(name)[0])
    activations = tuple(activation.name for activation in net.activations)
    states = engine.optimizer.rule(total_updates=1).state_count
    return net.sizes, activations, trained, states, engine.batch_size


def grouped(engines: Mapping[int, Engine], plan: str) -> list[tuple[Group, list[int]]]:
    """On a backend that trains several models in one launch: those that can, and whose plan, as ``plan`` comes out for
    them, is such launches; each group with its keys in ``engines``."""
    first = next(iter(engines.values()))
    traits = first.memory.backend.traits
    if not shares_launches(traits):
        return []
    by_signature: dict[Any, list[int]] = {}
    for place, engine in engines.items():
        by_signature.setdefault(signature(engine), []).append(place)
    groups = []
    for places in by_signature.values():
        together = [engines[place] for place in places]
        first = together[0]
        chosen = choose_plan(plan, traits, first.network.sizes, first.batch_size, first.precision, models=len(together))
        for engine in together:
            engine.plan, engine.plan_reason = chosen
        if chosen[0] == "resident":
            groups.append((Group(together), places))
    return groups


class Group:
    """Engines of one ``signature``, whose arenas are stored contiguously, model by model."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = tuple(engines)
        first = engines[0].memory
        backend, models = first.backend, len(engines)
        mixed = first.shadow is not None
        self.arenas = new_arenas(backend, first.layout.size, len(first.states), mixed=mixed, models=models)
        for index, engine in enumerate(engines):
            own = {}
            for name, arena in self.arenas.items():
                size = len(arena) // models
                own[name] = arena[index * size : (index + 1) * size]
            engine.move_into(own)

    def stacked(self, name: str) -> Any:
        """An arena with the axis of models in front."""
        arena, models = self.arenas[name], len(self.engines)
        return self.engines[0].memory.backend.view(arena, 0, (models, len(arena) // models), len(arena) // models)


class Places:
    """In place of a bound program: where a model of a group finds its rows, those of the data from ``first`` on. The
    launch of the group runs the steps."""

    def __init__(self, memory: Memory, rows: Any, history: Any | None, chunk: int, first: int = 0) -> None:
        self.arrays = {**memory.arrays, "rows": rows} | ({} if history is None else {"history": history})
        self.backend, self.chunk, self.first = memory.backend, chunk, first

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """See ``BoundProgram.set_rows``."""
        walk_rows(self.backend, self.arrays, order + self.first, first_batch, size, epochs)


def fleet_rows(group: Group, batch: int, counts: Sequence[int], at_once: Sequence[int]) -> tuple[Any, Any | None]:
    """Memory for the rows of a launch, of each model ``counts`` in each of ``at_once`` epochs, and for the statistics
    of each epoch where there are several."""
    backend, models, epochs = group.engines[0].memory.backend, len(group.engines), max(at_once)
    # whole batches, of all rows where there are fewer than a batch has
    sizes = [min(batch, count) for count in counts]
    longest = max(-(-count // size) * size * own for count, size, own in zip(counts, sizes, at_once, strict=True))
    lists = backend.view(backend.allocate(models * longest, "int64"), 0, (models, longest), longest)
    if epochs == 1:
        return lists, None
    return lists, backend.allocate(models * epochs * STATS, "float64").reshape(models, epochs, STATS)


def bind_fleet(
    group: Group, programs: Sequence[Program], data: Mapping[str, Any], rows: Any, history: Any | None
) -> Callable[[Sequence[int]], object]:
    """The launch of a group for the steps of each model, from the resident programs of each; ``data`` has x, target and
    perhaps weight and class_weight on the device."""
    memory = group.engines[0].memory
    for program in programs:
        placement(program, memory.layout, row_multiple=memory.backend.traits.row_multiple)
    each = [program.calls[0].operands for program in programs]
    names = ("shadow", "counters", "hyper", "stats", "params")
    operands: dict[str, Any] = {name: group.stacked(name) for name in names if name in group.arenas}
    if history is not None:
        operands["history"] = history
    if "ridge" in each[0]:
        operands["ridges"] = [own["ridge"] for own in each]
    return memory.backend.bind(
        "train_fleet",
        **data,
        **operands,
        rows=rows,
        batch=each[0]["batch"],
        gradients=group.stacked("grads"),
        states=tuple(group.stacked(f"state{index}") for index in range(len(memory.states))),
        layers=[own["layers"] for own in each],
        segments=[own["segments"] for own in each],
        rules=[own["rule"] for own in each],
        losses=[own["loss"] for own in each],
    )


def run_together(
    fits: Sequence[EpochLoop[Any]],
    launch: Callable[[Sequence[int]], object],
    interrupted: Callable[[], bool],
    ended: Callable[[int, DivergenceError | None], None],
) -> None:
    """Train all epochs of all models of a group, in one launch for the steps that the models ask for.

    A model that has ended, for any reason, asks for no more steps and leaves the launch; ``ended`` is told its index
    and how it diverged, or None.
    """
    for fit in fits:
        fit.begin()
    asking = {index: fit.training(interrupted) for index, fit in enumerate(fits)}
    while asking:
        wanted = [0] * len(fits)
        for index, training in list(asking.items()):
            outcome: DivergenceError | None = None
            try:
                wanted[index] = next(training, 0)
            except DivergenceError as error:
                outcome = error
            if not wanted[index]:
                del asking[index]
                if outcome is None:
                    fits[index].finish(interrupted=interrupted())
                ended(index, outcome)
        launch(wanted)


def train_together(
    groups: Sequence[tuple[Group, Sequence[int]]],
    X: Any,
    targets: Targets,
    weight: Any | None,
    *,
    epochs: int,
    validations: Sequence[Validation | None],
    patience: int | None,
    rows: Sequence[Array | None],
    drop_last: bool,
    ended: Callable[[int, DivergenceError | None], None],
) -> None:
    """Train the groups one after another, each given with its models' places in ``validations`` and ``rows``. When a
    model has ended, ``ended`` is told its place and how it diverged, or None; what it raises ends the training.

    Ctrl-C ends the training of all models after their launch and raises KeyboardInterrupt.
    """
    from threadpoolctl import threadpool_limits

    backend = groups[0][0].engines[0].memory.backend
    # the data set is on the device once
    data = {"x": backend.from_host(X, "compute"), "target": backend.from_host(targets.values)}
    if weight is not None:
        data["weight"] = backend.from_host(weight)
    # whatever computes on the host does so on one thread: the bits are those of engines that train so
    with threadpool_limits(1, user_api="blas"), deferred_interrupt() as interrupted:
        for group, places in groups:
            fits, launch = _bound(group, places, X, targets, data, epochs, validations, patience, rows, drop_last)

            def told(index: int, error: DivergenceError | None, places: Sequence[int] = places) -> None:
                ended(places[index], error)

            run_together(fits, launch, interrupted, told)
        if interrupted():
            raise KeyboardInterrupt


def _bound(
    group: Group,
    places: Sequence[int],
    X: Array,
    targets: Targets,
    data: Mapping[str, Any],
    epochs: int,
    validations: Sequence[Validation | None],
    patience: int | None,
    rows: Sequence[Array | None],
    drop_last: bool,
) -> tuple[list[EpochLoop[FitPolicy]], Callable[[Sequence[int]], object]]:
    first = group.engines[0]
    backend, models = first.memory.backend, len(places)
    own = [rows[place] for place in places]
    counts = [len(X) if one is None else len(one) for one in own]
    at_once = [
        epochs_at_once(
            engine, epochs, count, asked=validations[place] is not None, room=min(ROWS_AT_ONCE, GROUP_ROWS // models)
        )
        for engine, place, count in zip(group.engines, places, counts, strict=True)
    ]
    lists, history = fleet_rows(group, first.batch_size, counts, at_once)
    chunk = resident_chunk(backend.traits, step_flops(first.network.sizes, first.batch_size))
    fits = [
        fit_checked(
            engine,
            X,
            targets,
            None,
            epochs=epochs,
            validation=validations[place],
            patience=patience,
            rows=rows[place],
            drop_last=drop_last,
            bound=Places(engine.memory, lists[index], None if history is None else history[index], chunk),
            at_once=at_once[index],
        )
        for index, (engine, place) in enumerate(zip(group.engines, places, strict=True))
    ]
    classes = {} if first.class_weight is None else {"class_weight": first.class_weight}
    inputs = Inputs(len(data["x"]), indexed=True, weighted="weight" in data, class_weighted=bool(classes))
    programs = [
        engine.resident_program(
            inputs, fit.policy.spec, fit.policy.rule, first.batch_size, fit.batches, epochs=fit.at_once
        )
        for engine, fit in zip(group.engines, fits, strict=True)
    ]
    return fits, bind_fleet(group, programs, {**data, **classes}, lists, history)
