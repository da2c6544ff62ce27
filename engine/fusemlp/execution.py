"""How a program runs: its memory on a backend, its calls bound to that memory, and the choice of the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fusemlp.buffers import Layout, allocate, parameter_layout, plan_workspace
from fusemlp.network import MLP
from fusemlp.program import Program, resolve
from fusemlp.verifier import verify
from fusemlp_kernels.contract import (
    COUNTERS,
    HYPER,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_STEP,
    ROW_TOTAL,
    STATS,
    Backend,
    Traits,
)
from fusemlp_kernels.errors import BackendUnavailableError, unknown_name
from fusemlp_kernels.philox import row_order as shuffled_rows
from fusemlp_kernels.registry import PLANS, backend

Array = np.ndarray[Any, Any]

# Steps that are unrolled in one graph: one launch of the graph for so many steps.
STEPS_A_GRAPH = 8
# Steps after which it is asked whether somebody pressed Ctrl-C; where the steps run on the host, no more than about a
# tenth of a second of them, taken as so many floating-point operations.
UNINTERRUPTED = 256
UNINTERRUPTED_FLOPS = 2e9
COMPILED_LOOP = "with numba (pip install 'fusemlp[cpu]') fit runs its steps in one compiled loop, plan='resident'"


def open_backend(name: str, device: str | None, precision: str) -> Backend:
    """A backend for those above that may not know the registry; see ``fusemlp_kernels.registry.backend``."""
    return backend(name, device, precision)


def row_order(plan: str, n: int, seed: int, epoch: int) -> Array:
    """The order of the rows in an epoch, (n,) int64: the same for all plans, and compiled where the plan is."""
    if plan == "resident":
        from fusemlp_kernels.numpy.resident import row_order as compiled

        return compiled(n, seed, epoch)
    return shuffled_rows(n, seed, epoch)


def choose_plan(plan: str, traits: Traits) -> tuple[str, str]:
    """The plan that ``plan`` ("auto" or a name) comes to on a backend, and why.

    Raises ArgumentError for an unknown name, BackendUnavailableError for a plan that the backend does not have.
    """
    if plan not in ("auto", *PLANS):
        raise unknown_name("plan", plan, ["auto", *PLANS])
    missing = f"; {COMPILED_LOOP}" if traits.name == "numpy" and "resident" not in traits.plans else ""
    if plan == "auto":
        best = traits.plans[-1]
        if traits.plans == ("eager",):
            return best, f"the {traits.name} backend starts its calls one after another{missing}"
        if traits.name == "numpy":
            return best, "fit runs its steps in a loop that numba has compiled"
        return best, f"the quickest plan of the {traits.name} backend"
    if plan not in traits.plans:
        hint = missing if plan == "resident" and missing else "; use plan='auto'"
        raise BackendUnavailableError(
            f"plan: the {traits.name} backend has {', '.join(traits.plans)}, got {plan!r}{hint}"
        )
    return plan, "asked for"


class Memory:
    """What an engine keeps between steps: parameters, gradients, optimizer state, counters, all on the device."""

    def __init__(
        self,
        net: MLP,
        backend: Backend,
        state_count: int,
        *,
        item_bytes: int,
        mixed: bool = False,
        gradient_parts: int = 1,
    ) -> None:
        self.backend = backend
        self.layout = parameter_layout(net, row_multiple=backend.traits.row_multiple, item_bytes=item_bytes)
        self.params = self._arena()
        # the parts of a batch have their gradients behind one another
        self.gradient_parts = gradient_parts
        self.grads = backend.allocate(self.layout.size * gradient_parts, "real")[: self.layout.size]
        self.states = tuple(self._arena() for _ in range(state_count))
        self.counters = backend.allocate(COUNTERS, "int64")
        self.hyper = backend.allocate(HYPER, "float64")
        self.stats = backend.allocate(STATS, "float64")
        self.arrays: dict[str, Any] = {
            "params": self.params,
            "grads": self.grads,
            "counters": self.counters,
            "hyper": self.hyper,
            "stats": self.stats,
            **self.layout.views(backend, self.params),
            **{f"d{name}": view for name, view in self.layout.views(backend, self.grads).items()},
        }
        for index, arena in enumerate(self.states):
            self.arrays[f"state{index}"] = arena
            for name, view in self.layout.views(backend, arena).items():
                self.arrays[f"{name}.state{index}"] = view
        self.shadow = backend.allocate(self.layout.size, "compute") if mixed else None
        if mixed:
            self.arrays["shadow"] = self.shadow
            for name, view in self.layout.views(backend, self.shadow).items():
                self.arrays[f"{name}.shadow"] = view

    def refresh_shadow(self) -> None:
        """Round the parameters into the shadow, after they were written from outside a step."""
        if self.shadow is not None:
            self.backend.copy_into(self.shadow, self.backend.to_host(self.params))

    def _arena(self) -> Any:
        return self.backend.allocate(self.layout.size, "real")


class Workspace:
    """Scratch arenas, one a dtype, that programs which never run at once have in common. They only grow."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._arenas: dict[str, tuple[int, Any]] = {}

    def arena(self, dtype: str, size: int) -> Any:
        """A flat array of at least ``size`` elements."""
        if dtype not in self._arenas or self._arenas[dtype][0] < size:
            self._arenas[dtype] = (size, self.backend.allocate(size, dtype))
        return self._arenas[dtype][1]


