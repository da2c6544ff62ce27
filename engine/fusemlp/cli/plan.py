"""``fusemlp plan``: the step program of a network, as text."""

from __future__ import annotations

from typing import Any

from fusemlp.cli.commands import PlanOptions
from fusemlp.cli.recipe import network
from fusemlp.runtime.plans import chosen_plan, plan_text


def plan(options: PlanOptions) -> None:
    """Print the program; this needs no device and no library of the backend."""
    net = network(options.sizes, options)
    told: dict[str, Any] = {
        "batch_size": options.batch_size,
        "backend": options.backend,
        "precision": options.precision,
        "devices": options.devices,
        "reduce": options.reduce,
        "shard_optimizer": options.shard_optimizer,
    }
    chosen = chosen_plan(net, **told)
    print(plan_text(net, loss=options.loss, optimizer=options.optimizer, **told))
    if chosen is not None:
        print(f"plan {chosen[0]}: {chosen[1]}")
