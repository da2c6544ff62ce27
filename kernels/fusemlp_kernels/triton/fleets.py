"""Binding the calls of many whole steps: ``train_resident`` and ``train_fleet``.

The kernel has an order of its own, which is that of every step program; calls in another order are refused. Its tables
are filled from the operands of the calls.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
    Ridge,
    Segment,
    UpdateRule,
)
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.triton import clock, configs, resident, resident_tables
from fusemlp_kernels.triton.launch import Device, Run, Tensor, is_aligned, signed
from fusemlp_kernels.triton.layers import dropout_numbers, loss_setting_values

Operands = Mapping[str, Any]
Calls = Sequence[tuple[str, Operands]]

INT64, FLOAT32, FLOAT64 = torch.int64, torch.float32, torch.float64
# What the kernel does after it has gone back to the first layer, and a network with nothing to train.
ENDS = (["grad_weight_update"], ["grad_weight", "update"], ["grad_weight", "penalty", "update"], ["advance"])


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


@dataclass(frozen=True)
class _Step:
    """A model's calls, read: the operands of its layers forward, of those it goes back through, from the last on, and
    of its clock; the lowest layer with something to train, and the trained tensors in the arenas."""

    forward: Sequence[Operands]
    backward: Sequence[Operands]
    clock: Operands
    lowest: int
    segments: Sequence[Segment]

    @property
    def loss(self) -> LossSpec:
        spec: LossSpec = self.forward[-1]["loss"]
        return spec

    @property
    def rule(self) -> UpdateRule:
        rule: UpdateRule = self.clock["rule"]
        return rule

    @property
    def ridge(self) -> Ridge:
        return self.forward[-1].get("ridge") or Ridge()

    def values(self) -> list[Tensor]:
        """The arrays of the workspace that the kernel writes, in order."""
        given = [operands.get(name) for operands in self.forward for name in ("y", "z", "dz")]
        given += [operands["dz_prev"] for operands in self.backward]
        return [one for one in given if one is not None]


def _read(op: str, calls: Calls, params: Tensor) -> _Step:
    """The calls, if they are in the kernel's order; ``params``: the model's arena."""
    names = [name for name, _ in calls]
    forward = [operands for name, operands in calls if name in ("linear", "linear_loss_grad")]
    backward = [operands for name, operands in calls if name == "grad_input"]
    depth, back = len(forward), len(backward)
    begin, end = names[: depth + back], names[depth + back :]
    wanted = ["linear"] * (depth - 1) + ["linear_loss_grad"] + ["grad_input"] * back
    goes_back = all(
        one["w"].data_ptr() == forward[depth - 1 - index]["w"].data_ptr() for index, one in enumerate(backward)
    )
    if begin != wanted or end not in ENDS or back >= depth or not goes_back:
        raise ArgumentError(
            f"{op}: calls: the kernel runs linear layer by layer, linear_loss_grad, grad_input back from the last "
            f"layer, then grad_weight_update, or grad_weight, penalty and update; got {', '.join(names)}. Run them one "
            "by one"
        )
    for index, (below, above) in enumerate(itertools.pairwise(forward)):
        if len(below["w"]) != above["w"].shape[1]:
            raise ArgumentError(
                f"{op}: calls[{index + 1}]: w: expected {len(below['w'])} columns, as layer {index} has outputs, got "
                f"{above['w'].shape[1]}"
            )
    last = forward[-1]
    if last["loss"].kind == "cross_entropy" and last.get("activation", "identity") != "identity":
        raise ArgumentError(
            f"activation: cross_entropy takes logits, so it must be 'identity', got {last['activation']!r}"
        )
    clock = calls[-1][1]
    lowest = depth if end == ["advance"] else depth - 1 - back
    segments = clock.get("segments", ()) if end != ["grad_weight_update"] else _segments(clock, params)
    return _Step(forward, backward, clock, lowest, segments)


def _segments(operands: Operands, params: Tensor) -> list[Segment]:
    """The trained tensors of a ``grad_weight_update`` as stretches of the arena, in its order."""
    found = []
    for layer in operands["layers"]:
        for name in "wb":
            if layer[name] is not None:
                found.append((layer[name], layer[f"{name}_rule"]))
    found += [(slope["param"], slope["rule"]) for slope in operands.get("slopes", ())]
    segments = [Segment(_place(one, params), len(one) * one.stride(0), rule) for one, rule in found]
    return sorted(segments, key=lambda segment: segment.offset)


def _place(tensor: Tensor, arena: Tensor) -> int:
    """Where a tensor begins in an arena, in elements."""
    return (tensor.data_ptr() - arena.data_ptr()) // arena.element_size()


def _same(op: str, name: str, values: Sequence[Any]) -> None:
    for index, value in enumerate(values):
        if value != values[0]:
            raise ArgumentError(
                f"{op}: {name}: models of one launch have it in common, got {values[0]!r} for model 0 and {value!r} "
                f"for model {index}; bind them apart"
            )


def _check_common(op: str, calls: Sequence[Calls], steps: Sequence[_Step], weights: Tensor, params: Tensor) -> None:
    """Raise ArgumentError where models cannot train in one launch."""
    _same(op, "calls", [[name for name, _ in one] for one in calls])
    layers = []
    for model, step in enumerate(steps):
        layers.append(
            [
                (
                    tuple(one["w"].shape), _place(one["w"], weights[model]), _place(one["b"], params[model]),
                    one.get("activation", "identity"),
                    None if one.get("slope_param") is None else _place(one["slope_param"], params[model]),
                )
                for one in step.forward
            ]
        )  # fmt: skip
    _same(op, "layers", layers)
    _same(op, "segments", [[(one.offset, one.size) for one in step.segments] for step in steps])
    _same(op, "rules: states", [step.rule.states for step in steps])
    losses = [step.loss for step in steps]
    _same(op, "losses: kind, soft, ignore_index", [(loss.kind, loss.soft, loss.ignore_index) for loss in losses])
    for name in ("x", "target", "weight", "class_weight"):
        data = [step.forward[0 if name == "x" else -1].get(name) for step in steps]
        _same(op, name, [None if one is None else one.data_ptr() for one in data])


class _Workspace:
    """Where the values of the models' steps lie, counted from ``base`` in elements, ``stride`` from model to model."""

    def __init__(self, op: str, device: Device, steps: Sequence[_Step], batch: int) -> None:
        self.device, self.batch, self.models = device, batch, len(steps)
        values = [step.values() for step in steps]
        self.item = device.compute.itemsize
        self.base = min(values[0], key=lambda value: value.data_ptr(), default=device.zeros(8, device.compute))
        apart = values[1][0].data_ptr() - values[0][0].data_ptr() if self.models > 1 and values[0] else 0
        self.stride = apart // self.item
        # what the calls have no array for
        self._spare: list[Tensor] = []
        for model, own in enumerate(values):
            for index, (value, first) in enumerate(zip(own, values[0], strict=True)):
                device.check_written(op, f"calls[{model}]: value {index}", value, tuple(first.shape), device.compute)
                at, alike = value.data_ptr() - first.data_ptr(), value.stride() == first.stride()
                if at != model * apart or not alike or self.place(first) % 8 or first.stride(0) % 8:
                    raise ArgumentError(
                        f"{op}: calls: the values of model {model} must lie as those of model 0 do, {apart} bytes "
                        f"from model to model, in rows of a multiple of 8 elements; value {index} is {at} bytes away"
                    )

    def place(self, value: Tensor) -> int:
        """Where model 0's value begins."""
        return (value.data_ptr() - self.base.data_ptr()) // self.item

    def spare(self, pitch: int) -> int:
        """Where memory for a value of each model begins that no other call reads."""
        step = 8 * self.item
        flat = self.device.zeros((self.models - 1) * self.stride + self.batch * pitch + 8, self.device.compute)
        shift = (self.base.data_ptr() - flat.data_ptr()) % step // self.item
        self._spare.append(flat)
        return self.place(flat[shift:])


