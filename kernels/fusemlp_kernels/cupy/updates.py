"""Binding the calls over all layers at once: ``grad_weight``, ``grad_weight_update``, ``update``, ``advance``."""

from __future__ import annotations

from types import SimpleNamespace

from fusemlp_kernels.checks import binds
from fusemlp_kernels.cupy.device import Array, Device, Run, in_sequence
from fusemlp_kernels.cupy.products import bind_product, transposed
from fusemlp_kernels.cupy.tables import PLAIN, Sums, Tensors
from fusemlp_kernels.errors import ArgumentError

_NO_PARTS = ["parts", "part"]


def _batch(op: str, index: int, layer: SimpleNamespace) -> Array:
    """Return a layer's inputs; ``linear`` has gathered an x that is picked by row."""
    x = layer.x if layer.rows is None else layer.gathered
    if x is None:
        raise ArgumentError(f"{op}: layers[{index}]: gathered: expected the rows that linear has gathered, got None")
    return x


def _bind_weight(device: Device, op: str, index: int, layer: SimpleNamespace, out: Array, scalars: Array | None) -> Run:
    """Return the product of a weight's gradient, dz.T @ x."""
    return bind_product(device, out, transposed(layer.dz), _batch(op, index, layer), scalars)


@binds("grad_weight", without=_NO_PARTS)
def bind_grad_weight(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``grad_weight``: a product for each weight, and one kernel for all biases and slopes."""
    sums, tensors = Sums(device, given), Tensors(device, given)
    # while gradients accumulate, beta is a number on the card
    scalars = sums.pair(PLAIN) if given.rule.accumulate > 1 else None
    products: list[Run] = []
    for index, layer in enumerate(given.layers):
        if layer.dw is not None:
            products.append(_bind_weight(device, "grad_weight", index, layer, layer.dw, scalars))
            tensors.add(PLAIN, layer.dw)
        if layer.db is not None:
            sums.add(PLAIN, layer.db, dz=layer.dz)
            tensors.add(PLAIN, layer.db)
    for slope in given.slopes:
        sums.add(PLAIN, slope.grad, given=slope.dslope)
        tensors.add(PLAIN, slope.grad)
    runs = [sums.bind(sgd=False), *products]
    if given.norm is not None:
        runs.append(tensors.bind_norm(given.norm))
    return in_sequence(runs)


@binds("grad_weight_update")
def bind_grad_weight_update(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``grad_weight_update``.

    Under plain gradient descent the product is the update of the weights: alpha is -rate and beta 1 - rate * decay, on
    the card. Otherwise, and if the weights have a rounded copy, the gradients pass through memory of the call's own.
    """
    sums, tensors = Sums(device, given), Tensors(device, given)
    plain = given.rule.name == "sgd" and not given.rule.ema and all(layer.w_shadow is None for layer in given.layers)
    products: list[Run] = []
    for index, layer in enumerate(given.layers):
        if layer.w is not None:
            out, scalars = layer.w, None
            if plain:
                scalars = sums.pair(layer.w_rule)
            else:
                out = device.matrix((layer.N, layer.K))
                tensors.add(layer.w_rule, out, layer.w, layer.w_state, layer.w_shadow)
            products.append(_bind_weight(device, "grad_weight_update", index, layer, out, scalars))
        if layer.b is not None and plain:
            sums.add(layer.b_rule, layer.b, dz=layer.dz)
        elif layer.b is not None:
            gradient = device.allocate(layer.N, "real")
            sums.add(PLAIN, gradient, dz=layer.dz)
            tensors.add(layer.b_rule, gradient, layer.b, layer.b_state)
    for slope in given.slopes:
        if plain:
            sums.add(slope.rule, slope.param, given=slope.dslope)
        else:
            tensors.add(slope.rule, slope.dslope, slope.param, slope.state)
    return in_sequence([sums.bind(sgd=plain), *products, *([] if plain else [tensors.bind_update()])])


@binds("update", without=[*_NO_PARTS, "noise", "rows"])
def bind_update(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``update``: one launch, and one for the norm if it is needed and not given."""
    before: list[Run] = []
    norm = given.norm
    if norm is None and (given.rule.clip_norm is not None or given.scaled):
        norm = device.allocate(1, "float64")
        whole = Tensors(device, given)
        whole.add(PLAIN, given.grads)
        before.append(whole.bind_norm(norm))
    tensors = Tensors(device, given)
    for segment in given.segments:
        stretch = slice(segment.offset, segment.offset + segment.size)
        grads, params, shadow, *states = (
            None if arena is None else arena[stretch]
            for arena in (given.grads, given.params, given.shadow, *given.states)
        )
        tensors.add(segment.rule, grads, params, states, shadow)
    return in_sequence([*before, tensors.bind_update(norm, scaled=given.scaled)])


@binds("advance")
def bind_advance(device: Device, given: SimpleNamespace) -> Run:
    """Bind the contract's ``advance``: the update of no tensors."""
    return Tensors(device, given).bind_update()
