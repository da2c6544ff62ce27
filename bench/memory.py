"""The memory of an engine: the allocator's count, the engine's own account, and the minimum; for ``bench.overhead``."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bench.cases import Case, make_data
from bench.report import Record

if TYPE_CHECKING:
    from fusemlp import Engine


class Allocator:
    """The count of a backend's allocator: torch's or CuPy's on a card, else the process's, by ``tracemalloc``."""

    def __init__(self, backend: Any) -> None:
        self._library = "host" if backend.device == "cpu" else backend.traits.name

    def __enter__(self) -> Allocator:
        if self._library == "host":
            tracemalloc.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._library == "host":
            tracemalloc.stop()

    def held(self) -> int:
        """Return the bytes that are allocated now."""
        gc.collect()
        if self._library == "host":
            return tracemalloc.get_traced_memory()[0]
        if self._library == "triton":
            import torch

            return int(torch.cuda.memory_allocated())
        import cupy

        return int(cupy.get_default_memory_pool().used_bytes())

    def peak_of(self, run: Callable[[], object]) -> int:
        """Run a function and return the peak of allocated bytes; with CuPy, the bytes allocated afterwards."""
        if self._library == "host":
            tracemalloc.reset_peak()
            run()
            return tracemalloc.get_traced_memory()[1]
        if self._library == "triton":
            import torch

            torch.cuda.reset_peak_memory_stats()
            run()
            return int(torch.cuda.max_memory_allocated())
        run()
        return self.held()


def memory(case: Case, plan: str, options: Mapping[str, Any]) -> Record:
    """Return bytes: of an engine, the peak of a fit, the engine's own account, and the minimum."""
    from fusemlp import MLP, Engine

    data = make_data(case)

    def made() -> Engine:
        return Engine(MLP(case.sizes), batch_size=case.batch_size, plan=plan, **options)

    # Exclude what a process loads once.
    first = made()
    first.fit(data.X, data.y, epochs=1)
    backend = first.memory.backend
    del first
    with Allocator(backend) as allocator:
        before = allocator.held()
        engine = made()
        built = allocator.held() - before
        peak = allocator.peak_of(lambda: engine.fit(data.X, data.y, epochs=1)) - before
    return {
        "row": "memory",
        "case": case.name,
        "backend": engine.backend,
        "plan": plan,
        "optimizer": type(engine.optimizer).__name__,
        "built": built,
        "peak": peak,
        "account": account(engine),
        "least": least(engine, data_bytes=0 if engine.device == "cpu" else data.X.nbytes + data.y.nbytes),
    }


def account(engine: Engine) -> dict[str, int]:
    """Return the bytes that a new engine allocates: parameters, gradients, optimizer state, the 16-bit shadow."""
    store = engine.memory
    size, item = store.layout.size, store.params.itemsize
    found = {
        "parameters": size * item,
        "gradients": size * item * store.gradient_parts,
        "state": size * item * len(store.states),
    }
    return found if store.shadow is None else found | {"shadow": size * store.shadow.itemsize}


def least(engine: Engine, *, data_bytes: int) -> dict[str, int]:
    """Return the minimum of bytes for a training: parameters and optimizer state without gaps, data that is copied, and
    the live values of a step.
    """
    from fusemlp.program.verifier import lifetimes

    program = engine.program
    real = program.item_bytes("real")
    parameters = engine.network.parameter_count * real
    spans = {name: span for name, span in lifetimes(program).items() if program.values[name].kind == "work"}
    alive = [
        sum(program.bytes_of(name) for name, (start, stop) in spans.items() if start <= index <= stop)
        for index in range(len(program.calls))
    ]
    return {
        "parameters": parameters,
        "state": parameters * len(engine.memory.states),
        "values of a step": max(alive),
        "data": data_bytes,
    }
