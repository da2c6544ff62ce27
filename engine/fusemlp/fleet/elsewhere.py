"""Models of a fleet trained by other processes or machines, through the backends of joblib."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import import_module
from pickle import PicklingError
from typing import Any

import joblib

from fusemlp.fleet.results import Member
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, MissingLibraryError, WorkerError, unknown_name

_log = logging.getLogger("fusemlp")

# The libraries whose backends joblib does not know before it is told, and what tells it.
LIBRARIES = {"dask": "distributed", "ray": "ray"}
# Tasks for each worker, so that a fast one takes more of them. A task has no more models than a launch.
TASKS, MOST_AT_ONCE = 4, 256
# More losses of workers in a row, without a model that ends between them, end the training.
LOST = 3

# Trains the models of some numbers on the arrays.
Task = Callable[..., list[Member]]


def check_workers(workers: object, *, connected: bool = True) -> None:
    """Raise ArgumentError unless ``workers`` names a backend of joblib that can train, MissingLibraryError without its
    library.

    ``connected``: dask has its client.
    """
    if not isinstance(workers, str):
        raise ArgumentTypeError(f"workers: expected the name of a backend of joblib, such as 'loky', got {workers!r}")
    if workers in LIBRARIES:
        try:
            import_module(LIBRARIES[workers])
        except ImportError:
            raise MissingLibraryError(
                f"workers: {workers!r} needs the library {LIBRARIES[workers]}; install it with: pip install "
                f"'fusemlp[{workers}]'"
            ) from None
    if workers == "ray":
        from ray.util.joblib import register_ray

        register_ray()
    elif workers == "multiprocessing":
        raise ArgumentError("workers: 'multiprocessing' waits for ever for a process that has died; give 'loky'")
    elif workers not in LIBRARIES and workers not in joblib.parallel.BACKENDS:
        raise unknown_name("workers", workers, sorted({*LIBRARIES, *joblib.parallel.BACKENDS}))
    if connected and workers == "dask":
        from distributed import get_client

        try:
            get_client()
        except ValueError:
            raise ArgumentError(
                "workers: 'dask' has no client here; make one first: Client('tcp://host:8786')"
            ) from None


def check_address(workers: str | None, address: str | None) -> None:
    """Raise ArgumentError for an address of workers that have none."""
    if address is not None and workers not in LIBRARIES:
        raise ArgumentError(f"address: only dask and ray have one, and workers is {workers!r}; leave it out")


@contextmanager
def connected(workers: str | None, address: str | None) -> Iterator[None]:
    """Be connected to the scheduler of dask or ray at an address; None is new workers here, one a core."""
    if workers == "dask":
        from distributed import Client

        here = {} if address is not None else {"threads_per_worker": 1, "dashboard_address": None}
        try:
            client = Client(address, **here)
        except (OSError, ValueError) as error:
            raise ArgumentError(f"address: no scheduler of dask answers at {address!r} ({error})") from error
        with client:
            yield
    elif workers == "ray":
        import ray

        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, ValueError) as error:
            raise ArgumentError(f"address: no ray answers at {address!r} ({error})") from error
        try:
            yield
        finally:
            ray.shutdown()
    else:
        yield


def trained_elsewhere(
    models: int, task: Task, arrays: Sequence[Any], *, workers: str, jobs: int | None
) -> Generator[Member, None, None]:
    """Yield each of the ``models`` when it has ended, in any order.

    ``task(numbers, *arrays)`` returns those of some numbers; it goes to the workers by pickle, and the arrays once to
    each. ``jobs``: the most tasks at once; None for as many as there are workers. The tasks of a worker that has died
    run again; WorkerError is raised when this happens more than ``LOST`` times without a model that has ended between.
    An error that ``task`` raises is raised here.
    """
    left, lost = set(range(models)), 0
    with joblib.parallel_config(backend=workers):
        at_once = joblib.effective_n_jobs(-1 if jobs is None else jobs)
        if workers == "ray":
            arrays = [None if one is None else _Stored(one) for one in arrays]
        size = max(1, min(MOST_AT_ONCE, -(-models // (TASKS * at_once))))
        while left:
            before = len(left)
            try:
                with closing(_outcomes(task, arrays, _cut(sorted(left), size), at_once)) as outcomes:
                    for found in outcomes:
                        if isinstance(found, Exception):
                            raise _Raised(found)
                        left -= {member.index for member in found}
                        yield from found
            except _Raised as error:
                raise error.args[0] from None
            except (ImportError, PicklingError, TypeError):
                # what cannot be sent, or not be read there
                raise
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
                lost = 0 if len(left) < before else lost + 1
                if lost > LOST:
                    raise WorkerError(
                        f"workers: workers of {workers!r} were lost {lost} times, with {len(left)} models left, the "
                        f"last by {reason}; look at their memory and their logs, or give fewer jobs"
                    ) from error
                _log.warning("fleet: a worker was lost (%s); its models are trained again", reason)


class _Raised(BaseException):
    """Carries what a task has raised past the errors of lost workers."""


class _Stored:
    """An array in the store of ray, which each of its machines fetches once."""

    def __init__(self, array: Array) -> None:
        import ray

        self.reference = ray.put(array)

    def get(self) -> Any:
        import ray

        return ray.get(self.reference)


def _outcomes(
    task: Task, arrays: Sequence[Any], tasks: list[list[int]], at_once: int
) -> Generator[list[Member] | Exception, None, None]:
    if not joblib.parallel.get_active_backend()[0].supports_return_generator:
        # the outcomes arrive with the last of a round
        for some in _cut(tasks, at_once):
            yield from joblib.Parallel(at_once)(joblib.delayed(_caught)(task, one, *arrays) for one in some)
        return
    parallel = joblib.Parallel(at_once, return_as="generator_unordered", pre_dispatch=2 * at_once)
    running = parallel(joblib.delayed(_caught)(task, one, *arrays) for one in tasks)
    try:
        # not yield from, which would close it first
        for outcome in running:  # noqa: UP028
            yield outcome
    finally:
        with warnings.catch_warnings():
            # of tasks that an early end leaves
            warnings.simplefilter("ignore")
            running.close()


def _cut(values: Sequence[Any], size: int) -> list[list[Any]]:
    return [list(values[start : start + size]) for start in range(0, len(values), size)]


def _caught(task: Task, numbers: list[int], *arrays: Any) -> list[Member] | Exception:
    try:
        return task(numbers, *(one.get() if isinstance(one, _Stored) else one for one in arrays))
    except Exception as error:
        return error
