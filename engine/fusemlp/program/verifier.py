"""Checks of a program before it runs: order, updates, shapes, sharing of memory.

A program that passes reads nothing that was not written, overwrites nothing, updates no weight that is still to be
read, updates every trainable tensor once and no other, and never keeps two values that are both needed in one place.
"""

from collections.abc import Mapping
from typing import Any

from fusemlp.program.program import ITEM_BYTES, KINDS, Call, Program, Ref
from fusemlp_kernels.errors import FusemlpError
from fusemlp_kernels.ops import COMMON, FIXED, OPS, Operand, expected


class ProgramError(FusemlpError, RuntimeError):
    """A program that would compute something else than the training step it was made for."""


Places = Mapping[str, tuple[str, int, int]]
"""For each value that has memory of the engine's: (arena, first element, one past the last)."""


def verify(program: Program, places: Places | None = None) -> None:
    """Raise ProgramError, naming call and value, where the program or the placement of its values is wrong."""
    for value in program.values.values():
        if value.kind not in KINDS:
            raise ProgramError(f"value {value.name!r}: unknown kind {value.kind!r}")
        if value.dtype not in ("real", "compute") and value.dtype not in ITEM_BYTES:
            raise ProgramError(f"value {value.name!r}: unknown element type {value.dtype!r}")
    # M and n of the calls before
    common: dict[str, int] = {}
    for index, call in enumerate(program.calls):
        where = _where(index, call)
        if call.op not in OPS:
            raise ProgramError(f"{where}: there is no such op")
        for operand in OPS[call.op].required:
            if operand not in call.operands:
                raise ProgramError(f"{where}: operand {operand!r} is missing")
        for _, name in call.references:
            for member in program.members(name):
                if member not in program.values:
                    raise ProgramError(f"{where}: value {member!r} is not declared")
        records = OPS[call.op].operands
        _compare(program, call.operands, records, where, common)
        for record in records:
            for entry in call.operands.get(record.name, ()) if record.fields else ():
                _compare(program, entry, record.fields, where, common)
    _check_order(program)
    _check_updates(program)
    if places is not None:
        _check_sharing(program, places)
        _check_segments(program, places)


def _where(index: int, call: Call) -> str:
    return f"call {index} ({call.op})"


def _expand(program: Program, names: tuple[str, ...]) -> list[str]:
    return [member for name in names for member in program.members(name)]


def _check_order(program: Program) -> None:
    """Everything read was written before, from values that have not changed since; it is written again only if one has.
    Data of the caller are read and not written."""
    defined = {value.name for value in program.values.values() if value.kind not in ("work", "gradient")}
    read: set[str] = set()
    writers: dict[str, int] = {}
    # of each value the last writers of what it was made from; a value that is updated in place is made from itself
    sources: dict[str, dict[str, int | None]] = {}

    def stale(name: str) -> str | None:
        """Return a value that has been written again since ``name`` was made from it."""
        return next((source for source, writer in sources.get(name, {}).items() if writers.get(source) != writer), None)

    for index, call in enumerate(program.calls):
        where, op = _where(index, call), OPS[call.op]
        reads = _expand(program, call.reads)
        for name in reads:
            read.add(name)
            if name not in defined:
                raise ProgramError(f"{where}: reads {name!r}, which no call before it has written")
            if (source := stale(name)) is not None:
                raise ProgramError(f"{where}: reads {name!r}, made from {source!r} before call {writers[source]}")
        if "stats" in writers and "stats" not in call.writes and program.calls[writers["stats"]].op == call.op:
            raise ProgramError(f"{where}: call {writers['stats']} has counted the loss already")
        before = {name: writers.get(name) for name in reads}
        outputs: set[str] = set()
        written = [pair for pair in call.references if pair[0] in op.written]
        for operand, name in ((operand, member) for operand, arena in written for member in program.members(arena)):
            kind, wanted = program.values[name].kind, op.by_name[operand].kind
            if kind == "data":
                raise ProgramError(f"{where}: writes {name!r}, which belongs to the caller")
            if kind != wanted:
                raise ProgramError(f"{where}: {operand} {name!r} is of kind {kind!r}, expected {wanted!r}")
            if name in outputs:
                raise ProgramError(f"{where}: writes {name!r} twice")
            again = name in writers and program.calls[writers[name]].op == call.op
            kept = not (again and stale(name) is not None)
            if name in writers and (again if operand == "stats" else kept and operand in op.only_written):
                raise ProgramError(f"{where}: writes {name!r}, which call {writers[name]} has written")
            outputs.add(name)
        # parameters are those of the whole step: see _check_updates
        made_from = {
            name: at for name, at in before.items() if program.values[name].kind == "work" and name not in outputs
        }
        for name in outputs:
            writers[name] = index
            sources[name] = {} if name in before else made_from
        defined |= outputs
    ridged = {call.op: call.operands["ridge"].strength for call in program.calls if call.operands.get("ridge")}
    if program.trainable and any(ridged.values()) and "penalty" not in ridged:
        raise ProgramError("no call adds the penalty of the loss's ridge")
    for value in program.values.values():
        if value.kind == "data" and value.name not in read:
            raise ProgramError(f"no call reads {value.name!r}")
        if value.kind in ("work", "gradient") and value.name not in writers:
            raise ProgramError(f"no call writes {value.name!r}")


