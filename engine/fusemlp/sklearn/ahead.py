"""Models of a search that train before scikit-learn asks for their fits.

scikit-learn's search fits one candidate on one fold after another. Here the models of the next fits are set up in the
same thread, and train meanwhile: on NumPy on a thread for each core, on Triton in one launch for all of one shape. A
fit takes a trained model over if its parameters, rows, targets and weights are the same; every other fit trains by
itself. So scores, failures and warnings are those of fits one after another.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import joblib
import numpy as np

from fusemlp.fleet.launches import GROUP_ROWS, Group, run_together, signature
from fusemlp.fleet.threads import LaunchThreads, Training
from fusemlp.program.lowering import Inputs
from fusemlp.runtime.plans import choose_plan
from fusemlp.sklearn.batches import ResidentBatches
from fusemlp.sklearn.settings import STOCHASTIC
from fusemlp.sklearn.stochastic import Ready, epoch_loop

if TYPE_CHECKING:
    from fusemlp.sklearn.base import BaseMLP

Array = np.ndarray[Any, Any]
# The estimator that is to be fitted, and its fit, perhaps as the last step of a pipeline's.
Task = Callable[[], tuple[Any, Callable[[], object]]]

_current: ContextVar[TrainedAhead | None] = ContextVar("trained_ahead", default=None)


def trained_ahead() -> TrainedAhead | None:
    """Return the models that the search around this fit has trained."""
    return _current.get()


@dataclass(eq=False)
class Entry:
    """A model that trains ahead of its fit."""

    estimator: BaseMLP
    given: tuple[Any, Any, Any]
    ready: Ready
    # the random state before the model drew from it
    seed: Any
    epochs: Any = None
    error: Exception | None = None
    ended: bool = False

    def __post_init__(self) -> None:
        self.batches: Any = self.ready.batches

    def is_for(self, estimator: BaseMLP, given: tuple[Any, Any, Any]) -> bool:
        """Return whether a fit of these rows, targets and weights would train this model."""
        if type(self.estimator) is not type(estimator) or not _same(self.seed, _seed(estimator)):
            return False
        names = [name for name in estimator.get_params(deep=False) if name != "random_state"]
        return all(_same(getattr(self.estimator, name), getattr(estimator, name)) for name in names) and all(
            _same(*pair) for pair in zip(self.given, given, strict=True)
        )

    def training(self) -> Training:
        """Yield the launches of the model."""
        try:
            self.epochs = epoch_loop(self.estimator, self.ready)
            self.epochs.begin()
            for steps in self.epochs.training(lambda: False):
                yield partial(self.batches.steps.run_many, steps)
            self.epochs.finish(interrupted=False)
        except Exception as error:
            self.error = error
        self.ended = True

    def signature(self) -> tuple[Any, ...]:
        """Return what models have in common that can train in one launch."""
        model, batches = self.ready.model, self.batches
        spec, engine = model.loop_loss, model.engine
        shapes = tuple((name, array.shape[1:], array.dtype.str) for name, array in sorted(batches.data.items()))
        return signature(engine), batches.batch_size, spec.kind, spec.soft, spec.ignore_index, engine.precision, shapes


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
        self._waiting: list[Entry] = []
        # tasks that were set up, and fits that were asked for
        self._begun, self._arrived = 0, 0
        self._expected: Any = None
        self._filling = False

    def __enter__(self) -> TrainedAhead:
        self._token = _current.set(self)
        return self

    def __exit__(self, *error: object) -> None:
        _current.reset(self._token)
        self._threads.close()

    def expects(self, estimator: BaseMLP) -> bool:
        """Return whether this fit is to be set up, and not yet run."""
        return estimator is self._expected

    def collect(self, X: Any, y: Any, sample_weight: Any) -> None:
        """Set up the expected fit; a fit that would warn, print or call back runs when it is asked for."""
        estimator, self._expected = self._expected, None
        if estimator.solver not in STOCHASTIC or estimator.callbacks or estimator.verbose or estimator.warm_start:
            return
        seed = _seed(estimator)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ready = estimator._set_up(X, y, sample_weight, together=True)
        if not isinstance(ready.batches, ResidentBatches):
            return
        entry = Entry(estimator, (X, y, sample_weight), ready, seed)
        self._entries.append(entry)
        if ready.batches.steps is None:
            if not self._together:
                self._most, self._together = self._at_once(), True
            self._waiting.append(entry)
        else:
            self._threads.start(self._begun, entry.training())

    def take(self, estimator: BaseMLP, X: Any, y: Any, sample_weight: Any) -> Entry | None:
        """Return the trained model of a fit, or None where the fit has to train it."""
        if self._filling:
            return None
        self._fill()
        self._arrived += 1
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
        if self._together and self._arrived < self._begun:
            return
        self._filling = True
        try:
            while self._begun - self._arrived < self._most:
                task = next(self._tasks, None)
                if task is None:
                    break
                self._begun += 1
                try:
                    self._expected, fit = task()
                    fit()
                except Exception:
                    # the fit itself fails again; if an earlier step of the pipeline does, it is not asked for
                    self._arrived += self._expected is not None
                self._expected = None
        finally:
            self._filling = False
        by_signature: dict[Any, list[Entry]] = {}
        for entry in self._waiting:
            by_signature.setdefault(entry.signature(), []).append(entry)
        self._waiting = []
        for entries in by_signature.values():
            try:
                if not _train_together(entries):
                    self._entries = deque(entry for entry in self._entries if entry not in entries)
            except Exception as error:
                for entry in entries:
                    entry.error, entry.ended = error, True


def _train_together(entries: Sequence[Entry]) -> bool:
    """Train models of one signature in one launch; False where their plan is another."""
    engines, batches = [entry.ready.model.engine for entry in entries], [entry.batches for entry in entries]
    first, models, size = engines[0], len(entries), batches[0].batch_size
    traits, sizes = first.memory.backend.traits, first.network.sizes
    if choose_plan("auto", traits, sizes, size, first.precision, models=models)[0] != "resident":
        return False
    group = Group(engines)
    data, firsts = _joined([one.data for one in batches])
    for one in batches:
        one.at_once = max(1, min(one.at_once, GROUP_ROWS // (models * one.n)))
    places = group.places(size, [one.n for one in batches], [one.at_once for one in batches], firsts)
    inputs = Inputs(len(data["x"]), indexed=True, weighted="weight" in data)
    programs = []
    for entry, one, bound in zip(entries, batches, places, strict=True):
        model, one.steps = entry.ready.model, bound
        programs.append(model.engine.lower(inputs, model.loop_loss, model.rule, size, resident=True, ridge=one.ridge))
        entry.epochs = epoch_loop(entry.estimator, entry.ready)
    to_device = first.memory.backend.from_host
    given = {name: to_device(array, "compute" if name == "x" else None) for name, array in data.items()}
    launch = group.bind(programs, given)
    run_together([entry.epochs for entry in entries], launch, lambda: False, lambda index, error: None)
    for entry in entries:
        entry.ended = True
    return True


def _joined(data: Sequence[Mapping[str, Array]]) -> tuple[dict[str, Array], list[int]]:
    """Return the arrays of all models, stored contiguously and each once, and the row where each model's begin."""
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


def _seed(estimator: BaseMLP) -> Any:
    """Return the seed, or the hash of a random state, which changes with every draw."""
    seed = estimator.random_state
    return joblib.hash(seed) if isinstance(seed, np.random.RandomState) else seed


def _same(one: Any, other: Any) -> bool:
    """Return whether two values of a parameter, or two sets of rows, are equal; if that cannot be told, False."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    try:
        if isinstance(one, np.ndarray):
            return one.dtype == other.dtype and np.array_equal(one, other)
        return bool(
            one == other if isinstance(one, bool | int | float | str) else joblib.hash(one) == joblib.hash(other)
        )
    except Exception:
        return False
