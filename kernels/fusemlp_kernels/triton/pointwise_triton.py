# Printed from pointwise.py by `python ci/print_formulas.py`; do not edit.
"""The formulas inside kernels."""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import BIAS_CORRECTION_1, BIAS_CORRECTION_2, DECOUPLED, INSIDE, LEARNING_RATE, SHARE
from fusemlp_kernels.triton.functions import log1p, maximum, minimum, normal_cdf, normal_pdf, sigmoid, sign, step, tanh

(
    IDENTITY, RELU, LEAKY_RELU, PRELU, SIGMOID, TANH, GELU, SILU, ELU, SELU, SOFTPLUS, MISH,
) = (tl.constexpr(code) for code in range(12))  # fmt: skip
(
    CROSS_ENTROPY, BINARY_CROSS_ENTROPY, MSE, MAE, HUBER, POISSON, QUANTILE,
) = (tl.constexpr(code) for code in range(7))  # fmt: skip
(
    RULE_SGD, RULE_MOMENTUM, RULE_ADAM, RULE_NESTEROV,
) = (tl.constexpr(code) for code in range(4))  # fmt: skip
# places of the hyperparameters in a rule
MOMENTUM, BETA1, BETA2, EPS, EMA = (tl.constexpr(place) for place in range(1, 6))
RULES: tl.constexpr = tl.constexpr(4)


@triton.jit
def activate(z, code, slope):
    """f(z), elementwise, float32."""
    if code == IDENTITY:
        y = z
    elif code == RELU:
        y = maximum(z, 0.0)
    elif (code == LEAKY_RELU) | (code == PRELU):
        y = maximum(z, 0.0) + slope * minimum(z, 0.0)
    elif code == SIGMOID:
        y = sigmoid(z)
    elif code == TANH:
        y = tanh(z)
    elif code == GELU:
        y = z * normal_cdf(z)
    elif code == SILU:
        y = z * sigmoid(z)
    elif code == ELU:
        t = tanh(0.5 * minimum(z, 0.0))
        m = 2.0 * t / (1.0 - t)
        y = maximum(z, 0.0) + slope * m
    elif code == SELU:
        t = tanh(0.5 * minimum(z, 0.0))
        m = 2.0 * t / (1.0 - t)
        y = 1.0507009873554805 * maximum(z, 0.0) + 1.7580993408473766 * m
    elif code == SOFTPLUS:
        y = maximum(z, 0.0) + log1p(tl.exp(-tl.abs(z)))
    elif code == MISH:
        m = minimum(z, 30.0)
        h = tl.exp(m)
        w = h * (h + 2.0)
        y = z * (w / (w + 2.0))
    else:
        y = z + float("nan")
    return y


@triton.jit
def needs_z(code):
    """True where the derivative is computed from z; the others read it off y."""
    return (code == PRELU) | (code == GELU) | (code == SILU) | (code == MISH)


@triton.jit
def derivative(v, code, slope):
    """f'(z), elementwise, from ``v``: z where ``needs_z``, else y = f(z)."""
    if code == IDENTITY:
        d = tl.zeros_like(v) + 1.0
    elif code == RELU:
        d = step(v, 0.0)
    elif (code == LEAKY_RELU) | (code == PRELU):
        d = step(v, slope)
    elif code == SIGMOID:
        d = v * (1.0 - v)
    elif code == TANH:
        d = 1.0 - v * v
    elif code == GELU:
        d = normal_cdf(v) + v * normal_pdf(v)
    elif code == SILU:
        s = sigmoid(v)
        d = s * (1.0 + v * (1.0 - s))
    elif code == ELU:
        d = step(v, slope) + minimum(v, 0.0)
    elif code == SELU:
        s = step(v, 0.0)
        d = 1.0507009873554805 * s + 1.7580993408473766 * (1.0 - s) + minimum(v, 0.0)
    elif code == SOFTPLUS:
        t = tanh(0.5 * v)
        d = 2.0 * t / (1.0 + t)
    elif code == MISH:
        m = minimum(v, 30.0)
        h = tl.exp(m)
        w = h * (h + 2.0)
        d = (w + m * (4.0 * h * (h + 1.0) / (w + 2.0))) / (w + 2.0)
    else:
        d = v + float("nan")
    return d


@triton.jit
def by_slope_prelu(z):
    """The derivative of prelu by its slope."""
    return minimum(z, 0.0)


