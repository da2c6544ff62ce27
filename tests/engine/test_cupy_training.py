"""Whole trainings on the CuPy backend, step by step within the bound of the oracle and of the NumPy backend.

Without a card the kernels run as C++ on the host, under the stand-in for CuPy. This checks their results and the
backend's own code, but not cuBLAS, streams or graphs.
"""

from __future__ import annotations

import pytest
from devices import CUPY_GPU, STAND_IN, marks_of, usable
from training_cases import CASES, IN_FLOAT16, check_fit, check_steps, check_steps_in_float16

DEVICES = pytest.mark.parametrize(
    "device", [pytest.param(device, id=device.name, marks=marks_of(device)) for device in (STAND_IN, CUPY_GPU)]
)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@DEVICES
def test_every_step_is_the_oracles_and_the_numpy_backends(case, device, record_property):
    with usable(device):
        check_steps(case, device, record_property)


@pytest.mark.parametrize("name", IN_FLOAT16)
@DEVICES
def test_every_step_in_float16_is_within_its_bound(name, device, record_property):
    with usable(device):
        check_steps_in_float16(name, device, record_property)


@pytest.mark.parametrize("precision", STAND_IN.precisions)
@DEVICES
def test_fit_gives_the_losses_of_steps(device, precision):
    with usable(device):
        check_fit(device, precision)
