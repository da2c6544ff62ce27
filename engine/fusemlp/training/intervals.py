"""Training with interval bounds: what it asks of the targets, and the numbers that its program reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp_kernels.errors import ArgumentError

if TYPE_CHECKING:
    from fusemlp.describe.intervals import IBP
    from fusemlp.inputs.targets import Targets
    from fusemlp.runtime.session import Session


def check_labels(targets: Targets) -> None:
    """Raise ArgumentError for targets without a label a row."""
    if targets.soft:
        raise ArgumentError("y: IBP takes class labels (n,), and got probabilities; give y.argmax(axis=1)")


def write_limits(engine: Session, ibp: IBP, arrays: Mapping[str, Any]) -> None:
    """Write each column's reach in units of eps, and its bounds if any, as the network takes inputs."""
    scale = engine.input_scale
    found: dict[str, Any] = {"reach": 1.0 if scale is None else 1.0 / scale.scale}
    for name, end in zip(("least", "most"), ibp.bounds or (), strict=False):
        found[name] = end if scale is None else (end - scale.mean) / scale.scale
    width, kind = engine.network.sizes[0], f"f{engine.memory.real_bytes}"
    for name, values in found.items():
        # there are none where nothing is trained
        if name in arrays:
            engine.memory.backend.copy_into(arrays[name], np.broadcast_to(values, width).astype(kind))
