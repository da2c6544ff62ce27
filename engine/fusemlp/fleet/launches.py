"""Launches that train many models: of one shape in one launch, or side by side on threads, one a core.

On threads all work in Python stays in the calling thread.
Threads that worked in Python too would hand its lock to one another at each of NumPy's calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from typing import Any

from fusemlp.callbacks.forms import deferred_interrupt
from fusemlp.engine import Engine
from fusemlp.inputs.arrays import Array
from fusemlp.program.builder import Inputs
from fusemlp.program.layout import ALIGNMENT_BYTES, placement
from fusemlp.program.program import Program, resolve
from fusemlp.runtime.memory import Memory, new_arenas, on_device
from fusemlp.runtime.plans import AT_ONCE, one_thread, resident_chunk, shares_launches
from fusemlp.runtime.programs import walk_rows
from fusemlp.runtime.steps import TrainingStep, lower
from fusemlp.training.loop import EpochLoop
from fusemlp.training.validation import FitPolicy
from fusemlp_kernels.contract import RATE_COLUMNS, STATS, step_flops
from fusemlp_kernels.errors import DivergenceError

# Most rows of all the models of one launch: 128 MiB.
GROUP_ROWS = 1 << 24


def signature(engine: Engine) -> tuple[Any, ...]:
    """Return what engines must have in common to train in one launch."""
    net = engine.network
    trained = tuple(name for name in net.parameter_shapes() if engine.optimizer.options_for(name)[0])
    activations = tuple(activation.name for activation in net.activations)
    rule = engine.optimizer.rule()
    states = rule.states, engine.plan == "chip" and rule.code
    return *net.key_without("activations", "dropouts", "init"), activations, trained, states, engine.batch_size


def grouped(engines: Mapping[int, Engine], plan: str) -> list[tuple[LaunchGroup, list[int]]]:
    """Set the plans of ``engines``, and return the groups that share a launch, each with its keys; none on a CPU."""
    if not shares_launches(next(iter(engines.values())).memory.backend.traits):
        return []
    by_signature: dict[Any, list[int]] = {}
    for place, engine in engines.items():
        by_signature.setdefault(signature(engine), []).append(place)
    groups = []
    for places in by_signature.values():
        together = [engines[place] for place in places]
        first = together[0]
        chosen = first.plan_for(plan, first.batch_size, models=len(together))
        for engine in together:
            engine.plan, engine.plan_reason = chosen
        if chosen[0] in AT_ONCE:
            groups.append((LaunchGroup(together), places))
    return groups


class Places:
    """Stands in for a bound program of a group's launch; the model's data starts at row ``first`` of the group's.

    ``steps`` are those that the model asks for.
    """

    def __init__(self, memory: Memory, rows: Any, epoch_stats: Any | None, chunk: int, first: int) -> None:
        self.arrays = {**memory.arrays, "rows": rows} | ({} if epoch_stats is None else {"epoch_stats": epoch_stats})
        self.backend, self.chunk, self.first, self.steps = memory.backend, chunk, first, 0

    def run_many(self, count: int) -> None:
        """Ask for steps of the launch to come."""
        self.steps = count

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """See ``BoundProgram.set_rows``."""
        walk_rows(self.backend, self.arrays, order + self.first, first_batch, size, epochs)


class LaunchGroup:
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

    def take_rows(self, loops: Sequence[EpochLoop[Any]], firsts: Sequence[int] | None = None) -> None:
        """Allocate the rows of a launch, and bind the loops to theirs, perhaps with fewer epochs at once."""
        allocate, models = self._backend.allocate, len(loops)
        # whole batches
        lengths = [loop.batches * loop.batch_size for loop in loops]
        for loop, length in zip(loops, lengths, strict=True):
            loop.at_once = max(1, min(loop.at_once, GROUP_ROWS // (models * length)))
        epochs = max(loop.at_once for loop in loops)
        longest = max(loop.at_once * length for loop, length in zip(loops, lengths, strict=True))
        self._rows = self._backend.view(allocate(models * longest, "int64"), 0, (models, longest), longest)
        self._epoch_stats = None
        if epochs > 1:
            self._epoch_stats = allocate(models * epochs * STATS, "float64").reshape(models, epochs, STATS)
        flops = step_flops(self.engines[0].network.widths, loops[0].batch_size)
        chunk = resident_chunk(self._backend.traits, flops, self.engines[0].plan)
        for index, loop in enumerate(loops):
            stats = None if self._epoch_stats is None else self._epoch_stats[index]
            first = 0 if firsts is None else firsts[index]
            loop.bound = Places(self.engines[index].memory, self._rows[index], stats, chunk, first)

    def bind(self, programs: Sequence[Program], data: Mapping[str, Any]) -> Callable[[Sequence[int]], object]:
        """Return the launch of the models' resident programs on device arrays ``data``; it takes each model's steps."""
        backend, models = self._backend, len(self.engines)
        shared = {**data, "class_weight": self.engines[0].class_weight}
        calls = []
        workspaces: dict[str, tuple[int, Any]] = {}
        for index, (engine, program) in enumerate(zip(self.engines, programs, strict=True)):
            placed = placement(program.structure, engine.memory.layout, row_multiple=backend.traits.row_multiple)
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
            length = len(arena) // models
            arenas[name] = backend.view(arena, 0, (models, length), length)
        arenas["rates"] = self.arenas["rates"].reshape(models, -1, RATE_COLUMNS)
        batch = programs[0].values["rows"].shape[0]
        return backend.bind(
            "train_fleet", calls=calls, rows=self._rows, batch=batch, arenas=arenas, epoch_stats=self._epoch_stats,
            plan=self.engines[0].plan,
        )  # fmt: skip


Launch = Callable[[], object]
# A training yields its launches, and goes on when one has run.
Training = Generator[Launch, None, None]
# Is told the key of a training that has ended and how it diverged, or None.
Ended = Callable[[int, DivergenceError | None], None]


def told(key: int, training: Training, ended: Ended) -> Training:
    """Yield the launches of a training, and tell ``ended`` its end."""
    outcome: DivergenceError | None = None
    try:
        yield from training
    except DivergenceError as error:
        outcome = error
    ended(key, outcome)


def train_together(
    group: LaunchGroup,
    loops: Mapping[int, EpochLoop[Any]],
    program: Callable[[EpochLoop[Any], Inputs], Program],
    data: Mapping[str, Any],
    interrupted: Callable[[], bool],
    ended: Ended,
    firsts: Sequence[int] | None = None,
) -> None:
    """Train all epochs of all models of a group, in one launch for the steps that the models ask for.

    ``program`` returns a model's resident program; ``data`` has x, target and perhaps weight on the device;
    ``firsts``: see ``Places``. A model that has ended, for any reason, asks for no more steps and leaves the launch;
    ``ended`` is told its key in ``loops`` and how it diverged, or None.
    """
    group.take_rows(list(loops.values()), firsts)
    inputs = Inputs(len(data["x"]), indexed=True, weighted="weight" in data)
    launch = group.bind([program(loop, inputs) for loop in loops.values()], data)
    asking = {key: told(key, loop.launches(interrupted), ended) for key, loop in loops.items()}
    while asking:
        for key, training in list(asking.items()):
            loops[key].bound.run_many(0)
            ask = next(training, None)
            if ask is None:
                del asking[key]
            else:
                ask()
        if asking:
            launch([loop.bound.steps for loop in loops.values()])


def _resident_program(loop: EpochLoop[FitPolicy], inputs: Inputs) -> Program:
    engine, policy = loop.engine, loop.policy
    return lower(engine, TrainingStep(inputs, policy.spec, policy.rule, engine.batch_size, resident=True))


def train_groups(
    groups: Sequence[tuple[LaunchGroup, Sequence[int]]],
    fit: Callable[[int], EpochLoop[FitPolicy]],
    data: Mapping[str, Any],
    ended: Ended,
) -> None:
    """Train groups one after another, each given with its models' keys; ``fit`` makes the loop of a key, bound here.

    ``data`` has x, target and perhaps weight; ``ended`` is told a key and how the model diverged, or None. After
    Ctrl-C, or an error of ``ended``, all models stop after their launch.
    """
    # the data set is on the device once
    first = groups[0][0].engines[0]
    arrays = on_device(first.memory.backend, first.network, data)
    with deferred_interrupt() as interrupted:
        for group, keys in groups:
            train_together(group, {key: fit(key) for key in keys}, _resident_program, arrays, interrupted, ended)
        if interrupted():
            raise KeyboardInterrupt


class LaunchThreads:
    """Runs the launches of trainings on ``workers`` threads, the calling one among them, each alone."""

    def __init__(self, workers: int) -> None:
        # one launch runs in the calling thread while it waits: a thread more than cores would keep its Python waiting
        self._pool = ThreadPoolExecutor(workers - 1, thread_name_prefix="fusemlp") if workers > 1 else None
        self._ready: deque[tuple[Training, Launch]] = deque()
        self._done: SimpleQueue[tuple[Training, BaseException | None]] = SimpleQueue()
        # trainings to have under way: one launch waits for each thread while another is prepared
        self.most = 2 * workers if workers > 1 else 1
        self.active = 0

    def start(self, training: Training, error: BaseException | None = None) -> None:
        """Begin a training, or go on with it after a launch and what went wrong in that."""
        try:
            launch = next(training) if error is None else training.throw(error)
        except StopIteration:
            return
        self.active += 1
        self._ready.append((training, launch))
        if self._pool is not None:
            self._pool.submit(self._run_next)

    def wait(self) -> None:
        """Wait until a launch has run, and go on with its training. Raises what went wrong in the launch."""
        if self._done.empty():
            self._run_next()
        training, error = self._done.get()
        self.active -= 1
        self.start(training, error)

    def close(self) -> None:
        """Wait for the launches that run, and drop all others."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _run_next(self) -> None:
        """Run the launch that has waited longest, if any has."""
        try:
            training, launch = self._ready.popleft()
        except IndexError:
            return
        outcome: BaseException | None = None
        try:
            with one_thread():
                launch()
        except BaseException as error:
            outcome = error
        self._done.put((training, outcome))
        # an error leads to this frame, and the frame must not lead back
        del outcome


