"""The cache of what numba compiled: of several processes and environments, or none."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numba
import pytest

import fusemlp_kernels
from fusemlp_kernels.numpy.compiled import compiler

TRAIN = """
import logging
import sys
import numpy as np

logging.basicConfig(format="%(message)s", stream=sys.stderr)
logging.getLogger("fusemlp.kernels.compile").setLevel("INFO")

from fusemlp import MLP, Engine

X, y = np.random.default_rng(0).normal(size=(40, 2)), np.arange(40) % 2
for weighted in sys.argv[1:]:
    weight = np.where(y == 0, 9.0, 1.0) if weighted == "weighted" else None
    engine = Engine(MLP([2, 3, 2]), batch_size=16, backend="numpy")
    print(engine.fit(X, y, sample_weight=weight, epochs=2).history["loss"])
"""


def begin(place, *fits, package=None):
    """A process that trains, with its cache at ``place`` and perhaps another copy of the kernels."""
    paths = [*([str(package)] if package else []), *sys.path]
    given = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "NUMBA_CACHE_DIR": str(place)}
    # as users have it: a loop for each kind of program
    given["FUSEMLP_WHOLE_LOOP"] = ""
    command = [sys.executable, "-c", TRAIN, *fits]
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process):
    """Its losses, and what it told."""
    losses, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return losses.splitlines(), told


def losses(place, *fits):
    return end(begin(place, *fits))[0]


def copied(to):
    """A copy of the kernels, as another environment has it."""
    shutil.copytree(Path(fusemlp_kernels.__file__).parent, to / "fusemlp_kernels", ignore=lambda *_: {"__pycache__"})
    return to


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A cache that two processes have filled at once, and the losses of their plain fits, which are the same."""
    cache = tmp_path_factory.mktemp("cache")
    both = [begin(cache, "plain") for _ in range(2)]
    (first, told), (second, _) = map(end, both)
    assert first == second and "compiling work, once for this processor" in told
    return cache, first


def test_loops_of_two_processes_do_not_run_each_others_functions(plain):
    cache, losses_of_plain = plain
    weighted, *plain = losses(cache, "weighted", "plain")
    assert plain == losses_of_plain != [weighted]
    assert losses(cache, "plain", "weighted") == [*plain, weighted]


def test_another_environment_shares_the_cache(plain, tmp_path):
    cache, expected = plain
    found, told = end(begin(cache, "plain", package=copied(tmp_path)))
    assert found == expected and "compiling" not in told


def test_without_a_folder_to_write_to_each_process_compiles(plain, tmp_path):
    (tmp_path / "file").touch()
    package = copied(tmp_path / "other")
    (package / "fusemlp_kernels" / "numpy" / "compiled" / "__pycache__").touch()
    found, told = end(begin(tmp_path / "file", "plain", package=package))
    assert found == plain[1]
    assert f"what numba compiles is not kept in {tmp_path / 'file'}" in told


def test_the_folder_is_the_users_and_old_ones_go(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr(compiler, "AppDirs", lambda *_, **__: type("Dirs", (), {"user_cache_dir": str(tmp_path)}))
    old, new, foreign = (tmp_path / name for name in ("numba-0.1-00000000", "numba-0.2-00000000", "else"))
    for made in (old, new, foreign):
        made.mkdir()
    for made in (old, foreign):
        os.utime(made, (0.0, time.time() - compiler.UNUSED - 60.0))
    found = compiler.folder.__wrapped__()
    assert found is not None and found.parent == tmp_path and numba.__version__ in found.name
    assert {path for path in tmp_path.iterdir() if path != found} == {new, foreign}
