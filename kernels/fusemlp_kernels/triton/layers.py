"""Binding the calls of one layer: ``linear``, ``grad_input``, ``loss_grad`` and ``linear_loss_grad``."""

from __future__ import annotations

from typing import Any

import torch

from fusemlp_kernels.contract import (
    ACTIVATIONS,
    COUNTERS,
    HYPER,
    LOSSES,
    NEEDS_Z,
    RATE_COLUMNS,
    STATS,
    Dropout,
    LossSpec,
)
from fusemlp_kernels.errors import ArgumentError, unknown_name
from fusemlp_kernels.ops import hands_on
from fusemlp_kernels.philox import seed_key, threshold
from fusemlp_kernels.triton import clock, configs, gradients, linear, loss
from fusemlp_kernels.triton.launch import Device, Run, Tensor, in_sequence, is_aligned, signed

INT64, FLOAT32, FLOAT64 = torch.int64, torch.float32, torch.float64


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    return {f"{name}_row": tensor.stride(0), f"{name}_col": tensor.stride(1)}


def _activation(device: Device, op: str, name: str, slope: float, slope_param: Tensor | None, spare: Tensor) -> Any:
    """The kernels' arguments for an activation; ``spare`` is any float32 tensor."""
    if name not in ACTIVATIONS:
        raise unknown_name(f"{op}: activation", name, ACTIVATIONS)
    if name == "prelu":
        if slope_param is None:
            raise ArgumentError(f"{op}: slope_param: prelu needs its slope, a tensor of shape (1,); got None")
        device.check(op, "slope_param", slope_param, (1,), FLOAT32)
    return {
        "activation": ACTIVATIONS.index(name),
        "slope": float(slope),
        "slope_param": slope_param if name == "prelu" else spare,
    }


def _dropout(op: str, dropout: Dropout | None, counters: Tensor | None) -> dict[str, Any]:
    if dropout is not None and counters is None:
        raise ArgumentError(f"{op}: counters: dropout needs them, since the mask depends on the batch; got None")
    return dropout_numbers(dropout)


def dropout_numbers(dropout: Dropout | None) -> dict[str, Any]:
    """What the kernels are told of a layer's dropout; threshold 0 where there is none."""
    if dropout is None:
        return {"layer": 0, "key0": 0, "key1": 0, "threshold": 0, "keep_scale": 1.0}
    key0, key1 = seed_key(dropout.seed)
    least = threshold(dropout.rate)
    # a rate that rounds to one drops everything
    scale = 0.0 if least == 1 << 16 else 1.0 / (1.0 - dropout.rate)
    return {
        "layer": dropout.layer,
        "key0": signed(key0),
        "key1": signed(key1),
        "threshold": least,
        "keep_scale": scale,
    }


def checked_rows(device: Device, op: str, name: str, rows: Tensor, counters: Tensor | None, m: int) -> Tensor:
    """The row numbers of a batch of ``m``, or of several batches one behind the other."""
    device.check(op, name, rows, (None,), INT64)
    if (len(rows) % m if m else len(rows)) or not rows.is_contiguous():
        raise ArgumentError(
            f"{op}: {name}: expected a contiguous tensor of {m} row numbers, or of several batches of {m}; got "
            f"{len(rows)} with stride {rows.stride(0)}"
        )
    if counters is None:
        raise ArgumentError(f"{op}: counters: {name} needs them, since they say where the batch begins; got None")
    return rows


