"""``torchrun -m fusemlp train``: one run folder, written by rank 0; terminated, and resumed by another number."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import worlds
from safetensors.numpy import load_file

from fusemlp import load
from fusemlp.cli import main
from fusemlp.runtime.ranks import VARIABLES

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

TRAIN = ("train", "wine", "--hidden", "8", "--dropout", "0.1", "--batch-size", "48", "--early-stopping", "0")
TRAIN += ("--backend", "numpy", "--epochs", "100", "--checkpoint-every", "7")


def last(folder: Path) -> dict[str, np.ndarray]:
    return dict(load_file(folder / "checkpoints" / "last.safetensors"))


def test_torchrun_is_terminated_and_the_run_goes_on_exactly_with_another_number(tmp_path: Path, alone: None) -> None:
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    with subprocess.Popen(
        [*launcher, "-m", "fusemlp", *TRAIN, "--out", str(cut)],
        env={**os.environ, "PYTHONPATH": worlds.PATHS, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            began = time.monotonic()
            metrics = cut / "metrics.csv"
            while not metrics.exists() or metrics.read_text(encoding="utf-8").count("\n") < 3:
                assert process.poll() is None and time.monotonic() - began < worlds.LIMIT
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            out, errors = process.communicate(timeout=worlds.LIMIT)
        finally:
            process.kill()
    assert out.count("interrupted after epoch") == 1, errors
    # rank 0 alone prints
    assert errors.count("ordered, 2 ranks") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["cut"]
    for words in (("--resume", str(cut)), (*TRAIN[1:], "--out", str(whole))):
        with pytest.raises(SystemExit) as ended:
            main(["train", *words, "--quiet"])
        assert ended.value.code == 0
    one, other = last(cut), last(whole)
    assert one.keys() == other.keys()
    for name, array in one.items():
        assert array.tobytes() == other[name].tobytes(), name
    rows = [(folder / "metrics.csv").read_text(encoding="utf-8") for folder in (cut, whole)]
    assert rows[0] == rows[1] and rows[0].count("\n") == 101


def test_the_script_of_the_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: None) -> None:
    page = (worlds.ROOT / "engine" / "README.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```py\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(script, "engine/README.md, script", "exec"), names)
    assert names["history"].history["accuracy"][-1] >= 0.95
    assert np.mean(load("model.safetensors").predict(names["data"].X) == names["data"].y) >= 0.95


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sweep", "wine", "--vary", "lr=0.1,0.01"), "fusemlp sweep: it runs in one process, and torchrun has started"),
        ((*TRAIN, "--models", "2"), "--models: several processes train one model together, got 2; give --models 1"),
        ((*TRAIN, "--final-fit"), "--final-fit: it is for a training in one process; leave it out"),
        ((*TRAIN, "--reduce", "slow"), "--reduce: unknown name 'slow'"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_several_processes_do_not_do_is_refused(
    words: tuple[str, ...],
    said: str,
    rank: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in zip(VARIABLES, (rank, "2", "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main([*words, "--out", str(tmp_path / "run")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {'' if rank == '0' else 'rank 1: '}{said}")
    assert not list(tmp_path.iterdir())
