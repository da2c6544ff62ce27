"""A team of threads that shares the tasks of a launch.

A launch goes through phases. The tasks of a phase do not depend on one another, and a task computes the same in every
thread. So the results have the same bits for any number of threads. A thread that the operating system stops holds
the others up for the one task that it has begun.

A task is claimed from the ticket: the number of the phase, and how many of its tasks are left. The thread that ends the
last task of a phase opens the next. A thread that finds no task waits for a moment, then sleeps.

``words`` is the address of an int64 array, in which each word that is written often has a cache line to itself.
``team.py`` beside this package makes the array and the threads.
"""

from __future__ import annotations

import ctypes
from typing import Any

from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.atomics import add, load, pause, sleep, store, swap_if, wake
from fusemlp_kernels.numpy.compiled.denormals import AS_ZERO, read_control, write_control
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.views import call

# Offsets in bytes. The ticket; tasks that have ended; how many threads sleep; those of the launch: its function and
# argument, the tasks of this phase, how many members take part, whether it runs, and how long a thread spins. Then for
# each member whether it sleeps, and its lock.
_LINE = 128
TICKET, DONE, SLEEPING, WORK, MEMBER = (_LINE * line for line in range(5))
JOB, TASKS, MEMBERS, RUNNING, SPINS = (WORK + 8 * word for word in range(1, 6))
ASLEEP, LOCK, MEMBER_BYTES = 0, 8, _LINE
# A ticket: the phase above, the tasks that are left below.
TASK_BITS = 20
LEFT = (1 << TASK_BITS) - 1
# The task that opens the next phase: it returns the number of tasks in it, 0 at the end.
OPEN = -1


def alone(work: int, job: int) -> None:
    """Do all tasks of a launch in this thread."""
    before = read_control()
    write_control(before | AS_ZERO)
    tasks = call(work, job, OPEN)
    while tasks:
        for task in range(tasks):
            call(work, job, task)
        tasks = call(work, job, OPEN)
    write_control(before)


@register_jitable(**EXACT)
def _rouse(words: int, most: int) -> None:
    """Wake up to ``most`` members that sleep."""
    if load(words + SLEEPING) <= 0:
        return
    for member in range(load(words + MEMBERS)):
        if most <= 0:
            return
        at = words + MEMBER + MEMBER_BYTES * member
        if load(at + ASLEEP) and swap_if(at + ASLEEP, 1, 0):
            add(words + SLEEPING, -1)
            wake(load(at + LOCK))
            most -= 1


@register_jitable(**EXACT)
def _open(words: int) -> None:
    """Open the next phase, or end the launch. No other thread writes the ticket now: no task is left or under way."""
    tasks = call(load(words + WORK), load(words + JOB), OPEN)
    phase = (load(words + TICKET) >> TASK_BITS) + 1
    store(words + DONE, 0)
    store(words + TASKS, tasks)
    store(words + TICKET, phase << TASK_BITS | tasks)
    if tasks:
        _rouse(words, tasks - 1)
    else:
        # the last write: the leader may begin another launch
        store(words + RUNNING, 0)
        at = words + MEMBER
        if load(at + ASLEEP) and swap_if(at + ASLEEP, 1, 0):
            add(words + SLEEPING, -1)
            wake(load(at + LOCK))


@register_jitable(**EXACT)
def _goes_on(words: int, me: int) -> bool:
    return me != 0 or load(words + RUNNING) != 0


@register_jitable(**EXACT)
def _wait(words: int, me: int, ticket: int) -> None:
    """Return when the ticket is another, or the launch has ended."""
    for _ in range(load(words + SPINS)):
        if load(words + TICKET) != ticket or not _goes_on(words, me):
            return
        pause()
    at = words + MEMBER + MEMBER_BYTES * me
    store(at + ASLEEP, 1)
    add(words + SLEEPING, 1)
    if (load(words + TICKET) != ticket or not _goes_on(words, me)) and swap_if(at + ASLEEP, 1, 0):
        add(words + SLEEPING, -1)
        return
    sleep(load(at + LOCK), 1)


def serve(words: int, me: int, work: int, job: int, members: int) -> None:
    """As member 0 lead a launch of ``members`` threads to its end; as another one help with all launches, for ever."""
    before = read_control()
    write_control(before | AS_ZERO)
    if me == 0:
        store(words + WORK, work)
        store(words + JOB, job)
        store(words + MEMBERS, members)
        store(words + RUNNING, 1)
        _open(words)
    while _goes_on(words, me):
        ticket = load(words + TICKET)
        left = ticket & LEFT
        if left == 0 or me >= load(words + MEMBERS):
            _wait(words, me, ticket)
        elif swap_if(words + TICKET, ticket, ticket - 1):
            tasks = load(words + TASKS)
            call(load(words + WORK), load(words + JOB), tasks - left)
            if add(words + DONE, 1) + 1 == tasks:
                _open(words)
    write_control(before)


def functions() -> Any:
    """``alone`` and ``serve``, compiled or read from the disk."""
    from fusemlp_kernels.numpy.compiled.cache import kept

    return kept(alone), kept(serve)


def new_lock() -> int:
    """A lock that is taken, to sleep on."""
    ctypes.pythonapi.PyThread_allocate_lock.restype = ctypes.c_void_p
    lock: int = ctypes.pythonapi.PyThread_allocate_lock()
    ctypes.pythonapi.PyThread_acquire_lock(ctypes.c_void_p(lock), 1)
    return lock