def bind_linear(
    device: Device,
    *,
    x: Tensor,
    w: Tensor,
    b: Tensor,
    y: Tensor,
    activation: str,
    slope: float = 0.0,
    slope_param: Tensor | None = None,
    z: Tensor | None = None,
    rows: Tensor | None = None,
    dropout: Dropout | None = None,
    counters: Tensor | None = None,
) -> Run:
    """The contract's ``linear``."""
    op, compute = "linear", device.compute
    n, k = device.check(op, "w", w, (None, None), compute).shape
    device.check(op, "b", b, (n,), FLOAT32)
    m = len(device.check_written(op, "y", y, (None, n), compute))
    device.check(op, "x", x, (m if rows is None else None, k), compute)
    if counters is not None:
        device.check(op, "counters", counters, (COUNTERS,), INT64)
    if rows is not None:
        checked_rows(device, op, "rows", rows, counters, m)
    keeps_z = z is not None and activation in NEEDS_Z
    if z is not None:
        device.check_written(op, "z", z, (m, n), compute)
    spare = device.zeros(1, INT64)
    saved = z if z is not None and keeps_z else y
    aligned = all(map(is_aligned, (x, w, y, saved)))
    tile = configs.forward_tile(device.arch, device.precision, m, n) if aligned else configs.general_tile(device.arch)
    arguments = {
        "x": x, "w": w, "b": b, "y": y, "z": saved, "rows": spare if rows is None else rows,
        "counters": spare if counters is None else counters,
        "M": m, "N": n, "K": k, **_strides("x", x), **_strides("w", w), "b_step": b.stride(0), **_strides("y", y),
        **_strides("z", saved), "gather": int(rows is not None), "store_z": int(keeps_z),
        **_activation(device, op, activation, slope, slope_param, b), **_dropout(op, dropout, counters),
    }  # fmt: skip
    constants = {
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "PRODUCT": device.product, "ALIGNED": aligned,
        "PARTS": tile.parts,
    }  # fmt: skip
    return device.launch(linear.linear_kernel, tile.count(m, n), arguments, constants, tile)


def bind_grad_input(
    device: Device,
    *,
    dz: Tensor,
    w: Tensor,
    y: Tensor,
    dz_prev: Tensor,
    activation: str,
    slope: float = 0.0,
    slope_param: Tensor | None = None,
    z: Tensor | None = None,
    dropout: Dropout | None = None,
    counters: Tensor | None = None,
    dslope: Tensor | None = None,
) -> Run:
    """The contract's ``grad_input``."""
    op, compute = "grad_input", device.compute
    n, k = device.check(op, "w", w, (None, None), compute).shape
    m = len(device.check(op, "dz", dz, (None, n), compute))
    device.check(op, "y", y, (m, k), compute)
    device.check_written(op, "dz_prev", dz_prev, (m, k), compute)
    if activation in NEEDS_Z:
        if z is None:
            raise ArgumentError(f"{op}: z: the derivative of {activation} needs the pre-activation; got None")
        device.check(op, "z", z, (m, k), compute)
        y = z
    if activation == "prelu":
        if dslope is None:
            raise ArgumentError(f"{op}: dslope: prelu's gradient needs a tensor of shape (1,); got None")
        device.check_written(op, "dslope", dslope, (1,), FLOAT32)
    if counters is not None:
        device.check(op, "counters", counters, (COUNTERS,), INT64)
    aligned = all(map(is_aligned, (dz, w, y, dz_prev)))
    tile = configs.forward_tile(device.arch, device.precision, m, k) if aligned else configs.general_tile(device.arch)
    programs = tile.count(m, k)
    spare = device.zeros(1, FLOAT32)
    arguments = {
        "dz": dz, "w": w, "y": y, "out": dz_prev, "dslope": spare if dslope is None else dslope,
        "partials": device.zeros(programs, FLOAT64), "ticket": device.zeros(1, torch.int32),
        "counters": device.zeros(1, INT64) if counters is None else counters,
        "M": m, "N": n, "K": k, **_strides("dz", dz), **_strides("w", w), **_strides("y", y),
        **_strides("out", dz_prev), "programs": programs,
        **_activation(device, op, activation, slope, slope_param, spare), **_dropout(op, dropout, counters),
        "kept_share": 1.0 if dropout is None else 1.0 - dropout.rate,
    }  # fmt: skip
    constants = {
        "BM": tile.rows, "BN": tile.depth, "BK": tile.columns, "PRODUCT": device.product, "ALIGNED": aligned,
        "PARTS": tile.parts,
    }  # fmt: skip
    run = device.launch(gradients.grad_input_kernel, programs, arguments, constants, tile)
    return dslope.zero_ if programs == 0 and dslope is not None else run


