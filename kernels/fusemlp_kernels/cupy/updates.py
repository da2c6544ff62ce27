"""Binding the calls over all layers at once: ``grad_weight``, ``update``, ``advance``."""

from __future__ import annotations

from types import SimpleNamespace

from fusemlp_kernels.checks import binds
from fusemlp_kernels.cupy.device import Array, Device, Run, in_sequence
from fusemlp_kernels.cupy.products import bind_product, transposed
from fusemlp_kernels.cupy.tables import PLAIN, Sums, Tensors
from fusemlp_kernels.errors import ArgumentError

_NO_PARTS = ["parts", "part"]


def _batch(index: int, layer: SimpleNamespace) -> Array:
    """Return a layer's inputs; ``linear`` has gathered an x that is picked by row."""
    x = layer.x if layer.rows is None else layer.gathered
    if x is None:
        raise ArgumentError(
            f"grad_weight: layers[{index}]: gathered: expected the rows that linear has gathered, got None"
        )
    return x


@binds("grad_weight", without=_NO_PARTS)
def bind_grad_weight(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``grad_weight``: a product for each weight, and one kernel for all biases and slopes."""
    sums, tensors = Sums(device, call), Tensors(device, call)
    # while gradients accumulate, beta is a number on the card
    scalars = device.allocate(2, "real") if call.rule.accumulate > 1 else None
    products: list[Run] = []
    for index, layer in enumerate(call.layers):
        if layer.dw is not None:
            products.append(bind_product(device, layer.dw, transposed(layer.dz), _batch(index, layer), scalars))
            tensors.add(PLAIN, layer.dw)
        if layer.db is not None:
            sums.add(layer.db, dz=layer.dz)
            tensors.add(PLAIN, layer.db)
    for slope in call.slopes:
        sums.add(slope.grad, given=slope.dslope)
        tensors.add(PLAIN, slope.grad)
    runs = [sums.bind(scalars), *products]
    if call.norm is not None:
        runs.append(tensors.bind_norm(call.norm))
    return in_sequence(runs)


@binds("update", without=[*_NO_PARTS, "noise", "rows"])
def bind_update(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``update``: one launch, and one for the norm if it is needed and not call."""
    before: list[Run] = []
    norm = call.norm
    if norm is None and (call.rule.clip_norm is not None or call.scaled):
        norm = device.allocate(1, "float64")
        whole = Tensors(device, call)
        whole.add(PLAIN, call.grads)
        before.append(whole.bind_norm(norm))
    tensors = Tensors(device, call)
    for segment in call.segments:
        stretch = slice(segment.offset, segment.offset + segment.size)
        grads, params, shadow, *states = (
            None if arena is None else arena[stretch] for arena in (call.grads, call.params, call.shadow, *call.states)
        )
        tensors.add(segment.rule, grads, params, states, shadow)
    return in_sequence([*before, tensors.bind_update(norm, scaled=call.scaled)])


@binds("advance")
def bind_advance(device: Device, call: SimpleNamespace) -> Run:
    """Bind the contract's ``advance``: the update of no tensors."""
    return Tensors(device, call).bind_update()
