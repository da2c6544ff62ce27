"""Global and shared memory, with the checks of every access.

Global memory is that of the process: an access is legal inside one of the launch's allocations. Shared memory keeps
three shadows with an entry for each byte: its state, and the warps of the block that wrote it and read it since the
last barrier. A byte that one warp writes, and another writes or reads, without a barrier between them is a race.

Writes of the generic proxy (stores, cp.async) are told from those of the async proxy (copies of tensors): a fourth
shadow has the warps for which no ``fence.proxy.async`` has followed a byte's write. wgmma and the copies need it.
"""

import ctypes
import itertools

import numpy as np

from .faults import Problem
from .order import UNIT, Order

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
    """The memory that the kernel of ``programs`` blocks may touch: ``regions`` are (address, bytes).

    ``earlier`` is the memory of launches that may not have ended when this one begins.
    """

    def __init__(self, regions, programs=1, earlier=()):
        self.regions = sorted({region for region in regions if region[1]})
        self.starts = np.array([start for start, _ in self.regions], np.uint64)
        self.ends = np.array([start + size for start, size in self.regions], np.uint64)
        self.low = self.regions[0][0] // 16 * 16 if self.regions else 0
        span = int(self.ends.max()) - self.low + 16 if self.regions else 16
        sizes = [-(-size // UNIT) for _, size in self.regions]
        self.firsts, self.order = np.cumsum([0, *sizes[:-1]]), Order(sum(sizes), programs)
        whole = np.frombuffer((ctypes.c_uint8 * (span // 16 * 16)).from_address(self.low or id(self)), np.uint8)
        self.views = {size: whole.view(kind) for size, kind in UNSIGNED.items()}
        if earlier:
            self.order.earlier = np.zeros((2, sum(sizes)), np.bool_)
            for (kind, plane), memory in itertools.product(enumerate(self.order.earlier), earlier):
                touched = memory.touched(kind)
                region = np.searchsorted(self.starts, touched, "right") - 1
                still = (region >= 0) & (touched < self.ends[region])
                plane[self._units(touched[still], region[still])] = True

    def touched(self, reads):
        """Return the addresses of the units that the launch has written, or with ``reads`` has written or read."""
        units = np.flatnonzero(self.order.writer | self.order.reader if reads else self.order.writer)
        region = np.searchsorted(self.firsts, units, "right") - 1
        return self.starts[region] + ((units - self.firsts[region]) * UNIT).astype(np.uint64)

    def _units(self, addresses, region):
        return self.firsts[region] + (addresses - self.starts[region]).astype(np.int64) // UNIT

    def places(self, addresses, size, width):
        """Return for accesses of ``width`` bytes the indices, in elements of ``size``, and the units of ``order``."""
        check_alignment(addresses, width, "global")
        region = np.searchsorted(self.starts, addresses, "right") - 1
        inside = (region >= 0) & (addresses + np.uint64(width) <= self.ends[region])
        if not inside.all():
            address = int(addresses[np.flatnonzero(~inside)[0]])
            raise Problem(
                f"global address {address:#x}, {width} bytes, is outside the allocations{self._near(address)}"
            )
        units = self._units(addresses, region)
        return (addresses - np.uint64(self.low)).astype(np.int64) // size, units[:, None] + np.arange(-(-width // UNIT))

    def _near(self, address):
        """Return how far the address is from the closest allocation, where that is near."""
        gaps = [(max(start - address, address - start - size + 1), start, size) for start, size in self.regions]
        gap, start, size = min(gaps, default=(1 << 62, 0, 0))
        if gap > 1 << 20:
            return ""
        side = f"{start - address} bytes before" if address < start else f"at byte {address - start} of"
        return f" ({side} one of {size} bytes)"

    def read(self, addresses, size, count, now, how):
        """Return ``count`` numbers of ``size`` bytes from each address; ``now`` and ``how``: see ``Order``."""
        places, units = self.places(addresses, size, size * count)
        found = [self.views[size][places + part] for part in range(count)]
        unknown = self.order.read(units.ravel(), np.repeat(now, units.shape[1]), how)
        if unknown.any():
            lanes = unknown.reshape(units.shape).any(axis=1)
            found = [np.where(lanes, ~UNSIGNED[size](0), part) for part in found]
        return found

    def write(self, addresses, values, now):
        """Store the values, unsigned, one after another from each address on."""
        size = values[0].dtype.itemsize
        places, units = self.places(addresses, size, size * len(values))
        same = np.logical_and.reduce([self.views[size][places + part] == value for part, value in enumerate(values)])
        self.order.write(units.ravel(), *(np.repeat(one, units.shape[1]) for one in (now, same)))
        for part, value in enumerate(values):
            self.views[size][places + part] = value
            if (self.views[size][places + part] != value).any():
                raise Problem("race: threads write different values into the same bytes of global memory")


class Shared:
    """The shared memory of ``blocks`` blocks of ``size`` bytes; threads are named by block and warp. ``proxies``: the
    kernel reads it by the async proxy; ``excused``: also what no fence has followed, which ``excuses`` counts."""

    def __init__(self, blocks, size, warps, proxies):
        if warps > MOST_WARPS:
            raise NotImplementedError(f"{warps} warps: the shadow has a bit for each of {MOST_WARPS}")
        # Sixteen bytes more, so that a memory of no bytes has views.
        self.size, self.pitch = size, -(-size // 16) * 16 + 16
        planes = [np.zeros(blocks * self.pitch, np.uint8) for _ in range(5)]
        self.data, self.state, self.writers, self.readers, self.unfenced = (
            {width: plane.view(kind) for width, kind in UNSIGNED.items()} for plane in planes
        )
        self.proxies, self.fenced = proxies, np.zeros(blocks, np.bool_)
        self.excused, self.excuses = False, 0

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

    def check_fenced(self, places, size, warps, what):
        """Raise Problem for bytes that the generic proxy has written, unless the warp knows of a fence since."""
        if self.proxies and (self.unfenced[size][places] & BITS[size][warps]).any():
            self.excuses += 1
            if not self.excused:
                raise Problem(f"{what} shared memory that was written without fence.proxy.async since")

    def read(self, blocks, warps, addresses, size, count=1, proxy=None):
        """Return ``count`` numbers of ``size`` bytes from each address; ``proxy`` says who reads by the async proxy."""
        first = self.places(blocks, addresses, size, size * count)
        found = []
        for part in range(count):
            places = first + part
            self.check_readable(places, size, warps)
            if proxy is not None:
                self.check_fenced(places, size, warps, proxy)
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
        if self.proxies:
            self.unfenced[size][places] = repeated(0xFF, size)
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
        if (these := blocks[self.fenced[blocks]]).size:
            # where one warp has fenced, all know of it now
            unfenced = self.unfenced[1].reshape(-1, self.pitch)
            unfenced[these] = np.where(unfenced[these] == 0xFF, np.uint8(0xFF), np.uint8(0))
            self.fenced[these] = False

    def fence_proxy(self, blocks, warps):
        """Let the async proxy read for these warps what they know: their own writes, and those before a barrier."""
        if self.proxies:
            for block in np.unique(blocks):
                mine = np.bitwise_or.reduce(BITS[1][warps[blocks == block]])
                here = slice(block * self.pitch, (block + 1) * self.pitch)
                writers = self.writers[1][here]
                alone = np.where(writers & writers - np.uint8(1), np.uint8(0), writers & mine)
                self.unfenced[1][here] &= ~np.where(writers == 0, mine, alone)
            self.fenced[blocks] = True