class BoundProgram:
    """A program that can be run: verified, its values in memory, its calls bound.

    ``given`` are arrays for values of kind "data" and "control"; those that are not given get memory of their own and
    are found in ``arrays``. ``calls`` are the bound calls one by one, for who has something to do
    between them.
    """

    def __init__(
        self,
        program: Program,
        memory: Memory,
        workspace: Workspace,
        given: Mapping[str, Any],
        *,
        plan: str = "eager",
    ) -> None:
        backend = memory.backend
        ranges, places, sizes = plan_workspace(program, row_multiple=backend.traits.row_multiple)
        verify(program, {**ranges, **persistent_places(program, memory.layout)})
        self.program = program
        self.backend = backend
        self.arrays: dict[str, Any] = {**memory.arrays, **given}
        arenas = {dtype: workspace.arena(dtype, size) for dtype, size in sizes.items()}
        for name, (dtype, place) in places.items():
            self.arrays[name] = backend.view(arenas[dtype], place.offset, place.shape, place.pitch)
        for name, value in program.values.items():
            if value.kind in ("data", "control") and name not in self.arrays:
                self.arrays[name] = allocate(backend, value)
        calls = [backend.bind(call.op, **resolve(call.operands, self.arrays.__getitem__)) for call in program.calls]
        self.calls = tuple(calls)
        self._resident = program.calls[0].op == "train_resident"
        # whether it moves from batch to batch by itself, and how many steps it is left alone for
        self.walks_rows = self._resident or backend.traits.walks_rows
        self.chunk = UNINTERRUPTED
        if self._resident:
            self.chunk = max(1, min(self.chunk, int(UNINTERRUPTED_FLOPS / program.calls[0].flops)))
        self._eager = _in_order(calls)
        self._captures = plan == "graph"
        self.run = self._step if self._captures or self._resident else self._eager
        # graphs by the number of steps in them; none before the first step has loaded the kernels
        self._graphs: dict[int, Callable[[], object]] = {}
        self._warm = False

    def _step(self) -> None:
        self.run_many(1)

    def run_many(self, count: int) -> None:
        """``count`` steps one after another, where the rows are walked."""
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

    def set_rows(self, order: Array, first_batch: int, size: int) -> None:
        """The rows of an epoch, where they are walked, from batch ``first_batch`` on."""
        rows = self.arrays["rows"]
        count = min(len(order), len(rows))
        if count < len(rows) or order.dtype != np.int64:
            order = np.concatenate([order[:count], np.full(len(rows) - count, -1)], dtype=np.int64)
        self.backend.copy_into(rows, order[: len(rows)])
        counters = self.arrays["counters"]
        # behind the last batch the clock has gone back to the first
        offset = first_batch * size if first_batch * size < count else 0
        counters[ROW_STEP], counters[ROW_TOTAL], counters[ROW_OFFSET] = size, count, offset
        counters[ROW_COUNT] = min(size, count - offset)

    def set_row_count(self, count: int) -> None:
        """How many rows of the batch are valid; the others are padding."""
        self.arrays["counters"][ROW_COUNT] = count


def _in_order(calls: list[Callable[[], object]]) -> Callable[[], None]:
    steps = tuple(calls)

    def run() -> None:
        for step in steps:
            step()

    return run


def persistent_places(program: Program, layout: Layout) -> dict[str, tuple[str, int, int]]:
    """The memory of parameters, gradients and optimizer state, for the verifier."""
    ranges = {}
    for name, value in program.values.items():
        if value.kind not in ("parameter", "gradient", "state", "shadow"):
            continue
        short, _, state = name.partition(".")
        place = layout.places[short.removeprefix("d") if value.kind == "gradient" else short]
        ranges[name] = (state or value.kind, place.offset, place.offset + place.size)
    return ranges
