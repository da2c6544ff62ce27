"""The cut of a batch into shards whose gradients are added over several processes, the ranks.

With ``ordered`` a batch has 8 shards on any number of ranks, and their gradients are added in one fixed binary tree:
((0+1)+(2+3)) + ((4+5)+(6+7)). A rank has 1, 2, 4 or 8 neighbours of the 8, so the lower part of the tree is its own,
and it sends one sum. A shard is computed alike wherever it is. So the bits do not depend on the number of ranks.
With ``fast`` each rank has one shard, and the collective adds in the order that it likes.
"""

from __future__ import annotations

from typing import NamedTuple

from fusemlp.describe.checks import check_choice
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError

ORDERED, FAST = "ordered", "fast"
REDUCTIONS = (ORDERED, FAST)
# The shards of an ordered sum.
SHARDS = 8


class Sharding(NamedTuple):
    """A batch over ``world`` ranks; ``reduce`` is a name of REDUCTIONS."""

    reduce: str
    world: int

    def check(self) -> Sharding:
        """Return this; raises ArgumentError for an unknown name, or a number of ranks that has no ordered sum."""
        check_choice("reduce", self.reduce, REDUCTIONS)
        if self.reduce == ORDERED and SHARDS % self.world:
            raise ArgumentError(
                f"reduce: 'ordered' adds {SHARDS} shards of the batch in one tree, on 1, 2, 4 or 8 ranks, and there "
                f"are {self.world}; start another number of processes, or give reduce='fast'"
            )
        return self

    @property
    def shards(self) -> int:
        """The shards of a batch."""
        return SHARDS if self.reduce == ORDERED else self.world

    @property
    def own(self) -> int:
        """The shards of a rank."""
        return self.shards // self.world

    def rows(self, batch_size: int) -> int:
        """Return the rows of a shard; the last shards of a batch may have fewer, or none."""
        return -(-batch_size // self.shards)

    def firsts(self, rank: int, rows: int) -> tuple[int, ...]:
        """Return the row of the batch with which each shard of a rank begins, a shard having ``rows``."""
        return tuple(rows * shard for shard in range(rank * self.own, (rank + 1) * self.own))

    def owner(self, places: Array, batch_size: int) -> Array:
        """Return the rank that has each of these rows of a batch, ``batch_size`` being that of a whole one."""
        return places // (self.rows(batch_size) * self.own)

    def received(self, size: int) -> int:
        """Return the bytes that a rank receives by a sum of ``size`` bytes over all; with ``fast`` at least."""
        others = self.world - 1
        return size * others if self.reduce == ORDERED else 2 * size * others // self.world

    def __str__(self) -> str:
        return f"{self.reduce}, {self.world} rank{'' if self.world == 1 else 's'}"
