"""Models that tasks on threads of their own are training: in turn, and where one launch trains many, gathered.

A search's tasks are scikit-learn's: each splits, fits and scores by itself. They take turns: only one computes in
Python at a time, and leaves its turn to another while its model is trained on a core of its own. (Without turns they
would snatch Python's lock from one another at each of NumPy's calls.)

Where one launch trains many models, a task that has a model ready leaves its turn too; when all have, those of one
shape become a group, and a launch trains what steps all models of the group are waiting for. A task that is done makes
room for the next, whose model waits until no group trains any more.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import joblib
import numpy as np

from fusemlp.engine import Engine
from fusemlp.fleet.launches import Group, Places, bind_fleet, fleet_rows, kin
from fusemlp.program.lowering import Inputs
from fusemlp.program.program import Program
from fusemlp.runtime.plans import fleet_chunk
from fusemlp.training.loop import GROUP_ROWS
from fusemlp_kernels.contract import LossSpec, Ridge, UpdateRule, step_flops

Array = np.ndarray[Any, Any]

_current: ContextVar[Gathering | None] = ContextVar("gathering", default=None)


def gathering() -> Gathering | None:
    """That of the task which this thread is at."""
    return _current.get()


@dataclass(eq=False)
class Seat:
    """A model in a launch: in place of a bound program, whose steps the launch of the group runs."""

    engine: Engine
    spec: LossSpec
    rule: UpdateRule
    ridge: Ridge
    batch: int
    data: Mapping[str, Array]
    at_once: int
    chunk: int = 1
    arrays: dict[str, Any] = field(default_factory=dict)
    party: _Party | None = None
    error: Exception | None = None
    number: int = 0
    wanted: int = 0
    gathering: Gathering | None = None
    _first: int = 0
    _places: Places | None = None

    def kin(self) -> tuple[Any, ...]:
        """What models have in common that can train in one launch."""
        spec, engine = self.spec, self.engine
        shapes = tuple((name, array.shape[1:], array.dtype.str) for name, array in sorted(self.data.items()))
        own = (self.batch, spec.kind, spec.soft, spec.ignore_index, spec.reduction, engine.precision, shapes)
        return kin(engine), *own

    @property
    def rows(self) -> int:
        """Rows of the data."""
        return len(self.data["x"])

    def placed(self, places: Places, first: int) -> None:
        """The model is number so many of its group; its data begins at row ``first`` of what the group has."""
        self._places, self._first = places, first
        self.arrays, self.chunk = places.arrays, places.chunk

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """See ``BoundProgram.set_rows``."""
        assert self._places is not None
        self._places.set_rows(order + self._first, first_batch, size, epochs)

    def run_many(self, count: int) -> None:
        """Wait until the group's launch has trained so many steps, or nobody wants them any more."""
        assert self.party is not None and self.gathering is not None
        self.party.run(self, count, self.gathering)

    def close(self) -> None:
        """The model has ended; the others of its group do not wait for it."""
        if self.gathering is not None:
            self.gathering.leave(self)


