"""The optimizers: one sweep over a tensor and its state; the formulas are in ``reference.update``."""

from __future__ import annotations

import math
from typing import Any

from numba.extending import register_jitable

from fusemlp_kernels.contract import BIAS_CORRECTION_1, BIAS_CORRECTION_2, LEARNING_RATE
from fusemlp_kernels.numpy.compiled.options import ELEMENTWISE, EXACT, REDUCTION
from fusemlp_kernels.numpy.compiled.tables import (
    ADAM,
    BETA1,
    BETA2,
    DECAY,
    DECOUPLED,
    EPS,
    LR_FACTOR,
    MOMENTUM,
    NESTEROV,
    OFFSET,
    OPTIMIZER,
    SIZE,
    SKLEARN,
)


@register_jitable(**REDUCTION)
def _squares(values: Any, divisor: float) -> float:
    total = 0.0
    for i in range(values.size):
        quotient = values[i] / divisor
        total += quotient * quotient
    return total


@register_jitable(**REDUCTION)
def penalise(p: Any, g: Any, strength: float) -> float:
    """Add the gradient of ``strength / 2 * sum(p ** 2)`` to g; that sum of squares."""
    real = p.dtype.type
    times, total = real(strength), real(0.0)
    for i in range(p.size):
        total += p[i] * p[i]
        g[i] += times * p[i]
    return float(total)


@register_jitable(**EXACT)
def clip_factor(grads: Any, tensors: Any, scale: float, limit: float) -> float:
    """What clipping multiplies the gradients by, which ``scale`` multiplies already; NaN where one is NaN."""
    total = 0.0
    for t in range(len(tensors)):
        start = tensors[t, OFFSET]
        total += _squares(grads[start : start + tensors[t, SIZE]], 1.0)
    norm = math.sqrt(total)
    if math.isinf(norm):
        # the squares overflowed, perhaps not the norm
        largest = 0.0
        for t in range(len(tensors)):
            start = tensors[t, OFFSET]
            for i in range(start, start + tensors[t, SIZE]):
                largest = max(largest, abs(grads[i]))
        if not math.isinf(largest):
            total = 0.0
            for t in range(len(tensors)):
                start = tensors[t, OFFSET]
                total += _squares(grads[start : start + tensors[t, SIZE]], largest)
            norm = largest * math.sqrt(total)
    factor = limit / (norm * scale + 1e-6)
    return 1.0 if factor > 1.0 else factor


@register_jitable(**ELEMENTWISE)
def _adam(p: Any, g: Any, m: Any, v: Any, rule: Any, factors: Any, hyper: Any, rate: float, coupled: float) -> None:
    real = p.dtype.type
    root = math.sqrt(hyper[BIAS_CORRECTION_2])
    # with root multiplied through, sqrt(v / bc2) + eps = (sqrt(v) + eps * root) / root
    step = real(rate * root / hyper[BIAS_CORRECTION_1])
    eps = real(factors[EPS] if rule[SKLEARN] else factors[EPS] * root)
    beta1, rest1 = real(factors[BETA1]), real(1.0 - factors[BETA1])
    beta2, rest2 = real(factors[BETA2]), real(1.0 - factors[BETA2])
    decay = real(coupled)
    for i in range(p.size):
        gradient = g[i] + decay * p[i]
        first = beta1 * m[i] + rest1 * gradient
        second = beta2 * v[i] + rest2 * (gradient * gradient)
        m[i], v[i] = first, second
        p[i] -= step * (first / (math.sqrt(second) + eps))


@register_jitable(**ELEMENTWISE)
def _momentum(p: Any, g: Any, v: Any, rule: Any, factors: Any, rate: float, coupled: float) -> None:
    real = p.dtype.type
    momentum, decay, step = real(factors[MOMENTUM]), real(coupled), real(rate)
    # scikit-learn keeps the learning rate, and the sign, inside the velocity
    inside = -step if rule[SKLEARN] else real(1.0)
    outside = real(1.0) if rule[SKLEARN] else -step
    if rule[NESTEROV]:
        for i in range(p.size):
            gradient = inside * (g[i] + decay * p[i])
            velocity = momentum * v[i] + gradient
            v[i] = velocity
            p[i] += outside * (gradient + momentum * velocity)
    else:
        for i in range(p.size):
            velocity = momentum * v[i] + inside * (g[i] + decay * p[i])
            v[i] = velocity
            p[i] += outside * velocity


@register_jitable(**ELEMENTWISE)
def update_all(
    params: Any, grads: Any, first: Any, second: Any, tensors: Any, tensor_factors: Any, rule: Any, factors: Any,
    hyper: Any, scale: float,
) -> None:  # fmt: skip
    """Every trained tensor from its gradient times ``scale``; grads is written to."""
    real = params.dtype.type
    for t in range(len(tensors)):
        start = tensors[t, OFFSET]
        stop = start + tensors[t, SIZE]
        p, g = params[start:stop], grads[start:stop]
        rate = hyper[LEARNING_RATE] * tensor_factors[t, LR_FACTOR]
        decay = tensor_factors[t, DECAY]
        if scale != 1.0:
            times = real(scale)
            for i in range(g.size):
                g[i] *= times
        coupled = 0.0 if rule[DECOUPLED] else decay
        if rule[DECOUPLED] and decay != 0.0:
            shrunk = real(1.0 - rate * decay)
            for i in range(p.size):
                p[i] *= shrunk
        if rule[OPTIMIZER] == ADAM:
            _adam(p, g, first[start:stop], second[start:stop], rule, factors, hyper, rate, coupled)
        elif factors[MOMENTUM] != 0.0:
            _momentum(p, g, first[start:stop], rule, factors, rate, coupled)
        else:
            step, added = real(rate), real(coupled)
            for i in range(p.size):
                p[i] -= step * (g[i] + added * p[i])
