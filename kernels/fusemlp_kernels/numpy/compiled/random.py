"""Random numbers, compiled: the words and dropout masks of ``philox``, its order of the rows in an epoch, and private
training: the norms of the rows' gradients, clipping, and the noise of ``philox.normal``."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.compiler import ELEMENT, ELEMENTWISE, EXACT, elements, kept, part
from fusemlp_kernels.numpy.compiled.functions import logarithm
from fusemlp_kernels.numpy.compiled.vectors import sum_of_squares
from fusemlp_kernels.philox import (
    COSINE,
    FEISTEL_ROUNDS,
    KEY_STEPS,
    LANES,
    MULTIPLIERS,
    NORMALS,
    ROUNDS,
    ROW_ORDER,
    SINE,
    WORD,
)

# Mixed with a signed integer, an unsigned one would become a float.
_M0, _M1 = map(np.uint64, MULTIPLIERS)
_STEP0, _STEP1 = map(np.uint64, KEY_STEPS)
_WORD, _HALF, _ROW_ORDER = np.uint64(WORD), np.uint64(32), np.uint64(ROW_ORDER)


@register_jitable(**EXACT)
def words(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> Any:
    """The Philox words of a counter, as ``philox.philox``; all uint64 below 2**32. Two words to a number."""
    for _ in range(ROUNDS):
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c2 = (product1 >> _HALF) ^ c1 ^ k0, (product0 >> _HALF) ^ c3 ^ k1
        c1, c3 = product1 & _WORD, product0 & _WORD
        k0, k1 = (k0 + _STEP0) & _WORD, (k1 + _STEP1) & _WORD
    return c0 | (c1 << _HALF), c2 | (c3 << _HALF)


@register_jitable(**EXACT)
def draw(pairs: Any, blocks: int, row: Any, c2: Any, c3: Any, k0: Any, k1: Any) -> None:
    """The Philox words of the blocks of a row, two numbers a block: side by side in vector registers."""
    two, one = np.uintp(2), np.uintp(1)
    for j in range(np.uintp(blocks)):
        first, second = words(np.uint64(j) & _WORD, row, c2, c3, k0, k1)
        pairs[two * j] = first
        pairs[two * j + one] = second


@register_jitable(**EXACT)
def drop(call: Any, y: Any, keep: Any, memory: int, first: int, rows: int, batch_index: int) -> None:
    """``y = y * keep / (1 - rate)``, the mask of this batch written into keep; both flat, (rows, N), and row ``first``
    of the batch the first of them.

    memory: an address, two uint64 of any contents for each 8 columns begun.
    """
    columns = call.n
    pairs, lanes = elements(np.uint64, memory), elements(np.uint16, memory)
    real = y.dtype.type
    factor, zero = real(1.0 / (1.0 - call.rate)), real(0.0)
    least = np.uint32(call.threshold)
    k0, k1 = np.uint64(call.key_low), np.uint64(call.key_high)
    c2, c3 = np.uint64(call.mask_layer) & _WORD, np.uint64(batch_index) & _WORD
    # the first lane is in a number's lowest bits, which are the first in memory (all that numba compiles for)
    blocks = (columns + LANES - 1) // LANES
    for i in range(rows):
        draw(pairs, blocks, np.uint64(first + i) & _WORD, c2, c3, k0, k1)
        start = i * columns
        outputs, kept_row = part(y, start), part(keep, start)
        for j in range(np.uintp(columns)):
            stays = np.uint32(lanes[j]) >= least
            kept_row[j] = stays
            outputs[j] = outputs[j] * factor if stays else zero


@register_jitable(**EXACT)
def mask(d: Any, keep: Any, count: int) -> None:
    """``d = d where keep, else 0``: a dropped NaN or infinity is zero too."""
    zero = d.dtype.type(0.0)
    for i in range(count):
        d[i] = d[i] if keep[i] else zero


@register_jitable(**EXACT)
def _permute(halves: Any, a: int, table: Any) -> None:
    """The Feistel network, for a indices at once: ``a * halves[0] + halves[1]``, in place."""
    count = np.uintp(a)
    for i in range(FEISTEL_ROUNDS):
        # a round for all of them: lookups side by side, in vector registers
        for j in range(count):
            moved = halves[0, j] + table[i, halves[1, j]]
            halves[0, j] = halves[1, j]
            halves[1, j] = moved - a if moved >= a else moved


@kept
def row_order(order: Any, table: Any, halves: Any, low: Any, high: Any, epoch: Any) -> None:
    """Write the permutation into order (n,) int64; low and high are the key.

    table (FEISTEL_ROUNDS, a) and halves (2, a), a = ``philox.radix(n)``, are memory of any contents.
    """
    n, a = order.size, halves.shape[1]
    k0, k1 = np.uint64(low), np.uint64(high)
    counter = np.uint64(epoch) & _WORD
    for i in range(FEISTEL_ROUNDS):
        for half in range(a):
            first, _ = words(np.uint64(half), np.uint64(i), _ROW_ORDER, counter, k0, k1)
            table[i, half] = np.int64(((first & _WORD) * np.uint64(a)) >> _HALF)
    # the positions that have one left half in common lie side by side: no division is needed
    for block in range((n + a - 1) // a):
        for j in range(a):
            halves[0, j], halves[1, j] = block, j
        _permute(halves, a, table)
        start = block * a
        for j in range(a if a < n - start else n - start):
            left, right = halves[0, j], halves[1, j]
            index = a * left + right
            # one outside is permuted until it is inside
            while index >= n:
                for i in range(FEISTEL_ROUNDS):
                    moved = left + table[i, right]
                    left, right = right, moved - a if moved >= a else moved
                index = a * left + right
            order[start + j] = index


# Random words are in pairs, of two normal numbers.
WORDS = NORMALS // 2
_MANTISSA = np.uint64(52)
# float64: the bits of 1, those behind its exponent, and those of 2**52, in whose last bits an integer is itself
_ONE, _BEHIND, _WHOLE = np.uint64(1023 << 52), np.uint64((1 << 52) - 1), np.uint64(1075 << 52)
_TO_MANTISSA, _FIRST, _SECOND = np.uint64(20), np.uint64(1), np.uint64(2)
_TO_SIGN, _FROM_SECOND = np.uint64(63), np.uint64(62)
# the bits of the root of 1/2, and those that it lacks to 1
_ROOT = np.uint64(np.float64(math.sqrt(0.5)).view(np.uint64))
_TO_ONE = np.uint64(_ONE - _ROOT)
# log(1 + v) for v from the root of 1/2 to that of 2, less 1: |s| is below 0.172, and the next term below 2**-55 of it
_log_near_one = register_jitable(**ELEMENT)(logarithm(np.float64, 10))


@register_jitable(**EXACT)
def add_squares(norms: Any, x: Any, dz: Any, rows: int, inputs: int, outputs: int, biased: int, afresh: int) -> None:
    """Add a layer's part of the squares to norms (rows,) float64: x (rows, inputs), dz (rows, outputs), both flat."""
    for i in range(rows):
        width = sum_of_squares(part(x, i * inputs), inputs, 1.0) + (1.0 if biased else 0.0)
        square = width * sum_of_squares(part(dz, i * outputs), outputs, 1.0)
        norms[i] = square if afresh else norms[i] + square


