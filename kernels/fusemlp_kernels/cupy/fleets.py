"""Binding the calls of many whole steps: ``train_fleet``, and ``train_resident`` as a fleet of one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fusemlp_kernels.alike import check_alike, check_steps
from fusemlp_kernels.contract import (
    COUNTERS,
    HYPER,
    RATE_COLUMNS,
    STATS,
    LossSpec,
    ResidentLayer,
    Ridge,
    Segment,
    UpdateRule,
)
from fusemlp_kernels.cupy.device import FLOAT32, FLOAT64, INT64, Array, Device
from fusemlp_kernels.cupy.models import MOST_MODELS
from fusemlp_kernels.cupy.steps import Step
from fusemlp_kernels.errors import ArgumentError


def bind_train_fleet(
    device: Device,
    *,
    x: Array,
    target: Array,
    rows: Array,
    batch: int,
    layers: Sequence[Sequence[ResidentLayer]],
    params: Array,
    gradients: Array,
    states: Sequence[Array],
    segments: Sequence[Sequence[Segment]],
    rules: Sequence[UpdateRule],
    losses: Sequence[LossSpec],
    counters: Array,
    hyper: Array,
    rates: Array,
    stats: Array,
    weight: Array | None = None,
    class_weight: Array | None = None,
    shadow: Array | None = None,
    history: Array | None = None,
    ridges: Sequence[Ridge] | None = None,
    op: str = "train_fleet",
) -> Callable[[Sequence[int]], object]:
    """The contract's ``train_fleet``, in float32."""
    check_alike(op, layers, segments, rules, losses, ridges)
    models = len(layers)
    if device.compute != FLOAT32 or shadow is not None:
        raise ArgumentError(
            f"{op}: shadow: the cupy backend trains fleets in fp32 and tf32, whose products read the parameters "
            "themselves; open the backend with one of these"
        )
    if models > MOST_MODELS:
        raise ArgumentError(f"{op}: layers: {models} models are more than the {MOST_MODELS} of one launch; bind apart")
    inputs, outputs = layers[0][0].inputs, layers[0][-1].outputs
    classes = losses[0].kind == "cross_entropy" and not losses[0].soft
    x = device.check(op, "x", x, (None, inputs), FLOAT32)
    length = len(x)
    wanted = (length,) if classes else (length, outputs)
    target = device.check(op, "target", target, wanted, INT64 if classes else FLOAT32)
    if weight is not None:
        weight = device.check(op, "weight", weight, (length,), FLOAT32)
    if class_weight is not None:
        class_weight = device.check(op, "class_weight", class_weight, (outputs,), FLOAT32)
    if len(states) != rules[0].state_count:
        raise ArgumentError(
            f"{op}: states: {rules[0].kind} keeps {rules[0].state_count} arrays of state, got {len(states)}"
        )
    rows = device.check(op, "rows", rows, (models, None), INT64)
    params = device.check_written(op, "params", params, (models, None), FLOAT32)
    given = {"rows": rows, "params": params}
    arenas = [("gradients", gradients), *((f"states[{index}]", state) for index, state in enumerate(states))]
    for name, array in arenas:
        given[name] = device.check_written(op, name, array, tuple(params.shape), FLOAT32)
    given["counters"] = device.check_written(op, "counters", counters, (models, COUNTERS), INT64)
    given["hyper"] = device.check_written(op, "hyper", hyper, (models, HYPER), FLOAT64)
    given["rates"] = device.check(op, "rates", rates, (models, None, RATE_COLUMNS), FLOAT64)
    given["stats"] = device.check_written(op, "stats", stats, (models, STATS), FLOAT64)
    if history is not None:
        given["history"] = device.check_written(op, "history", history, (models, None, STATS), FLOAT64)
    for name, array in given.items():
        if not array.flags.c_contiguous:
            raise ArgumentError(
                f"{op}: {name}: expected a contiguous array with the axis of models in front, got shape "
                f"{tuple(array.shape)}, strides of {array.strides} bytes"
            )
    step = Step(device, batch, layers, segments, rules, losses, given, ridges or [Ridge()] * models)
    launches = step.launches(x, target, weight, class_weight)

    def run(steps: Sequence[int]) -> None:
        check_steps(op, steps, models)
        left = np.array(steps, np.int64)
        while (left > 0).any():
            live = np.flatnonzero(left > 0)
            count = int(left[live].min())
            launches.run(live.tolist(), count)
            left[live] -= count

    return run


def bind_train_resident(
    device: Device,
    *,
    rows: Array,
    layers: Sequence[ResidentLayer],
    params: Array,
    gradients: Array,
    states: Sequence[Array],
    segments: Sequence[Segment],
    rule: UpdateRule,
    loss: LossSpec,
    counters: Array,
    hyper: Array,
    rates: Array,
    stats: Array,
    shadow: Array | None = None,
    history: Array | None = None,
    ridge: Ridge | None = None,
    **operands: Any,
) -> Callable[[int], object]:
    """The contract's ``train_resident``: a fleet of one."""
    op = "train_resident"

    def stacked(array: Array | None) -> Array | None:
        return None if array is None else array.reshape(1, *array.shape)

    run = bind_train_fleet(
        device, rows=stacked(rows), layers=[layers], params=stacked(params), gradients=stacked(gradients),
        states=[stacked(state) for state in states], segments=[segments], rules=[rule], losses=[loss],
        counters=stacked(counters), hyper=stacked(hyper), rates=stacked(rates), stats=stacked(stats),
        shadow=stacked(shadow),
        history=stacked(history), ridges=None if ridge is None else [ridge], op=op, **operands,
    )  # fmt: skip
    return lambda steps: run((steps,))
