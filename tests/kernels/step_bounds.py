"""How far the gradients of a whole step may lie from the oracle's: each op's own error, and what it carries on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tolerance import (
    U32,
    activation_bound,
    activation_grad_bound,
    bound,
    grad_slope_bound,
    loss_grad_bound,
)

from fusemlp_kernels import reference


@dataclass(frozen=True)
class Traced:
    """Forward and backward through the oracle, with the error that each gradient may have in single precision."""

    grads: list
    bounds: list


def traced(layers, spec, batch, u=U32):
    """The gradients of each layer's parameters and their bounds: each op's own error, and what the ops before left."""
    keeps = batch.keeps or [None] * len(layers)
    x, x_error = batch.x, np.zeros_like(batch.x)
    trail = []
    for layer, keep in zip(layers, keeps, strict=True):
        z = reference.linear(x, layer.w, layer.b)
        magnitude = np.abs(x) @ np.abs(layer.w).T + np.abs(layer.b)
        z_error = bound(x.shape[1] + 1, magnitude, u, output=z) + (x_error * (1.0 + 1e-4)) @ np.abs(layer.w).T
        trail.append((layer, keep, x, x_error, z, z_error))
        y = reference.dropout(reference.activation(layer.activation, z, layer.slope), keep, layer.rate)
        y_error = reference.dropout(activation_bound(layer.activation, z, z_error, layer.slope, u), keep, layer.rate)
        x, x_error = y, y_error + 2.0 * u * np.abs(y)
    last, _, _, _, z, z_error = trail[-1]
    given = (batch.target, batch.weight, batch.class_weight)
    _, dz = reference.loss_grad(spec, z, *given, last.activation, last.slope)
    _, dz_error = loss_grad_bound(spec, z, *given, last.activation, last.slope, z_error, u)
    _, dy = reference.loss_of_output(spec, reference.activation(last.activation, z, last.slope), *given)
    dy_error = dz_error
    grads, bounds = [], []
    for i in reversed(range(len(layers))):
        layer, _, x, x_error, z, z_error = trail[i]
        size = np.abs(dz) + dz_error
        dw, db = reference.grad_weight(dz, x)
        dw_error = bound(len(x), np.abs(dz).T @ np.abs(x), u, output=dw) + dz_error.T @ np.abs(x) + size.T @ x_error
        db_error = bound(len(x), np.abs(dz).sum(axis=0), u, output=db) + dz_error.sum(axis=0)
        grads.insert(0, [dw, db])
        bounds.insert(0, [dw_error, db_error])
        if layer.activation == "prelu":
            grads[0].append(reference.grad_slope(dy, z))
            bounds[0].append(np.atleast_1d(grad_slope_bound(dy, z, dy_error, z_error, u)))
        if i == 0:
            break
        before, keep, _, _, z, z_error = trail[i - 1]
        w = np.abs(layer.w)
        dy = reference.output_grad(dz, layer.w, keep, before.rate)
        own = bound(layer.w.shape[0], reference.output_grad(np.abs(dz), w, keep, before.rate), u, output=dy, ulps=2)
        dy_error = own + reference.output_grad(dz_error, w, keep, before.rate)
        factor = reference.activation_grad(before.activation, z, before.slope)
        factor_error = activation_grad_bound(before.activation, z, z_error, before.slope, u)
        dz = dy * factor
        dz_error = dy_error * (np.abs(factor) + factor_error) + np.abs(dy) * factor_error + 2.0 * u * np.abs(dz)
    return Traced(grads, bounds)
