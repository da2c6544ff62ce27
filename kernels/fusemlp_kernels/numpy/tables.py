"""Tables of calls for the compiled loop, and running them; ``compiled.tables`` has their records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, chain
from math import prod
from operator import mul
from struct import pack
from types import SimpleNamespace
from typing import Any

import numpy as np

from fusemlp_kernels.checks import check_together
from fusemlp_kernels.coding import Coding, Column
from fusemlp_kernels.contract import COUNTERS, TensorRule, UpdateRule
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.launches import aligned, compiled, launch, loop_of, threads
from fusemlp_kernels.numpy.plan import FEW, PIECEWISE, Row, plan, row_tasks
from fusemlp_kernels.ops import OPS, READ, Operand, expected
from fusemlp_kernels.philox import LANES, NORMALS
from fusemlp_kernels.pointwise import HYPERPARAMETERS

Array = np.ndarray[Any, Any]
Run = Callable[..., object]

# The places of the fields of records, in words of eight bytes.
HEAD, CALL = ({name: place for place, name in enumerate(record.names or ())} for record in (t.HEAD, t.CALL))

# The parts of a table: the format of their records, as ``struct`` has it, and the bytes of one.
PARTS = t.HEAD, t.CALL, t.TENSOR, t.PHASE, t.TASK, t.PIECE
_KINDS = [[field[0].kind for field in (record.fields or {}).values()] for record in PARTS]
FORMATS = [f"{kinds.count('i')}q{kinds.count('f')}d" for kinds in _KINDS]
SIZES = [record.itemsize for record in PARTS]

STEPS, STEP, AT_PHASE, ROW_TASKS, BY_FEW, PRODUCT, EPOCHS, EPOCH_STATS = map(
    HEAD.__getitem__, ("steps", "step", "phase", "row_tasks", "few", "product", "epochs", "epoch_stats")
)
# Those of the numbers of an optimizer's rule, which follow one another.
NUMBERS = slice(HEAD[HYPERPARAMETERS[0]], HEAD[HYPERPARAMETERS[-1]] + 1)

# Kinds of calls on as many rows as the counters say.
COUNTED = {"ENTROPY", "ELEMENTWISE", "SQUARES", "PAUSE"}
# The fields of arrays that have a row for each row of the batch; and w, all of which each task reads.
MATRICES = ("x", "y", "z", "dz", "out", "keep", "w")


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


class CallTable:
    """Rows of calls, and copies of the arrays that the loop cannot read in place, as ``before`` and ``after`` say."""

    def __init__(self, real: Any, products: str = "products") -> None:
        self.real = np.dtype(real)
        # the module of the matrix products, and how they want to be cut
        self.products, self.cut = products, compiled(products).CUT
        # the kinds and fields that the rows have
        self.names: set[str] = set()
        # by their identity the arrays that are entered, their addresses, and where these stand, with which offset in
        # bytes; scratch among them
        self.kept: dict[int, tuple[Array, int, list[tuple[int, int]]]] = {}
        self.zeros: dict[int, Array] = {}
        # by the identity of transposed arrays, these and the operands that they were
        self.transposed: dict[int, tuple[Array, Array]] = {}
        # of how many shards the calls are, and the first row of the shard whose calls are entered now
        self.shards, self.shard = 0, 0
        # the head, then the rows of calls, and what the plan needs to know of them
        self.words: list[float] = [0] * len(HEAD)
        self.fill(accumulate=1)
        self.rows: list[Row] = []
        # the most rows of a batch; gradients by slopes
        self.height, self.slopes = 0, 0
        # row i of the batch is one of member i % members
        self.members = 1
        # the kind and fields of rows that follow the others: sums over the tasks by rows, factors of a layer of codes
        self.later: list[dict[str, Any]] = []
        # weights and their panels, or the sums of their columns of codes
        self.panels: dict[int, tuple[Array, Array, Coding | None]] = {}
        self.tensors: list[tuple[int, int, float, float]] = []
        self.widest = 1
        # the most counters whose words a row of a random start takes
        self.lanes = 0
        # words of a task's order of the rows of a column of codes
        self.order_row = 0
        # what runs on the host at each pause of a step
        self.between: list[Callable[[], object]] = []
        # whether arrays are copied; copies that follow an operand, and (destination, source) before and after a run
        self.converts = False
        self.copies: dict[Any, Array] = {}
        self.before: list[tuple[Array, Array]] = []
        self.after: list[tuple[Array, Array]] = []

    def operands(self, op: str, given: Mapping[str, Any]) -> SimpleNamespace:
        """The operands of a call as attributes, with defaults; arrays are contiguous and of their record's type.

        Enters the control arrays, and over how many batches the gradients are summed.
        """
        call = self._operands(OPS[op].operands, given)
        fields = vars(call)
        check_together(op, fields)
        self.fill(counters=fields.get("counters"), stats=fields.get("stats"))
        if "rule" in fields:
            self.fill(accumulate=call.rule.accumulate)
        return call

    def _operands(self, records: Sequence[Operand], given: Mapping[str, Any]) -> SimpleNamespace:
        values: dict[str, Any] = {}
        for record in records:
            value = given.get(record.name)
            if isinstance(value, np.ndarray):
                value = self._array(record, value, given)
            elif value is None:
                value = record.default
            elif record.several:
                value = tuple(self._array(record, array, given) for array in value)
            elif record.fields:
                value = [self._operands(record.fields, fields) for fields in value]
            values[record.name] = value
        return SimpleNamespace(**values)

    def _array(self, record: Operand, array: Array, operands: Mapping[str, Any]) -> Array:
        """The array, or a copy that follows it; the weights of a layer of codes are (K, N)."""
        picked = bool(record.rows) and operands.get(record.rows) is not None
        if record.shape in ("MN", "MK") and not picked:
            self.height = max(self.height, len(array))
        if record.shape == "NK" and operands.get("coding") is not None:
            array, original = array.T, array
            self.transposed[id(array)] = array, original
        dtype = expected(record, operands)[0] if record.shape == "target" else record.dtype
        if dtype == "any":
            return array
        wanted = self.real if dtype in ("real", "compute") else np.dtype(dtype)
        flags = array.flags
        if array.dtype == wanted and flags.c_contiguous and flags.aligned:
            return array
        self.converts = True
        if picked:
            # data, which does not change
            return np.require(array, wanted, ("C", "A"))
        # operands may be one array
        key = (_address(array), array.shape, array.strides, array.dtype)
        if key not in self.copies:
            self.copies[key] = np.empty(array.shape, wanted)
        copy = self.copies[key]
        self.before.append((copy, array))
        if record.use != READ:
            self.after.append((array, copy))
        return copy

    def add(self, kind: str, **fields: Any) -> None:
        """A row of calls; arrays among its fields are entered by their address."""
        self.words += [0] * len(CALL)
        self.names.add(kind)
        matrices = [(name, array) for name in MATRICES if isinstance(array := fields.get(name), np.ndarray)]
        arrays = tuple((_address(a), a.nbytes, a.strides[0] * (name != "w")) for name, a in matrices if a.ndim == 2)
        sizes = {name: fields.get(name, 0) for name in ("n", "k", "first", "end")}
        coding = fields.get("coding")
        if coding is not None:
            places = np.array(coding.places, np.int64)
            fields |= {"coding": places, "columns": len(places), "slots": coding.slots}
            words = [most_order(column, self.height) for column in coding.columns]
            self.order_row = max(self.order_row, 2 * coding.slots, *words)
        self.rows.append(Row(kind, arrays=arrays, coding=coding, members=fields.get("members") or 1, **sizes))
        if fields.get("dslope") is not None:
            fields["slope_part"] = t.SLOPES_PART + self.slopes
            self.slopes += 1
        # of a layer of codes the units, and not the inputs
        self.widest = max(self.widest, sizes["k" if kind in ("CODES", "SUMS") else "n"])
        self.fill(len(self.rows) - 1, kind=t.Kind[kind], shard=self.shard, **fields)

    def add_later(self) -> None:
        """Add the rows of ``later``."""
        while self.later:
            self.add(**self.later.pop(0))

    def fill(self, row: int | None = None, **fields: Any) -> None:
        """Fill fields of a row, or of the head: numbers, arrays, or an array and the place of an element in it."""
        start, places = (0, HEAD) if row is None else (_start(row), CALL)
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                self._enter(start + places[name], value)
            elif isinstance(value, tuple):
                self._enter(start + places[name], *value)
            elif value:
                self.words[start + places[name]] = value
            else:
                continue
            self.names.add(name)

    def _enter(self, place: int, array: Array, element: int = 0) -> None:
        """Enter the address of a contiguous array, or of an element; it is kept from now on."""
        offset = element * array.itemsize
        _, address, places = self.kept.setdefault(id(array), (array, _address(array), []))
        self.words[place] = address + offset
        places.append((place, offset))

    def gradient_at(self, grads: Array, offset: int, size: int) -> int | None:
        """The row that computes the gradient which these elements of an array are; None if no row does."""
        wanted = _address(grads) + offset * grads.itemsize
        for at, row in enumerate(self.rows):
            elements = row.n * row.k if row.kind in ("WEIGHT", "CODES") else row.n
            if row.kind in PIECEWISE and (self.words[_start(at) + CALL["out"]], elements) == (wanted, size):
                return at
        return None

    def in_panels(self, w: Array, coding: Coding | None = None) -> Array:
        """Memory for the panels of w, or with ``coding`` for the sums of w (K, N); filled before the first step.

        Without columns in pieces the sums are the rows of w themselves.
        """
        if coding is not None and coding.sums == coding.inputs:
            return w
        if _address(w) not in self.panels:
            shape = (w.shape[1], -(-len(w) // t.PANEL) * t.PANEL) if coding is None else (coding.sums, w.shape[1])
            self.panels[_address(w)] = w, self.scratch(*shape), coding
        return self.panels[_address(w)][1]

    def panels_of(self, params: Array, element: int = 0) -> Array | None:
        """The panels of the weights that begin at an element of an array; None where they are not read."""
        return self.panels.get(_address(params) + element * params.itemsize, (None, None, None))[1]

    def scratch(self, *shape: int, dtype: Any = None) -> Array:
        """Memory for a value, zeros of the type of the parameters by default."""
        kind = np.dtype(self.real if dtype is None else dtype)
        # a vector of panels lies in one line of the cache
        zeros: Array = aligned(prod(shape) * kind.itemsize).view(kind).reshape(shape)
        self.zeros[id(zeros)] = zeros
        return zeros

    def tensor(self, rule: TensorRule, offset: int = 0, size: int = 0) -> int:
        """The place of a trained tensor."""
        self.tensors.append((offset, size, rule.lr_factor, rule.weight_decay))
        return len(self.tensors) - 1

    def bind(self, epoch_stats: Array | None = None, *, alone: bool = False) -> Run:
        """``run(steps=1)``; the loop is chosen now with ``alone``, else at the first run."""
        if not self.words[HEAD["counters"]]:
            self.fill(counters=np.zeros(COUNTERS, np.int64))
        self.add_later()
        rows = tuple(self.rows)
        for w, panels, coding in self.panels.values():
            kind = "PACK" if coding is None else "SUMS"
            self.add(kind, n=len(w), k=w.shape[1], w=w, panels=panels, coding=coding)
        batch = t.COUNTED if self.names & COUNTED else self.height
        sizes = [size for _, size, _, _ in self.tensors]
        cut = plan(rows, self.rows[len(rows) :], self.height, sizes, self.cut, self.members, self.shards)
        width = t.SLOPES_PART + self.slopes
        # what philox draws for a row, eight columns to two words; for noise, its numbers too
        drops, noisy = "keep" in self.names, "noisy" in self.names
        dropped, noise = drops * 2 * (-(-self.widest // LANES)), noisy * (NORMALS // 2 + NORMALS)
        lanes_row = max(dropped, noise, 2 * self.lanes)
        totals_row = self.order_row and self.order_row + 2 * self.widest
        self.fill(
            batch=batch, block=cut.block, blocks=cut.blocks, prologue=cut.prologue, phase_count=len(cut.phases),
            partials=self.scratch(cut.most, width, dtype=np.float64), partial_count=width,
            sums=self.scratch(len(cut.pieces), dtype=np.float64), zeros=self.scratch(t.PANEL), lanes_row=lanes_row,
            lanes=self.scratch(cut.most, lanes_row, dtype=np.uint64) if lanes_row else None,
            order_row=self.order_row, order=self.scratch(cut.most, self.order_row, dtype=np.int64),
            totals_row=totals_row, totals=self.scratch(cut.most, totals_row),
        )  # fmt: skip
        work = loop_of(self.names, self.real, alone=alone)
        parts: list[Sequence[Sequence[float]]] = [self.tensors, cut.phases, cut.tasks, cut.pieces]
        counts = [1, len(self.rows), *map(len, parts)]
        words = chain(self.words, *chain.from_iterable(parts))
        memory = np.frombuffer(bytearray(pack("=" + "".join(map(mul, FORMATS, counts)), *words)), np.int64)
        starts = list(accumulate(map(mul, SIZES, counts)))
        self.bound = memory, starts, work, (self.products, self.real), cut.most
        run = _launch(*self.bound, self.kept, epoch_stats)
        if self.between:
            run = _with_pauses(run, self.between, memory, work, cut.most)
        return copied(run, self.before, self.after)

    def bind_moving(self, arrays: Sequence[Array | None]) -> Run:
        """``run(addresses)``: the calls with ``arrays``, which the loop can read in place, at these addresses."""
        self.bind()
        places = [
            (place, offset, index)
            for index, moving in enumerate(arrays)
            for place, offset in self.kept.pop(id(moving), (moving, 0, []))[2]
        ]
        words, launch_once = self.bound[0].data, _launch(*self.bound, self.kept)

        def run(addresses: Sequence[int]) -> None:
            for place, offset, index in places:
                words[place] = addresses[index] + offset
            launch_once()

        return run


def _start(row: int) -> int:
    """The word with which a row of calls begins."""
    return len(HEAD) + row * len(CALL)


def _launch(
    memory: Array,
    starts: Sequence[int],
    work: Any,
    products: tuple[str, Any],
    tasks: int,
    kept: Any,
    epoch_stats: Array | None = None,
) -> Run:
    # a single element of a memoryview is written faster than one of an array
    job, words = memory.ctypes.data, memory.data
    words[EPOCHS] = 0
    if epoch_stats is not None:
        words[EPOCHS], words[EPOCH_STATS] = len(epoch_stats), _address(epoch_stats)
    for name, start in zip(("calls", "tensors", "phases", "tasks", "pieces"), starts, strict=False):
        words[HEAD[name]] = job + start
    words[ROW_TASKS] = 1
    block, blocks = words[HEAD["block"]], words[HEAD["blocks"]]

    # the default holds on to the arrays
    def run(steps: int = 1, _arrays: Any = (kept, memory, epoch_stats)) -> None:
        words[STEPS], words[STEP], words[AT_PHASE] = steps, 0, -1
        if tasks > 1:
            count = threads()
            words[ROW_TASKS], words[BY_FEW] = row_tasks(block, blocks, count), count <= FEW
        if not words[PRODUCT]:
            module, real = products
            functions = compiled(module).by_address(real)
            memory[PRODUCT : PRODUCT + len(functions)] = [function.address for function in functions]
        if steps:
            launch(work.address, job, tasks)

    return run


def most_order(column: Column, height: int) -> int:
    """Return the words of the order of the rows of a column of codes: where each code begins, and the rows."""
    return column.inputs + 1 + height * max(1, column.pairs)


def _with_pauses(run: Run, between: Sequence[Callable[[], object]], memory: Array, work: Any, tasks: int) -> Run:
    """Return ``run`` that calls ``between`` at the pauses of a step; an error there leaves all as before the step."""
    job = memory.ctypes.data

    def run_with_pauses(steps: int = 1) -> None:
        # a launch goes from one pause to the next
        run(steps)
        for _ in range(steps):
            for pause in between:
                pause()
                launch(work.address, job, tasks)

    return run_with_pauses


class BoundTable:
    """A bound table but for its arrays: those of ``arrays``, by name, are others in each model of a fleet."""

    def __init__(self, table: CallTable, arrays: Mapping[str, Array]) -> None:
        self._bound = table.bound
        names = {id(array): name for name, array in arrays.items()}
        # (name, transposed, type, places); the places of scratch in one block; what is left is the same for all
        self._named: list[tuple[str, bool, Any, list[tuple[int, int]]]] = []
        self._scratch: list[tuple[int, int]] = []
        self._scratch_bytes = 0
        self._common: list[Array] = []
        for key, (array, _, places) in table.kept.items():
            flipped = key in table.transposed
            operand = id(table.transposed[key][1]) if flipped else key
            if operand in names:
                self._named.append((names[operand], flipped, array.dtype, places))
            elif key in table.zeros:
                self._scratch += [(place, self._scratch_bytes + offset) for place, offset in places]
                self._scratch_bytes += -(-array.nbytes // t.LINE) * t.LINE
            else:
                self._common.append(array)

    def bind(self, arrays: Mapping[str, Array], epoch_stats: Array | None, rule: UpdateRule | None) -> Run | None:
        """The same as ``CallTable.bind``, for other arrays and the numbers of a rule; None where the loop cannot read
        the arrays in place."""
        entered = []
        for name, flipped, dtype, places in self._named:
            array = arrays[name].T if flipped else arrays[name]
            if array.dtype != dtype or not array.flags.c_contiguous or not array.flags.aligned:
                return None
            entered.append((array, places))
        entered.append((aligned(self._scratch_bytes), self._scratch))
        memory = self._bound[0].copy()
        words = memory.data
        for array, places in entered:
            address: int = array.__array_interface__["data"][0]
            for place, offset in places:
                words[place] = address + offset
        if rule is not None:
            memory.view(np.float64)[NUMBERS] = [getattr(rule, name) for name in HYPERPARAMETERS]
        return _launch(memory, *self._bound[1:], (entered, self._common), epoch_stats)


def copied(run: Run, before: list[tuple[Array, Array]], after: list[tuple[Array, Array]]) -> Run:
    """``run`` between copies of (destination, source)."""
    if not before and not after:
        return run

    # NumPy would warn of what overflows
    @np.errstate(all="ignore")
    def run_on_copies(*steps: int) -> None:
        for destination, source in before:
            np.copyto(destination, source)
        run(*steps)
        for destination, source in after:
            np.copyto(destination, source)

    return run_on_copies
