"""The order of accesses to global memory, after "PTX ISA", section "Memory Consistency Model".

Every warp has a clock, and knows of the others what has happened before (a vector of their clocks). A barrier joins
the knowledge of a block's warps. Between blocks only synchronisation passes it on: an operation that releases, and
one that acquires and reads what it wrote, or what atomic operations made of that. Both must have the scope of the card
(gpu or sys). ``fence`` makes the warp's next strong writes release, and lets it acquire by its strong reads before.

Two accesses of one place, at least one of them a write, are a race unless one warp makes both, a barrier of the block
lies between them, the second's warp knows of the first, or both are strong and of the card's scope.

A race between blocks is a fault, and so are two different values from two warps. Between warps one race is common and
harmless: all threads read a number, and one thread of them stores a new one. So the value of a read after another
warp's write is unknown: it is all ones, as an integer and as a NaN, and spoils the result if it is used. Warps run in
several orders, so that each read has been the later one.

The kernels' own rules are stricter in one point: what another block has written in the launch is never read by a plain
load, though it is known. A load that is strong, or ``.cg``, needs no trust in the emptied cache of a multiprocessor.

A copy of tensors, which is in the async proxy, must know that what it reads was followed by ``fence.proxy.async``.
"""

import numpy as np

from .faults import Problem

# Bytes that share an entry.
UNIT = 2
# A warp at a time is a stamp: its block, the block's interval between barriers, the warp's epoch between releases in
# that interval, and the warp. 0 stands for none.
WARPS = 1 << 4
EPOCHS, INTERVALS = 1 << 12, 1 << 24
INTERVAL = WARPS * EPOCHS
BLOCK = INTERVAL * INTERVALS
STRONG = 1 << 61
# The rows of knowledge: all that has happened before, and the part that a proxy fence has followed.
ALL, FENCED = 0, 1


def _slots(stamps):
    """Return the warps' places in a row of knowledge."""
    return stamps % STRONG // BLOCK * WARPS + stamps % WARPS


def _clocks(stamps):
    return stamps % BLOCK // WARPS


