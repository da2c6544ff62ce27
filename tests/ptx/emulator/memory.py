"""Global and shared memory, with the checks of every access.

Global memory is that of the process: an access is legal inside one of the launch's allocations. Shared memory keeps
three shadows with an entry for each byte: its state, and the warps of the block that wrote it and read it since the
last barrier. A byte that one warp writes, and another writes or reads, without a barrier between them is a race.

The order of accesses to global memory: races between the warps of a block, and between blocks.

Two accesses of one place, at least one of them a write, are ordered if one warp makes both, if a barrier of the block
lies between them, or if the first one's block has since made an atomic operation (acq_rel) before one of the second's.
A block's time is cut by its barriers into stretches; a place remembers the stretch and warp of its last write and read.

A race between blocks is a fault, and so are two different values from two warps. Between warps one race is common and
harmless: all threads read a number, and one thread of them stores a new one. So the value of a read after another
warp's write is unknown: it is all ones, as an integer and as a NaN, and spoils the result if it is used. Warps run in
several orders, so that each read has been the later one.
"""

import ctypes

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


UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
# The states of a byte of shared memory.
UNKNOWN, KNOWN, PENDING = 0, 1, 2
MOST_WARPS = 8


def repeated(byte, size):
    """Return the number that has this byte ``size`` times."""
    return UNSIGNED[size](int.from_bytes(bytes([byte]) * size, "little"))


# The bit of a warp in every byte of a number, by the number's size.
BITS = {size: np.array([repeated(1 << warp, size) for warp in range(MOST_WARPS)]) for size in UNSIGNED}


def check_alignment(addresses, size, space):
    """Raise Problem unless all addresses are multiples of ``size``."""
    if size > 1 and (wrong := addresses & addresses.dtype.type(size - 1)).any():
        address = int(addresses[np.flatnonzero(wrong)[0]])
        raise Problem(f"misaligned {space} address {address:#x}, for {size} bytes")


