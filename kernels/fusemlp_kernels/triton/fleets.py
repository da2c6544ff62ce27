"""Binding the calls of many whole steps: ``train_resident`` and ``train_fleet``.

The calls of a step, in the order of its program, are the phases of the kernel; their operands fill its tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from fusemlp_kernels.checks import binds, checked
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
from fusemlp_kernels.errors import ArgumentError, unknown_name
from fusemlp_kernels.triton import clock, configs, resident, resident_layers
from fusemlp_kernels.triton.card import card_kernel
from fusemlp_kernels.triton.chip import chip_constants, chip_kernel, sums_table
from fusemlp_kernels.triton.launch import Run, Tensor, TritonDevice, is_aligned
from fusemlp_kernels.triton.layers import arguments_of, dropout_numbers, loss_settings, target_arguments
from fusemlp_kernels.triton.loss import PARTIALS

Operands = Mapping[str, Any]
Calls = Sequence[tuple[str, Operands]]


class Phases:
    """A step's calls, read in their order: the kernel's ``phases`` with their layers; the operands of the layers
    forward, and by layer those of the calls that go back to it; and the trained tensors in ``params``, the arena.

    A method for each op returns why no phase can do such a call, None for one that can.

    Raises ArgumentError for a call that no phase can do, and for calls that are no step.
    """

    def __init__(self, op: str, calls: Calls, params: Tensor) -> None:
        self.phases: list[tuple[str, int]] = []
        self.forward: list[Operands] = []
        self.backward: dict[int, Operands] = {}
        self.segments: Sequence[Segment] = ()
        self._params = params
        # the layers, by the places of dz and of the slopes' gradients
        self._layer_at: dict[int, int] = {}
        self._before = ""
        kinds: dict[str, Callable[[Operands], str | None]] = {
            "linear": self._linear, "linear_loss_grad": self._loss, "grad_input": self._grad_input,
            "grad_weight": self._grad_weight, "grad_weight_update": self._grad_weight_update,
            "penalty": self._penalty, "update": self._update, "advance": self._advance,
        }  # fmt: skip
        for index, (name, operands) in enumerate(calls):
            refusal = kinds[name](operands) if name in kinds else "the kernel has no phase for it"
            if refusal is not None:
                raise ArgumentError(f"{op}: calls[{index}]: {name}: {refusal}; run the calls one by one")
            self._before = name
        names = [name for name, _ in calls]
        if "linear_loss_grad" not in names or self.phases[-1][0] != "tick":
            raise ArgumentError(
                f"{op}: calls: expected a step with linear_loss_grad that ends with grad_weight_update, update or "
                f"advance, got {', '.join(names)}"
            )
        self.loss: LossSpec = self.forward[-1]["loss"]
        self.ridge: Ridge = self.forward[-1].get("ridge") or Ridge()
        self.rule: UpdateRule = calls[-1][1]["rule"]

    def values(self) -> list[Tensor]:
        """The arrays of the workspace that the kernel writes, in order."""
        values = [operands.get(name) for operands in self.forward for name in ("y", "z", "dz")]
        values += [operands["dz_prev"] for operands in self.backward.values()]
        return [value for value in values if value is not None]

    def _linear(self, operands: Operands) -> str | None:
        if self.forward:
            below = self.forward[-1]
            if not _are_same(operands["x"], below.get("y")):
                return "its x is not the output of the linear before it"
            if len(below["w"]) != operands["w"].shape[1]:
                return f"w: expected {len(below['w'])} columns, as x has, got {operands['w'].shape[1]}"
        self.phases.append(("forward", len(self.forward)))
        self.forward.append(operands)
        return None

    def _loss(self, operands: Operands) -> str | None:
        if (refusal := self._linear(operands)) is not None:
            return refusal
        if operands["loss"].reduction == "rows":
            return "the kernel trains without privacy"
        kind = "entropy" if operands["loss"].kind == "cross_entropy" else "elementwise"
        last = len(self.forward) - 1
        # the divisor of the loss follows from data and parameters
        self.phases = [("measure", last), *self.phases[:-1], (kind, last)]
        self._writes(operands, "dz", last)
        return None

    def _grad_input(self, operands: Operands) -> str | None:
        above = self._layer_of(operands["dz"])
        if not above or not _are_same(operands["w"], self.forward[above]["w"]):
            return "its dz and w are not those of a layer above the first"
        self.phases.append(("backward", above - 1))
        self.backward[above - 1] = operands
        self._writes(operands, "dz_prev", above - 1)
        return None

    def _writes(self, operands: Operands, name: str, layer: int) -> None:
        for array in (operands.get(name), operands.get("dslope")):
            if array is not None:
                self._layer_at[array.data_ptr()] = layer

    def _layer_of(self, gradient: Tensor) -> int | None:
        return self._layer_at.get(gradient.data_ptr())

    def _grad_weight(self, operands: Operands) -> str | None:
        layers = [self._layer_of(part["dz"]) for part in operands["layers"]]
        for layer, part in zip(layers, operands["layers"], strict=True):
            if layer is None or not _are_same(part["x"], self.forward[layer]["x"]):
                return "its dz and x are not those of a layer"
        # a layer's phase has its slope too
        layers += [self._layer_of(slope["dslope"]) for slope in operands.get("slopes", ())]
        if None in layers:
            return "no layer before it has its dslope"
        self.phases += [("gradients", layer) for layer in dict.fromkeys(layers) if layer is not None]
        return None

    def _grad_weight_update(self, operands: Operands) -> str | None:
        found = []
        for layer in operands["layers"]:
            found += [(layer[name], layer[f"{name}_rule"]) for name in "wb" if layer[name] is not None]
        found += [(slope["param"], slope["rule"]) for slope in operands.get("slopes", ())]
        segments = [
            Segment(place_in(tensor, self._params), len(tensor) * tensor.stride(0), rule) for tensor, rule in found
        ]
        self.segments = sorted(segments, key=lambda segment: segment.offset)
        refusal = self._grad_weight(operands)
        self.phases += [("update", 0), ("tick", 0)]
        return refusal

    def _penalty(self, operands: Operands) -> str | None:
        return None if self._before == "grad_weight" else "it does not follow grad_weight"

    def _update(self, operands: Operands) -> str | None:
        if operands.get("noise") is not None:
            return "the kernel trains without privacy"
        if self._before not in ("grad_weight", "penalty"):
            return "it does not follow grad_weight or penalty"
        self.segments = operands["segments"]
        self.phases += [("update", 0), ("tick", 0)]
        return None

    def _advance(self, operands: Operands) -> str | None:
        self.phases.append(("tick", 0))
        return None


def _are_same(array: Tensor, other: Tensor | None) -> bool:
    return other is not None and array.data_ptr() == other.data_ptr()


def place_in(tensor: Tensor, arena: Tensor) -> int:
    """Return the first element of a tensor in an arena."""
    return (tensor.data_ptr() - arena.data_ptr()) // arena.element_size()


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _same(op: str, name: str, values: Sequence[Any]) -> None:
    for index, value in enumerate(values):
        if value != values[0]:
            raise ArgumentError(
                f"{op}: {name}: models of one launch must agree in it, got {values[0]!r} for model 0 and {value!r} "
                f"for model {index}; bind them apart"
            )


def _check_common(op: str, calls: Sequence[Calls], steps: Sequence[Phases], weights: Tensor, params: Tensor) -> None:
    """Raise ArgumentError for models that cannot train in one launch."""

    def layer_of(operands: Operands, model: int) -> tuple[Any, ...]:
        slope = operands.get("slope_param")
        places = place_in(operands["w"], weights[model]), place_in(operands["b"], params[model])
        slope_place = None if slope is None else place_in(slope, params[model])
        return tuple(operands["w"].shape), places, operands.get("activation", "identity"), slope_place

    _same(op, "calls", [[name for name, _ in program] for program in calls])
    _same(op, "layers", [[layer_of(operands, model) for operands in step.forward] for model, step in enumerate(steps)])
    _same(op, "segments", [[(segment.offset, segment.size) for segment in step.segments] for step in steps])
    _same(op, "rules: states", [step.rule.states for step in steps])
    losses = [step.loss for step in steps]
    _same(op, "losses: kind, soft, ignore_index", [(loss.kind, loss.soft, loss.ignore_index) for loss in losses])
    _same(op, "calls: phases and layers", [step.phases for step in steps])
    for name in ("x", "target", "weight", "class_weight"):
        data = [step.forward[0 if name == "x" else -1].get(name) for step in steps]
        _same(op, name, [None if array is None else array.data_ptr() for array in data])


class _Workspace:
    """The places of the values of the models' steps, in elements from ``base``; ``stride`` from model to model."""

    def __init__(self, op: str, device: TritonDevice, steps: Sequence[Phases], batch: int) -> None:
        self.device, self.batch, self.models = device, batch, len(steps)
        values = [step.values() for step in steps]
        self.item = device.compute.itemsize
        self.base = min(values[0], key=lambda value: value.data_ptr(), default=device.zeros(8, "compute"))
        apart = values[1][0].data_ptr() - values[0][0].data_ptr() if self.models > 1 and values[0] else 0
        self.stride = apart // self.item
        # values that have no array in the calls
        self._spare: list[Tensor] = []
        for model, numbers in enumerate(values):
            for index, (value, first) in enumerate(zip(numbers, values[0], strict=True)):
                name = f"calls[{model}]: value {index}"
                device.check(op, name, value, tuple(first.shape), "compute", written=True)
                at, alike = value.data_ptr() - first.data_ptr(), value.stride() == first.stride()
                if at != model * apart or not alike or self.place(first) % 8 or first.stride(0) % 8:
                    raise ArgumentError(
                        f"{op}: calls: the values of model {model} must lie as those of model 0 do, {apart} bytes "
                        f"from model to model, in rows of a multiple of 8 elements; value {index} is {at} bytes away"
                    )

    def place(self, value: Tensor) -> int:
        """The first element of model 0's value."""
        return (value.data_ptr() - self.base.data_ptr()) // self.item

    def spare(self, pitch: int) -> int:
        """The first element of memory for a value of each model that no other call reads."""
        step = 8 * self.item
        flat = self.device.zeros((self.models - 1) * self.stride + self.batch * pitch + 8, "compute")
        shift = (self.base.data_ptr() - flat.data_ptr()) % step // self.item
        self._spare.append(flat)
        return self.place(flat[shift:])