def _loss(
    device: Device,
    op: str,
    m: int,
    n: int,
    *,
    target: Tensor,
    counters: Tensor,
    stats: Tensor,
    loss: LossSpec,
    activation: str = "identity",
    slope: float = 0.0,
    slope_param: Tensor | None = None,
    dslope: Tensor | None = None,
    weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    rows: Tensor | None = None,
    hyper: Tensor | None = None,
) -> dict[str, Any]:
    """The arguments that both loss kernels have."""
    if loss.kind not in LOSSES:
        raise unknown_name(f"{op}: loss", loss.kind, LOSSES)
    entropy = loss.kind == "cross_entropy"
    if entropy and activation != "identity":
        raise ArgumentError(f"activation: cross_entropy takes logits, so it must be 'identity', got {activation!r}")
    classes = entropy and not loss.soft
    length = m if rows is None else None
    if rows is not None:
        checked_rows(device, op, "rows", rows, counters, m)
    device.check(op, "target", target, (length,) if classes else (length, n), INT64 if classes else FLOAT32)
    device.check(op, "counters", counters, (COUNTERS,), INT64)
    device.check(op, "stats", stats, (STATS,), FLOAT64)
    if weight is not None:
        device.check(op, "weight", weight, (length,), FLOAT32)
    if class_weight is not None:
        class_weight = device.check(op, "class_weight", class_weight, (n,), FLOAT32).contiguous()
    if dslope is not None:
        device.check_written(op, "dslope", dslope, (1,), FLOAT32)
    if hyper is not None:
        device.check(op, "hyper", hyper, (HYPER,), FLOAT64)
    spare, number = device.zeros(1, FLOAT32), device.zeros(1, INT64)
    ignored = 0 if loss.ignore_index is None else loss.ignore_index
    settings = loss_setting_values(loss, weighted=weight is not None, classes=class_weight is not None)
    return {
        "rows": number if rows is None else rows, "gather": int(rows is not None),
        "labels": target if classes else number, "label_step": target.stride(0) if classes else 0,
        "target": spare if classes else target,
        "target_row": 0 if classes else target.stride(0), "target_col": 0 if classes else target.stride(1),
        "weight": spare if weight is None else weight, "weight_step": 0 if weight is None else weight.stride(0),
        "class_weight": spare if class_weight is None else class_weight,
        "dslope": spare if dslope is None else dslope, "stats": stats, "counters": counters,
        "settings": device.floats(settings, FLOAT32),
        "hyper": device.zeros(HYPER, FLOAT64) if hyper is None else hyper, "scaled": int(hyper is not None),
        "ignored_low": signed(ignored), "ignored_high": signed(ignored >> 32), "M": m, "N": n,
        **_activation(device, op, activation, slope, slope_param, spare),
    }  # fmt: skip


def loss_setting_values(spec: LossSpec, *, weighted: bool, classes: bool) -> list[float]:
    """``loss.SETTING_FIELDS`` of a loss."""
    settings = {
        "kind": LOSSES.index(spec.kind), "mean": spec.reduction == "mean", "smoothing": spec.label_smoothing,
        "soft": spec.soft, "option": spec.option, "accuracy": spec.accuracy,
        "ignores": spec.ignore_index is not None, "weighted": weighted, "classes": classes,
    }  # fmt: skip
    return [float(settings[name]) for name in loss.SETTING_FIELDS]


def _without_rows(arguments: dict[str, Any]) -> Run:
    """The loss of no rows, or of no outputs, is zero."""
    return in_sequence([arguments["stats"][:1].zero_, arguments["dslope"].zero_])


def _shared(device: Device, dz: Tensor | None, m: int, n: int, op: str, programs: int, like: Tensor) -> dict[str, Any]:
    if dz is not None:
        device.check_written(op, "dz", dz, (m, n), device.compute)
    return {
        "dz": like if dz is None else dz, "store_dz": int(dz is not None),
        "dz_row": 0 if dz is None else dz.stride(0), "dz_col": 0 if dz is None else dz.stride(1),
        "partials": device.zeros(4 * programs, FLOAT64), "ticket": device.zeros(1, torch.int32), "programs": programs,
    }  # fmt: skip


