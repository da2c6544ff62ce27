"""Binding the calls of one layer: ``linear`` and ``grad_input``."""

from __future__ import annotations

from typing import Any

from fusemlp_kernels.contract import ACTIVATIONS, COUNTERS, NEEDS_Z, Dropout
from fusemlp_kernels.cupy.device import FLOAT32, FLOAT64, INT64, Array, Device, Run, in_sequence, strides_of
from fusemlp_kernels.cupy.products import bind_copy, bind_product, lane_blocks, matrix
from fusemlp_kernels.errors import ArgumentError, unknown_name
from fusemlp_kernels.philox import seed_key, threshold


def activation_fields(device: Device, op: str, name: str, slope: float, slope_param: Array | None) -> dict[str, Any]:
    """The kernels' fields for an activation."""
    if name not in ACTIVATIONS:
        raise unknown_name(f"{op}: activation", name, ACTIVATIONS)
    if name == "prelu":
        if slope_param is None:
            raise ArgumentError(f"{op}: slope_param: prelu needs its slope, an array of shape (1,); got None")
        slope_param = device.check(op, "slope_param", slope_param, (1,), FLOAT32)
    return {
        "activation": ACTIVATIONS.index(name),
        "slope": slope,
        "slope_param": slope_param if name == "prelu" else None,
    }


def dropout_fields(op: str, dropout: Dropout | None, counters: Array | None) -> dict[str, Any]:
    """The kernels' fields for the mask of a layer."""
    if dropout is None:
        return {"keep_scale": 1.0}
    if counters is None:
        raise ArgumentError(f"{op}: counters: dropout needs them, since the mask depends on the batch; got None")
    key0, key1 = seed_key(dropout.seed)
    least = threshold(dropout.rate)
    # a rate that rounds to one drops everything
    scale = 0.0 if least == 1 << 16 else 1.0 / (1.0 - dropout.rate)
    return {"layer": dropout.layer, "key0": key0, "key1": key1, "threshold": least, "keep_scale": scale}


def places(**arrays: Array | None) -> dict[str, Any]:
    """The fields of matrices: an address, and the strides of rows and columns."""
    fields: dict[str, Any] = {}
    for name, array in arrays.items():
        row, column = (0, 0) if array is None else strides_of(array)
        fields |= {name: array, f"{name}_row": row, f"{name}_col": column}
    return fields


def checked_rows(
    device: Device, op: str, name: str, rows: Array, counters: Array | None, m: int
) -> tuple[Array, Array]:
    """The row numbers of a batch of ``m``, or of several batches one behind the other; and the counters."""
    rows = device.check(op, name, rows, (None,), INT64)
    if (len(rows) % m if m else len(rows)) or not rows.flags.c_contiguous:
        raise ArgumentError(
            f"{op}: {name}: expected a contiguous array of {m} row numbers, or of several batches of {m}; got "
            f"{len(rows)} with a stride of {rows.strides[0]} bytes"
        )
    if counters is None:
        raise ArgumentError(f"{op}: counters: {name} needs them, since they say where the batch begins; got None")
    return rows, checked_counters(device, op, counters)


def checked_counters(device: Device, op: str, counters: Array | None) -> Any:
    """The counters, where they are given."""
    return None if counters is None else device.check(op, "counters", counters, (COUNTERS,), INT64)


def bind_batch(
    device: Device, op: str, name: str, x: Array, rows: Array | None, gathered: Array | None, counters: Array | None,
    m: int, k: int,
) -> tuple[Array, list[Run]]:  # fmt: skip
    """The batch (M, K) as an array, and what brings x[rows] into it.

    ``gathered`` is where it is brought; without it, into room of the call's own.
    """
    x = device.check(op, "x", x, (m if rows is None else None, k), device.compute)
    if rows is None:
        return x, []
    rows, counters = checked_rows(device, op, name, rows, counters, m)
    if gathered is None:
        gathered = device.view(device.zeros(m * k, device.compute), 0, (m, k), (k, 1))
    gathered = device.check_written(op, "gathered", gathered, (m, k), device.compute)
    return gathered, [bind_copy(device, matrix(x), gathered, rows, counters)]


