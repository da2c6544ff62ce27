"""The tests' own memory: arrays have the given layouts, and changes outside the outputs are detected."""

import numpy as np
import pytest
from memory import Memory, Watch, base_of, elements_of, place

LAYOUTS = ("plain", "transposed", "stepped", "reversed", "offset", "pitched", "gapped", "owned")


@pytest.mark.parametrize("shape", [(3, 5), (3, 8), (1, 1), (0, 4), (4, 0), (7,), (0,)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_placed_array_holds_its_values_between_guard_bands(layout, shape):
    values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    array = place(values, layout)
    base = base_of(array)
    np.testing.assert_array_equal(array, values)
    assert isinstance(base, Memory) and (base.owned is not None) == (layout == "owned")
    at = elements_of(array, base)
    np.testing.assert_array_equal(np.array(base)[at], values)
    others = np.delete(np.array(base), at.ravel())
    padding = -shape[-1] % 8 * shape[0] if layout == "owned" and len(shape) == 2 else 0
    assert np.isnan(others).sum() == others.size - padding and (others == 0).sum() == padding
    if at.size:
        assert at.min() >= 100 and at.max() < base.size - 100


@pytest.mark.parametrize("layout", LAYOUTS)
def test_whatever_changes_outside_of_the_outputs_is_seen(layout):
    x, y = place(np.ones((3, 5), np.float32), layout), place(np.ones((3, 5), np.float32), layout)
    counters = np.zeros(3, np.int64)
    watch = Watch([x, y, counters], [y])
    watch.remember()
    y[...] = 2.0
    watch.check()
    base = np.array(base_of(y))
    outside = np.setdiff1d(np.arange(base.size), elements_of(y, base_of(y)).ravel())
    # Another NaN pattern is a change too.
    for at in (outside[0], outside[len(outside) // 2], outside[-1]):
        watch.remember()
        base_of(y).view(np.ndarray).view(np.uint32)[at] ^= 1
        with pytest.raises(AssertionError, match="1 elements changed outside"):
            watch.check()
    for array in (x, counters):
        watch.remember()
        array[...] = 3
        with pytest.raises(AssertionError, match="elements changed outside"):
            watch.check()
