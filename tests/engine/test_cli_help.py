"""``--help`` at every width, the common options of a command, and what a shell completes."""

import re
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import typer

from fusemlp.cli import app, options
from fusemlp.cli.app import COMMON, GROUPS, MOST
from fusemlp.datasets.load import NAMES
from fusemlp.describe.losses import LOSSES
from fusemlp.tables.recipe import run_folders
from make import output_of, refusal

COMMANDS = typer.main.get_command(app.app).commands
LARGE = [name for name, command in COMMANDS.items() if len(command.params) > MOST]
PANELS = ("Data", "Network", "Loss", "Optimizer", "Learning rate schedule", "Training", "Machine", "Output")


@pytest.fixture
def shown(monkeypatch, capsys):
    """Return a function that asks for help at a width, and returns the lines."""

    def lines(*words, width=80):
        monkeypatch.setenv("COLUMNS", str(width))
        return output_of(capsys, *words).splitlines()

    return lines


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_the_program_names_every_command_once_in_a_group(flag, shown):
    assert sorted(name for names in GROUPS.values() for name in names) == sorted(COMMANDS)
    lines = shown(flag)
    assert set(GROUPS) <= set(lines)
    assert "  fusemlp train digits" in lines
    for name in COMMANDS:
        assert sum(line.startswith(f"  {name} ") for line in lines) == 1


@pytest.mark.parametrize("width", [44, 60, 80, 120])
@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "bench"])
def test_all_options_at_every_width(command, width, shown):
    lines = shown(command, "--help-all", width=width)
    assert lines[0].startswith(f"Usage: fusemlp {command} [OPTIONS]")
    about = COMMANDS[command].help.splitlines()
    for line in lines[1:]:
        # a command to copy stays whole, and no word is longer than a line
        assert len(line) <= width or line in about
    for option in COMMANDS[command].params:
        for name in (name for name in option.opts if name.startswith("-")):
            # no name is cut, and each stands at the beginning of its entry
            assert any(re.match(rf" {{2}}(-\w, |--[\w-]+, )?{name}\b", line) for line in lines), name
    # a flag takes no value
    assert not re.search("bool", "".join(lines), re.IGNORECASE)


@pytest.mark.parametrize("command", LARGE)
def test_the_help_of_a_command_with_many_options_is_short(command, shown):
    short, full = shown(command, "--help"), shown(command, "--help-all")
    options = [line for line in short if line.startswith("  -")]
    assert 10 <= len(options) <= MOST and len(short) < 70
    assert set(PANELS) - {"Learning rate schedule", "Training"} <= set(full) and not set(PANELS) & set(short)
    (rest,) = (line for line in short if "--help-all" in line)
    count = sum(line.startswith("  -") for line in full)
    assert rest == f"fusemlp {command} --help-all shows all {count} options by theme."


def test_the_largest_commands():
    assert LARGE == ["train", "sweep", "lr-find"]
    assert set(COMMON) <= {option.name for name in LARGE for option in COMMANDS[name].params}


def test_examples_of_train_are_commands(shown):
    examples = [line.split() for line in shown("train", "--help") if line.startswith("  fusemlp ")]
    assert len(examples) == 3
    for _, command, *words in examples:
        with COMMANDS[command].make_context(command, words) as context:
            assert context.params["data"] or context.params["resume"]


def test_an_entry_shows_value_default_and_whether_it_is_required(shown):
    text = "\n".join(shown("predict", "--help", width=120))
    assert re.search(r"^  --data FILE .*\n.*\[required\]|^  --data FILE .*\[required\]", text, re.MULTILINE)
    assert re.search(r"^  --backend NAME .*\[default:\s+auto\]", text, re.MULTILINE)
    assert re.search(r"^  --header / --no-header .*\n?.*\[default: --header\]", text, re.MULTILINE)


def test_help_loads_no_engine():
    script = """
import sys
from fusemlp import cli
try:
    cli.main(["train", "--help"])
except SystemExit:
    pass
print([name for name in ("scipy", "sklearn", "fusemlp.engine") if name in sys.modules], file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == "[]\n"


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
    assert (
        set(
            output_of(
                capsys,
            ).split()
        )
        == expected
    )


def test_options_whose_help_lists_values_complete_them():
    """The names in an option's help and those that a shell completes come from one list."""
    for described in app.COMMANDS.values():
        for field in fields(described):
            for name in field.metadata["choices"](""):
                if field.name not in ("run", "runs", "resume", "data", "output_activation", "sort"):
                    assert name in field.metadata["help"], f"{described.__name__}.{field.name}: {name}"


@pytest.mark.parametrize("shell", options.SHELLS)
def test_a_script_for_each_shell(shell, capsys):
    script = output_of(capsys, "completion", shell)
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
    script = output_of(capsys, "completion", shell)
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
