"""Binding the calls over all layers at once: ``grad_weight``, ``grad_weight_update`` and ``update``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusemlp_kernels.contract import Segment, TensorRule, UpdateRule
from fusemlp_kernels.cupy.device import FLOAT32, FLOAT64, Array, Device, Run, in_sequence
from fusemlp_kernels.cupy.layers import checked_counters
from fusemlp_kernels.cupy.products import bind_product, matrix
from fusemlp_kernels.cupy.tables import PLAIN, Sums, Tensors, checked_clock
from fusemlp_kernels.errors import ArgumentError


class Layer:
    """What one layer gives to the gradients: its dz (M, N), its batch (M, K), checked."""

    def __init__(self, device: Device, op: str, where: str, layer: Mapping[str, Any], m: int | None) -> None:
        self.dz = device.check(op, f"{where}dz", layer["dz"], (m, None), device.compute)
        self.m, self.n = self.dz.shape
        # ``linear`` has gathered the batch where it is read by row number
        name = "x" if layer.get("rows") is None else "gathered"
        if layer.get(name) is None:
            raise ArgumentError(f"{op}: {where}{name}: rows are read from where linear has gathered them; got None")
        self.x = device.check(op, f"{where}{name}", layer[name], (self.m, None), device.compute)
        self.k = self.x.shape[1]

    def product(self, device: Device, out: Array, scalars: Array | None = None) -> Run:
        return bind_product(device, out, matrix(self.dz, transposed=True), matrix(self.x), scalars)


def _layers(device: Device, op: str, layers: Sequence[Mapping[str, Any]]) -> list[Layer]:
    found: list[Layer] = []
    for index, layer in enumerate(layers):
        found.append(Layer(device, op, f"layers[{index}]: ", layer, found[0].m if found else None))
    return found


def _states(
    device: Device, op: str, name: str, param: Array, states: Sequence[Array], rule: UpdateRule
) -> tuple[Array, ...]:
    if len(states) != rule.state_count:
        raise ArgumentError(f"{op}: {name}: {rule.kind} keeps {rule.state_count} arrays of state, got {len(states)}")
    return tuple(device.check_written(op, name, state, tuple(param.shape), FLOAT32) for state in states)


def bind_grad_weight(
    device: Device,
    *,
    layers: Sequence[Mapping[str, Any]],
    slopes: Sequence[Mapping[str, Any]] = (),
    rule: UpdateRule,
    counters: Array,
    norm: Array | None = None,
) -> Run:
    """The contract's ``grad_weight``: a product for each weight, and one kernel for all biases and slopes."""
    op = "grad_weight"
    counters = checked_counters(device, op, counters)
    found, sums, tensors = _layers(device, op, layers), Sums(device), Tensors(device)
    # while gradients accumulate, beta is a number on the card
    scalars = sums.scalars(1) if rule.accumulate > 1 else None
    if scalars is not None:
        sums.pairs.append({"factor": 1.0, "decay": 0.0})
    products: list[Run] = []
    for index, (layer, given) in enumerate(zip(found, layers, strict=True)):
        where = f"layers[{index}]: "
        if given["dw"] is not None:
            dw = device.check_written(op, f"{where}dw", given["dw"], (layer.n, layer.k), FLOAT32)
            products.append(layer.product(device, dw, scalars))
            tensors.add(PLAIN, dw)
        if given["db"] is not None:
            db = device.check_written(op, f"{where}db", given["db"], (layer.n,), FLOAT32)
            sums.add(PLAIN, db, dz=layer.dz)
            tensors.add(PLAIN, db)
    for index, slope in enumerate(slopes):
        dslope = device.check(op, f"slopes[{index}]: dslope", slope["dslope"], (1,), FLOAT32)
        grad = device.check_written(op, f"slopes[{index}]: grad", slope["grad"], (1,), FLOAT32)
        sums.add(PLAIN, grad, given=dslope)
        tensors.add(PLAIN, grad)
    m = found[0].m if found else 0
    runs = [sums.bind(rule, {"counters": counters}, m, scalars, sgd=False), *products]
    if norm is not None:
        runs.append(tensors.bind_norm(device.check_written(op, "norm", norm, (1,), FLOAT64)))
    return in_sequence(runs)


