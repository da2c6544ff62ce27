"""The random numbers: Random123's known answers, the mask's definition element by element, and the row order."""

import math

import numpy as np
import pytest

from fusemlp_kernels import philox

ONES = 2**32 - 1
# From the kat_vectors file of Random123, philox4x32 with 10 rounds: counter, key, result.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter, key, expected):
    assert tuple(int(word) for word in philox.philox(counter, key)) == expected


def test_dropout_is_its_definition_element_by_element():
    rate, layer, seed, batch_index, rows, cols = 0.3, 2, 2**40 + 5, 17, 3, 21
    keep = philox.dropout_keep(rate, layer, seed, batch_index, rows, cols)
    assert keep.dtype == np.bool_
    for row in range(rows):
        for col in range(cols):
            words = philox.philox((col // 8, row, layer, batch_index), (seed % 2**32, seed // 2**32))
            lane = col % 8
            value = (int(words[lane // 2]) >> (16 * (lane % 2))) & 0xFFFF
            assert keep[row, col] == (value >= round(65536 * rate))


def test_dropout_at_the_ends():
    assert philox.dropout_keep(0.0, 0, 1, 0, 64, 64).all()
    assert not philox.dropout_keep(1.0 - 2.0**-20, 0, 1, 0, 64, 64).any()


@pytest.mark.parametrize("n", [*range(1, 301), 1000, 4095, 4096, 4097, 60_000, 65_537])
def test_row_order_is_a_permutation(n):
    order = philox.row_order(n, seed=n, epoch=3)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(n))


def test_row_order_is_a_function_of_seed_and_epoch():
    order = philox.row_order(1000, 1, 2)
    assert np.array_equal(order, philox.row_order(1000, 1, 2))
    for seed, epoch in [(2, 2), (1, 3), (1 + 2**32, 2)]:
        # Two unrelated permutations agree in one place on average (Poisson): 12 has probability 1e-9.
        assert (order == philox.row_order(1000, seed, epoch)).sum() < 12


def test_row_order_is_fair():
    """Over many epochs each ordered pair of rows comes first equally often: chi-square within five deviations."""
    n, epochs = 5, 2000
    first = np.zeros((n, n))
    for epoch in range(epochs):
        order = philox.row_order(n, 0, epoch)
        first[order[0], order[1]] += 1
    expected = epochs / (n * (n - 1))
    counts = first[~np.eye(n, dtype=bool)]
    chi_square, freedom = ((counts - expected) ** 2 / expected).sum(), n * (n - 1) - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)
