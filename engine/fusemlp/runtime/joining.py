"""An engine that trains together with the same engine in other processes."""

from __future__ import annotations

import platform
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from typing import Any

from fusemlp.describe.checks import as_number, check_choice, check_flag
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Optimizer
from fusemlp.describe.privacy import DPSGD
from fusemlp.inputs.arrays import Array
from fusemlp.program.sharding import ORDERED, REDUCTIONS, Sharding
from fusemlp.runtime.memory import Memory
from fusemlp.runtime.plans import check_ranks, shared_plan
from fusemlp.runtime.ranks import Ranks, check_nccl, joined, own_card
from fusemlp.runtime.rates import RateTable
from fusemlp_kernels.contract import Backend
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError
from fusemlp_kernels.registry import backend

# Libraries whose versions the bits of a step depend on.
LIBRARIES = ("fusemlp", "numpy", "numba", "torch")


@cache
def _versions() -> dict[str, str]:
    found = {f"the version of {name}": version(name) for name in LIBRARIES}
    return {**found, "the version of Python": platform.python_version()}


def open_here(name: str, device: str | None, precision: str) -> Backend:
    """Return a backend on a device: by default, in a process of torchrun, on the card of its number if it sees that."""
    found, card = backend(name, device, precision), own_card()
    if device is not None or card is None or not found.device.startswith("cuda"):
        return found
    try:
        return backend(found.traits.name, card, precision)
    except BackendUnavailableError:
        # it may see its own card alone; ranks with one card refuse to train together
        return found


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
        traits = self._backend.traits
        check_ranks("distributed", traits)
        # refused before the processes meet
        shared_plan((self.plan, self.plan_reason), traits, Sharding(reduce, 1, sliced))
        if self.privacy is not None:
            raise ArgumentError("privacy: a private engine trains in one process so far; leave distributed out")
        self.network.check_single("distributed", "training on several processes")
        if not any(self.optimizer.options_for(name)[0] for name in self.network.parameter_shapes()):
            raise ArgumentError("distributed: the optimizer trains no parameter, so there is no gradient to add")
        device = self._backend.device
        if device != "cpu":
            check_nccl()
        ranks = joined(limit)
        sharding = Sharding(reduce, ranks.world, sliced).check()
        plan = shared_plan((self.plan, self.plan_reason), traits, sharding, ranks.uncaptured())
        self.ranks = ranks
        self.plan, self.plan_reason = plan
        self._share_out(sharding)
        told = {"reduce": sharding, "shard_optimizer": sliced, "backend": self.backend, "plan": self.plan}
        ranks.check_same({**_versions(), **self.description(), **told})
        # after that: with another backend a rank has no card
        if device != "cpu":
            ranks.take_card(device)

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
        memory, ranks, allocate = self.memory, self.ranks, self._backend.allocate
        array: Array = memory.arrays[name]
        in_slices = self.sharding is not None and self.sharding.slices and name == "grads"
        if ranks is None or not (in_slices or name in memory.sliced):
            return array
        own: Array = allocate(memory.slice_size, "real")
        part = array[memory.own] if in_slices else array
        own[: len(part)] = part
        rows: Array | None = None
        if everywhere or ranks.leads:
            rows = allocate(ranks.world * len(own), "real").reshape(ranks.world, len(own))
        if everywhere and rows is not None:
            ranks.all_gather(rows, own)
        else:
            ranks.gather(rows, own)
        return None if rows is None else rows.reshape(-1)[: memory.layout.size]

    def put(self, name: str, whole: Any) -> None:
        """Write the flat array ``name`` of the memory, or this rank's slice of it."""
        memory = self.memory
        memory.backend.copy_into(memory.arrays[name], whole[memory.own] if name in memory.sliced else whole)
