"""Binding the calls of many whole steps: ``train_resident`` and ``train_fleet``."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fusemlp_kernels.contract import (
    ACTIVATIONS,
    COUNTERS,
    HYPER,
    NEEDS_Z,
    RATE_COLUMNS,
    STATS,
    LossSpec,
    ResidentLayer,
    Ridge,
    Segment,
    UpdateRule,
)
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.triton import clock, configs, resident, resident_tables
from fusemlp_kernels.triton.launch import Device, Run, Tensor, is_aligned, signed
from fusemlp_kernels.triton.layers import dropout_numbers, loss_setting_values

INT64, FLOAT32, FLOAT64 = torch.int64, torch.float32, torch.float64
# Elements that the starts of values in the workspace are a multiple of: 256 bytes of the widest type.
ALIGNMENT = 128


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _check_common(
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
    _check_chain(op, layers[0], losses[0])


def _same(op: str, name: str, values: Sequence[Any]) -> None:
    for index, value in enumerate(values):
        if value != values[0]:
            raise ArgumentError(
                f"{op}: {name}: models of one launch have it in common, got {values[0]!r} for model 0 and {value!r} "
                f"for model {index}; bind them apart"
            )


def _check_chain(op: str, layers: Sequence[ResidentLayer], loss: LossSpec) -> None:
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


def _check_steps(op: str, steps: Sequence[int], models: int) -> None:
    """Raises ArgumentError where the steps are not those of every model."""
    if len(steps) != models:
        raise ArgumentError(f"{op}: expected the steps of each of {models} models, got {len(steps)} numbers")


def _check_layers(op: str, layers: Sequence[ResidentLayer], widest: int) -> None:
    """Places and widths that the kernel can do with."""
    for index, layer in enumerate(layers):
        if layer.w % 8:
            raise ArgumentError(f"{op}: layers[{index}].w: expected a multiple of 8 elements, got {layer.w}")
    if layers[-1].outputs > widest:
        raise ArgumentError(
            f"{op}: layers: {layers[-1].outputs} outputs are more than the {widest} that fit a tile; train such a "
            "network step by step"
        )


def _layer_table(
    layers: Sequence[ResidentLayer], segments: Sequence[Segment], x_at: int, x_row: int, batch: int
) -> tuple[list[list[int]], int, int]:
    """The rows of the layers, the elements of workspace a model, and the lowest layer with something to train."""
    task_at = {segment.offset: index for index, segment in enumerate(segments)}
    rows: list[list[int]] = []
    end, lowest = 0, len(layers)
    source, source_row = x_at, x_row
    for index, layer in enumerate(layers):
        pitch = _round_up(layer.outputs, 8)
        size = _round_up(batch * pitch, ALIGNMENT)
        y, dz = end, end + size
        end += 2 * size
        # what the derivative is read from
        z = y
        if layer.activation in NEEDS_Z:
            z = end
            end += size
        tasks = {
            "w_task": task_at.get(layer.w, -1), "b_task": task_at.get(layer.b, -1),
            "slope_task": -1 if layer.slope_at is None else task_at.get(layer.slope_at, -1),
        }  # fmt: skip
        if max(tasks.values()) >= 0:
            lowest = min(lowest, index)
        fields = {
            "N": layer.outputs, "K": layer.inputs, "x": source, "x_row": source_row, "w": layer.w,
            "w_row": _round_up(layer.inputs, 8), "b": layer.b, **tasks,
            "slope": -1 if layer.slope_at is None else layer.slope_at,
            "activation": ACTIVATIONS.index(layer.activation), "y": y, "z": z, "dz": dz, "pitch": pitch,
        }  # fmt: skip
        rows.append([fields[name] for name in resident_tables.LAYER_FIELDS])
        source, source_row = y, pitch
    return rows, end, lowest


def _model_tables(op: str, layers: Sequence[ResidentLayer]) -> tuple[list[list[int]], list[list[float]]]:
    """A model's rows of draws and shares."""
    draws, shares = [], []
    for layer in layers:
        numbers = dropout_numbers(layer.dropout)
        draws.append([int(numbers[name]) for name in resident_tables.DRAW_FIELDS])
        kept = 1.0 if layer.dropout is None else 1.0 - layer.dropout.rate
        slope = float(layer.slope)
        fields = {"keep_scale": numbers["keep_scale"], "kept_share": kept, "slope": slope}
        shares.append([float(fields[name]) for name in resident_tables.SHARE_FIELDS])
    return draws, shares


