"""A training step over several ranks: a rank's shards of the batch, one collective, the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fusemlp.inputs.arrays import Array
from fusemlp.program.program import Program, resolve
from fusemlp.program.sharding import ORDERED
from fusemlp.runtime.bound import BoundProgram
from fusemlp.runtime.memory import Memory, Workspace
from fusemlp.runtime.ranks import Ranks, tree_sum
from fusemlp_kernels.contract import BATCH_INDEX, LAST_LOSS, LOSS_SUM, STATS, Backend


class _Message:
    """The gradients of a shard, or of several, and then their statistics, in one stretch of memory."""

    def __init__(self, data: Array, size: int, item_bytes: int) -> None:
        self.data = data
        self.grads: Array = data[: size * item_bytes].view(f"f{item_bytes}")
        self.stats: Array = data[size * item_bytes :].view(np.float64)


class ShardedProgram(BoundProgram):
    """A step of this rank and the others: the calls before ``all_reduce`` in one launch, the collective, the update.

    ``counters`` and ``rows`` are those of whole batches, alike on all ranks, and so is the memory after a step.
    """

    def __init__(
        self, program: Program, memory: Memory, workspace: Workspace, given: Mapping[str, Any], ranks: Ranks
    ) -> None:
        assert program.sharding is not None
        self._ranks, self._sharding = ranks, program.sharding
        size, item_bytes = memory.layout.size, memory.real_bytes
        length = size * item_bytes + 8 * STATS
        self._own = [_Message(_bytes(memory.backend, length), size, item_bytes) for _ in range(self._sharding.own)]
        # one a rank
        self._received = _bytes(memory.backend, ranks.world * length).reshape(ranks.world, length)
        self._parts = [_Message(row, size, item_bytes) for row in self._received]
        super().__init__(program, memory, workspace, given)
        self.chunk = max(1, self.chunk // self._sharding.own)

    def _bound(self, memory: Memory) -> tuple[Callable[..., object], ...]:
        program, backend = self.program, self.backend
        before = program.before_reduction
        rows = program.values["rows"].shape[0]
        shards = []
        for message in self._own:
            views = memory.layout.views(backend, message.grads)
            own = {"stats": message.stats, **{f"d{name}": view for name, view in views.items()}}
            arrays = {**self.arrays, **own}
            shards += [(call.op, resolve(call.operands, arrays.__getitem__)) for call in before]
        gradients = backend.bind(
            "train_resident",
            calls=shards,
            rows=self.arrays["rows"],
            batch=rows,
            arenas=memory.arenas,
            shards=self._sharding.firsts(self._ranks.rank, rows),
        )
        reduction, update = program.calls[len(before) :]
        self._every = reduction.operands["rule"].accumulate
        self._memory = memory
        return gradients, self._reduce, backend.bind(update.op, **resolve(update.operands, self.arrays.__getitem__))

    def _reduce(self) -> None:
        """Add the gradients and statistics of all shards, and hand them to the update."""
        memory, ranks = self._memory, self._ranks
        tree_sum([message.grads for message in self._own])
        tree_sum([message.stats for message in self._own])
        found = self._own[0]
        if self._sharding.reduce == ORDERED and ranks.world > 1:
            ranks.all_gather(self._received, found.data)
            tree_sum([message.grads for message in self._parts])
            tree_sum([message.stats for message in self._parts])
            found = self._parts[0]
        elif ranks.world > 1:
            ranks.add(found.grads, found.stats)
        if memory.counters[BATCH_INDEX] % self._every == 0:
            np.copyto(memory.grads, found.grads)
        else:
            memory.grads += found.grads
        memory.stats[LAST_LOSS] = found.stats[LAST_LOSS]
        memory.stats[LOSS_SUM:] += found.stats[LOSS_SUM:]
        for message in self._own:
            message.stats[:] = 0.0

    def run_many(self, count: int) -> None:
        """``count`` steps one after another."""
        for _ in range(count):
            self._eager()


def _bytes(backend: Backend, count: int) -> Array:
    memory: Array = backend.allocate(count, "bool").view(np.uint8)
    return memory