def _layer_table(step: Phases, work: _Workspace, x: Tensor, weights: Tensor, params: Tensor) -> list[list[int]]:
    """The rows of the layers; model 0's arenas."""
    task_at = {segment.offset: index for index, segment in enumerate(step.segments)}
    rows: list[list[int]] = []
    last = len(step.forward) - 1
    source, source_row = work.place(x), x.stride(0) if len(x) > 1 else _round_up(x.shape[1], 8)
    for index, layer in enumerate(step.forward):
        w, slope = layer["w"], layer.get("slope_param")
        name = layer.get("activation", "identity")
        y, z = layer.get("y"), layer.get("z")
        dz = layer.get("dz") if index == last else None
        if index in step.backward:
            dz = step.backward[index]["dz_prev"]
        pitch = _round_up(len(w), 8)
        y_at = 0 if y is None else work.place(y)
        # the values that give the derivative
        z_at = y_at
        if name in NEEDS_Z and index < last:
            z_at = work.spare(pitch) if z is None else work.place(z)
        dz_at = work.spare(pitch) if dz is None else work.place(dz)
        slope_at = -1 if slope is None else place_in(slope, params)
        fields = {
            "N": len(w), "K": w.shape[1], "x": source, "x_row": source_row, "w": place_in(w, weights),
            "w_row": _round_up(w.shape[1], 8), "b": place_in(layer["b"], params),
            "w_task": task_at.get(place_in(w, weights), -1), "b_task": task_at.get(place_in(layer["b"], params), -1),
            "slope_task": -1 if slope is None else task_at.get(slope_at, -1), "slope": slope_at,
            "activation": ACTIVATIONS.index(name), "y": y_at, "z": z_at, "dz": dz_at, "pitch": pitch,
        }  # fmt: skip
        rows.append([fields[name] for name in resident_layers.LAYER_FIELDS])
        source, source_row = y_at, pitch
    return rows


