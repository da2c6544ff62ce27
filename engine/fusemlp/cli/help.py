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


def of_command(path: str, about: str, parameters: Iterable[Any], *, everything: bool) -> str:
    """Return the help of a command with typer's ``parameters``; ``everything``: all options of a command with many."""
    themes: dict[str, list[tuple[str, str]]] = {"Arguments": []}
    common, count, usage = list[tuple[str, str]](), 0, [path, "[OPTIONS]"]
    for parameter in parameters:
        name, text = _row(parameter)
        if parameter.param_type_name == "argument":
            themes["Arguments"].append((name, text))
            usage.append(name if parameter.required else f"[{name}]")
            continue
        count += 1
        # --help itself has no theme
        themes.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append((name, text))
        if parameter.name in COMMON:
            common.append((name, _first(text, ". ")))
    rest = ""
    if count > MOST and not everything:
        themes = {"Arguments": themes["Arguments"], "Common options": common}
        rest = f"{path} --help-all shows all {count} options by theme."
    return _page(" ".join(usage), about, {title: rows for title, rows in themes.items() if rows}, rest)


def _row(parameter: Any) -> tuple[str, str]:
    """Return the names of an option or argument with the word for its value, and its explanation with the default."""
    if parameter.param_type_name == "argument":
        return parameter.metavar, parameter.help
    names, default = ", ".join(sorted(parameter.opts, key=len)), parameter.default
    if parameter.secondary_opts:
        names, default = f"{names} / {parameter.secondary_opts[0]}", parameter.opts[0] if default else None
    note = " [required]" if parameter.required else "" if default in (None, False) else f" [default: {default}]"
    return f"{names} {parameter.metavar or ''}".rstrip(), f"{parameter.help}{note}"


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
