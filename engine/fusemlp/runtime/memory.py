"""The memory that an engine keeps between steps, its table of learning rates, and the scratch memory of programs."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Schedule
from fusemlp.inputs.arrays import Array
from fusemlp.program import layout
from fusemlp_kernels.clock import rate_table
from fusemlp_kernels.contract import (
    BIAS_CORRECTION_1,
    BIAS_CORRECTION_2,
    COUNTERS,
    FIRST_UPDATE,
    HYPER,
    LEARNING_RATE,
    RATE_COLUMNS,
    RATE_SCALE,
    RATE_SHARE,
    ROWS_FILLED,
    SHARE,
    STATS,
    UPDATE_COUNT,
    Backend,
    Traits,
    UpdateRule,
)

# Bytes of an element of the parameters, where they are not four.
REAL_BYTES = {"fp64": 8}
# Precisions whose matrix products read another type than the parameters have.
_COMPUTE_BYTES = {"bf16": 2, "fp16": 2}
# Types of what a step changes beside arenas of "real".
DTYPES = {"counters": "int64", "hyper": "float64", "stats": "float64"}


def compute_bytes(traits: Traits, precision: str) -> int | None:
    """Return the bytes of what the matrix products read; None for the parameters, which the host's round themselves."""
    return None if traits.on_host else _COMPUTE_BYTES.get(precision)


def new_arenas(
    backend: Backend,
    size: int,
    state_count: int,
    *,
    mixed: bool = False,
    gradient_parts: int = 1,
    models: int = 1,
) -> dict[str, Any]:
    """Flat zeroed arrays for what ``models`` models keep between steps, one model's behind the other's; ``size`` is
    that of a model's parameters in elements."""
    sizes = {"params": (size, "real"), "grads": (size * gradient_parts, "real")}
    sizes |= {f"state{index}": (size, "real") for index in range(state_count)}
    sizes |= {"counters": (COUNTERS, DTYPES["counters"]), "hyper": (HYPER, DTYPES["hyper"])}
    sizes["stats"] = STATS, DTYPES["stats"]
    sizes["rates"] = (1 + layout.RATE_ROWS) * RATE_COLUMNS, "float64"
    if mixed:
        sizes["shadow"] = size, "compute"
    try:
        return {name: backend.allocate(count * models, dtype) for name, (count, dtype) in sizes.items()}
    except MemoryError as error:
        parameters = f"{size:,} parameters" + (f" of each of {models} models" if models > 1 else "")
        raise MemoryError(
            f"net: there is no room for {parameters}, their gradients and the optimizer's state; make layers narrower "
            f"({error})"
        ) from error


class Account(NamedTuple):
    """The numbers that the host reads after a launch, at one go: the statistics of epochs (epochs, STATS), the counters
    and hyper, whether all parameters are ``finite``, and the other arrays that were asked for.
    """

    stats: Array
    counters: Array
    hyper: Array
    finite: bool
    beside: list[Array]


