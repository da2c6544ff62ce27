"""Train together with the same engine in other processes, the ranks, and collect what each has a slice of."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fusemlp.describe.checks import as_number, check_choice, check_flag
from fusemlp.describe.conflicts import check_together
from fusemlp.inputs.arrays import Array
from fusemlp.program.sharding import ORDERED, REDUCTIONS, Sharding
from fusemlp.runtime.plans import shared_plan
from fusemlp.runtime.ranks import check_nccl, joined, own_card
from fusemlp_kernels.contract import Backend
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError
from fusemlp_kernels.registry import backend

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session

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


def join(engine: Session, distributed: bool, reduce: str, timeout: float, shard_optimizer: bool) -> None:
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
    # refused before the processes meet
    check_together({**engine.uses, "ranks": "distributed"})
    if not any(engine.optimizer.options_for(name)[0] for name in engine.network.parameter_shapes()):
        raise ArgumentError("distributed: the optimizer trains no parameter, so there is no gradient to add")
    device = engine._backend.device
    if device != "cpu":
        check_nccl()
    ranks = joined(limit)
    sharding = Sharding(reduce, ranks.world, sliced).check()
    alone, traits = (engine.plan, engine.plan_reason), engine._backend.traits
    plan = shared_plan(alone, traits, sharding, ranks.uncaptured())
    engine.ranks = ranks
    engine.plan, engine.plan_reason = plan
    _share_out(engine, sharding)
    told = {"reduce": sharding, "shard_optimizer": sliced, "backend": engine.backend, "plan": engine.plan}
    ranks.check_same({**_versions(), **engine.description(), **told})
    # after that: with another backend a rank has no card
    if device != "cpu":
        ranks.take_card(device)


def _share_out(engine: Session, sharding: Sharding, *, everywhere: bool = True) -> None:
    """Train on with this sharding; without ``everywhere`` rank 0 alone does."""
    before = {name: engine.whole(name, everywhere=everywhere) for name in engine._changing()}
    if any(array is None for array in before.values()):
        return
    again = sharding.slices or (engine.sharding is not None and engine.sharding.slices)
    engine.sharding = sharding
    if again:
        engine._use_memory(None, engine.rates.schedule, engine.input_scale)
        for name, array in before.items():
            engine.put(name, array)
        engine.memory.refresh_shadow()
        engine.rates.forget()


def keep_whole_state(engine: Session) -> None:
    """Let rank 0 keep the whole state of the optimizer, and need the other ranks no more to save it."""
    if engine.sharding is not None and engine.sharding.slices:
        _share_out(engine, engine.sharding._replace(slices=False), everywhere=False)


def whole(engine: Session, name: str, *, everywhere: bool = True) -> Array | None:
    """Return the flat array ``name`` of the memory. All ranks must call this if they have slices of it; without
    ``everywhere`` all but rank 0 get None.
    """
    memory, ranks, allocate = engine.memory, engine.ranks, engine._backend.allocate
    array: Array = memory.arrays[name]
    in_slices = engine.sharding is not None and engine.sharding.slices and name == "grads"
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


def put(engine: Session, name: str, whole: Any) -> None:
    """Write the flat array ``name`` of the memory, or this rank's slice of it."""
    memory = engine.memory
    memory.backend.copy_into(memory.arrays[name], whole[memory.own] if name in memory.sliced else whole)
