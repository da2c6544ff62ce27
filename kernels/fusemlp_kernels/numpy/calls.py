"""The calls of the contract as rows of a table for the compiled loop: one call by itself, or those of a training step.

Every function enters the operands of an op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from fusemlp_kernels import contract as c
from fusemlp_kernels.contract import ACTIVATIONS, DISTRIBUTIONS, LOSSES, NEEDS_Z, Segment, TensorRule, UpdateRule
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.launches import OPTIMIZER_NAMES
from fusemlp_kernels.numpy.plan import MOST_TASKS
from fusemlp_kernels.numpy.tables import Array, CallTable
from fusemlp_kernels.ops import OPS
from fusemlp_kernels.philox import seed_key, threshold
from fusemlp_kernels.pointwise import HYPERPARAMETERS

Enter = Callable[[CallTable, SimpleNamespace], None]
ENTRIES: dict[str, Enter] = {}
Fields = Mapping[str, Any]

# Below this many classes the exponentials of all rows are taken in one go: a row does not fill the vector registers.
WIDE = 64

# Columns of a tile of dot products, and what adding up the partial sums of one costs beside, in instructions.
DOTS, TREE = 4, 4
# Operands that other backends alone have.
ELSEWHERE = {
    "loss_grad": ("hyper",),
    "linear_loss_grad": ("hyper",),
    "own_loss": ("hyper",),
    "grad_weight": ("norm", "parts", "part"),
    "update": ("norm", "shadow", "scaled", "parts", "part"),
}


def enters(op: str) -> Callable[[Enter], Enter]:
    """Decorate the function that enters the operands of ``op``, by their names and checked by none."""

    def decorate(enter: Enter) -> Enter:
        vars(enter)["operands"] = {operand.name for operand in OPS[op].operands} - {*ELSEWHERE.get(op, ())}
        ENTRIES[op] = enter
        return enter

    return decorate


def activation(table: CallTable, call: SimpleNamespace) -> dict[str, Any]:
    """The fields of an activation."""
    # the loop passes over the identity without a call
    table.names.update({call.activation.upper()} - {"IDENTITY"})
    slope_param, dslope = (vars(call).get(name) for name in ("slope_param", "dslope"))
    code = ACTIVATIONS.index(call.activation)
    return {"activation": code, "fixed_slope": float(call.slope), "slope": slope_param, "dslope": dslope}


def dropout(call: SimpleNamespace) -> dict[str, Any]:
    """The fields of dropout."""
    if call.dropout is None:
        return {}
    assert call.keep is not None
    low, high = seed_key(call.dropout.seed)
    return {
        "keep": call.keep, "key_low": low, "key_high": high, "mask_layer": call.dropout.layer,
        "threshold": threshold(call.dropout.rate), "rate": call.dropout.rate,
    }  # fmt: skip


def row_numbers(rows: Array | None, count: int) -> dict[str, Any]:
    """The fields of row numbers: those given, of which the counters know the first, or all in order."""
    return {"rows": np.arange(count) if rows is None else rows, "walks": rows is not None}


def _gathered(table: CallTable, x: Array, rows: Array | None, gathered: Array | None, count: int) -> Array:
    """The batch, with the row that gathers it where it is picked by row number."""
    if rows is None:
        return x
    assert gathered is not None
    table.add("GATHER", x=x, out=gathered, k=x.shape[1], **row_numbers(rows, count))
    return gathered


def _in_dots(w: Array) -> bool:
    """True where dot products take fewer instructions than panels, whose last vector has few columns then."""
    outputs, inputs = len(w), int(w.shape[1])
    # the same on processors with narrower registers, and so the bits
    lanes = 64 // w.itemsize
    sums = -(-outputs // DOTS) * DOTS
    return bool(-(-outputs // lanes) * inputs > sums * (-(-inputs // lanes) + TREE))


def _affine(table: CallTable, x: Array, w: Array, b: Array, z: Array) -> None:
    """The pre-activation of a layer."""
    weights = {"w": w} if table.cut.dots and _in_dots(w) else {"panels": table.in_panels(w)}
    table.add("AFFINE", n=len(w), k=w.shape[1], x=x, b=b, z=z, **weights)


@enters("linear")
def _linear(table: CallTable, call: SimpleNamespace) -> None:
    y, w = call.y, call.w
    z = y if call.activation not in NEEDS_Z else table.scratch(*y.shape) if call.z is None else call.z
    activated, dropped = activation(table, call), dropout(call)
    x = _gathered(table, call.x, call.rows, call.gathered, len(y))
    if call.coding is None:
        _affine(table, x, w, call.b, z)
    else:
        coding, shape = call.coding, {"n": z.shape[1], "k": call.coding.slots}
        sums, mixed = _sums_of_members(table, w, call) if call.r is not None else (table.in_panels(w, coding), {})
        table.add("COLUMNS", x=x, b=call.b, z=z, panels=sums, coding=coding, **shape, **mixed)
    if call.activation != "identity" or dropped:
        table.add("ACTIVATE", n=y.shape[1], y=y, z=z, **activated, **dropped)


def _sums_of_members(table: CallTable, w: Array, call: SimpleNamespace) -> tuple[Array, dict[str, Any]]:
    """Memory for the sums of each member, which every step fills anew, and the fields of members."""
    mixed = {"members": _of_members(table, call.r), "by_r": call.r}
    sums = table.scratch(mixed["members"] * call.coding.sums, w.shape[1])
    table.add("SUMS", n=len(w), k=w.shape[1], w=w, panels=sums, coding=call.coding, **mixed)
    return sums, mixed


@enters("loss_grad")
def _loss_grad(table: CallTable, call: SimpleNamespace) -> None:
    _loss_of(table, call, call.z, fresh=False)


@enters("linear_loss_grad")
def _linear_loss_grad(table: CallTable, call: SimpleNamespace) -> None:
    x, w, gathered = call.x, call.w, call.gathered
    count = len(x) if call.x_rows is None or gathered is None else len(gathered)
    x, z = _gathered(table, x, call.x_rows, gathered, count), table.scratch(count, len(w))
    _affine(table, x, w, call.b, z)
    _loss_of(table, call, z, fresh=True)


def _loss_of(table: CallTable, call: SimpleNamespace, z: Array, *, fresh: bool) -> None:
    """The loss and dz of pre-activations z; ``fresh``: z is neither dz nor read later.

    Targets and weights are read through the rows.
    """
    loss, dz, entropy = call.loss, call.dz, call.loss.kind == "cross_entropy"
    count, outputs = z.shape
    activated = activation(table, call)
    y = z
    if not entropy:
        if not fresh:
            # dz is written before z has been read
            y = table.scratch(count, outputs)
            table.add("GATHER", x=z, out=y, k=outputs, **row_numbers(None, count))
            z = y
        if call.activation in NEEDS_Z:
            y = table.scratch(count, outputs)
        if call.activation != "identity":
            table.add("ACTIVATE", n=outputs, y=y, z=z, **activated)
    table.names.update([loss.kind.upper()], ["BY_ITSELF"] if loss.reduction == "rows" else [])
    divisor = call.ridge.divisor if call.ridge is not None else None
    if divisor is None:
        # targets are counted one by one where some are missing
        divisor = 1.0 if loss.missing else float(loss.summands(outputs))
    packed, rowwise = loss.missing or loss.kind == "gaussian", {}
    if packed:
        targets = outputs // loss.width
        rowwise = {"out": table.scratch(count, 3 * targets), "k": targets, "packed": True, "missing": loss.missing}
    elif loss.kind == "quantiles":
        table.names |= {"SOFTPLUS", "SIGMOID"}
        levels = np.array(loss.quantiles, table.real)
        middle = int(np.argmin(abs(np.array(loss.quantiles) - 0.5)))
        rowwise = {"out": table.scratch(count, outputs), "b": levels, "k": middle}
    table.add(
        "ENTROPY" if entropy else "ELEMENTWISE", n=outputs, y=y, z=z,
        dz=table.scratch(count, outputs) if dz is None else dz, loss=(*LOSSES, *DISTRIBUTIONS).index(loss.kind),
        mean=t.REDUCTIONS.index(loss.reduction), soft=loss.soft, smoothed=loss.soft or loss.label_smoothing != 0.0,
        smoothing=loss.label_smoothing,
        option=loss.option, divisor=divisor, ignores=loss.ignore_index is not None, ignored=loss.ignore_index,
        accuracy=loss.accuracy, wide=outputs >= WIDE, recorded=call.stats, target=call.target, weighted=call.weight,
        class_weighted=call.class_weight, **activated, **rowwise, **row_numbers(call.rows, count),
    )  # fmt: skip
    if dz is not None:
        table.add("PADDING", n=outputs, k=count, dz=dz)


@enters("own_loss")
def _own_loss(table: CallTable, call: SimpleNamespace) -> None:
    y, dy, rows, target, weight = call.y, call.dy, call.rows, call.target, call.weight
    counters, function, shard = call.counters.data, call.function, table.shard
    # steps of an attack do not count
    stats = np.zeros(c.STATS) if call.stats is None else call.stats.data
    every, most = np.arange(len(y)) if rows is None else rows, len(y)
    # names of a module take a tenth of a microsecond in each step
    row_count, row_offset = c.ROW_COUNT, c.ROW_OFFSET
    last_loss, loss_sum, norm_sum, batch_losses = c.LAST_LOSS, c.LOSS_SUM, c.NORM_SUM, c.BATCH_LOSSES

    def between() -> None:
        count = counters[row_count] - shard
        count = 0 if count < 0 else most if count > most else count
        first = 0 if rows is None else counters[row_offset] + shard
        picked = every[first : first + count]
        shares = None if weight is None else weight.take(picked)
        loss, dy[:count], normaliser = function(y[:count], target.take(picked, 0), shares)
        stats[last_loss] = loss
        stats[loss_sum] += loss * normaliser
        stats[norm_sum] += normaliser
        stats[batch_losses] += loss * count

    table.between.append(between)
    table.add("PAUSE")
    table.add("PADDING", n=dy.shape[1], k=len(dy), dz=dy)


@enters("grad_input")
def _grad_input(table: CallTable, call: SimpleNamespace) -> None:
    out, w, y = call.dz_prev, call.w, call.y
    table.add(
        "BACKWARD", n=len(w), k=w.shape[1], dz=call.dz, w=w, y=y, z=y if call.z is None else call.z, out=out,
        **activation(table, call), **dropout(call),
    )  # fmt: skip


def _input(layer: SimpleNamespace) -> Array:
    """A layer's input: ``linear`` has gathered what is read by row number."""
    x: Array = layer.x if layer.rows is None else layer.gathered
    return x


