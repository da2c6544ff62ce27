"""Random cases for the tests of a backend: sizes, memory layouts, values."""

from __future__ import annotations

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

CASES = settings(max_examples=300, deadline=None, derandomize=True, database=None)

DTYPES = {"fp32": np.float32, "fp64": np.float64}
UNITS = {"fp32": 2.0**-24, "fp64": 2.0**-53}

# The edges of the tiles and vectors that kernels are made of.
EDGES = (0, 1, 2, 15, 16, 17, 31, 32, 33, 127, 128, 129)
LAYOUTS = ("plain", "transposed", "stepped", "reversed", "offset", "pitched", "read-only")
OUTPUT_LAYOUTS = ("plain", "plain", "pitched")

seeds = st.integers(0, 2**32 - 1)
precisions = st.sampled_from(sorted(DTYPES))
layouts = st.sampled_from(LAYOUTS)
output_layouts = st.sampled_from(OUTPUT_LAYOUTS)


def sizes(low=0):
    """A dimension of an array: mostly at an edge."""
    return st.one_of(st.sampled_from([size for size in EDGES if size >= low]), st.integers(low, 40))


def place(values, layout, dtype=None):
    """An array of the same values that lies in memory as ``layout`` says."""
    values = np.asarray(values, dtype)
    shape = values.shape
    if layout == "transposed":
        out = np.empty(shape[::-1], values.dtype).T
    elif layout == "stepped":
        out = np.empty(tuple(2 * n for n in shape), values.dtype)[tuple(slice(None, None, 2) for _ in shape)]
    elif layout == "reversed":
        out = np.empty(shape, values.dtype)[tuple(slice(None, None, -1) for _ in shape)]
    elif layout == "offset":
        out = np.empty(values.size + 3, values.dtype)[3:].reshape(shape)
    elif layout == "pitched":
        out = np.empty((*shape[:-1], shape[-1] + 5), values.dtype)[..., : shape[-1]]
    else:
        out = np.empty(shape, values.dtype)
    out[...] = values
    out.flags.writeable = layout != "read-only"
    return out


def poisoned(shape, dtype, layout="plain"):
    """An output full of NaN; of True, where it is bool."""
    return place(np.full(shape, np.nan if np.dtype(dtype).kind == "f" else 1), layout, dtype)


class Values:
    """Random arrays of one precision, from one seed."""

    def __init__(self, seed, precision):
        self.rng = np.random.default_rng(seed)
        self.dtype = DTYPES[precision]

    def normal(self, *shape, scale=1.0):
        return (scale * self.rng.standard_normal(shape)).astype(self.dtype)

    def uniform(self, low, high, *shape):
        return self.rng.uniform(low, high, shape).astype(self.dtype)

    def integers(self, high, *shape):
        return self.rng.integers(0, max(high, 1), shape)


def exact(array):
    """The same numbers in float64, for the oracle."""
    return None if array is None else np.array(array, np.float64)


def padded_rows(rng, count, size, n):
    """Row indices into ``n`` rows: ``count`` of them, then -1 up to ``size``."""
    rows = np.full(size, -1, np.int64)
    rows[:count] = rng.integers(0, n, count)
    return rows


class Unchanged:
    """Remembers arrays and says whether they still hold the same."""

    def __init__(self, *arrays):
        self.kept = [(array, np.array(array)) for array in arrays if array is not None]

    def check(self):
        for array, before in self.kept:
            np.testing.assert_array_equal(array, before)
