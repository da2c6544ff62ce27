"""One training step through the oracle, with the error that each gradient and parameter may have.

Each op has its own error, and carries on what the ops before it have left.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tolerance as tol

from fusemlp.program.layout import short_names
from fusemlp_kernels import reference
from fusemlp_kernels.contract import BATCH_INDEX, NEEDS_Z, UPDATE_COUNT
from fusemlp_kernels.philox import dropout_keep


@dataclass(frozen=True)
class TwoBytes:
    """The rounding of what lies between the kernels in 16 bits; ``scale`` is the loss scale that dz carries, ``rounds``
    the function that rounds the weights."""

    unit: float = 2.0**-11
    tiny: float = 2.0**-25
    scale: float = 1.0
    rounds: Callable = np.float16

    def output(self, error, value):
        return tol.rounded(error, value, self.unit, self.tiny)

    def gradient(self, error, value):
        return tol.rounded(error, value, self.unit, self.tiny / self.scale)

    def derivative(self, name, z, y):
        """Return the change of the derivative when z or y, whichever it depends on, is rounded."""
        return 2.0 * (self.unit * np.maximum(np.abs(y), np.abs(z) if name in NEEDS_Z else 0.0) + self.tiny)


# Forward and backward through the oracle, with the errors that the loss and the gradients may have.
Traced = namedtuple("Traced", "loss loss_bound grads bounds")


def forward(layers, x, keeps, u=tol.U32, short=None, products=tol.IEEE):
    """Each layer, its mask, inputs and pre-activation with their bounds; and the outputs with theirs."""
    x_error, trail = np.zeros_like(x), []
    for layer, keep in zip(layers, keeps, strict=True):
        z = reference.linear(x, layer.w, layer.b)
        magnitude = np.abs(x) @ np.abs(layer.w).T + np.abs(layer.b)
        z_error = tol.bound(x.shape[1] + 1, magnitude, u, output=z, products=products)
        z_error = z_error + (x_error * (1.0 + 1e-4)) @ np.abs(layer.w).T
        trail.append((layer, keep, x, x_error, z, z_error))
        y = reference.dropout(reference.activation(layer.activation, z, layer.slope), keep, layer.rate)
        y_error = reference.dropout(
            tol.activation_bound(layer.activation, z, z_error, layer.slope, u), keep, layer.rate
        )
        x, x_error = y, y_error + 2.0 * u * np.abs(y)
        x_error = x_error if short is None else short.output(x_error, y)
    return trail, x, x_error


def traced(layers, spec, batch, u=tol.U32, short=None, products=tol.IEEE):
    """The loss, the gradients of each layer's parameters, and their bounds; ``short``: see ``TwoBytes``."""
    trail, _, _ = forward(layers, batch.x, batch.keeps or [None] * len(layers), u, short, products)
    last, _, _, _, z, z_error = trail[-1]
    given = (batch.target, batch.weight, batch.class_weight)
    loss, dz = reference.loss_grad(spec, z, *given, last.activation, last.slope)
    loss_error, dz_error = tol.loss_grad_bound(spec, z, *given, last.activation, last.slope, z_error, u)
    _, dy = reference.loss_of_output(spec, reference.activation(last.activation, z, last.slope), *given)
    dy_error = dz_error
    dz_error = dz_error if short is None else short.gradient(dz_error, dz)
    grads, bounds = [], []
    for i in reversed(range(len(layers))):
        layer, _, x, x_error, z, z_error = trail[i]
        size = np.abs(dz) + dz_error
        dw, db = reference.grad_weight(dz, x)
        dw_error = tol.bound(len(x), np.abs(dz).T @ np.abs(x), u, output=dw, products=products)
        dw_error = dw_error + dz_error.T @ np.abs(x) + size.T @ x_error
        db_error = tol.bound(len(x), np.abs(dz).sum(axis=0), u, output=db) + dz_error.sum(axis=0)
        grads.insert(0, [dw, db])
        bounds.insert(0, [dw_error, db_error])
        if layer.activation == "prelu":
            z_kept = z_error if short is None or i == len(layers) - 1 else short.output(z_error, z)
            grads[0].append(reference.grad_slope(dy, z))
            bounds[0].append(np.atleast_1d(tol.grad_slope_bound(dy, z, dy_error, z_kept, u)))
        if i == 0:
            break
        before, keep, _, _, z, z_error = trail[i - 1]
        w = np.abs(layer.w)
        dy = reference.output_grad(dz, layer.w, keep, before.rate)
        magnitude = reference.output_grad(np.abs(dz), w, keep, before.rate)
        own = tol.bound(layer.w.shape[0], magnitude, u, output=dy, ulps=2, products=products)
        dy_error = own + reference.output_grad(dz_error, w, keep, before.rate)
        factor = reference.activation_grad(before.activation, z, before.slope)
        factor_error = tol.activation_grad_bound(before.activation, z, z_error, before.slope, u)
        if short is not None:
            y = reference.activation(before.activation, z, before.slope)
            factor_error = factor_error + short.derivative(before.activation, z, y)
        dz = dy * factor
        dz_error = dy_error * (np.abs(factor) + factor_error) + np.abs(dy) * factor_error + 2.0 * u * np.abs(dz)
        dz_error = dz_error if short is None else short.gradient(dz_error, dz)
    return Traced(loss, loss_error, grads, bounds)


