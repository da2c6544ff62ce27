"""The functions of ``pointwise.FUNCTIONS`` that Triton does not have, elementwise, float32."""

from __future__ import annotations

import triton
import triton.language as tl


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
    """The normal distribution function."""
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def normal_pdf(z):
    """The normal density."""
    return 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def log1p(z):
    """log(1 + z) for 0 <= z <= 1; the quotient restores what the sum has rounded away, which is all of a small z."""
    s = 1.0 + z
    return tl.log(s) + (z - (s - 1.0)) / s


@triton.jit
def maximum(z, other):
    """The larger one; NaN where z is."""
    return tl.where(z < other, other, z)


@triton.jit
def minimum(z, other):
    """The smaller one; NaN where z is."""
    return tl.where(z > other, other, z)


@triton.jit
def sign(z):
    """1, 0, -1 or NaN."""
    return tl.where(z > 0, 1.0, tl.where(z < 0, -1.0, z))


@triton.jit
def step(z, below):
    """1 above zero, ``below`` elsewhere, and NaN for NaN."""
    return tl.where(z > 0, 1.0, tl.where(z <= 0, below, z))
