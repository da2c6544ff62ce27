"""``fusemlp plan``: the step program of a network, as text."""

from __future__ import annotations

from typing import Any

from fusemlp.cli.commands import PlanOptions
from fusemlp.cli.recipe import network
from fusemlp.runtime.plans import chosen_plan, plan_text


def plan(options: PlanOptions) -> None:
    """Print the program; this needs no device and no library of the backend."""
    net = network(options.sizes, options)
    names = ("batch_size", "backend", "precision", "devices", "reduce")
    told: dict[str, Any] = {name: getattr(options, name) for name in names}
    chosen = chosen_plan(net, **told)
    print(plan_text(net, loss=options.loss, optimizer=options.optimizer, **told))
    if chosen is not None:
        print(f"plan {chosen[0]}: {chosen[1]}")
