"""Members that share weights: their own factors and biases around a product, and sums over each member's rows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.options import ELEMENTWISE, EXACT
from fusemlp_kernels.numpy.compiled.pointwise_numba import activate, multiply_by_derivative


@register_jitable(**ELEMENTWISE)
def _affine(y: Any, z: Any, x: Any, s: Any, b: Any, count: int) -> None:
    """``x * s + b``, in y and in z."""
    for j in range(np.uintp(count)):
        value = x[j] * s[j] + b[j]
        y[j] = value
        z[j] = value


@register_jitable(**ELEMENTWISE)
def scale(y: Any, x: Any, r: Any, count: int) -> None:
    """``y = x * r``; y may be x."""
    for j in range(np.uintp(count)):
        y[j] = x[j] * r[j]


@register_jitable(**EXACT)
def activated(y: Any, z: Any, x: Any, s: Any, b: Any, count: int, activation: int, slope: float) -> None:
    """``y = act(z)`` with ``z = x * s + b``."""
    _affine(y, z, x, s, b, count)
    activate(activation, y, z, count, slope)


@register_jitable(**ELEMENTWISE)
def kept(values: Any, keep: Any, count: int, factor: float) -> None:
    """Values grow by ``factor`` where ``keep`` is set, and become zero elsewhere."""
    real = values.dtype.type
    grown, zero = real(factor), real(0.0)
    for j in range(np.uintp(count)):
        values[j] = values[j] * grown if keep[j] else zero


@register_jitable(**ELEMENTWISE)
def add_products(sums: Any, a: Any, b: Any, count: int) -> None:
    """``sums += a * b``."""
    for j in range(np.uintp(count)):
        sums[j] += a[j] * b[j]


@register_jitable(**EXACT)
def clear(values: Any, count: int) -> None:
    """Zeros."""
    for j in range(np.uintp(count)):
        values[j] = 0


@register_jitable(**ELEMENTWISE)
def _sum_and_scale(dz: Any, x: Any, s: Any, by_s: Any, by_b: Any, count: int) -> None:
    for j in range(np.uintp(count)):
        by_s[j] += dz[j] * x[j]
        by_b[j] += dz[j]
        dz[j] = dz[j] * s[j]


@register_jitable(**EXACT)
def derive(
    dz: Any, h: Any, z: Any, x: Any, s: Any, by_s: Any, by_b: Any, count: int, activation: int, slope: float
) -> None:  # fmt: skip
    """From the gradient by h = act(z), in dz, to that by x, in its place; the sums by s and b grow."""
    multiply_by_derivative(activation, dz, h, z, count, slope, 1.0)
    _sum_and_scale(dz, x, s, by_s, by_b, count)