def _model_tables(step: Phases) -> tuple[list[list[int]], list[list[float]]]:
    """A model's rows of draws and shares."""
    draws, shares = [], []
    for layer in step.forward:
        fields = dropout_numbers(layer.get("dropout")) | {"slope": layer.get("slope") or 0.0}
        draws.append([int(fields[name]) for name in resident_layers.DRAW_FIELDS])
        shares.append([float(fields[name]) for name in resident_layers.SHARE_FIELDS])
    return draws, shares


def _measures(ridge: Ridge, loss: LossSpec, outputs: int) -> list[float]:
    """A model's row of measures; the kernel writes those of a batch."""
    usual = 1.0 if loss.kind == "cross_entropy" else float(outputs)
    fields = {"ratio": 1.0 if ridge.divisor is None else ridge.divisor / usual, "strength": ridge.strength * usual}
    return [fields.get(name, 0.0) for name in resident_layers.MEASURE_FIELDS]


def _order(op: str, step: Phases, stored: bool) -> dict[str, int]:
    """The kernel's arguments for the phases of a step."""
    phases = [phase for phase in step.phases if stored or phase[0] != "update"]
    words, most = resident_layers.PHASE_WORDS, resident_layers.PHASE_LAYERS
    if len(step.forward) > most or len(phases) > 8 * words:
        raise ArgumentError(
            f"{op}: calls: the kernel has at most {most} layers and {8 * words} phases, got {len(step.forward)} layers "
            f"and {len(phases)} phases; run the calls one by one"
        )
    order = bytes(
        resident_layers.PHASES.index(kind) | layer << resident_layers.PHASE_LAYER.value for kind, layer in phases
    ).ljust(8 * words, b"\0")
    parts = (int.from_bytes(order[at : at + 8], "little", signed=True) for at in range(0, 8 * words, 8))
    return {"phases": len(phases)} | {f"order{word}": part for word, part in enumerate(parts)}


