"""``torchrun -m fusemlp train``: one run folder, of rank 0; terminated or killed, resumed by another number."""

import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import worlds
from safetensors.numpy import load_file

import make
from fusemlp import load, load_checkpoint
from fusemlp.cli import main

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

TRAIN = ("train", "wine", "--hidden", "8", "--dropout", "0.1", "--batch-size", "48", "--early-stopping", "0")
TRAIN += ("--backend", "numpy", "--epochs", "100")
SLICES = Path(__file__).parents[1] / "fixtures" / "runs_2026_11" / "slices"


def last(folder):
    return dict(load_file(folder / "checkpoints" / "last.safetensors"))


def train_here(*words):
    assert make.run("train", *words, "--quiet") == 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory, alone):
    """The run of one process that nothing cuts off."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_here(*TRAIN[1:], "--out", folder)
    return folder


def wait_for_epochs(run):
    """Return when the run has some epochs."""
    began, metrics = time.monotonic(), run / "metrics.csv"
    while not metrics.exists() or metrics.read_text(encoding="utf-8").count("\n") < 9:
        assert time.monotonic() - began < worlds.LIMIT
        time.sleep(0.01)


def assert_same_run(one, other):
    make.assert_same(last(one), last(other))
    rows = [(folder / "metrics.csv").read_text(encoding="utf-8") for folder in (one, other)]
    assert rows[0] == rows[1] and rows[0].count("\n") == 101


def test_the_ranks_are_terminated_and_the_run_goes_on_exactly_with_another_number(tmp_path, whole):
    cut = tmp_path / "runs" / "cut"
    ranks = worlds.start(2, tmp_path, main, [*TRAIN, "--out", str(cut)])
    wait_for_epochs(cut)
    for rank in ranks:
        # as torchrun does
        rank.process.terminate()
    (first, text), other = [rank.ended() for rank in ranks]
    # rank 0 alone prints
    assert first == 0 and other == (0, ""), text
    assert text.count("interrupted after epoch") == 1 and text.count("ordered, 2 ranks") == 1
    assert [path.name for path in cut.parent.iterdir()] == ["cut"]
    train_here("--resume", cut)
    assert_same_run(cut, whole)


def test_a_run_of_ranks_that_had_slices_of_the_optimizers_state_goes_on(tmp_path, alone):
    """By the release that wrote it, with the same bits; here to within rounding on another processor."""
    run = Path(shutil.copytree(SLICES, tmp_path / "run"))
    train_here("--resume", run, "--epochs", "12")
    resumed, expected = (
        np.loadtxt(path, delimiter=",", skiprows=1) for path in (run / "metrics.csv", SLICES / "resumed.csv")
    )
    np.testing.assert_allclose(resumed, expected, rtol=0, atol=2e-5)


def test_the_option_that_is_gone_says_what_took_its_place(capsys):
    said = " ".join(make.refusal(capsys, *TRAIN, "--shard-optimizer").split())
    assert "--shard-optimizer: it is gone: each process keeps the whole state of the optimizer now; leave" in said


def test_a_run_whose_other_rank_is_killed_ends_with_the_line_that_goes_on(tmp_path, whole):
    cut = tmp_path / "cut"
    first, other = worlds.start(2, tmp_path, main, [*TRAIN, "--out", str(cut)])
    wait_for_epochs(cut)
    other.process.kill()
    code, text = first.ended()
    assert code == 1 and "distributed: rank 1 of 2 ended" in text
    assert f"to go on: torchrun --nproc-per-node 2 -m fusemlp train --resume {cut}" in text
    # it does not begin anew
    assert 7 <= load_checkpoint(cut / "checkpoints/last.safetensors").epochs_trained < 100
    train_here("--resume", cut)
    assert_same_run(cut, whole)


def test_the_script_of_the_page_trains(tmp_path, monkeypatch, alone):
    page = (worlds.ROOT / "engine/docs/processes.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```py\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(script, "processes.md, script", "exec"), names)
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
def test_what_several_processes_do_not_do_is_refused(words, said, rank, tmp_path, monkeypatch, capsys):
    worlds.as_rank(monkeypatch, rank, 2)
    error = make.refusal(capsys, *words, "--out", tmp_path / "run")
    assert error.startswith(f"error: {'' if rank == '0' else 'rank 1: '}{said}")
    assert not list(tmp_path.iterdir())


def test_the_summary_of_torchrun_has_the_error_of_a_rank(tmp_path, monkeypatch, capsys):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    worlds.as_rank(monkeypatch, 1, 2)
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    said = make.refusal(capsys, *TRAIN, "--final-fit").strip()
    assert said.startswith("error: rank 1: --final-fit")
    assert said in str(ChildFailedError("fusemlp", {1: ProcessFailure(1, 99, 2, str(path))}))
