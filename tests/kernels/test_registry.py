"""The registry of backends: the conditions of each, the errors without it, the choice of "auto"; NumPy's memory."""

import ctypes
import importlib.metadata
import importlib.util
import logging
import os
import sys

import cupy_standin
import numpy as np
import pytest

import fusemlp_kernels
from fusemlp import MLP, Engine
from fusemlp.cli.probes import examine
from fusemlp_kernels import registry
from fusemlp_kernels.errors import ArgumentError, BackendUnavailableError


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
    with pytest.raises(ArgumentError, match="did you mean 'numpy'"):
        fusemlp_kernels.backend("nunpy", None, "fp32")
    with pytest.raises(ArgumentError, match="precision: unknown name 'fp23'"):
        fusemlp_kernels.backend("numpy", None, "fp23")
    with pytest.raises(BackendUnavailableError, match="offers fp32, bf16, fp64, got 'tf32'"):
        fusemlp_kernels.backend("numpy", None, "tf32")
    with pytest.raises(BackendUnavailableError, match="runs on 'cpu', got 'cuda:0'; leave device out"):
        fusemlp_kernels.backend("numpy", "cuda:0", "fp32")


def test_the_registry_says_what_works():
    reasons = fusemlp_kernels.availability()
    assert list(reasons) == list(fusemlp_kernels.TRAITS) and reasons["numpy"] is None
    for name, reason in reasons.items():
        if reason is not None:
            with pytest.raises(BackendUnavailableError, match="not available"):
                fusemlp_kernels.backend(name, None, "fp32")
    assert reasons[fusemlp_kernels.choose()] is None
    assert fusemlp_kernels.backend("auto", None, "fp32").traits.name == fusemlp_kernels.choose()


@pytest.fixture
def triton_machine(monkeypatch):
    """Simulate a Linux machine with torch for GPUs, triton and a driver; parts can be removed."""

    def pretend(*, missing=(), platform="linux", torch="2.11.0+cu130", driver=True, interpret="0"):
        found = importlib.util.find_spec
        spec = found("json")
        monkeypatch.setattr(registry.importlib.util, "find_spec", lambda name: None if name in missing else spec)
        monkeypatch.setattr(registry.importlib.metadata, "version", lambda name: torch)
        monkeypatch.setattr(registry.sys, "platform", platform)
        monkeypatch.setattr(registry.os.path, "exists", lambda path: driver and path in registry.GPU_DEVICES)
        monkeypatch.setattr(registry, "_cupy_reason", lambda: "not on this machine")
        monkeypatch.setenv("TRITON_INTERPRET", interpret)
        return registry.availability()["triton"]

    return pretend


def test_a_machine_with_everything_has_it(triton_machine):
    assert triton_machine() is None
    assert registry.choose() == "triton"


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ({"missing": ("triton",)}, 'triton cannot be imported; get it with: pip install "fusemlp[triton]"'),
        ({"missing": ("triton", "torch")}, "triton and torch cannot be imported"),
        ({"missing": ("triton",), "platform": "win32"}, "Triton has no release for win32; use backend='cupy'"),
        ({"torch": "2.13.0+cpu"}, "torch 2.13.0+cpu is the build without GPU support"),
        ({"driver": False}, "no GPU driver is loaded"),
        ({"driver": False}, "TRITON_INTERPRET=1 to run the kernels on the CPU"),
    ],
)
def test_what_is_missing_is_said_and_auto_goes_on_to_numpy(triton_machine, lacks, said, caplog):
    reason = triton_machine(**lacks)
    assert reason is not None and said in reason
    with pytest.raises(BackendUnavailableError, match="backend: 'triton' is not available: "):
        registry.backend("triton", None, "fp32")
    with caplog.at_level(logging.INFO, logger="fusemlp"):
        assert registry.choose() == "numpy"
    assert f"passes over triton: {reason}" in caplog.text and "passes over cupy" in caplog.text


def test_the_interpreter_works_without_a_driver_but_is_not_chosen(triton_machine, caplog):
    assert triton_machine(driver=False, torch="2.13.0+cpu", interpret="1") is None
    with caplog.at_level(logging.INFO, logger="fusemlp"):
        assert registry.choose() == "numpy"
    assert "asked for by name" in caplog.text


def test_devices_and_precisions_are_refused_by_name():
    if registry.availability()["triton"] is not None or os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("triton: its interpreter is not set")
    for device, precision, said in (
        ("cuda:0", "fp32", "under TRITON_INTERPRET=1 the triton backend runs on 'cpu', got 'cuda:0'"),
        (None, "bf16", "interpreter computes bf16 wrongly"),
        (None, "fp64", "offers fp32, tf32, bf16, fp16, got 'fp64'"),
    ):
        with pytest.raises(BackendUnavailableError, match=said):
            registry.backend("triton", device, precision)
    assert importlib.metadata.version("triton")


