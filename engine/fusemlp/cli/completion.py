"""``fusemlp completion``: the script by which a shell completes commands, options and their values."""

from __future__ import annotations

import typer
from typer.completion import get_completion_script  # type: ignore[attr-defined]

from fusemlp.cli.app import COMPLETE_VARIABLE, PROGRAM
from fusemlp.cli.options import SHELLS, CompletionOptions
from fusemlp.describe.checks import check_choice


def completion(options: CompletionOptions) -> None:
    """Print the script."""
    shell = check_choice("shell", options.shell, SHELLS)
    typer.echo(get_completion_script(prog_name=PROGRAM, complete_var=COMPLETE_VARIABLE, shell=shell))
