"""The planted bugs of ci/mutations.txt fit the current kernels; this file really plants a few.

All of them take several minutes: ``python ci/mutate_kernels.py``.
"""

import ast
import subprocess
import sys
from dataclasses import replace

import mutate_kernels
import pytest
from devices import INTERPRETER, STAND_IN, places
from processes import ROOT

BUGS = mutate_kernels.mutations()


def test_every_bug_has_its_place_and_leaves_the_file_readable():
    assert len(BUGS) == mutate_kernels.TABLE.read_text("utf-8").count("\n* ") >= 180
    for bug in BUGS:
        text = bug.text()
        if bug.file.endswith(".py"):
            ast.parse(text, bug.file)
        else:
            assert all(text.count(left) == text.count(right) for left, right in ("()", "[]", "{}"))
    assert len({(bug.package, bug.name) for bug in BUGS}) == len(BUGS)


def test_every_bug_names_tests_that_there_are():
    for test in {test for bug in BUGS for test in bug.tests}:
        file, _, name = test.partition("::")
        assert f"\ndef {name}(" in (ROOT / "tests/kernels" / file).read_text("utf-8"), test


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"old": "no such text"}, "found it 0 times"),
        ({"old": "tl"}, "expected another text for one that occurs once in triton/linear.py"),
        ({"new": BUGS[0].old}, "expected another text for one that occurs once in triton/linear.py"),
    ],
)
def test_an_entry_that_does_not_fit_says_so(monkeypatch, capsys, change, said):
    monkeypatch.setattr(mutate_kernels, "mutations", lambda *_: [replace(BUGS[0], **change)])
    with pytest.raises(SystemExit, match="2"):
        mutate_kernels.main(["--list"])
    assert said in capsys.readouterr().err


def test_an_unknown_bug_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        mutate_kernels.main(["--only", "no such bug"])
    assert "no such mutation: no such bug; --list shows them" in capsys.readouterr().err


@pytest.mark.parametrize("device", places(INTERPRETER))
def test_bugs_are_caught_and_what_is_none_survives(device):
    """Plant two fast ones, and a change that is no bug."""
    quick = ["--only", "scale doubles too late", "--only", "offset of a part in 32 bits"]
    command = [sys.executable, ROOT / "ci/mutate_kernels.py", "--package", "triton"]
    command += ["--unchecked", "--processes", "1", *quick]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("test_update.py::test_the_scale_doubles_after_enough_updates[triton, interpreted") == 1
    assert "2 planted, 2 caught." in done.stdout
    (late,) = mutate_kernels.mutations(quick[1:2], "triton")
    harmless = replace(late, new="grows = GROWTH_INTERVAL <= good")
    assert mutate_kernels.outcome(harmless) == (None, "SURVIVED")


@pytest.mark.parametrize("device", places(STAND_IN))
def test_a_barrier_that_is_missing_is_caught(device):
    (missing,) = mutate_kernels.mutations(["no barrier before the largest are read"], "cupy")
    test, _ = mutate_kernels.outcome(missing)
    assert test.startswith(missing.tests[0])
