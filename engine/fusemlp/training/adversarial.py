"""Training on attacked batches: what it goes with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fusemlp.describe.adversarial import Attack
from fusemlp.describe.intervals import IBP
from fusemlp.runtime.plans import ASKED
from fusemlp.training.intervals import check_intervals
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session


def check_adversarial(engine: Session, attack: Any, given: Mapping[str, Any]) -> None:
    """Raise ArgumentError or ArgumentTypeError for what ``fit`` cannot do beside ``attack``, or an IBP.

    ``given``: arguments of ``fit`` that it refuses unless they are false.
    """
    if isinstance(attack, IBP):
        check_intervals(engine, attack, given)
        return
    if not isinstance(attack, Attack):
        raise ArgumentTypeError(f"adversarial: expected an attack such as PGD(0.1), or IBP(0.1), got {attack!r}")
    if attack.plain.restarts > 1:
        raise ArgumentError("adversarial: restarts are for attack and evaluate; training takes one, restarts=1")
    if engine.privacy is not None:
        raise ArgumentError("adversarial: the engine trains privately; leave out privacy or adversarial")
    if engine.normalise:
        raise ArgumentError(
            "adversarial: eps would be in the units of the scaled columns, and that of attack is in raw ones; scale X "
            "yourself, and make the engine with normalise=False"
        )
    for name, value in given.items():
        if value:
            raise ArgumentError(f"{name}: adversarial training takes arrays X and y, not batches; give both")
    if engine.plan == "resident" and engine.plan_reason == ASKED and not engine.memory.backend.traits.on_host:
        raise ArgumentError("plan: the resident kernel does not attack its batches; use plan='auto'")
