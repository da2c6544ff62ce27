"""The planted bugs of ci/mutations.py fit the current kernels; this file really plants a few.

All of them take several minutes: ``python ci/mutate_kernels.py``.
"""

import ast
import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from devices import INTERPRETER, STAND_IN, marks_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def mutate_kernels(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "ci")
    return importlib.import_module("mutate_kernels")


def test_every_bug_has_its_place_and_leaves_the_file_readable(mutate_kernels):
    assert len(mutate_kernels.MUTATIONS) >= 24
    for mutation in mutate_kernels.MUTATIONS:
        text = mutate_kernels.mutated(mutation)
        if mutation.file.endswith(".py"):
            ast.parse(text, mutation.file)
        else:
            assert all(text.count(left) == text.count(right) for left, right in ("()", "[]", "{}"))
    names = [(mutation.package, mutation.name) for mutation in mutate_kernels.MUTATIONS]
    assert len(set(names)) == len(names)


def test_every_bug_names_tests_that_there_are(mutate_kernels):
    for node in mutate_kernels.node_ids(list(mutate_kernels.MUTATIONS)):
        file, _, name = node.partition("::")
        defined = {
            n.name for n in ast.walk(ast.parse((ROOT / file).read_text("utf-8"))) if isinstance(n, ast.FunctionDef)
        }
        assert name in defined, node


@pytest.mark.parametrize("package", ["triton", "cupy"])
def test_the_table_has_all_bugs_and_says_that_all_were_caught(mutate_kernels, package):
    lines = mutate_kernels.TABLES[package].read_text("utf-8").splitlines()
    planted = mutate_kernels.chosen(None, package)
    bugs = [tuple(line.strip("| ").split(" | ")[:2]) for line in lines if line.endswith(" |")][2:]
    assert bugs == [(mutation.name, mutation.file) for mutation in planted]
    assert lines[-1] == f"{len(planted)} planted, {len(planted)} caught."


def test_an_entry_that_does_not_fit_says_so(mutate_kernels, monkeypatch, capsys):
    first = mutate_kernels.MUTATIONS[0]
    for wrong, said in (
        (replace(first, old="no such text"), "found it 0 times"),
        (replace(first, old="tl"), "expected its old text once"),
        (replace(first, new=first.old), "the new text is the old one"),
    ):
        monkeypatch.setattr(mutate_kernels, "MUTATIONS", (wrong,))
        with pytest.raises(SystemExit, match="2"):
            mutate_kernels.main(["--list"])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        mutate_kernels.main(["--only", "no such bug"])
    assert "no such mutation: no such bug; --list shows them" in capsys.readouterr().err


@pytest.mark.parametrize("device", [pytest.param(INTERPRETER, id=INTERPRETER.name, marks=marks_of(INTERPRETER))])
def test_bugs_are_caught_and_what_is_none_survives(mutate_kernels, device):
    """Plant two fast ones, and a change that is no bug."""
    quick = ["--only", "scale doubles too late", "--only", "offset of a part in 32 bits"]
    command = [sys.executable, ROOT / "ci/mutate_kernels.py", "--package", "triton"]
    command += ["--unchecked", "--processes", "1", *quick]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("test_loss_scale.py::test_the_scale_doubles_after_enough_updates[triton, interpreted") == 1
    assert "2 planted, 2 caught." in done.stdout
    (late,) = mutate_kernels.chosen(quick[1:2], "triton")
    harmless = mutate_kernels.try_mutation(replace(late, new="grows = GROWTH_INTERVAL <= good"))
    assert harmless.caught_by is None and harmless.how == "SURVIVED"


@pytest.mark.parametrize("device", [pytest.param(STAND_IN, id=STAND_IN.name, marks=marks_of(STAND_IN))])
def test_a_barrier_that_is_missing_is_caught(mutate_kernels, device):
    (missing,) = mutate_kernels.chosen(["no barrier before the largest are read"], "cupy")
    outcome = mutate_kernels.try_mutation(missing)
    assert outcome.caught_by is not None and outcome.caught_by.startswith(missing.tests[0])
