"""The threads of a launch as one vector: their registers, and the set of those that run."""

import functools

import numpy as np

from .faults import Problem
from .memory import Shared
from .opcodes import TYPES
from .order import EPOCHS, WARPS
from .parse import Address, Register

WARP = 32
DTYPES = {name: np.dtype(kind) for name, kind in TYPES.items()}


class Active:
    """The threads that run an instruction together; ``mask`` is None for all."""

    def __init__(self, threads, mask):
        self.threads, self.mask = threads, mask

    @functools.cached_property
    def index(self):
        """The numbers of the threads."""
        return self.threads.all if self.mask is None else np.flatnonzero(self.mask)

    @functools.cached_property
    def owners(self):
        """The block and the warp in it of each of these threads."""
        return self.threads.block[self.index], self.threads.warp[self.index]

    @property
    def now(self):
        """The stamp of each of these threads; see ``order``."""
        return self.threads.now[self.index]

    @functools.cached_property
    def warps(self):
        """The numbers of the warps; raises Problem if a warp is here in part."""
        if self.mask is None:
            return np.arange(self.threads.count // WARP)
        rows = self.mask.reshape(-1, WARP)
        whole = rows.all(axis=1)
        if (rows.any(axis=1) & ~whole).any():
            raise Problem("divergence: threads of a warp miss an instruction of the whole warp")
        return np.flatnonzero(whole)

    @functools.cached_property
    def some_warps(self):
        """The numbers of the warps that are here, if only in part."""
        return np.unique(self.index // WARP)

    def within(self, chosen):
        """Return those of a predicate (one for all, or one each); None if there are none."""
        if len(chosen) == 1:
            return self if chosen[0] else None
        if self.mask is not None:
            chosen = chosen & self.mask
        if chosen.all():
            return self.threads.everyone
        return Active(self.threads, chosen) if chosen.any() else None

    def pick(self, values):
        """Return the values of these threads."""
        if len(values) == 1:
            return np.repeat(values, len(self.index))
        return values if self.mask is None else values[self.index]

    def by_warp(self, values):
        """Return the values as (warps, 32)."""
        whole = values if len(values) > 1 else np.repeat(values, self.threads.count)
        whole = whole.reshape(-1, WARP)
        return whole if self.mask is None else whole[self.warps]

    def write(self, register, value):
        """Set a register of these threads; ``value`` has an element for every thread of the launch, or one."""
        value, registers = _as_register(register, value), self.threads.registers
        if self.mask is not None:
            old = registers.get(register.place)
            value = np.where(self.mask, value, _unset(register.kind) if old is None else old)
        registers[register.place] = value

    def scatter(self, register, value):
        """Set a register of these threads; ``value`` has an element for each of them."""
        value, registers = _as_register(register, np.ascontiguousarray(value).reshape(-1)), self.threads.registers
        if self.mask is not None:
            old = registers.get(register.place)
            whole = np.array(np.broadcast_to(_unset(register.kind) if old is None else old, self.threads.count))
            whole[self.index] = value
            value = whole
        registers[register.place] = value


class Threads:
    """``blocks`` blocks of ``size`` threads, and the memory they see.

    A register is an array with an element for each thread, or with one where it is the same in all of them.
    """

    def __init__(self, blocks, size, memory, shared_bytes, proxies, seed):
        self.size, self.count = size, size * len(blocks)
        self.all = np.arange(self.count)
        self.everyone = Active(self, None)
        self.block = self.all // size
        self.warp = self.all % size // WARP
        self.registers = {}
        self.memory, self.shared = memory, Shared(len(blocks), shared_bytes, size // WARP, proxies)
        self.random = np.random.default_rng(seed)
        self.names, self.now = blocks, np.zeros(self.count, np.int64)
        self.pass_barrier(np.arange(len(blocks)))
        # The operations under way (``copies``, ``warpgroup``), and the number of groups that are complete.
        self.copies = []
        self.copy_groups = np.zeros(self.count, np.int64)
        self.products = []
        self.product_groups = np.zeros(self.count // WARP, np.int64)
        # The mbarriers by block and address; and the threads that wait for one, or read a number in global memory again
        # and again, which the others go before. ``polled``: the address and the value that each has read last.
        self.barriers = {}
        self.polled = np.zeros((2, self.count), np.uint64)
        self.maps = {}
        self.late, self.refused, self.progress = np.zeros(self.count, np.bool_), False, 0
        self.special = {
            "%tid.x": (self.all % size).astype(np.uint32), "%laneid": (self.all % WARP).astype(np.uint32),
            "%ctaid.x": blocks.astype(np.uint32)[self.block], "%ntid.x": np.array([size], np.uint32),
            "%nctaid.x": np.array([memory.order.programs], np.uint32),
            **dict.fromkeys(("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), np.zeros(1, np.uint32)),
            # the address of the dynamic shared memory
            "global_smem": np.zeros(1, np.uint32),
        }  # fmt: skip

    def pass_barrier(self, blocks):
        """Order the accesses of these blocks until now before those to come."""
        self.shared.barrier(blocks)
        stamps = self.memory.order.begin(self.names[blocks])
        self.now.reshape(-1, self.size)[blocks] = stamps[:, None] + self.warp[: self.size]

    def pass_release(self, warps):
        """Tell the accesses of these warps until now from those to come."""
        now = self.now.reshape(-1, WARP)
        now[warps] += WARPS
        if (now[warps] // WARPS % EPOCHS == 0).any():
            raise NotImplementedError(f"{EPOCHS} releases between two barriers of a block")

    def poll(self, index, addresses, values, changes):
        """Let the others go first if these threads have read the same as last time, and change nothing."""
        again = (self.polled[0, index] == addresses) & (self.polled[1, index] == values) & ~changes
        self.polled[:, index] = np.where(changes, 0, addresses), values
        if again.any():
            self.late.reshape(-1, WARP)[index[again] // WARP] = True
            self.refused = True


def reader(operand, kind):
    """Return a function for an operand's values in a type of ``opcodes.TYPES``: one for each thread, or one for all."""
    target = DTYPES[kind]
    if isinstance(operand, Register):
        return _of_register(operand, target)
    if isinstance(operand, int):
        bits = operand & (1 << 8 * target.itemsize) - 1
        value = np.array([bits], f"u{target.itemsize}")
        value = value != 0 if target.kind == "b" else value.view(target)
        return lambda threads: value
    if isinstance(operand, str):
        return lambda threads: threads.special[operand].astype(target)
    raise NotImplementedError(f"the operand {operand}")


def addresses(operand, kind):
    """Return a function for the addresses of the active threads, of type ``kind``."""
    assert isinstance(operand, Address)
    offset = TYPES[kind](operand.offset & (1 << 8 * TYPES[kind](0).itemsize) - 1)
    read = reader(0 if operand.base is None else operand.base, kind)
    return lambda active: active.pick(read(active.threads) + offset)


@functools.cache
def _unset(kind):
    """Return the value of a register that was never written: any; here all ones, which is NaN as a float."""
    width = np.dtype(kind).itemsize
    return np.zeros(1, kind) if kind is np.bool_ else np.frombuffer(b"\xff" * width, kind)


def _of_register(register, target):
    place, own = register.place, np.dtype(register.kind)
    unset, narrow = _unset(register.kind), np.dtype(f"u{target.itemsize}")

    def value(threads):
        found = threads.registers.get(place)
        return unset if found is None else found

    if own == target:
        return value
    if own.itemsize == target.itemsize:
        return lambda threads: value(threads).view(target)
    return lambda threads: value(threads).astype(narrow).view(target)


def _as_register(register, value):
    kind = np.dtype(register.kind)
    if value.dtype == kind:
        return value
    return value.view(kind) if value.dtype.itemsize == kind.itemsize else value.astype(kind)
