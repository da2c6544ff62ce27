"""The functions that Triton does not have: those of ``pointwise.FUNCTIONS``, elementwise, float32; and random numbers,
such as dropout masks, which each kernel computes again. ``philox`` defines them."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fusemlp_kernels import philox as definition

START: tl.constexpr = tl.constexpr(definition.START)
NORMALS: tl.constexpr = tl.constexpr(definition.NORMALS)
UNIT: tl.constexpr = tl.constexpr(2.0**-32)
HALF_PI: tl.constexpr = tl.constexpr(0.5 * math.pi)
COSINE: tl.constexpr = tl.constexpr(definition.COSINE)
SINE: tl.constexpr = tl.constexpr(definition.SINE)
COSINES: tl.constexpr = tl.constexpr(len(definition.COSINE))
SINES: tl.constexpr = tl.constexpr(len(definition.SINE))


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


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox 4x32-10: return four uint32 words from four counter words and two key words."""
    for _ in tl.static_range(10):
        high0 = tl.umulhi(c0, 0xD2511F53)
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low0 = c0 * 0xD2511F53
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def keep_mask(
    first_row, first_column, batch_index, layer, key0, key1, threshold, ROWS: tl.constexpr, COLS: tl.constexpr
):
    """Return the mask of the kept elements of a tile (ROWS, COLS), bool; ``first_column`` is a multiple of 8.

    One call gives the masks of eight neighbouring columns, which are then laid side by side.
    """
    zero = tl.zeros((ROWS, COLS // 8), tl.uint32)
    blocks = (first_column // 8 + tl.arange(0, COLS // 8)).to(tl.uint32)
    rows = (first_row + tl.arange(0, ROWS)).to(tl.uint32)
    w0, w1, w2, w3 = philox(
        zero + blocks[None, :],
        zero + rows[:, None],
        zero + layer.to(tl.uint32),
        zero + batch_index.to(tl.uint32),
        zero + key0.to(tl.uint32, bitcast=True),
        zero + key1.to(tl.uint32, bitcast=True),
    )
    least = threshold.to(tl.uint32)
    # lane 2i is the low half of word i and lane 2i + 1 the high half
    even = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    odd = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.reshape(tl.join(even, odd) >= least, (ROWS, COLS))


@triton.jit
def uniform(row, first_column, batch_index, key0, key1, COLS: tl.constexpr):
    """Return the numbers of ``philox.uniform`` for columns of a row, (COLS,); ``first_column`` is a multiple of 4."""
    zero = tl.zeros((COLS // 4,), tl.uint32)
    w0, w1, w2, w3 = philox(
        zero + (first_column // 4 + tl.arange(0, COLS // 4)).to(tl.uint32),
        zero + row.to(tl.uint32),
        zero + START,
        zero + batch_index.to(tl.uint32),
        zero + key0.to(tl.uint32, bitcast=True),
        zero + key1.to(tl.uint32, bitcast=True),
    )
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (COLS,))
    # exact in float32
    highest = (words >> 9).to(tl.int32, bitcast=True).to(tl.float32)
    return highest * 2.384185791015625e-07 + (1.1920928955078125e-07 - 1.0)


@triton.jit
def normal(element, tensor, update, key0, key1):
    """Return the numbers of ``philox.normal`` for elements (int64) of a tensor, float64.

    A turn by a quadrant's half leaves angles up to pi / 4.
    """
    zero = tl.zeros_like(element).to(tl.uint32)
    w0, w1, w2, w3 = philox(
        (element % NORMALS // 4).to(tl.uint32),
        (element // NORMALS).to(tl.uint32),
        # 2**32 - 2 - tensor, modulo 2**32
        zero + (-2 - tensor).to(tl.uint32),
        zero + update.to(tl.uint32),
        zero + key0.to(tl.uint32, bitcast=True),
        zero + key1.to(tl.uint32, bitcast=True),
    )
    second, odd = element % 4 >= 2, element % 2 == 1
    angle = tl.where(second, w3, w1)
    length = tl.sqrt(-tl.log((tl.where(second, w2, w0).to(tl.float64) + 0.5) * UNIT))
    t = ((angle.to(tl.float64) + 0.5) * UNIT - 0.5) * HALF_PI
    square = t * t
    cosine, sine = tl.zeros_like(t), tl.zeros_like(t)
    for i in tl.static_range(COSINES):
        cosine = cosine * square + COSINE[i]
    for i in tl.static_range(SINES):
        sine = sine * square + SINE[i]
    sine = sine * t
    z = length * (cosine + tl.where(odd, sine, -sine))
    return tl.where(tl.where(odd, angle & 2, angle & 1) != 0, -z, z)
