"""The penalty, clipping, and the optimizer: one sweep over each tensor and its states."""

from __future__ import annotations

import math
from typing import Any

from numba.extending import register_jitable

from fusemlp_kernels.contract import LEARNING_RATE
from fusemlp_kernels.numpy.compiled.options import ELEMENTWISE, EXACT, REDUCTION
from fusemlp_kernels.numpy.compiled.pointwise_numba import update_tensor
from fusemlp_kernels.numpy.compiled.tables import DECAY, LR_FACTOR, OFFSET, SIZE, TENSOR_COLUMNS, TENSOR_FACTORS
from fusemlp_kernels.numpy.compiled.views import part


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
def clip_factor(grads: Any, tensors: Any, first: int, end: int, scale: float, limit: float) -> float:
    """The factor of clipping for the gradients of tensors first to before end, which ``scale`` multiplies already.

    It is NaN where a gradient is NaN.
    """
    total = 0.0
    for t in range(first, end):
        start = tensors[t * TENSOR_COLUMNS + OFFSET]
        total += _squares(part(grads, start, tensors[t * TENSOR_COLUMNS + SIZE]), 1.0)
    norm = math.sqrt(total)
    if math.isinf(norm):
        # the squares overflowed, perhaps not the norm
        largest = 0.0
        for t in range(first, end):
            start = tensors[t * TENSOR_COLUMNS + OFFSET]
            for i in range(start, start + tensors[t * TENSOR_COLUMNS + SIZE]):
                largest = max(largest, abs(grads[i]))
        if not math.isinf(largest):
            total = 0.0
            for t in range(first, end):
                start = tensors[t * TENSOR_COLUMNS + OFFSET]
                total += _squares(part(grads, start, tensors[t * TENSOR_COLUMNS + SIZE]), largest)
            norm = largest * math.sqrt(total)
    factor = limit / (norm * scale + 1e-6)
    return 1.0 if factor > 1.0 else factor


@register_jitable(**ELEMENTWISE)
def update_all(
    params: Any, grads: Any, states0: Any, states1: Any, tensors: Any, tensor_factors: Any, first: int, end: int,
    rule: Any, factors: Any, hyper: Any, scale: float,
) -> None:  # fmt: skip
    """Update tensors first to before end, each from its gradient times ``scale``; grads is written to."""
    real = params.dtype.type
    for t in range(first, end):
        start = tensors[t * TENSOR_COLUMNS + OFFSET]
        size = tensors[t * TENSOR_COLUMNS + SIZE]
        g = part(grads, start, size)
        rate = hyper[LEARNING_RATE] * tensor_factors[t * TENSOR_FACTORS + LR_FACTOR]
        decay = tensor_factors[t * TENSOR_FACTORS + DECAY]
        if scale != 1.0:
            times = real(scale)
            for i in range(size):
                g[i] *= times
        p, s0, s1 = part(params, start, size), part(states0, start, size), part(states1, start, size)
        update_tensor(p, g, s0, s1, rate, decay, rule, factors, hyper)
