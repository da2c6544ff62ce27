"""The calls of the contract as rows of a table for the compiled loop: one call by itself, or those of a training step.

Every function enters the operands of an op and returns the number of rows in the batch, COUNTED where counters has it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fusemlp_kernels.binders import hands_on
from fusemlp_kernels.contract import (
    ACTIVATIONS,
    LOSSES,
    NEEDS_Z,
    Dropout,
    LossSpec,
    Noise,
    Ridge,
    Segment,
    UpdateRule,
)
from fusemlp_kernels.errors import ArgumentError, unknown_name
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.tables import Array, Table
from fusemlp_kernels.philox import seed_key, threshold

Operands = Mapping[str, Any]

# Below this many classes the exponentials of all rows are taken in one go: a row does not fill the vector registers.
WIDE = 64

# Columns of a tile of dot products, and what adding up the partial sums of one costs beside, in instructions.
DOTS, TREE = 4, 4


def _code(what: str, name: str, known: Sequence[str]) -> int:
    if name not in known:
        raise unknown_name(what, name, known)
    return known.index(name)


def activation_columns(
    table: Table, activation: str, slope: float, slope_param: Array | None, dslope: Array | None
) -> tuple[dict[str, Any], dict[int, float]]:
    """The columns and numbers of an activation."""
    code = _code("activation", activation, ACTIVATIONS)
    # the loop passes over the identity without a call
    table.names.update({activation.upper()} - {"IDENTITY"})
    return {"ACTIVATION": code, "SLOPE": slope_param, "DSLOPE": dslope}, {t.FIXED_SLOPE: float(slope)}


def dropout_columns(dropout: Dropout | None, keep: Array | None) -> tuple[dict[str, Any], dict[int, float]]:
    """The columns and numbers of dropout."""
    if dropout is None:
        return {}, {}
    assert keep is not None
    low, high = seed_key(dropout.seed)
    columns = {"KEEP": keep, "KEY_LOW": low, "KEY_HIGH": high, "MASK_LAYER": dropout.layer}
    return columns | {"THRESHOLD": threshold(dropout.rate)}, {t.RATE: dropout.rate}


def row_columns(rows: Array | None, count: int) -> dict[str, Any]:
    """The columns of row numbers: those given, of which the counters know the first, or all in order."""
    return {"ROWS": np.arange(count) if rows is None else rows, "WALKS": rows is not None}


def _gathered(table: Table, x: Array, rows: Array | None, gathered: Array | None, count: int) -> Array:
    """The batch, with the row that gathers it where it is picked by row number."""
    if rows is None:
        return x
    assert gathered is not None
    table.add("GATHER", X=x, OUT=gathered, K=x.shape[1], **row_columns(rows, count))
    return gathered


def _in_dots(w: Array) -> bool:
    """True where dot products take fewer instructions than panels, whose last vector has few columns then."""
    outputs, inputs = len(w), int(w.shape[1])
    # the same on processors with narrower registers, and so the bits
    lanes = 64 // w.itemsize
    sums = -(-outputs // DOTS) * DOTS
    return bool(-(-outputs // lanes) * inputs > sums * (-(-inputs // lanes) + TREE))


def _affine(table: Table, x: Array, w: Array, b: Array, z: Array) -> None:
    """The pre-activation of a layer."""
    table.height = max(table.height, len(z))
    weights = {"W": w} if _in_dots(w) else {"PANELS": table.in_panels(w)}
    table.add("AFFINE", N=len(w), K=w.shape[1], X=x, B=b, Z=z, **weights)


def _linear(
    table: Table,
    *,
    x: Array,
    w: Array,
    b: Array,
    y: Array,
    activation: str,
    slope: float = 0.0,
    slope_param: Array | None = None,
    z: Array | None = None,
    rows: Array | None = None,
    gathered: Array | None = None,
    dropout: Dropout | None = None,
    counters: Array | None = None,
    keep: Array | None = None,
) -> int:
    columns, numbers = activation_columns(table, activation, slope, slope_param, None)
    dropped, rates = dropout_columns(dropout, keep)
    if activation not in NEEDS_Z:
        z = y
    elif z is None:
        z = table.scratch(*y.shape)
    x = _gathered(table, x, rows, gathered, len(y))
    _affine(table, x, w, b, z)
    if activation != "identity" or dropout is not None:
        table.add("ACTIVATE", numbers | rates, N=len(w), Y=y, Z=z, **columns, **dropped)
    table.control(counters)
    return len(y)


def loss_grad(
    table: Table,
    fresh: bool = False,
    *,
    z: Array,
    dz: Array | None,
    target: Array,
    counters: Array,
    loss: LossSpec,
    stats: Array | None = None,
    activation: str = "identity",
    slope: float = 0.0,
    slope_param: Array | None = None,
    dslope: Array | None = None,
    weight: Array | None = None,
    class_weight: Array | None = None,
    rows: Array | None = None,
    target_rows: Array | None = None,
    weight_rows: Array | None = None,
    ridge: Ridge | None = None,
    shares: Array | None = None,
) -> int:
    """``fresh``: z is neither dz nor read later."""
    # targets and weights are read through the rows, and the shares stay in a register
    del target_rows, weight_rows, shares
    kind = _code("loss: kind", loss.kind, LOSSES)
    entropy = loss.kind == "cross_entropy"
    if entropy and activation != "identity":
        raise ArgumentError(f"activation: cross_entropy takes logits, so it must be 'identity', got {activation!r}")
    table.control(counters, stats)
    count, outputs = z.shape
    table.height = max(table.height, count)
    columns, numbers = activation_columns(table, activation, slope, slope_param, dslope)
    y = z
    if not entropy:
        if not fresh:
            # dz is written before z has been read
            own = table.scratch(count, outputs)
            table.add("GATHER", X=z, OUT=own, K=outputs, **row_columns(None, count))
            y = z = own
        if activation in NEEDS_Z:
            y = table.scratch(count, outputs)
        if activation != "identity":
            table.add("ACTIVATE", numbers, N=outputs, Y=y, Z=z, **columns)
    table.names.update([loss.kind.upper()], ["BY_ITSELF"] if loss.reduction == "rows" else [])
    divisor = (1.0 if entropy else float(outputs)) if ridge is None or ridge.divisor is None else ridge.divisor
    numbers |= {t.SMOOTHING: loss.label_smoothing, t.OPTION: loss.option, t.DIVISOR: divisor}
    smoothed, ignores = loss.soft or loss.label_smoothing != 0.0, loss.ignore_index is not None
    table.add(
        "ENTROPY" if entropy else "ELEMENTWISE", numbers, N=outputs, Y=y, Z=z,
        DZ=table.scratch(count, outputs) if dz is None else dz, KIND=kind, MEAN=t.REDUCTIONS.index(loss.reduction),
        SOFT=loss.soft, SMOOTHED=smoothed, IGNORES=ignores, IGNORED=loss.ignore_index, ACCURACY=loss.accuracy,
        WIDE=outputs >= WIDE, RECORDED=stats, TARGET=target, WEIGHTED=weight,
        CLASS_WEIGHTED=class_weight, **columns, **row_columns(rows, count),
    )  # fmt: skip
    if dz is not None:
        table.add("PADDING", N=outputs, K=count, DZ=dz)
    return t.COUNTED


@hands_on(loss_grad)
def _linear_loss_grad(
    table: Table,
    *,
    x: Array,
    w: Array,
    b: Array,
    dz: Array | None,
    x_rows: Array | None = None,
    gathered: Array | None = None,
    **loss_operands: Any,
) -> int:
    count = len(x) if x_rows is None or gathered is None else len(gathered)
    x = _gathered(table, x, x_rows, gathered, count)
    z = table.scratch(count, len(w))
    _affine(table, x, w, b, z)
    return loss_grad(table, True, z=z, dz=dz, **loss_operands)


def _grad_input(
    table: Table,
    *,
    dz: Array,
    w: Array,
    y: Array,
    dz_prev: Array,
    activation: str,
    slope: float = 0.0,
    slope_param: Array | None = None,
    z: Array | None = None,
    dslope: Array | None = None,
    dropout: Dropout | None = None,
    counters: Array | None = None,
    keep: Array | None = None,
) -> int:
    columns, numbers = activation_columns(table, activation, slope, slope_param, dslope)
    dropped, rates = dropout_columns(dropout, keep)
    table.height = max(table.height, len(dz_prev))
    table.add(
        "BACKWARD", numbers | rates, N=len(w), K=w.shape[1], DZ=dz, W=w, Y=y, Z=y if z is None else z, OUT=dz_prev,
        **columns, **dropped,
    )  # fmt: skip
    table.control(counters)
    return len(dz_prev)


def _input(layer: Operands) -> Array:
    """A layer's input: ``linear`` has gathered what is read by row number."""
    found: Array = layer["x"] if layer.get("rows") is None else layer["gathered"]
    return found