class _Party:
    """A group, its launch, and who is waiting for it."""

    def __init__(self, seats: Sequence[Seat], turn: threading.Condition) -> None:
        self.turn = turn
        self.live = list(seats)
        self._models = len(seats)
        group = Group([seat.engine for seat in seats])
        for seat in seats:
            seat.at_once = max(1, min(seat.at_once, GROUP_ROWS // (len(seats) * seat.rows)))
        backend, first = seats[0].engine.memory.backend, seats[0]
        data, begins = _joined([seat.data for seat in seats])
        at_once = [seat.at_once for seat in seats]
        rows, history = fleet_rows(group, first.batch, [seat.rows for seat in seats], at_once)
        chunk = fleet_chunk(backend.traits, step_flops(first.engine.network.sizes, first.batch), len(seats))
        inputs = Inputs(len(data["x"]), indexed=True, weighted="weight" in data)
        programs: list[Program] = []
        for number, seat in enumerate(seats):
            own = None if history is None else history[number]
            seat.placed(Places(seat.engine.memory, rows[number], own, chunk), begins[number])
            seat.number = number
            batches = -(-seat.rows // seat.batch)
            programs.append(
                seat.engine.resident_program(
                    inputs, seat.spec, seat.rule, seat.batch, batches, epochs=seat.at_once, ridge=seat.ridge
                )
            )
        # kept: a launch may know no more than where they lie
        self._data = {
            name: backend.from_host(array, "compute" if name == "x" else None) for name, array in data.items()
        }
        self._launch = bind_fleet(group, programs, self._data, rows, history)
        for seat in seats:
            seat.party = self

    def run(self, seat: Seat, count: int, gathering: Gathering) -> None:
        """Wait for ``count`` steps; called in turn, by each of those that are left."""
        seat.wanted = count
        self.advance()
        self.turn.wait_for(lambda: not seat.wanted or gathering.given_up)
        if seat.error is not None:
            raise seat.error

    def advance(self) -> None:
        """Launch, if all that are left are waiting for it."""
        if not self.live or not all(seat.wanted for seat in self.live):
            return
        steps = [0] * self._models
        for seat in self.live:
            steps[seat.number] = seat.wanted
        try:
            self._launch(steps)
        except Exception as error:
            for seat in self.live:
                seat.error = error
        for seat in self.live:
            seat.wanted = 0
        self.turn.notify_all()


class Gathering:
    """The tasks of one search, on ``threads`` threads."""

    def __init__(self) -> None:
        self.threads = 1
        # held by the task that runs
        self._turn = threading.Condition()
        self._count = threading.Lock()
        self._cores = threading.BoundedSemaphore(joblib.cpu_count())
        self._handing_out, self.given_up = True, False
        # tasks that were handed out and are not done, and what some of them wait for that another one is at
        self._tasks = 0
        self._awaited: list[Future[Any]] = []
        self._ready: list[Seat] = []
        self._parties: list[_Party] = []

    def hand_out(self) -> None:
        """A task was given to a thread, which may not have begun with it."""
        # not in turn: who hands out tasks must not wait for one
        with self._count:
            self._tasks += 1

    @property
    def tasks(self) -> int:
        """How many there are at once."""
        return min(self._tasks, self.threads)

    def all_handed_out(self) -> None:
        """As many tasks as there are threads were handed out; from now on one follows another."""
        self._later(self._follow)

    def _follow(self) -> None:
        self._handing_out = False
        self._form()

    @contextmanager
    def task(self) -> Iterator[None]:
        """While a thread is at a task."""
        with self._turn:
            self._raise_if_given_up()
            token = _current.set(self)
            try:
                yield
            finally:
                _current.reset(token)
                with self._count:
                    self._tasks -= 1
                self._form()

    def give_up(self) -> None:
        """Nobody waits for the tasks any more; those that were not begun never will be."""
        self.given_up = True
        if self._tasks:
            self._later(self._turn.notify_all)

    def _later(self, do: Callable[[], None]) -> None:
        """In turn, which whoever hands out tasks does not wait for: Ctrl-C must not come in the middle of one."""

        def work() -> None:
            with self._turn:
                do()

        threading.Thread(target=work, name="fusemlp search", daemon=True).start()

    def _raise_if_given_up(self) -> None:
        if self.given_up:
            raise RuntimeError("the search was given up before this model was trained")

    def wait(self, future: Future[Any]) -> Any:
        """The result of what another task is at; meanwhile others have their turn."""
        self._awaited.append(future)
        self._form()
        self._turn.release()
        try:
            return future.result()
        finally:
            self._turn.acquire()
            self._awaited.remove(future)

    @contextmanager
    def apart(self) -> Iterator[None]:
        """While a task trains by itself on the host, beside others, a core each."""
        self._turn.release()
        try:
            with self._cores:
                yield
        finally:
            self._turn.acquire()

    def join(self, seat: Seat) -> Seat:
        """Wait until the model is in a group; raises what went wrong with it."""
        seat.gathering = self
        self._ready.append(seat)
        self._form()
        self._turn.wait_for(lambda: seat.party is not None or seat.error is not None or self.given_up)
        self._raise_if_given_up()
        if seat.error is not None:
            raise seat.error
        return seat

    def leave(self, seat: Seat) -> None:
        """See ``Seat.close``."""
        party = seat.party
        assert party is not None
        party.live.remove(seat)
        if self.given_up:
            return
        if party.live:
            party.advance()
        else:
            self._parties.remove(party)
            self._form()

    def _form(self) -> None:
        """Make groups of the models that are ready, if no task can bring another one."""
        # who waits for something that is there already goes on
        waiting = len(self._ready) + sum(not future.done() for future in self._awaited)
        if self._handing_out or self._parties or not self._ready or waiting < self.tasks or self.given_up:
            return
        kins: dict[Any, list[Seat]] = {}
        for seat in self._ready:
            kins.setdefault(seat.kin(), []).append(seat)
        self._ready = []
        for seats in kins.values():
            try:
                self._parties.append(_Party(seats, self._turn))
            except Exception as error:
                for seat in seats:
                    seat.error = error
        self._turn.notify_all()


@contextmanager
def training(engine: Engine, *, in_launches: bool) -> Iterator[None]:
    """While the model of ``engine`` is trained; ``in_launches``, in which it leaves others their turn, or by calls of
    its own.

    Models that are trained meanwhile, such as by a callback, are in no launch: it would wait for this one.
    """
    together = gathering()
    token = _current.set(None)
    try:
        # a card is for one at a time
        beside = together is not None and not in_launches and engine.backend == "numpy"
        with together.apart() if together is not None and beside else nullcontext():
            yield
    finally:
        _current.reset(token)


def _joined(data: Sequence[Mapping[str, Array]]) -> tuple[dict[str, Array], list[int]]:
    """The arrays of all models one behind the other, each only once, and the row where each model's begin."""
    begins: dict[bytes, int] = {}
    parts: list[Mapping[str, Array]] = []
    places, end = [], 0
    for own in data:
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(own):
            digest.update(np.ascontiguousarray(own[name]).data)
        key = digest.digest()
        if key not in begins:
            begins[key] = end
            parts.append(own)
            end += len(own["x"])
        places.append(begins[key])
    return {name: np.concatenate([part[name] for part in parts]) for name in data[0]}, places


def result_of(future: Future[Any]) -> Any:
    """The result of what another task of this thread's search may be at."""
    together = gathering()
    return future.result() if together is None else together.wait(future)
