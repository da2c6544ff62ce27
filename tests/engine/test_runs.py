"""The run folder: its path, its files, and reading them."""

import errno
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import pytest

from fusemlp.report import runs
from fusemlp_kernels.errors import ArgumentError, CheckpointError
from make import configuration

NOW = datetime(2026, 3, 4, 5, 6, 7)
ROWS = [{"epoch": epoch, "loss": 0.1 / 3**epoch, "val_loss": 1e-17 * epoch} for epoch in (1, 2, 3)]


@pytest.fixture
def run(tmp_path):
    yield runs.create_run(tmp_path / "run")
    runs.unlock()


def test_the_default_folder_has_the_name_of_the_data_and_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runs.choose_folder(None, "digits", NOW) == Path("runs/digits-20260304-050607")
    assert runs.choose_folder(None, "some/where/flowers.csv", NOW) == Path("runs/flowers-20260304-050607")


def test_runs_of_one_second_get_a_folder_each(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a-2").touch()
    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: runs.create_run(tmp_path / "runs" / "a", numbered=True), range(8)))
    assert {run.path.name for run in folders} == {"a", *(f"a-{number}" for number in range(3, 10))}
    assert all(run.checkpoint("last").parent.is_dir() for run in folders)


LOCKING = """
import sys
from pathlib import Path
from fusemlp.report.runs import Run, lock
lock(Run(Path(sys.argv[1])))
print("locked", flush=True)
sys.stdin.read()
"""


def test_one_process_holds_the_lock_of_a_run(run):
    with pytest.raises(CheckpointError, match=r"resume: another process trains in .*/run'; wait for its end"):
        runs.lock(run)
    runs.unlock()
    command = [sys.executable, "-c", LOCKING, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(CheckpointError, match="another process trains in"):
            runs.lock(run)
        # the system frees the runs.lock of a process that ends in any way
        other.kill()
    runs.lock(run)


def test_a_file_system_without_locks_is_told(run, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(runs, "lock_file", refuse)
    with pytest.warns(UserWarning, match="no locks in this file system"):
        runs.lock(run)


def test_a_new_or_empty_folder_is_taken(tmp_path):
    assert runs.choose_folder(str(tmp_path), "digits", NOW) == tmp_path
    assert runs.choose_folder(str(tmp_path / "a/b"), "digits", NOW) == tmp_path / "a/b"
    assert list(tmp_path.iterdir()) == []
    assert runs.create_run(tmp_path / "a/b").checkpoint("last") == tmp_path / "a/b/checkpoints/last.safetensors"


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="is not empty; give a new or empty folder"):
        runs.choose_folder(str(tmp_path), "digits", NOW)
    with pytest.raises(ArgumentError, match="is a file"):
        runs.choose_folder(str(tmp_path / "file"), "digits", NOW)
    with pytest.raises(ArgumentError, match="cannot be made"):
        runs.create_run(tmp_path / "file" / "run")


def test_metrics_come_back_exactly(run):
    for row in ROWS:
        runs.append_metrics(run, row)
    assert runs.read_metrics(run) == ROWS
    assert run.metrics.read_text().splitlines()[0] == "epoch,loss,val_loss"


def test_a_row_that_was_cut_off_is_dropped(run):
    for row in ROWS:
        runs.append_metrics(run, row)
    whole = run.metrics.read_bytes()
    for length in range(len(whole)):
        run.metrics.write_bytes(whole[:length])
        kept = runs.read_metrics(run)
        assert kept == ROWS[: len(kept)]
        assert len(kept) == max(0, whole[:length].count(b"\n") - 1)


def test_rows_behind_the_checkpoint_are_dropped(run):
    for row in ROWS:
        runs.append_metrics(run, row)
    whole = run.metrics.read_bytes()
    runs.keep_metrics(run, 2)
    assert runs.read_metrics(run) == ROWS[:2]
    runs.append_metrics(run, ROWS[2])
    assert run.metrics.read_bytes() == whole
    runs.keep_metrics(run, 0)
    assert runs.read_metrics(run) == []
    runs.append_metrics(run, ROWS[0])
    assert runs.read_metrics(run) == ROWS[:1]


def test_a_run_is_known_by_its_configuration(run):
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        runs.open_run(run.path)
    config = configuration()
    runs.write_json(run.config, config)
    # the words for missing cells were in the options alone
    assert runs.open_run(run.path) == (run, {**config, "preprocessor": {"missing_words": []}})
    runs.write_json(run.config, {name: value for name, value in config.items() if name != "epochs"})
    with pytest.raises(
        CheckpointError, match=r"config\.json: the configuration does not fit: it has no entry 'epochs'"
    ):
        runs.open_run(run.path)
    run.config.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        runs.open_run(run.path)
    for other in ({"format": runs.FORMAT + 1}, [1, 2]):
        run.config.write_text(json.dumps(other))
        with pytest.raises(CheckpointError, match=f"expected a configuration of format {runs.FORMAT}"):
            runs.open_run(run.path)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        runs.open_run(run.path / "nowhere")


def test_json_holds_no_nan(run):
    with pytest.raises(ValueError, match="Out of range float"):
        runs.write_json(run.report, {"loss": float("nan")})
    assert not run.report.exists()


def test_the_last_checkpoint_stands_in_for_a_model_that_is_not_there_yet(run):
    with pytest.raises(CheckpointError, match="no checkpoint 'model'; it has none"):
        runs.weights_path(run, "model")
    run.checkpoint("last").touch()
    assert runs.weights_path(run, "model") == run.checkpoint("last")
    run.checkpoint("model").touch()
    assert runs.weights_path(run, "model") == run.checkpoint("model")
    with pytest.raises(CheckpointError, match="no checkpoint 'best'; it has model, last"):
        runs.weights_path(run, "best")
    with pytest.raises(ArgumentError, match="did you mean 'best'"):
        runs.weights_path(run, "bset")