def product_place(device: Device, wanted: Array) -> Array:
    """Where a float32 product of the shape of ``wanted`` goes: there, where it can."""
    if wanted.dtype == FLOAT32 and matrix(wanted).usable:
        return wanted
    return device.product_room(*wanted.shape)


def bind_linear(
    device: Device,
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
) -> Run:
    """The contract's ``linear``: a product, and one kernel behind it."""
    op, compute = "linear", device.compute
    w = device.check(op, "w", w, (None, None), compute)
    n, k = w.shape
    b = device.check(op, "b", b, (n,), FLOAT32)
    y = device.check_written(op, "y", y, (None, n), compute)
    m = len(y)
    counters = checked_counters(device, op, counters)
    batch, gather = bind_batch(device, op, "rows", x, rows, gathered, counters, m, k)
    if z is not None:
        z = device.check_written(op, "z", z, (m, n), compute)
    product = product_place(device, y)
    behind = device.launch(
        "layers", "forward", "Forward", lane_blocks(m, n),
        **places(product=product if k else None, z=z if activation in NEEDS_Z else None, y=y),
        bias=b, bias_step=strides_of(b)[0], counters=counters, rows=m, columns=n,
        **activation_fields(device, op, activation, slope, slope_param), **dropout_fields(op, dropout, counters),
    )  # fmt: skip
    multiply = bind_product(device, product, matrix(batch), matrix(w, transposed=True))
    return in_sequence([*gather, multiply, behind])


def bind_grad_input(
    device: Device,
    *,
    dz: Array,
    w: Array,
    y: Array,
    dz_prev: Array,
    activation: str,
    slope: float = 0.0,
    slope_param: Array | None = None,
    z: Array | None = None,
    dropout: Dropout | None = None,
    counters: Array | None = None,
    dslope: Array | None = None,
) -> Run:
    """The contract's ``grad_input``: a product, and one kernel behind it."""
    op, compute = "grad_input", device.compute
    w = device.check(op, "w", w, (None, None), compute)
    n, k = w.shape
    dz = device.check(op, "dz", dz, (None, n), compute)
    m = len(dz)
    read = device.check(op, "y", y, (m, k), compute)
    dz_prev = device.check_written(op, "dz_prev", dz_prev, (m, k), compute)
    if activation in NEEDS_Z:
        if z is None:
            raise ArgumentError(f"{op}: z: the derivative of {activation} needs the pre-activation; got None")
        read = device.check(op, "z", z, (m, k), compute)
    learned: dict[str, Any] = {}
    blocks = lane_blocks(m, k)
    if activation == "prelu":
        if dslope is None:
            raise ArgumentError(f"{op}: dslope: prelu's gradient needs an array of shape (1,); got None")
        dslope = device.check_written(op, "dslope", dslope, (1,), FLOAT32)
        if blocks == 0:
            return device.clear(dslope)
        learned = {"dslope": dslope, "partials": device.zeros(blocks, FLOAT64), "ticket": device.zeros(1, "uint32")}
    counters = checked_counters(device, op, counters)
    product = product_place(device, dz_prev)
    multiply = bind_product(device, product, matrix(dz), matrix(w))
    if activation == "identity" and dropout is None and product is dz_prev:
        return multiply
    behind = device.launch(
        "layers", "backward", "Backward", blocks,
        **places(product=product if n else None, out=dz_prev, source=read),
        **learned, counters=counters, rows=m, columns=k, kept_share=1.0 if dropout is None else 1.0 - dropout.rate,
        **activation_fields(device, op, activation, slope, slope_param), **dropout_fields(op, dropout, counters),
    )  # fmt: skip
    return in_sequence([multiply, behind])