def _check_updates(program: Program) -> None:
    """Each trainable tensor is updated once, after its last reader; the clock is advanced once, at the end."""
    updated: dict[str, int] = {}
    advanced: list[int] = []
    for index, call in enumerate(program.calls):
        where = _where(index, call)
        writes = _expand(program, call.writes)
        for name in _expand(program, call.reads):
            if name in updated:
                raise ProgramError(f"{where}: reads {name!r} after call {updated[name]} has updated it")
        for name in writes:
            kind = program.values[name].kind
            # what of the arena an "update" changes is a matter of its segments
            if kind == "parameter" and name not in program.trainable and "segments" not in call.operands:
                raise ProgramError(f"{where}: updates {name!r}, which is frozen")
            if kind in ("parameter", "shadow"):
                updated[name] = index
        if "counters" in writes:
            advanced.append(index)
    shadows = {f"{name}.shadow" for name in program.trainable} & program.values.keys()
    missing = sorted((program.trainable | shadows) - updated.keys())
    if missing:
        raise ProgramError(f"nothing updates {', '.join(missing)}")
    if "hyper" in program.values and not advanced:
        raise ProgramError("no call advances the clock")
    if advanced and advanced != [len(program.calls) - 1]:
        raise ProgramError(f"the clock is advanced by calls {advanced}; it must be by the last update alone")


def lifetimes(program: Program) -> dict[str, tuple[int, int]]:
    """For each value made by the program: the first call that writes it, and the last that reads or writes it."""
    spans: dict[str, tuple[int, int]] = {}
    for index, call in enumerate(program.calls):
        for name in _expand(program, (*call.reads, *call.writes)):
            if program.values[name].kind in ("work", "gradient"):
                first, _ = spans.get(name, (index, index))
                spans[name] = (first, index)
    return spans


def _check_sharing(program: Program, places: Places) -> None:
    """Every value has its memory, and values whose memory overlaps are not alive during one and the same call."""
    spans = lifetimes(program)
    whole = (0, len(program.calls) - 1)
    for name, value in program.values.items():
        if value.kind in ("data", "control"):
            continue
        if name not in places:
            raise ProgramError(f"value {name!r} has no memory")
        _, start, stop = places[name]
        if stop - start < value.size:
            raise ProgramError(f"value {name!r} needs {value.size} elements, it has {stop - start}")
    placed = sorted((arena, start, stop, name) for name, (arena, start, stop) in places.items())
    for position, (arena, _, stop, name) in enumerate(placed):
        for other_arena, other_start, _, other in placed[position + 1 :]:
            if other_arena != arena or other_start >= stop:
                break
            first, last = spans.get(name, whole)
            other_first, other_last = spans.get(other, whole)
            if first <= other_last and other_first <= last:
                raise ProgramError(
                    f"values {name!r} (calls {first} to {last}) and {other!r} (calls {other_first} to {other_last}) "
                    f"share memory of {arena!r} from element {other_start} while both are needed"
                )


def _check_segments(program: Program, places: Places) -> None:
    """The segments of an update are the places of the trainable tensors, each once."""
    tensors = {
        places[name][1:]: name for name, value in program.values.items() if value.kind == "parameter" and name in places
    }
    for index, call in enumerate(program.calls):
        if "segments" not in call.operands:
            continue
        where = _where(index, call)
        updated: set[str] = set()
        for segment in call.operands["segments"]:
            name = tensors.get((segment.offset, segment.offset + segment.size))
            if name is None:
                raise ProgramError(
                    f"{where}: the segment of {segment.size} elements at {segment.offset} is no tensor's"
                )
            if name not in program.trainable:
                raise ProgramError(f"{where}: updates {name!r}, which is frozen")
            if name in updated:
                raise ProgramError(f"{where}: updates {name!r} twice")
            updated.add(name)
        missing = sorted(program.trainable - updated)
        if missing:
            raise ProgramError(f"{where}: no segment updates {', '.join(missing)}")


def _compare(
    program: Program, operands: Mapping[str, Any], records: tuple[Operand, ...], where: str, common: dict[str, int]
) -> None:
    """Each letter has one size in all shapes that are given."""
    sizes = {**FIXED, **common}
    for record in records:
        argument = operands.get(record.name)
        for reference in argument if isinstance(argument, tuple | list) else (argument,):
            if not isinstance(reference, Ref) or record.shape in (None, "A", "B"):
                continue
            dtype, letters = expected(record, operands)
            if dtype == "compute" and program.compute_bytes is None:
                dtype = "real"
            value = program.values[reference.name]
            named = f"{where}: {record.name} {reference.name!r}"
            if value.dtype != dtype:
                raise ProgramError(f"{named} is {value.dtype}, expected {dtype}")
            if len(value.shape) == len(letters):
                for letter, size in zip(letters, value.shape, strict=True):
                    sizes.setdefault(letter, size)
            wanted = tuple(sizes.get(letter, letter) for letter in letters)
            if value.shape != wanted:
                raise ProgramError(f"{named} has shape {value.shape}, expected {wanted}")
    common |= {letter: sizes[letter] for letter in COMMON if letter in sizes}
