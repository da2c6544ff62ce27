"""Run the guides of the documentation, and write into each page what its snippets print.

A guide of ``engine/docs/guides`` runs from top to bottom in an empty folder: its Python blocks, and the lines of its
shell blocks that begin with ``fusemlp``. A block of text directly after one of them shows what it prints; the line
``...`` stands for lines that the page leaves out. ``python ci/guides.py [NAME...]`` brings the numbers of all shown
lines up to date, in ci/test's environment, and names the lines that are not printed any more.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from fusemlp import cli

FOLDER = Path(__file__).resolve().parents[1] / "engine/docs/guides"
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.md") if path.stem != "index"))
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.DOTALL | re.MULTILINE)
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")


def run(name: str, names: dict[str, Any]) -> Iterator[tuple[re.Match[str], str]]:
    """Run a guide in the working folder with the names of its Python blocks; yield each block and what it prints."""
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    names["__name__"] = "__main__"
    for number, block in enumerate(BLOCK.finditer(text), 1):
        language, code, _ = block.groups()
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            if language == "python":
                exec(compile(code, f"{name}.md, block {number}", "exec"), names)
            else:
                command_lines(code)
        yield block, output.getvalue()


def command_lines(code: str) -> None:
    """Run the lines of a shell block that begin with ``fusemlp``; one that fails raises an error with its output."""
    for line in code.replace("\\\n", " ").splitlines():
        if not line.startswith("fusemlp "):
            continue
        try:
            with patch.dict("os.environ", {"COLUMNS": "100"}):
                cli.main(shlex.split(line, comments=True)[1:])
        except SystemExit as ended:
            if ended.code:
                raise RuntimeError(f"exit code {ended.code}: {line}\n{sys.stdout.getvalue()}") from None


def current(shown: str, printed: str) -> str:
    """Return shown lines with the numbers that are printed now; a line that is not printed raises ValueError."""
    lines = iter(printed.splitlines())
    result = []
    for line in shown.splitlines():
        if line != "...":
            form = words(line)
            line = next((other for other in lines if words(other) == form), None) or missing(line, printed)
        result.append(f"{line.rstrip()}\n")
    return "".join(result)


def words(line: str) -> list[str]:
    """Return a line without its numbers and its spaces."""
    return NUMBER.sub("#", line).split()


def missing(line: str, printed: str) -> str:
    raise ValueError(f"the page shows a line that is not printed: {line}\nprinted:\n{printed}")


def update(name: str) -> None:
    """Run a guide in an empty folder, and write its shown output again."""
    page = FOLDER / f"{name}.md"
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for block, printed in run(name, {}):
            if block[3]:
                fresh = block[0].replace(f"```text\n{block[3]}```", f"```text\n{current(block[3], printed)}```")
                text = text.replace(block[0], fresh)
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    for guide in sys.argv[1:] or NAMES:
        print(guide)
        update(guide)
