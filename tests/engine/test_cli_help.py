"""``--help``: the common options of a command, all with ``--help-all``, at every width, and commands to copy whole."""

import re
import subprocess
import sys

import pytest
import typer

from fusemlp.cli import app
from fusemlp.cli.help import COMMON, GROUPS, MOST
from make import run

COMMANDS = typer.main.get_command(app.app).commands
LARGE = [name for name, command in COMMANDS.items() if len(command.params) > MOST]
PANELS = ("Data", "Network", "Loss", "Optimizer", "Learning rate schedule", "Training", "Machine", "Output")


@pytest.fixture
def shown(monkeypatch, capsys):
    """Return a function that asks for help at a width, and returns the lines."""

    def lines(*words, width=80):
        monkeypatch.setenv("COLUMNS", str(width))
        assert run(*words) == 0
        return capsys.readouterr().out.splitlines()

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
    assert re.search(r"^  --backend NAME .*\[default: auto\]", text, re.MULTILINE)
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
