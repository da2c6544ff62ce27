"""From an instruction to a function that runs it for the active threads."""

import numpy as np

from . import copies, strong, warpgroup
from .faults import Problem
from .matrix import matrix_addresses, multiply, reduced, shuffle
from .opcodes import TYPES, arithmetic, packed_comparison
from .parse import Address, Register, Vector
from .threads import addresses, reader


def step_of(instruction, products):
    """Return the instruction as a function of the active threads. Raises NotImplementedError for an unknown one.

    Branches, calls and barriers are not here: they end a block of code. ``products`` are the registers of wgmma.
    """
    try:
        run = _unguarded(instruction, products)
    except (NotImplementedError, KeyError, IndexError) as error:
        raise NotImplementedError(f"the emulator has no {instruction.place.text!r}") from error
    run = warpgroup.noted(instruction, run, products)
    if instruction.guard is None:
        return run
    read, negated = reader(instruction.guard, "pred"), instruction.negated

    def guarded(active):
        chosen = read(active.threads)
        some = active.within(~chosen if negated else chosen)
        if some is not None:
            run(some)

    return guarded


def _unguarded(instruction, products):
    first = instruction.modifiers[0]
    if first == "wgmma":
        return warpgroup.step_of(instruction, products)
    if instruction.name == "bar.warp.sync":
        # a warp's threads run in step: all of them must be here
        return lambda active: _ignore(active.warps)
    if first in SPECIAL:
        return SPECIAL[first](instruction)
    if first == "mov" and any(isinstance(operand, Vector) for operand in instruction.operands):
        return _repack(instruction)
    if first == "setp" and instruction.name.endswith(".bf16x2"):
        return _compare_pairs(instruction)
    kinds, function = arithmetic(instruction.name)
    target, *sources = instruction.operands
    register = _register(target)
    reads = [reader(source, kinds[min(place, len(kinds) - 1)]) for place, source in enumerate(sources)]
    if len(reads) == 1:
        (one,) = reads
        return lambda active: active.write(register, function(one(active.threads)))
    if len(reads) == 2:
        left, right = reads
        return lambda active: active.write(register, function(left(active.threads), right(active.threads)))
    return lambda active: active.write(register, function(*(read(active.threads) for read in reads)))


def _compare_pairs(instruction):
    low, high, *sources = instruction.operands
    left, right = (reader(source, "b32") for source in sources)
    function = packed_comparison(instruction.name)

    def run(active):
        found = function(left(active.threads), right(active.threads))
        for register, value in zip((low, high), found, strict=True):
            active.write(_register(register), value)

    return run


def _repack(instruction):
    """mov between a register and a vector of its parts, the lowest first."""
    target, source = instruction.operands
    bits = int(instruction.name.rpartition(".b")[2])
    if isinstance(target, Vector):
        parts, narrow = target.parts, np.dtype(f"u{bits // 8 // len(target.parts)}")
        read = reader(source, f"b{bits}")

        def unpack(active):
            whole = np.ascontiguousarray(read(active.threads)).view(narrow).reshape(-1, len(parts))
            for place, part in enumerate(parts):
                if part is not None:
                    active.write(_register(part), np.ascontiguousarray(whole[:, place]))

        return unpack
    assert isinstance(source, Vector)
    reads = [reader(part, f"b{bits // len(source.parts)}") for part in source.parts]

    def pack(active):
        whole = np.stack(np.broadcast_arrays(*(read(active.threads) for read in reads)), axis=1)
        active.write(_register(target), whole.view(f"u{bits // 8}")[:, 0])

    return pack


# The state spaces, and the types of their addresses.
SPACES = {"param": "", "global": "u64", "shared": "u32"}


def _space(instruction):
    """Return the state space of a load or store, and the type of its addresses."""
    names = [name.partition("::")[0] for name in instruction.modifiers]
    return next((space, kind) for space, kind in SPACES.items() if space in names)


def _load(instruction):
    target, source = instruction.operands
    (space, wide), kind = _space(instruction), instruction.modifiers[-1]
    if space == "param":
        read = reader(source, kind)
        return lambda active: active.write(_register(target), read(active.threads))
    if space == "global" and strong.is_strong(instruction):
        return strong.load_step(instruction)
    parts = target.parts if isinstance(target, Vector) else (target,)
    how = "cg" if {"cg", "cv"} & {*instruction.modifiers} else "ca"
    size, address = TYPES[kind](0).itemsize, addresses(source, wide)
    signed = TYPES[kind] if kind[0] == "s" else None

    def run(active):
        if space == "global":
            values = active.threads.memory.read(address(active), size, len(parts), active.now, how)
        else:
            values = active.threads.shared.read(*active.owners, address(active), size, len(parts))
        for part, value in zip(parts, values, strict=True):
            if part is not None:
                active.scatter(_register(part), value if signed is None else value.view(signed))

    return run


