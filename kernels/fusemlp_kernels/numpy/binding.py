"""Binding one call, or those of a training step: their table for the compiled loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.numpy import attacks, calls, members
from fusemlp_kernels.numpy.calls import Operands, penalty
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.tables import Array, Form, Run, Table
from fusemlp_kernels.ops import OPS

ENTRIES: dict[str, Callable[..., int]] = {**calls.ENTRIES, **attacks.ENTRIES, **members.ENTRIES}


def bind_call(real: Any, op: str, operands: Operands) -> Run:
    """A call by itself."""
    table = Table(real)
    return table.bind(ENTRIES[op](table, **table.operands(operands, OPS[op].by_name)))


def bind_calls(real: Any, calls: Sequence[tuple[str, Operands]], arrays: Sequence[Array | None]) -> Run:
    """Calls on one batch as one launch: ``Table.bind_moving``."""
    table = Table(real)
    counts = [ENTRIES[op](table, **table.operands(operands, OPS[op].by_name)) for op, operands in calls]
    return table.bind_moving(counts[-1], arrays)


def bind_train_resident(
    real: Any,
    *,
    calls: Sequence[tuple[str, Operands]],
    rows: Array | None,
    batch: int,
    arenas: Mapping[str, Array],
    epoch_stats: Array | None = None,
    arrays: Mapping[str, Array] | None = None,
    memo: dict[str, Any] | None = None,
    shards: Sequence[int] = (),
) -> Run:
    """The contract's ``train_resident``; the calls have all that lies in ``arenas``, and ``rows``."""
    del arenas, rows
    run: Run | None
    if memo and arrays is not None:
        run = memo["form"].bind(arrays, epoch_stats)
        if run is not None:
            return run
    counted = ("linear_loss_grad", "loss_grad")
    losses = [operands for op, operands in calls if op in counted and operands.get("stats") is not None]
    output = next(iter(losses), None)
    if output is None or "rule" not in calls[-1][1]:
        raise ArgumentError(
            "train_resident: calls: expected those of a training step, with a loss and last what advances "
            f"the clock, got {', '.join(op for op, _ in calls)}"
        )
    table = Table(real, shards=len(shards), shard_rows=batch)
    for at, (op, operands) in enumerate(calls):
        table.shard = shards[at * len(shards) // len(calls)] if shards else 0
        enter = penalty if op == "penalty" else ENTRIES[op]
        enter(table, **table.operands(operands, OPS[op].by_name))
    table.control(output["counters"], output["stats"])
    if epoch_stats is not None:
        table.enter(t.AT_EPOCH_STATS, epoch_stats)
        table.integers[t.EPOCHS] = len(epoch_stats)
    run = table.bind(t.COUNTED, alone=True)
    # an array with two names may be two arrays in the next model
    distinct = arrays is not None and len({id(array) for array in arrays.values()}) == len(arrays)
    if memo is not None and arrays is not None and distinct and not table.converts:
        memo["form"] = Form(table, arrays)
    return run
