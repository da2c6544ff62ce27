"""Activations and their derivatives inside kernels; the mathematics is in ``reference``.

Which activation it is, is a run-time number (``CODES``): the branch is taken alike by all threads, and the kernels need
not be compiled once for each. The piecewise linear ones differ only in their slope below zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fusemlp_kernels.contract import ACTIVATIONS

CODES = {name: code for code, name in enumerate(ACTIVATIONS)}
# The codes that the kernels name. They follow from the order in the contract, which a test holds.
IDENTITY: tl.constexpr = tl.constexpr(CODES["identity"])
PRELU: tl.constexpr = tl.constexpr(CODES["prelu"])
SIGMOID: tl.constexpr = tl.constexpr(CODES["sigmoid"])
TANH: tl.constexpr = tl.constexpr(CODES["tanh"])
GELU: tl.constexpr = tl.constexpr(CODES["gelu"])

# What the launcher passes as the slope where the activation has none of its own.
FIXED_SLOPES = {"identity": 1.0, "relu": 0.0}


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)); no exponential overflows."""
    e = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def tanh(z):
    """tanh(z). Near zero, where the quotient of exponentials cancels, the polynomial of the Cephes library (tanhf)."""
    s = z * z
    poly = -5.70498872745e-3 * s + 2.06390887954e-2
    poly = poly * s - 5.37397155531e-2
    poly = poly * s + 1.33314422036e-1
    poly = poly * s - 3.33332819422e-1
    near = poly * s * z + z
    e = tl.exp(-2.0 * tl.abs(z))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(z < 0, -far, far)
    return tl.where(tl.abs(z) < 0.625, near, far)


@triton.jit
def normal_cdf(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def activate(z, code, slope):
    """f(z), elementwise, float32."""
    if code < SIGMOID:
        # relu(-inf) is 0, not -inf * 0; NaN stays
        y = tl.where(z > 0, z, tl.where(z <= 0, tl.where(slope == 0.0, 0.0, z * slope), z * slope))
    elif code == SIGMOID:
        y = sigmoid(z)
    elif code == TANH:
        y = tanh(z)
    elif code == GELU:
        y = z * normal_cdf(z)
    else:
        y = z * sigmoid(z)
    return y


@triton.jit
def needs_z(code):
    """Whether the derivative is computed from z; for the others it is read off the output."""
    return (code == PRELU) | (code >= GELU)


@triton.jit
def derivative(v, code, slope):
    """f'(z), elementwise, from ``v``: z where ``needs_z``, else y = f(z). NaN stays, but for the identity."""
    if code < SIGMOID:
        d = tl.where(v > 0, 1.0, tl.where(v <= 0, slope, v))
        d = tl.where(code == IDENTITY, 1.0, d)
    elif code == SIGMOID:
        d = v * (1.0 - v)
    elif code == TANH:
        d = 1.0 - v * v
    elif code == GELU:
        d = normal_cdf(v) + v * 0.3989422804014327 * tl.exp(-0.5 * v * v)
    else:
        s = sigmoid(v)
        d = s * (1.0 + v * (1.0 - s))
    return d