@enters("clip_examples")
def _clip_examples(table: CallTable, call: SimpleNamespace) -> None:
    norms = table.scratch(_batch(call.layers), dtype=np.float64)
    for index, layer in enumerate(call.layers):
        x, dz = _input(layer), layer.dz
        inputs = x.shape[1] if layer.w_trained else 0
        table.add("SQUARES", n=dz.shape[1], k=inputs, x=x, dz=dz, b=layer.b_trained, out=norms, afresh=index == 0)
    for layer in call.layers:
        table.add("SHRINK", n=layer.dz.shape[1], dz=layer.dz, out=norms, largest=call.clip)


@enters("perturb")
def _perturb(table: CallTable, call: SimpleNamespace) -> None:
    change, out = call.change, call.adv if call.start is None else call.start
    count, columns = out.shape
    drawn = call.start is not None and change.seed is not None
    low, high = seed_key(change.seed or 0)
    table.lanes = max(table.lanes, drawn * -(-columns // 4))
    table.add(
        "PERTURB", n=columns, k=columns, x=call.x, dz=call.dx, out=out, round=change.norm == "2", drawn=drawn,
        key_low=low, key_high=high, largest=change.eps, length=change.step, low=change.low, high=change.high,
        **row_numbers(call.rows, count),
    )  # fmt: skip


def _gradients(table: CallTable, layer: SimpleNamespace, w: Fields | None, b: Fields | None) -> None:
    """The gradients by a layer's weights and bias, w and b being what else their rows have; None is left out."""
    x, dz, factors = _input(layer), layer.dz, vars(layer).get("r")
    if layer.coding is None and w is not None:
        table.add("WEIGHT", n=dz.shape[1], k=x.shape[1], x=x, dz=dz, **w)
    elif w is not None or factors is not None:
        inputs, units = layer.coding.inputs, dz.shape[1]
        fields = {"out": table.scratch(inputs, units)} if w is None else dict(w)
        if factors is not None:
            sums = table.scratch(*factors.shape)
            fields |= {"members": _of_members(table, factors), "by_r": factors, "sum_r": sums, "w": layer.w}
            if layer.dr is not None:
                by_factor = {"n": sums.size, "dz": sums, "sums": table.scratch(sums.size), "out": layer.dr}
                table.later.append({"kind": "FACTORS", **by_factor})
        table.add("CODES", n=inputs, k=units, x=x, dz=dz, coding=layer.coding, **fields)
    if b is not None:
        table.add("BIAS", n=dz.shape[1], dz=dz, sums=table.scratch(dz.shape[1]), **b)


def _slope(table: CallTable, slope: SimpleNamespace, fields: Fields) -> None:
    table.add("SLOPES", n=1, dz=slope.dslope, sums=table.scratch(1), **fields)


def _batch(layers: Sequence[SimpleNamespace]) -> int:
    return max((len(layer.dz) for layer in layers), default=0)


@enters("grad_weight")
def _grad_weight(table: CallTable, call: SimpleNamespace) -> None:
    for layer in call.layers:
        _gradients(table, layer, *(None if out is None else {"out": out} for out in (layer.dw, layer.db)))
    for slope in call.slopes:
        _slope(table, slope, {"out": slope.grad})


@enters("grad_weight_update")
def _grad_weight_update(table: CallTable, call: SimpleNamespace) -> None:
    rule = call.rule
    # with nothing else to do with the gradient the product lands in the parameter
    descends = rule.code == t.SGD and not rule.ema and _batch(call.layers) <= t.DEPTH
    descends = descends and all(layer.coding is None for layer in call.layers)

    def updated(param: Array | None, tensor: TensorRule, states: Sequence[Array]) -> Fields | None:
        """The fields of a parameter that is updated with its gradient."""
        if param is None:
            return None
        fields = {"first": table.tensor(tensor, 0, param.size), "w": param, "panels": table.panels_of(param)}
        if descends:
            return fields | {"out": param, "descends": True}
        return fields | {"out": table.scratch(*param.shape), **_updated(rule, param, states)}

    for layer in call.layers:
        w, b = updated(layer.w, layer.w_rule, layer.w_state), updated(layer.b, layer.b_rule, layer.b_state)
        _gradients(table, layer, w, b)
    for slope in call.slopes:
        fields = updated(slope.param, slope.rule, slope.state)
        assert fields is not None
        _slope(table, slope, fields)
    _advance(table, call)


def _updated(rule: UpdateRule, param: Array, states: Sequence[Array]) -> dict[str, Any]:
    """The fields of what an update writes."""
    first, second, average = rule.places(states, param)
    return {"param": param, "state0": first, "state1": second, **({"average": average} if rule.ema else {})}


@enters("update")
def _update(table: CallTable, call: SimpleNamespace) -> None:
    params, grads, segments, rule = call.params, call.grads, call.segments, call.rule
    if call.noise is not None:
        if any(segment.columns != segment.pitch for segment in segments):
            raise ArgumentError("segments: the numpy backend adds noise to matrices without gaps between their rows")
        low, high = seed_key(call.noise.seed)
        # without rows the batch is a whole one, whatever its length
        noisy = np.zeros(1, np.int64) if call.rows is None else call.rows
        deviation, divisor = call.noise.deviation, call.noise.divisor
        table.fill(noisy=noisy, noise_low=low, noise_high=high, deviation=deviation, shared_by=divisor)
    table.add_later()
    tensors = [table.tensor(segment.rule, segment.offset, segment.size) for segment in segments]
    fields = _updated(rule, params, call.states)
    if not (rule.fuses and _with_gradients(table, grads, fields, segments, tensors)):
        if rule.clip_norm is not None:
            table.add("NORM", n=params.size, dz=grads, **_range(tensors))
        table.add("UPDATE", n=params.size, dz=grads, **_range(tensors), **fields)
    _advance(table, call)


def _range(tensors: Sequence[int]) -> dict[str, int]:
    """The fields of tensors that follow one another."""
    return {"first": tensors[0], "end": tensors[-1] + 1} if tensors else {}


def _with_gradients(
    table: CallTable, grads: Array, arenas: Mapping[str, Array], segments: Sequence[Segment], tensors: Sequence[int]
) -> bool:
    """Update each tensor where its gradient is computed; False if not all gradients are."""
    found = [table.gradient_at(grads, segment.offset, segment.size) for segment in segments]
    rows = [row for row in found if row is not None]
    if len(rows) < len(segments):
        return False
    for row, segment, tensor in zip(rows, segments, tensors, strict=True):
        shifted = {name: (arena, segment.offset) for name, arena in arenas.items()}
        panels = table.panels_of(arenas["param"], segment.offset)
        table.fill(row, first=tensor, w=shifted["param"], panels=panels, **shifted)
    return True


@enters("penalty")
def _penalty(table: CallTable, call: SimpleNamespace) -> None:
    for layer in call.layers:
        # the row of this gradient adds it
        row = table.gradient_at(layer.dw, 0, layer.dw.size)
        assert row is not None
        table.fill(row, strength=call.ridge.strength, w=layer.w, pulls=True)


@enters("advance")
def _advance(table: CallTable, call: SimpleNamespace) -> None:
    rule, code = call.rule, call.rule.code
    table.names.update(OPTIMIZER_NAMES[code : code + 1])
    table.fill(
        optimizer=code, decoupled=rule.decoupled, sklearn=rule.convention == "scikit-learn", hyper=call.hyper,
        rates=call.rates, clips=rule.clip_norm is not None, clip_norm=rule.clip_norm,
        **{name: getattr(rule, name) for name in HYPERPARAMETERS},
    )  # fmt: skip
    table.add("CLOCK")


def _of_members(table: CallTable, vectors: Array, outputs: int = 1) -> int:
    """The number of members; a task has as many rows of each."""
    table.members = len(vectors) // outputs
    return table.members


def _scaled(table: CallTable, call: SimpleNamespace, width: int) -> dict[str, Any]:
    """The fields of rows that are normalised or have factors, with memory for four rows of each task."""
    scratch = (table.scratch(4 * MOST_TASKS, width), 0)
    return {"n": width, "x": call.x, "b": call.b, "z": scratch, **activation(table, call), **dropout(call)}


def _of_factors(table: CallTable, call: SimpleNamespace, rows: int, width: int) -> dict[str, Any]:
    """The fields of what members do between products."""
    members = _of_members(table, call.r if call.s is None else call.s)
    numbers = row_numbers(call.rows, rows)
    return {**_scaled(table, call, width), **numbers, "members": members, "by_s": call.s, "by_r": call.r}


def _of_norm(table: CallTable, call: SimpleNamespace, width: int) -> dict[str, Any]:
    """The fields of a normalised row; its x is the shard's own, whose rows count from 0."""
    fields = {**_scaled(table, call, width), "rows": np.arange(-table.shard, len(call.x))}
    if call.eps is None:
        return fields
    b = table.scratch(width) if call.b is None else call.b
    return fields | {"norm": call.eps, "centred": call.centred, "by_s": call.g, "b": b}


def _sums_of_tasks(table: CallTable, width: int, **gradients: tuple[Array | None, Array | None]) -> dict[str, Any]:
    """The fields of the sums for factors, a row of each task, which later rows add up to the gradients."""
    fields: dict[str, Any] = {}
    for name, (factor, out) in gradients.items():
        if factor is not None:
            fields[name] = sums = (table.scratch(MOST_TASKS, width), 0)
            if out is not None:
                later = {"dz": sums, "sums": table.scratch(width), "out": (out, 0)}
                table.later.append({"kind": "BIAS", "n": width, "parts": True, **later})
    return fields


@enters("affine_members")
def _affine_members(table: CallTable, call: SimpleNamespace) -> None:
    table.add("SCALE", out=call.y, **_of_factors(table, call, *call.y.shape))


@enters("grad_affine_members")
def _grad_affine_members(table: CallTable, call: SimpleNamespace) -> None:
    width = call.dy.shape[1]
    fields = _of_factors(table, call, *call.dy.shape)
    fields |= _sums_of_tasks(
        table, table.members * width, sum_s=(call.s, call.ds), sum_b=(call.b, call.db), sum_r=(call.r, call.dr)
    )
    table.add("SCALE_BACKWARD", dz=call.dy, out=call.dx, **fields)


@enters("normalise")
def _normalise(table: CallTable, call: SimpleNamespace) -> None:
    table.add("SCALE", out=call.y, **_of_norm(table, call, call.y.shape[1]))


@enters("grad_normalise")
def _grad_normalise(table: CallTable, call: SimpleNamespace) -> None:
    width = call.dy.shape[1]
    fields = _of_norm(table, call, width)
    fields |= _sums_of_tasks(table, width, sum_s=(call.g, call.dg), sum_b=(fields["b"], call.db))
    table.add("SCALE_BACKWARD", dz=call.dy, out=call.dx, **fields)


@enters("add")
def _add(table: CallTable, call: SimpleNamespace) -> None:
    table.add("ADD", n=call.y.shape[1], x=call.a, y=call.b, out=call.y)


@enters("encode")
def _encode(table: CallTable, call: SimpleNamespace) -> None:
    out = call.y if call.dy is None else call.dx
    width = out.shape[1] if call.dy is None else call.dy.shape[1]
    scratch = None if call.dy is None else (table.scratch(MOST_TASKS, width), 0)
    table.add(
        "ENCODE", n=width, k=call.x.shape[1], x=call.x, dz=call.dy, out=out, z=scratch, octaves=call.octaves,
        **row_numbers(call.rows, len(out)),
    )  # fmt: skip


@enters("linear_members")
def _linear_members(table: CallTable, call: SimpleNamespace) -> None:
    outputs = call.z.shape[1]
    members = _of_members(table, call.w, outputs)
    panels = table.in_panels(call.w)
    table.add("HEADS", n=outputs, k=call.w.shape[1], members=members, x=call.x, panels=panels, b=call.b, z=call.z)


@enters("grad_input_members")
def _grad_input_members(table: CallTable, call: SimpleNamespace) -> None:
    outputs = call.dz.shape[1]
    members = _of_members(table, call.w, outputs)
    table.add("HEADS_BACKWARD", n=outputs, k=call.w.shape[1], members=members, dz=call.dz, w=call.w, out=call.dx)


@enters("grad_weight_members")
def _grad_weight_members(table: CallTable, call: SimpleNamespace) -> None:
    outputs = call.dz.shape[1]
    for kind, out, inputs in (("WEIGHT", call.dw, call.x.shape[1]), ("BIAS", call.db, 0)):
        if out is not None:
            members = _of_members(table, out, outputs)
            sums = table.scratch(len(out)) if kind == "BIAS" else None
            table.add(kind, n=len(out), k=inputs, members=members, x=call.x, dz=call.dz, out=out, sums=sums)


@enters("train_resident")
def _train_resident(table: CallTable, step: SimpleNamespace) -> None:
    calls, shards = step.calls, step.shards
    counted = ("linear_loss_grad", "loss_grad", "own_loss")
    counts = any(op in counted and operands.get("stats") is not None for op, operands in calls)
    if not counts or "rule" not in calls[-1][1]:
        raise ArgumentError(
            "train_resident: calls: expected those of a training step, with a loss and last what advances "
            f"the clock, got {', '.join(op for op, _ in calls)}"
        )
    if step.plan != "resident":
        raise ArgumentError(f"train_resident: plan: {step.plan!r} is Triton's alone; leave it out")
    table.shards = len(shards)
    table.fill(shard_rows=step.batch if shards else 0)
    for at, (op, operands) in enumerate(calls):
        table.shard = shards[at * len(shards) // len(calls)] if shards else 0
        ENTRIES[op](table, table.operands(op, operands))