def _is_stored(rule: UpdateRule, ridge: Ridge) -> bool:
    """Return whether gradients go through memory. With a coupled weight decay a ridge is a part of it."""
    penalised = rule.decoupled and ridge.strength != 0.0
    # the function with the products has no register left for an average
    return rule.accumulate > 1 or rule.clip_norm is not None or bool(rule.ema) or penalised


def _check_chip(op: str, steps: Sequence[Phases], tile: configs.ResidentTile, sizes: Sequence[int], batch: int) -> None:
    """Raise ArgumentError for a step that ``chip_kernel`` does not take."""
    sides = {
        "inputs": (sizes[0], tile.inputs), "units of a layer": (max(sizes[1:-1], default=0), tile.units),
        "outputs": (sizes[-1], tile.outputs), "rows of a batch": (batch, tile.rows),
        "hidden layers": (len(sizes) - 2, 1),
    }  # fmt: skip
    reasons = [f"{count} {what} are more than {most}" for what, (count, most) in sides.items() if count > most]
    reasons += ["there is no hidden layer"] if len(sizes) < 3 else []
    reasons += ["it drops nothing"] if any(layer.get("dropout") for step in steps for layer in step.forward) else []
    if reasons:
        raise ArgumentError(f"{op}: plan: 'chip' does not take such a step: {reasons[0]}; leave plan out")
    _same(op, "rules: kind", [step.rule.code for step in steps])
    _same(op, "losses: accuracy", [step.loss.accuracy for step in steps])


