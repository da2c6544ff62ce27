"""Loops that numba kept on disk, compiled by several processes, in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TRAIN = """
import sys
import numpy as np
from fusemlp import MLP, Engine

X, y = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 2
for weighted in sys.argv[1:]:
    weight = np.where(y == 0, 9.0, 1.0) if weighted == "weighted" else None
    engine = Engine(MLP([2, 3, 2]), batch_size=16, backend="numpy")
    print(engine.fit(X, y, sample_weight=weight, epochs=2).history["loss"])
"""


def losses(cache: Path, *fits: str) -> list[str]:
    given = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "NUMBA_CACHE_DIR": str(cache)}
    # as users have it: a loop for each kind of program
    given["FUSEMLP_WHOLE_LOOP"] = ""
    run = subprocess.run(
        [sys.executable, "-c", TRAIN, *fits], env=given, check=True, capture_output=True, text=True, timeout=300
    )
    return run.stdout.splitlines()


def test_loops_of_two_processes_do_not_run_each_others_functions(tmp_path: Path) -> None:
    plain, weighted = losses(tmp_path, "plain"), losses(tmp_path, "weighted")
    assert plain != weighted
    assert losses(tmp_path, "plain", "weighted") == plain + weighted
    assert losses(tmp_path, "weighted", "plain") == weighted + plain
