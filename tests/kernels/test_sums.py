"""Sums have the bits of one order, which ``sums.py`` describes, in registers of any width."""

import numpy as np
import pytest
from numba import njit

from fusemlp_kernels.numpy.compiled import sums
from fusemlp_kernels.numpy.compiled.compiler import elements


@njit
def summed(values, address, count):
    return sums.sum_of(elements(values, address), count)


@njit
def squared(values, address, count, divisor):
    return sums.sum_of_squares(elements(values, address), count, divisor)


@njit
def multiplied(values, left, right, count):
    return sums.sum_of_products(elements(values, left), elements(values, right), count)


def in_order(terms):
    """The sum of the terms in the order of ``sums.py``."""
    total, at = terms.dtype.type(0), 0
    for lanes, vectors in ((64 // terms.itemsize, 4), (32 // terms.itemsize, 1), (1, 1)):
        whole = (len(terms) - at) // (lanes * vectors) * lanes * vectors
        if not whole:
            continue
        held = np.zeros((vectors, lanes), terms.dtype)
        held[0, 0] = total
        for chunk in terms[at : at + whole].reshape(-1, vectors, lanes):
            held += chunk
        vector = held[0]
        for other in held[1:]:
            vector = vector + other
        while len(vector) > 1:
            vector = vector[: len(vector) // 2] + vector[len(vector) // 2 :]
        total, at = vector[0], at + whole
    return total


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_sums_are_in_order(dtype):
    # powers of two have exact products: a sum has the same bits with and without one rounding a step
    values = np.random.default_rng(0).random(300).astype(dtype)
    powers = (2.0 ** np.random.default_rng(1).integers(-3, 3, 300)).astype(dtype)
    for count in range(301):
        terms = values[:count]
        assert summed(values, values.ctypes.data, count) == in_order(terms)
        product = multiplied(values, values.ctypes.data, powers.ctypes.data, count)
        assert product == in_order(terms * powers[:count])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_squares_are_in_float64(dtype):
    values = (2.0 ** np.random.default_rng(2).integers(-90, 90, 300)).astype(dtype)
    for count in (0, 1, 5, 31, 32, 33, 300):
        quotients = values[:count].astype(np.float64) / 3.0
        assert squared(values, values.ctypes.data, count, 3.0) == pytest.approx((quotients**2).sum(), rel=1e-14)
    largest = np.full(2, np.finfo(np.float32).max, np.float32)
    assert squared(largest, largest.ctypes.data, 2, 1.0) == 2 * np.float64(largest[0]) ** 2
