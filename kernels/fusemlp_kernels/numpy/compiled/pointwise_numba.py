# Printed from pointwise.py by `python ci/print_formulas.py`; do not edit.
# mypy: disallow-untyped-defs=False
"""The formulas as loops over memory: of arrays that lie flat, or of ``compiler.Memory``."""

from __future__ import annotations

import math

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.contract import BIAS_CORRECTION_1, BIAS_CORRECTION_2, SHARE
from fusemlp_kernels.numpy.compiled.compiler import ELEMENTWISE, REDUCTION
from fusemlp_kernels.numpy.compiled.functions import (
    exp,
    log,
    log1p,
    maximum,
    minimum,
    normal_cdf,
    normal_pdf,
    sigmoid,
    sign,
    step,
    tanh,
)

IDENTITY, RELU, LEAKY_RELU, PRELU, SIGMOID, TANH, GELU, SILU, ELU, SELU, SOFTPLUS, MISH = range(12)
CROSS_ENTROPY, BINARY_CROSS_ENTROPY, MSE, MAE, HUBER, POISSON, QUANTILE, GAUSSIAN, QUANTILES = range(9)
RULE_SGD, RULE_MOMENTUM, RULE_ADAM, RULE_NESTEROV = range(4)


@register_jitable(**ELEMENTWISE)
def activate(kind, ys, zs, count, slope):
    """``y = act(z)``; ys holds z where the derivative is had from y, else zs is other memory (``NEEDS_Z``)."""
    real = ys.dtype.type
    if kind == RELU:
        for i in range(count):
            z = ys[i]
            ys[i] = maximum(z, real(0.0))
    elif kind == LEAKY_RELU:
        for i in range(count):
            z = ys[i]
            ys[i] = maximum(z, real(0.0)) + real(slope) * minimum(z, real(0.0))
    elif kind == PRELU:
        for i in range(count):
            z = zs[i]
            ys[i] = maximum(z, real(0.0)) + real(slope) * minimum(z, real(0.0))
    elif kind == SIGMOID:
        for i in range(count):
            z = ys[i]
            ys[i] = sigmoid(z)
    elif kind == TANH:
        for i in range(count):
            z = ys[i]
            ys[i] = tanh(z)
    elif kind == GELU:
        for i in range(count):
            z = zs[i]
            ys[i] = z * normal_cdf(z)
    elif kind == SILU:
        for i in range(count):
            z = zs[i]
            ys[i] = z * sigmoid(z)
    elif kind == ELU:
        for i in range(count):
            z = ys[i]
            t = tanh(real(0.5) * minimum(z, real(0.0)))
            m = real(2.0) * t / (real(1.0) - t)
            ys[i] = maximum(z, real(0.0)) + real(slope) * m
    elif kind == SELU:
        for i in range(count):
            z = ys[i]
            t = tanh(real(0.5) * minimum(z, real(0.0)))
            m = real(2.0) * t / (real(1.0) - t)
            ys[i] = real(1.0507009873554805) * maximum(z, real(0.0)) + real(1.7580993408473766) * m
    elif kind == SOFTPLUS:
        for i in range(count):
            z = ys[i]
            ys[i] = maximum(z, real(0.0)) + log1p(exp(-abs(z)))
    elif kind == MISH:
        for i in range(count):
            z = zs[i]
            m = minimum(z, real(30.0))
            h = exp(m)
            w = h * (h + real(2.0))
            ys[i] = z * (w / (w + real(2.0)))
    else:
        for i in range(count):
            ys[i] = np.nan


@register_jitable(**ELEMENTWISE)
def multiply_by_derivative(kind, ds, ys, zs, count, slope, undo):
    """``d *= act'``; ``undo`` is the inverse of dropout's scale on y. Returns the gradient by a learned slope."""
    real = ds.dtype.type
    by_slope = 0.0
    if kind == RELU:
        for i in range(count):
            y = ys[i]
            ds[i] *= step(y, real(0.0))
    elif kind == LEAKY_RELU:
        for i in range(count):
            y = ys[i]
            ds[i] *= step(y, real(slope))
    elif kind == PRELU:
        for i in range(count):
            z = zs[i]
            by_slope += ds[i] * minimum(z, real(0.0))
            ds[i] *= step(z, real(slope))
    elif kind == SIGMOID:
        for i in range(count):
            y = ys[i]
            y = y * real(undo)
            ds[i] *= y * (real(1.0) - y)
    elif kind == TANH:
        for i in range(count):
            y = ys[i]
            y = y * real(undo)
            ds[i] *= real(1.0) - y * y
    elif kind == GELU:
        for i in range(count):
            z = zs[i]
            ds[i] *= normal_cdf(z) + z * normal_pdf(z)
    elif kind == SILU:
        for i in range(count):
            z = zs[i]
            s = sigmoid(z)
            ds[i] *= s * (real(1.0) + z * (real(1.0) - s))
    elif kind == ELU:
        for i in range(count):
            y = ys[i]
            y = y * real(undo)
            ds[i] *= step(y, real(slope)) + minimum(y, real(0.0))
    elif kind == SELU:
        for i in range(count):
            y = ys[i]
            y = y * real(undo)
            s = step(y, real(0.0))
            ds[i] *= real(1.0507009873554805) * s + real(1.7580993408473766) * (real(1.0) - s) + minimum(y, real(0.0))
    elif kind == SOFTPLUS:
        for i in range(count):
            y = ys[i]
            y = y * real(undo)
            t = tanh(real(0.5) * y)
            ds[i] *= real(2.0) * t / (real(1.0) + t)
    elif kind == MISH:
        for i in range(count):
            z = zs[i]
            m = minimum(z, real(30.0))
            h = exp(m)
            w = h * (h + real(2.0))
            ds[i] *= (w + m * (real(4.0) * h * (h + real(1.0)) / (w + real(2.0)))) / (w + real(2.0))
    else:
        for i in range(count):
            ds[i] = np.nan
        by_slope = np.nan
    return by_slope


