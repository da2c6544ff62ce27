"""ci/versions: the table of Pythons and dependencies, its rows that were not run, and its exit code."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import versions

ROOT = Path(__file__).resolve().parents[1]


def test_the_script_explains_itself():
    script = ROOT / "ci/versions"
    assert os.access(script, os.X_OK)
    done = subprocess.run(
        [script, "--help"], capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stderr
    assert "lowest" in done.stdout and "--python" in done.stdout and "torch" in done.stdout


def test_a_cell_has_every_dependency_in_its_declared_range():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    listed = versions.requirements()
    assert set(project["dependencies"]) <= set(listed)
    for extra in versions.EXTRAS:
        assert set(project["optional-dependencies"][extra]) <= set(listed)
    names = list(map(versions.name_of, listed))
    assert "pytest" in names and not set(names) & {*versions.LEFT_OUT, "fusemlp"}
    # what is left out is a dependency of the tests
    tested = [versions.name_of(one) for one in project["optional-dependencies"]["test"]]
    assert set(versions.LEFT_OUT) <= set(tested)


def test_every_requirement_has_a_lower_bound_and_no_exact_version():
    for requirement in versions.requirements():
        assert re.match(r"[\w.-]+>=[\d.]+", requirement) and "==" not in requirement, requirement


def test_the_tests_of_a_cell_are_there_and_need_no_torch():
    for test in versions.TESTS:
        text = (ROOT / test).read_text(encoding="utf-8")
        assert not re.search(r"^(import|from) (torch|triton)\b", text, re.MULTILINE), test


@pytest.mark.parametrize(
    ("line", "counts"),
    [
        ("873 passed, 2 xfailed, 30 warnings in 311.74s (0:05:11)", "873 passed, 2 xfailed"),
        ("===== 7 passed, 1 skipped in 2.30s =====", "7 passed, 1 skipped"),
        ("1 passed, 1 warning in 0.10s", "1 passed"),
    ],
)
def test_the_counts_of_pytest_are_the_result(line, counts):
    assert versions.COUNTS.findall(f"some output\n{line}\n") == [counts]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Build no wheel, and know Python 3.11 alone; a cell of the newest versions fails."""

    def find_python(python, uv):
        return "python3.11" if python == "3.11" else None

    def check_cell(uv, interpreter, chosen, wheel, folder, tests):
        result = "FAILED: pytest failed" if chosen == "newest" else "909 passed"
        return versions.Cell("3.11.7", chosen, {"numpy": "2.0.0"}, result, 61.0)

    (tmp_path / "fusemlp-1.whl").touch()
    monkeypatch.setattr(versions, "find_uv", lambda folder: "uv")
    monkeypatch.setattr(versions, "run", lambda *given, **named: "")
    monkeypatch.setattr(versions, "find_python", find_python)
    monkeypatch.setattr(versions, "check_cell", check_cell)
    return tmp_path


def test_an_interpreter_that_is_missing_is_named_as_not_run(machine, capsys):
    assert versions.check(["3.11", "3.14"], ["lowest"], [], machine) == 0
    *_, first, second, _, left_out = capsys.readouterr().out.splitlines()
    assert first == "| 3.11.7 | lowest | 2.0.0 |  |  |  |  |  |  | 909 passed | 61 |"
    assert "| 3.14 | lowest |" in second and "not run: no interpreter python3.14 was found" in second
    assert left_out.startswith("Left out of every cell: ") and "torch" in left_out


def test_a_cell_that_fails_is_counted(machine, capsys):
    assert versions.check(["3.11"], ["lowest", "newest"], [], machine) == 1
    assert "FAILED: pytest failed" in capsys.readouterr().out


def test_interpreters_are_asked_for_their_version():
    major, minor = sys.version_info[:2]
    assert versions.find_python("2.5", sys.executable) is None
    found = versions.find_python(f"{major}.{minor}", sys.executable)
    if found is not None:
        command = [found, "-I", "-c", "import sys; print(sys.version_info[:2])"]
        assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == str((major, minor))
