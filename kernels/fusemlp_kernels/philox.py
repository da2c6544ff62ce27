"""Random numbers as a function of their place: Philox 4x32-10, dropout masks and the row order.

A counter-based generator has no state. Any device can compute element (row, col) of a mask, or a value of the row
order's rounds, in any order, with the same result. Philox is from Salmon, Moraes, Dror, Shaw, "Parallel random numbers:
as easy as 1, 2, 3" (2011). All backends follow the definitions in this file.

The key is the seed (its low 32 bits and the next 32). The four counter words, each taken modulo 2**32, are

    dropout     (col // 8, batch row, layer, batch_index)
    row order   (half of the index, Feistel round, 2**32 - 1, epoch): no network has that many layers
    start       (col // 4, batch row, 2**31, batch_index): that is no layer either
    noise       (element % 128 // 4, element // 128, 2**32 - 2 - tensor, update_count), under a seed of its own
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LANES = 8
WORD = 0xFFFFFFFF
ROW_ORDER = WORD
START = 1 << 31
# The numbers of a tensor's noise that have one second word.
NORMALS = 128
# Taylor's series of cos(t) and sin(t) / t in t * t, from the highest power down: exact to rounding up to pi / 4.
COSINE = tuple((-1.0) ** k / math.factorial(2 * k) for k in range(8, -1, -1))
SINE = tuple((-1.0) ** k / math.factorial(2 * k + 1) for k in range(7, -1, -1))
# With halves of at least eight values, six rounds leave no bias that 60,000 permutations of five rows show.
FEISTEL_ROUNDS = 6
FEISTEL_MIN_RADIX = 8


def seed_key(seed: int) -> tuple[int, int]:
    """Return the Philox key of a seed: its low 32 bits and the next 32."""
    return seed & WORD, (seed >> 32) & WORD


def philox(counter: tuple[Any, Any, Any, Any], key: tuple[int, int]) -> tuple[Array, Array, Array, Array]:
    """Return four random uint32 words for each counter; its words are integers or arrays that broadcast."""
    c0, c1, c2, c3 = [np.asarray(c).astype(np.uint64) & np.uint64(WORD) for c in counter]
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * np.uint64(MULTIPLIERS[0]), c2 * np.uint64(MULTIPLIERS[1])
        low0, low1 = product0 & np.uint64(WORD), product1 & np.uint64(WORD)
        high0, high1 = product0 >> np.uint64(32), product1 >> np.uint64(32)
        c0, c1, c2, c3 = high1 ^ c1 ^ np.uint64(k0 & WORD), low1, high0 ^ c3 ^ np.uint64(k1 & WORD), low0
        k0, k1 = k0 + KEY_STEPS[0], k1 + KEY_STEPS[1]
    w0, w1, w2, w3 = [c.astype(np.uint32) for c in np.broadcast_arrays(c0, c1, c2, c3)]
    return w0, w1, w2, w3


def normal(seed: int, tensor: int, update: int, size: int) -> Array:
    """Return the standard normal noise of a tensor's elements in one update, (size,) float64: the definition.

    Box and Muller, "A note on the generation of random normal deviates", 1958. Words 0 and 1 of a block make its first
    two numbers, words 2 and 3 the others. The first word of a pair is the radius; the second, the angle in a quadrant,
    which its two lowest bits choose. No number is larger than 6.8.

    Philox is no cryptographic generator, and float64 has gaps (Mironov, "On significance of the least significant bits
    for differential privacy", 2012).
    """
    block = np.arange(-(-size // 4))
    words = philox((block % (NORMALS // 4), block // (NORMALS // 4), WORD - 1 - tensor, update), seed_key(seed))
    numbers = []
    for radius, angle in (words[:2], words[2:]):
        length = np.sqrt(-2.0 * np.log((radius + 0.5) / 2.0**32))
        turn = 0.5 * math.pi * (angle + 0.5) / 2.0**32
        numbers += [
            np.where(angle & 1, -1.0, 1.0) * length * np.cos(turn),
            np.where(angle & 2, -1.0, 1.0) * length * np.sin(turn),
        ]
    return np.stack(numbers, axis=-1).reshape(-1)[:size]


def uniform(seed: int, batch_index: int, rows: int, cols: int) -> Array:
    """Return the random start of inputs, (rows, cols) float64 from -1 to 1: the definition.

    Element (row, col) has word ``col % 4`` of its counter. Its 23 highest bits are taken, so that float32 holds it.
    """
    blocks = -(-cols // 4)
    words = philox((np.arange(blocks)[None, :], np.arange(rows)[:, None], START, batch_index), seed_key(seed))
    highest = np.stack(words, axis=-1).reshape(rows, blocks * 4)[:, :cols] >> np.uint64(9)
    return (highest + 0.5) / 2.0**22 - 1.0


def threshold(rate: float) -> int:
    """Return the rate in units of 1 / 65536, rounded: a 16-bit lane below it is dropped."""
    return round(65536 * rate)


def dropout_keep(rate: float, layer: int, seed: int, batch_index: int, rows: int, cols: int) -> Array:
    """Return the dropout mask, (rows, cols) bool, True where the element is kept: the definition.

    Element (row, col) is kept if lane ``col % 8`` of the words of its counter is at least ``threshold(rate)``. Lane 2i
    is the low half and lane 2i + 1 the high half of word i.
    """
    blocks = -(-cols // LANES)
    counter = (np.arange(blocks)[None, :], np.arange(rows)[:, None], layer, batch_index)
    lanes = [half for word in philox(counter, seed_key(seed)) for half in (word & 0xFFFF, word >> 16)]
    return np.asarray(np.stack(lanes, axis=-1).reshape(rows, blocks * LANES)[:, :cols] >= threshold(rate))


def radix(n: int) -> int:
    """Return the number of values of each half of a Feistel index: the smallest a >= 8 with a * a >= n."""
    return max(FEISTEL_MIN_RADIX, math.isqrt(max(n - 1, 0)) + 1)


def row_order(n: int, seed: int, epoch: int) -> Array:
    """Return the order of the rows in an epoch, a permutation of range(n), (n,) int64.

    A Feistel network with addition modulo ``a`` in place of exclusive or permutes range(a * a), whatever the values of
    its rounds are; an index is ``a * left + right``. An index that falls outside range(n) goes through the network
    again until it falls inside. A walk that starts inside comes back at the latest where it began, so this permutes
    range(n) (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002). The range of a network modulo ``a`` is
    hardly larger than n: few indices walk.

    A half has only about sqrt(n) values: each round is computed once for all of them, and the network once for its
    whole range.
    """
    a = radix(n)
    halves = np.arange(a)
    words = philox((halves, np.arange(FEISTEL_ROUNDS)[:, None], ROW_ORDER, epoch), seed_key(seed))[0]
    # a multiplication maps 32 random bits to range(a) more evenly than a remainder, and faster on a GPU
    rounds = ((words.astype(np.uint64) * np.uint64(a)) >> np.uint64(32)).astype(np.int64)
    left, right = np.repeat(halves, a), np.tile(halves, a)
    for values in rounds:
        moved = left + values.take(right)
        left, right = right, moved - a * (moved >= a)
    network = a * left + right
    order = network[:n].copy()
    outside = np.flatnonzero(order >= n)
    while outside.size:
        order[outside] = walked = network.take(order[outside])
        outside = outside[walked >= n]
    return order
