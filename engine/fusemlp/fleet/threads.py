"""Launches of many models on threads, one a core; all of their work in Python stays in the calling thread.

Threads that worked in Python too would hand its lock to one another at each of NumPy's calls.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue

from fusemlp.callbacks import deferred_interrupt
from fusemlp.runtime.backends import one_thread
from fusemlp_kernels.errors import DivergenceError

# A training yields its launches, and goes on when one has run.
Launch = Callable[[], object]
Training = Generator[Launch, None, None]
Stop = Callable[[], bool]


class LaunchThreads:
    """Runs the launches of trainings on ``workers`` threads, each of them alone.

    One worker is the calling thread.

    ``ended`` is told the number of a training that has ended and how it diverged, or None.
    """

    def __init__(self, workers: int, ended: Callable[[int, DivergenceError | None], None]) -> None:
        # one launch runs in the calling thread while it waits: a thread more than cores would keep its Python waiting
        self._pool = ThreadPoolExecutor(workers - 1, thread_name_prefix="fusemlp") if workers > 1 else None
        self._ready: deque[tuple[int, Training, Launch]] = deque()
        self._ended = ended
        self._done: SimpleQueue[tuple[int, Training, BaseException | None]] = SimpleQueue()
        # trainings to have under way: one launch waits for each thread while another is prepared
        self.most = 2 * workers if workers > 1 else 1
        self.active = 0

    def start(self, number: int, training: Training) -> None:
        """Begin a training."""
        self._advance(number, training, None)

    def wait(self) -> None:
        """Wait until a launch has run, and go on with its training. Raises what went wrong in the launch."""
        if self._done.empty():
            self._run_next()
        number, training, error = self._done.get()
        self.active -= 1
        self._advance(number, training, error)

    def close(self) -> None:
        """Wait for the launches that run, and drop all others."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _advance(self, number: int, training: Training, error: BaseException | None) -> None:
        launch: Launch | None
        outcome: DivergenceError | None = None
        try:
            launch = next(training) if error is None else training.throw(error)
        except StopIteration:
            launch = None
        except DivergenceError as divergence:
            launch, outcome = None, divergence
        if launch is None:
            self._ended(number, outcome)
            return
        self.active += 1
        self._ready.append((number, training, launch))
        if self._pool is not None:
            self._pool.submit(self._run_next)

    def _run_next(self) -> None:
        """Run the launch that has waited longest, if any has."""
        try:
            number, training, launch = self._ready.popleft()
        except IndexError:
            return
        outcome: BaseException | None = None
        try:
            with one_thread():
                launch()
        except BaseException as error:
            outcome = error
        self._done.put((number, training, outcome))
        # an error leads to this frame, and the frame must not lead back
        del outcome


def run_side_by_side(
    trainings: Iterable[tuple[int, Callable[[Stop], Training]]],
    workers: int,
    ended: Callable[[int, DivergenceError | None], None],
    most: int | None = None,
) -> None:
    """Run numbered trainings to their end; each is told how to find out whether it shall stop.

    ``most``: begin this many at once, which take turns; by default with one worker they run one after another. After
    Ctrl-C, or an error, the trainings that have begun stop after their launches, no other begins, and KeyboardInterrupt
    or the error is raised.
    """
    waiting = iter(trainings)
    failed = False

    with deferred_interrupt() as interrupted:

        def stop() -> bool:
            return failed or interrupted()

        def told(number: int, error: DivergenceError | None) -> None:
            # a training that was stopped has not come to its end
            if not stop():
                ended(number, error)

        threads = LaunchThreads(workers, told)
        threads.most = most or threads.most
        try:
            while True:
                while threads.active < threads.most and not stop():
                    following = next(waiting, None)
                    if following is None:
                        break
                    threads.start(following[0], following[1](stop))
                if not threads.active:
                    break
                threads.wait()
        except BaseException:
            failed = True
            while threads.active:
                with suppress(Exception):
                    threads.wait()
            raise
        finally:
            threads.close()
        if interrupted():
            raise KeyboardInterrupt
