# Printed from pointwise.py by `python ci/print_formulas.py`; do not edit.
# mypy: disallow-untyped-defs=False
"""The formulas as passes over arrays; ``s0``, ``s1``, ... are scratch, shaped like the other arrays."""

from __future__ import annotations

import math

from numpy import abs, add, copyto, divide, exp, log1p, multiply, negative, sign, sqrt, subtract, tanh

from fusemlp_kernels.contract import BIAS_CORRECTION_1, BIAS_CORRECTION_2
from fusemlp_kernels.numpy.functions import maximum, minimum, normal_cdf, normal_pdf, sigmoid, step


def activate_identity(y, z, slope):
    copyto(y, z)


def derive_identity(d, y, z, slope, undo):
    pass


def activate_relu(y, z, slope):
    maximum(z, 0.0, out=y)


def derive_relu(d, y, z, slope, undo, s0):
    step(y, 0.0, out=s0)
    multiply(d, s0, out=d)


def activate_leaky_relu(y, z, slope, s0):
    maximum(z, 0.0, out=s0)
    minimum(z, 0.0, out=y)
    multiply(slope, y, out=y)
    add(s0, y, out=y)


def derive_leaky_relu(d, y, z, slope, undo, s0):
    step(y, slope, out=s0)
    multiply(d, s0, out=d)


def activate_prelu(y, z, slope, s0):
    maximum(z, 0.0, out=s0)
    minimum(z, 0.0, out=y)
    multiply(slope, y, out=y)
    add(s0, y, out=y)


def derive_prelu(d, y, z, slope, undo, s0):
    step(z, slope, out=s0)
    multiply(d, s0, out=d)


def by_slope_prelu(out, z):
    minimum(z, 0.0, out=out)


def activate_sigmoid(y, z, slope):
    sigmoid(z, out=y)


def derive_sigmoid(d, y, z, slope, undo, s0, s1):
    multiply(y, undo, out=s0)
    subtract(1.0, s0, out=s1)
    multiply(s0, s1, out=s1)
    multiply(d, s1, out=d)


def activate_tanh(y, z, slope):
    tanh(z, out=y)


def derive_tanh(d, y, z, slope, undo, s0, s1):
    multiply(y, undo, out=s0)
    multiply(s0, s0, out=s1)
    subtract(1.0, s1, out=s1)
    multiply(d, s1, out=d)


def activate_gelu(y, z, slope, s0):
    normal_cdf(z, out=s0)
    multiply(z, s0, out=y)


def derive_gelu(d, y, z, slope, undo, s0, s1):
    normal_cdf(z, out=s0)
    normal_pdf(z, out=s1)
    multiply(z, s1, out=s1)
    add(s0, s1, out=s0)
    multiply(d, s0, out=d)


def activate_silu(y, z, slope, s0):
    sigmoid(z, out=s0)
    multiply(z, s0, out=y)


def derive_silu(d, y, z, slope, undo, s0, s1):
    sigmoid(z, out=s0)
    subtract(1.0, s0, out=s1)
    multiply(z, s1, out=s1)
    add(1.0, s1, out=s1)
    multiply(s0, s1, out=s1)
    multiply(d, s1, out=d)


def loss_binary_cross_entropy(y, t, loss, gradient, differentiate, option, s0):
    abs(y, out=loss)
    negative(loss, out=loss)
    exp(loss, out=loss)
    maximum(y, 0.0, out=s0)
    log1p(loss, out=loss)
    add(s0, loss, out=loss)
    multiply(t, y, out=s0)
    subtract(loss, s0, out=loss)
    if differentiate:
        sigmoid(y, out=gradient)
        subtract(gradient, t, out=gradient)


def loss_mse(y, t, loss, gradient, differentiate, option):
    subtract(y, t, out=gradient)
    multiply(gradient, gradient, out=loss)
    if differentiate:
        multiply(2.0, gradient, out=gradient)