def _check_arenas(op: str, device: TritonDevice, arenas: Mapping[str, Tensor], models: int, count: int) -> None:
    """The arenas are contiguous, with a row a model."""
    size = device.check(op, "params", arenas["params"], (models, None), "real").shape[1]
    if size % 8:
        raise ArgumentError(f"{op}: params: expected a multiple of 8 elements a model in the arenas, got {size}")
    wanted: dict[str, tuple[tuple[int | None, ...], str]] = {
        **{name: ((size,), "real") for name in ("params", "grads", *(f"state{index}" for index in range(count)))},
        **({} if device.compute == device.dtype("real") else {"shadow": ((size,), "compute")}),
        "counters": ((COUNTERS,), "int64"), "hyper": ((HYPER,), "float64"), "stats": ((STATS,), "float64"),
        "rates": ((None, RATE_COLUMNS), "float64"),
    }  # fmt: skip
    for name, (shape, kind) in wanted.items():
        if name not in arenas:
            raise ArgumentError(f"{op}: arenas: {name} is missing")
        device.check(op, name, arenas[name], (models, *shape), kind, written=name != "rates", flat=True)


def _bind(device: TritonDevice, op: str, call: SimpleNamespace) -> Callable[[Sequence[int]], object]:
    calls, rows, arenas, epoch_stats = call.calls, call.rows, call.arenas, call.epoch_stats
    card = call.plan == "card"
    models, params = len(calls), arenas["params"]
    if call.plan not in ("card", "chip", "resident"):
        raise unknown_name(f"{op}: plan", call.plan, ("card", "chip", "resident"))
    if card and models > 1:
        raise ArgumentError(f"{op}: plan: 'card' is for one model, got {models}; use 'chip' or 'resident'")
    device.check(op, "rows", rows, (models, None), "int64", flat=True)
    steps = [Phases(op, program, arena) for program, arena in zip(calls, params, strict=True)]
    first = steps[0]
    count = first.rule.state_count
    _check_arenas(op, device, arenas, models, count)
    shadowed = device.compute != device.dtype("real")
    weights = arenas["shadow"] if shadowed else params
    _check_common(op, calls, steps, weights, params)
    output, x = checked("linear_loss_grad", first.forward[-1], device.check), first.forward[0]["x"]
    outputs, inputs = output.N, first.forward[0]["w"].shape[1]
    table_of_tiles = "card" if card else "resident"
    widest = configs.resident_tiles(device.arch.family, device.precision, table_of_tiles)[-1].outputs
    if outputs > widest:
        raise ArgumentError(
            f"{op}: calls: {outputs} outputs are more than the {widest} that fit a tile; train such a network step by "
            "step"
        )
    for index, layer in enumerate(first.forward):
        w = layer["w"]
        place = place_in(w, weights[0])
        if place % 8 or (len(w) > 1 and w.stride(0) != _round_up(w.shape[1], 8)):
            raise ArgumentError(
                f"{op}: calls[{index}]: w: expected rows that begin at multiples of 8 elements of the arena, got place "
                f"{place}, strides {w.stride()}"
            )
    device.check(op, "x", x, (len(output.target), inputs), "compute")
    if epoch_stats is not None:
        device.check(op, "epoch_stats", epoch_stats, (models, None, STATS), "float64", written=True)
    sizes = (inputs, *(len(layer["w"]) for layer in first.forward))
    tile = configs.resident_tile(device.arch, device.precision, sizes, table_of_tiles)
    work = _Workspace(op, device, steps, call.batch)
    # the offset of the data counts from the workspace
    if not is_aligned(x) or (x.data_ptr() - work.base.data_ptr()) % (8 * x.element_size()):
        raise ArgumentError(
            f"{op}: x: expected rows that start at multiples of 32 bytes, with zeros between them; got strides "
            f"{x.stride()}. Backend.from_host makes such a matrix"
        )
    table = _layer_table(first, work, x, weights[0], params[0])
    stored = any(_is_stored(step.rule, step.ridge) for step in steps)
    sloped = any(layer.get("slope_param") is not None for layer in first.forward)
    if call.plan != "resident" and (stored or sloped or first.ridge != Ridge()):
        raise ArgumentError(
            f"{op}: plan: {call.plan!r} is for weights and biases that the step updates at once, got gradients in "
            "memory, a ridge or slopes of prelu; leave plan out"
        )
    tables = [_model_tables(step) for step in steps]
    factors = [[[s.rule.lr_factor, s.rule.weight_decay] for s in step.segments] or [[0.0, 0.0]] for step in steps]
    epochs = 0 if epoch_stats is None else epoch_stats.shape[1]
    live = device.zeros(models * len(resident_layers.LIVE_FIELDS), "int64").view(models, -1)
    states = first.rule.places([arenas[f"state{index}"] for index in range(count)], params)
    segments = [(segment.offset, segment.size) for segment in first.segments] or [(0, 0)]
    kernel, programs = (card_kernel, device.arch.processors) if card else (resident.resident_kernel, 0)
    constants = configs.resident_constants(tile, device.product, first.loss.kind == "cross_entropy")
    if call.plan == "chip":
        kernel, tile = chip_kernel, configs.CHIP[device.arch.family]
        _check_chip(op, steps, tile, sizes, call.batch)
        activations = [layer.get("activation", "identity") for layer in first.forward]
        constants = chip_constants(device.product, sizes, call.batch, activations, output, first.rule.code)
    arguments = arguments_of(
        device, kernel, SimpleNamespace(**arenas), compute=device.far_base(work.base),
        weights=weights, parameters=params, first=states[0], second=states[1], average=states[2], rows=rows,
        slopes=device.zeros(models * len(table), "real"), x=x, table=device.numbers(sums_table(table), "int64"),
        measured=device.numbers([_measures(step.ridge, step.loss, outputs) for step in steps], "float64"),
        settings=device.numbers([loss_settings(step.loss, output) for step in steps], "real"),
        layers=device.numbers(table, "int64"), draws=device.numbers([draws for draws, _ in tables], "int64"),
        shares=device.numbers([shares for _, shares in tables], "real"),
        rules=device.numbers([clock.rule_values(step.rule) for step in steps], "float64"),
        tensors=device.numbers(factors, "float64"), segments=device.numbers(segments, "int64"), live=live,
        epoch_stats=device.zeros(1, "float64") if epoch_stats is None else epoch_stats,
        M=call.batch, depth=len(table), trained=len(first.segments), work_size=work.stride, size=params.shape[1],
        rows_size=rows.shape[1], rates_size=arenas["rates"].shape[1] * RATE_COLUMNS, stored=int(stored),
        shadowed=int(shadowed), **_order(op, first, stored), **target_arguments(device, output),
        lowest=min(first.backward, default=len(table) - 1), arrived=device.zeros(1, "int64"),
        partials=device.zeros(-(-call.batch // tile.output_rows) * PARTIALS.value, "float64"),
        copies=device.zeros(programs * HYPER, "float64"),
    )  # fmt: skip
    if call.plan == "chip" and first.loss.ignore_index is None:
        # no label
        arguments |= {"ignored_low": -1, "ignored_high": -1}
    launches: dict[int, Run] = {}
    listed: list[list[int]] = []

    # the kernel has only the distances between x and the values: this keeps their memory alive
    def run(times: Sequence[int], _kept: Any = (calls, work)) -> None:
        if len(times) != models:
            raise ArgumentError(f"{op}: expected the steps of each of {models} models, got {len(times)} numbers")
        entries = [[model, number, epochs] for model, number in enumerate(times) if number > 0]
        if not entries:
            return
        if entries != listed:
            device.upload(live[: len(entries)], torch.tensor(entries))
            listed[:] = entries
        if len(entries) not in launches:
            launches[len(entries)] = device.launch(kernel, programs or len(entries), arguments, constants, tile)
        launches[len(entries)]()

    return run


@binds("train_fleet")
def bind_train_fleet(device: TritonDevice, call: SimpleNamespace) -> Callable[[Sequence[int]], object]:
    """The contract's ``train_fleet``."""
    return _bind(device, "train_fleet", call)


@binds("train_resident")
def bind_train_resident(device: TritonDevice, call: SimpleNamespace) -> Callable[[int], object]:
    """The contract's ``train_resident``: a fleet of one."""
    call.calls, call.rows = [call.calls], call.rows[None]
    call.arenas = {name: arena[None] for name, arena in call.arenas.items()}
    call.epoch_stats = None if call.epoch_stats is None else call.epoch_stats[None]
    run = _bind(device, "train_resident", call)
    return lambda steps: run((steps,))
