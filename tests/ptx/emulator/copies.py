"""Copies into shared memory: cp.async, mbarriers, and cp.async.bulk.tensor, whose bytes a barrier counts.

A card may do a copy at any time between its start and the wait for it. Those of cp.async are done here when the thread
that began them waits: the bytes cannot be read before, so a kernel that depends on the time is found. A phase of an
mbarrier ends when its arrivals and its bytes have come; the first warp that waits for the phase does the copy. The
bytes are then known to the warps that have waited, and to the whole block after the next bar.sync. Arrivals order no
other accesses: the kernels here use barriers of the block for that.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass, field

import numpy as np

from .faults import Problem
from .memory import BITS, UNSIGNED, check_alignment
from .parse import Address, Register, Vector
from .threads import addresses, reader


class Copy(namedtuple("Copy", "thread group places values")):
    """``values`` (threads, words) for ``places``; ``group`` is the number of each thread's group of copies."""

    def of(self, some):
        return Copy(*(array[some] for array in self))


def begin(active, places, values):
    """Begin a copy of each active thread, as part of its next group."""
    threads, index, words = active.threads, active.index, values.shape[1]
    places = threads.shared.begin_copy(*active.owners, places, 4 * words)
    threads.copies.append(Copy(index, threads.copy_groups[index], places.reshape(-1, words), values))


def commit(active):
    """End the group of each active thread."""
    active.threads.copy_groups[active.index] += 1


def wait(active, count):
    """Do the copies of the active threads, except those of each one's last ``count`` groups."""
    threads = active.threads
    running = np.zeros(threads.count, np.bool_)
    running[active.index] = True
    left = []
    for copy in threads.copies:
        done = running[copy.thread] & (copy.group < threads.copy_groups[copy.thread] - count)
        if done.any():
            these = copy.of(done)
            warps = np.repeat(threads.warp[these.thread], these.values.shape[1])
            threads.shared.end_copy(these.places.ravel(), warps, these.values.ravel())
        if not done.all():
            left.append(copy.of(~done))
    threads.copies = left


UNIT = 16
# The longest row of a tile in bytes, by the number of its swizzle; none without.
SPANS = {0: 1 << 20, 1: 32, 2: 64, 3: 128}


