"""Binding the calls of one layer, ``linear`` and ``grad_input``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fusemlp_kernels.checks import binds
from fusemlp_kernels.contract import ACTIVATIONS, NEEDS_Z, Dropout
from fusemlp_kernels.cupy.device import Array, Device, Run, in_sequence, nothing
from fusemlp_kernels.cupy.products import bind_copy, bind_product, lane_blocks, transposed, usable
from fusemlp_kernels.philox import seed_key, threshold


def activation_fields(call: SimpleNamespace) -> dict[str, Any]:
    """Return the kernels' fields for an activation."""
    learned = call.activation == "prelu"
    return {
        "activation": ACTIVATIONS.index(call.activation), "slope": call.slope,
        "slope_param": call.slope_param if learned else None,
    }  # fmt: skip


def dropout_fields(dropout: Dropout | None) -> dict[str, Any]:
    """Return the kernels' fields for the mask of a layer."""
    if dropout is None:
        return {"keep_scale": 1.0, "kept_share": 1.0}
    key0, key1 = seed_key(dropout.seed)
    least = threshold(dropout.rate)
    share = 1.0 - dropout.rate
    return {
        "layer": dropout.layer, "key0": key0, "key1": key1, "threshold": least, "kept_share": share,
        # a rate that rounds to one drops everything
        "keep_scale": 0.0 if least == 1 << 16 else 1.0 / share,
    }  # fmt: skip


def bind_batch(device: Device, call: SimpleNamespace, rows: Array | None) -> tuple[Array, Run]:
    """Return the batch (M, K) as an array, and the run that copies x[rows] there."""
    if rows is None:
        return call.x, nothing
    gathered = device.matrix((call.M, call.K), "compute") if call.gathered is None else call.gathered
    return gathered, bind_copy(device, call.x, gathered, rows, call.counters)


def product_place(device: Device, wanted: Array) -> Array:
    """Return the array of a float32 product: ``wanted`` itself, if cuBLAS can write it."""
    return wanted if wanted.dtype == device.dtypes["real"] and usable(wanted) else device.product_room(*wanted.shape)


@binds("linear", without=["keep"])
def bind_linear(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``linear``: a product, and a kernel after it."""
    batch, gather = bind_batch(device, call, call.rows)
    product = product_place(device, call.y)
    after = device.launch(
        "layers", "forward", lane_blocks(call.M, call.N), product=product if call.K else None, bias=call.b,
        z=call.z if call.activation in NEEDS_Z else None, out=call.y, counters=call.counters, rows=call.M,
        columns=call.N, **activation_fields(call), **dropout_fields(call.dropout),
    )  # fmt: skip
    return in_sequence([gather, bind_product(device, product, batch, transposed(call.w)), after])


@binds("grad_input", without=["keep"])
def bind_grad_input(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``grad_input``: a product, and a kernel after it."""
    out, blocks = call.dz_prev, lane_blocks(call.M, call.K)
    learned: dict[str, Any] = {}
    if call.activation == "prelu":
        if blocks == 0:
            return device.clear(call.dslope)
        partials = device.allocate(blocks, "float64")
        learned = {"dslope": call.dslope, "partials": partials, "ticket": device.allocate(1, "uint32")}
    if call.activation == "identity" and call.dropout is None and call.N and usable(out):
        # cuBLAS rounds its float32 sums once, also to float16; before any other kernel that would be a second rounding
        return bind_product(device, out, call.dz, call.w)
    product = product_place(device, out)
    multiply = bind_product(device, product, call.dz, call.w)
    after = device.launch(
        "layers", "backward", blocks, product=product if call.N else None, out=out,
        source=call.z if call.activation in NEEDS_Z else call.y, **learned, counters=call.counters, rows=call.M,
        columns=call.K, **activation_fields(call), **dropout_fields(call.dropout),
    )  # fmt: skip
    return in_sequence([multiply, after])