@pytest.fixture
def cupy_machine(monkeypatch):
    """Simulate a machine without Triton, with a driver for a CUDA version, and with or without a wheel of CuPy."""

    def pretend(*, version=None, wheel=None, refusal=None):
        found = importlib.util.find_spec

        def spec(name, package=None):
            return (found("json") if wheel else None) if name == "cupy" else found(name, package)

        def installed(name):
            if name != wheel:
                raise importlib.metadata.PackageNotFoundError(name)
            return "14.2.0"

        monkeypatch.setattr(registry, "_cuda_version", lambda: version)
        monkeypatch.setattr(registry.importlib.util, "find_spec", spec)
        monkeypatch.setattr(registry.importlib.metadata, "version", installed)
        monkeypatch.setattr(registry, "_cupy_refusal", lambda: refusal)
        monkeypatch.setattr(registry, "_triton_reason", lambda: "not on this machine")
        return registry.availability()["cupy"]

    return pretend


@pytest.mark.parametrize(
    ("version", "wheel"),
    [((12, 4), "cupy-cuda12x"), ((13, 0), "cupy-cuda13x"), ((13, 1), "cupy-cuda12x"), ((12, 0), "built from source")],
)
def test_a_machine_with_a_driver_and_its_wheel_has_it_and_auto_takes_it(cupy_machine, version, wheel):
    assert cupy_machine(version=version, wheel=wheel) is None
    assert registry.choose() == "cupy"


CUDA_12 = {"version": (12, 8), "wheel": "cupy-cuda12x"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "neither an NVIDIA driver nor CuPy (libcuda.so.1 cannot be loaded)"),
        ({}, "pip install \"fusemlp[cupy-cuda12x]\", or use backend='numpy'"),
        (
            {"wheel": "cupy-cuda12x"},
            "no NVIDIA driver (libcuda.so.1 cannot be loaded); install the driver of an NVIDIA",
        ),
        ({"version": (12, 8)}, 'the driver runs CUDA 12.8: get it with: pip install "fusemlp[cupy-cuda12x]"'),
        ({"version": (13, 1)}, 'the driver runs CUDA 13.1: get it with: pip install "fusemlp[cupy-cuda13x]"'),
        ({"version": (11, 4)}, "the driver runs CUDA 11.4, and CuPy needs 12.0 or newer: update the driver"),
        (
            CUDA_12 | {"wheel": "cupy-cuda13x"},
            "too old for cupy-cuda13x: pip uninstall cupy-cuda13x, then pip install ",
        ),
        (
            CUDA_12 | {"refusal": "libcublas.so.12: no such file"},
            "but CuPy says: libcublas.so.12: no such file; what it",
        ),
        (CUDA_12 | {"refusal": "there is no card"}, 'comes with: pip install "fusemlp[cupy-cuda12x]"'),
    ],
)
def test_one_sentence_says_what_is_missing_and_how_to_get_it(cupy_machine, given, said, caplog):
    reason = cupy_machine(**given)
    assert reason is not None and said in reason and "\n" not in reason
    with pytest.raises(BackendUnavailableError) as raised:
        Engine(MLP([2, 2]), backend="cupy")
    assert str(raised.value) == f"backend: 'cupy' is not available: {reason}"
    with caplog.at_level(logging.INFO, logger="fusemlp"):
        assert registry.choose() == "numpy"
    assert f"passes over cupy: {reason}" in caplog.text


def test_what_cupy_says_when_it_is_loaded_is_its_first_line(monkeypatch):
    """The stand-in for CuPy has no CUDA compiler, as an installation without CUDA's libraries."""
    if registry.availability()["cupy"] is not None:
        cupy_standin.load()
        assert "cupy_backends" in registry._cupy_refusal()
    monkeypatch.setitem(sys.modules, "fusemlp_kernels.cupy.device", None)
    monkeypatch.delattr("fusemlp_kernels.cupy.device")
    assert "fusemlp_kernels.cupy.device" in registry._cupy_refusal()


def test_doctor_names_the_wheel(cupy_machine):
    cupy_machine(version=(13, 1))
    found = examine()["backends"]["cupy"]
    assert "fusemlp[cupy-cuda13x]" in found["reason"] and found["device"] is None and found["plans"] == []


def test_the_drivers_version_is_asked_of_the_driver(monkeypatch):
    class Driver:
        status, version = 0, 12080

        def cuDriverGetVersion(self, out):
            ctypes.cast(out, ctypes.POINTER(ctypes.c_int))[0] = self.version
            return self.status

    monkeypatch.setattr(registry.ctypes, "CDLL", lambda name: Driver())
    assert registry._cuda_version() == (12, 8)
    monkeypatch.setattr(Driver, "status", 999)
    assert registry._cuda_version() is None

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(registry.ctypes, "CDLL", missing)
    assert registry._cuda_version() is None