class Global:
    """The memory that kernels may touch: ``regions`` are (address, bytes)."""

    def __init__(self, regions):
        self.regions = sorted({region for region in regions if region[1]})
        self.starts = np.array([start for start, _ in self.regions], np.uint64)
        self.ends = np.array([start + size for start, size in self.regions], np.uint64)
        self.low = self.regions[0][0] // 16 * 16 if self.regions else 0
        span = int(self.ends.max()) - self.low + 16 if self.regions else 16
        sizes = [-(-size // UNIT) for _, size in self.regions]
        self.firsts, self.order = np.cumsum([0, *sizes[:-1]]), Order(sum(sizes))
        whole = np.frombuffer((ctypes.c_uint8 * (span // 16 * 16)).from_address(self.low or id(self)), np.uint8)
        self.views = {size: whole.view(kind) for size, kind in UNSIGNED.items()}

    def _places(self, addresses, size, width):
        """Return for accesses of ``width`` bytes the indices, in elements of ``size``, and the units of ``order``."""
        check_alignment(addresses, width, "global")
        region = np.searchsorted(self.starts, addresses, "right") - 1
        inside = (region >= 0) & (addresses + np.uint64(width) <= self.ends[region])
        if not inside.all():
            address = int(addresses[np.flatnonzero(~inside)[0]])
            raise Problem(
                f"global address {address:#x}, {width} bytes, is outside the allocations{self._near(address)}"
            )
        units = self.firsts[region] + (addresses - self.starts[region]).astype(np.int64) // UNIT
        return (addresses - np.uint64(self.low)).astype(np.int64) // size, units[:, None] + np.arange(-(-width // UNIT))

    def _near(self, address):
        """Return how far the address is from the closest allocation, where that is near."""
        gaps = [(max(start - address, address - start - size + 1), start, size) for start, size in self.regions]
        gap, start, size = min(gaps, default=(1 << 62, 0, 0))
        if gap > 1 << 20:
            return ""
        side = f"{start - address} bytes before" if address < start else f"at byte {address - start} of"
        return f" ({side} one of {size} bytes)"

    def read(self, addresses, size, count, now):
        """Return ``count`` numbers of ``size`` bytes from each address; ``now``: see ``Order``."""
        places, units = self._places(addresses, size, size * count)
        found = [self.views[size][places + part] for part in range(count)]
        unknown = self.order.read(units.ravel(), np.repeat(now, units.shape[1]))
        if unknown.any():
            lanes = unknown.reshape(units.shape).any(axis=1)
            found = [np.where(lanes, ~UNSIGNED[size](0), part) for part in found]
        return found

    def write(self, addresses, values, now):
        """Store the values, unsigned, one after another from each address on."""
        size = values[0].dtype.itemsize
        places, units = self._places(addresses, size, size * len(values))
        same = np.logical_and.reduce([self.views[size][places + part] == value for part, value in enumerate(values)])
        self.order.write(units.ravel(), *(np.repeat(one, units.shape[1]) for one in (now, same)))
        for part, value in enumerate(values):
            self.views[size][places + part] = value
            if (self.views[size][places + part] != value).any():
                raise Problem("race: threads write different values into the same bytes of global memory")

    def add(self, address, amount, now):
        """Add to the number at one address, and return it as it was. This orders memory: see ``Order``."""
        size = amount.dtype.itemsize
        places, _ = self._places(address, size, size)
        found = self.views[size][places]
        self.views[size][places] = found + amount
        self.order.synchronise(now >> WARP_BITS)
        return found


class Shared:
    """The shared memory of ``blocks`` blocks of ``size`` bytes; threads are named by block and warp."""

    def __init__(self, blocks, size, warps):
        if warps > MOST_WARPS:
            raise NotImplementedError(f"{warps} warps: the shadow has a bit for each of {MOST_WARPS}")
        # Sixteen bytes more, so that a memory of no bytes has views.
        self.size, self.pitch = size, -(-size // 16) * 16 + 16
        planes = [np.zeros(blocks * self.pitch, np.uint8) for _ in range(4)]
        self.data, self.state, self.writers, self.readers = (
            {width: plane.view(kind) for width, kind in UNSIGNED.items()} for plane in planes
        )

    def places(self, blocks, addresses, size, width):
        """Return the indices, in elements of ``size``, of accesses of ``width`` bytes."""
        check_alignment(addresses, width, "shared")
        if (outside := addresses.astype(np.int64) + width > self.size).any():
            address = int(addresses[np.flatnonzero(outside)[0]])
            raise Problem(f"shared address {address:#x}, {width} bytes, is outside the {self.size} bytes")
        return (blocks * self.pitch + addresses.astype(np.int64)) // size

    def check_readable(self, places, size, warps):
        """Raise Problem for bytes that are unknown, still being copied, or written by other warps since a barrier."""
        state = self.state[size][places]
        if (state != repeated(KNOWN, size)).any():
            pending = (state & repeated(PENDING, size)).any()
            raise Problem(
                "reads shared memory while a copy into it is under way"
                if pending
                else "reads uninitialised shared memory"
            )
        writers, mine = self.writers[size][places], BITS[size][warps]
        if (writers & ~mine).any():
            # A warp may read what it has written itself; others may have written the same.
            own = ((writers & mine) >> warps.astype(writers.dtype)) * writers.dtype.type(255)
            if (writers & ~mine & ~own).any():
                raise Problem("race: reads shared memory that another warp has written since the last barrier")

    def check_writable(self, places, size, warps, values):
        """Raise Problem for bytes that other warps have read since a barrier, or written, unless with these values."""
        others = ~BITS[size][warps]
        if (self.readers[size][places] & others).any():
            raise Problem("race: writes shared memory that another warp has read since the last barrier")
        written = (self.writers[size][places] & others) != 0
        if written.any() and (values is None or (written & (self.data[size][places] != values)).any()):
            raise Problem("race: writes shared memory that another warp has written since the last barrier")

    def read(self, blocks, warps, addresses, size, count=1):
        """Return ``count`` numbers of ``size`` bytes from each address."""
        first = self.places(blocks, addresses, size, size * count)
        found = []
        for part in range(count):
            places = first + part
            self.check_readable(places, size, warps)
            np.bitwise_or.at(self.readers[size], places, BITS[size][warps])
            found.append(self.data[size][places])
        return found

    def write(self, blocks, warps, addresses, values):
        """Store the values, unsigned, one after another from each address on."""
        size = values[0].dtype.itemsize
        first = self.places(blocks, addresses, size, size * len(values))
        for part, value in enumerate(values):
            places = first + part
            self.check_writable(places, size, warps, value)
            self._store(places, size, warps, value, KNOWN)

    def _store(self, places, size, warps, values, state):
        self.data[size][places] = values
        self.state[size][places] = repeated(state, size)
        np.bitwise_or.at(self.writers[size], places, BITS[size][warps])
        # Layouts may repeat an element in several threads.
        if (self.data[size][places] != values).any():
            raise Problem("race: threads write different values into the same bytes of shared memory")

    def begin_copy(self, blocks, warps, addresses, width):
        """Mark the bytes as written by a copy that is under way; return their places, in units of 4 bytes."""
        first = self.places(blocks, addresses, 4, width)
        places = (first[:, None] + np.arange(width // 4)).ravel()
        warps = np.repeat(warps, width // 4)
        self.check_writable(places, 4, warps, None)
        self.state[4][places] = repeated(PENDING, 4)
        np.bitwise_or.at(self.writers[4], places, BITS[4][warps])
        return places

    def end_copy(self, places, warps, values):
        """Store what a copy brings. Until then the bytes could be read by none and written by none."""
        if (self.state[4][places] != repeated(PENDING, 4)).any():
            raise Problem("shared memory was written while a copy into it was under way")
        self._store(places, 4, warps, values, KNOWN)

    def barrier(self, blocks):
        """Forget the accesses before a barrier of these blocks."""
        for shadow in (self.writers, self.readers):
            shadow[1].reshape(-1, self.pitch)[blocks] = 0
