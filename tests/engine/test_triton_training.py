"""Whole trainings on the Triton backend, step by step within the bound of the oracle and of the NumPy backend.

Under Triton's interpreter these are fp32 and fp16. It computes bf16 wrongly, on raw bit patterns, so bf16 needs a GPU.
"""

import pytest
from devices import GPU, INTERPRETER, marks_of
from training_cases import CASES, IN_FLOAT16, check_fit, check_steps, check_steps_in_float16

DEVICES = pytest.mark.parametrize(
    "device", [pytest.param(device, id=device.name, marks=marks_of(device)) for device in (INTERPRETER, GPU)]
)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@DEVICES
def test_every_step_is_the_oracles_and_the_numpy_backends(case, device, record_property):
    check_steps(case, device, record_property)


@pytest.mark.parametrize("name", IN_FLOAT16)
@DEVICES
def test_every_step_in_float16_is_within_its_bound(name, device, record_property):
    check_steps_in_float16(name, device, record_property)


@pytest.mark.parametrize("precision", INTERPRETER.precisions)
@DEVICES
def test_fit_gives_the_losses_of_steps(device, precision):
    check_fit(device, precision)
