"""The values of options and arguments, as a shell completes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

# Returns the values that begin with a text; a shell without any completes the names of files.
Choices = Callable[[str], list[str]]


def among(names: Iterable[str]) -> Choices:
    """Return the completion of one of ``names``, or of several with commas between them."""
    known = list(names)

    def complete(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{name}" for name in known if name.startswith(last)]

    return complete


def names_or_files(names: Iterable[str]) -> Choices:
    """Return the completion of a data set: a name or, in the same folder, a file."""
    known = list(names)

    def complete(incomplete: str) -> list[str]:
        found = [name for name in known if name.startswith(incomplete)]
        if not found or not incomplete:
            return found
        return found + sorted(path.name for path in Path().glob("[!.]*") if path.name.startswith(incomplete))

    return complete


def run_folders(incomplete: str) -> list[str]:
    """Return the run folders in ``runs``, the newest first."""
    try:
        found = [path.parent for path in Path("runs").glob("*/config.json")]
        found.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return []
    return [path.as_posix() for path in found if path.as_posix().startswith(incomplete)]
