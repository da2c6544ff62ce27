"""Worlds of processes that train together, as torchrun starts them, without its launcher."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATHS = os.pathsep.join([str(ROOT / "engine"), str(ROOT / "kernels"), str(HERE)])
# No world in these tests takes longer; one that hangs is killed then.
LIMIT = 240


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """Yield the number of a port that is in use meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield int(held.getsockname()[1])


def free_port() -> int:
    with held_port() as port:
        return port


def start(
    count: int, *arguments: object, port: int | None = None, script: str = "cases.py"
) -> list[subprocess.Popen[str]]:
    """Start the ranks of a world that runs a script beside this file."""
    common = {
        **os.environ,
        "PYTHONPATH": PATHS,
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port or free_port()),
        "WORLD_SIZE": str(count),
    }
    command = [sys.executable, "-W", "error", str(HERE / script), *map(str, arguments)]
    return [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for rank in range(count)
    ]


def ended(ranks: list[subprocess.Popen[str]], limit: float = LIMIT) -> list[tuple[int, str, str]]:
    """Return the exit code, output and errors of each rank; raises TimeoutExpired, with all of them killed, after
    ``limit`` seconds."""
    try:
        found = []
        for rank in ranks:
            out, errors = rank.communicate(timeout=limit)
            found.append((rank.returncode, out, errors))
        return found
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def run(count: int, *arguments: object) -> list[str]:
    """Return the output of each rank of a world in which nothing goes wrong."""
    found = ended(start(count, *arguments))
    assert [code for code, _, _ in found] == [0] * count, "\n".join(errors for _, _, errors in found)
    return [out for _, out, _ in found]