@triton.jit
def element_loss(y, t, kind, option):
    """The loss of one output, and its derivative by y."""
    if kind == BINARY_CROSS_ENTROPY:
        e = tl.exp(-tl.abs(y))
        loss = maximum(y, 0.0) + log1p(e) - t * y
        gradient = sigmoid(y) - t
    elif kind == MSE:
        r = y - t
        loss = r * r
        gradient = 2.0 * r
    elif kind == MAE:
        r = y - t
        loss = tl.abs(r)
        gradient = sign(r)
    elif kind == HUBER:
        r = y - t
        c = minimum(maximum(r, -option), option)
        loss = c * (r - 0.5 * c)
        gradient = c
    elif kind == POISSON:
        e = tl.exp(y)
        loss = e - t * y
        gradient = e - t
    elif kind == QUANTILE:
        r = y - t
        s = sign(r)
        slope = maximum((1.0 - option) * s, -option * s)
        loss = slope * tl.abs(r)
        gradient = slope * s
    else:
        loss = y + float("nan")
        gradient = loss
    return loss, gradient


@triton.jit
def stored_update(
    g, p_at, first_at, second_at, average_at, shadow_at, mask, hyper, rule, factor, decay, shadowed, RULE: tl.constexpr
):
    """Update the parameters at ``p_at`` and their states by the gradient ``g``, where ``mask`` is set,
    and with an ``ema`` their average; ``shadow_at`` receives the parameter rounded, where ``shadowed``."""
    rate = tl.load(hyper + LEARNING_RATE) * factor
    averages = tl.load(rule + EMA) != 0.0
    p = tl.load(p_at, mask=mask, other=0.0)
    decoupled = tl.load(rule + DECOUPLED) != 0.0
    kept = tl.where(decoupled, 1.0 - rate * decay, 1.0)
    coupled = tl.where(decoupled, 0.0, decay)
    p = kept.to(tl.float32) * p
    g = g + coupled.to(tl.float32) * p
    if RULE == RULE_SGD:
        p = p - rate.to(tl.float32) * g
    elif RULE == RULE_MOMENTUM:
        rate_inside = tl.load(rule + INSIDE) != 0.0
        momentum = tl.load(rule + MOMENTUM)
        inner = tl.where(rate_inside, -rate, 1.0)
        outer = tl.where(rate_inside, 1.0, -rate)
        velocity = tl.load(first_at, mask=mask, other=0.0)
        velocity = momentum.to(tl.float32) * velocity + inner.to(tl.float32) * g
        p = p + outer.to(tl.float32) * velocity
        tl.store(first_at, velocity, mask=mask)
    elif RULE == RULE_ADAM:
        bias_correction_2 = tl.load(hyper + BIAS_CORRECTION_2)
        bias_correction_1 = tl.load(hyper + BIAS_CORRECTION_1)
        rate_inside = tl.load(rule + INSIDE) != 0.0
        eps = tl.load(rule + EPS)
        beta1 = tl.load(rule + BETA1)
        beta2 = tl.load(rule + BETA2)
        root = tl.sqrt(bias_correction_2)
        size = rate * root / bias_correction_1
        least = tl.maximum(tl.where(rate_inside, eps, eps * root), 1.1754943508222875e-38)
        rest1 = 1.0 - beta1
        rest2 = 1.0 - beta2
        first_moment = tl.load(first_at, mask=mask, other=0.0)
        second_moment = tl.load(second_at, mask=mask, other=0.0)
        first_moment = beta1.to(tl.float32) * first_moment + rest1.to(tl.float32) * g
        second_moment = beta2.to(tl.float32) * second_moment + rest2.to(tl.float32) * (g * g)
        p = p - size.to(tl.float32) * tl.div_rn(first_moment, tl.sqrt_rn(second_moment) + least.to(tl.float32))
        tl.store(first_at, first_moment, mask=mask)
        tl.store(second_at, second_moment, mask=mask)
    elif RULE == RULE_NESTEROV:
        rate_inside = tl.load(rule + INSIDE) != 0.0
        momentum = tl.load(rule + MOMENTUM)
        inner = tl.where(rate_inside, -rate, 1.0)
        outer = tl.where(rate_inside, 1.0, -rate)
        velocity = tl.load(first_at, mask=mask, other=0.0)
        change = inner.to(tl.float32) * g
        velocity = momentum.to(tl.float32) * velocity + change
        p = p + outer.to(tl.float32) * (change + momentum.to(tl.float32) * velocity)
        tl.store(first_at, velocity, mask=mask)
    else:
        p += float("nan")
    tl.store(p_at, p, mask=mask)
    if shadowed != 0:
        tl.store(shadow_at, p.to(shadow_at.dtype.element_ty), mask=mask)
    if averages:
        share = tl.load(hyper + SHARE)
        average = tl.load(average_at, mask=mask, other=0.0)
        average = average + share.to(tl.float32) * (p - average)
        tl.store(average_at, average, mask=mask)
