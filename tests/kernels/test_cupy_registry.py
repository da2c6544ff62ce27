"""The conditions of the CuPy backend, and the errors without it: the missing part, and the wheel to install."""

import ctypes
import importlib.metadata
import importlib.util
import logging
import sys

import cupy_standin
import pytest

from fusemlp import MLP, Engine
from fusemlp.cli.probes import examine
from fusemlp_kernels import registry
from fusemlp_kernels.cupy import driver
from fusemlp_kernels.errors import BackendUnavailableError


@pytest.fixture
def machine(monkeypatch):
    """Simulate a machine without Triton, with a driver for a CUDA version, and with or without a wheel of CuPy."""

    def pretend(*, version, wheel=None, refusal=None):
        found = importlib.util.find_spec

        def spec(name, package=None):
            return (found("json") if wheel else None) if name == "cupy" else found(name, package)

        def installed(name):
            if name != wheel:
                raise importlib.metadata.PackageNotFoundError(name)
            return "14.2.0"

        monkeypatch.setattr(driver, "cuda_version", lambda: version)
        monkeypatch.setattr(driver.importlib.util, "find_spec", spec)
        monkeypatch.setattr(driver.importlib.metadata, "version", installed)
        monkeypatch.setattr(driver, "refusal", lambda: refusal)
        monkeypatch.setattr(registry, "_triton_reason", lambda: "not on this machine")
        return registry.availability()["cupy"]

    return pretend


@pytest.mark.parametrize(
    ("version", "wheel"),
    [((12, 4), "cupy-cuda12x"), ((13, 0), "cupy-cuda13x"), ((13, 1), "cupy-cuda12x"), ((12, 0), "built from source")],
)
def test_a_machine_with_a_driver_and_its_wheel_has_it_and_auto_takes_it(machine, version, wheel):
    assert machine(version=version, wheel=wheel) is None
    assert registry.choose() == "cupy"


@pytest.mark.parametrize(
    ("version", "wheel", "refusal", "said"),
    [
        (None, None, None, "neither an NVIDIA driver nor CuPy (libcuda.so.1 cannot be loaded)"),
        (None, None, None, "pip install \"fusemlp[cupy-cuda12x]\", or use backend='numpy'"),
        (
            None,
            "cupy-cuda12x",
            None,
            "no NVIDIA driver (libcuda.so.1 cannot be loaded); install the driver of an NVIDIA card,",
        ),
        ((12, 8), None, None, 'the driver runs CUDA 12.8: get it with: pip install "fusemlp[cupy-cuda12x]"'),
        ((13, 1), None, None, 'the driver runs CUDA 13.1: get it with: pip install "fusemlp[cupy-cuda13x]"'),
        ((11, 4), None, None, "the driver runs CUDA 11.4, and CuPy needs 12.0 or newer: update the driver"),
        ((12, 8), "cupy-cuda13x", None, "too old for cupy-cuda13x: pip uninstall cupy-cuda13x, then pip install "),
        (
            (12, 8),
            "cupy-cuda12x",
            "libcublas.so.12: no such file",
            "but CuPy says: libcublas.so.12: no such file; what it",
        ),
        ((12, 8), "cupy-cuda12x", "there is no card", 'comes with: pip install "fusemlp[cupy-cuda12x]"'),
    ],
)
def test_one_sentence_says_what_is_missing_and_how_to_get_it(machine, version, wheel, refusal, said, caplog):
    reason = machine(version=version, wheel=wheel, refusal=refusal)
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
        assert "cupy_backends" in driver.refusal()
    monkeypatch.setitem(sys.modules, "fusemlp_kernels.cupy.device", None)
    monkeypatch.delattr("fusemlp_kernels.cupy.device")
    assert "fusemlp_kernels.cupy.device" in driver.refusal()


def test_doctor_names_the_wheel(machine):
    machine(version=(13, 1))
    found = examine()["backends"]["cupy"]
    assert "fusemlp[cupy-cuda13x]" in found["reason"] and found["device"] is None and found["plans"] == []


def test_the_drivers_version_is_asked_of_the_driver(monkeypatch):
    class Driver:
        status, version = 0, 12080

        def cuDriverGetVersion(self, out):
            ctypes.cast(out, ctypes.POINTER(ctypes.c_int))[0] = self.version
            return self.status

    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: Driver())
    assert driver.cuda_version() == (12, 8)
    monkeypatch.setattr(Driver, "status", 999)
    assert driver.cuda_version() is None

    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(driver.ctypes, "CDLL", missing)
    assert driver.cuda_version() is None
