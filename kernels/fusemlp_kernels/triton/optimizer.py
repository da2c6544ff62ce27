"""The optimizers as the epilogue of a gradient, elementwise; the formulas are in ``reference.update``."""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.triton.clock import (
    BETA1,
    BETA2,
    BIAS_CORRECTION_1,
    BIAS_CORRECTION_2,
    DECOUPLED,
    EPS,
    INSIDE,
    LEARNING_RATE,
    MOMENTUM,
    NESTEROV,
)

# How many arrays of state the kernels know: SGD none, momentum one, Adam two.
SGD: tl.constexpr = tl.constexpr(0)
ADAM_STATES: tl.constexpr = tl.constexpr(2)


@triton.jit
def decayed(p, g, rate, decay, rule):
    """The parameter and the gradient after weight decay."""
    decoupled = tl.load(rule + DECOUPLED) != 0.0
    p = tl.where(decoupled, p * (1.0 - rate * decay).to(tl.float32), p)
    g = tl.where(decoupled, g, g + decay.to(tl.float32) * p)
    return p, g


@triton.jit
def sgd(p, g, rate):
    """Plain gradient descent."""
    return p - rate.to(tl.float32) * g


@triton.jit
def momentum(p, g, velocity, rate, rule):
    """The new parameter and velocity. scikit-learn keeps the rate inside the velocity, and its sign."""
    mu = tl.load(rule + MOMENTUM).to(tl.float32)
    inside = tl.load(rule + INSIDE) != 0.0
    nesterov = tl.load(rule + NESTEROV) != 0.0
    rate = rate.to(tl.float32)
    step = tl.where(inside, -rate * g, g)
    velocity = mu * velocity + step
    move = tl.where(nesterov, step + mu * velocity, velocity)
    return tl.where(inside, p + move, p - rate * move), velocity


@triton.jit
def adam(p, g, first, second, rate, hyper, rule):
    """The new parameter and moments.

    With r = sqrt(bc2) multiplied through, m / bc1 / (sqrt(v / bc2) + eps) = m r / bc1 / (sqrt(v) + eps r).
    """
    beta1 = tl.load(rule + BETA1)
    beta2 = tl.load(rule + BETA2)
    eps = tl.load(rule + EPS)
    root = tl.sqrt(tl.load(hyper + BIAS_CORRECTION_2))
    scale = (rate * root / tl.load(hyper + BIAS_CORRECTION_1)).to(tl.float32)
    eps = tl.where(tl.load(rule + INSIDE) != 0.0, eps, eps * root).to(tl.float32)
    first = beta1.to(tl.float32) * first + (1.0 - beta1).to(tl.float32) * g
    second = beta2.to(tl.float32) * second + (1.0 - beta2).to(tl.float32) * (g * g)
    quotient = tl.div_rn(first, tl.sqrt_rn(second) + eps)
    # a parameter that never had a gradient stays as it is, whatever eps is; so does the padding
    quotient = tl.where(first == 0.0, 0.0, quotient)
    return p - scale * quotient, first, second


@triton.jit
def learning_rate(hyper, factor):
    """The rate of this update for a tensor, float64."""
    return tl.load(hyper + LEARNING_RATE) * factor


@triton.jit
def stored_update(
    g, p_at, first_at, second_at, shadow_at, mask, hyper, rule, factor, decay, shadowed, STATES: tl.constexpr
):  # fmt: skip
    """Update the parameters at ``p_at`` and their states by the gradient ``g``; elements outside ``mask`` get zero
    gradients and are not stored. ``shadow_at`` receives the parameter rounded, where ``shadowed``."""
    rate = learning_rate(hyper, factor)
    p = tl.load(p_at, mask=mask, other=0.0)
    p, g = decayed(p, g, rate, decay, rule)
    if STATES == SGD:
        p = sgd(p, g, rate)
    elif STATES == ADAM_STATES:
        first = tl.load(first_at, mask=mask, other=0.0)
        second = tl.load(second_at, mask=mask, other=0.0)
        p, first, second = adam(p, g, first, second, rate, hyper, rule)
        tl.store(first_at, first, mask=mask)
        tl.store(second_at, second, mask=mask)
    else:
        velocity = tl.load(first_at, mask=mask, other=0.0)
        p, velocity = momentum(p, g, velocity, rate, rule)
        tl.store(first_at, velocity, mask=mask)
    tl.store(p_at, p, mask=mask)
    if shadowed != 0:
        tl.store(shadow_at, p.to(shadow_at.dtype.element_ty), mask=mask)
