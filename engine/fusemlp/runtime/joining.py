"""An engine that trains together with the same engine in other processes."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

import numpy as np

from fusemlp.describe.checks import as_number, check_choice, check_flag
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Optimizer
from fusemlp.describe.privacy import DPSGD
from fusemlp.inputs.arrays import Array
from fusemlp.program.sharding import ORDERED, REDUCTIONS, Sharding
from fusemlp.runtime.memory import Memory
from fusemlp.runtime.plans import no_ranks
from fusemlp.runtime.ranks import Ranks, joined
from fusemlp.runtime.rates import RateTable
from fusemlp_kernels.contract import Backend
from fusemlp_kernels.errors import ArgumentError

# Libraries whose versions the bits of a step depend on.
LIBRARIES = ("fusemlp", "numpy", "numba", "torch")


@cache
def _versions() -> dict[str, str]:
    found = {f"the version of {name}": version(name) for name in LIBRARIES}
    return {**found, "the version of Python": platform.python_version()}


class Joining:
    """The part of an engine that knows the other processes, the ``ranks``, and the cut of a batch among them.

    Both are None in an engine that trains alone.
    """

    ranks: Ranks | None
    sharding: Sharding | None
    network: MLP
    optimizer: Optimizer
    privacy: DPSGD | None
    backend: str
    plan: str
    plan_reason: str
    memory: Memory
    rates: RateTable
    input_scale: Any
    description: Callable[[], dict[str, Any]]
    _backend: Backend
    _changing: Callable[[], list[str]]
    _use_memory: Callable[..., None]

    def join(self, distributed: bool, reduce: str, timeout: float, shard_optimizer: bool) -> None:
        """With ``distributed`` train together with the other processes that torchrun has started; ``shard_optimizer``:
        each with its slice of the optimizer's state.

        Raises what ``Ranks`` does, and ArgumentError or BackendUnavailableError for what cannot be trained so.
        """
        check_choice("reduce", reduce, REDUCTIONS)
        limit = as_number("timeout", timeout, low=0.0, low_open=True)
        sliced = check_flag("shard_optimizer", shard_optimizer)
        if not check_flag("distributed", distributed):
            if reduce != ORDERED:
                raise ArgumentError(
                    f"reduce: {reduce!r} adds the gradients of several processes, and this one trains alone; start it "
                    "by torchrun, a script with distributed=True, or leave reduce out"
                )
            if sliced:
                raise ArgumentError(
                    "shard_optimizer: it gives several processes a slice each of the optimizer's state, and this one "
                    "trains alone; start it by torchrun, a script with distributed=True, or leave shard_optimizer out"
                )
            return
        if not self._backend.traits.on_host:
            raise no_ranks("distributed", self.backend)
        if self.plan != "resident":
            raise ArgumentError(
                f"plan: a distributed step is two launches with a collective between them, got {self.plan!r}; leave "
                "plan out"
            )
        if self.privacy is not None:
            raise ArgumentError("privacy: a private engine trains in one process so far; leave distributed out")
        self.network.check_single("distributed", "training on several processes")
        if not any(self.optimizer.options_for(name)[0] for name in self.network.parameter_shapes()):
            raise ArgumentError("distributed: the optimizer trains no parameter, so there is no gradient to add")
        ranks = joined(limit)
        sharding = Sharding(reduce, ranks.world).check()
        self.ranks = ranks
        between = "collectives" if sliced else "a collective"
        self.plan_reason = f"two launches a step, and {between} between them ({sharding})"
        self._share_out(sharding._replace(slices=sliced))
        told = {"reduce": sharding, "shard_optimizer": sliced, "backend": self.backend}
        ranks.check_same({**_versions(), **self.description(), **told})

    def _share_out(self, sharding: Sharding, *, everywhere: bool = True) -> None:
        """Train on with this sharding; without ``everywhere`` rank 0 alone does."""
        before = {name: self.whole(name, everywhere=everywhere) for name in self._changing()}
        if any(array is None for array in before.values()):
            return
        again = sharding.slices or (self.sharding is not None and self.sharding.slices)
        self.sharding = sharding
        if again:
            self._use_memory(None, self.rates.schedule, self.input_scale)
            for name, array in before.items():
                self.put(name, array)
            self.memory.refresh_shadow()
            self.rates.forget()

    def keep_whole_state(self) -> None:
        """Let rank 0 keep the whole state of the optimizer, and need the other ranks no more to save it."""
        if self.sharding is not None and self.sharding.slices:
            self._share_out(self.sharding._replace(slices=False), everywhere=False)

    def whole(self, name: str, *, everywhere: bool = True) -> Array | None:
        """Return the flat array ``name`` of the memory. All ranks must call this if they have slices of it; without
        ``everywhere`` all but rank 0 get None.
        """
        memory, ranks = self.memory, self.ranks
        array: Array = memory.arrays[name]
        in_slices = self.sharding is not None and self.sharding.slices and name == "grads"
        if ranks is None or not (in_slices or name in memory.sliced):
            return array
        own = np.zeros(memory.slice_size, array.dtype)
        part = array[memory.own] if in_slices else array
        own[: len(part)] = part
        rows = np.empty((ranks.world, len(own)), array.dtype) if everywhere or ranks.leads else None
        if everywhere and rows is not None:
            ranks.all_gather(rows, own)
        else:
            ranks.gather(rows, own)
        return None if rows is None else rows.reshape(-1)[: memory.layout.size]

    def put(self, name: str, whole: Any) -> None:
        """Write the flat array ``name`` of the memory, or this rank's slice of it."""
        memory = self.memory
        memory.backend.copy_into(memory.arrays[name], whole[memory.own] if name in memory.sliced else whole)