def loss_mae(y, t, loss, gradient, differentiate, option):
    subtract(y, t, out=gradient)
    abs(gradient, out=loss)
    if differentiate:
        sign(gradient, out=gradient)


def loss_huber(y, t, loss, gradient, differentiate, delta, s0):
    subtract(y, t, out=loss)
    maximum(loss, -delta, out=gradient)
    minimum(gradient, delta, out=gradient)
    multiply(0.5, gradient, out=s0)
    subtract(loss, s0, out=loss)
    multiply(gradient, loss, out=loss)


def loss_poisson(y, t, loss, gradient, differentiate, option, s0):
    exp(y, out=s0)
    multiply(t, y, out=loss)
    subtract(s0, loss, out=loss)
    if differentiate:
        subtract(s0, t, out=gradient)


def loss_quantile(y, t, loss, gradient, differentiate, quantile, s0, s1):
    subtract(y, t, out=loss)
    sign(loss, out=gradient)
    multiply(1.0 - quantile, gradient, out=s0)
    multiply(-quantile, gradient, out=s1)
    maximum(s0, s1, out=s0)
    abs(loss, out=loss)
    multiply(s0, loss, out=loss)
    if differentiate:
        multiply(s0, gradient, out=gradient)


def update_decay(p, g, rate, decay, rule, hyper, s0):
    decoupled = rule.decoupled
    kept = 1.0 - rate * decay if decoupled else 1.0
    coupled = 0.0 if decoupled else decay
    if kept != 1.0:
        multiply(kept, p, out=p)
    if coupled != 0.0:
        multiply(coupled, p, out=s0)
        add(g, s0, out=g)


def update_sgd(p, g, rate, decay, rule, hyper, s0):
    multiply(rate, g, out=s0)
    subtract(p, s0, out=p)


def update_momentum(p, g, velocity, rate, decay, rule, hyper, s0):
    rate_inside = rule.convention == "scikit-learn"
    momentum = rule.momentum
    inner = -rate if rate_inside else 1.0
    outer = 1.0 if rate_inside else -rate
    multiply(momentum, velocity, out=velocity)
    multiply(inner, g, out=s0)
    add(velocity, s0, out=velocity)
    multiply(outer, velocity, out=s0)
    add(p, s0, out=p)


def update_adam(p, g, first_moment, second_moment, rate, decay, rule, hyper, s0):
    bias_correction_2 = hyper[BIAS_CORRECTION_2]
    bias_correction_1 = hyper[BIAS_CORRECTION_1]
    rate_inside = rule.convention == "scikit-learn"
    eps = rule.eps
    beta1 = rule.beta1
    beta2 = rule.beta2
    root = math.sqrt(bias_correction_2)
    size = rate * root / bias_correction_1
    least = max(eps if rate_inside else eps * root, 1.1754943508222875e-38)
    rest1 = 1.0 - beta1
    rest2 = 1.0 - beta2
    multiply(beta1, first_moment, out=first_moment)
    multiply(rest1, g, out=s0)
    add(first_moment, s0, out=first_moment)
    multiply(beta2, second_moment, out=second_moment)
    multiply(g, g, out=s0)
    multiply(rest2, s0, out=s0)
    add(second_moment, s0, out=second_moment)
    sqrt(second_moment, out=s0)
    add(s0, least, out=s0)
    divide(first_moment, s0, out=s0)
    multiply(size, s0, out=s0)
    subtract(p, s0, out=p)


def update_nesterov(p, g, velocity, rate, decay, rule, hyper, s0, s1):
    rate_inside = rule.convention == "scikit-learn"
    momentum = rule.momentum
    inner = -rate if rate_inside else 1.0
    outer = 1.0 if rate_inside else -rate
    multiply(inner, g, out=s0)
    multiply(momentum, velocity, out=velocity)
    add(velocity, s0, out=velocity)
    multiply(momentum, velocity, out=s1)
    add(s0, s1, out=s1)
    multiply(outer, s1, out=s1)
    add(p, s1, out=p)
