"""The memory of the card: NumPy's, with guard bands, and a list of the live pieces.

Every address for a kernel or cuBLAS must lie in memory that an array still holds. A card would silently read or write
other memory.
"""

from __future__ import annotations

import bisect
import weakref

import numpy as np

# The alignment of CuPy's memory pool.
ALIGNMENT = 512
GUARD, GUARD_BYTE = 64, 0xA5


class Misuse(AssertionError):
    """A mistake that fails on a card, with an error of CUDA or silently."""


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""


class Memory:
    """A piece of memory; ``owner``: the object that holds it if it was not allocated here."""

    def __init__(self, size, address=None, owner=None):
        self.size, self.owner = size, owner
        self.bytes = None
        if address is None:
            room = np.full(size + ALIGNMENT + 2 * GUARD, GUARD_BYTE, np.uint8)
            start = -(room.ctypes.data + GUARD) % ALIGNMENT + GUARD
            self.guarded = room[start - GUARD : start + size + GUARD]
            self.bytes = self.guarded[GUARD : GUARD + size]
            self.bytes[:] = 0xFF
            address = room.ctypes.data + start
        self.ptr = address
        LIVE.add(self)

    @property
    def is_intact(self):
        """Return whether the guard bands before and after it are intact."""
        if self.bytes is None:
            return True
        return bool((self.guarded[:GUARD] == GUARD_BYTE).all() and (self.guarded[-GUARD:] == GUARD_BYTE).all())


class Live:
    """The live memory, by address."""

    def __init__(self):
        self._starts = []
        # Sizes of the pieces at an address: foreign memory may be held several times.
        self._sizes = {}
        self._allocated = weakref.WeakSet()

    def add(self, memory):
        start, size = memory.ptr, memory.size
        if start not in self._sizes:
            bisect.insort(self._starts, start)
            self._sizes[start] = []
        self._sizes[start].append(size)
        weakref.finalize(memory, self._forget, start, size).atexit = False
        if memory.bytes is not None:
            self._allocated.add(memory)

    def _forget(self, start, size):
        self._sizes[start].remove(size)
        if not self._sizes[start]:
            del self._sizes[start]
            del self._starts[bisect.bisect_left(self._starts, start)]

    def holds(self, address, size=0):
        """Return whether this many bytes from ``address`` on lie in one piece of memory."""
        at = bisect.bisect_right(self._starts, address) - 1
        return at >= 0 and address + size <= self._starts[at] + max(self._sizes[self._starts[at]])

    def check_guards(self):
        """Raise Misuse if a guard band was overwritten."""
        for memory in list(self._allocated):
            if not memory.is_intact:
                raise Misuse(f"something wrote in front of or behind {memory.size} bytes of memory of the card")


LIVE = Live()


class MemoryPointer:
    """As CuPy's: an address, and the object that keeps the memory alive."""

    mem: Memory
    ptr: int

    def __init__(self, mem, offset):
        self.mem, self.ptr = mem, mem.ptr + offset

    def __add__(self, offset):
        return MemoryPointer(self.mem, self.ptr - self.mem.ptr + offset)


def at_address(address, shape, dtype, strides):
    """Return the memory there as a NumPy array; strides in bytes, from the first element on.

    Raises Misuse unless all of it is memory of the card.
    """
    kind = np.dtype(dtype)
    if 0 in shape:
        return np.empty(shape, kind)
    reach = [step * (size - 1) for step, size in zip(strides, shape, strict=True)]
    low, high = sum(step for step in reach if step < 0), sum(step for step in reach if step > 0) + kind.itemsize
    if not LIVE.holds(address + low, high - low):
        raise Misuse(
            f"{high - low} bytes from {address + low:#x} on are not (any more) in one piece of memory of the card"
        )
    interface = {"shape": shape, "typestr": kind.str, "data": (address, False), "strides": strides, "version": 3}
    return np.asarray(_Place(interface))


class _Place:
    """An object that NumPy converts to an array."""

    def __init__(self, interface):
        self.__array_interface__ = interface
