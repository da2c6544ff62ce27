"""``fusemlp completion``: the scripts, and what they complete."""

import shutil
import subprocess
import sys
from dataclasses import fields

import pytest

from fusemlp.cli import app, options
from fusemlp.datasets.load import NAMES
from fusemlp.describe.losses import LOSSES
from fusemlp.tables.recipe import run_folders
from make import refusal, run

WORDS = {
    "commands": ("tr", {"train"}),
    "data sets": ("train ", set(NAMES)),
    "data sets and files": ("train d", {"diamonds", "digits", "diabetes", "data.csv"}),
    "options": ("train digits --weight-", {"--weight-decay"}),
    "a flag's other name": ("train digits --no-h", {"--no-header"}),
    "values": ("train digits --loss ", set(LOSSES)),
    "one of several values": ("train digits --activation relu,si", {"relu,sigmoid", "relu,silu"}),
    "trackers": ("train digits --track ", {"mlflow", "wandb"}),
    "run folders": ("evaluate ", {"runs/iris-1", "runs/iris-2"}),
    "several run folders": ("plot runs/iris-1 runs/iris-2", {"runs/iris-2"}),
    "checkpoints": ("predict runs/iris-1 --weights ", {"model", "best", "last"}),
    "shells": ("completion ", {"bash", "zsh", "fish", "powershell"}),
    "nothing": ("train nowhere/", set()),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with two runs and two files."""
    for name in ("iris-1", "iris-2"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").touch()
    (tmp_path / "runs" / "other").mkdir()
    (tmp_path / "data.csv").touch()
    (tmp_path / ".data").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", WORDS)
def test_what_is_completed(case, folder, monkeypatch, capsys):
    typed, expected = WORDS[case]
    monkeypatch.setenv(app.COMPLETE_VARIABLE, "complete_bash")
    monkeypatch.setenv("COMP_WORDS", f"fusemlp {typed}")
    monkeypatch.setenv("COMP_CWORD", str(len(typed.split(" "))))
    assert run() == 0
    assert set(capsys.readouterr().out.split()) == expected


def test_options_whose_help_lists_values_complete_them():
    """The names in an option's help and those that a shell completes come from one list."""
    for described in app.COMMANDS.values():
        for field in fields(described):
            for name in field.metadata["choices"](""):
                if field.name not in ("run", "runs", "resume", "data", "output_activation", "sort"):
                    assert name in field.metadata["help"], f"{described.__name__}.{field.name}: {name}"


@pytest.mark.parametrize("shell", options.SHELLS)
def test_a_script_for_each_shell(shell, capsys):
    assert run("completion", shell) == 0
    script = capsys.readouterr().out
    assert app.COMPLETE_VARIABLE in script and f"complete_{shell}" in script
    assert "did you mean 'zsh'" in refusal(capsys, "completion", "zhs")


# In each shell: complete "fusemlp train dig", and print what comes of it.
IN_SHELLS = {
    "bash": 'COMP_WORDS=(fusemlp train dig); COMP_CWORD=2; _fusemlp_completion fusemlp; echo "${COMPREPLY[*]}"',
    "zsh": "_arguments() { print -r -- $* }; words=(fusemlp train dig); CURRENT=3; _fusemlp_completion",
    "fish": 'complete -C "fusemlp train dig"',
}


@pytest.mark.parametrize("shell", IN_SHELLS)
def test_a_shell_runs_its_script(shell, tmp_path, capsys):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    assert run("completion", shell) == 0
    script = capsys.readouterr().out
    # A compdef as after compinit, and the program by its name.
    (tmp_path / "fusemlp").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fusemlp "$@"\n')
    (tmp_path / "fusemlp").chmod(0o755)
    before = {"zsh": "compdef() { }\n", "fish": f"set -x PATH {tmp_path} $PATH\n"}.get(shell, "")
    path = {"fish": ""}.get(shell, f'PATH="{tmp_path}:$PATH"\n')
    command = [program, "-c", f"{path}{before}{script}\n{IN_SHELLS[shell]}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert "digits" in done.stdout, done.stderr


def test_folders_that_cannot_be_read_complete_to_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folders("") == []
    (tmp_path / "runs").touch()
    assert run_folders("") == []
