"""Checks of a program before it runs: order, updates, shapes, sharing of memory.

A program that passes reads nothing that was not written, overwrites nothing, updates no weight that is still to be
read, updates every trainable tensor once and no other, and never keeps two values that are both needed in one place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fusemlp.program.program import ITEM_BYTES, KINDS, UPDATED, WRITTEN, Call, Program, Ref
from fusemlp_kernels.errors import FusemlpError


class ProgramError(FusemlpError, RuntimeError):
    """A program that would compute something else than the training step it was made for."""


Places = Mapping[str, tuple[str, int, int]]
"""For each value that has memory of the engine's: (arena, first element, one past the last)."""

# The kind of value that an operand writes, where it is not "work".
_WRITES = {
    "stats": "control",
    "hyper": "control",
    "counters": "control",
    "history": "control",
    "params": "parameter",
    "grads": "gradient",
    "gradients": "gradient",
    "states": "state",
    "layers.dw": "gradient",
    "layers.db": "gradient",
    "layers.w": "parameter",
    "layers.b": "parameter",
    "layers.w_state": "state",
    "layers.b_state": "state",
    "slopes.grad": "gradient",
    "slopes.param": "parameter",
    "slopes.state": "state",
    "layers.w_shadow": "shadow",
    "shadow": "shadow",
}
# Operands that an op cannot do without.
_NEEDED = {
    "linear": ("x", "w", "b", "y"),
    "linear_loss_grad": ("x", "w", "b", "target", "counters", "stats", "loss"),
    "loss_grad": ("z", "target", "counters", "stats", "loss"),
    "grad_input": ("dz", "w", "y", "dz_prev"),
    "grad_weight": ("layers", "rule", "counters"),
    "grad_weight_update": ("layers", "rule", "hyper", "rates", "counters"),
    "update": ("params", "grads", "states", "segments", "rule", "hyper", "rates", "counters"),
    "advance": ("rule", "hyper", "rates", "counters"),
    "train_resident": (
        *("x", "target", "rows", "batch", "layers", "loss", "stats"),
        *("params", "gradients", "states", "segments", "rule", "hyper", "rates", "counters"),
    ),
}
# The shapes of operands in the letters of the contract, in the order in which they are compared: M rows of a batch and
# n examples, the same in the whole program, K inputs and N outputs. A word in front is the element type, if not real;
# "compute" is real where the precision is not mixed.
_LOSS = {"class_weight": "N", "weight_rows": "M", "slope_param": "1", "dslope": "1"}
_SHAPES = {
    "linear": {
        "rows": "int64 M", "w": "compute NK", "x": "", "b": "N", "y": "compute MN", "z": "compute MN",
        "keep": "bool MN", "gathered": "compute MK", "slope_param": "1",
    },
    "linear_loss_grad": {
        "rows": "int64 M", "w": "compute NK", "x": "", "b": "N", "dz": "compute MN", "gathered": "compute MK", **_LOSS,
    },
    "loss_grad": {"rows": "int64 M", "z": "compute MN", "dz": "compute MN", **_LOSS},
    "grad_input": {
        "dz": "compute MN", "w": "compute NK", "y": "compute MK", "z": "compute MK", "keep": "bool MK",
        "dz_prev": "compute MK", "slope_param": "1", "dslope": "1",
    },
    "train_resident": {"x": "", "class_weight": "N"},
    "layer": {
        "dz": "compute MN", "rows": "int64 M", "x": "", "dw": "NK", "db": "N", "w": "NK", "b": "N", "w_state": "NK",
        "b_state": "N", "w_shadow": "compute NK",
    },
    "slope": {"dslope": "1", "grad": "1", "param": "1", "state": "1"},
}  # fmt: skip


def verify(program: Program, places: Places | None = None) -> None:
    """Raise ProgramError, naming call and value, where the program or the placement of its values is wrong."""
    for value in program.values.values():
        if value.kind not in KINDS:
            raise ProgramError(f"value {value.name!r}: unknown kind {value.kind!r}")
        if value.dtype not in ("real", "compute") and value.dtype not in ITEM_BYTES:
            raise ProgramError(f"value {value.name!r}: unknown element type {value.dtype!r}")
    common: dict[str, int] = {}
    for index, call in enumerate(program.calls):
        where = _where(index, call)
        if call.op not in WRITTEN:
            raise ProgramError(f"{where}: there is no such op")
        for operand in _NEEDED[call.op]:
            if operand not in call.operands:
                raise ProgramError(f"{where}: operand {operand!r} is missing")
        for _, name in call.references():
            for member in program.members(name):
                if member not in program.values:
                    raise ProgramError(f"{where}: value {member!r} is not declared")
        _check_shapes(program, call, where, common)
    _check_order(program)
    _check_updates(program)
    if places is not None:
        _check_sharing(program, places)
        _check_segments(program, places)


