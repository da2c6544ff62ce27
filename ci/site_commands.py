"""Hook of mkdocs: the page of the command line's options, made from the commands themselves."""

from __future__ import annotations

import html
import itertools
import re
from textwrap import dedent
from typing import Any

import typer.main
from mkdocs.structure.pages import Page

from fusemlp.cli.app import app

PAGE = "options.md"
MARK = "<!-- the commands and their options -->"


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Put the commands in place of the mark."""
    if page.file.src_uri != PAGE:
        return markdown
    if MARK not in markdown:
        raise ValueError(f"{PAGE}: expected the line {MARK!r}")
    commands = vars(typer.main.get_command(app))["commands"]
    return markdown.replace(MARK, "\n".join(section(name, command) for name, command in commands.items()))


def section(name: str, command: Any) -> str:
    """Return a command's section: its help, its arguments, and its options by theme."""
    arguments = [item for item in command.params if item.param_type_name == "argument"]
    options = [item for item in command.params if item.param_type_name == "option"]
    words = " ".join(["fusemlp", name, *(item.metavar for item in arguments), *(["[OPTIONS]"] if options else [])])
    parts = [f"## {name}", f"```\n{words}\n```", *map(paragraph, (command.help or "").split("\n\n"))]
    parts += [definition(item.metavar, item) for item in arguments]
    for panel, items in itertools.groupby(options, key=lambda item: item.rich_help_panel):
        title = panel if isinstance(panel, str) else "Options"
        parts.append(f"### {title} {{ #{name}-{title.lower().replace(' ', '-')} }}")
        parts += [definition(spelling(item), item) for item in items]
    return "\n\n".join(parts) + "\n"


def paragraph(text: str) -> str:
    """Return a paragraph of a help text; an indented one holds commands to copy."""
    return f"```sh\n{dedent(text)}\n```" if text.startswith(" ") else plain(" ".join(text.split()))


def plain(text: str) -> str:
    """Return a help text as Markdown."""
    return re.sub(r"([*_])", r"\\\1", html.escape(text, quote=False))


def spelling(option: Any) -> str:
    """Return the names of an option and the word for its value."""
    names = ", ".join(option.opts) + "".join(f" / {name}" for name in option.secondary_opts)
    return f"{names} {option.metavar or ''}".strip()


def definition(name: str, item: Any) -> str:
    """Return an argument or option as an item of a definition list, with its default."""
    shown = item.show_default and item.default not in (None, False, (), [], "")
    default = f" Default: `{item.default}`." if shown else ""
    often = " May be given several times." if item.multiple else ""
    return f"`{name}`\n:   {plain(' '.join((item.help or '').split()))}{default}{often}"
