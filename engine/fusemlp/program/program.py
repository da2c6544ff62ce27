"""A training step as data: the ordered kernel calls, the values they read and write, and what each costs.

A program knows no backend and no array. It can be printed, verified (``verifier``) and bound (``runtime.programs``).

Over several processes, the ranks, a batch is cut into shards, whose gradients are added (``Sharding``).
With ``ordered`` a batch has 8 shards on any number of ranks, and their gradients are added in one fixed binary tree:
((0+1)+(2+3)) + ((4+5)+(6+7)). A rank has 1, 2, 4 or 8 neighbours of the 8, so the lower part of the tree is its own,
and it sends one sum. A shard is computed alike wherever it is. So the bits do not depend on the number of ranks.
With ``fast`` each rank has one shard, and the collective adds in the order that it likes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import takewhile
from typing import Any, NamedTuple

from fusemlp.describe.checks import aligned, check_choice
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.contract import Dropout, LossSpec, Noise, Perturbation, Ridge, Segment, TensorRule, UpdateRule
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.ops import OPS

# The origin of a value: "parameter", "gradient", "state", "shadow" (the parameters in 16 bits): a stretch of the
# arena of that name; "data": given by the caller; "control": counters and the like, there before the first call;
# "work": written by one call, read by others.
KINDS = ("parameter", "gradient", "state", "shadow", "data", "control", "work")
ITEM_BYTES = {"float64": 8, "int64": 8, "bool": 1, "function": 0}

# The call between the ranks, which ends the calls of a shard.
COLLECTIVE = "all_reduce"
# The call of a function of the caller's, which a loop over steps waits for.
CALLBACK = "own_loss"

_RECORDS = [operand for op in OPS.values() for operand in op.by_name.values()]
# The step reads x and the targets through the rows of the batch; the printed program says so.
THROUGH_ROWS = frozenset(operand.name for operand in _RECORDS if operand.rows)
UNPRINTED = frozenset(operand.name for operand in _RECORDS if operand.hidden)
# Operands, and parts of them, that are no matter of a program's structure, and the descriptions that these are in.
NUMBERS = (float, UpdateRule, TensorRule, Dropout, Ridge, Noise, Perturbation)
DESCRIPTIONS = (LossSpec, Segment)


@dataclass(frozen=True)
class Ref:
    """An operand that is a value of the program, by name."""

    name: str


@dataclass(frozen=True)
class Value:
    """An array of the program: shape, element type and kind (see ``KINDS``).

    The element type is "real", "float64", "int64" or "bool"; in mixed precision "compute" for what the matrix products
    read; "function" for one of the caller's, which is no array.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kind: str

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Call:
    """One kernel call: ``operands`` are constants, ``Ref``s, and sequences and mappings of them.

    ``label`` is what the printed program adds to the op; ``products`` are the matrix products in it, as (M, N, K).
    """

    op: str
    operands: Mapping[str, Any]
    label: str = ""
    products: tuple[tuple[int, int, int], ...] = ()

    def but(self, **operands: Any) -> Call:
        """Return the call with these operands in place of its own; those that are None are left out."""
        changed = {**self.operands, **operands}
        return replace(
            self, operands={name: value for name, value in changed.items() if name not in operands or value is not None}
        )

    @cached_property
    def references(self) -> tuple[tuple[str, str], ...]:
        """Every (operand, value name); the operand as in ``Op.by_name``."""
        return tuple(pair for operand, given in self.operands.items() for pair in _references(operand, given))

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """Names of the values that the call reads, each once."""
        unread = OPS[self.op].only_written if self.op in OPS else frozenset()
        return tuple(dict.fromkeys(name for operand, name in self.references if operand not in unread))

    @cached_property
    def writes(self) -> tuple[str, ...]:
        """Names of the values that the call writes, each once."""
        written = OPS[self.op].written if self.op in OPS else frozenset()
        return tuple(dict.fromkeys(name for operand, name in self.references if operand in written))

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of the matrix products, a multiplication and an addition being two."""
        return sum(2 * m * n * k for m, n, k in self.products)


def _references(operand: str, given: Any) -> Iterator[tuple[str, str]]:
    if isinstance(given, Ref):
        yield operand, given.name
    elif isinstance(given, tuple | list):
        for inner in given:
            yield from _references(operand, inner)
    elif isinstance(given, Mapping):
        for key, inner in given.items():
            yield from _references(f"{operand}.{key}", inner)


def resolve(operands: Mapping[Any, Any], lookup: Callable[[str], Any]) -> dict[Any, Any]:
    """Return the operands of a call with every ``Ref`` replaced by what ``lookup`` has for its name."""
    resolved = dict(operands)
    for name, value in operands.items():
        if isinstance(value, Ref):
            resolved[name] = lookup(value.name)
        elif isinstance(value, Mapping):
            resolved[name] = resolve(value, lookup)
        elif isinstance(value, tuple | list):
            resolved[name] = tuple(resolve(dict(enumerate(value)), lookup).values())
    return resolved


class Structure:
    """All of a program but its numbers: equal for two of which the verifier and the plan of the workspace say the same.

    Its hash is computed once.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._parts = (
            tuple(program.values.items()),
            tuple((call.op, _form(call.operands)) for call in program.calls),
            tuple(program.arenas.items()),
            program.trainable,
            program.real_bytes,
            program.compute_bytes,
            program.resident,
            program.sharding,
        )
        self._hash = hash(self._parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and self._parts == other._parts

    def __hash__(self) -> int:
        return self._hash


def _form(given: Any) -> Hashable:
    """An operand without its numbers: of each the name of its type stays."""
    if isinstance(given, Ref):
        return given
    if isinstance(given, Mapping):
        return tuple((name, _form(inner)) for name, inner in given.items())
    if isinstance(given, tuple | list):
        return tuple([_form(inner) for inner in given])
    if isinstance(given, NUMBERS):
        return type(given).__name__
    if isinstance(given, DESCRIPTIONS):
        return (type(given), *[_form(inner) for inner in vars(given).values()])
    # names, flags, counts
    return type(given), given


ORDERED, FAST = "ordered", "fast"
REDUCTIONS = (ORDERED, FAST)
# The shards of an ordered sum.
SHARDS = 8


class Sharding(NamedTuple):
    """A batch over ``world`` ranks; ``reduce`` is a name of REDUCTIONS.

    One that is alone has no ``reduce``, and counts as false.
    """

    reduce: str
    world: int

    def check(self) -> Sharding:
        """Return this; raises ArgumentError for an unknown name, or a number of ranks that has no ordered sum."""
        check_choice("reduce", self.reduce, REDUCTIONS)
        if self.reduce == ORDERED and SHARDS % self.world:
            raise ArgumentError(
                f"reduce: 'ordered' adds {SHARDS} shards of the batch in one tree, on 1, 2, 4 or 8 ranks, and there "
                f"are {self.world}; start another number of processes, or give reduce='fast'"
            )
        return self

    @property
    def shards(self) -> int:
        """The shards of a batch."""
        return SHARDS if self.reduce == ORDERED else self.world

    def __bool__(self) -> bool:
        return bool(self.reduce)

    @property
    def own(self) -> int:
        """The shards of a rank."""
        return self.shards // self.world

    def rows(self, batch_size: int) -> int:
        """Return the rows of a shard; the last shards of a batch may have fewer, or none."""
        return -(-batch_size // self.shards)

    def firsts(self, rank: int, rows: int) -> tuple[int, ...]:
        """Return the row of the batch with which each shard of a rank begins, a shard having ``rows``."""
        return tuple(rows * shard for shard in range(rank * self.own, (rank + 1) * self.own))

    def owner(self, places: Array, batch_size: int) -> Array:
        """Return the rank that has each of these rows of a batch, ``batch_size`` being that of a whole one."""
        return places // (self.rows(batch_size) * self.own)

    def received(self, size: int) -> int:
        """Return the bytes that a rank receives by a sum of ``size`` bytes over all; with ``fast`` at least."""
        others = self.world - 1
        return size * others if self.reduce == ORDERED else 2 * size * others // self.world

    def __str__(self) -> str:
        return f"{self.reduce}, {self.world} rank{'' if self.world == 1 else 's'}"


ALONE = Sharding("", 1)


@dataclass(frozen=True)
class Program:
    """Kernel calls in order, over ``values``.

    ``arenas`` names the flat arrays that hold several values at once, with the values in them ("params": w0, b0, ...).
    ``real_bytes`` is the size of an element of type "real", ``compute_bytes`` of one of type "compute", where the
    precision is mixed. ``resident``: the calls run inside ``train_resident``, in one loop over many steps. With
    ``sharding`` those before ``COLLECTIVE`` are of one shard of the batch. The calls with the optimizer
    are those of all ranks together, each of which may have its slice.
    """

    values: Mapping[str, Value]
    calls: tuple[Call, ...]
    arenas: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    trainable: frozenset[str] = frozenset()
    real_bytes: int = 4
    compute_bytes: int | None = None
    resident: bool = False
    sharding: Sharding = ALONE

    @cached_property
    def memo(self) -> dict[int, dict[str, Any]]:
        """Notes of a backend for each call, with which it binds the program faster to the arrays of another model."""
        return {}

    def item_bytes(self, dtype: str) -> int:
        """Bytes of an element."""
        if dtype == "compute" and self.compute_bytes is not None:
            return self.compute_bytes
        return ITEM_BYTES.get(dtype, self.real_bytes)

    def members(self, name: str) -> tuple[str, ...]:
        """The values that a name stands for: those in an arena, or the value itself."""
        return self.arenas.get(name, (name,))

    def bytes_of(self, name: str) -> int:
        """Bytes that a call has to move for a value, at least."""
        value = self.values.get(name)
        if value is None:
            return sum(self.bytes_of(member) for member in self.members(name))
        return value.size * self.item_bytes(value.dtype)

    def traffic(self, call: Call) -> int:
        """Bytes that the call reads and writes, each value once in each direction.

        Of x, targets and weights that are read through ``rows``, the rows of a batch count; of the table of rates, two.
        """
        batch = self.values["rows"].shape[0] if "rows" in self.values else None
        total = 0
        for name in call.reads:
            size = self.bytes_of(name)
            if batch is not None and name in THROUGH_ROWS and self.values[name].shape[0]:
                size = size // self.values[name].shape[0] * batch
            if name == "rates":
                # the first row and that of the next update
                size = size // self.values[name].shape[0] * 2
            total += size
        total += sum(self.bytes_of(name) for name in call.writes)
        return total

    @cached_property
    def structure(self) -> Structure:
        """The program without its numbers."""
        return Structure(self)

    @cached_property
    def flops(self) -> int:
        """Floating-point operations of the matrix products of all calls."""
        return sum(call.flops for call in self.calls)

    @property
    def launches(self) -> int:
        """The number of kernels that a step starts; calls in a loop are one, up to a collective."""
        if self.sharding:
            # after the collective comes the update alone
            return 2 if self.resident else len(self.before_reduction) * self.sharding.own + 1
        return 1 if self.resident else len(self.calls) - self.calls_back

    @cached_property
    def calls_back(self) -> bool:
        """Return whether a step calls a function of the caller's."""
        return any(call.op == CALLBACK for call in self.calls)

    @property
    def before_reduction(self) -> tuple[Call, ...]:
        """The calls of a shard: those before the collective."""
        return tuple(takewhile(lambda call: call.op != COLLECTIVE, self.calls))

    def _shared(self, sharding: Sharding) -> str:
        """Return a sentence on what a rank does of a step, and what it receives."""
        before = self.before_reduction
        rows = next(call.products for call in before if call.products)[0][0]
        received = sharding.received(sum(map(self.bytes_of, self.calls[len(before)].writes)))
        return (
            f"calls 0 to {len(before) - 1} for each shard of a batch, up to {rows} rows; a rank "
            f"has {sharding.own}, receives {scaled(received)}B by {COLLECTIVE} from the others"
        )

    def __str__(self) -> str:
        rows = [("#", "call", "reads", "writes", "M x N x K", "flops", "bytes")]
        for index, call in enumerate(self.calls):
            rows.append(
                (
                    str(index),
                    f"{call.op} {call.label}".strip(),
                    " ".join(_shown(call, [name for name in call.reads if name != "stats"])),
                    " ".join("loss" if name == "stats" else name for name in _shown(call, call.writes)),
                    " ".join("x".join(map(str, dims)) for dims in call.products),
                    scaled(call.flops) if call.flops else "",
                    scaled(self.traffic(call)) + "B",
                )
            )
        last = f"{self.launches} launch{'' if self.launches == 1 else 'es'}"
        if self.sharding:
            last = f"{self._shared(self.sharding)}: {last}"
        elif self.resident:
            pause = f" that pauses at {CALLBACK}" if self.calls_back else ""
            last = f"{len(self.calls)} calls, run as one loop over the steps{pause}: {last}"
        return f"{aligned(rows, left=range(1, 5))}\n{last}"


def _shown(call: Call, names: Iterable[str]) -> Iterator[str]:
    """Yield the printed names of values that a call reads or writes."""
    through_rows = "rows" in call.reads
    for name in names:
        if name not in UNPRINTED:
            yield f"{name}[rows]" if through_rows and name in THROUGH_ROWS else name


def scaled(number: float) -> str:
    """A number with three digits and a decimal prefix: 25.7M."""
    for prefix in ("", "k", "M", "G", "T"):
        if number < 999.5 or prefix == "T":
            return f"{number:.3g}{prefix}"
        number /= 1000.0
    raise AssertionError("unreachable")
