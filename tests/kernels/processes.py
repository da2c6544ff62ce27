"""Python in a process of its own, for tests of what a process reads once or ends with."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Triton compiles for a card where this is not set.
INTERPRETED = ("TRITON_INTERPRET",)


def python(*arguments, without=(), **variables):
    """Run Python with the paths and variables of this process but ``without`` some, and with these ``variables``."""
    environment = {name: value for name, value in os.environ.items() if name not in without}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, env=environment | variables, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