@hands_on(_loss)
def bind_loss_grad(device: Device, *, z: Tensor, dz: Tensor | None, **operands: Any) -> Run:
    """The contract's ``loss_grad``."""
    op = "loss_grad"
    m, n = device.check(op, "z", z, (None, None), device.compute).shape
    arguments = _loss(device, op, m, n, **operands)
    aligned = all(is_aligned(t) for t in (z, dz) if t is not None)
    tile = configs.loss_tile(device.arch, n)
    programs = -(-m // tile.rows)
    arguments |= _shared(device, dz, m, n, op, programs, z)
    if z.numel() == 0:
        return _without_rows(arguments)
    arguments |= {"z": z, **_strides("z", z)}
    constants = {
        "BM": tile.rows, "BN": tile.columns, "ALIGNED": aligned,
        "CROSS_ENTROPY": operands["loss"].kind == "cross_entropy",
    }  # fmt: skip
    return device.launch(loss.loss_grad_kernel, programs, arguments, constants, tile)


@hands_on(_loss)
def bind_linear_loss_grad(
    device: Device,
    *,
    x: Tensor,
    w: Tensor,
    b: Tensor,
    dz: Tensor | None,
    x_rows: Tensor | None = None,
    **operands: Any,
) -> Run:
    """The contract's ``linear_loss_grad``."""
    op, compute = "linear_loss_grad", device.compute
    n, k = device.check(op, "w", w, (None, None), compute).shape
    if n > configs.WIDEST_OUTPUT:
        raise ArgumentError(
            f"{op}: w: {n} outputs are more than the {configs.WIDEST_OUTPUT} that fit a tile; "
            "use linear and loss_grad one after the other"
        )
    device.check(op, "b", b, (n,), FLOAT32)
    if dz is not None:
        m = len(device.check_written(op, "dz", dz, (None, n), compute))
    else:
        m = len(x) if x_rows is None else len(x_rows)
    device.check(op, "x", x, (m if x_rows is None else None, k), compute)
    if x_rows is not None:
        checked_rows(device, op, "x_rows", x_rows, operands.get("counters"), m)
    arguments = _loss(device, op, m, n, **operands)
    aligned = all(is_aligned(t) for t in (x, w, dz) if t is not None)
    tile = configs.output_tile(device.arch, n)
    programs = -(-m // tile.rows)
    arguments |= _shared(device, dz, m, n, op, programs, x)
    if m * n == 0:
        return _without_rows(arguments)
    arguments |= {
        "x": x, "w": w, "b": b, "x_rows": arguments["rows"] if x_rows is None else x_rows, "K": k,
        "x_gather": int(x_rows is not None), **_strides("x", x), **_strides("w", w), "b_step": b.stride(0),
    }  # fmt: skip
    constants = {
        "BM": tile.rows, "BN": tile.columns, "BK": tile.depth, "PRODUCT": device.product, "ALIGNED": aligned,
        "CROSS_ENTROPY": operands["loss"].kind == "cross_entropy",
    }  # fmt: skip
    return device.launch(loss.linear_loss_grad_kernel, programs, arguments, constants, tile)


def bind_advance(device: Device, *, rule: Any, hyper: Tensor, rates: Tensor, counters: Tensor) -> Run:
    """The contract's ``advance``."""
    device.check("advance", "hyper", hyper, (HYPER,), FLOAT64)
    device.check("advance", "rates", rates, (None, RATE_COLUMNS), FLOAT64)
    device.check("advance", "counters", counters, (COUNTERS,), INT64)
    arguments = {
        "counters": counters,
        "hyper": hyper,
        "rates": rates,
        "rule": device.floats(clock.rule_values(rule), FLOAT64),
    }
    return device.launch(clock.advance_kernel, 1, arguments, {}, configs.SMALL)
