"""The planted bugs of ci/mutations.txt fit the current kernels; this file really plants one.

All of them take several minutes: ``python ci/mutate_kernels.py``.
"""

import ast
from dataclasses import replace

import mutate_kernels
import pytest
from devices import INTERPRETER, places
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
def test_a_bug_is_caught_and_what_is_none_survives(device, monkeypatch, capsys):
    (late,) = mutate_kernels.mutations(["scale doubles too late"], "triton")
    harmless = replace(late, name="none", new="grows = GROWTH_INTERVAL <= good")
    monkeypatch.setattr(mutate_kernels, "mutations", lambda *_: [late, harmless])
    assert mutate_kernels.main(["--unchecked", "--processes", "1"]) == 1
    caught, survived, count = capsys.readouterr().out.splitlines()
    assert "test_update.py::test_the_scale_doubles_after_enough_updates[triton, interpreted" in caught
    assert survived.endswith("none: SURVIVED") and count.startswith("2 planted, 1 caught.")