class Memory:
    """The memory between steps: parameters, gradients, optimizer state, counters, all on the device.

    ``rule`` says which state the optimizer has; without one there are parameters alone. ``arenas``: its arrays, those
    of ``new_arenas`` by default. ``coded``: the weights of the first layer lie as codes read them.
    """

    def __init__(
        self,
        net: MLP,
        backend: Backend,
        precision: str,
        rule: UpdateRule | None = None,
        *,
        gradient_parts: int = 1,
        arenas: Mapping[str, Any] | None = None,
        coded: bool = False,
    ) -> None:
        self.backend, self.precision, self.coded = backend, precision, coded
        state_count, average = (0, None) if rule is None else (rule.state_count, rule.average)
        # the flat array that predictions read: the parameters, or their average
        self.averages, self.evaluated_arena = average is not None, "params" if average is None else f"state{average}"
        # bytes of a parameter, and of what the matrix products read, where that is another type
        self.real_bytes, self.compute_bytes = REAL_BYTES.get(precision, 4), compute_bytes(backend.traits, precision)
        # the parameters' names, by their short ones
        self.names = layout.short_names(net)
        # whether gradients outlive a step
        self.accumulates = False
        mixed = self.compute_bytes is not None
        multiple = backend.traits.row_multiple
        self.layout = layout.parameter_layout(net, row_multiple=multiple, item_bytes=self.real_bytes, coded=coded)
        # the parts of a batch have their gradients behind one another
        self.gradient_parts = gradient_parts
        size, rounded = self.layout.size, ["shadow"] if mixed else []
        if arenas is None:
            arenas = new_arenas(backend, size, state_count, mixed=mixed, gradient_parts=gradient_parts)
        rates = arenas["rates"].reshape(-1, RATE_COLUMNS)
        # the flat arrays by name
        self.arenas: dict[str, Any] = {**arenas, "grads": arenas["grads"][:size], "rates": rates}
        self.params, self.grads = self.arenas["params"], self.arenas["grads"]
        self.marked: dict[str, Any] = {}
        self.counters, self.hyper, self.stats = arenas["counters"], arenas["hyper"], arenas["stats"]
        self.rates, self.shadow = rates, arenas.get("shadow")
        self.state_names = states = [f"state{index}" for index in range(state_count)]
        self.states = tuple(arenas[name] for name in states)
        views = self.layout.views
        self.arrays: dict[str, Any] = {**self.arenas, **views(backend, self.params)}
        self.arrays |= {f"d{name}": view for name, view in views(backend, self.grads).items()}
        for arena in (*states, *rounded):
            self.arrays |= {f"{name}.{arena}": view for name, view in views(backend, arenas[arena]).items()}

    def copies(self, names: Iterable[str], into: dict[str, Any] | None = None) -> dict[str, Any]:
        """Copies of these flat arrays on the device, in those of ``into`` that it has."""
        backend, copies = self.backend, dict[str, Any]()
        for name in names:
            array, copy = self.arrays[name], (into or {}).get(name)
            copies[name] = backend.allocate(len(array), DTYPES.get(name, "real")) if copy is None else copy
            backend.copy_into(copies[name], array)
        return copies

    @property
    def _changing(self) -> list[str]:
        """The names of the flat arrays that a step changes."""
        # gradients outlive a step only where they are accumulated
        return ["params", *(["grads"] if self.accumulates else []), *self.state_names, *DTYPES]

    def snapshot(self) -> dict[str, Array]:
        """Return host copies of all that a step changes, for ``restore``."""
        return {name: self.backend.to_host(self.arrays[name]) for name in self._changing}

    def mark(self, into: dict[str, Any] | None) -> dict[str, Any]:
        """Return copies of the same for ``restore``, in a mark ``into`` or, on the host, in the last one: new memory
        costs a fit of few batches a tenth more."""
        copies = self.copies(self._changing, self.marked if into is None else into)
        self.marked = copies if self.backend.traits.on_host else {}
        return copies

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go back to a ``snapshot``, or to a mark."""
        for name, array in snapshot.items():
            self.backend.copy_into(self.arrays[name], array)
        self.refresh_shadow()

    def of_parameters(self, net: MLP) -> Memory:
        """Return memory for parameters alone, which lie as they do here."""
        return Memory(net, self.backend, self.precision, coded=self.coded)

    def take(self, memory: Memory) -> None:
        """Take over all that a step changes of the memory of an equal network, whose weights may lie in another way."""
        for name in memory._changing:
            if name in DTYPES:
                self.backend.copy_into(self.arrays[name], memory.arrays[name])
            else:
                self.take_arena(name, memory, name)
        self.accumulates = memory.accumulates
        self.refresh_shadow()

    def take_arena(self, name: str, memory: Memory, source: str) -> None:
        """Take over the tensors of one flat array of another memory."""
        if memory.coded == self.coded:
            self.backend.copy_into(self.arrays[name], memory.arrays[source])
            return
        views = memory.layout.views(self.backend, memory.arrays[source])
        for short, view in self.layout.views(self.backend, self.arrays[name]).items():
            self.backend.copy_into(view, views[short])

    def account(self, epoch_stats: Any | None = None, *, check_finite: bool, beside: Sequence[Any] = ()) -> Account:
        """Return the account of the steps since the statistics were cleared; waits for the device, once.

        ``epoch_stats`` (epochs, STATS): the statistics of several epochs, in place of its own. ``beside`` are arrays to
        read at the same go.
        """
        backend, stats = self.backend, self.stats if epoch_stats is None else epoch_stats
        # if one is not finite, neither is the sum; on the host nothing waits
        sums = [self.params.sum()] if check_finite and not backend.traits.on_host else []
        statistics, counters, hyper, *rest = backend.read(stats, self.counters, self.hyper, *sums, *beside)
        finite = not check_finite or (bool(sums) and math.isfinite(rest[0][0]))
        finite = finite or all(map(math.isfinite, backend.extent(self.params)))
        return Account(statistics.reshape(-1, len(self.stats)), counters, hyper, finite, rest[len(sums) :])

    def tensors(self, arena: str = "params") -> dict[str, Array]:
        """Return copies of one array per parameter, by name: the parameters, or what another flat array has for them,
        "state0" or "grads"."""
        return self.named(self.arrays[arena])

    def evaluated_tensors(self) -> dict[str, Array]:
        """Return copies of what predictions use: the parameters, or their averages."""
        return self.tensors(self.evaluated_arena)

    def write(self, tensors: Mapping[str, Any], arena: str = "params") -> None:
        """Invert ``tensors``; the padding around them becomes zero again, whatever a lost step left there.

        An average of the parameters begins anew with them.
        """
        flat = self.flat(tensors)
        for name in {arena, self.evaluated_arena} if arena == "params" else {arena}:
            self.backend.copy_into(self.arrays[name], flat)
        self.refresh_shadow()

    def flat(self, tensors: Mapping[str, Any]) -> Any:
        """Invert ``named``."""
        flat = self.backend.allocate(len(self.params), "real")
        for short, view in self.layout.views(self.backend, flat).items():
            self.backend.copy_into(view, tensors[self.names[short]])
        return flat

    def named(self, flat: Any) -> dict[str, Array]:
        """Return copies of the tensors in a flat array like that of the parameters, by name."""
        views = self.layout.views(self.backend, flat)
        return {name: self.backend.to_host(views[short]) for short, name in self.names.items()}

    def read_evaluated(self, memory: Memory) -> None:
        """Take over what predictions read of ``memory``."""
        if memory is self:
            return
        self.take_arena("params", memory, memory.evaluated_arena)
        if memory.averages:
            self.refresh_shadow()
        elif self.shadow is not None:
            self.backend.copy_into(self.shadow, memory.shadow)

    def refresh_shadow(self) -> None:
        """Round the parameters into the shadow, after they were written from outside a step."""
        if self.shadow is not None:
            self.backend.copy_into(self.shadow, self.params)


class RateTable:
    """Keeps ``rates`` ahead of the updates of one optimizer; the arrays are the contract's, on the device.

    ``cover`` is called before each launch. After the counters were written from outside, ``forget`` makes the next
    launch fill the table anew.
    """

    def __init__(
        self, backend: Backend, rule: UpdateRule, hyper: Any, rates: Any, counters: Any, *, skips: bool = False
    ) -> None:
        self.hyper, self.rates, self.counters = hyper, rates, counters
        self.schedule: Schedule | None = None
        self._backend = backend
        self.rule = rule
        # the rows to fill next
        self._rows = len(rates) - 1
        # what the table was filled with, and of which update its first row is
        self._filled: Array = np.empty((0, 0))
        self._first = 0
        # how many more batches it has rows for
        self._batches = 0
        # batches may be skipped without an update
        self._skips = skips
        # the number of updates when the host last knew it, and the batches that were launched since
        self._known: int | None = None
        self._since = 0

    def turn(self, rule: UpdateRule) -> None:
        """Take another rule from the next ``follow`` on, with few rows, since it may change again."""
        self.rule, self._rows, self._filled = rule, 2, self._filled[:0]

    def turn_now(self, rule: UpdateRule, first: int) -> None:
        """Write the bias corrections of update ``first`` and of the next, in host memory at a constant rate."""
        self.turn(rule)
        self.note(first)
        self._first, self._filled, self._batches = first, self.rates[1:3], 1
        rates, hyper = self.rates.data, self.hyper.data
        rates[0, FIRST_UPDATE], rates[0, ROWS_FILLED] = first, 2
        for column, beta in ((BIAS_CORRECTION_1, rule.beta1), (BIAS_CORRECTION_2, rule.beta2)):
            rates[1, column] = hyper[column] = 1.0 - math.pow(beta, first + 1)
            rates[2, column] = 1.0 - math.pow(beta, first + 2)

    def follow(self, schedule: Schedule, scale: float | None = None, *, count: int | None = None) -> None:
        """Take the learning rates from ``schedule``, whose lengths are numbers of updates, from the next update on.

        ``scale`` multiplies them. ``count``: how many updates were before, where the caller knows; else the device is
        asked, and waited for.
        """
        hyper = self.hyper
        first = int(self.counters[UPDATE_COUNT]) if count is None else count
        self.note(first)
        known = schedule == self.schedule and 0 <= first - self._first < len(self._filled)
        self.schedule = schedule
        if known:
            self._count_batches(first, first)
        else:
            self._fill(first, first)
        if scale is None:
            scale = float(hyper[RATE_SCALE])
        else:
            hyper[RATE_SCALE] = scale
        row = self._filled[first - self._first]
        hyper[LEARNING_RATE] = row[LEARNING_RATE] * scale
        hyper[BIAS_CORRECTION_1], hyper[BIAS_CORRECTION_2] = row[BIAS_CORRECTION_1], row[BIAS_CORRECTION_2]
        hyper[SHARE] = row[RATE_SHARE]

    def rescale(self, scale: float) -> None:
        """Multiply the rates of the schedule by ``scale`` from the next update on."""
        self.hyper[RATE_SCALE] = scale
        self.hyper[LEARNING_RATE] = self.base * scale

    @property
    def base(self) -> float:
        """The rate of the schedule for the next update, without the factor on it."""
        assert self.schedule is not None
        least, most = self._updates()
        return self.schedule.at(least if least == most else int(self.counters[UPDATE_COUNT]))

    def note(self, count: int) -> None:
        """Learn how many updates there were."""
        self._known, self._since = count, 0

    def forget(self) -> None:
        """Fill the table again before the next launch."""
        self._batches, self._known = 0, None

    def _updates(self) -> tuple[int, int]:
        """The least and the greatest number that there may have been; asks the device, and waits for it, if the host
        knows none. In host memory nothing waits."""
        if self._known is None or isinstance(self.counters, np.ndarray):
            self.note(int(self.counters[UPDATE_COUNT]))
        assert self._known is not None
        whole, rest = divmod(self._since, self.rule.accumulate)
        return self._known + (0 if self._skips else whole), self._known + whole + bool(rest)

    def cover(self, schedule: Schedule, batches: int) -> int:
        """Make the table ready for a launch by ``schedule``; returns how many of ``batches`` it may go through."""
        if schedule is not self.schedule:
            self.follow(schedule)
        if batches > self._batches:
            least, most = self._updates()
            if most - least >= len(self.rates) // 2:
                # too many that may have been skipped
                self._known = None
                least, most = self._updates()
            self._fill(least, most)
        covered = min(batches, self._batches)
        self._batches -= covered
        self._since += covered
        return covered

    def _fill(self, first: int, most: int) -> None:
        """Fill the table from update ``first`` on; the next is at most update ``most``."""
        assert self.schedule is not None
        rows, self._rows = self._rows, min(4 * self._rows, len(self.rates) - 1)
        if self.schedule.constant and first >= self.schedule.warmup and self.rule.kind == "sgd" and not self.rule.ema:
            rows = 1
        table = rate_table(self.rule, self.schedule.rates(first, rows), first)
        self._backend.copy_into(self.rates[: len(table)], table)
        # on the host the table is kept once
        self._first, self._filled = first, (self.rates if isinstance(self.rates, np.ndarray) else table)[1 : len(table)]
        self._count_batches(first, most)

    def _count_batches(self, first: int, most: int) -> None:
        assert self.schedule is not None
        ahead = first - self._first
        row = self._filled[ahead]
        settled = self.schedule.constant and first >= self.schedule.warmup
        # with bias corrections that are 1, those of the average too, a constant rate's row stands for all that follow
        corrected = row[BIAS_CORRECTION_1] == row[BIAS_CORRECTION_2] == 1.0 and row[RATE_SHARE] == 1.0 - self.rule.ema
        if settled and corrected:
            self._batches = sys.maxsize
        else:
            self._batches = (len(self._filled) - 1 - ahead - (most - first)) * self.rule.accumulate


def on_device(backend: Backend, net: MLP, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return the data of a program on the device: x as the first call reads it, the others as they are."""
    first = "compute" if net.encoding is None else "real"
    return {name: backend.from_host(array, first if name == "x" else None) for name, array in arrays.items()}


class Workspace:
    """Scratch arenas, one a dtype, that programs which never run at once have in common. They only grow."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self._arenas: dict[str, tuple[int, Any]] = {}

    def arena(self, dtype: str, size: int) -> Any:
        """A flat array of at least ``size`` elements."""
        if dtype not in self._arenas or self._arenas[dtype][0] < size:
            self._arenas[dtype] = (size, self.backend.allocate(size, dtype))
        return self._arenas[dtype][1]
