"""Binding the calls over all layers at once: ``grad_weight``, ``grad_weight_update`` and ``update``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fusemlp_kernels.contract import COUNTERS, HYPER, RATE_COLUMNS, Segment, TensorRule, UpdateRule
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.triton import clock, configs, gradients, update
from fusemlp_kernels.triton.launch import Device, Run, Tensor, in_sequence, is_aligned
from fusemlp_kernels.triton.layers import bind_advance, checked_rows

INT64, FLOAT32, FLOAT64 = torch.int64, torch.float32, torch.float64
WEIGHT, BIAS, SLOPE = 0, 1, 2
PLAIN = TensorRule()


class _Tasks:
    """The table of the grouped kernel: a row for each tensor that is trained."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.rows: list[dict[str, int]] = []
        self.rules: list[TensorRule] = []
        self.aligned = True
        self._bases: dict[str, Tensor] = {}

    def base(self, kind: str) -> Tensor:
        """What the offsets into tensors of "real" or "compute" type count from."""
        dtype = FLOAT32 if kind == "real" else self.device.compute
        return self._bases.setdefault(kind, self.device.zeros(1, dtype))

    def offset(self, tensor: Tensor) -> int:
        """The tensor's first element, in elements from the base of its type: also from one allocation to another."""
        kind = "real" if tensor.dtype == FLOAT32 else "compute"
        base = self._bases.setdefault(kind, tensor)
        distance = tensor.data_ptr() - base.data_ptr()
        return distance // tensor.element_size()

    def place(self, name: str, tensor: Tensor | None) -> dict[str, int]:
        """Where a matrix or vector lies; a vector's elements are its rows."""
        if tensor is None:
            return {name: 0, f"{name}_row": 0, f"{name}_col": 0}
        matrix = tensor.dim() == 2
        offset = self.offset(tensor)
        # the kernel takes it that offsets are multiples of 8 elements: of 32 bytes in fp32, where addresses are of 16
        self.aligned &= offset % 8 == 0 and (is_aligned(tensor) if matrix else tensor.data_ptr() % 16 == 0)
        return {
            name: offset,
            f"{name}_row": tensor.stride(0),
            f"{name}_col": tensor.stride(1) if matrix else 0,
        }

    def add(self, rule: TensorRule, **fields: int) -> None:
        """One task. The fast path reckons one set of offsets for a matrix and all that goes with it."""
        pitches = {fields[f"{name}_row"] for name in ("p", "s0", "s1", "shadow") if fields.get(f"{name}_row")}
        self.aligned &= fields["kind"] != WEIGHT or len(pitches) <= 1
        self.rows.append(fields)
        self.rules.append(rule)

    def tables(self, tile: configs.Tile) -> tuple[Tensor, Tensor, int]:
        """The int64 table, the float64 table, and the number of tiles."""
        first, table = 0, []
        for row in self.rows:
            table.append([{"first_tile": first, **row}.get(name, 0) for name in gradients.TASK_FIELDS])
            first += tile.count(row["N"], row["K"]) if row["kind"] == WEIGHT else -(-row["N"] // tile.rows)
        numbers = torch.tensor(table or [[0] * len(gradients.TASK_FIELDS)], dtype=INT64, device=self.device.device)
        rules = [[rule.lr_factor, rule.weight_decay] for rule in self.rules] or [[0.0, 0.0]]
        return numbers, torch.tensor(rules, dtype=FLOAT64, device=self.device.device), first


def _batch_size(layers: Sequence[Mapping[str, Any]], op: str, device: Device) -> int:
    for layer in layers:
        return len(device.check(op, "layers: dz", layer["dz"], (None, None), device.compute))
    return 0


def _states(device: Device, op: str, name: str, param: Tensor, states: Sequence[Tensor], rule: UpdateRule) -> None:
    if len(states) != rule.state_count:
        raise ArgumentError(f"{op}: {name}: {rule.kind} keeps {rule.state_count} arrays of state, got {len(states)}")
    for state in states:
        device.check_written(op, name, state, tuple(param.shape), FLOAT32)


def _collect(
    device: Device,
    op: str,
    layers: Sequence[Mapping[str, Any]],
    slopes: Sequence[Mapping[str, Any]],
    rule: UpdateRule,
    counters: Tensor,
    *,
    updates: bool,
) -> tuple[_Tasks, Tensor | None, int, list[tuple[int, int]]]:
    """The tasks, the rows of the batch, its size, and the shapes of the weights."""
    tasks, rows, shapes = _Tasks(device), None, []
    m = _batch_size(layers, op, device)
    names = ("w", "b") if updates else ("dw", "db")
    for index, layer in enumerate(layers):
        where = f"layers[{index}]: "
        dz, x, given = layer["dz"], layer["x"], layer.get("rows")
        n = device.check(op, f"{where}dz", dz, (m, None), device.compute).shape[1]
        k = device.check(op, f"{where}x", x, (m if given is None else None, None), device.compute).shape[1]
        if given is not None:
            rows = checked_rows(device, op, f"{where}rows", given, counters, m)
        for kind, name in ((WEIGHT, names[0]), (BIAS, names[1])):
            tensor = layer[name]
            if tensor is None:
                continue
            device.check_written(op, f"{where}{name}", tensor, (n, k) if kind == WEIGHT else (n,), FLOAT32)
            states: Sequence[Tensor] = ()
            shadow = None
            if updates:
                states = layer[f"{name}_state"]
                _states(device, op, f"{where}{name}_state", tensor, states, rule)
                shadow = layer.get("w_shadow") if kind == WEIGHT else None
                if shadow is not None:
                    device.check_written(op, f"{where}w_shadow", shadow, (n, k), device.compute)
            first, second = (*states, None, None)[:2]
            if kind == WEIGHT:
                shapes.append((n, k))
            tasks.add(
                layer[f"{name}_rule"] if updates else PLAIN,
                kind=kind, N=n, K=k, gather=int(given is not None),
                **tasks.place("dz", dz), **tasks.place("x", x), **tasks.place("p", tensor),
                **tasks.place("s0", first), **tasks.place("s1", second), **tasks.place("shadow", shadow),
                shadowed=int(shadow is not None),
            )  # fmt: skip
    for index, slope in enumerate(slopes):
        where = f"slopes[{index}]: "
        target = slope["param"] if updates else slope["grad"]
        device.check(op, f"{where}dslope", slope["dslope"], (1,), FLOAT32)
        device.check_written(op, f"{where}{'param' if updates else 'grad'}", target, (1,), FLOAT32)
        states = slope["state"] if updates else ()
        if updates:
            _states(device, op, f"{where}state", target, states, rule)
        first, second = (*states, None, None)[:2]
        tasks.add(
            slope["rule"] if updates else PLAIN,
            kind=SLOPE, N=1, K=1, **tasks.place("x", slope["dslope"]), **tasks.place("p", target),
            **tasks.place("s0", first), **tasks.place("s1", second),
        )  # fmt: skip
    return tasks, rows, m, shapes


def _launch(
    device: Device,
    tasks: _Tasks,
    rows: Tensor | None,
    m: int,
    shapes: list[tuple[int, int]],
    *,
    rule: UpdateRule,
    hyper: Tensor | None,
    rates: Tensor | None,
    counters: Tensor,
    norm: Tensor | None,
    updates: bool,
    parts: int = 1,
    part: int = 0,
) -> tuple[Run, int]:
    """The grouped launch and how many programs it has."""
    arch = device.arch
    if tasks.aligned:
        tile = configs.weight_tile(arch, device.precision, tuple(shapes))
    else:
        tile = configs.general_tile(arch)
    table, tensors, tiles = tasks.tables(tile)
    programs = tiles * parts
    arguments = {
        "compute": device.far_base(tasks.base("compute" if device.compute != FLOAT32 else "real")),
        "real": device.far_base(tasks.base("real")),
        "rows": device.zeros(1, INT64) if rows is None else rows, "table": table, "tensors": tensors,
        "hyper": device.zeros(HYPER, FLOAT64) if hyper is None else hyper,
        "rates": device.zeros(RATE_COLUMNS, FLOAT64) if rates is None else rates,
        "rule": device.floats(clock.rule_values(rule), FLOAT64), "counters": counters,
        "partials": device.zeros(programs, FLOAT64), "norm": device.zeros(1, FLOAT64) if norm is None else norm,
        "ticket": device.zeros(1, torch.int32),
        "M": m, "tasks": len(tasks.rows), "programs": programs, "splits": parts, "part": part,
        "wants_norm": int(norm is not None),
    }  # fmt: skip
    constants = {
        "BN": tile.rows, "BK": tile.columns, "BM": tile.depth, "PRODUCT": device.product, "ALIGNED": tasks.aligned,
        "UPDATES": updates, "RULE": rule.code if updates else 0,
        "TASKS": configs.table_length(len(tasks.rows)), "PARTS": tile.parts,
    }  # fmt: skip
    return device.launch(gradients.grad_weight_kernel, programs, arguments, constants, tile), programs


def _check_parts(op: str, parts: int, part: int, rule: UpdateRule, norm: Tensor | None) -> None:
    if parts > 1 and (rule.accumulate > 1 or rule.clip_norm is not None or norm is not None):
        raise ArgumentError(
            f"{op}: parts: a batch in {parts} parts has no gradient to accumulate, nor the norm of one; use parts=1"
        )
    if parts < 1 or (parts > 1 and part % 8):
        raise ArgumentError(f"{op}: parts, part: expected parts >= 1, part a multiple of 8; got {parts} and {part}")


def bind_grad_weight(
    device: Device,
    *,
    layers: Sequence[Mapping[str, Any]],
    slopes: Sequence[Mapping[str, Any]] = (),
    rule: UpdateRule,
    counters: Tensor,
    norm: Tensor | None = None,
    parts: int = 1,
    part: int = 0,
) -> Run:
    """The contract's ``grad_weight``."""
    op = "grad_weight"
    _check_parts(op, parts, part, rule, norm)
    device.check(op, "counters", counters, (COUNTERS,), INT64)
    if norm is not None:
        device.check(op, "norm", norm, (1,), FLOAT64)
    found = _collect(device, op, layers, slopes, rule, counters, updates=False)
    run, programs = _launch(
        device,
        *found,
        rule=rule,
        hyper=None,
        rates=None,
        counters=counters,
        norm=norm,
        updates=False,
        parts=parts,
        part=part,
    )
    return norm.zero_ if programs == 0 and norm is not None else run


def bind_grad_weight_update(
    device: Device,
    *,
    layers: Sequence[Mapping[str, Any]],
    slopes: Sequence[Mapping[str, Any]] = (),
    rule: UpdateRule,
    hyper: Tensor,
    rates: Tensor,
    counters: Tensor,
) -> Run:
    """The contract's ``grad_weight_update``."""
    op = "grad_weight_update"
    device.check(op, "counters", counters, (COUNTERS,), INT64)
    device.check(op, "hyper", hyper, (HYPER,), FLOAT64)
    device.check(op, "rates", rates, (None, RATE_COLUMNS), FLOAT64)
    if rule.clip_norm is not None or rule.accumulate != 1:
        raise ArgumentError(
            f"{op}: rule: clipping and accumulation need the gradients in memory; use grad_weight and update"
        )
    found = _collect(device, op, layers, slopes, rule, counters, updates=True)
    run, programs = _launch(
        device, *found, rule=rule, hyper=hyper, rates=rates, counters=counters, norm=None, updates=True
    )
    if programs:
        return run
    # nothing to train, or no elements in it: the clock goes on all the same
    return bind_advance(device, rule=rule, hyper=hyper, rates=rates, counters=counters)


def bind_update(
    device: Device,
    *,
    params: Tensor,
    grads: Tensor,
    states: Sequence[Tensor],
    segments: Sequence[Segment],
    rule: UpdateRule,
    hyper: Tensor,
    rates: Tensor,
    counters: Tensor,
    norm: Tensor | None = None,
    shadow: Tensor | None = None,
    scaled: bool = False,
    parts: int = 1,
    part: int = 0,
) -> Run:
    """The contract's ``update``."""
    op = "update"
    _check_parts(op, parts, part, rule, norm)
    device.check_written(op, "params", params, (None,), FLOAT32)
    size = tuple(params.shape)
    device.check(op, "grads", grads, size, FLOAT32)
    _states(device, op, "states", params, states, rule)
    device.check(op, "hyper", hyper, (HYPER,), FLOAT64)
    device.check(op, "rates", rates, (None, RATE_COLUMNS), FLOAT64)
    device.check(op, "counters", counters, (COUNTERS,), INT64)
    for name, arena in (("params", params), ("grads", grads), *(("states", state) for state in states)):
        if not arena.is_contiguous():
            raise ArgumentError(f"{op}: {name}: expected a flat contiguous arena, got stride {arena.stride(0)}")
    if shadow is not None:
        device.check_written(op, "shadow", shadow, size, device.compute)
    tile = configs.SWEEP
    before: list[Run] = []
    if norm is not None:
        device.check(op, "norm", norm, (1,), FLOAT64)
    elif rule.clip_norm is not None or scaled:
        norm = device.zeros(1, FLOAT64)
        before.append(_bind_norm(device, grads, norm, tile))
    first, table = 0, []
    for segment in segments:
        row = {"first_tile": first, "kind": 3, "N": segment.size, "K": 1, "p": segment.offset}
        table.append([row.get(name, 0) for name in gradients.TASK_FIELDS])
        first += -(-segment.size // tile.columns)
    rules = [[segment.rule.lr_factor, segment.rule.weight_decay] for segment in segments]
    values = device.floats(clock.rule_values(rule, scaled=scaled), FLOAT64)
    if first == 0:
        clock_only = {"counters": counters, "hyper": hyper, "rates": rates, "rule": values}
        return device.launch(clock.advance_kernel, 1, clock_only, {}, configs.SMALL)
    spare = states[0] if states else params
    arguments: dict[str, Any] = {
        "parameters": params, "grads": grads, "first": spare, "second": states[-1] if states else spare,
        "shadow": params if shadow is None else shadow, "norm": hyper if norm is None else norm,
        "table": torch.tensor(table, dtype=INT64, device=device.device),
        "tensors": torch.tensor(rules, dtype=FLOAT64, device=device.device),
        "hyper": hyper, "rates": rates, "rule": values, "counters": counters, "ticket": device.zeros(1, torch.int32),
        "tasks": len(table), "programs": first, "parts": parts, "part": part, "shadowed": int(shadow is not None),
    }  # fmt: skip
    constants = {
        "BLOCK": tile.columns,
        "RULE": rule.code,
        "TASKS": configs.table_length(len(table)),
    }
    return in_sequence([*before, device.launch(update.update_kernel, first, arguments, constants, tile)])


def _bind_norm(device: Device, grads: Tensor, norm: Tensor, tile: configs.Tile) -> Run:
    programs = -(-grads.numel() // tile.columns)
    arguments = {
        "grads": grads, "norm": norm, "partials": device.zeros(programs, FLOAT64),
        "ticket": device.zeros(1, torch.int32), "size": grads.numel(), "programs": programs,
    }  # fmt: skip
    return device.launch(update.norm_kernel, programs, arguments, {"BLOCK": tile.columns}, tile)
