"""The order of accesses to global memory: races between the warps of a block, and between blocks.

Two accesses of one place, at least one of them a write, are ordered if one warp makes both, if a barrier of the block
lies between them, or if the first one's block has since made an atomic operation (acq_rel) before one of the second's.
A block's time is cut by its barriers into stretches; a place remembers the stretch and warp of its last write and read.

A race between blocks is a fault, and so are two different values from two warps. Between warps one race is common and
harmless: all threads read a number, and one thread of them stores a new one. So the value of a read after another
warp's write is unknown: it is all ones, as an integer and as a NaN, and spoils the result if it is used. Warps run in
several orders, so that each read has been the later one.
"""

import numpy as np

from .faults import Problem

# Bytes that share an entry, and the bits for the warp in an entry.
UNIT = 2
WARP_BITS = 4


class Order:
    """The last accesses of each unit of memory, as ``stretch << WARP_BITS | warp``; 0 stands for none."""

    def __init__(self, units):
        self.writer, self.reader = np.zeros(units, np.int64), np.zeros(units, np.int64)
        # By stretch: its block, and when an atomic operation of its block published it.
        self.block, self.published = np.full(64, -1, np.int64), np.full(64, 1 << 60, np.int64)
        self.count, self.time = 1, 1
        self.acquired = {}

    def begin(self, blocks):
        """Begin a stretch of each block, and return their numbers."""
        first, self.count = self.count, self.count + len(blocks)
        while self.count > len(self.block):
            self.block = np.concatenate([self.block, np.full(len(self.block), -1)])
            self.published = np.concatenate([self.published, np.full(len(self.published), 1 << 60)])
        self.block[first : self.count] = blocks
        return np.arange(first, self.count)

    def synchronise(self, stretch):
        """An atomic operation in this stretch: see what was published, and publish the block's stretches before."""
        block, self.time = int(self.block[stretch]), self.time + 1
        self.acquired[block] = self.time
        mine = (self.block[:stretch] == block) & (self.published[:stretch] > self.time)
        self.published[:stretch][mine] = self.time

    def _check_blocks(self, before, now, what):
        """Raise Problem if an access of another block is not ordered before the one now."""
        stretch, here = before >> WARP_BITS, now >> WARP_BITS
        for place in np.flatnonzero((before != 0) & (self.block[stretch] != self.block[here])):
            if self.published[stretch[place]] >= self.acquired.get(int(self.block[here[place]]), 0):
                raise Problem(f"race: {what}")

    def read(self, units, now):
        """Note reads; return which come after another warp's write without a barrier between them."""
        before = self.writer[units]
        self._check_blocks(before, now, "reads global memory that another block has written")
        self.reader[units] = now
        return (before >> WARP_BITS == now >> WARP_BITS) & (before != now)

    def write(self, units, now, same):
        """Note writes. ``same``: it changes nothing."""
        self._check_blocks(self.reader[units], now, "writes global memory that another block has read")
        before = self.writer[units]
        self._check_blocks(before, now, "writes global memory that another block has written")
        if ((before >> WARP_BITS == now >> WARP_BITS) & (before != now) & ~same).any():
            raise Problem("race: writes global memory that another warp has written since the last barrier")
        self.writer[units] = now
