"""Backpropagation through a layer: the gradients of its input, its weights and its bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from fusemlp_kernels.contract import BATCH_INDEX, Dropout, UpdateRule
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.numpy import blas
from fusemlp_kernels.numpy.activations import Array, Run, in_sequence, multiply_by_derivative
from fusemlp_kernels.numpy.update import bind_clock, bind_tensor_update

Accumulate = Callable[[float, float], None]


def bind_grad_input(
    *,
    dz: Array,
    w: Array,
    y: Array,
    dz_prev: Array,
    activation: str,
    slope: float = 0.0,
    slope_param: Array | None = None,
    z: Array | None = None,
    dslope: Array | None = None,
    dropout: Dropout | None = None,
    counters: Array | None = None,
    keep: Array | None = None,
) -> Run:
    """The contract's ``grad_input``."""
    del counters
    rate = 0.0 if dropout is None else dropout.rate
    scale = 1.0 / (1.0 - rate)
    if dz_prev.size == 0 or dz.shape[1] == 0:

        def zeros() -> None:
            dz_prev.fill(0.0)
            if dslope is not None:
                dslope.fill(0.0)

        return zeros
    multiply = blas.product(dz_prev, dz, w)
    derivative = multiply_by_derivative(
        activation,
        dz_prev,
        y,
        z,
        slope=slope,
        slope_param=slope_param,
        dslope=dslope,
        keep=keep if dropout is not None else None,
        rate=rate,
    )

    def grad_input() -> None:
        multiply(scale, 0.0)
        derivative()

    return grad_input


def _batch(layer: Mapping[str, Any]) -> Array:
    """The layer's input; ``linear`` has gathered it already where it is read by row index."""
    batch: Array = layer["x"] if layer.get("rows") is None else layer["gathered"]
    return batch


def _weight_product(out: Array, layer: Mapping[str, Any]) -> Accumulate:
    """``run(alpha, beta)``: ``out = alpha * dz.T @ x + beta * out``."""
    x, dz = _batch(layer), layer["dz"]
    if len(dz) == 0 or out.size == 0:
        return _scale_only(out)
    return blas.product(out, dz, x, transpose_a=True)


def _bias_sums(out: Array, layer: Mapping[str, Any]) -> Accumulate:
    """``run(alpha, beta)``: ``out = alpha * dz.sum(axis=0) + beta * out``."""
    dz = layer["dz"]
    if len(dz) == 0 or out.size == 0:
        return _scale_only(out)
    return blas.column_sums(out, dz)


def _scale_only(out: Array) -> Accumulate:
    """What remains of an accumulation over no rows."""

    def run(alpha: float, beta: float) -> None:
        if beta == 0.0:
            out.fill(0.0)
        else:
            np.multiply(out, beta, out=out)

    return run


def slope_sum(out: Array, dslope: Array) -> Accumulate:
    """``run(alpha, beta)``: ``out = alpha * dslope + beta * out``, both (1,)."""

    def run(alpha: float, beta: float) -> None:
        out[0] = alpha * dslope[0] + (beta * out[0] if beta != 0.0 else 0.0)

    return run


def bind_grad_weight(
    *,
    layers: Sequence[Mapping[str, Any]],
    rule: UpdateRule,
    counters: Array,
    slopes: Sequence[Mapping[str, Any]] = (),
) -> Run:
    """The contract's ``grad_weight``."""
    runs: list[Accumulate] = []
    for layer in layers:
        if layer["dw"] is not None:
            runs.append(_weight_product(layer["dw"], layer))
        if layer["db"] is not None:
            runs.append(_bias_sums(layer["db"], layer))
    runs.extend(slope_sum(slope["grad"], slope["dslope"]) for slope in slopes)
    every = rule.accumulate

    def grad_weight() -> None:
        beta = 0.0 if every == 1 or counters[BATCH_INDEX] % every == 0 else 1.0
        for run in runs:
            run(1.0, beta)

    return grad_weight


def bind_grad_weight_update(
    *,
    layers: Sequence[Mapping[str, Any]],
    rule: UpdateRule,
    hyper: Array,
    rates: Array,
    counters: Array,
    slopes: Sequence[Mapping[str, Any]] = (),
) -> Run:
    """The contract's ``grad_weight_update``."""
    if rule.clip_norm is not None or rule.accumulate != 1:
        raise ArgumentError(
            "rule: clipping and accumulation need the gradients of the whole network: use grad_weight and update"
        )
    runs: list[Run] = []
    for layer in layers:
        if layer["w"] is not None:
            produce = _weight_product_into(layer)
            runs.append(bind_tensor_update(layer["w"], layer["w_state"], produce, rule, layer["w_rule"], hyper))
        if layer["b"] is not None:
            produce = _bias_sums_into(layer)
            runs.append(bind_tensor_update(layer["b"], layer["b_state"], produce, rule, layer["b_rule"], hyper))
    for slope in slopes:
        produce = _slope_into(slope["dslope"])
        runs.append(bind_tensor_update(slope["param"], slope["state"], produce, rule, slope["rule"], hyper))
    return in_sequence([*runs, bind_clock(hyper, rates, counters)])


def _weight_product_into(layer: Mapping[str, Any]) -> Callable[[Array], Accumulate]:
    return lambda out: _weight_product(out, layer)


def _bias_sums_into(layer: Mapping[str, Any]) -> Callable[[Array], Accumulate]:
    return lambda out: _bias_sums(out, layer)


def _slope_into(dslope: Array) -> Callable[[Array], Accumulate]:
    return lambda out: slope_sum(out, dslope)
