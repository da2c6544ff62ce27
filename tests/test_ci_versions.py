"""ci/versions: the table of Pythons and dependencies, its rows that were not run, and its exit code."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import versions

ROOT = Path(__file__).resolve().parents[1]


def test_the_script_explains_itself():
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run([ROOT / "ci/versions", "--help"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("lowest", "--python", "torch", "--triton", "tests/ptx"))


def test_a_version_of_triton_has_a_cell_of_its_own():
    command = [ROOT / "ci/versions", "--triton", "3.6.0", "--versions", "lowest"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable})
    assert done.returncode == 2 and "argument --versions: not with --triton" in done.stderr
    plain, listed = versions.requirements(), versions.requirements("3.6.0")
    assert listed[-2:] == ["triton==3.6.0", "numpy<2.4"] and set(plain) < set(listed)
    assert {versions.name_of(one) for one in set(listed) - set(plain)} == {"numpy", *versions.OF_TRITON}


def test_a_cell_has_every_dependency_in_its_declared_range():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed, extras = versions.requirements(), project["optional-dependencies"]
    assert set(project["dependencies"]).union(*(extras[extra] for extra in versions.EXTRAS)) <= set(listed)
    names = list(map(versions.name_of, listed))
    assert "pytest" in names and not set(names) & {*versions.LEFT_OUT, "fusemlp"}
    # what is left out is a dependency of the tests
    assert set(versions.LEFT_OUT) <= set(map(versions.name_of, extras["test"]))
    for requirement in listed:
        assert re.match(r"[\w.-]+>=[\d.]+", requirement) and "==" not in requirement, requirement


def test_missing_interpreters_are_named_and_cells_that_fail_are_counted(monkeypatch, tmp_path, capsys):
    """Build no wheel, and know Python 3.11 alone; a cell of the newest versions fails."""

    def check_cell(uv, interpreter, chosen, wheel, folder, tests, triton):
        result = "FAILED: pytest failed" if chosen == "newest" else "909 passed"
        return versions.Cell("3.11.7", chosen, {"numpy": "2.0.0"}, result, 61.0)

    (tmp_path / "fusemlp-1.whl").touch()
    monkeypatch.setattr(versions, "find_uv", lambda folder: "uv")
    monkeypatch.setattr(versions, "run", lambda *given, **named: "")
    monkeypatch.setattr(versions, "find_python", lambda python, uv: "python3.11" if python == "3.11" else None)
    monkeypatch.setattr(versions, "check_cell", check_cell)
    assert versions.check(["3.11", "3.14"], ["lowest"], [], tmp_path) == 0
    *_, first, second, _, left_out = capsys.readouterr().out.splitlines()
    assert first == "| 3.11.7 | lowest | 2.0.0 |  |  |  |  |  |  | 909 passed | 61 |"
    assert "| 3.14 | lowest |" in second and "not run: no interpreter python3.14 was found" in second
    assert left_out.startswith("Left out of every cell: ") and "torch" in left_out
    assert versions.check(["3.11"], ["lowest", "newest"], [], tmp_path) == 1
    assert "FAILED: pytest failed" in capsys.readouterr().out
    assert versions.check(["3.11"], ["triton-3.6.0"], [], tmp_path, "3.6.0") == 0
    assert "torch" not in capsys.readouterr().out


def test_a_cell_of_triton_executes_ptx_and_rehearses(monkeypatch, tmp_path):
    """With commands that run nothing."""
    commands = []

    def run(what, command, *, cwd, **variables):
        commands.append((what, variables))
        return {"listing packages": "[]", "pytest": "211 passed in 1.00s"}.get(what, "")

    monkeypatch.setattr(versions, "run", run)
    wheel, tests = tmp_path / "fusemlp-1.whl", ["tests/ptx"]
    cell = versions.check_cell("uv", sys.executable, "triton-3.6.0", wheel, tmp_path / "cell", tests, "3.6.0")
    assert cell.result == "211 passed, ci/gpu --rehearse passed"
    names = [what for what, _ in commands]
    assert names[-2:] == ["pytest", "ci/gpu --rehearse"]
    assert commands[-2][1]["TRITON_INTERPRET"] == "0" and "PYTHON" in commands[-1][1]
    cell = versions.check_cell("uv", sys.executable, "newest", wheel, tmp_path / "other", tests, None)
    assert cell.result == "211 passed" and "TRITON_INTERPRET" not in commands[-1][1]