@register_jitable(**EXACT)
def shrink(norms: Any, dz: Any, rows: int, outputs: int, largest: float) -> None:
    """Clip the rows of dz, flat (rows, outputs), whose gradients have these squares, to the norm ``largest``."""
    for i in range(rows):
        # NaN stays
        if not norms[i] <= largest * largest:
            factor = dz.dtype.type(largest / math.sqrt(norms[i]))
            for j in range(i * outputs, (i + 1) * outputs):
                dz[j] *= factor


@register_jitable(**ELEMENT)
def _fraction(word: Any) -> Any:
    """(word + 0.5) / 2**32: the word becomes a mantissa."""
    return np.uint64((word << _TO_MANTISSA) | _ONE).view(np.float64) - (1.0 - 2.0**-33)


@register_jitable(**ELEMENT)
def _log(v: Any) -> Any:
    """log(v) for a normal number above 0: v is a power of 2 times a number near 1."""
    bits = np.uint64(np.float64(v).view(np.uint64) + _TO_ONE)
    power = np.uint64((bits >> _MANTISSA) | _WHOLE).view(np.float64) - (2.0**52 + 1023.0)
    return power * math.log(2.0) + _log_near_one(np.uint64((bits & _BEHIND) + _ROOT).view(np.float64) - 1.0)


@register_jitable(**ELEMENT)
def _signed(v: Any, sign: Any) -> Any:
    return np.uint64(np.float64(v).view(np.uint64) ^ sign).view(np.float64)


@register_jitable(**ELEMENTWISE)
def _normals(words: Any, numbers: Any) -> None:
    """NORMALS numbers from WORDS pairs of words: a turn by a quadrant's half leaves angles up to pi / 4."""
    two, unit = np.uintp(2), np.uintp(1)
    for i in range(np.uintp(WORDS)):
        pair = words[i]
        angle = pair >> _HALF
        length = math.sqrt(-_log(_fraction(pair & _WORD)))
        t = (_fraction(angle) - 0.5) * (0.5 * math.pi)
        square, cosine, sine = t * t, 0.0, 0.0
        for factor in COSINE:
            cosine = cosine * square + factor
        for factor in SINE:
            sine = sine * square + factor
        sine *= t
        numbers[two * i] = _signed(length * (cosine - sine), (angle & _FIRST) << _TO_SIGN)
        numbers[two * i + unit] = _signed(length * (cosine + sine), (angle & _SECOND) << _FROM_SECOND)


@register_jitable(**ELEMENTWISE)
def _mix(g: Any, numbers: Any, count: int, deviation: float, share: float) -> None:
    real = g.dtype.type
    for i in range(np.uintp(count)):
        g[i] = real((np.float64(g[i]) + deviation * numbers[i]) * share)


@register_jitable(**EXACT)
def add_noise(
    g: Any, words: Any, numbers: Any, first: int, count: int, tensor: int, update: int, low: int, high: int,
    deviation: float, divisor: float,
) -> None:  # fmt: skip
    """``g = (g + deviation * z) / divisor`` for ``count`` elements of a tensor from ``first`` on, in place.

    words (WORDS,) uint64 and numbers (NORMALS,) float64 are memory of any contents; low and high are the key.
    """
    k0, k1 = np.uint64(low), np.uint64(high)
    c2, c3 = np.uint64(WORD - 1 - tensor) & _WORD, np.uint64(update) & _WORD
    at, end = first, first + count
    while at < end:
        chunk = at // NORMALS
        inside = at - chunk * NORMALS
        width = min(NORMALS - inside, end - at)
        draw(words, NORMALS // 4, np.uint64(chunk) & _WORD, c2, c3, k0, k1)
        _normals(words, numbers)
        _mix(part(g, at - first), part(numbers, inside), width, deviation, 1.0 / divisor)
        at += width
