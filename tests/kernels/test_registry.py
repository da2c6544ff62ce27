"""The registry of backends, and the memory that the NumPy backend hands out."""

import numpy as np
import pytest

import fusemlp_kernels
from fusemlp_kernels.contract import UpdateRule
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError


def test_memory_is_aligned_zeroed_and_viewed_by_pitch():
    numpy = fusemlp_kernels.backend("numpy", None, "fp32")
    for dtype, kind in (("real", np.float32), ("float64", np.float64), ("int64", np.int64), ("bool", np.bool_)):
        flat = numpy.allocate(100, dtype)
        assert flat.dtype == kind and flat.shape == (100,) and not flat.any() and flat.ctypes.data % 256 == 0
    flat = numpy.allocate(100, "real")
    view = numpy.view(flat, 10, (4, 5), 8)
    view[...] = np.arange(20).reshape(4, 5)
    np.testing.assert_array_equal(flat[10:42].reshape(4, 8)[:, :5], view)
    assert flat.sum() == view.sum() == 190
    assert numpy.view(flat, 10, (3,), 3).base is not None
    numpy.copy_into(view, np.ones((4, 5)))
    copy = numpy.to_host(view)
    assert copy.flags.c_contiguous and copy.sum() == 20 and not np.shares_memory(copy, flat)
    assert numpy.allocate(0, "real").size == 0


@pytest.mark.parametrize("shape, pitch", [((0, 5), 5), ((4, 0), 0), ((0, 0), 0), ((0,), 0)])
def test_views_may_be_empty(shape, pitch):
    numpy = fusemlp_kernels.backend("numpy", None, "fp64")
    assert numpy.view(numpy.allocate(0, "real"), 0, shape, pitch).shape == shape


def test_what_does_not_exist_is_refused_by_name():
    numpy = fusemlp_kernels.backend("numpy", None, "fp32")
    with pytest.raises(ArgumentError, match="did you mean 'numpy'"):
        fusemlp_kernels.backend("nunpy", None, "fp32")
    with pytest.raises(ArgumentError, match="precision: unknown name 'fp23'"):
        fusemlp_kernels.backend("numpy", None, "fp23")
    with pytest.raises(BackendUnavailableError, match="offers fp32 and fp64, got 'bf16'"):
        fusemlp_kernels.backend("numpy", None, "bf16")
    with pytest.raises(BackendUnavailableError, match="runs on 'cpu', got 'cuda:0'"):
        fusemlp_kernels.backend("numpy", "cuda:0", "fp32")
    with pytest.raises(ArgumentError, match="did you mean 'linear'"):
        numpy.bind("liner")
    with pytest.raises(ArgumentTypeError, match=r"advance: .*missing"):
        fusemlp_kernels.backend("numpy", None, "fp32").bind("advance", rule=UpdateRule("sgd"))


def test_the_registry_says_what_works():
    reasons = fusemlp_kernels.availability()
    assert list(reasons) == list(fusemlp_kernels.TRAITS) and reasons["numpy"] is None
    for name, reason in reasons.items():
        if reason is not None:
            with pytest.raises(BackendUnavailableError, match="not available"):
                fusemlp_kernels.backend(name, None, "fp32")
    assert reasons[fusemlp_kernels.choose()] is None
    assert fusemlp_kernels.backend("auto", None, "fp32").traits.name == fusemlp_kernels.choose()
