"""Run a command as a child process and count what it uses: ``python -m bench.child COMMAND...``.

This module is itself the command's parent, in a process of its own: Linux counts the peak memory of a program from the
size of the process that started it, so a parent that holds a table would hide a small peak.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# NumPy's OpenBLAS takes the number of OpenMP.
ONE_THREAD = {"FUSEMLP_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def usage(command: Sequence[str]) -> dict[str, float]:
    """Run a Python module with its arguments on one thread, from the repository's root.

    Returns ``processor`` (user and system seconds, those of its own children too), ``seconds`` and ``memory`` (the peak
    in bytes). Raises CalledProcessError if the command fails; its errors go to stderr.
    """
    launched = [sys.executable, "-m", "bench.child", sys.executable, "-m", *command]
    done = subprocess.run(launched, cwd=ROOT, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, check=True)
    figures: dict[str, float] = json.loads(done.stdout)
    return figures


def main(command: Sequence[str]) -> int:
    """Run the command, print the figures as JSON and return the command's exit code."""
    began = time.perf_counter()
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    seconds = time.perf_counter() - began
    use = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Linux gives KiB
    print(json.dumps({"processor": use.ru_utime + use.ru_stime, "seconds": seconds, "memory": 1024 * use.ru_maxrss}))
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
