"""Train together with the same engine in other processes, the ranks."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING

from fusemlp.describe.checks import as_number, check_choice, check_flag
from fusemlp.program.sharding import ORDERED, REDUCTIONS, Sharding
from fusemlp.runtime.plans import check_collectives, shared_plan
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


def join(engine: Session, distributed: bool, reduce: str, timeout: float) -> None:
    """With ``distributed`` train together with the other processes that torchrun has started.

    Raises what ``Ranks`` does, and ArgumentError or BackendUnavailableError for what cannot be trained so.
    """
    check_choice("reduce", reduce, REDUCTIONS)
    limit = as_number("timeout", timeout, low=0.0, low_open=True)
    if not check_flag("distributed", distributed):
        if reduce != ORDERED:
            raise ArgumentError(
                f"reduce: {reduce!r} adds the gradients of several processes, and this one trains alone; start it "
                "by torchrun, a script with distributed=True, or leave reduce out"
            )
        return
    traits = engine.memory.backend.traits
    check_collectives("distributed", traits)
    # refused before the processes meet
    shared_plan((engine.plan, engine.plan_reason), traits, Sharding(reduce, 1))
    if engine.privacy is not None:
        raise ArgumentError("privacy: a private engine trains in one process so far; leave distributed out")
    engine.network.check_single("distributed", "training on several processes")
    if not any(engine.optimizer.options_for(name)[0] for name in engine.network.parameter_shapes()):
        raise ArgumentError("distributed: the optimizer trains no parameter, so there is no gradient to add")
    device = engine.memory.backend.device
    if device != "cpu":
        check_nccl()
    ranks = joined(limit)
    sharding = Sharding(reduce, ranks.world).check()
    plan = shared_plan((engine.plan, engine.plan_reason), traits, sharding, ranks.uncaptured())
    engine.ranks, engine.sharding = ranks, sharding
    engine.plan, engine.plan_reason = plan
    told = {"reduce": sharding, "backend": engine.backend, "plan": engine.plan}
    ranks.check_same({**_versions(), **engine.description(), **told})
    # after that: with another backend a rank has no card
    if device != "cpu":
        ranks.take_card(device)
