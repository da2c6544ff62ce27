"""A training step over several ranks: a rank's shards of the batch, a collective, the update of all or of a slice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from fusemlp.inputs.arrays import Array
from fusemlp.program.program import Call, Program, resolve
from fusemlp.program.sharding import ORDERED
from fusemlp.runtime.bound import BoundProgram
from fusemlp.runtime.memory import Memory, Workspace
from fusemlp.runtime.ranks import Ranks, tree_sum
from fusemlp_kernels.contract import BATCH_INDEX, LAST_LOSS, LOSS_SUM, STATS


class _Messages:
    """Rows of memory, each with gradients of ``size`` elements and then their statistics."""

    def __init__(self, memory: Memory, count: int, size: int) -> None:
        length = size * memory.real_bytes + 8 * STATS
        flat: Array = memory.backend.allocate(count * length, "bool")
        self.rows = flat.view(np.uint8).reshape(count, length)
        end = length - 8 * STATS
        self.grads: list[Array] = [row[:end].view(f"f{memory.real_bytes}") for row in self.rows]
        self.stats: list[Array] = [row[end:].view(np.float64) for row in self.rows]

    def add(self) -> tuple[Array, Array]:
        """Return the sums of the gradients and of the statistics, which take the place of the first."""
        return tree_sum(self.grads), tree_sum(self.stats)


class ShardedProgram(BoundProgram):
    """A step of this rank and the others: the calls before the first collective in one launch, then those after it.

    ``counters`` and ``rows`` are those of whole batches, alike on all ranks. So is the memory after a step, but for the
    optimizer's state and the gradients where each rank has its slice of them.
    """

    def __init__(
        self, program: Program, memory: Memory, workspace: Workspace, given: Mapping[str, Any], ranks: Ranks
    ) -> None:
        assert program.sharding is not None
        self._ranks, self._sharding, self._memory = ranks, program.sharding, memory
        self._scatters = program.sharding.slices and ranks.world > 1
        self._own = _Messages(memory, self._sharding.own, memory.layout.size)
        # of each rank its sum; with slices the sum of this rank's slice, and then the slices of an arena
        self._received = _Messages(memory, 0 if self._scatters else ranks.world, memory.slice_size)
        slices: Array = memory.backend.allocate(ranks.world * memory.slice_size * self._scatters, "real")
        self._slices, self._stats = slices, np.zeros((ranks.world, STATS))
        super().__init__(program, memory, workspace, given)
        self.chunk = max(1, self.chunk // self._sharding.own)

    def _bound(self, memory: Memory) -> tuple[Callable[..., object], ...]:
        program, backend = self.program, self.backend
        before = program.before_reduction
        rows = program.values["rows"].shape[0]
        shards = []
        for grads, stats in zip(self._own.grads, self._own.stats, strict=True):
            views = memory.layout.views(backend, grads)
            arrays = {**self.arrays, "stats": stats, **{f"d{name}": view for name, view in views.items()}}
            shards += [(call.op, resolve(call.operands, arrays.__getitem__)) for call in before]
        gradients = backend.bind(
            "train_resident",
            calls=shards,
            rows=self.arrays["rows"],
            batch=rows,
            arenas=memory.arenas,
            shards=self._sharding.firsts(self._ranks.rank, rows),
        )
        after = program.calls[len(before) :]
        self._every = after[0].operands["rule"].accumulate
        return gradients, self._reduce, *map(self._bound_after, after[1:])

    def _bound_after(self, call: Call) -> Callable[..., object]:
        """Return a call after the sum of the gradients."""
        operands = resolve(call.operands, self.arrays.__getitem__)
        if call.op == "all_gather":
            arenas = [operands[name] for name in ("params", "average", "grads") if name in operands]
            return partial(self._gather, arenas, ahead="grads" in operands)
        own = self._memory.own
        part = {"own": (own.start, own.stop)} if self._scatters else {}
        return self.backend.bind(call.op, **operands, **part)

    def _reduce(self) -> None:
        """Add the gradients and statistics of all shards, and hand them to the update, or those of the slice."""
        memory, ranks = self._memory, self._ranks
        into = memory.grads[memory.own]
        grads, stats = self._own.add()
        if self._scatters:
            slices = self._slices[: ranks.world * len(into)].reshape(ranks.world, -1)
            ranks.exchange(slices, grads, memory.slice_sizes, self._stats, stats)
            grads, stats = tree_sum(slices), tree_sum(self._stats)
        elif self._sharding.reduce == ORDERED and ranks.world > 1:
            ranks.all_gather(self._received.rows, self._own.rows[0])
            grads, stats = self._received.add()
        elif ranks.world > 1:
            ranks.add(grads, stats)
        if memory.counters[BATCH_INDEX] % self._every == 0:
            np.copyto(into, grads)
        else:
            into += grads
        memory.stats[LAST_LOSS] = stats[LAST_LOSS]
        memory.stats[LOSS_SUM:] += stats[LOSS_SUM:]
        for one in self._own.stats:
            one[:] = 0.0

    def _gather(self, arenas: list[Array], *, ahead: bool) -> None:
        """Make arenas whole beside an update, which is still to come if it is ``ahead``."""
        memory, ranks = self._memory, self._ranks
        if not self._scatters or (memory.counters[BATCH_INDEX] + ahead) % self._every:
            return
        size = memory.layout.size
        for arena in arenas:
            rows = self._slices.reshape(ranks.world, memory.slice_size)
            own = rows[ranks.rank]
            own[: memory.own.stop - memory.own.start] = arena[memory.own]
            ranks.all_gather(rows, own)
            arena[:] = self._slices[:size]

    def run_many(self, count: int) -> None:
        """``count`` steps one after another."""
        for _ in range(count):
            self._eager()
