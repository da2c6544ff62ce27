"""The instructions that order global memory between blocks: strong loads and stores, atomic operations, fences, and the
wait for earlier launches. ``order`` has their rules."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .memory import UNSIGNED
from .opcodes import TYPES
from .order import STRONG
from .parse import Register, Vector
from .threads import WARP, addresses, reader

# Results of atomic operations, from the number that is there and its operands.
ATOMIC = {
    "add": lambda before, amount: before + amount,
    "exch": lambda before, value: value,
    "cas": lambda before, expected, value: np.where(before == expected, value, before),
}
SEMANTICS = {"relaxed", "acquire", "release", "acq_rel", "volatile"}


def is_strong(instruction):
    """Return whether a load or store is strong."""
    return bool(SEMANTICS & {*instruction.modifiers})


@dataclass(frozen=True)
class Access:
    """A strong access: ``wide`` if its scope is the card; ``change`` gives what it stores, if it stores."""

    wide: bool
    acquires: bool
    releases: bool
    reads: bool
    change: object = None

    @classmethod
    def of(cls, instruction, **kind):
        names = {*instruction.modifiers}
        return cls(
            not names & {"cta", "cluster"}, bool(names & {"acquire", "acq_rel"}), bool(names & {"release", "acq_rel"}),
            **kind,
        )  # fmt: skip

    def run(self, threads, thread, address, count, size, operands):
        """Do the access of a thread; return the numbers that were there."""
        memory, now = threads.memory, int(threads.now[thread])
        places, units = memory.places(address, size, size * count)
        order, units, places = memory.order, units.ravel(), places[0] + np.arange(count)
        stamps, view = np.full(len(units), now | STRONG if self.wide else now), memory.views[size]
        before = view[places]
        if self.reads:
            unknown = order.read(units, stamps, "cg" if self.wide else "ca")
            if self.wide:
                order.acquire(int(units[0]), now, self.acquires)
            before = np.where(unknown.any(), ~UNSIGNED[size](0), before)
        if self.change is not None:
            after = self.change(before, *operands)
            order.write(units, stamps, (after == before).all())
            if self.wide:
                order.release(int(units[0]), now, self.releases, self.reads)
            threads.progress += int((after != before).any())
            view[places] = after
        return before


def _step(instruction, access, place, results, operands, kind):
    """Return the access as a function of the active threads. ``operands`` are tuples, a part for each number."""
    size = TYPES[kind](0).itemsize
    where, count = addresses(place, "u64"), max(map(len, (results, *operands)))
    reads = [[reader(part, f"b{8 * size}") for part in parts] for parts in operands]

    def run(active):
        threads, at = active.threads, where(active)
        values = [np.stack([active.pick(read(threads)) for read in parts], axis=1) for parts in reads]
        before, changes = np.empty((len(at), count), UNSIGNED[size]), np.zeros(len(at), np.bool_)
        # one thread after another, in any order
        for lane in threads.random.permutation(len(at)):
            thread, progress = active.index[lane], threads.progress
            before[lane] = access.run(
                threads, thread, at[lane : lane + 1], count, size, [value[lane] for value in values]
            )
            changes[lane] = threads.progress > progress
        if access.releases:
            threads.pass_release(active.some_warps)
        if access.reads:
            threads.poll(active.index, at, before[:, 0], changes)
        for part, value in zip(results, before.T, strict=False):
            if isinstance(part, Register):
                active.scatter(part, value)

    return run


def _parts(operand):
    return operand.parts if isinstance(operand, Vector) else (operand,)


def load_step(instruction):
    """Return a strong load as a function of the active threads."""
    target, place = instruction.operands
    access = Access.of(instruction, reads=True)
    return _step(instruction, access, place, _parts(target), [], instruction.modifiers[-1])


def store_step(instruction):
    """Return a strong store as a function of the active threads."""
    place, source = instruction.operands
    access = Access.of(instruction, reads=False, change=lambda before, value: value)
    return _step(instruction, access, place, (), [_parts(source)], instruction.modifiers[-1])


def atomic_step(instruction):
    """Return an atomic operation, or a reduction without a result, as a function of the active threads."""
    names, operands = instruction.modifiers, instruction.operands
    (change,) = (ATOMIC[name] for name in names if name in ATOMIC)
    if "global" not in names or names[-1][0] == "f":
        raise NotImplementedError(instruction.name)
    results, (place, *values) = (operands[:1], operands[1:]) if names[0] == "atom" else ((), operands)
    access = Access.of(instruction, reads=True, change=change)
    return _step(instruction, access, place, results, [(value,) for value in values], names[-1])


def _stamps(active):
    """Return the stamps of the warps that are here."""
    return active.threads.now[active.some_warps * WARP].tolist()


def fence_step(instruction):
    """Return a fence as a function of the active threads."""
    names = instruction.modifiers
    if names[:3] == ("fence", "proxy", "async"):
        spaces = {name.partition("::")[0] for name in names[3:]} or {"shared", "global"}
        return lambda active: _fence_proxy(active, spaces)
    if names[0] == "fence" and names[1] not in ("acq_rel", "sc"):
        raise NotImplementedError(instruction.name)
    wide = names[-1] in ("gpu", "gl", "sys")

    def run(active):
        for stamp in _stamps(active) if wide else ():
            active.threads.memory.order.fence(stamp)
        active.threads.pass_release(active.some_warps)

    return run


def _fence_proxy(active, spaces):
    threads = active.threads
    if "shared" in spaces:
        threads.shared.fence_proxy(*active.owners)
    if "global" in spaces:
        for stamp in _stamps(active):
            threads.memory.order.fence_proxy(stamp)
        threads.pass_release(active.some_warps)


def dependent_step(instruction):
    """Return an instruction of dependent launches as a function of the active threads."""
    kind = instruction.modifiers[1]
    if kind == "wait":
        return lambda active: active.threads.memory.order.wait(active.now)
    if kind == "launch_dependents":
        return lambda active: active.threads.memory.order.close(active.threads.names[np.unique(active.owners[0])])
    raise NotImplementedError(instruction.name)
