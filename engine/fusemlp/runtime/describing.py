"""An engine as text: its network, its training and the memory that it takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from fusemlp.describe.summary import bytes_text, layer_lines

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session


def summary(engine: Session, print_fn: Callable[[str], object] = print) -> None:
    """Print the network, its training and the memory that it takes; ``print_fn`` gets the text instead."""
    net, memory = engine.network, engine.memory
    frozen = sum(
        math.prod(shape) for name, shape in net.parameter_shapes().items() if not engine.optimizer.options_for(name)[0]
    )
    size = memory.layout.size * memory.real_bytes
    held = {
        "parameters": size,
        "optimizer state": sum(len(state) for state in memory.states) * memory.real_bytes,
        "gradients": size * memory.gradient_parts,
        "copy of the average": size * bool(memory.evaluated),
        "16-bit copy": memory.layout.size * (memory.compute_bytes or 0),
    }
    lines = layer_lines(net)
    lines[-1] += f", {frozen:,} of them frozen" if frozen else ""
    lines += [
        f"loss {engine.loss.kind}, optimizer {engine.optimizer.kind} with lr {engine.optimizer.lr!r}, batch_size "
        f"{engine.batch_size}, seed {engine.seed}",
        f"{engine.precision} on {engine.backend} ({engine.device}), plan {engine.plan}: {engine.plan_reason}; "
        f"{len(engine.program.calls)} kernel calls a step",
        f"memory with padding: {', '.join(f'{name} {bytes_text(count)}' for name, count in held.items() if count)} "
        f"({bytes_text(sum(held.values()))}); {engine.epochs_trained} epochs, {engine.update_count} updates trained",
    ]
    print_fn("\n".join(lines))
