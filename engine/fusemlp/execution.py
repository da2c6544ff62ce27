"""How a program runs: its memory on a backend, its calls bound to that memory, and the choice of the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from fusemlp.buffers import allocate, parameter_layout
from fusemlp.network import MLP
from fusemlp.placement import placement
from fusemlp.program import Program, resolve
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
    resident_refusal,
    step_flops,
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
COMPILED_UNINTERRUPTED = 4096
UNINTERRUPTED_FLOPS = 2e9
# What the calls of a step take that nothing compiles, as so many operations.
CALLS_FLOPS = 3e5
# On a GPU: how long a launch of many steps may take; the least that a step takes, and what one multiprocessor computes
# in a second. The last two are estimates, not yet measured on a GPU.
LAUNCH_SECONDS = 0.05
STEP_SECONDS = 5e-6
PROCESSOR_FLOPS = 1e11
COMPILED_LOOP = "with numba (pip install 'fusemlp[cpu]') fit runs its steps in one compiled loop, plan='resident'"


def open_backend(name: str, device: str | None, precision: str) -> Backend:
    """A backend for those above that may not know the registry; see ``fusemlp_kernels.registry.backend``."""
    return backend(name, device, precision)


def one_blas_thread() -> AbstractContextManager[None]:
    """While a thread that has a core computes for the numpy backend: the limits of ``threadpool_limits`` are not those
    of every library in other threads than the one which sets them."""
    from fusemlp_kernels.numpy.libraries import one_thread_here

    return one_thread_here()


def row_order(backend_name: str, plan: str, n: int, seed: int, epoch: int) -> Array:
    """The order of the rows in an epoch, (n,) int64: the same for all, and compiled where numba compiles the plan."""
    if backend_name == "numpy" and plan == "resident":
        from fusemlp_kernels.numpy.resident import row_order as compiled

        return compiled(n, seed, epoch)
    return shuffled_rows(n, seed, epoch)


def choose_plan(
    plan: str, traits: Traits, sizes: Sequence[int], batch: int, precision: str, models: int = 1
) -> tuple[str, str]:
    """The plan that ``plan`` ("auto" or a name) comes to on a backend, for ``models`` models with these widths that
    train at once, and why.

    Raises ArgumentError for an unknown name, BackendUnavailableError for a plan that the backend does not have, or not
    for such a network.
    """
    if plan not in ("auto", *PLANS):
        raise unknown_name("plan", plan, ["auto", *PLANS])
    missing = f"; {COMPILED_LOOP}" if traits.name == "numpy" and "resident" not in traits.plans else ""
    refusal = resident_refusal(traits, sizes, batch, precision)
    if plan == "auto":
        return _quickest(traits, missing, refusal, step_flops(sizes, batch), models)
    if plan not in traits.plans:
        hint = missing if plan == "resident" and missing else "; use plan='auto'"
        raise BackendUnavailableError(
            f"plan: the {traits.name} backend has {', '.join(traits.plans)}, got {plan!r}{hint}"
        )
    if plan == "resident" and refusal is not None:
        raise BackendUnavailableError(f"plan: {refusal}; use plan='auto'")
    return plan, "asked for"


def _quickest(traits: Traits, missing: str, refusal: str | None, flops: int, models: int) -> tuple[str, str]:
    best = traits.plans[-1]
    if best == "eager":
        return best, f"the {traits.name} backend starts its calls one after another{missing}"
    if traits.name == "numpy":
        return best, "fit runs its steps in a loop that numba has compiled"
    if best != "resident" or traits.resident is None:
        return best, f"the quickest plan of the {traits.name} backend"
    if refusal is not None:
        return traits.plans[-2], refusal
    together = "" if models == 1 else f" and {models} models"
    if flops > traits.resident.flops * models:
        return traits.plans[-2], (
            f"a step of {flops / 1e6:.3g} million operations{together} is too much for the resident kernel, which has "
            f"a multiprocessor a model: estimated to pay up to {traits.resident.flops * models / 1e6:.3g} million"
        )
    return best, f"a step of {flops / 1e6:.3g} million operations{together}: fit runs many steps in one launch"


def new_arenas(
    backend: Backend, size: int, state_count: int, *, mixed: bool = False, gradient_parts: int = 1, models: int = 1
) -> dict[str, Any]:
    """Flat zeroed arrays for what ``models`` models keep between steps, one model's behind the other's; ``size`` is
    that of a model's parameters in elements."""
    sizes = {"params": (size, "real"), "grads": (size * gradient_parts, "real")}
    sizes |= {f"state{index}": (size, "real") for index in range(state_count)}
    sizes |= {"counters": (COUNTERS, "int64"), "hyper": (HYPER, "float64"), "stats": (STATS, "float64")}
    if mixed:
        sizes["shadow"] = size, "compute"
    try:
        return {name: backend.allocate(count * models, dtype) for name, (count, dtype) in sizes.items()}
    except MemoryError as error:
        parameters = f"{size:,} parameters" + (f" of each of {models} models" if models > 1 else "")
        raise MemoryError(
            f"net: there is no room for {parameters}, their gradients and the optimizer's state; make layers narrower "
            f"({error})"
        ) from error


