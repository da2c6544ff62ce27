"""Print the results of a command, and write the files that its options name."""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from fusemlp.datasets.files import reason
from fusemlp.describe.checks import WINDOWS
from fusemlp.report.plots import check_plots, picture
from fusemlp.runtime.files import write_atomically
from fusemlp_kernels.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def show(content: Mapping[str, Any], lines: Iterable[str], *, as_json: bool, warnings: Iterable[str] = ()) -> None:
    """Print ``content`` as one JSON object and the warnings on stderr, or ``lines`` and after them the warnings."""
    if as_json:
        print_json(content, sys.stdout)
    else:
        print(*lines, sep="\n", flush=True)
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr if as_json else sys.stdout, flush=True)


def print_json(content: Mapping[str, Any], stream: TextIO) -> None:
    """Print ``content`` as a line; the program goes on if nothing reads the lines any more."""
    try:
        print(json.dumps(finite(content)), file=stream, flush=True)
    except BrokenPipeError:
        # The flush at the end of the process would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def command_line(words: Sequence[str]) -> str:
    """Return a command as this system's shell reads it."""
    return subprocess.list2cmdline(words) if WINDOWS else shlex.join(words)


def finite(content: Any) -> Any:
    """Return ``content`` for JSON, with None for NaN and infinities."""
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def check_output(argument: str, path: Path, suffixes: tuple[str, ...], *, force: bool) -> None:
    """Raise ArgumentError unless a file of this name may be written; call it before the work."""
    if path.suffix.lower() not in suffixes:
        raise ArgumentError(f"{argument}: expected a file name ending in {' or '.join(suffixes)}, got {str(path)!r}")
    if path.is_dir() or (path.exists() and not force):
        raise ArgumentError(f"{argument}: {str(path)!r} exists; give another name, or --force to overwrite a file")
    if not path.absolute().parent.is_dir():
        raise ArgumentError(f"{argument}: there is no folder {str(path.parent)!r}; make it first")


def write_picture(path: Path, make: Callable[[], Figure], argument: str = "plot") -> None:
    """Write the picture of ``make`` as ``write_made`` does; MissingLibraryError without matplotlib."""
    check_plots()
    write_made(argument, path, lambda: picture(make(), path.suffix.lower().removeprefix(".")))


def write_made(argument: str, path: Path, make: Callable[[], bytes]) -> None:
    """Write the picture or page of ``make`` as ``write_output`` does; DataError if it cannot be made."""
    try:
        content = make()
    # names, numbers and the settings of matplotlib may be anything, and so are the errors
    except Exception as error:
        raise DataError(f"{argument}: {str(path)!r} cannot be made ({reason(error)})") from error
    write_output(argument, path, content)


def write_output(argument: str, path: Path, content: bytes) -> None:
    """Write a file atomically; ArgumentError if it cannot be written."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ArgumentError(f"{argument}: {str(path)!r} cannot be written ({error.strerror})") from error
