"""Models of a search that train before scikit-learn asks for their fits.

scikit-learn's search fits one candidate on one fold after another. Here the models of the next fits are set up in the
same thread, and train meanwhile: on NumPy on a thread for each core, on Triton in one launch for all of one shape. A
fit takes a trained model over if its parameters, rows, targets and weights are the same; every other fit trains by
itself. So scores and failures are those of fits one after another.
"""

from __future__ import annotations

import pickle
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np

from fusemlp.fleet.launches import GROUP_ROWS, Group, run_together, signature
from fusemlp.fleet.threads import LaunchThreads, Training
from fusemlp.inputs.arrays import Array
from fusemlp.program.step import Inputs
from fusemlp.runtime.binding import lower
from fusemlp.runtime.plans import choose_plan
from fusemlp.sklearn.batches import ResidentBatches
from fusemlp.sklearn.settings import STOCHASTIC
from fusemlp.sklearn.sharing import UNPICKLABLE
from fusemlp.sklearn.stochastic import SklearnPolicy, warn_unconverged
from fusemlp.training.loop import EpochLoop

if TYPE_CHECKING:
    from fusemlp.sklearn.base import BaseMLP

# The estimator that is to be fitted, and its fit, perhaps as the last step of a pipeline's.
Task = Callable[[], tuple[Any, Callable[[], object]]]

# the models that the search around a fit has trained
current: ContextVar[TrainedAhead | None] = ContextVar("trained_ahead", default=None)


@dataclass(eq=False)
class Entry:
    """A model that trains ahead of its fit."""

    epochs: EpochLoop[SklearnPolicy]
    # rows, targets and weights
    given: tuple[Any, Any, Any]
    # before the model drew from its random state
    parameters: bytes
    error: Exception | None = None
    ended: bool = False

    def is_for(self, estimator: BaseMLP, given: tuple[Any, Any, Any]) -> bool:
        """Return whether a fit of these rows, targets and weights would train this model."""
        try:
            same = self.parameters == _parameters(estimator) and all(map(_same, self.given, given))
        except UNPICKLABLE:
            # this cannot be told
            return False
        return same and type(self.epochs.policy.estimator) is type(estimator)

    def training(self) -> Training:
        """Yield the launches of the model."""
        with _ending([self]):
            self.epochs.begin()
            for steps in self.epochs.training(lambda: False):
                yield partial(self.epochs.bound.run_many, steps)
            self.epochs.finish(interrupted=False)

    def signature(self) -> tuple[Any, ...]:
        """Return what models have in common that can train in one launch."""
        model, batches = self.epochs.policy.model, self.epochs.policy.batches
        spec, engine = model.loop_loss, model.engine
        shapes = tuple((name, array.shape[1:], array.dtype.str) for name, array in sorted(batches.data.items()))
        return signature(engine), batches.batch_size, spec.kind, spec.soft, spec.ignore_index, engine.precision, shapes


@contextmanager
def _ending(entries: Sequence[Entry]) -> Iterator[None]:
    """Mark models as ended after the block; their fits raise its error."""
    try:
        yield
    except Exception as error:
        for entry in entries:
            entry.error = error
    for entry in entries:
        entry.ended = True


