"""Parts of a tile, joined, equal the tile."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("triton")

import torch
import triton
import triton.language as tl

from fusemlp_kernels.triton.tiles import part_of


@triton.jit
def copied_in_parts(x, y, PARTS: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None] * COLS
    tile = tl.load(x + rows + tl.arange(0, COLS)[None, :])
    for piece in tl.static_range(PARTS):
        at = piece * (COLS // PARTS) + tl.arange(0, COLS // PARTS)
        tl.store(y + rows + at[None, :], part_of(tile, piece, PARTS, ROWS, COLS))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_side_by_side_are_the_tile(parts):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.arange(16 * 32, dtype=torch.float32, device=device).reshape(16, 32)
    y = torch.full_like(x, float("nan"))
    copied_in_parts[(1,)](x, y, PARTS=parts, ROWS=16, COLS=32)
    assert np.array_equal(y.cpu().numpy(), x.cpu().numpy())
