"""The threads that share the tasks of a launch.

A process has one team. A launch takes it if it is free; otherwise, and in ``cores.one_thread``, it runs on the thread
that asks for it, with the same results. The threads are started when they are first needed, and sleep between launches.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from importlib import import_module
from typing import Any

import numpy as np

from fusemlp_kernels.numpy.cores import threads

# A thread looks this often for the next task before it sleeps: 10 to 25 microseconds on processors since 2016.
SPINS = 500


@functools.cache
def _functions() -> Any:
    return import_module("fusemlp_kernels.numpy.compiled.team").functions()


class _Team:
    """Up to ``most`` threads; the one that begins a launch leads it."""

    def __init__(self, most: int) -> None:
        layout = import_module("fusemlp_kernels.numpy.compiled.team")
        self.most = most
        self.free = threading.Lock()
        size = layout.MEMBER + layout.MEMBER_BYTES * most
        memory = np.zeros(size // 8 + layout.MEMBER_BYTES, np.int64)
        # the threads look at it until the process ends, after the interpreter has released all else
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
        start = -memory.ctypes.data % layout.MEMBER_BYTES // 8
        self._words = memory[start : start + size // 8]
        self._address = self._words.ctypes.data
        self._threads = 1
        for member in range(most):
            self._words[(layout.MEMBER + layout.MEMBER_BYTES * member + layout.LOCK) // 8] = layout.new_lock()
        self._words[layout.SPINS // 8] = SPINS

    def lead(self, members: int, work: int, job: int) -> None:
        """Run a launch with up to ``members`` threads."""
        _, serve = _functions()
        while self._threads < members:
            target = functools.partial(serve, self._address, self._threads, 0, 0, 0)
            threading.Thread(target=target, name=f"fusemlp-{self._threads}", daemon=True).start()
            self._threads += 1
        serve(self._address, 0, work, job, members)


_team: _Team | None = None
_making = threading.Lock()


def _the_team(members: int) -> _Team:
    """The team of this process, with room for this many."""
    global _team
    with _making:
        if _team is None or _team.most < members:
            _team = _Team(max(members, os.cpu_count() or 1))
        return _team


def _forget() -> None:
    """A forked process has none of the threads, and perhaps a lock that is taken for ever."""
    global _team, _making
    _team, _making = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def launch(work: int, job: int, tasks: int) -> None:
    """Run a launch whose phases have up to ``tasks`` tasks: the address of its function, and of what it works on."""
    members = 1 if tasks == 1 else min(tasks, threads())
    if members > 1:
        team = _the_team(members)
        if team.free.acquire(blocking=False):
            try:
                team.lead(members, work, job)
            finally:
                team.free.release()
            return
    _functions()[0](work, job)
