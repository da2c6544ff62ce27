"""Binding the calls of members that share weights: kernels for their own factors, a product of each member's head."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from fusemlp_kernels.checks import binds, members_of
from fusemlp_kernels.contract import ACTIVATIONS
from fusemlp_kernels.cupy.device import Array, Device, Run, in_sequence, strides_of
from fusemlp_kernels.cupy.layers import dropout_fields, product_place
from fusemlp_kernels.cupy.products import bind_product, lane_blocks, transposed
from fusemlp_kernels.cupy.tables import COLUMNS, PART_ROWS
from fusemlp_kernels.cupy.updates import bind_gradients


def _own(given: SimpleNamespace) -> dict[str, Any]:
    """Return the fields of ``affine_members`` and of its way back."""
    return {
        **{name: getattr(given, name) for name in ("x", "s", "b", "r", "counters")}, "indices": given.rows,
        "rows": given.M, "columns": given.K, "members": members_of(given),
        "activation": ACTIVATIONS.index(given.activation), "slope": given.slope, **dropout_fields(given.dropout),
    }  # fmt: skip


@binds("affine_members", without=["keep"])
def bind_affine_members(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``affine_members``: one launch."""
    return device.launch("members", "affine", lane_blocks(given.M, given.K), out=given.y, **_own(given))


@binds("grad_affine_members", without=["keep"])
def bind_grad_affine_members(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``grad_affine_members``: one launch."""
    fields = _own(given)
    blocks = fields["members"] * -(-given.K // COLUMNS)
    parts = max(1, -(-(given.M // fields["members"]) // PART_ROWS))
    return device.launch(
        "members", "grad_affine", blocks * parts, dy=given.dy, out=given.dx, ds=given.ds, db=given.db, dr=given.dr,
        sums=device.allocate(blocks * parts * 3 * COLUMNS, "real"), tickets=device.allocate(blocks, "uint32"),
        parts=parts, accumulate=given.rule.accumulate, **fields,
    )  # fmt: skip


def _rows_of(array: Array, members: int) -> list[Array]:
    """Return the rows of the batch of each member, views."""
    return [array[member::members] for member in range(members)]


def _weights_of(array: Array, members: int) -> list[Array]:
    """Return each member's own rows, which lie together, views."""
    own = len(array) // members
    return [array[member * own : (member + 1) * own] for member in range(members)]


def _products(device: Device, product: Array, batch: Array, weights: list[Array]) -> list[Run]:
    """Return the products of each member's rows of the batch with its weights."""
    places = (_rows_of(array, len(weights)) for array in (product, batch))
    return [bind_product(device, *arrays) for arrays in zip(*places, weights, strict=True)]


def _finished(device: Device, product: Array, out: Array, bias: Array | None, members: int) -> Run:
    """Return the run of out = product, with ``bias`` (members, columns) added to the rows of each."""
    rows, columns = out.shape
    return device.launch(
        "members", "affine", lane_blocks(rows, columns), product=product, out=out, b=bias, rows=rows, columns=columns,
        members=members, **dropout_fields(None),
    )  # fmt: skip


@binds("linear_members")
def bind_linear_members(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``linear_members``: a product of each member, and a kernel after them."""
    members, n = members_of(given, given.N), given.N
    product = product_place(device, given.z)
    weights = [transposed(own) for own in _weights_of(given.w, members)]
    runs = _products(device, product, given.x, weights)
    (step,) = strides_of(given.b)
    bias = device.strided(given.b, 0, (members, n), (n * step, step))
    return in_sequence([*runs, _finished(device, product, given.z, bias, members)])


@binds("grad_input_members")
def bind_grad_input_members(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``grad_input_members``: a product of each member; a kernel where dx is float16."""
    members = members_of(given, given.N)
    product = product_place(device, given.dx)
    runs = _products(device, product, given.dz, _weights_of(given.w, members))
    if product is not given.dx:
        runs.append(_finished(device, product, given.dx, None, members))
    return in_sequence(runs)


@binds("grad_weight_members")
def bind_grad_weight_members(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``grad_weight_members`` as ``grad_weight`` of layers, each a member."""
    members = members_of(given, given.N)
    dw, db = ([None] * members if out is None else _weights_of(out, members) for out in (given.dw, given.db))
    each = zip(_rows_of(given.dz, members), _rows_of(given.x, members), dw, db, strict=True)
    layers = [
        SimpleNamespace(M=given.M // members, N=given.N, K=given.K, rows=None, dz=dz, x=x, dw=own_dw, db=own_db)
        for dz, x, own_dw, own_db in each
    ]
    own = {"rule": given.rule, "counters": given.counters, "slopes": (), "norm": None}
    return bind_gradients(device, SimpleNamespace(layers=layers, **own))