def run_side_by_side(
    numbers: Iterable[int],
    begin: Callable[[int, Callable[[], bool]], Training],
    workers: int,
    ended: Ended,
    most: int | None = None,
) -> None:
    """Run numbered trainings to their end; ``begin`` makes each, which asks the function it is given when to stop.

    ``most``: begin this many at once, which take turns; by default one worker runs one after another. After Ctrl-C or
    an error the trainings that have begun stop after their launches, and KeyboardInterrupt or the error is raised.
    """
    waiting = deque(numbers)
    failed = False

    with deferred_interrupt() as interrupted:

        def stop() -> bool:
            return failed or interrupted()

        def report(number: int, error: DivergenceError | None) -> None:
            # a training that was stopped has not come to its end
            if not stop():
                ended(number, error)

        threads = LaunchThreads(workers)
        threads.most = most or threads.most
        try:
            while (begins := bool(waiting) and not stop()) or threads.active:
                if begins and threads.active < threads.most:
                    number = waiting.popleft()
                    threads.start(told(number, begin(number, stop), report))
                else:
                    threads.wait()
        except BaseException:
            failed = True
            while threads.active:
                with suppress(Exception):
                    threads.wait()
            raise
        finally:
            threads.close()
        if interrupted():
            raise KeyboardInterrupt