def _layer_table(step: _Step, work: _Workspace, x: Tensor, weights: Tensor, params: Tensor) -> list[list[int]]:
    """The rows of the layers; model 0's arenas."""
    task_at = {segment.offset: index for index, segment in enumerate(step.segments)}
    rows: list[list[int]] = []
    last = len(step.forward) - 1
    source, source_row = work.place(x), x.stride(0) if len(x) > 1 else _round_up(x.shape[1], 8)
    for index, one in enumerate(step.forward):
        w, slope = one["w"], one.get("slope_param")
        name = one.get("activation", "identity")
        y, z = one.get("y"), one.get("z")
        dz = one.get("dz") if index == last else None
        if step.lowest <= index < last:
            dz = step.backward[last - 1 - index]["dz_prev"]
        pitch = _round_up(len(w), 8)
        y_at = 0 if y is None else work.place(y)
        # what the derivative is read from
        z_at = y_at
        if name in NEEDS_Z and index < last:
            z_at = work.spare(pitch) if z is None else work.place(z)
        dz_at = work.spare(pitch) if dz is None else work.place(dz)
        slope_at = -1 if slope is None else _place(slope, params)
        fields = {
            "N": len(w), "K": w.shape[1], "x": source, "x_row": source_row, "w": _place(w, weights),
            "w_row": _round_up(w.shape[1], 8), "b": _place(one["b"], params),
            "w_task": task_at.get(_place(w, weights), -1), "b_task": task_at.get(_place(one["b"], params), -1),
            "slope_task": -1 if slope is None else task_at.get(slope_at, -1), "slope": slope_at,
            "activation": ACTIVATIONS.index(name), "y": y_at, "z": z_at, "dz": dz_at, "pitch": pitch,
        }  # fmt: skip
        rows.append([fields[name] for name in resident_tables.LAYER_FIELDS])
        source, source_row = y_at, pitch
    return rows