def _clip_examples(table: Table, *, layers: Sequence[Operands], clip: float, counters: Array) -> int:
    norms = table.scratch(_batch(layers), dtype=np.float64)
    for index, layer in enumerate(layers):
        x, dz = _input(layer), layer["dz"]
        inputs = x.shape[1] if layer["w_trained"] else 0
        table.height = max(table.height, len(dz))
        table.add(
            "SQUARES", N=dz.shape[1], K=inputs, X=x, DZ=dz, B=layer["b_trained"], OUT=norms, AFRESH=index == 0
        )  # fmt: skip
    for layer in layers:
        table.add("SHRINK", {t.LARGEST: clip}, N=layer["dz"].shape[1], DZ=layer["dz"], OUT=norms)
    table.control(counters)
    return t.COUNTED


def _gradients(
    table: Table, layer: Operands, w: Mapping[str, Any] | None, b: Mapping[str, Any] | None
) -> None:  # fmt: skip
    """The gradients by a layer's weights and bias, w and b being what else their rows have; None is left out."""
    x, dz = _input(layer), layer["dz"]
    table.height = max(table.height, len(dz))
    if w is not None:
        table.add("WEIGHT", N=dz.shape[1], K=x.shape[1], X=x, DZ=dz, **w)
    if b is not None:
        table.add("BIAS", N=dz.shape[1], DZ=dz, SUMS=table.scratch(dz.shape[1]), **b)


