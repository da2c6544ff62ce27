"""Tables of calls for the compiled loop, and running them; ``compiled.tables`` says what their columns are.

Numba is imported when a table first runs.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from fusemlp_kernels.contract import ACTIVATIONS, COUNTERS, LOSSES, TensorRule, UpdateRule
from fusemlp_kernels.errors import MissingLibraryError
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.ops import OPS, READ, Operand
from fusemlp_kernels.philox import LANES, radix, seed_key
from fusemlp_kernels.pointwise import OPTIMIZERS

Array = np.ndarray[Any, Any]
Run = Callable[..., object]

# Names of ``compiled.tables`` and of the printed formulas that a table may do without, so that no code is compiled for
# them.
OPTIMIZER_NAMES = tuple(f"RULE_{name.upper()}" for name in OPTIMIZERS)
NAMES = frozenset(
    {
        *("GATHER", "AFFINE", "ACTIVATE", "ENTROPY", "ELEMENTWISE", "PADDING", "BACKWARD"),
        *("WEIGHT", "BIAS", "SLOPES", "PENALTY", "UPDATE"),
        *("KEEP", "CLIPS", "SOFT", "WEIGHTED", "CLASS_WEIGHTED"),
        *(name.upper() for name in (*ACTIVATIONS, *LOSSES)),
        *OPTIMIZER_NAMES,
    }
)

# Set, one loop for all tables is compiled, once; unset, each kind of table compiles what it uses, in less time.
WHOLE_LOOP = "FUSEMLP_WHOLE_LOOP"
_loading = threading.Lock()
# The loops of this process by the names that they have code for, and the names of single calls that have not run yet.
_loops: dict[frozenset[str], Run] = {}
_waiting: set[str] = set()


def _compiled(module: str) -> Any:
    """A module of ``compiled``, whose import imports numba."""
    try:
        return import_module(f"fusemlp_kernels.numpy.compiled.{module}")
    except ImportError as error:
        raise MissingLibraryError(
            f"backend: training on the numpy backend needs numba, which cannot be imported ({error}); install it again "
            "with pip install --force-reinstall numba"
        ) from error


def row_order(n: int, seed: int, epoch: int) -> Array:
    """``philox.row_order``, compiled: the order of the rows in an epoch, (n,) int64."""
    with _loading:
        permute = _compiled("rows").compiled_row_order()
    order = np.empty(n, np.int64)
    low, high = seed_key(seed)
    permute(order, radix(n), low, high, epoch)
    return order


def loop_for(names: frozenset[str], *, exactly: bool) -> Run:
    """A loop that has code for ``names``, one for all threads, so that none compiles it again.

    ``exactly``: for no others. Otherwise one that is there may have more, and one that is compiled is for all calls
    that wait for theirs: those of a step are compiled together.
    """
    with _loading:
        if os.environ.get(WHOLE_LOOP):
            names = NAMES
        elif not exactly:
            found = next((loop for known, loop in _loops.items() if names <= known), None)
            if found is not None:
                return found
            names |= _waiting
            _waiting.clear()
        if names not in _loops:
            _loops[names] = _compiled("pruning").compiled_loop(NAMES - names)
        return _loops[names]


class Table:
    """Rows of calls, and copies of the arrays that the loop cannot read in place, as ``before`` and ``after`` say."""

    def __init__(self, real: Any) -> None:
        self.real = np.dtype(real)
        self.types = {"real": self.real, "compute": self.real}
        self.head, self.head_factors = [0] * t.HEAD_COLUMNS, [0.0] * t.HEAD_FACTORS
        self.head[t.ACCUMULATE] = 1
        self.rows: list[list[int]] = []
        self.factors: list[list[float]] = []
        self.tensors: list[int] = []
        self.tensor_factors: list[float] = []
        # holds on to the arrays whose addresses are in the tables
        self.kept: list[Array] = []
        self.widest = 1
        self.names: set[str] = set()
        self.copies: dict[Any, Array] = {}
        # (destination, source)
        self.before: list[tuple[Array, Array]] = []
        self.after: list[tuple[Array, Array]] = []

    def operands(self, op: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """The operands of a call as contiguous arrays of the types that its record says."""
        return self._fields(OPS[op].operands, given, given.get("loss"))

    def _fields(self, records: Sequence[Operand], given: Mapping[str, Any], loss: Any = None) -> dict[str, Any]:
        found = dict(given)
        for record in records:
            value = given.get(record.name)
            if value is None:
                continue
            if record.fields:
                found[record.name] = [self._fields(record.fields, one) for one in value]
            elif record.several:
                found[record.name] = tuple([self._array(record, array) for array in value])
            elif isinstance(value, np.ndarray):
                classes = record.shape == "target" and loss.kind == "cross_entropy" and not loss.soft
                once = bool(record.rows) and given.get(record.rows) is not None
                found[record.name] = self._array(record, value, "int64" if classes else record.dtype, once=once)
        return found

    def _array(self, record: Operand, array: Array, dtype: str = "", *, once: bool = False) -> Array:
        """The array, or a copy that follows it; ``once``: data, which does not change."""
        wanted = self.types.get(dtype or record.dtype) or np.dtype(dtype or record.dtype)
        flags = array.flags
        if array.dtype == wanted and flags.c_contiguous and flags.aligned:
            return array
        if once:
            return np.require(array, wanted, ("C", "A"))
        # operands may be one array
        key = (array.__array_interface__["data"][0], array.shape, array.strides, array.dtype)
        if key not in self.copies:
            self.copies[key] = np.empty(array.shape, wanted)
        copy = self.copies[key]
        self.before.append((copy, array))
        if record.use != READ:
            self.after.append((array, copy))
        return copy

    def add(self, kind: str, numbers: Mapping[int, float] | None = None, **columns: Any) -> None:
        """A row; arrays among its columns are entered by their address."""
        row, factors = [0] * t.CALL_COLUMNS, [0.0] * t.CALL_FACTORS
        self.names.add(kind)
        row[t.KIND_OF_ROW] = getattr(t, kind)
        for name, value in columns.items():
            row[getattr(t, name)] = self.address(value) if isinstance(value, np.ndarray) else int(value or 0)
        for column, number in (numbers or {}).items():
            factors[column] = number
        self.widest = max(self.widest, row[t.N])
        self.rows.append(row)
        self.factors.append(factors)

    def address(self, array: Array) -> int:
        """The address of a contiguous array."""
        self.kept.append(array)
        return int(array.__array_interface__["data"][0])

    def scratch(self, *shape: int) -> Array:
        """Memory for a value of a batch."""
        return np.empty(shape, self.real)

    def tensor(self, rule: TensorRule, offset: int = 0, size: int = 0) -> int:
        """The row of a trained tensor."""
        self.tensors += (offset, size)
        self.tensor_factors += (rule.lr_factor, rule.weight_decay)
        return len(self.tensors) // t.TENSOR_COLUMNS - 1

    def control(self, counters: Array | None, stats: Array | None = None, epoch_stats: Array | None = None) -> None:
        """Enter the control arrays of a call."""
        self.head[t.AT_COUNTERS] = self.address(np.zeros(COUNTERS, np.int64) if counters is None else counters)
        if stats is not None:
            self.head[t.AT_STATS] = self.address(stats)
        if epoch_stats is not None:
            self.head[t.AT_EPOCH_STATS], self.head[t.EPOCHS] = self.address(epoch_stats), len(epoch_stats)

    def clock(self, rule: UpdateRule, hyper: Array, rates: Array, counters: Array) -> None:
        """Enter an optimizer and the clock."""
        head, factors = self.head, self.head_factors
        self.accumulate(rule, counters)
        self.names.add(OPTIMIZER_NAMES[rule.code] if rule.code < len(OPTIMIZER_NAMES) else "")
        head[t.OPTIMIZER], head[t.DECOUPLED] = rule.code, int(rule.decoupled)
        head[t.SKLEARN], head[t.CLIPS] = int(rule.convention == "scikit-learn"), int(rule.clip_norm is not None)
        factors[t.MOMENTUM], factors[t.BETA1], factors[t.BETA2] = rule.momentum, rule.beta1, rule.beta2
        factors[t.EPS] = rule.eps
        if rule.clip_norm is not None:
            self.names.add("CLIPS")
            factors[t.CLIP_NORM] = rule.clip_norm
        head[t.AT_HYPER], head[t.AT_RATES] = self.address(hyper), self.address(rates)

    def accumulate(self, rule: UpdateRule, counters: Array) -> None:
        """Enter how many batches the gradients are summed over."""
        self.head[t.ACCUMULATE] = rule.accumulate
        self.control(counters)

    def bind(self, batch: int, *, exactly: bool = False) -> Run:
        """``run(steps=1)`` for batches of this many rows; COUNTED: as many as the counters say.

        The loop is chosen now with ``exactly``, else at the first run.
        """
        # what philox draws for a row, eight columns to two words
        lanes = np.empty(2 * (-(-self.widest // LANES)) if "KEEP" in self.names else 0, np.uint64)
        self.head[t.CALLS], self.head[t.BATCH], self.head[t.AT_LANES] = len(self.rows), batch, self.address(lanes)
        arguments = (
            np.array([*self.head, *(i for row in self.rows for i in row), *self.tensors], np.int64),
            np.array([*self.head_factors, *(f for row in self.factors for f in row), *self.tensor_factors]),
            np.zeros(t.REALS + self.widest, self.real),
            np.array([0] * t.INTEGERS + t.LETTERS, np.int32),
        )
        names, kept = frozenset(self.names & NAMES), self.kept
        loop = loop_for(names, exactly=True) if exactly else None
        if not exactly:
            _waiting.update(names)

        def run(steps: int = 1, _arrays: Sequence[Array] = kept) -> None:
            nonlocal loop
            if loop is None:
                loop = loop_for(names, exactly=False)
            loop(steps, *arguments)

        return copied(run, self.before, self.after)


def copied(run: Run, before: list[tuple[Array, Array]], after: list[tuple[Array, Array]]) -> Run:
    """``run`` between copies of (destination, source)."""
    if not before and not after:
        return run

    def run_on_copies(*steps: int) -> None:
        for destination, source in before:
            np.copyto(destination, source)
        run(*steps)
        for destination, source in after:
            np.copyto(destination, source)

    return run_on_copies
