"""Steps on batches that the caller brings: each is copied into a program with a batch of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusemlp.describe.conflicts import check_together
from fusemlp.runtime.binding import bind_staged
from fusemlp.runtime.bound import BoundProgram
from fusemlp_kernels.contract import (
    LAST_LOSS,
    LOSS_SCALE,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_STEP,
    SKIPPED_IN_A_ROW,
    SKIPPED_LIMIT,
)
from fusemlp_kernels.errors import DivergenceError, ShapeError

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session

# Steps between two checks of the loss scaling in ``step``: a check waits for the device.
SCALING_CHECKS = 32


def step(engine: Session, x: Any, y: Any, sample_weight: Any = None) -> Any:
    """Make one update from 1 to ``batch_size`` rows; see ``Engine.step``."""
    programs = engine.programs
    if not programs.staged:
        check_together({**engine.uses, "step": True})
    x = engine.inputs.features("x", x, check_finite=False)
    count = len(x)
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
    kind = targets.soft, weight is not None
    if kind not in programs.staged:
        spec = engine.loss.spec(accuracy=False, soft=targets.soft)
        programs.staged[kind] = bind_staged(engine, engine.batch_size, spec, weighted=weight is not None)
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
    return engine.memory.backend.scalar(bound.arrays["stats"], LAST_LOSS)


def run_staged(engine: Session, bound: BoundProgram, x: Any, target: Any, weight: Any | None) -> None:
    """Copy checked rows into a program that has a batch of its own, as many as it holds or fewer, and run it."""
    copy, arrays, count = engine.memory.backend.copy_into, bound.arrays, len(x)
    short, counters = count < len(arrays["x"]), arrays["counters"]
    counters[ROW_STEP], counters[ROW_COUNT] = 0, count * engine.network.members
    for name, array in (("x", x), ("target", target), ("weight", weight)):
        if array is not None:
            copy(arrays[name][:count], array)
            if short:
                arrays[name][count:] = 0
    if "rows" not in arrays:
        bound.run()
        return
    # rows that a fit walks through: it goes on where it was
    before = counters[ROW_OFFSET] + 0
    counters[ROW_OFFSET] = 0
    try:
        bound.run()
    finally:
        counters[ROW_OFFSET] = before


def check_scaling(engine: Session, counters: Any, hyper: Any) -> None:
    """Raise DivergenceError if the gradients overflow at every loss scale, by these counters and hyper."""
    engine.programs.unchecked_steps = 0
    skipped = int(counters[SKIPPED_IN_A_ROW])
    if skipped >= SKIPPED_LIMIT:
        raise DivergenceError(
            f"loss: the gradients overflowed in {skipped} batches in a row, down to a loss scale of "
            f"{float(hyper[LOSS_SCALE]):.3g}; lower the learning rate, scale the features, or use "
            "precision='bf16' or 'fp32'"
        )
