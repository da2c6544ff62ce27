"""Worlds of processes that train together, as torchrun starts them, without its launcher.

A server, which has imported torch and compiled the loops once, forks the ranks of all worlds.
"""

import ast
import contextlib
import functools
import multiprocessing
import os
import socket
import sys
import warnings
from collections import namedtuple
from pathlib import Path
from unittest import mock

import numpy as np

from fusemlp.runtime.ranks import VARIABLES

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PATHS = os.pathsep.join(map(str, (ROOT / "engine", ROOT / "kernels", HERE, HERE.parent / "kernels")))
# No world in these tests takes longer; one that hangs is killed then.
LIMIT = 240
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "FUSEMLP_NUM_THREADS": "1"}


@contextlib.contextmanager
def held_port():
    """Yield the number of a port that is in use meanwhile."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        yield int(held.getsockname()[1])


def free_port():
    with held_port() as port:
        return port


def as_rank(monkeypatch, rank=0, world=1, port=1):
    """Let this process be one of a world, as torchrun starts it."""
    for name, value in zip(VARIABLES, (rank, world, "127.0.0.1", port), strict=True):
        monkeypatch.setenv(name, str(value))


@functools.cache
def _context():
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        from multiprocessing import forkserver

        context.set_forkserver_preload(["preloaded"])
        with mock.patch.dict(os.environ, {"PYTHONPATH": PATHS, **ONE_THREAD}):
            forkserver.ensure_running()
    return context


class Rank(namedtuple("Rank", "process log")):
    """A process of a world, and the file with its output."""

    def ended(self, limit=LIMIT):
        """Return the exit code and the output; TimeoutError after ``limit`` seconds, with the process killed."""
        self.process.join(limit)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"after {limit} s: {self.log.read_text(encoding='utf-8')}")
        # on a busy machine the others may come late
        lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
        return self.process.exitcode, "".join(line for line in lines if " waits up to " not in line)


def start(count, folder, run, *arguments):
    """Start the ranks of a world, each of which calls ``run``; their output goes into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    port, ranks = free_port(), []
    for rank in range(count):
        variables = dict(zip(VARIABLES, (str(rank), str(count), "127.0.0.1", str(port)), strict=True))
        log = folder / f"rank{rank}.log"
        process = _context().Process(target=_rank, args=(variables, log, run, arguments), daemon=True)
        process.start()
        ranks.append(Rank(process, log))
    return ranks


def _rank(variables, log, run, arguments):
    os.environ.update({**variables, **ONE_THREAD})
    with log.open("w", encoding="utf-8") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    warnings.simplefilter("error")
    try:
        run(*arguments)
    finally:
        from torch import distributed

        # multiprocessing does not call what is registered for the end
        if distributed.is_initialized():
            distributed.destroy_process_group()


def run(count, folder, function, *arguments):
    """Return the output of each rank of a world in which nothing goes wrong."""
    found = [rank.ended() for rank in start(count, folder, function, *arguments)]
    assert [code for code, _ in found] == [0] * count, "\n".join(text for _, text in found)
    return [text for _, text in found]


class Worlds:
    """The results of worlds of several sizes, each of which has run ``main`` once, with its folder as last argument."""

    def __init__(self, folder, counts, main, *arguments):
        self.folder = folder
        paths = {count: folder / str(count) for count in counts}
        self.outputs = {count: run(count, path, main, *arguments, path) for count, path in paths.items()}

    def of(self, count, name):
        """Return the arrays of a training by a world of ``count`` ranks."""
        with np.load(self.folder / str(count) / f"{name}.npz") as arrays:
            return dict(arrays)

    def said(self, count, name):
        """Return an entry of what each rank has printed."""
        return [ast.literal_eval(out)[name] for out in self.outputs[count]]

    def assert_close(self, count, name, alone, **tolerances):
        """Compare a world's training with that of one process."""
        together = self.of(count, name)
        assert alone.keys() == together.keys()
        for key, array in alone.items():
            np.testing.assert_allclose(together[key], array, **tolerances, err_msg=key)