class Memory:
    """What an engine keeps between steps: parameters, gradients, optimizer state, counters, all on the device.

    ``arenas``: its arrays, those of ``new_arenas`` by default.
    """

    def __init__(
        self,
        net: MLP,
        backend: Backend,
        state_count: int,
        *,
        item_bytes: int,
        mixed: bool = False,
        gradient_parts: int = 1,
        arenas: Mapping[str, Any] | None = None,
    ) -> None:
        self.backend = backend
        self.layout = parameter_layout(net, row_multiple=backend.traits.row_multiple, item_bytes=item_bytes)
        # the parts of a batch have their gradients behind one another
        self.gradient_parts = gradient_parts
        given = arenas
        if given is None:
            given = new_arenas(backend, self.layout.size, state_count, mixed=mixed, gradient_parts=gradient_parts)
        self.params = given["params"]
        self.grads = given["grads"][: self.layout.size]
        self.states = tuple(given[f"state{index}"] for index in range(state_count))
        self.counters = given["counters"]
        self.hyper = given["hyper"]
        self.stats = given["stats"]
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
        self.shadow = given["shadow"] if mixed else None
        if mixed:
            self.arrays["shadow"] = self.shadow
            for name, view in self.layout.views(backend, self.shadow).items():
                self.arrays[f"{name}.shadow"] = view

    def refresh_shadow(self) -> None:
        """Round the parameters into the shadow, after they were written from outside a step."""
        if self.shadow is not None:
            self.backend.copy_into(self.shadow, self.backend.to_host(self.params))


def resident_chunk(traits: Traits, flops: int) -> int:
    """How many steps of so many operations the resident plan takes at a time: a launch of a tenth of a second or less,
    that neither the display nor Ctrl-C waits for."""
    if traits.name == "numpy":
        return max(1, min(COMPILED_UNINTERRUPTED, int(UNINTERRUPTED_FLOPS / flops)))
    return max(1, int(LAUNCH_SECONDS / (STEP_SECONDS + flops / PROCESSOR_FLOPS)))


def fleet_chunk(traits: Traits, flops: int, models: int) -> int:
    """As ``resident_chunk`` for a launch of ``models`` models; on the host one computes after the other."""
    if traits.name == "numpy":
        return max(1, int(UNINTERRUPTED_FLOPS / (max(flops, CALLS_FLOPS) * models)))
    return resident_chunk(traits, flops)


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
        placed = placement(program, memory.layout, row_multiple=backend.traits.row_multiple)
        self.program = program
        self.backend = backend
        self.arrays: dict[str, Any] = {**memory.arrays, **given}
        arenas = {dtype: workspace.arena(dtype, size) for dtype, size in placed.sizes.items()}
        for name, (dtype, place) in placed.places.items():
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
            self.chunk = resident_chunk(backend.traits, program.calls[0].flops)
        self._eager = _in_order(calls)
        self._captures = plan == "graph"
        # graphs by the number of steps in them; none before the first step has loaded the kernels
        self._graphs: dict[int, Callable[[], object]] = {}
        self._warm = False

    @property
    def run(self) -> Callable[[], None]:
        """A step. The method is not kept: in a ring with it, the program and its memory would outlive their use."""
        return self._step if self._captures or self._resident else self._eager

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

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """See ``walk_rows``."""
        walk_rows(self.backend, self.arrays, order, first_batch, size, epochs)

    def set_row_count(self, count: int) -> None:
        """How many rows of the batch are valid; the others are padding."""
        self.arrays["counters"][ROW_COUNT] = count


def walk_rows(
    backend: Backend, arrays: Mapping[str, Any], order: Array, first_batch: int, size: int, epochs: int = 1
) -> None:
    """Write the rows of ``epochs`` epochs of one length into the arrays ``rows`` and ``counters``, where they are
    walked, from batch ``first_batch`` of ``size`` rows of the first on."""
    rows, counters = arrays["rows"], arrays["counters"]
    given = min(len(order), len(rows))
    count = given // epochs
    backend.copy_into(rows[:given], np.asarray(order[:given], np.int64))
    rows[given:] = -1
    # behind the last batch the clock has gone back to the first
    offset = first_batch * size if first_batch * size < count else 0
    counters[ROW_STEP], counters[ROW_TOTAL], counters[ROW_OFFSET] = size, count, offset
    counters[ROW_COUNT] = min(size, count - offset)


def _in_order(calls: list[Callable[[], object]]) -> Callable[[], None]:
    steps = tuple(calls)

    def run() -> None:
        for step in steps:
            step()

    return run