class Step:
    """An engine's state before an update, and the oracle's way from there to the one after it."""

    def __init__(self, engine, short=None, products=tol.IEEE):
        self.engine, self.short, self.products = engine, short, products
        self.rule = engine.optimizer.rule()
        self.before = self._exact("params")
        self.states = [self._exact(f"state{index}") for index in range(self.rule.state_count)]
        self.batch_index = int(_host(engine, "counters")[BATCH_INDEX])
        self.updates = int(_host(engine, "counters")[UPDATE_COUNT])
        self.traces = []

    def _exact(self, arena):
        return {name: array.astype(np.float64) for name, array in self.engine.memory.tensors(arena).items()}

    def layers(self):
        """The layers, with parameters as the matrix products read them."""
        net, layers = self.engine.network, []
        for layer in range(net.layers):
            chosen, rate = net.activations[layer], net.dropouts[layer]
            slope = self.before.get(f"{2 * layer + 1}.weight", chosen.slope)
            w, b = self.before[f"{2 * layer}.weight"], self.before[f"{2 * layer}.bias"]
            w = w if self.short is None else self.short.rounds(w).astype(np.float64)
            layers.append(reference.Layer(w, b, chosen.name, slope, rate))
        return layers

    def check_outputs(self, found, X):
        """Raise AssertionError where outputs for X are further from the oracle's than they may be."""
        layers = self.layers()
        _, y, bound = forward(
            layers, X.astype(np.float64), [None] * len(layers), short=self.short, products=self.products
        )
        tol.assert_within(found, y, bound)

    def trace(self, X, y, weight=None):
        """Forward and backward of the next batch."""
        layers, at = self.layers(), self.batch_index + len(self.traces)
        keeps = [
            dropout_keep(layer.rate, index, self.engine.seed, at, len(X), len(layer.w)) if layer.rate else None
            for index, layer in enumerate(layers)
        ]
        loss = self.engine.loss
        spec = loss.spec(accuracy=False, soft=loss.kind == "cross_entropy" and np.ndim(y) == 2)
        classes = None if loss.class_weight is None else np.asarray(loss.class_weight, np.float64)
        batch = reference.Batch(X.astype(np.float64), y, weight, classes, keeps)
        self.traces.append(traced(layers, spec, batch, short=self.short, products=self.products))
        return self.traces[-1]

    def expected(self):
        """(name, new value, its bound, new states, their bounds) of each parameter; (name, None) of a frozen one."""
        names = list(short_names(self.engine.network).values())
        flat = [_flat(trace.grads) for trace in self.traces], [_flat(trace.bounds) for trace in self.traces]
        count = len(self.traces)
        # the sum of the batches' gradients and their mean are rounded
        grads = {name: sum(parts) / count for name, *parts in zip(names, *flat[0], strict=True)}
        errors = {
            name: (sum(parts) + (count > 1) * (count + 1) * tol.U32 * sum(map(np.abs, of))) / count
            for (name, *parts), of in zip(zip(names, *flat[1], strict=True), zip(*flat[0], strict=True), strict=True)
        }
        options = {name: self.engine.optimizer.options_for(name) for name in names}
        trained = [name for name in names if options[name][0]]
        factor, relative = self._clipping([grads[n] for n in trained], [errors[n] for n in trained])
        rate = self.engine.optimizer.schedule.over(None).at(self.updates)
        for name in names:
            if name not in trained:
                yield name, None, None, (), ()
                continue
            g = factor * grads[name]
            g_error = (factor * errors[name] + np.abs(g) * relative) * (1.0 + relative)
            if self.short is not None:
                # the loss scale is divided out
                g_error = g_error + 2.0 * tol.U32 * np.abs(g) + tol.TINY
            args = self.rule, options[name][1], self.before[name], g, tuple(s[name] for s in self.states)
            new, new_states = reference.update(*args, self.updates, rate)
            limit, state_limits = tol.update_bound(*args, self.updates, rate, g_error)
            yield name, new, limit, new_states, state_limits

    def _clipping(self, grads, errors):
        """The factor, and its relative error."""
        limit = self.rule.clip_norm
        if limit is None:
            return 1.0, 0.0
        norm = np.sqrt(sum(np.square(g).sum() for g in grads))
        off = np.sqrt(sum(np.square(e).sum() for e in errors)) + tol.growth(sum(g.size for g in grads)) * tol.U32 * norm
        relative = off / max(norm - off, tol.TINY) if norm + off > limit else 0.0
        return reference.clip_factor(grads, limit), relative + 4.0 * tol.U32

    def check(self):
        """Compares the engine's parameters and states with the oracle's; returns the bounds by name."""
        after, limits = self.engine.state_dict(), {}
        states = [self.engine.memory.tensors(f"state{index}") for index in range(self.rule.state_count)]
        for name, new, limit, new_states, state_limits in self.expected():
            limits[name] = limit
            if new is None:
                np.testing.assert_array_equal(after[name], self.before[name])
                continue
            tol.assert_within(after[name], new, limit)
            for arrays, own, allowed in zip(states, new_states, state_limits, strict=True):
                tol.assert_within(arrays[name], own, allowed)
        return limits


def _flat(nested):
    return [item for items in nested for item in items]


def _host(engine, name):
    return engine.memory.backend.to_host(engine.memory.arrays[name])
