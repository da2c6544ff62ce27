"""Tables of calls for the compiled loop, and running them; ``compiled.tables`` says what their columns are."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fusemlp_kernels.contract import COUNTERS, Noise, TensorRule, UpdateRule
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.cores import threads
from fusemlp_kernels.numpy.loops import OPTIMIZER_NAMES, compiled, loop_of
from fusemlp_kernels.numpy.plan import PIECEWISE, Row, plan, together
from fusemlp_kernels.numpy.team import launch
from fusemlp_kernels.operands import READ, Operand
from fusemlp_kernels.philox import LANES, NORMALS, seed_key
from fusemlp_kernels.pointwise import HYPERPARAMETERS

Array = np.ndarray[Any, Any]
Run = Callable[..., object]

# The places of a row's columns.
COLUMNS = {name: place for name, place in vars(t).items() if isinstance(place, int)}

# The columns of arrays that have a row for each row of the batch.
BATCH_ARRAYS = ("X", "Y", "Z", "DZ", "OUT", "KEEP")


def _address(array: Array) -> int:
    address: int = array.__array_interface__["data"][0]
    return address


class Table:
    """Rows of calls, and copies of the arrays that the loop cannot read in place, as ``before`` and ``after`` say."""

    def __init__(self, real: Any, *, shards: int = 0, shard_rows: int = 0) -> None:
        self.real = np.dtype(real)
        # of how many shards the calls are, and the first row of the shard whose calls are entered now
        self.shards, self.shard = shards, 0
        # the head, then the rows of calls, and what the plan needs to know of them
        self.integers, self.factors = [0] * t.HEAD_COLUMNS, [0.0] * t.HEAD_FACTORS
        self.integers[t.ACCUMULATE] = 1
        self.integers[t.SHARD_ROWS] = shard_rows if shards else 0
        self.rows: list[Row] = []
        # the most rows of a batch; gradients by slopes
        self.height, self.slopes = 0, 0
        # row i of the batch is one of member i % members
        self.members = 1
        # the columns of sums over the tasks by rows, which follow the last of these
        self.later: list[dict[str, Any]] = []
        # weights and their panels
        self.panels: dict[int, tuple[Array, Array]] = {}
        self.tensors: list[int] = []
        self.tensor_factors: list[float] = []
        # by their identity the arrays that are entered, their addresses, and where these stand, with which offset in
        # bytes; scratch among them
        self.kept: dict[int, tuple[Array, int, list[tuple[int, int]]]] = {}
        self.made: dict[int, Array] = {}
        self.widest = 1
        # the most counters whose words a row of a random start takes
        self.lanes = 0
        self.names: set[str] = set()
        # whether arrays are copied; copies that follow an operand, and (destination, source) before and after a run
        self.converts = False
        self.copies: dict[Any, Array] = {}
        self.before: list[tuple[Array, Array]] = []
        self.after: list[tuple[Array, Array]] = []

    def operands(self, given: Mapping[str, Any], records: Mapping[str, Operand]) -> dict[str, Any]:
        """The operands of a call as contiguous arrays of the types that its record says."""
        found = dict(given)
        for name, value in given.items():
            if isinstance(value, np.ndarray):
                found[name] = self._array(records[name], value, given)
            elif isinstance(value, list | tuple):
                if records[name].several:
                    found[name] = tuple([self._array(records[name], array, given) for array in value])
                elif records[name].fields:
                    fields = {field.name: field for field in records[name].fields}
                    found[name] = [self.operands(one, fields) for one in value]
        return found

    def _array(self, record: Operand, array: Array, given: Mapping[str, Any]) -> Array:
        """The array, or a copy that follows it."""
        wanted, flags = self.real, array.flags
        if record.dtype not in ("real", "compute"):
            wanted = np.dtype(record.dtype)
        elif record.shape == "target" and given["loss"].kind == "cross_entropy" and not given["loss"].soft:
            wanted = np.dtype(np.int64)
        if array.dtype == wanted and flags.c_contiguous and flags.aligned:
            return array
        self.converts = True
        if record.rows and given.get(record.rows) is not None:
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

    def add(self, kind: str, numbers: Mapping[int, float] | None = None, /, **columns: Any) -> None:
        """A row of calls; arrays among its columns are entered by their address."""
        self.integers += [0] * t.CALL_COLUMNS
        self.factors += [0.0] * t.CALL_FACTORS
        self.names.add(kind)
        by_rows = [
            array for name in BATCH_ARRAYS if isinstance(array := columns.get(name), np.ndarray) and array.ndim == 2
        ]
        arrays = tuple((_address(array), array.nbytes, array.strides[0]) for array in by_rows)
        # each task reads all of it
        if isinstance(whole := columns.get("W"), np.ndarray) and whole.ndim == 2:
            arrays += ((_address(whole), whole.nbytes, 0),)
        sizes = {name.lower(): columns.get(name, 0) for name in ("N", "K", "FIRST", "END")}
        self.rows.append(Row(kind, arrays=arrays, **sizes))
        if columns.get("DSLOPE") is not None:
            columns["SLOPE_PART"] = t.SLOPES_PART + self.slopes
            self.slopes += 1
        self.widest = max(self.widest, columns.get("N", 0))
        self.amend(len(self.rows) - 1, numbers, KIND_OF_ROW=COLUMNS[kind], SHARD=self.shard, **columns)

    def add_later(self) -> None:
        """The rows of ``later``."""
        for columns in self.later:
            self.add("BIAS", **columns)
        self.later.clear()

    def amend(self, row: int, numbers: Mapping[int, float] | None = None, /, **columns: Any) -> None:
        """Fill columns of a row: numbers, arrays, or an array and the place of an element in it."""
        start, first = t.HEAD_COLUMNS + row * t.CALL_COLUMNS, t.HEAD_FACTORS + row * t.CALL_FACTORS
        for name, value in columns.items():
            if isinstance(value, np.ndarray):
                self.enter(start + COLUMNS[name], value)
            elif isinstance(value, tuple):
                self.enter(start + COLUMNS[name], *value)
            elif value:
                self.integers[start + COLUMNS[name]] = int(value)
            else:
                continue
            self.names.add(name)
        for column, number in (numbers or {}).items():
            self.factors[first + column] = number

    def enter(self, place: int, array: Array, element: int = 0) -> None:
        """Enter the address of a contiguous array, or of an element; it is kept from now on."""
        key, offset = id(array), element * array.itemsize
        if key not in self.kept:
            self.kept[key] = array, _address(array), []
        _, address, places = self.kept[key]
        self.integers[place] = address + offset
        places.append((place, offset))

    def gradient_at(self, grads: Array, offset: int, size: int) -> int | None:
        """The row that computes the gradient which these elements of an array are; None if no row does."""
        wanted = _address(grads) + offset * grads.itemsize
        for at, row in enumerate(self.rows):
            own = row.n * row.k if row.kind == "WEIGHT" else row.n
            out = self.integers[t.HEAD_COLUMNS + at * t.CALL_COLUMNS + t.OUT]
            if row.kind in PIECEWISE and (out, own) == (wanted, size):
                return at
        return None

    def in_panels(self, w: Array) -> Array:
        """Memory for the panels of w, which are filled before the first step."""
        key = _address(w)
        if key not in self.panels:
            self.panels[key] = w, self.scratch(w.shape[1], -(-len(w) // t.PANEL) * t.PANEL)
        return self.panels[key][1]

    def panels_of(self, params: Array, element: int = 0) -> Array | None:
        """The panels of the weights that begin at an element of an array; None where they are not read."""
        found = self.panels.get(_address(params) + element * params.itemsize)
        return None if found is None else found[1]

    def scratch(self, *shape: int, dtype: Any = None) -> Array:
        """Memory for a value, zeros of the type of the parameters by default."""
        made = np.zeros(shape, self.real if dtype is None else dtype)
        self.made[id(made)] = made
        return made

    def tensor(self, rule: TensorRule, offset: int = 0, size: int = 0) -> int:
        """The row of a trained tensor."""
        self.tensors += (offset, size)
        self.tensor_factors += (rule.lr_factor, rule.weight_decay)
        return len(self.tensors) // t.TENSOR_COLUMNS - 1

    def control(self, counters: Array | None, stats: Array | None = None) -> None:
        """Enter the control arrays of a call."""
        if counters is not None or not self.integers[t.AT_COUNTERS]:
            self.enter(t.AT_COUNTERS, np.zeros(COUNTERS, np.int64) if counters is None else counters)
        if stats is not None:
            self.enter(t.AT_STATS, stats)

    def accumulate(self, rule: UpdateRule, counters: Array) -> None:
        """Enter how many batches the gradients are summed over."""
        self.integers[t.ACCUMULATE] = rule.accumulate
        self.control(counters)

    def clock(self, rule: UpdateRule, hyper: Array, rates: Array, counters: Array) -> None:
        """Enter an optimizer and the clock."""
        head, factors, code = self.integers, self.factors, rule.code
        self.accumulate(rule, counters)
        self.names.update(OPTIMIZER_NAMES[code : code + 1])
        head[t.OPTIMIZER], head[t.DECOUPLED], head[t.SKLEARN] = code, rule.decoupled, rule.convention == "scikit-learn"
        factors[: t.CLIP_NORM] = [getattr(rule, name) for name in HYPERPARAMETERS]
        if rule.clip_norm is not None:
            head[t.CLIPS], factors[t.CLIP_NORM] = 1, rule.clip_norm
        self.enter(t.AT_HYPER, hyper)
        self.enter(t.AT_RATES, rates)

    def noise(self, noise: Noise, rows: Array | None) -> None:
        """Enter the noise of the update; ``rows``: those of the batches."""
        head, factors = self.integers, self.factors
        self.names.add("NOISY")
        head[t.NOISE_LOW], head[t.NOISE_HIGH] = seed_key(noise.seed)
        factors[t.DEVIATION], factors[t.SHARED_BY] = noise.deviation, noise.divisor
        # without rows the batch is a whole one, whatever its length
        self.enter(t.NOISY, np.zeros(1, np.int64) if rows is None else rows)

    def bind(self, batch: int, *, alone: bool = False) -> Run:
        """``run(steps=1)`` for batches of this many rows; COUNTED: as many as the counters say.

        The loop is chosen now with ``alone``, else at the first run.
        """
        self.add_later()
        rows = tuple(self.rows)
        for w, panels in self.panels.values():
            self.add("PACK", N=len(w), K=w.shape[1], W=w, PANELS=panels)
        counts = {"members": self.members, "shards": self.shards}
        found = plan(rows, self.rows[len(rows) :], self.height, self.tensors, **counts)
        head = self.integers
        head[t.CALLS], head[t.BATCH] = len(self.rows), batch
        head[t.BLOCK], head[t.BLOCKS], head[t.PROLOGUE] = found.block, found.blocks, found.prologue
        head[t.PHASES] = len(found.phases) // t.PHASE_COLUMNS
        head[t.AT_PHASES] = len(head) + len(self.tensors)
        head[t.AT_TASKS] = head[t.AT_PHASES] + len(found.phases)
        head[t.AT_PIECES] = head[t.AT_TASKS] + len(found.tasks)
        head[t.PARTIALS] = t.SLOPES_PART + self.slopes
        self.enter(t.AT_PARTIALS, self.scratch(found.most, head[t.PARTIALS], dtype=np.float64))
        self.enter(t.AT_SUMS, self.scratch(len(found.pieces) // t.PIECE_COLUMNS, dtype=np.float64))
        self.enter(t.AT_ZEROS, self.scratch(t.PANEL))
        # what philox draws for a row, eight columns to two words; for noise, its numbers too
        drops, noisy = "KEEP" in self.names, "NOISY" in self.names
        dropped, noise = drops * 2 * (-(-self.widest // LANES)), noisy * (NORMALS // 2 + NORMALS)
        head[t.LANES_ROW] = max(dropped, noise, 2 * self.lanes)
        if head[t.LANES_ROW]:
            self.enter(t.AT_LANES, self.scratch(found.most, head[t.LANES_ROW], dtype=np.uint64))
        work = loop_of(self.names, self.real, alone=alone)
        integers = np.frombuffer(array("q", head + self.tensors + found.phases + found.tasks + found.pieces), np.int64)
        factors = np.frombuffer(array("d", self.factors + self.tensor_factors))
        self.bound = integers, factors, work, self.real, found.most
        return copied(_launch(*self.bound, self.kept), self.before, self.after)

    def bind_moving(self, batch: int, arrays: Sequence[Array | None]) -> Run:
        """``run(addresses)``: the calls with ``arrays``, which the loop can read in place, at these addresses."""
        self.bind(batch)
        places = [
            (place, offset, index)
            for index, moving in enumerate(arrays)
            for place, offset in self.kept.pop(id(moving), (moving, 0, []))[2]
        ]
        numbers, launch_once = self.bound[0].data, _launch(*self.bound, self.kept)

        def run(addresses: Sequence[int]) -> None:
            for place, offset, index in places:
                numbers[place] = addresses[index] + offset
            launch_once()

        return run


def _launch(integers: Array, factors: Array, work: Any, real: Any, tasks: int, kept: Any) -> Run:
    # a single element of a memoryview is written faster than one of an array
    job, numbers = integers.ctypes.data, integers.data
    numbers[t.AT_FACTORS], numbers[t.TOGETHER] = factors.ctypes.data, 1
    block, blocks = numbers[t.BLOCK], numbers[t.BLOCKS]

    # ``kept`` holds on to the arrays
    def run(steps: int = 1, _arrays: Any = (kept, factors)) -> None:
        numbers[t.STEPS], numbers[t.STEP], numbers[t.PHASE] = steps, 0, -1
        if blocks > 1:
            numbers[t.TOGETHER] = together(block, blocks, threads())
        if not numbers[t.AT_PRODUCT]:
            functions = compiled("products").by_address(real)
            integers[t.AT_PRODUCT : t.AT_DOTS + 1] = [function.address for function in functions]
        if steps:
            launch(work.address, job, tasks)

    return run


class Form:
    """A bound table but for its arrays: those of ``arrays``, by name, are others in each model of a fleet."""

    def __init__(self, table: Table, arrays: Mapping[str, Array]) -> None:
        self._integers, self._factors, self._work, self._real, self._tasks = table.bound
        names = {id(array): name for name, array in arrays.items()}
        # (name, type, places), (None, shape and type of scratch, places); what is left is the same for all
        self._named: list[tuple[str, Any, list[tuple[int, int]]]] = []
        self._made: list[tuple[Any, list[tuple[int, int]]]] = []
        self._common: list[Array] = []
        for key, (found, _, places) in table.kept.items():
            if (t.AT_EPOCH_STATS, 0) in places:
                continue
            if key in names:
                self._named.append((names[key], found.dtype, places))
            elif key in table.made:
                self._made.append(((found.shape, found.dtype), places))
            else:
                self._common.append(found)

    def bind(self, arrays: Mapping[str, Array], epoch_stats: Array | None) -> Run | None:
        """The same as ``Table.bind``, for other arrays; None where the loop cannot read them in place."""
        own = []
        for name, dtype, places in self._named:
            given = arrays[name]
            if given.dtype != dtype or not given.flags.c_contiguous or not given.flags.aligned:
                return None
            own.append((given, places))
        own += [(np.zeros(*form), places) for form, places in self._made]
        integers = self._integers.copy()
        numbers = integers.data
        numbers[t.EPOCHS] = 0
        if epoch_stats is not None:
            numbers[t.EPOCHS] = len(epoch_stats)
            own.append((epoch_stats, [(t.AT_EPOCH_STATS, 0)]))
        for given, places in own:
            address = _address(given)
            for place, offset in places:
                numbers[place] = address + offset
        kept = own, self._common
        return _launch(integers, self._factors.copy(), self._work, self._real, self._tasks, kept)


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
