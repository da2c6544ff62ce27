"""The memory of an engine: the allocator's count, the engine's own account, and the minimum; for ``bench.overhead``."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.cases import Case, make_data
from bench.report import Record
from bench.study import COLOURS

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


def bars(axes: Any, lines: Sequence[Record]) -> None:
    """Draw the peak of a fit over the minimum, and the parts of the minimum."""
    parts = ("parameters", "state", "values of a step", "data")
    for place, line in enumerate(lines):
        total, start = sum(line["least"].values()), 0.0
        axes.barh(place, line["peak"] / total, color="#D9D9D9", height=0.72,
                  label="most during fit, counted" if place == 0 else None)  # fmt: skip
        for number, part in enumerate(parts):
            share = line["least"][part] / total
            if share:
                axes.barh(place, share, left=start, color=COLOURS[number], height=0.36,
                          label=f"must be held: {part}" if place == 0 else None)  # fmt: skip
            start += share
        axes.text(line["peak"] / total + 0.03, place, f"{line['peak'] / 1e6:.3g} MB", va="center", fontsize=8)
    ratios = [line["peak"] / sum(line["least"].values()) for line in lines]
    axes.set_yticks(
        range(len(lines)), [f"{line['case']}\n{line['backend']} {line['plan']}" for line in lines], fontsize=8
    )
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlim(0, 1.25 * max(ratios))
    axes.grid(False, axis="y")
    axes.set_xlabel("times what must be held")
    axes.set_title(
        f"Training takes {min(ratios):.2g} to {max(ratios):.2g} times the memory that\n"
        f"it must hold ({lines[0]['optimizer']})",
        fontsize=10, loc="left",
    )  # fmt: skip
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.4, -0.12), ncols=2, frameon=False)
