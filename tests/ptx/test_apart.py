"""Run the emulator's tests in a process without Triton's interpreter, which the other tests use on a machine without a
GPU: a sample of the kernels and fits. After a change of kernels run all: ``TRITON_INTERPRET=0 python -m pytest
tests/ptx``, and ``ci/versions --triton 3.6.0``.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
KERNELS = HERE / "test_kernels.py"
OTHERS = sorted(path for path in HERE.glob("test_*.py") if path not in (KERNELS, Path(__file__)))


# Two processes, as each takes seconds to import torch and Triton.
@pytest.mark.parametrize("modules", [[KERNELS], OTHERS], ids=["kernels", "others"])
def test_without_the_interpreter(modules):
    variables = {"FUSEMLP_PTX_SAMPLE": "1", **os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *modules]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