class Order:
    """The last accesses of each unit of memory by ``programs`` blocks, as stamps: ``writer``, ``reader``, and
    ``other``, the last reader of another block than ``reader``'s.

    ``earlier``: what launches that may not have ended have written, and touched, as booleans for each unit; a warp may
    touch it when it has waited for them.
    """

    def __init__(self, units, programs=1):
        self.writer, self.reader, self.other = (np.zeros(units, np.int64) for _ in range(3))
        self.programs, self.intervals = programs, np.zeros(programs, np.int64)
        # by the warp's slot; and what each unit's last strong write released
        self.known, self.seen, self.prepared, self.released = {}, {}, {}, {}
        self.earlier, self.waited, self.closed = None, np.zeros(programs * WARPS, np.bool_), True

    def begin(self, blocks):
        """Begin an interval of each block, and return the stamps of the first warps."""
        self.intervals[blocks] += 1
        if self.known:
            for block in blocks.tolist():
                slots = range(block * WARPS, block * WARPS + WARPS)
                parts = [self.known[slot] for slot in slots if slot in self.known]
                if parts:
                    joined = parts[0] if len(parts) == 1 else np.maximum.reduce(parts)
                    self.known.update(dict.fromkeys(slots, joined))
        if self.earlier is not None:
            waited = self.waited.reshape(-1, WARPS)
            waited[blocks] = waited[blocks].any(axis=1, keepdims=True)
        return blocks * BLOCK + self.intervals[blocks] * INTERVAL

    def read(self, units, now, how):
        """Note reads, by a plain load ("ca"), past the multiprocessor's cache ("cg") or by a copy of tensors ("async").

        Return which come after another warp's write without a barrier between them.
        """
        before = self.writer[units]
        if how == "async" and not self._knows(before, now, FENCED)[before != 0].all():
            raise Problem("a copy of tensors reads global memory that was written without fence.proxy.async since")
        apart = (before ^ now) & STRONG - 1
        foreign = self._check_blocks(before, now, apart, "reads global memory that another block has written")
        if how == "ca" and len(foreign):
            raise Problem("reads by a plain load what another block has written in this launch: expected .cg")
        if self.earlier is not None:
            self._check_earlier(0, units, now, "reads global memory that an earlier launch writes")
        held = self.reader[units] if self.programs > 1 else None
        self.reader[units] = now
        if held is not None:
            self._keep(units, held, now)
            if (now[0] ^ now[-1]) & STRONG - 1 >= BLOCK:
                self._keep(units, now, self.reader[units])
        return (apart < INTERVAL) & (apart % WARPS != 0) & (before & now < STRONG)

    def _keep(self, units, one, reader):
        """Keep the readers of which another block's have taken the place."""
        lost = np.flatnonzero(((one ^ reader) & STRONG - 1 >= BLOCK) & (one != 0))
        self.other[units[lost]] = one[lost]

    def write(self, units, now, same):
        """Note writes. ``same``: it changes nothing."""
        if self.programs > 1:
            for reader in (self.reader[units], self.other[units]):
                apart = (reader ^ now) & STRONG - 1
                self._check_blocks(reader, now, apart, "writes global memory that another block has read")
        before = self.writer[units]
        apart = (before ^ now) & STRONG - 1
        self._check_blocks(before, now, apart, "writes global memory that another block has written")
        if self.earlier is not None:
            self._check_earlier(1, units, now, "writes global memory that an earlier launch touches")
        if ((apart < INTERVAL) & (apart % WARPS != 0) & ~same & (before & now < STRONG)).any():
            raise Problem("race: writes global memory that another warp has written since the last barrier")
        for unit in units[(before >= STRONG) & (now < STRONG)].tolist():
            self.released.pop(unit, None)
        self.writer[units] = now

    def _check_blocks(self, before, now, apart, what):
        """Raise Problem if an access of another block is a race with the one now; return the places of such."""
        foreign = np.flatnonzero((apart >= BLOCK) & (before != 0))
        if len(foreign):
            before, now = before[foreign], now[foreign]
            both_strong = before & now >= STRONG
            if not (both_strong | self._knows(before, now, ALL)).all():
                raise Problem(f"race: {what}")
        return foreign

    def _check_earlier(self, kind, units, now, what):
        if (self.earlier[kind][units] & ~self.waited[_slots(now)]).any():
            raise Problem(f"race: {what}, before griddepcontrol.wait")

    def _knows(self, before, now, row):
        """Return for which accesses the warp now knows of the one before."""
        slots, clocks, here = _slots(before), _clocks(before), _slots(now)
        knows = np.zeros(len(before), np.bool_)
        for slot in np.unique(here).tolist():
            if slot in self.known:
                mine = here == slot
                knows[mine] = self.known[slot][row, slots[mine]] >= clocks[mine]
        return knows

    def message(self, now):
        """Return what the warp of a stamp knows, with what itself and, before the last barrier, its block have done."""
        slot, block = int(_slots(now)), int(now % STRONG // BLOCK)
        message = np.array(self.known.get(slot, np.zeros((2, self.programs * WARPS), np.int64)))
        message[ALL, block * WARPS : block * WARPS + WARPS] = _clocks(now) // EPOCHS * EPOCHS - 1
        message[ALL, slot] = _clocks(now)
        return message

    def acquire(self, unit, now, at_once):
        """Learn what the write that a strong read has read released: ``at_once``, or at the warp's next fence."""
        if unit in self.released:
            knowledge, slot = self.known if at_once else self.seen, int(_slots(now))
            knowledge[slot] = _joined(knowledge.get(slot), self.released[unit])

    def release(self, unit, now, at_once, goes_on):
        """Release what the warp knows: ``at_once``, or what it knew at its last fence. An atomic operation ``goes_on``
        with what it read."""
        before = self.released.pop(unit, None)
        message = _joined(
            before if goes_on else None, self.message(now) if at_once else self.prepared.get(int(_slots(now)))
        )
        if message is not None:
            self.released[unit] = message

    def fence(self, now):
        """Acquire by the warp's strong reads before, and release by its strong writes after."""
        slot = int(_slots(now))
        if slot in self.seen:
            self.known[slot] = _joined(self.known.get(slot), self.seen.pop(slot))
        self.prepared[slot] = self.message(now)

    def fence_proxy(self, now):
        """Let copies of tensors read all that the warp knows."""
        message = self.message(now)
        message[FENCED] = np.maximum(message[FENCED], message[ALL])
        self.known[int(_slots(now))] = message

    def wait(self, now):
        """Know what earlier launches have done."""
        self.waited[_slots(now)] = True

    def close(self, blocks):
        """Note whether these blocks have waited before they let later launches begin, or end."""
        self.closed &= bool(self.waited.reshape(-1, WARPS)[blocks].any(axis=1).all())


def _joined(one, other):
    """Return the knowledge of both; None stands for none."""
    if one is None or other is None:
        return other if one is None else one
    return np.maximum(one, other)
