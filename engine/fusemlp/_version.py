"""The version and the commit, in the one place that the build, the package and the command line read them from."""

from functools import cache
from pathlib import Path

__version__ = "0.2.0"


@cache
def commit() -> str | None:
    """Return the commit that the build wrote beside this file, or the checkout's (``-dirty`` if changed), or None."""
    import subprocess

    built = Path(__file__).with_name("_commit.txt")
    if built.exists():
        return built.read_text(encoding="ascii").strip()
    # with the folder named, git does not look in those around it
    command = ["git", "--git-dir=.git", "--work-tree=.", "--no-optional-locks", "describe", "--always", "--dirty"]
    command += ["--abbrev=12", "--exclude=*"]
    try:
        described = subprocess.run(command, cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True)
    except OSError:
        return None
    return described.stdout.strip() or None
