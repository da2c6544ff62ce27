"""What the models of one launch must have in common, and what their layers must be: ``train_fleet``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from fusemlp_kernels.contract import LossSpec, ResidentLayer, Ridge, Segment, UpdateRule
from fusemlp_kernels.errors import ArgumentError


def check_alike(
    op: str,
    layers: Sequence[Sequence[ResidentLayer]],
    segments: Sequence[Sequence[Segment]],
    rules: Sequence[UpdateRule],
    losses: Sequence[LossSpec],
    ridges: Sequence[Ridge] | None = None,
) -> None:
    """Raises ArgumentError where there is not one of each for every model, or they cannot train in one launch."""
    models = len(layers)
    for name, given in (("segments", segments), ("rules", rules), ("losses", losses), ("ridges", ridges)):
        if given is not None and (len(given) != models or not models):
            raise ArgumentError(f"{op}: {name}: expected one for each of the {models} models, got {len(given)}")
    shapes = [tuple((one.inputs, one.outputs, one.w, one.b, one.activation, one.slope_at) for one in m) for m in layers]
    _same(op, "layers", shapes)
    _same(op, "segments", [tuple((one.offset, one.size) for one in own) for own in segments])
    _same(op, "rules: states", [rule.states for rule in rules])
    _same(op, "losses: kind, soft, ignore_index", [(loss.kind, loss.soft, loss.ignore_index) for loss in losses])
    _check_layers(op, layers[0], losses[0])


def _same(op: str, name: str, values: Sequence[Any]) -> None:
    for index, value in enumerate(values):
        if value != values[0]:
            raise ArgumentError(
                f"{op}: {name}: models of one launch have it in common, got {values[0]!r} for model 0 and {value!r} "
                f"for model {index}; bind them apart"
            )


def _check_layers(op: str, layers: Sequence[ResidentLayer], loss: LossSpec) -> None:
    for index, (below, above) in enumerate(itertools.pairwise(layers)):
        if below.outputs != above.inputs:
            raise ArgumentError(
                f"{op}: layers[{index + 1}]: expected {below.outputs} inputs, as layers[{index}] has outputs, got "
                f"{above.inputs}"
            )
    last = layers[-1]
    if last.dropout is not None:
        raise ArgumentError(f"{op}: layers[{len(layers) - 1}].dropout: the output layer has none, got {last.dropout}")
    if loss.kind == "cross_entropy" and last.activation != "identity":
        raise ArgumentError(
            f"activation: cross_entropy takes logits, so it must be 'identity', got {last.activation!r}"
        )


def check_steps(op: str, steps: Sequence[int], models: int) -> None:
    """Raises ArgumentError where the steps are not those of every model."""
    if len(steps) != models:
        raise ArgumentError(f"{op}: expected the steps of each of {models} models, got {len(steps)} numbers")
