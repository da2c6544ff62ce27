"""Processes that spin beside a contender, as other programs of a shared machine do: ``python -m bench --busy N``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

# A spinner says that it runs. It ends with its standard input, which the system closes even if the benchmark is killed.
SPIN = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
print("spinning", flush=True)
while True:
    pass
"""


@contextmanager
def spinning(number: int) -> Iterator[list[int]]:
    """Keep ``number`` processes spinning, each on one core at most; yields their process ids.

    They share session and niceness with the contenders, so that the system's scheduler treats all alike.
    """
    with ExitStack() as stack:
        started = []
        for _ in range(number):
            started.append(stack.enter_context(_spinner()))
        for process in started:
            assert process.stdout is not None
            if not process.stdout.readline():
                raise OSError("a spinning process of --busy ended at once")
        yield [process.pid for process in started]


@contextmanager
def _spinner() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", SPIN],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()
