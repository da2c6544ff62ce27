"""``fusemlp plan``: the step program of a network, as text."""

from __future__ import annotations

from collections.abc import Sequence

from fusemlp.cli.recipe import network
from fusemlp.runtime.plans import chosen_plan, plan_text


def plan(
    sizes: Sequence[int],
    *,
    batch_size: int,
    backend: str,
    precision: str,
    activation: str,
    output_activation: str,
    dropout: str,
    loss: str,
    optimizer: str,
) -> None:
    """Print the program; this needs no device and no library of the backend."""
    net = network(sizes, activation=activation, output_activation=output_activation, dropout=dropout)
    chosen = chosen_plan(net, batch_size=batch_size, backend=backend, precision=precision)
    print(plan_text(net, loss=loss, optimizer=optimizer, batch_size=batch_size, backend=backend, precision=precision))
    if chosen is not None:
        print(f"plan {chosen[0]}: {chosen[1]}")
