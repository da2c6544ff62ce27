"""Steps on batches that the caller brings: each is copied into a program with a batch of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusemlp.describe.conflicts import check_together
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
    """One update from 1 to ``batch_size`` rows: x (m, K), y as in ``fit``, sample_weight (m,).

    Arrays on the device are read in place; checking their labels waits for it (``fit`` checks them once).

    Returns the loss before the update as a 0-d array of its own (on a GPU a torch tensor); reading it is what
    waits for the device.
    Raises ShapeError, DTypeError or DataError, before anything has changed; ArgumentError if the inputs shall be
    normalised and have not been measured.
    """
    if not engine._staged:
        check_together({**engine.uses, "step": True})
    x = engine.features("x", x, check_finite=False)
    count = len(x)
    if count > engine.batch_size:
        raise ShapeError(
            f"x: expected 1 to {engine.batch_size} rows (batch_size), got {count}; "
            "make the engine with a larger batch_size, or use fit"
        )
    targets = engine.targets("y", y, rows=count)
    weight = engine.weights("sample_weight", sample_weight, rows=count)
    if engine._stepping is None or engine._stepping[0] is not engine.optimizer:
        engine._stepping = engine.optimizer, engine.optimizer.schedule.over(None)
        engine._staged.clear()
    if not engine._staged and not engine.epochs_trained:
        engine.check_measured()
        engine.warn_of_scale("x", x, stacklevel=3)
    kind = targets.soft, weight is not None
    if kind not in engine._staged:
        spec = engine.loss.spec(accuracy=False, soft=targets.soft)
        engine._staged[kind] = engine.bind_staged(engine.batch_size, spec, weighted=weight is not None)
    bound = engine._staged[kind]
    try:
        engine.rates.cover(engine._stepping[1], 1)
        engine.run_staged(bound, engine.normalised(x), targets.values, weight)
    except BaseException:
        # Ctrl-C too: only the device knows whether there was an update
        engine.rates.forget()
        raise
    if engine._scaled:
        engine._unchecked_steps += 1
        if engine._unchecked_steps == SCALING_CHECKS:
            # waits for the device
            engine.check_scaling(engine.memory.counters, engine.memory.hyper)
    return engine._backend.scalar(bound.arrays["stats"], LAST_LOSS)


def run_staged(engine: Session, bound: BoundProgram, x: Any, target: Any, weight: Any | None) -> None:
    """Copy checked rows into a program that has a batch of its own, as many as it holds or fewer, and run it."""
    copy, arrays, count = engine._backend.copy_into, bound.arrays, len(x)
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
    engine._unchecked_steps = 0
    skipped = int(counters[SKIPPED_IN_A_ROW])
    if skipped >= SKIPPED_LIMIT:
        raise DivergenceError(
            f"loss: the gradients overflowed in {skipped} batches in a row, down to a loss scale of "
            f"{float(hyper[LOSS_SCALE]):.3g}; lower the learning rate, scale the features, or use "
            "precision='bf16' or 'fp32'"
        )
