"""``ci/gpu``: a lost process costs one test, results are written item by item, and a second run continues."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import gpu_items
import gpu_stages
import pytest

from bench.hardware import card

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ("-m", "pytest", "-p", "no:cacheprovider", "--rootdir", ".", "-c", "/dev/null")
CULPRITS = """
import os

def test_a(): pass
def test_b(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
def test_c(): assert not os.environ.get("LOST")
def test_d(): os._exit(3)
def test_e(): assert False
def test_f(): pass
"""


@pytest.fixture
def run(tmp_path):
    """A run with a minute left."""
    made = gpu_items.Run(tmp_path, True, 1.0, 2, "abc", "now", time.monotonic() + 60)
    made.environment = {**gpu_stages.os.environ, "PYTHONPATH": str(ROOT / "ci")}
    return made


def item(text, name="one", seconds=20.0):
    return gpu_items.Item("smoke", name, gpu_items.python("-c", text), seconds)


def outcomes(results):
    return {test[-1]: line["outcome"] for test, line in gpu_stages.settled_tests(results).items()}


def statuses(run):
    return {line["item"]: line["status"] for line in gpu_items.lines_of(run.results)}


def test_a_lost_process_costs_the_test_that_lost_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_items, "ROOT", tmp_path)
    (tmp_path / "test_culprits.py").write_text(CULPRITS)
    tests = [f"test_culprits.py::test_{letter}" for letter in "abcdef"]
    results = tmp_path / "proofs.jsonl"
    gpu_stages.prove(run, results, PLAIN, 0, tests)
    found = outcomes(results)
    assert found == {"a": "passed", "b": "failed", "c": "passed", "d": "failed", "e": "failed", "f": "passed"}
    messages = {line["test"][-1]: line["message"] for line in gpu_items.lines_of(results)}
    assert "illegal memory access" in messages["b"] and "the process ended with 3; " in messages["d"]
    assert len(list((tmp_path / "logs/proofs").iterdir())) == 3


def test_a_test_that_hangs_fails_and_one_that_takes_long_does_not(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_items, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_stages, "HUNG_SECONDS", 1.0)
    monkeypatch.setattr(gpu_stages, "LEAST_SECONDS", 1.0)
    slow = "import time\ndef test_a(): pass\ndef test_b(): time.sleep(60)\ndef test_compute_sanitizer(): time.sleep(60)"
    (tmp_path / "test_slow.py").write_text(slow)
    run.deadline, results = time.monotonic() + 10, tmp_path / "proofs.jsonl"
    slices = [[f"test_slow.py::test_{name}" for name in names] for names in (("a", "b"), ("compute_sanitizer",))]
    gpu_items.side_by_side(run, 2, lambda one: gpu_stages.prove(run, results, PLAIN, *one), enumerate(slices))
    assert outcomes(results) == {"a": "passed", "b": "failed"}


def test_results_are_written_and_what_passed_is_not_run_again(run):
    items = [
        item("print('figures: {\"steps\": 3}')", "good"),
        item("raise SystemExit('a reason')", "bad"),
        item("import time; time.sleep(30)", "slow", seconds=1.0),
        item("print('bench tune: the time is over: 1 of 2 entries are tuned')", "partly"),
    ]
    gpu_items.all_of(run, items, jobs=2)
    assert statuses(run) == {"good": "passed", "bad": "failed", "slow": "failed", "partly": "unfinished"}
    lines = {line["item"]: line for line in gpu_items.lines_of(run.results)}
    assert lines["good"]["figures"] == {"steps": 3} and "a reason" in lines["bad"]["message"]
    assert [one.name for one in gpu_items.unsettled(run, items)] == ["bad", "slow", "partly"]
    text, good = gpu_stages.summary(run, ["smoke"])
    assert not good and "1 passed, 2 failed, 1 unfinished" in text and "Look first at smoke: bad" in text


def test_results_of_another_commit_and_of_rehearsals_are_set_aside(run):
    gpu_items.settle(run, item("pass"))
    gpu_stages.set_aside(run.out, "abc", rehearse=True)
    assert run.results.is_file()
    for commit, rehearse in (("def", True), ("abc", False)):
        run.out.mkdir(exist_ok=True)
        run.results.write_text('{"commit": "abc", "rehearsed": true}\n')
        gpu_stages.set_aside(run.out, commit, rehearse=rehearse)
        assert not run.out.exists()
    aside = list(run.out.parent.glob(f"{run.out.name}-abc-rehearsal-*/results.jsonl"))
    assert len(aside) == 2


def test_the_version_has_what_was_mended_but_not_what_tuning_wrote(tmp_path, monkeypatch):
    assert (ROOT / gpu_stages.WRITTEN[0]).is_file()
    monkeypatch.setattr(gpu_stages, "ROOT", tmp_path)
    monkeypatch.setattr("bench.hardware.commit", lambda: "abc")
    tiles = tmp_path / gpu_stages.WRITTEN[0]
    tiles.parent.mkdir(parents=True)
    paths = [tiles, tmp_path / "bench" / "README.md", tmp_path / "a.py"]
    paths[1].parent.mkdir()
    for path in paths:
        path.write_text("before")
    for command in (("init", "-q"), ("add", "."), ("-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "a")):
        subprocess.run(("git", *command), cwd=tmp_path, check=True)
    found = []
    for path in paths:
        path.write_text("after")
        found.append(gpu_stages.version())
    paths[-1].write_text("again")
    assert found[:2] == ["abc", "abc"] and len({"abc", found[2], gpu_stages.version()}) == 3


def test_ctrl_c_ends_the_processes_and_the_stage(run):
    """The main thread waits for a stage's threads when Ctrl-C comes."""
    began = time.monotonic()
    threading.Timer(1.0, signal.pthread_kill, [threading.main_thread().ident, signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        gpu_items.all_of(run, [item("import time; time.sleep(40)", name, 60.0) for name in ("one", "two")])
    assert time.monotonic() - began < 15 and statuses(run) == {"one": "unfinished"}


def test_a_test_file_that_cannot_be_imported_is_a_failure(run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_items, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_stages, "FOR_CARDS", ("tests",))
    (tmp_path / "tests").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu")
    marked = "import pytest\n@pytest.mark.gpu\ndef test_a(): pass\n"
    for name, text in (("good", marked), ("other", f"import absent_module\n{marked}")):
        (tmp_path / "tests" / f"test_{name}.py").write_text(text)
    gpu_stages.proofs(run)
    # the other file's test is run
    assert statuses(run) == {"collect": "failed", "tests": "passed"}
    text, good = gpu_stages.summary(run, ["proofs"])
    assert not good and "absent_module" in text


def test_the_end_of_a_stage_fails_nothing(run, monkeypatch):
    monkeypatch.setattr(gpu_items, "LEAST_SECONDS", 1.0)
    run.deadline = time.monotonic() + gpu_items.LEAST_SECONDS + 1.0
    gpu_items.settle(run, item("import time; time.sleep(40)", "cut", seconds=60.0))
    run.deadline = time.monotonic() + gpu_items.LEAST_SECONDS - 0.5
    gpu_items.settle(run, item("pass", "late"))
    assert statuses(run) == {"cut": "unfinished", "late": "unfinished"}
    assert gpu_stages.summary(run, ["smoke"])[1]


@pytest.mark.skipif(card() is not None, reason="there is a card")
def test_without_a_card_it_says_how_to_rehearse(tmp_path):
    command = [ROOT / "ci/gpu", "smoke", "--out", tmp_path / "out"]
    environment = {**gpu_stages.os.environ, "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "no card was found" in done.stderr and "--rehearse" in done.stderr
    assert not (tmp_path / "out").exists()
