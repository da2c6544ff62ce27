"""Binding ``loss_grad`` and ``linear_loss_grad``: one kernel reads a row and writes its gradients."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fusemlp_kernels.checks import binds
from fusemlp_kernels.contract import LOSSES, STATS
from fusemlp_kernels.cupy.device import Array, Device, Run, in_sequence
from fusemlp_kernels.cupy.layers import activation_fields, bind_batch, product_place
from fusemlp_kernels.cupy.products import bind_product, transposed

# A longer row has a block, others a warp.
LONG_ROW = 1024
ROWS_A_BLOCK = 8
# Up to this many rows, each block sums the weights of the batch; for more rows, a launch before does.
SHORT_BATCH = 1024


def launch_loss(device: Device, kernel: str, call: SimpleNamespace, z: Array, bias: Array | None = None) -> Run:
    """Return the kernel over all rows of z, and before it the normaliser of a long batch.

    Targets and weights are gathered as they are loaded.
    """
    m, n, loss = call.M, call.N, call.loss
    stats = device.allocate(STATS, "float64") if call.stats is None else call.stats
    if m * n == 0:
        # the loss of no rows, or of no outputs, is zero
        zeros = [array for array in (stats[:1], call.dslope) if array is not None]
        return in_sequence([device.clear(array) for array in zeros])
    entropy = loss.kind == "cross_entropy"
    fields: dict[str, Any] = {
        "z": z, "bias": bias, "dz": call.dz, "indices": call.rows, "counters": call.counters, "stats": stats,
        "labels" if entropy and not loss.soft else "target": call.target, "weight": call.weight,
        "class_weight": call.class_weight, "dslope": call.dslope, "hyper": call.hyper, "rows": m, "columns": n,
        "kind": LOSSES.index(loss.kind), "mean": loss.reduction != "sum", "by_row": loss.reduction == "rows",
        "soft": loss.soft, "accuracy": loss.accuracy,
        "ignores": loss.ignore_index is not None, "ignored": loss.ignore_index,
        "divisor": 1.0 if entropy else float(n), "smoothing": loss.label_smoothing, "option": loss.option,
        **activation_fields(call),
    }  # fmt: skip
    return _over_rows(device, kernel, m, n, fields)


def _over_rows(device: Device, kernel: str, m: int, n: int, fields: dict[str, Any]) -> Run:
    """Return the kernel over m rows of n columns, and before it the normaliser of a long batch."""
    blocks = m if n > LONG_ROW else -(-m // ROWS_A_BLOCK)
    fields |= {"partials": device.allocate(4 * blocks, "float64"), "ticket": device.allocate(1, "uint32")}
    before: list[Run] = []
    if m > SHORT_BATCH:
        fields["normaliser"] = device.allocate(1, "float64")
        before.append(device.launch("loss", "loss_normaliser", 1, **fields))
    name = f"{kernel}_of_long_rows" if n > LONG_ROW else kernel
    return in_sequence([*before, device.launch("loss", name, blocks, **fields)])


@binds("loss_grad", without=["ridge", "shares"])
def bind_loss_grad(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``loss_grad``."""
    return launch_loss(device, "stored_loss", call, call.z)


@binds("linear_loss_grad", without=["ridge", "shares"])
def bind_linear_loss_grad(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``linear_loss_grad``: a product, and its loss."""
    batch, gather = bind_batch(device, call, call.x_rows)
    product = device.product_room(call.M, call.N) if call.dz is None else product_place(device, call.dz)
    multiply = bind_product(device, product, batch, transposed(call.w))
    return in_sequence([gather, multiply, launch_loss(device, "product_loss", call, product, call.b)])
