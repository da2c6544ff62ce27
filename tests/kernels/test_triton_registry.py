"""The conditions of the Triton backend, the errors without it, and the choice of "auto" then."""

import importlib.metadata
import importlib.util
import logging
import os

import pytest

from fusemlp_kernels import registry
from fusemlp_kernels.errors import BackendUnavailableError


@pytest.fixture
def machine(monkeypatch):
    """Simulate a Linux machine with torch for GPUs, triton and a driver; parts can be removed."""

    def pretend(*, missing=(), platform="linux", torch="2.11.0+cu130", driver=True, interpret=None):
        found = importlib.util.find_spec
        monkeypatch.setattr(
            registry.importlib.util, "find_spec", lambda name: None if name in missing else found("json")
        )
        monkeypatch.setattr(registry.importlib.metadata, "version", lambda name: torch)
        monkeypatch.setattr(registry.sys, "platform", platform)
        monkeypatch.setattr(registry.os.path, "exists", lambda path: driver and path in registry.GPU_DEVICES)
        monkeypatch.setattr(registry, "_cupy_reason", lambda: "not on this machine")
        if interpret is None:
            monkeypatch.delenv("TRITON_INTERPRET", raising=False)
        else:
            monkeypatch.setenv("TRITON_INTERPRET", interpret)
        return registry.availability()["triton"]

    return pretend


def test_a_machine_with_everything_has_it(machine):
    assert machine() is None
    assert registry.choose() == "triton"


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ({"missing": ("triton",)}, 'triton cannot be imported; get it with: pip install "fusemlp[triton]"'),
        ({"missing": ("triton", "torch")}, "triton and torch cannot be imported"),
        ({"missing": ("triton",), "platform": "win32"}, "Triton has no release for win32; use backend='cupy'"),
        ({"torch": "2.13.0+cpu"}, "torch 2.13.0+cpu is the build without GPU support"),
        ({"driver": False}, "no GPU driver is loaded"),
        ({"driver": False, "interpret": "0"}, "TRITON_INTERPRET=1 to run the kernels on the CPU"),
    ],
)
def test_what_is_missing_is_said_and_auto_goes_on_to_numpy(machine, lacks, said, caplog):
    reason = machine(**lacks)
    assert reason is not None and said in reason
    with pytest.raises(BackendUnavailableError, match="backend: 'triton' is not available: "):
        registry.backend("triton", None, "fp32")
    with caplog.at_level(logging.INFO, logger="fusemlp"):
        assert registry.choose() == "numpy"
    assert f"passes over triton: {reason}" in caplog.text and "passes over cupy" in caplog.text


def test_the_interpreter_works_without_a_driver_but_is_not_chosen(machine, caplog):
    assert machine(driver=False, torch="2.13.0+cpu", interpret="1") is None
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