@dataclass(frozen=True)
class TensorMap:
    """A matrix in global memory as cuTensorMapEncodeTiled describes it: ``shape`` (rows, columns) of elements of
    ``size`` bytes, rows ``pitch`` bytes apart. Tiles have ``box`` (rows, columns)."""

    base: int
    shape: tuple[int, int]
    pitch: int
    box: tuple[int, int]
    size: int
    swizzle: int

    def __post_init__(self):
        row = self.box[1] * self.size
        if self.base % UNIT or self.pitch % UNIT or row % UNIT or row > SPANS[self.swizzle] or max(self.box) > 256:
            raise Problem(f"the driver refuses the {self}")

    def read(self, active, thread, column, row):
        """Return a tile as a thread reads it; zeros outside the matrix."""
        rows, columns = row + np.arange(self.box[0])[:, None], column + np.arange(self.box[1])
        inside = (rows >= 0) & (rows < self.shape[0]) & (columns >= 0) & (columns < self.shape[1])
        places = (self.base + rows * self.pitch + columns * self.size)[inside].astype(np.uint64)
        tile = np.zeros(self.box, UNSIGNED[self.size])
        now = np.repeat(active.threads.now[thread], len(places))
        tile[inside] = active.threads.memory.read(places, self.size, 1, now, "async")[0]
        return tile

    def units(self, start):
        """Return the shared addresses of a tile's units of 16 bytes, row by row."""
        address = start + UNIT * np.arange(self.box[0] * self.box[1] * self.size // UNIT)
        return address ^ (address >> 7 & SPANS[self.swizzle] // UNIT - 1) << 4 if self.swizzle else address


@dataclass
class Barrier:
    """A phase ends when ``pending`` arrivals of ``count`` have come, and ``expected`` bytes. ``copies`` bring them:
    pairs of places and values. ``landed`` are the places of the phase before."""

    count: int
    pending: int
    phase: int = 0
    expected: int = 0
    copies: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    landed: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def arrive(self, arrivals, brought):
        """Count arrivals, and bytes that will be brought."""
        if arrivals > self.pending:
            raise Problem(f"mbarrier: more than {self.count} arrivals in a phase")
        self.pending, self.expected = self.pending - arrivals, self.expected + brought

    def finish(self, threads, warp):
        """End the phase if everything can have come."""
        brought = sum(values.nbytes for _, values in self.copies)
        if self.pending or brought < self.expected:
            return
        if brought > self.expected:
            raise Problem(f"mbarrier: copies bring {brought} bytes where {self.expected} are expected")
        for places, values in self.copies:
            threads.shared.end_copy(places, np.full(len(places), warp), values)
            threads.shared.writers[4][places], threads.shared.unfenced[4][places] = BITS[4][warp], 0
        self.landed = np.concatenate([self.landed[:0], *(places for places, _ in self.copies)])
        self.phase, self.pending, self.expected, self.copies = self.phase + 1, self.count, 0, []
        threads.progress += 1

    def learn(self, threads, warp):
        """Let a warp know the bytes of the last phase; after a barrier of the block all know them."""
        writers = threads.shared.writers[4]
        places = self.landed[writers[self.landed] != 0]
        writers[places] |= BITS[4][warp]


def _barrier(threads, block, warp, address):
    """Return the barrier at an address, of whose start the warp must know."""
    if (block, address) not in threads.barriers:
        raise Problem(f"no mbarrier was initialised at the shared address {address:#x}")
    place = threads.shared.places(np.array([block]), np.array([address]), 8, 8)
    threads.shared.check_readable(place, 8, np.array([warp]))
    return threads.barriers[block, address]


def barrier_step(instruction):
    """Return an mbarrier instruction as a function of the active threads."""
    kind = instruction.modifiers[1]
    if kind == "try_wait":
        return _wait(instruction)
    place = next(at for at, operand in enumerate(instruction.operands) if isinstance(operand, Address))
    where, given = addresses(instruction.operands[place], "u32"), instruction.operands[place + 1 :]
    number, brings = reader(given[0] if given else 1, "u32"), "expect_tx" in instruction.modifiers
    if kind not in ("init", "inval", "arrive"):
        raise NotImplementedError(instruction.name)

    def run(active):
        threads, numbers = active.threads, active.pick(number(active.threads)).tolist()
        for block, warp, address, amount in zip(*active.owners, where(active).tolist(), numbers, strict=True):
            if kind == "arrive":
                barrier = _barrier(threads, block, warp, address)
                threads.progress += 1
                barrier.arrive(1 if brings else amount, amount if brings else 0)
                if not barrier.expected:
                    barrier.finish(threads, warp)
                continue
            # written, so that other warps may use it after the next barrier of the block only
            word = [np.array([amount if kind == "init" else 0], np.uint64)]
            threads.shared.write(np.array([block]), np.array([warp]), np.array([address]), word)
            threads.barriers.pop((block, address), None)
            if kind == "init":
                threads.barriers[block, address] = Barrier(amount, amount)

    return run


def _wait(instruction):
    """mbarrier.try_wait.parity: whether the phase of this parity has ended. Warps that must wait on let the others run
    first."""
    target, place, parity = instruction.operands
    if "parity" not in instruction.modifiers or not isinstance(target, Register):
        raise NotImplementedError(instruction.name)
    where, read = addresses(place, "u32"), reader(parity, "u32")

    def run(active):
        threads = active.threads
        asked = np.stack([*active.owners, where(active), active.pick(read(threads))], axis=1)
        rows, own = np.unique(asked, axis=0, return_inverse=True)
        ended = np.zeros(len(rows), np.bool_)
        for at, (block, warp, address, phase) in enumerate(rows.tolist()):
            barrier = _barrier(threads, block, warp, address)
            if barrier.phase % 2 == phase:
                barrier.finish(threads, warp)
            ended[at] = barrier.phase % 2 != phase
            if ended[at]:
                barrier.learn(threads, warp)
        found = ended[own.ravel()]
        threads.late[active.index] = ~found
        threads.refused |= not found.all()
        active.scatter(target, found)

    return run


def copy_step(instruction):
    """cp.async.bulk.tensor.2d from global to shared memory: ``[tile], [map, {column, row}], [barrier]``."""
    target, source, place = instruction.operands
    name = "cp.async.bulk.tensor.2d.shared::{}.global.mbarrier::complete_tx::bytes"
    if instruction.name not in (name.format("cta"), name.format("cluster")) or not isinstance(source, Vector):
        raise NotImplementedError(instruction.name)
    handle, corner = source.parts
    assert isinstance(corner, Vector)
    starts, bars = addresses(target, "u32"), addresses(place, "u32")
    reads = [reader(handle, "u64"), *(reader(part, "s32") for part in corner.parts)]

    def run(active):
        threads, starting = active.threads, starts(active).astype(np.int64)
        check_alignment(starting, 128, "shared")
        given = zip(*(active.pick(read(threads)).tolist() for read in reads), bars(active).tolist(), strict=True)
        for at, (number, column, row, bar) in enumerate(given):
            if number not in threads.maps:
                raise Problem(f"no tensor map is at {number:#x}")
            tensor, (block, warp) = threads.maps[number], (owner[at : at + 1] for owner in active.owners)
            values = tensor.read(active, active.index[at], column, row).reshape(-1).view(np.uint32)
            barrier, units = _barrier(threads, int(block[0]), int(warp[0]), bar), tensor.units(int(starting[at]))
            places = threads.shared.begin_copy(*(np.repeat(one, len(units)) for one in (block, warp)), units, UNIT)
            threads.shared.check_fenced(places, 4, warp, "a copy of tensors overwrites")
            barrier.copies.append((places, values))

    return run


def elect_step(instruction):
    """elect.sync: one thread of each warp, any of them."""
    _, target, _ = instruction.operands
    assert isinstance(target, Register)

    def run(active):
        lanes = active.threads.random.integers(0, 32, (len(active.warps), 1))
        active.scatter(target, np.arange(32) == lanes)

    return run