def _model_tables(step: _Step) -> tuple[list[list[int]], list[list[float]]]:
    """A model's rows of draws and shares."""
    draws, shares = [], []
    for one in step.forward:
        dropout = one.get("dropout")
        numbers = dropout_numbers(dropout)
        draws.append([int(numbers[name]) for name in resident_tables.DRAW_FIELDS])
        kept = 1.0 if dropout is None else 1.0 - dropout.rate
        fields = {"keep_scale": numbers["keep_scale"], "kept_share": kept, "slope": float(one.get("slope", 0.0))}
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


def _check_arenas(op: str, device: Device, arenas: Mapping[str, Tensor], models: int, count: int) -> None:
    """The arenas are contiguous, with a row a model."""
    params = device.check_written(op, "params", arenas["params"], (models, None), FLOAT32)
    kinds = {"grads": FLOAT32, **{f"state{index}": FLOAT32 for index in range(count)}, "shadow": device.compute}
    widths = {"counters": (COUNTERS, INT64), "hyper": (HYPER, FLOAT64), "stats": (STATS, FLOAT64)}
    device.check(op, "rates", arenas["rates"], (models, None, RATE_COLUMNS), FLOAT64)
    for name, arena in arenas.items():
        if name == "rates":
            continue
        width, kind = widths.get(name, (params.shape[1], kinds.get(name, FLOAT32)))
        device.check_written(op, name, arena, (models, width), kind)
        if not arena.is_contiguous() or (name == "params" and arena.shape[1] % 8):
            raise ArgumentError(
                f"{op}: {name}: expected a contiguous array with a row a model, of a multiple of 8 elements in the "
                f"arenas; got shape {tuple(arena.shape)}, strides {arena.stride()}"
            )
    needed = ["grads", *(f"state{index}" for index in range(count)), "counters", "hyper", "stats"]
    needed += [] if device.compute == FLOAT32 else ["shadow"]
    for name in needed:
        if name not in arenas:
            raise ArgumentError(f"{op}: arenas: {name} is missing")


def bind_train_fleet(
    device: Device,
    *,
    calls: Sequence[Calls],
    rows: Tensor,
    batch: int,
    arenas: Mapping[str, Tensor],
    epoch_stats: Tensor | None = None,
) -> Callable[[Sequence[int]], object]:
    """The contract's ``train_fleet``."""
    return _bind(device, "train_fleet", calls, rows, batch, arenas, epoch_stats)


