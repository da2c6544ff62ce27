"""The text of ``--help``: the common options of a command that has many, and with ``--help-all`` all by theme."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from textwrap import TextWrapper
from typing import Any

import typer

# A command with more options than this shows those of its own that are common, each in a sentence.
MOST = 20
COMMON = {
    *("vary", "sample", "seeds", "jobs", "target", "id", "hidden", "preset", "loss", "optimizer", "lr", "batch_size"),
    *("epochs", "early_stopping", "models", "time_limit", "seed", "start", "end", "steps", "plot"),
    *("out", "resume", "as_json"),
}
# The commands by what people do.
GROUPS = {
    "Train": ("train", "sweep", "lr-find"),
    "Use a model": ("predict", "evaluate", "explain", "export"),
    "Look at runs": ("runs", "report", "plot"),
    "Machine": ("doctor", "plan", "bench", "completion"),
}
# The most columns of a line, and of the names beside their texts; a narrower terminal has the texts below the names.
WIDEST, BESIDE, ROOMY = 100, 28, 70

Rows = Sequence[tuple[str, str]]
# No option is cut in two.
_wrapper = partial(TextWrapper, break_long_words=False, break_on_hyphens=False)


def of_program(about: str, commands: Mapping[str, str], options: Iterable[Any]) -> str:
    """Return the help of the program from the help of each of its commands."""
    groups = {title: [(name, _first(commands[name], "\n\n")) for name in names] for title, names in GROUPS.items()}
    rest = "fusemlp COMMAND --help shows the options of a command."
    return _page("fusemlp COMMAND [OPTIONS]", about, {**groups, "Options": [*map(_row, options)]}, rest)


def of_command(path: str, about: str, parameters: Sequence[Any], *, everything: bool) -> str:
    """Return the help of a command with typer's ``parameters``; ``everything``: all options of a command with many."""
    arguments = [parameter for parameter in parameters if parameter.param_type_name == "argument"]
    options = [parameter for parameter in parameters if parameter.param_type_name == "option"]
    usage = [path, "[OPTIONS]", *(each.metavar if each.required else f"[{each.metavar}]" for each in arguments)]
    themes: dict[str, list[tuple[str, str]]] = {}
    for option in options:
        # --help itself has no theme
        themes.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(_row(option))
    rest = ""
    if len(options) > MOST and not everything:
        rows = map(_row, (option for option in options if option.name in COMMON))
        themes = {"Common options": [(name, _first(text, ". ")) for name, text in rows]}
        rest = f"{path} --help-all shows all {len(options)} options by theme."
    described = {"Arguments": [(each.metavar, each.help) for each in arguments]} if arguments else {}
    return _page(" ".join(usage), about, {**described, **themes}, rest)


def _row(option: Any) -> tuple[str, str]:
    """Return the names of an option with the word for its value, and its explanation with the default."""
    names, default = ", ".join(sorted(option.opts, key=len)), option.default
    if option.secondary_opts:
        names, default = f"{names} / {option.secondary_opts[0]}", option.opts[0] if default else None
    note = " [required]" if option.required else "" if default in (None, False) else f" [default: {default}]"
    return f"{names} {option.metavar or ''}".rstrip(), f"{option.help}{note}"


def _first(text: str, end: str) -> str:
    """Return the first paragraph or sentence of a text."""
    return text if end not in text else text.split(end)[0] + end.rstrip()


def _page(usage: str, about: str, sections: Mapping[str, Rows], rest: str) -> str:
    """Return a page; an indented paragraph of ``about`` holds commands to copy, each on its line."""
    width = min(shutil.get_terminal_size().columns, WIDEST)
    parts = [f"Usage: {usage}"]
    for part in about.split("\n\n"):
        parts.append(part if part.startswith(" ") else _wrapper(width=width).fill(part))
    for title, rows in sections.items():
        parts.append("\n".join([typer.style(title, bold=True), *_listed(rows, width)]))
    return "\n\n".join([*parts, *filter(None, [rest])])


def _listed(rows: Rows, width: int) -> Iterator[str]:
    """Yield the lines of names with their texts."""
    indent = " " * (min(BESIDE, 4 + max(len(name) for name, _ in rows)) if width >= ROOMY else 6)
    for name, text in rows:
        beside = f"  {name}  ".ljust(len(indent))
        if len(beside) > len(indent):
            yield beside.rstrip()
            beside = indent
        yield _wrapper(width=width, initial_indent=beside, subsequent_indent=indent).fill(text)