def _where(index: int, call: Call) -> str:
    return f"call {index} ({call.op})"


def _expand(program: Program, names: tuple[str, ...]) -> list[str]:
    return [member for name in names for member in program.members(name)]


def _written(program: Program, call: Call) -> Iterator[tuple[str, str]]:
    """Every (operand, value) that the call writes."""
    for operand, name in call.references():
        if operand in WRITTEN[call.op]:
            for member in program.members(name):
                yield operand, member


def _check_order(program: Program) -> None:
    """Everything read was written before, once; what the caller gave is read and not written."""
    defined = {
        value.name
        for value in program.values.values()
        if value.kind in ("parameter", "state", "shadow", "data", "control")
    }
    read: set[str] = set()
    writers: dict[str, int] = {}
    for index, call in enumerate(program.calls):
        where = _where(index, call)
        read.update(_expand(program, call.reads))
        for name in _expand(program, call.reads):
            if name not in defined:
                raise ProgramError(f"{where}: reads {name!r}, which no call before it has written")
        own: set[str] = set()
        for operand, name in _written(program, call):
            kind, wanted = program.values[name].kind, _WRITES.get(operand, "work")
            if kind == "data":
                raise ProgramError(f"{where}: writes {name!r}, which belongs to the caller")
            if kind != wanted:
                raise ProgramError(f"{where}: {operand} {name!r} is of kind {kind!r}, expected {wanted!r}")
            if name in own:
                raise ProgramError(f"{where}: writes {name!r} twice")
            if name in writers and (operand not in UPDATED or operand == "stats"):
                raise ProgramError(f"{where}: writes {name!r}, which call {writers[name]} has written")
            own.add(name)
            writers[name] = index
        defined |= own
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
            if program.values[name].kind == "shadow":
                updated[name] = index
            if program.values[name].kind == "parameter":
                # what of the arena an "update" changes is a matter of its segments
                if name not in program.trainable and "segments" not in call.operands:
                    raise ProgramError(f"{where}: updates {name!r}, which is frozen")
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
        raise ProgramError(f"the clock is advanced by calls {advanced}; it must be by the last call alone")


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


def _check_shapes(program: Program, call: Call, where: str, common: dict[str, int]) -> None:
    """The shapes and element types of an op's operands agree; ``common`` holds M and n of the calls before."""
    operands = call.operands
    if call.op in ("grad_weight", "grad_weight_update"):
        for layer in operands["layers"]:
            _compare(program, layer, {**_SHAPES["layer"], "x": f"compute {_examples(layer, 'rows')}K"}, where, common)
        for slope in operands.get("slopes", ()):
            _compare(program, slope, _SHAPES["slope"], where, common)
        return
    shapes = dict(_SHAPES.get(call.op, {}))
    if "x" in shapes:
        rows = "x_rows" if call.op == "linear_loss_grad" else "rows"
        shapes["x"] = f"compute {_examples(operands, rows)}K"
    if "loss" in operands:
        loss, examples = operands["loss"], _examples(operands, "rows")
        classes = loss.kind == "cross_entropy" and not loss.soft
        kind, width = ("int64 ", "") if classes else ("", "N")
        shapes |= {"target": f"{kind}{examples}{width}", "target_rows": f"{kind}M{width}", "weight": examples}
    _compare(program, operands, shapes, where, common)


def _examples(operands: Mapping[str, Any], rows: str) -> str:
    """The letter of the rows of x or of the targets: a batch, or all examples where it is picked from them."""
    return "M" if operands.get(rows) is None else "n"


def _compare(
    program: Program, operands: Mapping[str, Any], shapes: Mapping[str, str], where: str, common: dict[str, int]
) -> None:
    """Each letter has one size in all shapes that are given."""
    sizes = {"1": 1, **common}
    for operand, wanted in shapes.items():
        dtype, _, letters = wanted.rpartition(" ")
        if dtype == "compute" and program.compute_bytes is None:
            dtype = "real"
        given = operands.get(operand)
        for one in given if isinstance(given, tuple | list) else (given,):
            if not isinstance(one, Ref):
                continue
            value = program.values[one.name]
            named = f"{where}: {operand} {one.name!r}"
            if value.dtype != (dtype or "real"):
                raise ProgramError(f"{named} is {value.dtype}, expected {dtype or 'real'}")
            if len(value.shape) == len(letters):
                for letter, size in zip(letters, value.shape, strict=True):
                    sizes.setdefault(letter, size)
            expected = tuple(sizes.get(letter, letter) for letter in letters)
            if value.shape != expected:
                raise ProgramError(f"{named} has shape {value.shape}, expected {expected}")
    common |= {letter: sizes[letter] for letter in "Mn" if letter in sizes}
