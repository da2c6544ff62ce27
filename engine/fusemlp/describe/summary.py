"""A network as text: layers, shapes, parameters and the memory that they take."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fusemlp.describe.network import MLP

HEADER = ("layer", "shape", "activation", "dropout", "initial weights", "parameters")
# Arrays of the size of the parameters that an optimizer keeps beside them.
STATES = {"SGD": 0, "SGD with momentum": 1, "Adam": 2}


def bytes_text(count: int) -> str:
    """Return a number of bytes as ``9.41 KiB``."""
    size, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    while size >= 1024.0 and unit != "GiB":
        size, unit = size / 1024.0, next(units)
    return f"{count} B" if unit == "B" else f"{size:.3g} {unit}" if size < 1000.0 else f"{size:.0f} {unit}"


def layer_lines(net: MLP) -> list[str]:
    """Return a table of the layers and the number of parameters."""
    counts = [0] * net.layers
    for name, shape in net.parameter_shapes().items():
        counts[int(name.partition(".")[0]) // 2] += math.prod(shape)
    rows: list[Sequence[str]] = [HEADER]
    for layer, activation in enumerate(net.activations):
        inputs, outputs = net.sizes[layer : layer + 2]
        slope = f" {activation.slope:g}" if activation.slope else ""
        dropout = f"{net.dropouts[layer]:g}" if net.dropouts[layer] else "-"
        rows.append(
            (
                str(layer + 1),
                f"{inputs} -> {outputs}",
                f"{activation.name}{slope}",
                dropout,
                net.init_of(layer),
                f"{counts[layer]:,}",
            )
        )
    members = f", {net.members} members" if net.members > 1 else ""
    title, lines = f"MLP {'-'.join(map(str, net.sizes))}{members}", aligned(rows, left=len(HEADER) - 1).split("\n")
    return [title, *lines, f"{net.parameter_count:,} parameters"]


def aligned(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return rows as aligned text, the first ``left`` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        words = [
            word.ljust(width) if index < left else word.rjust(width)
            for index, (word, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(words).rstrip())
    return "\n".join(lines)


def network_text(net: MLP) -> str:
    """Return the layers, and the memory of the parameters with each optimizer's state."""
    size = 4 * net.parameter_count
    states = ", ".join(f"{bytes_text(size * (1 + count))} ({name})" for name, count in STATES.items())
    return "\n".join(
        [*layer_lines(net), f"memory in fp32: {bytes_text(size)}; with the state of the optimizer: {states}"]
    )
