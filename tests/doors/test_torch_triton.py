"""``fuse`` on the Triton backend: the module's parameters are views of its tensors."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_fused_steps_under_tritons_interpreter():
    script = Path(__file__).with_name("torch_on_triton.py")
    subprocess.run([sys.executable, str(script)], env={**os.environ, "TRITON_INTERPRET": "1"}, check=True)
