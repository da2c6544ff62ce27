"""An option as a field of a dataclass: its panel and line in ``--help``, its name there, and values to complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import Field, field, fields
from pathlib import Path
from typing import Any

# The panels of --help, in their order.
PANELS = (
    *("Options", "Data", "Text tables", "Network", "Loss", "Optimizer"),
    *("Learning rate schedule", "Training", "Machine", "Output"),
)

# Returns the values that begin with a text; a shell without any completes the names of files.
Choices = Callable[[str], list[str]]


def one_of(names: Iterable[str], word: str = "or") -> str:
    """Return the names as text: a, b or c."""
    *others, last = names
    return f"{', '.join(others)} {word} {last}" if others else last


def field_of(
    panel: str,
    default: Any,
    help: str,
    metavar: str | None = None,
    names: tuple[str, ...] | None = (),
    values: Iterable[str] | Choices = (),
    kind: Any = None,
) -> Any:
    """Return the field of an option.

    ``metavar`` replaces the usual word for its type, ``names`` the field's name; an argument has None. A shell
    completes ``values``, which stand for a {} in ``help``. ``kind`` is the type that the command line gives, where
    Python takes more.
    """
    if "{}" in help and not callable(values):
        help = help.replace("{}", one_of(values))
    choices = values if callable(values) else among(values)
    about = {"panel": panel, "help": help, "metavar": metavar, "names": names, "choices": choices, "kind": kind}
    return field(default=default, metadata=about)


def name_of(option: Field[Any]) -> str:
    """Return the name of an option on the command line, without its dashes."""
    names = option.metadata["names"]
    return str(names[0]).removeprefix("--") if names else option.name.replace("_", "-")


def given_options(options: Any, usual: Any = None) -> dict[str, Any]:
    """Return the options that differ from those of ``usual``, or else from their defaults, by name."""
    usual = type(options)() if usual is None else usual
    values = {option.name: getattr(options, option.name) for option in fields(options)}
    return {name: value for name, value in values.items() if value != getattr(usual, name)}


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
        matches = [name for name in known if name.startswith(incomplete)]
        if not matches or not incomplete:
            return matches
        return matches + sorted(path.name for path in Path().glob("[!.]*") if path.name.startswith(incomplete))

    return complete


def run_folders(incomplete: str) -> list[str]:
    """Return the run folders in ``runs``, the newest first."""
    try:
        folders = [path.parent for path in Path("runs").glob("*/config.json")]
        folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    except OSError:
        return []
    return [path.as_posix() for path in folders if path.as_posix().startswith(incomplete)]
