"""Models of a fleet that other processes train, those of joblib's backends."""

import logging
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from importlib import import_module
from pickle import PicklingError
from typing import Any

from fusemlp.describe.checks import as_kind
from fusemlp.describe.losses import Loss, OwnLoss
from fusemlp.fleet.results import Kept, Member
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.examples import Examples
from fusemlp.runtime.plans import one_thread
from fusemlp.training.trainer import FitPlan
from fusemlp_kernels.errors import ArgumentError, MissingLibraryError, WorkerError, unknown_name

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
    """Raise ArgumentError, MissingLibraryError unless joblib's ``workers`` can train, dask with a client."""
    workers = as_kind("workers", workers, str, "the name of a backend of joblib, such as 'loky'")
    if workers in LIBRARIES:
        try:
            import_module(LIBRARIES[workers])
        except ImportError:
            mend = f"install it with: pip install 'fusemlp[{workers}]'"
            message = f"workers: {workers!r} needs the library {LIBRARIES[workers]}; {mend}"
            raise MissingLibraryError(message) from None
    if workers == "ray":
        from ray.util.joblib import register_ray

        register_ray()
    elif workers == "multiprocessing":
        raise ArgumentError("workers: 'multiprocessing' waits for ever for a process that has died; give 'loky'")
    elif workers not in LIBRARIES:
        from joblib.parallel import BACKENDS

        if workers not in BACKENDS:
            raise unknown_name("workers", workers, sorted({*LIBRARIES, *BACKENDS}))
    if connected and workers == "dask":
        from distributed import get_client

        try:
            get_client()
        except ValueError:
            raise ArgumentError("workers: 'dask' has no client; make one first: Client('tcp://host:8786')") from None


def check_sent(loss: Loss) -> None:
    """Raise ArgumentError for a function as loss that does not go to other processes."""
    if isinstance(loss, OwnLoss) and not loss.pickles:
        raise ArgumentError(
            f"workers: the loss {loss.name!r} does not pickle; define the function at the top of a module, and bind "
            "its parameters by functools.partial"
        )


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


def trained_apart(
    fleet: Any,
    plan: FitPlan,
    data: Examples,
    held: Examples | None,
    *,
    workers: str,
    jobs: int | None,
    **rows: Sequence[Array] | None,
) -> Generator[Member, None, None]:
    """Yield each model of a fleet when it has ended, in any order, trained on ``data`` and validated on ``held``.

    ``workers`` train it, ``jobs`` tasks at once. ``rows``: those of each model.
    """
    first, untrained = fleet.first, copy(fleet)
    # its parts build their own, on the backend that they shall have
    untrained._built, untrained._groups = [], None
    names = ("epochs", "metrics", "early_stopping", "monitor", "drop_last")
    task = partial(_train_part, untrained, {name: getattr(plan, name) for name in names}, rows)
    arrays: list[Array | None] = []
    for examples in (data, held):
        X, targets, weight = (None, None, None) if examples is None else examples.map(first.inputs.on_host)
        arrays += [X, None if targets is None else targets.values, weight]
    return trained_elsewhere(len(fleet), task, arrays, workers=workers, jobs=jobs)


def _train_part(
    whole: Any,
    options: Mapping[str, Any],
    rows: Mapping[str, Sequence[Array] | None],
    numbers: Sequence[int],
    X: Array,
    y: Array,
    weight: Array | None,
    *validation: Array | None,
) -> list[Member]:
    """Train the models of some numbers on one core."""
    fleet = whole.part(numbers)
    of_part = {name: lists and [lists[number] for number in numbers] for name, lists in rows.items()}
    held = None if validation[0] is None else validation
    with one_thread():
        trained = fleet.fit(X, y, sample_weight=weight, validation_data=held, jobs=1, **options, **of_part).members
    members = []
    for member, number, candidate in zip(trained, numbers, fleet.candidates, strict=True):
        kept = member.held if isinstance(member.held, Kept) else Kept.of(member.held, candidate, fleet._machine)
        members.append(replace(member, index=number, held=kept))
    return members


def trained_elsewhere(
    models: int, task: Task, arrays: Sequence[Any], *, workers: str, jobs: int | None
) -> Generator[Member, None, None]:
    """Yield each of the ``models`` when it has ended, in any order.

    ``task(numbers, *arrays)`` returns those of some numbers; it goes to the workers by pickle, and the arrays once to
    each. ``jobs``: the most tasks at once; None for as many as there are workers. The tasks of a worker that has died
    run again; WorkerError is raised when this happens more than ``LOST`` times without a model that has ended between.
    An error that ``task`` raises is raised here.
    """
    from joblib import effective_n_jobs, parallel_config

    left, lost, failure = set(range(models)), 0, None
    with parallel_config(backend=workers):
        at_once = effective_n_jobs(-1 if jobs is None else jobs)
        arrays = [None if array is None else _Stored(array) for array in arrays] if workers == "ray" else arrays
        size = max(1, min(MOST_AT_ONCE, -(-models // (TASKS * at_once))))
        while left and failure is None:
            before = len(left)
            try:
                with closing(_outcomes(task, arrays, _cut(sorted(left), size), at_once)) as outcomes:
                    for outcome in outcomes:
                        if isinstance(outcome, Exception):
                            failure = outcome
                            break
                        left -= {member.index for member in outcome}
                        yield from outcome
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
    if failure is not None:
        raise failure


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
    from joblib.parallel import Parallel, delayed, get_active_backend

    if not get_active_backend()[0].supports_return_generator:
        # the outcomes arrive with the last of a round
        for some in _cut(tasks, at_once):
            yield from Parallel(at_once)(delayed(_caught)(task, part, *arrays) for part in some)
        return
    parallel = Parallel(at_once, return_as="generator_unordered", pre_dispatch=2 * at_once)
    running = parallel(delayed(_caught)(task, part, *arrays) for part in tasks)
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
        return task(numbers, *(array.get() if isinstance(array, _Stored) else array for array in arrays))
    except Exception as error:
        return error
