"""Models that train in one launch: their memory, their rows and their steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fusemlp.callbacks import deferred_interrupt
from fusemlp.inputs.arrays import Array
from fusemlp.program.layout import ALIGNMENT_BYTES, placement
from fusemlp.program.program import Program, resolve
from fusemlp.program.step import Inputs
from fusemlp.runtime.binding import lower
from fusemlp.runtime.bound import walk_rows
from fusemlp.runtime.memory import Memory, new_arenas, on_device
from fusemlp.runtime.plans import choose_plan, resident_chunk, shares_launches
from fusemlp.training.loop import EpochLoop
from fusemlp.training.policy import FitPolicy
from fusemlp_kernels.contract import RATE_COLUMNS, STATS, step_flops
from fusemlp_kernels.errors import DivergenceError

if TYPE_CHECKING:
    from fusemlp.engine import Engine

Launch = Callable[[Sequence[int]], object]

# Most rows of all the models of one launch: 128 MiB.
GROUP_ROWS = 1 << 24


def signature(engine: Engine) -> tuple[Any, ...]:
    """Return what engines must have in common to train in one launch."""
    net = engine.network
    trained = tuple(name for name in net.parameter_shapes() if engine.optimizer.options_for(name)[0])
    activations = tuple(activation.name for activation in net.activations)
    states = engine.optimizer.rule().states
    return net.sizes, activations, trained, states, engine.batch_size


def grouped(engines: Mapping[int, Engine], plan: str) -> list[tuple[Group, list[int]]]:
    """Set the plans of ``engines``, and return the groups that train in one launch, each with its keys in ``engines``.

    There are none on a backend that does not train several models in one launch.
    """
    traits = next(iter(engines.values())).memory.backend.traits
    if not shares_launches(traits):
        return []
    by_signature: dict[Any, list[int]] = {}
    for place, engine in engines.items():
        by_signature.setdefault(signature(engine), []).append(place)
    groups = []
    for places in by_signature.values():
        together = [engines[place] for place in places]
        first = together[0]
        chosen = choose_plan(
            plan,
            traits,
            first.network.sizes,
            first.batch_size,
            first.precision,
            models=len(together),
            private=first.privacy is not None,
        )
        for engine in together:
            engine.plan, engine.plan_reason = chosen
        if chosen[0] == "resident":
            groups.append((Group(together), places))
    return groups


class Places:
    """Stands in for a bound program: knows where a model of a group finds its rows. The group's launch runs the steps.

    The model's data starts at row ``first`` of the group's.
    """

    def __init__(self, memory: Memory, rows: Any, epoch_stats: Any | None, chunk: int, first: int) -> None:
        self.arrays = {**memory.arrays, "rows": rows} | ({} if epoch_stats is None else {"epoch_stats": epoch_stats})
        self.backend, self.chunk, self.first = memory.backend, chunk, first

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """See ``BoundProgram.set_rows``."""
        walk_rows(self.backend, self.arrays, order + self.first, first_batch, size, epochs)


class Group:
    """Engines of one ``signature``, their arenas stored contiguously, model by model."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = tuple(engines)
        memory = engines[0].memory
        self._backend, states, models = memory.backend, len(memory.states), len(engines)
        mixed = memory.shadow is not None
        self.arenas = new_arenas(self._backend, memory.layout.size, states, mixed=mixed, models=models)
        for index, engine in enumerate(engines):
            own = {}
            for name, arena in self.arenas.items():
                size = len(arena) // models
                own[name] = arena[index * size : (index + 1) * size]
            engine.move_into(own)
        self._own = [engine.memory for engine in engines]

    @property
    def whole(self) -> bool:
        """True while the engines lie in the arenas and have one signature: each may have been trained alone."""
        kept = all(engine.memory is own for engine, own in zip(self.engines, self._own, strict=True))
        return kept and len(set(map(signature, self.engines))) == 1

    def places(
        self, batch: int, counts: Sequence[int], at_once: Sequence[int], firsts: Sequence[int] | None = None
    ) -> list[Places]:
        """Allocate the rows of a launch, for each model ``counts`` rows in each of ``at_once`` epochs.

        Returns where each model finds its rows, and the statistics of its epochs; ``firsts``: see ``Places``.
        """
        models, epochs = len(self.engines), max(at_once)
        # whole batches, of all rows if there are fewer than a batch
        sizes = [min(batch, count) for count in counts]
        longest = max(-(-count // size) * size * own for count, size, own in zip(counts, sizes, at_once, strict=True))
        allocate = self._backend.allocate
        self._rows = self._backend.view(allocate(models * longest, "int64"), 0, (models, longest), longest)
        self._epoch_stats = None
        if epochs > 1:
            self._epoch_stats = allocate(models * epochs * STATS, "float64").reshape(models, epochs, STATS)
        chunk = resident_chunk(self._backend.traits, step_flops(self.engines[0].network.sizes, batch))
        stats = [None] * models if self._epoch_stats is None else self._epoch_stats
        firsts = [0] * models if firsts is None else firsts
        return [
            Places(engine.memory, self._rows[index], stats[index], chunk, firsts[index])
            for index, engine in enumerate(self.engines)
        ]

    def bind(self, programs: Sequence[Program], data: Mapping[str, Any]) -> Launch:
        """Return the launch, which takes each model's number of steps, from the models' resident programs.

        ``data`` has x, target and perhaps weight on the device.
        """
        backend, models = self._backend, len(self.engines)
        shared = {**data, "class_weight": self.engines[0].class_weight}
        calls = []
        workspaces: dict[str, tuple[int, Any]] = {}
        for index, (engine, program) in enumerate(zip(self.engines, programs, strict=True)):
            placed = placement(program, engine.memory.layout, row_multiple=backend.traits.row_multiple)
            if not index:
                # each model's begins at a multiple of the alignment
                sizes = {dtype: -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for dtype, size in placed.sizes.items()}
                workspaces = {dtype: (size, backend.allocate(models * size, dtype)) for dtype, size in sizes.items()}
            arrays = {**shared, **engine.memory.arrays, "rows": self._rows[index]}
            for name, (dtype, place) in placed.places.items():
                size, arena = workspaces[dtype]
                arrays[name] = backend.view(arena, index * size + place.offset, place.shape, place.pitch)
            calls.append([(call.op, resolve(call.operands, arrays.__getitem__)) for call in program.calls])
        arenas = {}
        for name, arena in self.arenas.items():
            own = len(arena) // models
            arenas[name] = backend.view(arena, 0, (models, own), own)
        arenas["rates"] = self.arenas["rates"].reshape(models, -1, RATE_COLUMNS)
        batch = programs[0].values["rows"].shape[0]
        return backend.bind(
            "train_fleet", calls=calls, rows=self._rows, batch=batch, arenas=arenas, epoch_stats=self._epoch_stats
        )


def run_together(
    fits: Sequence[EpochLoop[Any]],
    launch: Launch,
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
        if asking:
            launch(wanted)


def train_together(
    groups: Sequence[tuple[Group, Sequence[int]]],
    fit: Callable[..., EpochLoop[FitPolicy]],
    data: Mapping[str, Any],
    *,
    counts: Mapping[int, int],
    at_once: Mapping[int, int],
    ended: Callable[[int, DivergenceError | None], None],
) -> None:
    """Train groups one after another, each given with its models' keys.

    ``fit`` makes the loop of the model with a key, ``bound`` to its places; ``data`` has x, target and perhaps weight;
    ``counts`` are the rows of each model, and ``at_once`` the most epochs of a launch. When a model has ended,
    ``ended`` is told its key and how it diverged, or None; what it raises ends training.

    Ctrl-C ends the training of all models after their launch and raises KeyboardInterrupt.
    """
    backend = groups[0][0].engines[0].memory.backend
    # the data set is on the device once
    given = on_device(backend, data)
    with deferred_interrupt() as interrupted:
        for group, keys in groups:
            first, most = group.engines[0], GROUP_ROWS // len(keys)
            epochs = [max(1, min(at_once[key], most // counts[key])) for key in keys]
            places = group.places(first.batch_size, [counts[key] for key in keys], epochs)
            fits = [fit(key, bound=bound, at_once=own) for key, bound, own in zip(keys, places, epochs, strict=True)]
            inputs = Inputs(len(data["x"]), indexed=True, weighted="weight" in data)
            programs = [
                lower(one.engine, inputs, one.policy.spec, one.policy.rule, first.batch_size, resident=True)
                for one in fits
            ]

            def told(index: int, error: DivergenceError | None, keys: Sequence[int] = keys) -> None:
                ended(keys[index], error)

            run_together(fits, group.bind(programs, given), interrupted, told)
        if interrupted():
            raise KeyboardInterrupt
