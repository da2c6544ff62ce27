"""The version and the commit, in the one place that the build, the package and the command line read them from."""

from __future__ import annotations

from functools import cache
from pathlib import Path

__version__ = "0.2.0"


@cache
def commit() -> str | None:
    """Return the commit of this code, ending in ``-dirty`` if tracked files were changed; None if it is unknown.

    A build writes it beside this file, a checkout asks git.
    """
    import subprocess

    built, checkout = Path(__file__).with_name("_commit.txt"), Path(__file__).resolve().parents[2]
    if built.exists():
        return built.read_text(encoding="ascii").strip()
    if not (checkout / ".git").exists():
        return None
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    except OSError:  # no git
        return None
    return described.stdout.strip() or None
