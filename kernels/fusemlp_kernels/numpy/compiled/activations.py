"""Activations and their derivatives, one loop each over flat arrays; the formulas are in ``reference``."""

from __future__ import annotations

from typing import Any

from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.functions import sigmoid, tanh
from fusemlp_kernels.numpy.compiled.normal import normal_cdf, normal_slope
from fusemlp_kernels.numpy.compiled.options import ELEMENTWISE
from fusemlp_kernels.numpy.compiled.tables import GELU, LEAKY_RELU, PRELU, RELU, SIGMOID, SILU, TANH


@register_jitable(**ELEMENTWISE)
def activate(kind: int, y: Any, z: Any, slope: float) -> None:
    """``y = act(z)``; y holds z where the derivative is had from y, and is other memory where it needs z (``NEEDS_Z``).

    In place means of one array: two that overlap the compiler has to take element by element.
    """
    real = y.dtype.type
    zero, factor = real(0.0), real(slope)
    if kind == RELU:
        for i in range(y.size):
            v = y[i]
            y[i] = zero if v <= zero else v
    elif kind == LEAKY_RELU:
        for i in range(y.size):
            v = y[i]
            y[i] = v if v > zero else factor * v
    elif kind == PRELU:
        for i in range(y.size):
            v = z[i]
            y[i] = v if v > zero else factor * v
    elif kind == SIGMOID:
        for i in range(y.size):
            y[i] = sigmoid(y[i])
    elif kind == TANH:
        for i in range(y.size):
            y[i] = tanh(y[i])
    elif kind == GELU:
        for i in range(y.size):
            y[i] = z[i] * normal_cdf(z[i])
    elif kind == SILU:
        for i in range(y.size):
            y[i] = z[i] * sigmoid(z[i])


@register_jitable(**ELEMENTWISE)
def multiply_by_derivative(kind: int, d: Any, y: Any, z: Any, slope: float, undo_scale: float) -> float:
    """``d *= act'``; y is the output behind dropout: ``undo_scale`` brings it back. Returns prelu's gradient, or 0."""
    real = d.dtype.type
    zero, one = real(0.0), real(1.0)
    factor, undo = real(slope), real(undo_scale)
    dslope = 0.0
    if kind == RELU:
        for i in range(d.size):
            v = y[i]
            d[i] *= one if v > zero else (zero if v <= zero else v)
    elif kind == LEAKY_RELU:
        for i in range(d.size):
            v = y[i]
            d[i] *= one if v > zero else (factor if v <= zero else v)
    elif kind == PRELU:
        for i in range(d.size):
            v = z[i]
            dslope += d[i] * (zero if v > zero else v)
            d[i] *= one if v > zero else (factor if v <= zero else v)
    elif kind == SIGMOID:
        for i in range(d.size):
            s = y[i] * undo
            d[i] *= s * (one - s)
    elif kind == TANH:
        for i in range(d.size):
            s = y[i] * undo
            d[i] *= one - s * s
    elif kind == GELU:
        for i in range(d.size):
            d[i] *= normal_slope(z[i])
    elif kind == SILU:
        for i in range(d.size):
            v = z[i]
            s = sigmoid(v)
            d[i] *= s * (one + v * (one - s))
    return dslope