def bind_grad_weight_update(
    device: Device,
    *,
    layers: Sequence[Mapping[str, Any]],
    slopes: Sequence[Mapping[str, Any]] = (),
    rule: UpdateRule,
    hyper: Array,
    rates: Array,
    counters: Array,
) -> Run:
    """The contract's ``grad_weight_update``.

    Under plain gradient descent the product is the update of the weights: alpha is -rate and beta 1 - rate * decay, on
    the card. Otherwise, and where the weights have a rounded copy, the gradients pass through room of the call's own.
    """
    op = "grad_weight_update"
    clock = checked_clock(device, op, hyper, rates, counters)
    if rule.clip_norm is not None or rule.accumulate != 1:
        raise ArgumentError(
            f"{op}: rule: clipping and accumulation need the gradients in memory; use grad_weight and update"
        )
    found, sums, tensors = _layers(device, op, layers), Sums(device), Tensors(device)
    plain = rule.name == "sgd" and all(layer.get("w_shadow") is None for layer in layers)
    scalars = sums.scalars(len(layers)) if plain else None
    products: list[Run] = []

    def train(name: str, param: Array, states: Sequence[Array], own: TensorRule, shadow: Array | None = None) -> Array:
        """Enters a tensor, and returns where its gradient goes."""
        room = device.zeros(param.size, FLOAT32)
        if param.ndim == 2:
            room = device.view(room, 0, param.shape, (param.shape[1], 1))
        tensors.add(own, room, param, _states(device, op, name, param, states, rule), shadow)
        return room

    for index, (layer, given) in enumerate(zip(found, layers, strict=True)):
        where = f"layers[{index}]: "
        if given["w"] is not None:
            w, own = device.check_written(op, f"{where}w", given["w"], (layer.n, layer.k), FLOAT32), given["w_rule"]
            shadow = given.get("w_shadow")
            if shadow is not None:
                shadow = device.check_written(op, f"{where}w_shadow", shadow, (layer.n, layer.k), device.compute)
            if scalars is not None:
                at = 2 * len(sums.pairs)
                sums.pairs.append({"factor": own.lr_factor, "decay": own.weight_decay})
                products.append(layer.product(device, w, scalars[at : at + 2]))
            else:
                products.append(layer.product(device, train(f"{where}w_state", w, given["w_state"], own, shadow)))
        if given["b"] is not None:
            b, own = device.check_written(op, f"{where}b", given["b"], (layer.n,), FLOAT32), given["b_rule"]
            if plain:
                sums.add(own, b, dz=layer.dz)
            else:
                sums.add(PLAIN, train(f"{where}b_state", b, given["b_state"], own), dz=layer.dz)
    for index, slope in enumerate(slopes):
        where = f"slopes[{index}]: "
        dslope = device.check(op, f"{where}dslope", slope["dslope"], (1,), FLOAT32)
        param = device.check_written(op, f"{where}param", slope["param"], (1,), FLOAT32)
        if plain:
            sums.add(slope["rule"], param, given=dslope)
        else:
            states = _states(device, op, f"{where}state", param, slope["state"], rule)
            tensors.add(slope["rule"], dslope, param, states)
    m = found[0].m if found else 0
    before = sums.bind(rule, clock, m, scalars, sgd=plain)
    behind = [] if plain else [tensors.bind_update(rule, clock)]
    return in_sequence([before, *products, *behind])


def bind_update(
    device: Device,
    *,
    params: Array,
    grads: Array,
    states: Sequence[Array],
    segments: Sequence[Segment],
    rule: UpdateRule,
    hyper: Array,
    rates: Array,
    counters: Array,
    norm: Array | None = None,
    shadow: Array | None = None,
    scaled: bool = False,
) -> Run:
    """The contract's ``update``: one launch, and one for the norm where it is needed and not given."""
    op = "update"
    params = device.check_written(op, "params", params, (None,), FLOAT32)
    size = tuple(params.shape)
    grads = device.check(op, "grads", grads, size, FLOAT32)
    states = _states(device, op, "states", params, states, rule)
    clock = checked_clock(device, op, hyper, rates, counters)
    if shadow is not None:
        shadow = device.check_written(op, "shadow", shadow, size, device.compute)
    before: list[Run] = []
    if norm is not None:
        norm = device.check(op, "norm", norm, (1,), FLOAT64)
    elif rule.clip_norm is not None or scaled:
        norm = device.zeros(1, FLOAT64)
        whole = Tensors(device)
        whole.add(PLAIN, grads)
        before.append(whole.bind_norm(norm))
    tensors = Tensors(device)
    for segment in segments:
        at = slice(segment.offset, segment.offset + segment.size)
        parts = tuple(state[at] for state in states)
        tensors.add(segment.rule, grads[at], params[at], parts, None if shadow is None else shadow[at])
    return in_sequence([*before, tensors.bind_update(rule, clock, norm, scaled)])
