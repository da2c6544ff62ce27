"""The penalty, clipping, and the optimizer: one sweep over each tensor and its states."""

from __future__ import annotations

import math
from typing import Any

from numba.extending import register_jitable

from fusemlp_kernels.contract import LEARNING_RATE
from fusemlp_kernels.numpy.compiled.options import ELEMENTWISE, EXACT, REDUCTION
from fusemlp_kernels.numpy.compiled.pointwise_numba import update_tensor
from fusemlp_kernels.numpy.compiled.views import part, tensor_at


@register_jitable(**REDUCTION)
def squares(values: Any, count: int, divisor: float) -> float:
    total = 0.0
    for i in range(count):
        quotient = values[i] / divisor
        total += quotient * quotient
    return total


@register_jitable(**REDUCTION)
def penalise(p: Any, g: Any, count: int, strength: float) -> float:
    """Add the gradient of ``strength / 2 * sum(p ** 2)`` to g; that sum of squares."""
    real = p.dtype.type
    times, total = real(strength), real(0.0)
    for i in range(count):
        total += p[i] * p[i]
        g[i] += times * p[i]
    return float(total)


@register_jitable(**EXACT)
def clip_factor(
    grads: Any, tensors: int, first: int, end: int, total: float, scale: float, limit: float
) -> float:  # fmt: skip
    """The factor of clipping for the gradients of tensors first to before end, which ``scale`` multiplies already.

    ``total`` is the sum of their squares. The factor is NaN where a gradient is NaN.
    """
    norm = math.sqrt(total)
    if math.isinf(norm):
        # the squares overflowed, perhaps not the norm
        largest = 0.0
        for at in range(first, end):
            tensor = tensor_at(tensors, at)
            for i in range(tensor.offset, tensor.offset + tensor.size):
                largest = max(largest, abs(grads[i]))
        if not math.isinf(largest):
            total = 0.0
            for at in range(first, end):
                tensor = tensor_at(tensors, at)
                total += squares(part(grads, tensor.offset), tensor.size, largest)
            norm = largest * math.sqrt(total)
    factor = limit / (norm * scale + 1e-6)
    return 1.0 if factor > 1.0 else factor


@register_jitable(**ELEMENTWISE)
def update_part(
    p: Any, g: Any, s0: Any, s1: Any, count: int, tensor: Any, rule: Any, hyper: Any, scale: float
) -> None:  # fmt: skip
    """Update a part of a tensor from its gradient times ``scale``; g is written to."""
    if scale != 1.0:
        times = p.dtype.type(scale)
        for i in range(count):
            g[i] *= times
    update_tensor(p, g, s0, s1, count, hyper[LEARNING_RATE] * tensor.lr_factor, tensor.decay, rule, hyper)
