"""Models of a fleet on several cards of one machine: a process for each, which sees no card but its own."""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from typing import Any

from joblib.externals.loky import ProcessPoolExecutor

from fusemlp.fleet.elsewhere import MOST_AT_ONCE, TASKS, Task
from fusemlp.fleet.results import Member
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, WorkerError

# The cards that a process sees; the libraries of NVIDIA and of AMD read it when they start.
VARIABLE = "CUDA_VISIBLE_DEVICES"
NAMES = re.compile(r"cuda:(\d+)")


def as_devices(devices: Any) -> tuple[str, ...]:
    """Return the names of distinct cards. Raises ArgumentTypeError or ArgumentError."""
    if not isinstance(devices, list | tuple) or not all(isinstance(one, str) for one in devices):
        raise ArgumentTypeError(f"devices: expected names of cards such as ['cuda:0', 'cuda:1'], got {devices!r}")
    if not devices or len(set(devices)) < len(devices) or not all(map(NAMES.fullmatch, devices)):
        raise ArgumentError(f"devices: expected different cards such as ['cuda:0', 'cuda:1'], got {list(devices)}")
    return tuple(devices)


def check_not_given(**options: Any) -> None:
    """Raise ArgumentError for an option of ``Fleet.fit`` that a fleet with devices does not take."""
    for name, value in options.items():
        if value is not None:
            raise ArgumentError(
                f"{name}: a fleet with devices has a process for each of them; leave out {name} or devices"
            )


def visible(device: str) -> str:
    """Return the value of VARIABLE that leaves a process this card alone."""
    number = device.partition(":")[2]
    seen = [name.strip() for name in os.environ.get(VARIABLE, "").split(",") if name.strip()]
    if seen and int(number) >= len(seen):
        raise ArgumentError(
            f"devices: there is no {device!r} among the {len(seen)} cards of {VARIABLE}={os.environ[VARIABLE]}; "
            "set it to more cards, or name others"
        )
    return seen[int(number)] if seen else number


def trained_on(
    devices: Sequence[str], models: int, task: Task, arrays: Sequence[Any], *, together: bool
) -> Generator[Member, None, None]:
    """Yield each of the ``models`` when it has ended, in any order.

    ``task(numbers, *arrays)`` returns those of some numbers, on the only card of its process; with no numbers it tries
    the card. ``together``: models train in one launch, so that a card takes as many as there are. All cards are tried
    before one trains. Raises WorkerError, which names the card, for an error on one.
    """
    with ExitStack() as stack:
        cards = {}
        for device in devices:
            given = {"env": {VARIABLE: visible(device)}, "initializer": _take, "initargs": (task, arrays)}
            cards[device] = ProcessPoolExecutor(1, **given)
            stack.callback(cards[device].shutdown, kill_workers=True)
        for device, trial in [(device, card.submit(_train, [])) for device, card in cards.items()]:
            _outcome(device, trial)
        parts = max(-(-models // MOST_AT_ONCE), len(cards) * (1 if together else TASKS))
        # every part has some of each shape
        left = [part for start in range(parts) if (part := list(range(models))[start::parts])]
        running: dict[Future[list[Member]], str] = {}
        free = list(cards)
        while left or running:
            while left and free:
                device = free.pop(0)
                running[cards[device].submit(_train, left.pop(0))] = device
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                free.append(running.pop(done))
                yield from _outcome(free[-1], done)


def _outcome(device: str, future: Future[list[Member]]) -> list[Member]:
    try:
        return future.result()
    except Exception as error:
        raise WorkerError(
            f"devices: on {device!r} there was {type(error).__name__}: {error}; mend this, or leave the card out"
        ) from error


# in a card's process: its task, and the arrays of that
_taken: tuple[Task, Sequence[Any]]


def _take(task: Task, arrays: Sequence[Any]) -> None:
    global _taken
    _taken = task, arrays


def _train(numbers: list[int]) -> list[Member]:
    task, arrays = _taken
    return task(numbers, *arrays)
