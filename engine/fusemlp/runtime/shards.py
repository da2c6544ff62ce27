"""A training step over several ranks: a rank's shards of the batch, a collective, the update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from fusemlp.inputs.arrays import Array
from fusemlp.program.program import ORDERED, Call, Program, Sharding, resolve
from fusemlp.runtime.memory import Memory
from fusemlp.runtime.programs import BoundProgram
from fusemlp.runtime.ranks import Ranks, tree_sum
from fusemlp_kernels import contract
from fusemlp_kernels.contract import Backend

# Bytes of a message before its gradients, and of which its length is a multiple: gradients are aligned.
HEAD, UNIT = 64, 256
# More layers than a network has.
LAYERS = 1 << 12
# Elements of int64 of which rows in memory have a multiple.
PITCH = 16


class _Messages:
    """Rows (count, length) of memory, each with statistics in float64 and then gradients of ``size`` elements."""

    def __init__(self, memory: Memory, count: int, size: int) -> None:
        head, unit = HEAD // memory.real_bytes, UNIT // memory.real_bytes
        length = -(-(head + size) // unit) * unit
        # of the type of the gradients: to kernels a view as another type is memory that they do not know
        self.rows: Array = memory.backend.allocate(count * length, "real").reshape(count, length)
        self.heads = self.rows[:, :head]
        self.grads: list[Array] = [row[head : head + size] for row in self.rows]
        self.stats: list[Array] = [row.view(memory.stats.dtype)[: contract.STATS] for row in self.heads]

    def add(self) -> tuple[Array, Array]:
        """Return the sums of the gradients and of the statistics, which take the place of the first."""
        return tree_sum(self.grads), tree_sum(self.stats)


class ShardedProgram(BoundProgram):
    """A step of this rank and the others: the calls before the collective for its shards, then the update.

    The arguments after ``ranks`` are those of ``BoundProgram``. ``counters`` and ``rows`` are those of whole batches,
    alike on all ranks. So is the memory after a step. On the host the calls of all shards are one launch; on a device
    each shard has its own.
    """

    def __init__(self, ranks: Ranks, program: Program, *placed: Any, plan: str) -> None:
        self._ranks, self._sharding = ranks, program.sharding
        super().__init__(program, *placed, plan=plan)
        if self._resident:
            self.chunk = max(1, self.chunk // self._sharding.own)
        ranks.programs.add(self)

    def _bound(self, memory: Memory) -> tuple[Callable[..., object], ...]:
        program, backend = self.program, self.backend
        before = program.before_reduction
        size = program.values["rows"].shape[0]
        firsts = self._sharding.firsts(self._ranks.rank, size)
        collect, update = program.calls[len(before) :]
        # on a device a shard's gradients are those of its own mean, and so are those of a function
        means = any("loss" in call.operands and call.operands["loss"].reduction != "sum" for call in before)
        weighs = program.calls_back or (means and not backend.traits.on_host)
        sums = _Sums(memory, self._ranks, self._sharding, collect.operands["rule"].accumulate, weighs=weighs)
        shards = [memory.layout.views(backend, grads) for grads in sums.own.grads]
        arrays = [
            {**self.arrays, "stats": stats, **{f"d{name}": view for name, view in views.items()}}
            for views, stats in zip(shards, sums.own.stats, strict=True)
        ]
        gradients: tuple[Callable[..., object], ...]
        if backend.traits.on_host:
            gradients = (self._loop(memory, before, arrays, firsts),)
        else:
            parts = _Parts(backend, self.arrays["counters"], self.arrays["rows"], firsts, size)
            gradients = (sums.clear, parts.take, *self._launches(before, arrays, parts))
        return *gradients, sums.add, backend.bind(update.op, **resolve(update.operands, self.arrays.__getitem__))

    def _loop(
        self, memory: Memory, calls: tuple[Call, ...], arrays: list[dict[str, Any]], firsts: tuple[int, ...]
    ) -> Callable[..., object]:
        """Return the calls of all shards, as one launch."""
        return self.backend.bind(
            "train_resident",
            calls=[(call.op, resolve(call.operands, one.__getitem__)) for one in arrays for call in calls],
            rows=self.arrays["rows"],
            batch=self.program.values["rows"].shape[0],
            arenas=memory.arenas,
            shards=firsts,
        )

    def _launches(
        self, calls: tuple[Call, ...], arrays: list[dict[str, Any]], parts: _Parts
    ) -> list[Callable[..., object]]:
        """Return the calls of one shard after another."""
        runs, first = [], self._ranks.rank * self._sharding.own
        for place, one in enumerate(arrays):
            own = {**one, "rows": parts.rows[place], "counters": parts.counters[place]}
            for call in calls:
                operands = resolve(call.operands, own.__getitem__)
                dropout = operands.get("dropout")
                if dropout is not None:
                    # kernels count the rows of a mask from 0, so each shard of the batch has another layer's mask
                    operands["dropout"] = replace(dropout, layer=dropout.layer + LAYERS * (first + place))
                runs.append(self.backend.bind(call.op, **operands))
        return runs

    def run_many(self, count: int) -> None:
        """``count`` steps one after another."""
        if not self._resident:
            super().run_many(count)
            return
        for _ in range(count):
            self._eager()


class _Sums:
    """The gradients and statistics of a rank's shards, and their way into the memory of all ranks.

    ``every``: the batches of an update. ``weighs``: the gradients of a shard are those of the mean over its own rows,
    and become those of the mean over all: sum(n_s g_s) / sum(n_s), n being the normaliser of the loss.
    """

    def __init__(self, memory: Memory, ranks: Ranks, sharding: Sharding, every: int, *, weighs: bool) -> None:
        self._memory, self._ranks = memory, ranks
        self._every, self._weighs, self._on_host = every, weighs, memory.backend.traits.on_host
        self.own = _Messages(memory, sharding.own, memory.layout.size)
        # of each rank its sum
        collects = sharding.reduce == ORDERED and ranks.world > 1
        self._received = _Messages(memory, ranks.world if collects else 0, memory.layout.size)

    def clear(self) -> None:
        """Begin the statistics of the shards anew."""
        self.own.heads[:] = 0.0

    # NumPy would warn of what overflows
    @np.errstate(all="ignore")
    def add(self) -> None:
        """Add the gradients and statistics of all shards, and hand them to the update."""
        memory, ranks, into = self._memory, self._ranks, self._memory.grads
        if self._weighs:
            for gradients, counted in zip(self.own.grads, self.own.stats, strict=True):
                gradients *= counted[contract.NORM_SUM]
        grads, stats = self.own.add()
        if self._received.grads:
            ranks.all_gather(self._received.rows, self.own.rows[0])
            grads, stats = self._received.add()
        elif ranks.world > 1:
            ranks.add(grads, stats)
        if self._weighs:
            # where no row counts, the gradient is 0
            count = stats[contract.NORM_SUM] + (stats[contract.NORM_SUM] == 0.0)
            grads /= count
            stats[contract.LAST_LOSS] = stats[contract.LOSS_SUM] / count
        if self._on_host and memory.counters[contract.BATCH_INDEX] % self._every != 0:
            into += grads
        elif self._on_host or self._every == 1:
            into[:] = grads
        else:
            # the host does not know the number of the batch
            into.masked_fill_(memory.counters[contract.BATCH_INDEX] % self._every == 0, 0.0)
            into += grads
        memory.stats[contract.LAST_LOSS] = stats[contract.LAST_LOSS]
        totals = memory.stats[contract.LOSS_SUM :]
        totals += stats[contract.LOSS_SUM :]
        if self._on_host:
            self.clear()


class _Parts:
    """The rows of a batch that each of a rank's shards has, on a device: ``rows`` (shards, size) int64, -1 after the
    last, and ``counters`` (shards, COUNTERS) for its calls. A shard begins with its row of ``firsts`` of the batch.
    """

    def __init__(self, backend: Backend, counters: Any, rows: Any, firsts: tuple[int, ...], size: int) -> None:
        self._batch_counters, self._batch_rows, self._size = counters, rows, size

        def table(columns: int) -> Any:
            pitch = -(-columns // PITCH) * PITCH
            return backend.view(backend.allocate(len(firsts) * pitch, "int64"), 0, (len(firsts), columns), pitch)

        self.rows, self.counters = table(size), table(contract.COUNTERS)
        self._starts = backend.from_host(np.array(firsts, np.int64))
        self._places, places = table(size), np.add.outer(np.array(firsts), np.arange(size))
        backend.copy_into(self._places, places)

    def take(self) -> None:
        """Take the batch that begins at counters[ROW_OFFSET]."""
        counters, rows = self._batch_counters, self._batch_rows
        count = counters[contract.ROW_COUNT]
        at = (self._places + counters[contract.ROW_OFFSET]).clamp_(max=len(rows) - 1)
        self.rows.copy_(rows.take(at).masked_fill_(self._places >= count, -1))
        self.counters[:, contract.BATCH_INDEX].copy_(counters[contract.BATCH_INDEX])
        self.counters[:, contract.ROW_COUNT].copy_((count - self._starts).clamp_(0, self._size))
