"""Training against attacks: what it goes with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fusemlp.describe.adversarial import Attack
from fusemlp.describe.intervals import IBP
from fusemlp.runtime.plans import ASKED
from fusemlp.training.intervals import check_intervals
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session


def check_adversarial(engine: Session, against: Any, *, batches: bool = False) -> None:
    """Raise ArgumentError or ArgumentTypeError for what ``fit`` cannot do beside a training against attacks.

    ``batches``: it gets them in place of arrays.
    """
    if not isinstance(against, Attack | IBP):
        raise ArgumentTypeError(f"adversarial: expected an attack such as PGD(0.1), or IBP(0.1), got {against!r}")
    engine.network.check_single("adversarial", "adversarial training")
    if engine.privacy is not None:
        raise ArgumentError("adversarial: the engine trains privately; leave out privacy or adversarial")
    if engine.ranks is not None:
        raise ArgumentError("adversarial: it trains in one process so far; leave out distributed or adversarial")
    if batches:
        raise ArgumentError("y: adversarial training takes arrays X and y, not batches; give both")
    if engine.plan == "resident" and engine.plan_reason == ASKED and not engine.memory.backend.traits.on_host:
        raise ArgumentError("plan: the resident kernel trains on batches as they are; use plan='auto'")
    if isinstance(against, IBP):
        check_intervals(engine, against)
        return
    engine.memory.backend.traits.check_has("adversarial")
    if against.plain.restarts > 1:
        raise ArgumentError("adversarial: restarts are for Engine.attack; training takes one, restarts=1")
    if engine.normalise:
        raise ArgumentError(
            "adversarial: eps would be in the units of the scaled columns, and that of attack is in raw ones; scale X "
            "yourself, and make the engine with normalise=False"
        )
