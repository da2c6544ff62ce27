"""``torchrun -m fusemlp train``: one run folder, of rank 0; terminated, resumed by another number, restarted."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import worlds
from safetensors.numpy import load_file

import make
from fusemlp import ArgumentError, load
from fusemlp.cli import main, session, train
from fusemlp.cli.options import TrainOptions
from fusemlp.report.runs import create_run, discard_begun, unlock

pytest.importorskip("torch")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")

TRAIN = ("train", "wine", "--hidden", "8", "--dropout", "0.1", "--batch-size", "48", "--early-stopping", "0")
TRAIN += ("--backend", "numpy", "--epochs", "100", "--checkpoint-every", "7")
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


def children(process):
    """Return the ids of the processes that a process has started."""
    found = subprocess.run(["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True)
    pairs = [tuple(map(int, line.split())) for line in found.stdout.splitlines()]
    return sorted(own for own, parent in pairs if parent == process)


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_torchrun_restarts_and_the_run_goes_on_from_its_last_checkpoint(tmp_path, whole):
    run = tmp_path / "run"
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    with subprocess.Popen(
        [*launcher, "--max-restarts", "1", "-m", "fusemlp", *TRAIN, "--out", str(run)],
        env={**os.environ, "PYTHONPATH": worlds.PATHS, **worlds.ONE_THREAD},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_for_epochs(run)
            begun = (run / "config.json").stat()
            os.kill(children(process.pid)[-1], signal.SIGKILL)
            out, errors = process.communicate(timeout=worlds.LIMIT)
        finally:
            process.kill()
    assert process.returncode == 0 and "exitcode: -9" in errors, errors
    assert out.count("run folder") == 1 and [path.name for path in tmp_path.iterdir()] == ["run"]
    assert_same_run(run, whole)
    # it did not begin again
    assert (run / "config.json").stat() == begun


def restarted(monkeypatch, job):
    """Let this process be one that torchrun has started again."""
    for name, value in (("RESTART_COUNT", "1"), ("MAX_RESTARTS", "1"), ("RUN_ID", job)):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)


def begun(run, whole, job, **report):
    """Copy the whole run as one that a job of torchrun has made, with these values in its report."""
    shutil.copytree(whole, run)
    config, told = (make.read(run / f"{name}.json") for name in ("config", "report"))
    config["job"] = f"{job}: {config['command'].replace(str(whole), str(run))}"
    for name, content in (("config", config), ("report", told | report)):
        (run / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("ended", [False, True])
def test_a_failure_before_the_first_epoch_or_after_the_last_is_made_good(ended, tmp_path, whole, monkeypatch):
    run = tmp_path / "run"
    if ended:
        begun(run, whole, "job")
    else:
        # of a run that begins from another, killed before its config.json
        (run / "checkpoints").mkdir(parents=True)
        for name in ("start.safetensors", ".start.safetensors.0123.tmp"):
            (run / "checkpoints" / name).write_bytes(b"")
    restarted(monkeypatch, "job")
    train_here(*TRAIN[1:], "--out", run)
    assert_same_run(run, whole)


def test_a_job_without_an_id_goes_on_with_the_run_of_its_command(tmp_path, whole, monkeypatch, capsys):
    """As where all machines are started again by the same commands."""
    run = tmp_path / "run"
    begun(run, whole, "none")
    restarted(monkeypatch, "none")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    options = TrainOptions(data="wine", out=str(run))
    config = make.read(run / "config.json") | session.own_job(options)
    (run / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert train.going_on(options) == (TrainOptions(resume=str(run)), True)
    assert f"{run} is the run of this command, which goes on with it" in capsys.readouterr().err
    # another command, and a job that is another
    other = replace(options, lr=0.2)
    assert train.going_on(other) == (other, False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    assert train.going_on(options) == (options, False)


# "job": an id that is always the same
@pytest.mark.parametrize(("made_by", "more"), [("another job", ()), ("job", ("--lr", "0.2"))])
def test_a_restart_takes_over_no_run_that_another_job_has_made(made_by, more, tmp_path, whole, monkeypatch, capsys):
    run = tmp_path / "run"
    begun(run, whole, made_by)
    before = files(run)
    restarted(monkeypatch, "job")
    said = make.refusal(capsys, *TRAIN, *more, "--out", run, "--quiet")
    assert "is not empty; give a new or empty folder" in said
    assert files(run) == before


def test_a_run_that_diverged_is_not_trained_to_the_same_divergence_by_a_restart(tmp_path, whole, monkeypatch, capsys):
    run = tmp_path / "run"
    begun(run, whole, "job", diverged=True)
    before = files(run)
    restarted(monkeypatch, "job")
    assert "the run diverged, and would again" in make.refusal(capsys, *TRAIN, "--out", run, "--quiet")
    assert files(run) == before


class Agreed:
    """The ranks of a world of two; the other has these flags, and rank 0 these values."""

    leads = False

    def __init__(self, *flags, first=()):
        self.flags, self.first = flags, iter(first)

    def any(self, *own):
        return [one or other for one, other in zip(own, self.flags, strict=True)]

    def of_first(self, values):
        return dict.fromkeys(values, next(self.first))


def test_a_process_that_counts_no_restart_goes_on_with_one_that_does(tmp_path, whole, monkeypatch):
    restarted(monkeypatch, "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setattr(train, "joined", lambda timeout: Agreed(True, True, False, first=(1.0,)))
    options = TrainOptions(data="wine", lr=0.2, out=str(whole))
    assert train.going_on(options) == (TrainOptions(resume=str(whole)), True)


@pytest.mark.parametrize("here", [False, True])
def test_a_run_folder_that_some_machines_do_not_see_is_refused_on_all(here, tmp_path, whole, monkeypatch):
    restarted(monkeypatch, "job")
    monkeypatch.setattr(train, "joined", lambda timeout: Agreed(True, not here, here))
    with pytest.raises(ArgumentError, match=r"^out: some of the processes find .* and others do not"):
        train.going_on(TrainOptions(data="wine", out=str(whole if here else tmp_path)))


def test_the_restart_of_a_resumed_run_that_had_nothing_left_to_do_is_refused_too(tmp_path, whole, monkeypatch, capsys):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    restarted(monkeypatch, "job")
    assert "the run has done its 100 epochs" in make.refusal(capsys, "train", "--resume", run, "--quiet")
    train_here("--resume", run, "--epochs", "101")
    # this job made the last epoch, so its restart ends the run once more
    train_here("--resume", run, "--epochs", "101")


def test_a_folder_with_files_of_others_stays_as_it_is(tmp_path):
    run = create_run(tmp_path / "run")
    for path in (run.checkpoint("start"), run.path / "notes.txt"):
        path.write_bytes(b"")
    discard_begun(run)
    assert run.checkpoint("start").exists()


def test_a_restart_with_resume_discards_nothing(tmp_path, monkeypatch, alone, capsys):
    run = create_run(tmp_path / "run")
    # as at the end of the process that made it
    unlock()
    run.checkpoint("start").write_bytes(b"")
    restarted(monkeypatch, "job")
    assert make.run("train", "--resume", run.path) == 1
    assert "it has no config.json" in capsys.readouterr().err
    assert run.checkpoint("start").exists()


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


def test_a_run_that_may_be_restarted_needs_a_folder_and_torchruns_summary_says_so(tmp_path, monkeypatch, capsys):
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    worlds.as_rank(monkeypatch, 1, 2)
    path = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(path))
    said = make.refusal(capsys, *TRAIN).strip()
    assert said.startswith("error: rank 1: --out: torchrun starts these processes again after a failure")
    assert said in str(ChildFailedError("fusemlp", {1: ProcessFailure(1, 99, 2, str(path))}))
