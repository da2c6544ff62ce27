"""Programs that run: verified, their values in memory, their calls bound; and those that an engine keeps."""

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Optimizer, Schedule
from fusemlp.inputs.arrays import Array
from fusemlp.program.layout import allocate, placement
from fusemlp.program.program import Program, resolve
from fusemlp.runtime.memory import Memory, Workspace, on_device
from fusemlp.runtime.plans import CALLED_BACK, UNINTERRUPTED, resident_chunk
from fusemlp.runtime.ranks import Single
from fusemlp_kernels.contract import ROW_COUNT, ROW_STEP, Backend

# Steps that are unrolled in one graph.
STEPS_A_GRAPH = 8


class BoundProgram:
    """A program that can be run: verified, its values in memory, its calls bound.

    ``data`` are arrays for values of kind "data" and "control"; those that are not there get memory of their own and
    are found in ``arrays``. ``calls`` are the bound calls one by one, for callers with something
    to do between them; those of a resident program are one loop. ``binders`` bind ops in place of the backend, from the
    operands by name.
    """

    def __init__(
        self,
        program: Program,
        memory: Memory,
        workspace: Workspace,
        data: Mapping[str, Any],
        *,
        plan: str = "eager",
        binders: Mapping[str, Callable[[dict[str, Any]], Callable[[], object]]] | None = None,
    ) -> None:
        backend = memory.backend
        placed = placement(program.structure, memory.layout, row_multiple=backend.traits.row_multiple)
        self.program = program
        self.backend = backend
        self.arrays: dict[str, Any] = {**memory.arrays, **data}
        arenas = {dtype: workspace.arena(dtype, size) for dtype, size in placed.sizes.items()}
        for name, (dtype, place) in placed.places.items():
            self.arrays[name] = backend.view(arenas[dtype], place.offset, place.shape, place.pitch)
        for name, value in program.values.items():
            if value.kind in ("data", "control") and name not in self.arrays:
                # the narrow kernels take whole vectors alone
                narrow = any(call.op.endswith("_narrow") for call in program.calls)
                self.arrays[name] = allocate(backend, value, backend.traits.row_multiple if narrow else 1)
        if "unit" in program.values:
            rows, _ = program.values["unit"].shape
            backend.copy_into(self.arrays["unit"], np.eye(rows, dtype=f"f{program.real_bytes}"))
        self._resident = program.resident
        # how many steps it is left alone for
        self.chunk = UNINTERRUPTED
        if self._resident or backend.traits.on_host:
            self.chunk = resident_chunk(backend.traits, program.flops, plan)
        if program.calls_back:
            self.chunk = min(self.chunk, CALLED_BACK)
        self._captures = plan == "graph" or (plan == "narrow" and "graph" in backend.traits.plans)
        self._binders = binders or {}
        self.use(self._bound(memory, plan))

    def _bound(self, memory: Memory, plan: str) -> tuple[Callable[..., object], ...]:
        backend, program = self.backend, self.program

        def bind(at: int, op: str, operands: dict[str, Any]) -> Callable[..., object]:
            if op in self._binders:
                return self._binders[op](operands)
            if not backend.traits.on_host:
                return backend.bind(op, **operands)
            return backend.bind(op, **operands, arrays=self.arrays, memo=program.memo.setdefault(at, {}))

        resolved = [(call.op, resolve(call.operands, self.arrays.__getitem__)) for call in program.calls]
        if self._resident:
            loop = {
                "calls": resolved,
                "rows": self.arrays.get("rows"),
                # without row numbers the data is the batch
                "batch": program.values["rows" if "rows" in program.values else "x"].shape[0],
                "arenas": memory.arenas,
                "epoch_stats": self.arrays.get("epoch_stats"),
                "plan": plan,
            }
            return (bind(0, "train_resident", loop),)
        return tuple([bind(at, *call) for at, call in enumerate(resolved)])

    def use(self, calls: tuple[Callable[..., object], ...]) -> None:
        """Let a step be these calls from now on."""
        self.calls, self._eager, self._warm = calls, _in_order(calls), False
        # graphs by the number of steps in them; none before the first step has loaded the kernels
        self._graphs: dict[int, Callable[[], object]] = {}

    @property
    def run(self) -> Callable[[], None]:
        """A step. The method is not kept: in a ring with it, the program and its memory would outlive their use."""
        return self._step if self._captures or self._resident else self._eager

    def _step(self) -> None:
        self.run_many(1)

    def run_many(self, count: int) -> None:
        """``count`` steps one after another."""
        if count == 1 and 1 in self._graphs:
            self._graphs[1]()
            return
        if self._resident:
            self.calls[0](count)
            return
        if not self._captures:
            for _ in range(count):
                self._eager()
            return
        if count and not self._warm:
            self._eager()
            self._warm, count = True, count - 1
        for size in (STEPS_A_GRAPH, 1):
            whole, count = divmod(count, size)
            for _ in range(whole):
                self._graph(size)()

    def _graph(self, steps: int) -> Callable[[], object]:
        if steps not in self._graphs:
            self._graphs[steps] = self.backend.capture(self._eager, steps)
        return self._graphs[steps]

    def drop_graphs(self) -> None:
        """Give back the graphs; another step captures them again."""
        self._graphs.clear()

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """See ``walk_rows``."""
        walk_rows(self.backend, self.arrays, order, first_batch, size, epochs)


