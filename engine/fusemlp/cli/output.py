"""Print the results of a command, to streams and into files that may fail."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from fusemlp.describe.checks import WINDOWS
from fusemlp_kernels.errors import ArgumentError


class _Stream(io.FileIO):
    """A standard stream; the program goes on after its ``failure``, as of a full disk or a reader that is gone."""

    failure: OSError | None = None

    def write(self, data: Any) -> int:
        if self.failure is None:
            try:
                return super().write(data)
            except OSError as error:
                self.failure = error
        return len(data)


def _lasting(stream: Any) -> Any:
    """Return a standard stream, None for a closed one, as a stream whose writes do not fail."""
    buffer = getattr(stream, "buffer", None)
    if stream is not None and type(getattr(buffer, "raw", buffer)) is not io.FileIO:
        # A console of Windows, or none of the system's streams.
        return stream
    # A later file must not get the number of a closed stream, to which libraries may write.
    number = os.open(os.devnull, os.O_WRONLY) if stream is None else stream.fileno()
    writer = io.BufferedWriter(_Stream(number, "w", closefd=False))
    return io.TextIOWrapper(writer, getattr(stream, "encoding", "utf-8"), "backslashreplace", line_buffering=True)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Go on in the body when stdout or stderr fails; exit with 1 at its end if stdout has lost results."""
    with redirect_stdout(_lasting(sys.stdout)) as out, redirect_stderr(_lasting(sys.stderr)):
        try:
            yield
        finally:
            out.flush()
            failure = getattr(getattr(getattr(out, "buffer", None), "raw", None), "failure", None)
            if failure is not None and failure.errno != errno.EPIPE:
                print(f"error: stdout: {failure.strerror}, so results are not shown", file=sys.stderr)
                sys.exit(1)


@contextmanager
def resumable(command: str, mark: str) -> Iterator[list[Path]]:
    """Let an error of the system, as of a full disk, say how to go on; the body appends its run, which has ``mark``."""
    runs: list[Path] = []
    try:
        yield runs
    except OSError as error:
        for run in runs:
            if (run / mark).exists():
                # The page comes after the end.
                again = ["report"] if str(error.filename).endswith(".html") else [command, "--resume"]
                going = command_line(["fusemlp", *again, str(run)])
                error.strerror = f"{error.strerror or error}; when that is mended, go on: {going}"
        raise


def show(content: Mapping[str, Any], lines: Iterable[str], *, as_json: bool, warnings: Iterable[str] = ()) -> None:
    """Print ``content`` as one JSON object, or ``lines`` and after them the warnings.

    These go to stderr too, unless a terminal shows both.
    """
    warned = [f"warning: {warning}" for warning in warnings]
    if as_json:
        print_json(content, sys.stdout)
    else:
        print(*lines, *warned, sep="\n", flush=True)
    if warned and (as_json or not sys.stdout.isatty()):
        print(*warned, sep="\n", file=sys.stderr)


def print_json(content: Mapping[str, Any], stream: TextIO) -> None:
    """Print ``content`` as a line."""
    print(json.dumps(finite(content)), file=stream, flush=True)


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