def _store(instruction):
    target, source = instruction.operands
    (space, wide), kind = _space(instruction), instruction.modifiers[-1]
    bits = f"b{8 * TYPES[kind](0).itemsize}"
    if space == "param":
        read = reader(source, bits)
        return lambda active: active.write(_register(target), read(active.threads))
    if space == "global" and strong.is_strong(instruction):
        return strong.store_step(instruction)
    reads = [reader(part, bits) for part in (source.parts if isinstance(source, Vector) else (source,))]
    address = addresses(target, wide)

    def run(active):
        values = [active.pick(read(active.threads)) for read in reads]
        if space == "global":
            active.threads.memory.write(address(active), values, active.now)
        else:
            active.threads.shared.write(*active.owners, address(active), values)

    return run


def _shuffle(instruction):
    target, source, lane, clamp, _ = instruction.operands
    reads = [reader(operand, "b32") for operand in (source, lane, clamp)]
    mode = {"bfly": "bfly", "idx": "idx"}[instruction.modifiers[2]]

    def run(active):
        value, number, limit = (active.by_warp(read(active.threads)) for read in reads)
        active.scatter(_register(target), shuffle(value, mode, number, limit))

    return run


def _reduce(instruction):
    target, source, _ = instruction.operands
    read, mode = reader(source, instruction.modifiers[-1]), instruction.modifiers[2]
    return lambda active: active.scatter(_register(target), reduced(active.by_warp(read(active.threads)), mode))


def _matrix_places(instruction, operand):
    """Return a function for block, warp and address of each element of ldmatrix and stmatrix."""
    assert isinstance(operand, Address)
    read, offset = reader(operand.base, "u32"), np.uint32(operand.offset)
    transposed = "trans" in instruction.modifiers

    def places(active, count):
        addresses = matrix_addresses(active.by_warp(read(active.threads) + offset), count, transposed)
        owners = (
            np.broadcast_to(active.by_warp(of)[None, :, :, None], addresses.shape).ravel()
            for of in (active.threads.block, active.threads.warp)
        )
        return (*owners, addresses.ravel())

    return places


def _load_matrix(instruction):
    target, source = instruction.operands
    assert isinstance(target, Vector)
    places = _matrix_places(instruction, source)

    def run(active):
        found = active.threads.shared.read(*places(active, len(target.parts)), 2)[0]
        for part, value in zip(target.parts, found.view(np.uint32).reshape(len(target.parts), -1), strict=True):
            active.scatter(_register(part), value)

    return run


def _store_matrix(instruction):
    target, source = instruction.operands
    assert isinstance(source, Vector)
    reads, places = [reader(part, "b32") for part in source.parts], _matrix_places(instruction, target)

    def run(active):
        values = np.stack([active.by_warp(read(active.threads)) for read in reads])
        active.threads.shared.write(*places(active, len(reads)), [values.view(np.uint16).ravel()])

    return run


def _multiply(instruction):
    target, *sources = instruction.operands
    kind = instruction.modifiers[-3]
    shape = {"tf32": "m16n8k8", "bf16": "m16n8k16", "f16": "m16n8k16"}[kind]
    if shape not in instruction.modifiers or instruction.modifiers[-1] != "f32":
        raise NotImplementedError(instruction.name)
    reads = [[reader(part, "b32") for part in source.parts] for source in sources]

    def run(active):
        a, b, c = (np.stack([active.by_warp(read(active.threads)) for read in each]) for each in reads)
        for part, value in zip(target.parts, multiply(a, b, c, kind), strict=True):
            active.scatter(_register(part), value)

    return run


def _copy(instruction):
    if "bulk" in instruction.modifiers:
        return copies.copy_step(instruction)
    if instruction.name == "cp.async.commit_group":
        return copies.commit
    if instruction.name == "cp.async.wait_group":
        (count,) = instruction.operands
        return lambda active: copies.wait(active, count)
    target, source, width, *given = instruction.operands
    if instruction.modifiers[1] != "async" or instruction.modifiers[-1] != "global":
        raise NotImplementedError(instruction.name)
    places, sources, how = addresses(target, "u32"), addresses(source, "u64"), instruction.modifiers[2]
    read = reader(given[0] if given else width, "u32")

    def run(active):
        wanted = active.pick(read(active.threads))
        if ((wanted != 0) & (wanted != width)).any():
            raise Problem(f"a copy of {width} bytes from {int(wanted.max())}: the emulator has only 0 or {width}")
        values = np.zeros((len(wanted), width // 4), np.uint32)
        filled = np.flatnonzero(wanted)
        if len(filled):
            found = active.threads.memory.read(sources(active)[filled], 4, width // 4, active.now[filled], how)
            values[filled] = np.stack(found, axis=1)
        copies.begin(active, places(active), values)

    return run


def _register(operand):
    if not isinstance(operand, Register):
        raise NotImplementedError(f"the result {operand}")
    return operand


def _ignore(value):
    """Use a value that is computed for its checks."""


SPECIAL = {
    "ld": _load, "st": _store, "atom": strong.atomic_step, "red": strong.atomic_step, "shfl": _shuffle,
    "redux": _reduce, "ldmatrix": _load_matrix, "stmatrix": _store_matrix, "mma": _multiply, "cp": _copy,
    "fence": strong.fence_step, "membar": strong.fence_step, "griddepcontrol": strong.dependent_step,
    "mbarrier": copies.barrier_step, "elect": copies.elect_step,
}  # fmt: skip