def _slope(table: Table, slope: Operands, columns: Mapping[str, Any]) -> None:
    table.add("SLOPES", N=1, DZ=slope["dslope"], SUMS=table.scratch(1), **columns)


def _batch(layers: Sequence[Operands]) -> int:
    return max((len(layer["dz"]) for layer in layers), default=0)


def _grad_weight(
    table: Table, *, layers: Sequence[Operands], rule: UpdateRule, counters: Array, slopes: Sequence[Operands] = ()
) -> int:
    for layer in layers:
        _gradients(table, layer, *(None if layer[name] is None else {"OUT": layer[name]} for name in ("dw", "db")))
    for slope in slopes:
        _slope(table, slope, {"OUT": slope["grad"]})
    table.accumulate(rule, counters)
    return _batch(layers)


def _grad_weight_update(
    table: Table,
    *,
    layers: Sequence[Operands],
    rule: UpdateRule,
    hyper: Array,
    rates: Array,
    counters: Array,
    slopes: Sequence[Operands] = (),
) -> int:
    if rule.clip_norm is not None or rule.accumulate != 1:
        raise ArgumentError(
            "rule: clipping and accumulation need the gradients of the whole network: use grad_weight and update"
        )

    def updated(owner: Operands, name: str, own: str = "") -> dict[str, Any] | None:
        """The columns of a parameter that is updated with its gradient."""
        param = owner[name]
        if param is None:
            return None
        columns = {"FIRST": table.tensor(owner[f"{own}rule"], 0, param.size), "W": param}
        columns["PANELS"] = table.panels_of(param)
        if rule.code == t.SGD and not rule.ema and _batch(layers) <= t.DEPTH:
            # with nothing else to do with the gradient the product lands in the parameter
            return columns | {"OUT": param, "DESCENDS": True}
        return columns | {"OUT": table.scratch(*param.shape), **_updated(rule, param, owner[f"{own}state"])}

    for layer in layers:
        _gradients(table, layer, updated(layer, "w", "w_"), updated(layer, "b", "b_"))
    for slope in slopes:
        columns = updated(slope, "param")
        assert columns is not None
        _slope(table, slope, columns)
    _advance(table, rule=rule, hyper=hyper, rates=rates, counters=counters)
    return _batch(layers)


