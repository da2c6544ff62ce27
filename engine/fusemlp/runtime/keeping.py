"""An engine's states to go back to, and the program of its last fit."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from fusemlp.describe.optimizers import Optimizer
from fusemlp.inputs.arrays import Array
from fusemlp.runtime.bound import BoundProgram
from fusemlp.runtime.memory import Memory, on_device
from fusemlp.runtime.ranks import Ranks, mark_of
from fusemlp.runtime.rates import RateTable
from fusemlp_kernels.contract import UPDATE_COUNT, Backend


class Account(NamedTuple):
    """The numbers that the host reads after a launch, at one go: the statistics of epochs (epochs, STATS), the counters
    and hyper, whether all parameters are ``finite``, and with other ranks the numbers of ``mark_of``.
    """

    stats: Array
    counters: Array
    hyper: Array
    finite: bool
    mark: list[Array]


@dataclass(eq=False)
class LastFit:
    """The program of the last fit on a device, with its data there.

    ``key`` is all that the program depends on beside its arrays. ``places`` are those of the arrays that it reads where
    the user has them, and None for those that are the engine's; ``owners`` are the user's objects that hold the former.
    """

    key: Any
    bound: BoundProgram
    places: Mapping[str, Any]
    owners: list[weakref.ref[Any]] = field(default_factory=list)


class Keeping:
    """The part of an engine that goes back to an earlier state, or on with an earlier program."""

    memory: Memory
    optimizer: Optimizer
    rates: RateTable
    ranks: Ranks | None
    _backend: Backend
    _names: Mapping[str, str]
    _last_fit: LastFit | None

    def account(self, epoch_stats: Any | None = None, *, check_finite: bool) -> Account:
        """Return the account of the steps since the statistics were cleared; waits for the device, once.

        ``epoch_stats`` (epochs, STATS): the statistics of several epochs, in place of the engine's.
        """
        memory, backend = self.memory, self._backend
        stats = memory.stats if epoch_stats is None else epoch_stats
        # if one is not finite, neither is the sum; on the host nothing waits
        sums = [memory.params.sum()] if check_finite and not backend.traits.on_host else []
        marks = [] if self.ranks is None else mark_of(memory.params)
        found, counters, hyper, *rest = backend.read(stats, memory.counters, memory.hyper, *sums, *marks)
        self.rates.note(int(counters[UPDATE_COUNT]))
        finite = not check_finite or (bool(sums) and math.isfinite(rest[0][0]))
        finite = finite or all(map(math.isfinite, backend.extent(memory.params)))
        return Account(found.reshape(-1, len(memory.stats)), counters, hyper, finite, rest[len(sums) :])

    def snapshot(self) -> dict[str, Array]:
        """Host copies of all that a step changes, for ``restore``."""
        return {name: self._backend.to_host(self.memory.arrays[name]) for name in self._changing()}

    def remember(self, into: dict[str, Any] | None = None) -> dict[str, Any]:
        """Copies of the same on the device, for ``restore``; ``into`` is one that may be overwritten."""
        return self.memory.copies(self._changing(), into)

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Go back to a ``snapshot`` of this engine, or to what it remembered."""
        for name in self._changing():
            self._backend.copy_into(self.memory.arrays[name], snapshot[name])
        self.memory.refresh_shadow()
        self.rates.forget()

    def _changing(self) -> list[str]:
        states = [f"state{index}" for index in range(len(self.memory.states))]
        # gradients outlive a step only where they are accumulated
        grads = ["grads"] if self.optimizer.accumulate > 1 else []
        return ["params", *grads, *states, "counters", "hyper", "stats"]

    def named(self, flat: Any) -> dict[str, Array]:
        """Copies of the tensors in a flat array like that of the parameters, by name."""
        views = self.memory.layout.views(self._backend, flat)
        return {name: self._backend.to_host(views[short]) for short, name in self._names.items()}

    def bound_again(
        self, key: Any, data: Mapping[str, Any], bind: Callable[[Mapping[str, Any]], BoundProgram]
    ) -> BoundProgram:
        """Return the program that ``bind`` makes from data on the device, or the last one with this ``key``.

        That one has its graphs already. New data is copied into the engine's own arrays; arrays that the program reads
        where the user has them must be the same. On the host every fit binds its own.
        """
        backend = self._backend
        shapes = {name: tuple(array.shape) for name, array in data.items()}
        key, last = (key, shapes), self._last_fit
        usable = last is not None and last.key == key and all(self._reads(last, name, data[name]) for name in shapes)
        if self.ranks is not None and not backend.traits.on_host:
            # all ranks replay their graphs, or none: NCCL wants it so
            usable = not self.ranks.any(not usable)[0]
        if last is not None and usable:
            for name, array in data.items():
                if last.places[name] is None:
                    backend.copy_into(last.bound.arrays[name], array)
            return last.bound
        # before the next takes memory
        self._last_fit = last = None
        there = on_device(backend, data)
        bound = bind(there)
        if not backend.traits.on_host:
            places = {name: backend.place(array) if array is data[name] else None for name, array in there.items()}
            self._last_fit = LastFit(key, bound, places)
        return bound

    def _reads(self, last: LastFit, name: str, array: Any) -> bool:
        place = last.places[name]
        return place is None or (not isinstance(array, np.ndarray) and self._backend.place(array) == place)

    def let_go_with(self, owners: Iterable[Any]) -> None:
        """Give up the program of the last fit when one of these objects is gone, if it reads their memory."""
        last = self._last_fit
        if last is None or all(place is None for place in last.places.values()):
            return
        engine = weakref.ref(self)

        def let_go(_: Any) -> None:
            kept = engine()
            if kept is not None and kept._last_fit is last:
                kept._last_fit = None

        last.owners = [weakref.ref(one, let_go) for one in owners if self._backend.adopt(one) is not None]