def _bind(
    device: Device,
    op: str,
    calls: Sequence[Calls],
    rows: Tensor,
    batch: int,
    arenas: Mapping[str, Tensor],
    epoch_stats: Tensor | None,
) -> Callable[[Sequence[int]], object]:
    models, params = len(calls), arenas["params"]
    device.check(op, "rows", rows, (models, None), INT64)
    if not rows.is_contiguous():
        raise ArgumentError(f"{op}: rows: expected a contiguous array, got strides {rows.stride()}")
    steps = [_read(op, one, own) for one, own in zip(calls, params, strict=True)]
    first, output = steps[0], steps[0].forward[-1]
    count, loss = first.rule.state_count, first.loss
    _check_arenas(op, device, arenas, models, count)
    shadow = arenas.get("shadow") if device.compute != FLOAT32 else None
    weights = params if shadow is None else shadow
    _check_common(op, calls, steps, weights, params)
    x, target = first.forward[0]["x"], output["target"]
    weight, class_weight = output.get("weight"), output.get("class_weight")
    outputs, inputs = len(output["w"]), first.forward[0]["w"].shape[1]
    widest = configs.resident_tiles(device.arch.family, device.precision)[-1].outputs
    if outputs > widest:
        raise ArgumentError(
            f"{op}: calls: {outputs} outputs are more than the {widest} that fit a tile; train such a network step by "
            "step"
        )
    for index, one in enumerate(first.forward):
        place = _place(one["w"], weights[0])
        if place % 8 or (len(one["w"]) > 1 and one["w"].stride(0) != _round_up(one["w"].shape[1], 8)):
            raise ArgumentError(
                f"{op}: calls[{index}]: w: expected rows that begin at multiples of 8 elements of the arena, got place "
                f"{place}, strides {one['w'].stride()}"
            )
    classes = loss.kind == "cross_entropy" and not loss.soft
    length = len(device.check(op, "x", x, (None, inputs), device.compute))
    device.check(op, "target", target, (length,) if classes else (length, outputs), INT64 if classes else FLOAT32)
    if epoch_stats is not None:
        device.check_written(op, "epoch_stats", epoch_stats, (models, None, STATS), FLOAT64)
    if weight is not None:
        device.check(op, "weight", weight, (length,), FLOAT32)
    if class_weight is not None:
        class_weight = device.check(op, "class_weight", class_weight, (outputs,), FLOAT32).contiguous()
    tile = configs.resident_tile(device.arch, device.precision, tuple(len(one["w"]) for one in first.forward))
    work = _Workspace(op, device, steps, batch)
    # where the data lies is counted from the workspace
    if not is_aligned(x) or (x.data_ptr() - work.base.data_ptr()) % (8 * x.element_size()):
        raise ArgumentError(
            f"{op}: x: expected rows that start at multiples of 32 bytes, with zeros between them; got strides "
            f"{x.stride()}. Backend.from_host makes such a matrix"
        )
    table = _layer_table(first, work, x, weights[0], params[0])
    tables = [_model_tables(step) for step in steps]
    factors = [[[s.rule.lr_factor, s.rule.weight_decay] for s in step.segments] or [[0.0, 0.0]] for step in steps]
    settings = [
        loss_setting_values(step.loss, weighted=weight is not None, classes=class_weight is not None) for step in steps
    ]
    ignored = 0 if loss.ignore_index is None else loss.ignore_index
    epochs = 0 if epoch_stats is None else epoch_stats.shape[1]
    spare, number = device.zeros(1, FLOAT32), device.zeros(1, INT64)
    live = torch.zeros((models, len(resident_tables.LIVE_FIELDS)), dtype=INT64, device=device.device)
    states = [arenas[f"state{index}"] for index in range(count)]

    def tensor(values: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=device.device)

    arguments = {
        "compute": device.far_base(work.base), "weights": weights, "parameters": params,
        "grads": arenas["grads"], "first": states[0] if count else params, "second": states[-1] if count else params,
        "rows": rows, "labels": target if classes else number, "target": spare if classes else target,
        "weight": spare if weight is None else weight,
        "class_weight": spare if class_weight is None else class_weight,
        "slopes": device.zeros(models * len(table), FLOAT32),
        "measured": tensor([_measures(step.ridge, step.loss, outputs) for step in steps], FLOAT64),
        "layers": tensor(table, INT64),
        "draws": tensor([draws for draws, _ in tables], INT64),
        "shares": tensor([shares for _, shares in tables], FLOAT32), "settings": tensor(settings, FLOAT32),
        "rules": tensor([clock.rule_values(step.rule) for step in steps], FLOAT64),
        "tensors": tensor(factors, FLOAT64),
        "segments": tensor([(one.offset, one.size) for one in first.segments] or [(0, 0)], INT64),
        "counters": arenas["counters"], "hyper": arenas["hyper"], "rates": arenas["rates"], "stats": arenas["stats"],
        "epoch_stats": device.zeros(1, FLOAT64) if epoch_stats is None else epoch_stats, "live": live,
        "M": batch, "depth": len(table), "lowest": first.lowest, "trained": len(first.segments),
        "work_size": work.stride, "size": params.shape[1],
        "rows_size": rows.shape[1], "rates_size": arenas["rates"].shape[1] * RATE_COLUMNS,
        "label_step": target.stride(0) if classes else 0,
        "target_row": 0 if classes else target.stride(0), "target_col": 0 if classes else target.stride(1),
        "weight_step": 0 if weight is None else weight.stride(0),
        "ignored_low": signed(ignored), "ignored_high": signed(ignored >> 32),
        "entropy": int(loss.kind == "cross_entropy"),
        "stored": int(any(_is_stored(step.rule, step.ridge) for step in steps)),
        "shadowed": int(shadow is not None),
    }  # fmt: skip
    constants = configs.resident_constants(tile, device.product)
    launches: dict[int, Run] = {}
    listed: list[list[int]] = []

    # the kernel is told only how far x and the values lie from one of them: nothing else holds on to them
    def run(times: Sequence[int], _kept: Any = (calls, work)) -> None:
        if len(times) != models:
            raise ArgumentError(f"{op}: expected the steps of each of {models} models, got {len(times)} numbers")
        entries = [[model, number, epochs] for model, number in enumerate(times) if number > 0]
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
    calls: Calls,
    rows: Tensor,
    batch: int,
    arenas: Mapping[str, Tensor],
    epoch_stats: Tensor | None = None,
) -> Callable[[int], object]:
    """The contract's ``train_resident``: a fleet of one."""
    stacked = {name: arena[None] for name, arena in arenas.items()}
    accounts = None if epoch_stats is None else epoch_stats[None]
    run = _bind(device, "train_resident", [calls], rows[None], batch, stacked, accounts)
    return lambda steps: run((steps,))
