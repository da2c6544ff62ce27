"""An option as a field of a dataclass: its panel and its line in ``--help``, its name there, and values to complete."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import Field, field, fields
from typing import Any

from fusemlp.cli.choices import Choices, among

# The panels of --help, in their order.
PANELS = (
    *("Options", "Data", "Text tables", "Network", "Loss", "Optimizer"),
    *("Learning rate schedule", "Training", "Machine", "Output"),
)


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
) -> Any:
    """Return the field of an option.

    ``metavar`` replaces the usual word for its type, ``names`` the field's name; an argument has None. A shell
    completes ``values``, which stand for a {} in ``help``.
    """
    if "{}" in help and not callable(values):
        help = help.replace("{}", one_of(values))
    choices = values if callable(values) else among(values)
    about = {"panel": panel, "help": help, "metavar": metavar, "names": names, "choices": choices}
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