class TrainedAhead:
    """Trains the models of ``tasks``, which are the fits that follow, in their order.

    ``workers``: threads for models on the host. If models share launches, ``at_once`` returns how many to set up before
    the first trains.
    """

    def __init__(self, tasks: Iterator[Task], workers: int, at_once: Callable[[], int]) -> None:
        self._tasks, self._at_once = tasks, at_once
        self._threads = LaunchThreads(workers, lambda number, error: None)
        self._most, self._together = self._threads.most, False
        self._entries: deque[Entry] = deque()
        # models of the next common launches, by signature
        self._waiting: dict[Any, list[Entry]] = {}
        # fits that were set up and have not been asked for
        self._ahead = 0
        # whose fit is being set up
        self._expected: Any = None

    def __enter__(self) -> None:
        self._token = current.set(self)

    def __exit__(self, *error: object) -> None:
        current.reset(self._token)
        self._threads.close()

    def fits(self, estimator: BaseMLP, X: Any, y: Any, sample_weight: Any) -> bool:
        """Return whether a fit is done: it is only to be set up, or takes a trained model over."""
        if estimator is self._expected:
            self._expected = None
            self.collect(estimator, X, y, sample_weight)
            return True
        # a model in a step before the expected one trains by itself
        entry = None if self._expected is not None else self.take(estimator, X, y, sample_weight)
        if entry is None:
            return False
        policy = entry.epochs.policy
        estimator.__dict__.update(policy.estimator.__dict__)
        warn_unconverged(entry.epochs)
        estimator._finish(policy)
        return True

    def collect(self, estimator: BaseMLP, X: Any, y: Any, sample_weight: Any) -> None:
        """Set up a fit; one that would warn, print or call back runs when it is asked for."""
        if estimator.solver not in STOCHASTIC or estimator.callbacks or estimator.verbose or estimator.warm_start:
            return
        parameters = _parameters(estimator)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            epochs = estimator._set_up(X, y, sample_weight, (None, None), together=True)
        if not isinstance(epochs.policy.batches, ResidentBatches):
            return
        entry = Entry(epochs, (X, y, sample_weight), parameters)
        self._entries.append(entry)
        if epochs.bound is not None:
            self._threads.start(0, entry.training())
            return
        if not self._together:
            self._most, self._together = self._at_once(), True
        self._waiting.setdefault(entry.signature(), []).append(entry)

    def take(self, estimator: BaseMLP, X: Any, y: Any, sample_weight: Any) -> Entry | None:
        """Return the trained model of a fit, or None where the fit has to train it."""
        self._fill()
        self._ahead -= 1
        entry = next((one for one in self._entries if one.is_for(estimator, (X, y, sample_weight))), None)
        if entry is None:
            return None
        # fits come in order: none of the earlier ones will come any more
        while self._entries.popleft() is not entry:
            pass
        while not entry.ended:
            self._threads.wait()
        if entry.error is not None:
            raise entry.error
        return entry

    def _fill(self) -> None:
        """Set up the models of the next fits."""
        if self._together and self._ahead > 0:
            return
        while self._ahead < self._most and (task := next(self._tasks, None)) is not None:
            self._ahead += 1
            try:
                self._expected, fit = task()
                fit()
            except Exception:
                # the fit itself fails again; if an earlier step of the pipeline does, it is not asked for
                self._ahead -= self._expected is not None
            self._expected = None
        for entries in self._waiting.values():
            with _ending(entries):
                if not _train_together(entries):
                    self._entries = deque(entry for entry in self._entries if entry not in entries)
        self._waiting = {}


def _train_together(entries: Sequence[Entry]) -> bool:
    """Train models of one signature in one launch; False where their plan is another."""
    loops = [entry.epochs for entry in entries]
    models = [one.policy.model for one in loops]
    batches: list[Any] = [one.policy.batches for one in loops]
    first, size = models[0].engine, batches[0].batch_size
    traits, sizes = first.memory.backend.traits, first.network.sizes
    if choose_plan("auto", traits, sizes, size, first.precision, models=len(models))[0] != "resident":
        return False
    group = Group([model.engine for model in models])
    data, firsts = _joined([one.data for one in batches])
    for epochs, one in zip(loops, batches, strict=True):
        epochs.at_once = one.at_once = max(1, min(one.at_once, GROUP_ROWS // (len(models) * one.n)))
    places = group.places(size, [one.n for one in batches], [one.at_once for one in batches], firsts)
    inputs = Inputs(len(data["x"]), indexed=True, weighted="weight" in data)
    programs = []
    for epochs, model, one, bound in zip(loops, models, batches, places, strict=True):
        epochs.bound = bound
        programs.append(lower(model.engine, inputs, model.loop_loss, model.rule, size, resident=True, ridge=one.ridge))
    launch = group.bind(programs, models[0].on_device(data))
    run_together(loops, launch, lambda: False, lambda index, error: setattr(entries[index], "error", error))
    return True


def _joined(data: Sequence[Mapping[str, Array]]) -> tuple[dict[str, Array], list[int]]:
    """Return the arrays of all models, stored contiguously and each once, and the row where each model's begin."""
    begins: dict[str, int] = {}
    parts: list[Mapping[str, Array]] = []
    places = []
    for own in data:
        key = joblib.hash(own)
        if key not in begins:
            begins[key] = sum(len(part["x"]) for part in parts)
            parts.append(own)
        places.append(begins[key])
    return {name: np.concatenate([part[name] for part in parts]) for name in data[0]}, places


def _parameters(estimator: BaseMLP) -> bytes:
    """Return the parameters for comparison. They include the random state, which changes with every draw."""
    return pickle.dumps(estimator.get_params(deep=False))


def _same(one: Any, other: Any) -> bool:
    """Return whether two sets of rows, targets or weights are equal."""
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one is other or pickle.dumps(one) == pickle.dumps(other)