def walk_rows(
    backend: Backend, arrays: Mapping[str, Any], order: Array, first_batch: int, size: int, epochs: int = 1
) -> None:
    """Write the rows of ``epochs`` epochs of one length into the arrays ``rows`` and ``counters``, where they are
    walked, from batch ``first_batch`` of ``size`` rows of the first on."""
    rows, counters = arrays["rows"], arrays["counters"]
    length = min(len(order), len(rows))
    count = length // epochs
    backend.copy_into(rows[:length], np.asarray(order[:length], np.int64))
    if length < len(rows):
        rows[length:] = -1
    # behind the last batch the clock has gone back to the first
    offset = first_batch * size if first_batch * size < count else 0
    # private batches have padding each
    now = np.count_nonzero(np.asarray(order[offset : min(count, offset + size)]) >= 0)
    backend.copy_into(counters[ROW_COUNT : ROW_STEP + 1], np.array([now, offset, count, size]))


def _in_order(steps: tuple[Callable[..., object], ...]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            step()

    return run


@dataclass(eq=False)
class LastFit:
    """The program of the last fit on a device, with its data there.

    ``key`` is all that the program depends on beside its arrays. ``places`` are those of the arrays that it reads where
    the user has them, and None for those that are the engine's; ``owners`` are the user's objects that hold the former.
    """

    key: Any
    bound: BoundProgram
    places: Mapping[str, Any]
    owners: list[weakref.ref[Any]] = field(default_factory=list)


class KeptPrograms:
    """Programs that the next steps and fits of an engine run again, and the scratch memory that they share."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        # the optimizer of ``step``, and its schedule, which knows of no end
        self.stepping: tuple[Optimizer, Schedule] | None = None
        # steps since the loss scaling was checked
        self.unchecked_steps = 0
        self.release()

    def release(self) -> None:
        """Give back the programs and their memory; the next steps make them anew."""
        self.workspace = Workspace(self.backend)
        # those of ``step``, by shape and type of a target, whether there are weights, and the coding
        self.staged: dict[tuple[Any, ...], BoundProgram] = {}
        self.last_fit: LastFit | None = None

    def again(
        self,
        key: Any,
        data: Mapping[str, Any],
        bind: Callable[[Mapping[str, Any]], BoundProgram],
        ranks: Single,
        net: MLP,
    ) -> BoundProgram:
        """Return the program that ``bind`` makes from data on a device, or the last one with this ``key``.

        That one has its graphs already. New data is copied into the engine's own arrays; arrays that the program reads
        where the user has them must be the same.
        """
        backend = self.backend
        shapes = {name: tuple(array.shape) for name, array in data.items()}
        key, last = (key, shapes), self.last_fit
        usable = last is not None and last.key == key and all(self._reads(last, name, data[name]) for name in shapes)
        # all ranks replay their graphs, or none: NCCL wants it so
        usable = not ranks.any(not usable)[0]
        if last is not None and usable:
            for name, array in data.items():
                if last.places[name] is None:
                    backend.copy_into(last.bound.arrays[name], array)
            return last.bound
        # before the next takes memory
        self.last_fit = last = None
        there = on_device(backend, net, data)
        bound = bind(there)
        places = {name: backend.place(array) if array is data[name] else None for name, array in there.items()}
        self.last_fit = LastFit(key, bound, places)
        return bound

    def _reads(self, last: LastFit, name: str, array: Any) -> bool:
        place = last.places[name]
        return place is None or (not isinstance(array, np.ndarray) and self.backend.place(array) == place)

    def let_go_with(self, owners: Iterable[Any]) -> None:
        """Give up the program of the last fit when one of these objects is gone, if it reads their memory."""
        last = self.last_fit
        if last is None or all(place is None for place in last.places.values()):
            return
        programs = weakref.ref(self)

        def let_go(_: Any) -> None:
            kept = programs()
            if kept is not None and kept.last_fit is last:
                kept.last_fit = None

        last.owners = [weakref.ref(one, let_go) for one in owners if self.backend.adopt(one) is not None]
