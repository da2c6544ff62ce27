"""The instructions that order global memory between blocks: strong loads, atomic sums, and the fence of the async
proxy. ``order`` has their rules."""

from __future__ import annotations

import numpy as np

from .memory import UNSIGNED
from .opcodes import TYPES
from .order import STRONG
from .parse import Register, Vector
from .threads import WARP, addresses, reader

SEMANTICS = {"relaxed", "acquire", "release", "acq_rel", "volatile"}


def is_strong(instruction):
    """Return whether a load is strong."""
    return bool(SEMANTICS & {*instruction.modifiers})


def load_step(instruction):
    """Return a strong load as a function of the active threads."""
    target, place = instruction.operands
    return _step(instruction, place, target.parts if isinstance(target, Vector) else (target,), None)


def atomic_step(instruction):
    """Return an atomic sum as a function of the active threads."""
    target, place, amount = instruction.operands
    if not {"global", "add"} <= {*instruction.modifiers} or instruction.modifiers[-1][0] == "f":
        raise NotImplementedError(instruction.name)
    return _step(instruction, place, (target,), amount)


def _step(instruction, place, results, amount):
    """Return a strong load, which an atomic sum adds ``amount`` to, as a function of the active threads."""
    names, count, size = {*instruction.modifiers}, len(results), TYPES[instruction.modifiers[-1]](0).itemsize
    # the scope is the card
    wide = not names & {"cta", "cluster"}
    acquires, releases = bool(names & {"acquire", "acq_rel"}), bool(names & {"release", "acq_rel"})
    where, read = addresses(place, "u64"), None if amount is None else reader(amount, f"b{8 * size}")

    def one(threads, thread, address, added):
        """Do the access of a thread; return the numbers that were there."""
        memory, now = threads.memory, int(threads.now[thread])
        places, units = memory.places(address, size, size * count)
        order, units, places = memory.order, units.ravel(), places[0] + np.arange(count)
        stamps, view = np.full(len(units), now | STRONG if wide else now), memory.views[size]
        unknown = order.read(units, stamps, "cg" if wide else "ca")
        if wide and acquires:
            order.acquire(int(units[0]), now)
        before = np.where(unknown.any(), ~UNSIGNED[size](0), view[places])
        if added is not None:
            order.write(units, stamps, not added.any())
            if wide:
                order.exchange(int(units[0]), now, releases)
            view[places] = before + added
        return before

    def run(active):
        threads, at = active.threads, where(active)
        added = None if read is None else active.pick(read(threads))[:, None]
        before = np.empty((len(at), count), UNSIGNED[size])
        # one thread after another, in any order
        for lane in threads.random.permutation(len(at)):
            amount = None if added is None else added[lane]
            before[lane] = one(threads, active.index[lane], at[lane : lane + 1], amount)
        if releases:
            threads.pass_release(active.some_warps)
        for part, value in zip(results, before.T, strict=True):
            if isinstance(part, Register):
                active.scatter(part, value)

    return run


def _stamps(active):
    """Return the stamps of the warps that are here."""
    return active.threads.now[active.some_warps * WARP].tolist()


def fence_step(instruction):
    """Return a fence of the async proxy as a function of the active threads."""
    names = instruction.modifiers
    if names[:3] != ("fence", "proxy", "async"):
        raise NotImplementedError(instruction.name)
    spaces = {name.partition("::")[0] for name in names[3:]} or {"shared", "global"}
    return lambda active: _fence_proxy(active, spaces)


def _fence_proxy(active, spaces):
    threads = active.threads
    if "shared" in spaces:
        threads.shared.fence_proxy(*active.owners)
    if "global" in spaces:
        for stamp in _stamps(active):
            threads.memory.order.fence_proxy(stamp)
        threads.pass_release(active.some_warps)
