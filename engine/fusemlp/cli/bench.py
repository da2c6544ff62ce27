"""``fusemlp bench``: run the benchmark of a checkout; the installed package does not contain it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

NOT_HERE = (
    "error: the benchmark comes with a checkout of fusemlp, and this is an installed copy ({place}). In a checkout, "
    'with pip install -e ".[bench]": fusemlp bench --quick'
)


def bench(arguments: Sequence[str]) -> int:
    """Run ``python -m bench`` with these arguments; return its exit code, or 2 outside a checkout."""
    package = Path(__file__).resolve().parents[1]
    root = package.parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        print(NOT_HERE.format(place=package), file=sys.stderr)
        return 2
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    # -P ignores a folder "bench" in the working directory.
    command = [sys.executable, "-P", "-m", "bench", *arguments]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path})
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            # Ctrl-C reached the benchmark too; wait for its own end.
            continue