@register_jitable(**REDUCTION)
def element_losses(kind, ys, ss, ds, start, stop, factor, option):
    """The sum of the losses; in ds, where the targets are, the gradients times ``factor``, in ss those by s."""
    real = ys.dtype.type
    total = 0.0
    if kind == BINARY_CROSS_ENTROPY:
        for i in range(np.uintp(start), np.uintp(stop)):
            y, t = ys[i], ds[i]
            e = exp(-abs(y))
            total += maximum(y, real(0.0)) + log1p(e) - t * y
            ds[i] = (sigmoid(y) - t) * factor
    elif kind == MSE:
        for i in range(np.uintp(start), np.uintp(stop)):
            y, t = ys[i], ds[i]
            r = y - t
            total += r * r
            ds[i] = real(2.0) * r * factor
    elif kind == MAE:
        for i in range(np.uintp(start), np.uintp(stop)):
            y, t = ys[i], ds[i]
            r = y - t
            total += abs(r)
            ds[i] = sign(r) * factor
    elif kind == HUBER:
        for i in range(np.uintp(start), np.uintp(stop)):
            y, t = ys[i], ds[i]
            r = y - t
            c = minimum(maximum(r, -option), option)
            total += c * (r - real(0.5) * c)
            ds[i] = c * factor
    elif kind == POISSON:
        for i in range(np.uintp(start), np.uintp(stop)):
            y, t = ys[i], ds[i]
            e = exp(y)
            total += e - t * y
            ds[i] = (e - t) * factor
    elif kind == QUANTILE:
        for i in range(np.uintp(start), np.uintp(stop)):
            y, t = ys[i], ds[i]
            r = y - t
            s = sign(r)
            slope = maximum((real(1.0) - option) * s, -option * s)
            total += slope * abs(r)
            ds[i] = slope * s * factor
    elif kind == GAUSSIAN:
        for i in range(np.uintp(start), np.uintp(stop)):
            y, t = ys[i], ds[i]
            s = ss[i]
            std = maximum(s, real(0.0)) + log1p(exp(-abs(s)))
            weight = real(1.0) / maximum(std * std, option)
            r = y - t
            q = r * weight
            total += real(0.5) * (q * r - log(weight))
            ds[i] = q * factor
            ss[i] = (weight - q * q) * std * sigmoid(s) * factor
    else:
        for i in range(start, stop):
            ds[i] = np.nan
        total = np.nan
    return total


@register_jitable(**ELEMENTWISE)
def update_tensor(ps, gs, states0, states1, count, rate, decay, rule, hyper):
    """The parameters and their states, from the gradients."""
    real = ps.dtype.type
    code = rule.optimizer
    decoupled = rule.decoupled != 0
    kept = 1.0 - rate * decay if decoupled else 1.0
    coupled = 0.0 if decoupled else decay
    if code == RULE_SGD:
        for i in range(count):
            p, g = ps[i], gs[i]
            p = real(kept) * p
            g = g + real(coupled) * p
            p = p - real(rate) * g
            ps[i] = p
    elif code == RULE_MOMENTUM:
        rate_inside = rule.sklearn != 0
        momentum = rule.momentum
        inner = -rate if rate_inside else 1.0
        outer = 1.0 if rate_inside else -rate
        for i in range(count):
            p, g, velocity = ps[i], gs[i], states0[i]
            p = real(kept) * p
            g = g + real(coupled) * p
            velocity = real(momentum) * velocity + real(inner) * g
            p = p + real(outer) * velocity
            ps[i], states0[i] = p, velocity
    elif code == RULE_ADAM:
        bias_correction_2 = hyper[BIAS_CORRECTION_2]
        bias_correction_1 = hyper[BIAS_CORRECTION_1]
        rate_inside = rule.sklearn != 0
        eps = rule.eps
        beta1 = rule.beta1
        beta2 = rule.beta2
        root = math.sqrt(bias_correction_2)
        size = rate * root / bias_correction_1
        least = max(eps if rate_inside else eps * root, 1.1754943508222875e-38)
        rest1 = 1.0 - beta1
        rest2 = 1.0 - beta2
        for i in range(count):
            p, g, first_moment, second_moment = ps[i], gs[i], states0[i], states1[i]
            p = real(kept) * p
            g = g + real(coupled) * p
            first_moment = real(beta1) * first_moment + real(rest1) * g
            second_moment = real(beta2) * second_moment + real(rest2) * (g * g)
            p = p - real(size) * (first_moment / (math.sqrt(second_moment) + real(least)))
            ps[i], states0[i], states1[i] = p, first_moment, second_moment
    elif code == RULE_NESTEROV:
        rate_inside = rule.sklearn != 0
        momentum = rule.momentum
        inner = -rate if rate_inside else 1.0
        outer = 1.0 if rate_inside else -rate
        for i in range(count):
            p, g, velocity = ps[i], gs[i], states0[i]
            p = real(kept) * p
            g = g + real(coupled) * p
            change = real(inner) * g
            velocity = real(momentum) * velocity + change
            p = p + real(outer) * (change + real(momentum) * velocity)
            ps[i], states0[i] = p, velocity
    else:
        for i in range(count):
            ps[i] = np.nan


@register_jitable(**ELEMENTWISE)
def update_average(ps, averages, count, hyper):
    """The average of the parameters, after an update."""
    real = ps.dtype.type
    share = hyper[SHARE]
    for i in range(count):
        p, average = ps[i], averages[i]
        average = average + real(share) * (p - average)
        averages[i] = average