def _measures(ridge: Ridge, loss: LossSpec, outputs: int) -> list[float]:
    """A model's row of measures; those of a batch are written when there is one."""
    usual = 1.0 if loss.kind == "cross_entropy" else float(outputs)
    fields = {"ratio": 1.0 if ridge.divisor is None else ridge.divisor / usual, "strength": ridge.strength * usual}
    return [fields.get(name, 0.0) for name in resident_tables.MEASURE_FIELDS]


def _is_stored(rule: UpdateRule, ridge: Ridge) -> bool:
    """Whether gradients go through memory; a ridge is a weight decay where that is coupled."""
    return rule.accumulate > 1 or rule.clip_norm is not None or (rule.decoupled and ridge.strength != 0.0)


def bind_train_fleet(
    device: Device,
    *,
    x: Tensor,
    target: Tensor,
    rows: Tensor,
    batch: int,
    layers: Sequence[Sequence[ResidentLayer]],
    params: Tensor,
    gradients: Tensor,
    states: Sequence[Tensor],
    segments: Sequence[Sequence[Segment]],
    rules: Sequence[UpdateRule],
    losses: Sequence[LossSpec],
    counters: Tensor,
    hyper: Tensor,
    rates: Tensor,
    stats: Tensor,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    shadow: Tensor | None = None,
    history: Tensor | None = None,
    ridges: Sequence[Ridge] | None = None,
    op: str = "train_fleet",
) -> Callable[[Sequence[int]], object]:
    """The contract's ``train_fleet``."""
    models = len(layers)
    ridges = [Ridge()] * models if ridges is None else ridges
    _check_common(op, layers, segments, rules, losses, ridges)
    stretches = tuple((segment.offset, segment.size) for segment in segments[0])
    count, first_loss = rules[0].state_count, losses[0]
    _check_layers(op, layers[0], configs.resident_tiles(device.arch.family, device.precision)[-1].outputs)
    inputs, outputs = layers[0][0].inputs, layers[0][-1].outputs
    classes = first_loss.kind == "cross_entropy" and not first_loss.soft
    length = len(device.check(op, "x", x, (None, inputs), device.compute))
    device.check(op, "target", target, (length,) if classes else (length, outputs), INT64 if classes else FLOAT32)
    device.check(op, "rows", rows, (models, None), INT64)
    device.check_written(op, "params", params, (models, None), FLOAT32)
    arenas = [("params", params), ("gradients", gradients), *(("states", state) for state in states)]
    if len(states) != count:
        raise ArgumentError(f"{op}: states: {rules[0].kind} keeps {count} arrays of state, got {len(states)}")
    if shadow is not None:
        arenas.append(("shadow", shadow))
    elif device.compute != FLOAT32:
        raise ArgumentError(f"{op}: shadow: the products read {device.compute}; give an arena for the rounded weights")
    for name, arena in arenas:
        device.check_written(op, name, arena, tuple(params.shape), device.compute if name == "shadow" else FLOAT32)
    for name, array, width, kind in (
        ("counters", counters, COUNTERS, INT64), ("hyper", hyper, HYPER, FLOAT64), ("stats", stats, STATS, FLOAT64),
    ):  # fmt: skip
        device.check_written(op, name, array, (models, width), kind)
        arenas.append((name, array))
    device.check(op, "rates", rates, (models, None, RATE_COLUMNS), FLOAT64)
    arenas.append(("rates", rates))
    if history is not None:
        device.check_written(op, "history", history, (models, None, STATS), FLOAT64)
        arenas.append(("history", history))
    size = params.shape[1]
    for name, arena in [*arenas, ("rows", rows)]:
        if not arena.is_contiguous() or (name == "params" and size % 8):
            raise ArgumentError(
                f"{op}: {name}: expected a contiguous array with a row a model, of a multiple of 8 elements in the "
                f"arenas; got shape {tuple(arena.shape)}, strides {arena.stride()}"
            )
    if weight is not None:
        device.check(op, "weight", weight, (length,), FLOAT32)
    if class_weight is not None:
        class_weight = device.check(op, "class_weight", class_weight, (outputs,), FLOAT32).contiguous()
    tile = configs.resident_tile(device.arch, device.precision, tuple(layer.outputs for layer in layers[0]))
    # where the data lies is counted from the workspace
    _, work_size, lowest = _layer_table(layers[0], segments[0], 0, 0, batch)
    work = device.zeros(models * work_size, device.compute)
    distance = x.data_ptr() - work.data_ptr()
    if not is_aligned(x) or distance % (8 * x.element_size()):
        raise ArgumentError(
            f"{op}: x: expected rows that start at multiples of 32 bytes, with zeros between them; got strides "
            f"{x.stride()}. Backend.from_host makes such a matrix"
        )
    x_row = x.stride(0) if length > 1 else _round_up(inputs, 8)
    table, _, _ = _layer_table(layers[0], segments[0], distance // x.element_size(), x_row, batch)
    tables = [_model_tables(op, one) for one in layers]
    trained = len(stretches)
    factors = [[[s.rule.lr_factor, s.rule.weight_decay] for s in one] or [[0.0, 0.0]] for one in segments]
    settings = [
        loss_setting_values(loss, weighted=weight is not None, classes=class_weight is not None) for loss in losses
    ]
    ignored = 0 if first_loss.ignore_index is None else first_loss.ignore_index
    epochs = 0 if history is None else history.shape[1]
    spare, number = device.zeros(1, FLOAT32), device.zeros(1, INT64)
    live = torch.zeros((models, len(resident_tables.LIVE_FIELDS)), dtype=INT64, device=device.device)

    def tensor(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device.device)

    arguments = {
        "compute": device.far_base(work), "weights": params if shadow is None else shadow, "parameters": params,
        "grads": gradients, "first": states[0] if count else params, "second": states[-1] if count else params,
        "rows": rows, "labels": target if classes else number, "target": spare if classes else target,
        "weight": spare if weight is None else weight,
        "class_weight": spare if class_weight is None else class_weight,
        "slopes": device.zeros(models * len(layers[0]), FLOAT32),
        "measured": tensor([_measures(*one, outputs) for one in zip(ridges, losses, strict=True)], FLOAT64),
        "layers": tensor(table, INT64),
        "draws": tensor([draws for draws, _ in tables], INT64),
        "shares": tensor([shares for _, shares in tables], FLOAT32), "settings": tensor(settings, FLOAT32),
        "rules": tensor([clock.rule_values(rule) for rule in rules], FLOAT64),
        "tensors": tensor(factors, FLOAT64), "segments": tensor([*stretches] or [(0, 0)], INT64),
        "counters": counters, "hyper": hyper, "rates": rates, "stats": stats,
        "history": device.zeros(1, FLOAT64) if history is None else history, "live": live,
        "M": batch, "depth": len(layers[0]), "lowest": lowest, "trained": trained, "work_size": work_size, "size": size,
        "rows_size": rows.shape[1], "rates_size": rates.shape[1] * RATE_COLUMNS,
        "label_step": target.stride(0) if classes else 0,
        "target_row": 0 if classes else target.stride(0), "target_col": 0 if classes else target.stride(1),
        "weight_step": 0 if weight is None else weight.stride(0),
        "ignored_low": signed(ignored), "ignored_high": signed(ignored >> 32),
        "entropy": int(first_loss.kind == "cross_entropy"),
        "stored": int(any(_is_stored(*one) for one in zip(rules, ridges, strict=True))),
        "shadowed": int(shadow is not None),
    }  # fmt: skip
    constants = configs.resident_constants(tile, device.product)
    launches: dict[int, Run] = {}
    listed: list[list[int]] = []

    # the kernel is told only how far x lies from the workspace: nothing else holds on to it
    def run(steps: Sequence[int], _data: Tensor = x) -> None:
        _check_steps(op, steps, models)
        entries = [[model, number, epochs] for model, number in enumerate(steps) if number > 0]
        if not entries:
            return
        if entries != listed:
            live[: len(entries)].copy_(torch.tensor(entries, dtype=INT64))
            listed[:] = entries
        if len(entries) not in launches:
            launches[len(entries)] = device.launch(resident.resident_kernel, len(entries), arguments, constants, tile)
        launches[len(entries)]()

    return run


def bind_train_resident(
    device: Device,
    *,
    rows: Tensor,
    layers: Sequence[ResidentLayer],
    params: Tensor,
    gradients: Tensor,
    states: Sequence[Tensor],
    segments: Sequence[Segment],
    rule: UpdateRule,
    loss: LossSpec,
    counters: Tensor,
    hyper: Tensor,
    rates: Tensor,
    stats: Tensor,
    shadow: Tensor | None = None,
    history: Tensor | None = None,
    ridge: Ridge | None = None,
    **operands: Any,
) -> Callable[[int], object]:
    """The contract's ``train_resident``: a fleet of one."""
    op = "train_resident"
    for name, array in (("rows", rows), ("params", params), ("gradients", gradients), ("counters", counters)):
        device.check(op, name, array, (None,))
    run = bind_train_fleet(
        device, rows=rows[None], layers=[layers], params=params[None], gradients=gradients[None],
        states=[state[None] for state in states], segments=[segments], rules=[rule], losses=[loss],
        counters=counters[None], hyper=hyper[None], rates=rates[None], stats=stats[None],
        shadow=None if shadow is None else shadow[None], history=None if history is None else history[None],
        ridges=None if ridge is None else [ridge], op=op, **operands,
    )  # fmt: skip
    return lambda steps: run((steps,))
