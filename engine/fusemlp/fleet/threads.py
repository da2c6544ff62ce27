"""Launches of many models on threads, one a core; all of their work in Python stays in the calling thread.

Threads that worked in Python too would hand its lock to one another at each of NumPy's calls.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from queue import SimpleQueue
from typing import Any

from fusemlp.callbacks import deferred_interrupt
from fusemlp.runtime.backends import one_blas_thread
from fusemlp_kernels.errors import DivergenceError

# A training is told how to find out whether it shall stop, and yields its launches. It goes on when one has run.
Stop = Callable[[], bool]
Launch = Callable[[], object]
Training = Callable[[Stop], Iterator[Launch]]


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_side_by_side(
    trainings: Iterable[tuple[int, Training]], workers: int, ended: Callable[[int, DivergenceError | None], None]
) -> None:
    """Run the launches of numbered trainings on ``workers`` threads, BLAS on one thread in each.

    With one worker they run in the calling thread, one training after another. When a training has ended, ``ended`` is
    told its number and how it diverged, or None. After Ctrl-C, or an error, the trainings that have begun stop after
    their launches, no other begins, and KeyboardInterrupt or the error is raised.
    """
    waiting = iter(trainings)
    done: SimpleQueue[tuple[int, Iterator[Launch], BaseException | None]] = SimpleQueue()
    failed = False
    # a launch is ready for each thread while another is prepared
    active, most = 0, 1 if workers == 1 else 2 * workers

    def run(index: int, training: Iterator[Launch], launch: Launch) -> None:
        outcome: BaseException | None = None
        try:
            with one_blas_thread():
                launch()
        except BaseException as error:
            outcome = error
        done.put((index, training, outcome))
        # an error leads to this frame, and the frame must not lead back
        del outcome

    def advance(index: int, training: Iterator[Launch]) -> bool:
        """Start the next launch; False where there is none."""
        outcome: DivergenceError | None = None
        try:
            launch = next(training, None)
        except DivergenceError as error:
            launch, outcome = None, error
        if launch is not None:
            start(run, index, training, launch)
            return True
        if not failed:
            ended(index, outcome)
        return False

    with ExitStack() as stack:
        interrupted = stack.enter_context(deferred_interrupt())
        start: Callable[..., Any] = lambda work, *arguments: work(*arguments)  # noqa: E731
        if workers > 1:
            start = stack.enter_context(ThreadPoolExecutor(workers, thread_name_prefix="fusemlp")).submit

        def stop() -> bool:
            return failed or interrupted()

        try:
            while True:
                while active < most and not stop():
                    following = next(waiting, None)
                    if following is None:
                        break
                    active += advance(following[0], following[1](stop))
                if not active:
                    break
                index, training, error = done.get()
                active -= 1
                if error is not None:
                    raise error
                active += advance(index, training)
        except BaseException:
            failed = True
            while active:
                index, training, error = done.get()
                active -= 1
                if error is None:
                    with suppress(Exception):
                        active += advance(index, training)
            raise
        if interrupted():
            raise KeyboardInterrupt