def _updated(rule: UpdateRule, param: Array, states: Sequence[Array]) -> dict[str, Any]:
    """The columns of what an update writes."""
    one, two, average = rule.places(states, param)
    return {"PARAM": param, "STATE0": one, "STATE1": two, **({"AVERAGE": average} if rule.ema else {})}


def _update(
    table: Table,
    *,
    params: Array,
    grads: Array,
    states: Sequence[Array],
    segments: Sequence[Segment],
    rule: UpdateRule,
    hyper: Array,
    rates: Array,
    counters: Array,
    noise: Noise | None = None,
    rows: Array | None = None,
) -> int:
    if noise is not None:
        noise.check(rule)
        if any(segment.columns != segment.pitch for segment in segments):
            raise ArgumentError("segments: the numpy backend adds noise to matrices without gaps between their rows")
        table.noise(noise, rows)
    table.add_later()
    tensors = [table.tensor(segment.rule, segment.offset, segment.size) for segment in segments]
    columns = _updated(rule, params, states)
    at_once = rule.clip_norm is None and rule.accumulate == 1
    if not (at_once and _with_gradients(table, grads, columns, segments, tensors)):
        if rule.clip_norm is not None:
            table.add("NORM", N=params.size, DZ=grads, **_range(tensors))
        table.add("UPDATE", N=params.size, DZ=grads, **_range(tensors), **columns)
    return _advance(table, rule=rule, hyper=hyper, rates=rates, counters=counters)


def _range(tensors: Sequence[int]) -> dict[str, int]:
    """The columns of tensors that follow one another."""
    return {"FIRST": tensors[0], "END": tensors[-1] + 1} if tensors else {}


def _with_gradients(
    table: Table, grads: Array, arenas: Mapping[str, Array], segments: Sequence[Segment], tensors: Sequence[int]
) -> bool:
    """Update each tensor where its gradient is computed; False if not all gradients are."""
    found = [table.gradient_at(grads, segment.offset, segment.size) for segment in segments]
    rows = [row for row in found if row is not None]
    if len(rows) < len(segments):
        return False
    for row, segment, tensor in zip(rows, segments, tensors, strict=True):
        shifted = {name: (arena, segment.offset) for name, arena in arenas.items()}
        panels = table.panels_of(arenas["PARAM"], segment.offset)
        table.amend(row, FIRST=tensor, W=shifted["PARAM"], PANELS=panels, **shifted)
    return True


def penalty(
    table: Table, *, layers: Sequence[Operands], ridge: Ridge, shares: Array, counters: Array, stats: Array
) -> int:
    del shares, counters, stats
    for layer in layers:
        # the row of this gradient adds it
        row = table.gradient_at(layer["dw"], 0, layer["dw"].size)
        assert row is not None
        table.amend(row, {t.STRENGTH: ridge.strength}, W=layer["w"], PULLS=True)
    return t.COUNTED


def _advance(table: Table, *, rule: UpdateRule, hyper: Array, rates: Array, counters: Array) -> int:
    table.clock(rule, hyper, rates, counters)
    table.add("CLOCK")
    return 0


ENTRIES: dict[str, Callable[..., int]] = {
    "linear": _linear,
    "loss_grad": loss_grad,
    "linear_loss_grad": _linear_loss_grad,
    "grad_input": _grad_input,
    "clip_examples": _clip_examples,
    "grad_weight": _grad_weight,
    "grad_weight_update": _grad_weight_update,
    "update": _update,
    "advance": _advance,
}
