"""Binding ``loss_grad`` and ``linear_loss_grad``: one kernel reads a row and writes its dz."""

from __future__ import annotations

from typing import Any

from fusemlp_kernels.contract import HYPER, LOSSES, STATS, LossSpec
from fusemlp_kernels.cupy.device import FLOAT32, FLOAT64, INT64, Array, Device, Run, in_sequence, strides_of
from fusemlp_kernels.cupy.layers import (
    activation_fields,
    bind_batch,
    checked_counters,
    checked_rows,
    places,
    product_place,
)
from fusemlp_kernels.cupy.products import bind_product, matrix
from fusemlp_kernels.errors import ArgumentError, unknown_name
from fusemlp_kernels.ops import hands_on

# Rows longer than this have a block each, others a warp.
LONG_ROW = 1024
ROWS_A_BLOCK = 8
# For so many rows every block adds up the weights of the batch for itself; more of them get a launch of their own.
SHORT_BATCH = 1024


def _loss_fields(
    device: Device,
    op: str,
    m: int,
    n: int,
    *,
    target: Array,
    counters: Array,
    stats: Array,
    loss: LossSpec,
    activation: str = "identity",
    slope: float = 0.0,
    slope_param: Array | None = None,
    dslope: Array | None = None,
    weight: Array | None = None,
    class_weight: Array | None = None,
    rows: Array | None = None,
    hyper: Array | None = None,
    target_rows: Array | None = None,
    weight_rows: Array | None = None,
) -> dict[str, Any]:
    """The kernel's fields but for where z and dz are. Targets and weights are gathered as they are loaded."""
    del target_rows, weight_rows
    if loss.kind not in LOSSES:
        raise unknown_name(f"{op}: loss", loss.kind, LOSSES)
    entropy = loss.kind == "cross_entropy"
    if entropy and activation != "identity":
        raise ArgumentError(f"activation: cross_entropy takes logits, so it must be 'identity', got {activation!r}")
    classes = entropy and not loss.soft
    length = m if rows is None else None
    counters = checked_counters(device, op, counters)
    if rows is not None:
        rows, _ = checked_rows(device, op, "rows", rows, counters, m)
    target = device.check(op, "target", target, (length,) if classes else (length, n), INT64 if classes else FLOAT32)
    if weight is not None:
        weight = device.check(op, "weight", weight, (length,), FLOAT32)
    if class_weight is not None:
        class_weight = device.check(op, "class_weight", class_weight, (n,), FLOAT32)
    if dslope is not None:
        dslope = device.check_written(op, "dslope", dslope, (1,), FLOAT32)
    if hyper is not None:
        hyper = device.check(op, "hyper", hyper, (HYPER,), FLOAT64)
    return {
        "indices": rows, "counters": counters, "stats": device.check(op, "stats", stats, (STATS,), FLOAT64),
        "labels": target if classes else None, "label_step": strides_of(target)[0] if classes else 0,
        **places(target=None if classes else target),
        "weight": weight, "weight_step": 0 if weight is None else strides_of(weight)[0],
        "class_weight": class_weight, "class_step": 0 if class_weight is None else strides_of(class_weight)[0],
        "dslope": dslope, "hyper": hyper, "rows": m, "columns": n,
        "kind": LOSSES.index(loss.kind), "mean": loss.reduction == "mean", "soft": loss.soft, "accuracy": loss.accuracy,
        "ignores": loss.ignore_index is not None, "ignored": loss.ignore_index,
        "divisor": 1.0 if entropy else float(n), "smoothing": loss.label_smoothing, "option": loss.option,
        **activation_fields(device, op, activation, slope, slope_param),
    }  # fmt: skip


def _bind_loss(device: Device, kernel: str, fields: dict[str, Any]) -> Run:
    """The kernel over all rows, and before it the normaliser where the batch is long."""
    m, n = fields["rows"], fields["columns"]
    if m * n == 0:
        # the loss of no rows, or of no outputs, is zero
        slopes = [] if fields["dslope"] is None else [device.clear(fields["dslope"])]
        return in_sequence([device.clear(fields["stats"][:1]), *slopes])
    blocks = m if n > LONG_ROW else -(-m // ROWS_A_BLOCK)
    fields |= {"partials": device.zeros(4 * blocks, FLOAT64), "ticket": device.zeros(1, "uint32")}
    before: list[Run] = []
    if m > SHORT_BATCH:
        fields["normaliser"] = device.zeros(1, FLOAT64)
        before.append(device.launch("loss", "loss_normaliser", "Loss", 1, **fields))
    name = f"{kernel}_of_long_rows" if n > LONG_ROW else kernel
    return in_sequence([*before, device.launch("loss", name, "Loss", blocks, **fields)])


@hands_on(_loss_fields)
def bind_loss_grad(device: Device, *, z: Array, dz: Array | None, **operands: Any) -> Run:
    """The contract's ``loss_grad``."""
    op = "loss_grad"
    z = device.check(op, "z", z, (None, None), device.compute)
    m, n = z.shape
    if dz is not None:
        dz = device.check_written(op, "dz", dz, (m, n), device.compute)
    return _bind_loss(device, "stored_loss", _loss_fields(device, op, m, n, **operands) | places(z=z, dz=dz))


@hands_on(_loss_fields)
def bind_linear_loss_grad(
    device: Device,
    *,
    x: Array,
    w: Array,
    b: Array,
    dz: Array | None,
    x_rows: Array | None = None,
    gathered: Array | None = None,
    **operands: Any,
) -> Run:
    """The contract's ``linear_loss_grad``: a product, and the loss of what it leaves."""
    op, compute = "linear_loss_grad", device.compute
    w = device.check(op, "w", w, (None, None), compute)
    n, k = w.shape
    b = device.check(op, "b", b, (n,), FLOAT32)
    if dz is not None:
        dz = device.check_written(op, "dz", dz, (None, n), compute)
        m = len(dz)
    else:
        m = len(x) if x_rows is None else len(x_rows)
    batch, gather = bind_batch(device, op, "x_rows", x, x_rows, gathered, operands.get("counters"), m, k)
    product = device.product_room(m, n) if dz is None else product_place(device, dz)
    fields = _loss_fields(device, op, m, n, **operands)
    fields |= places(z=product, dz=dz) | {"bias": b, "bias_step": strides_of(b)[0]}
    multiply = bind_product(device, product, matrix(batch), matrix(w, transposed=True))
    return in_sequence([*gather, multiply, _bind_loss(device, "product_loss", fields)])
