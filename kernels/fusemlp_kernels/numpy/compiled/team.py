"""A team of threads that shares the tasks of a launch.

A launch goes through phases. The tasks of a phase do not depend on one another, and a task computes the same in every
thread. So the results have the same bits for any number of threads. A thread that the operating system stops holds
the others up for the one task that it has begun.

A task is claimed from the ticket: the number of the phase, and how many of its tasks are left. The thread that ends the
last task of a phase opens the next. A thread that finds no task waits for a moment, then sleeps. Every atomic operation
is sequentially consistent. The locks are those of the interpreter (``PyThread_acquire_lock``), which exist on every
platform and may be taken and released without holding its global lock.

``words`` is the address of an int64 array, in which each word that is written often has a cache line to itself.
``launches.py`` beside this package makes the array and the threads.

Numbers below the smallest normal one count as zero while the loop runs. An optimizer shrinks some values step by step,
such as the weight of a feature that is always zero. They end as denormal numbers, with which x86 processors compute
many times more slowly. The loss is below 1e-37 in float32. The control register of a thread's vector unit (MXCSR) has a
bit for results that become zero and one for operands that count as zero (Intel 64 and IA-32 Architectures Software
Developer's Manual, volume 1, section 10.2.3); a BLAS with one thread computes in the same thread. Other processors keep
their denormal numbers.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

import llvmlite.binding
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import register_jitable

from fusemlp_kernels.numpy.compiled.compiler import EXACT, X86, call_function, emits, instruction, kept

_WORD, _CONTROL, _ORDER, _BYTES = ir.IntType(64), ir.IntType(32), "seq_cst", 8
_ARM = platform.machine().lower() in ("arm64", "aarch64")
# The bits of the control register for: flush to zero, denormals are zero
AS_ZERO = (1 << 15) | (1 << 6)


def _at(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, _WORD.as_pointer())


@emits(types.intp, types.intp)
def load(builder: Any, address: Any) -> Any:
    """The word at an address."""
    return builder.load_atomic(_at(builder, address), _ORDER, _BYTES)


@emits(types.void, types.intp, types.intp)
def store(builder: Any, address: Any, value: Any) -> None:
    """Write a word."""
    builder.store_atomic(value, _at(builder, address), _ORDER, _BYTES)


@emits(types.intp, types.intp, types.intp)
def add(builder: Any, address: Any, value: Any) -> Any:
    """Add to a word; its value before."""
    return builder.atomic_rmw("add", _at(builder, address), value, _ORDER)


@emits(types.boolean, types.intp, types.intp, types.intp)
def swap_if(builder: Any, address: Any, expected: Any, value: Any) -> Any:
    """Write a word if it is still the expected one; whether it was."""
    return builder.extract_value(builder.cmpxchg(_at(builder, address), expected, value, _ORDER, _ORDER), 1)


@emits(types.void)
def pause(builder: Any) -> None:
    """Tell the processor that the thread waits."""
    if X86:
        instruction(builder, "x86.sse2.pause", ir.VoidType())
    elif _ARM:
        instruction(builder, "aarch64.hint", ir.VoidType(), ir.IntType(32)(1))


for _name in ("PyThread_acquire_lock", "PyThread_release_lock"):
    _routine = ctypes.cast(getattr(ctypes.pythonapi, _name), ctypes.c_void_p).value
    llvmlite.binding.add_symbol(f"fusemlp_{_name}", _routine)
# sleep(lock, 1) until wake(lock)
sleep: Any = types.ExternalFunction("fusemlp_PyThread_acquire_lock", types.intc(types.intp, types.intc))
wake: Any = types.ExternalFunction("fusemlp_PyThread_release_lock", types.void(types.intp))


def _of_register(builder: Any, name: str, slot: Any) -> None:
    """Store the control register to memory, or load it."""
    instruction(builder, f"x86.sse.{name}", ir.VoidType(), builder.bitcast(slot, ir.IntType(8).as_pointer()))


@emits(types.uint32)
def read_control(builder: Any) -> Any:
    """The control register; 0 where there is none."""
    if not X86:
        return _CONTROL(0)
    slot = cgutils.alloca_once(builder, _CONTROL)
    _of_register(builder, "stmxcsr", slot)
    return builder.load(slot)


@emits(types.void, types.uint32)
def write_control(builder: Any, value: Any) -> None:
    """Set the control register."""
    if X86:
        _of_register(builder, "ldmxcsr", cgutils.alloca_once_value(builder, value))


# Offsets in bytes. The ticket; tasks that have ended; how many threads sleep; those of the launch: its function and
# argument, the tasks of this phase, how many members take part, whether it runs, and how long a thread spins. Then for
# each member whether it sleeps, its lock, and the memory of its thread.
_LINE = 128
TICKET, DONE, SLEEPING, WORK, MEMBER = (_LINE * line for line in range(5))
JOB, TASKS, MEMBERS, RUNNING, SPINS = (WORK + 8 * word for word in range(1, 6))
ASLEEP, LOCK, ROOM, MEMBER_BYTES = 0, 8, 16, _LINE
# A ticket: the phase above, the tasks that are left below.
TASK_BITS = 20
LEFT = (1 << TASK_BITS) - 1
# The task that opens the next phase: it returns the number of tasks in it, 0 at the end.
OPEN = -1


@kept
def alone(work: int, job: int, room: int) -> None:
    """Do all tasks of a launch in this thread, whose memory is at ``room``."""
    before = read_control()
    write_control(before | AS_ZERO)
    tasks = call_function(work, job, OPEN, room)
    while tasks:
        for task in range(tasks):
            call_function(work, job, task, room)
        tasks = call_function(work, job, OPEN, room)
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
    tasks = call_function(load(words + WORK), load(words + JOB), OPEN, 0)
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


@kept
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
            room = load(words + MEMBER + MEMBER_BYTES * me + ROOM)
            call_function(load(words + WORK), load(words + JOB), tasks - left, room)
            if add(words + DONE, 1) + 1 == tasks:
                _open(words)
    write_control(before)


def new_lock() -> int:
    """A lock that is taken, to sleep on."""
    ctypes.pythonapi.PyThread_allocate_lock.restype = ctypes.c_void_p
    lock: int = ctypes.pythonapi.PyThread_allocate_lock()
    ctypes.pythonapi.PyThread_acquire_lock(ctypes.c_void_p(lock), 1)
    return lock
