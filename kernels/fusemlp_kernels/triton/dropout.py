"""Dropout masks inside kernels, computed again by each kernel; ``philox.dropout_keep`` defines them."""

from __future__ import annotations

import triton
import triton.language as tl


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
