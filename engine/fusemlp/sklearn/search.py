"""scikit-learn's searches for parameters, whose candidates and folds train side by side.

scikit-learn's search fits one candidate on one fold after another, each a clone of the search's estimator. Here that
clone is the next fit, which was set up in the same thread and trains meanwhile: on NumPy on a thread for each core, on
Triton in one launch for all of one shape. Scores and failures are those of fits one after another.
"""

from __future__ import annotations

import copy
import math
import pickle
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import joblib
import numpy as np
from sklearn import config_context, get_config
from sklearn.base import clone, is_classifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV, check_cv
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils import indexable
from sklearn.utils.metaestimators import _safe_split
from sklearn.utils.validation import _check_method_params

from fusemlp.datasets.rows import available_memory
from fusemlp.describe.checks import as_kind, caller_level
from fusemlp.engine import Engine
from fusemlp.fleet.launches import LaunchGroup, LaunchThreads, Training, signature, train_together
from fusemlp.inputs.arrays import Array
from fusemlp.runtime.memory import on_device
from fusemlp.runtime.plans import cpu_threads, one_thread
from fusemlp.sklearn.base import BaseMLP
from fusemlp.sklearn.batches import ResidentBatches
from fusemlp.sklearn.model import Model
from fusemlp.sklearn.settings import STOCHASTIC
from fusemlp.sklearn.solvers import ENDS, SklearnPolicy, warn_unconverged
from fusemlp.training.loop import EpochLoop
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, unknown_name

# raised for what cannot be pickled
UNPICKLABLE = (pickle.PicklingError, AttributeError, TypeError)
# Bytes of transformed rows; beyond them all are dropped.
LIMIT = 1 << 30


@dataclass(eq=False)
class Candidate:
    """An estimator with a candidate's parameters; ``epochs`` trains its last step, a model, on the rows of a fold."""

    estimator: Any
    epochs: EpochLoop[SklearnPolicy]
    error: Exception | None = None
    ended: bool = False

    def training(self) -> Training:
        """Yield the launches of the model."""
        with _ending([self]):
            yield from self.epochs.launches(lambda: False)

    def signature(self) -> tuple[Any, ...]:
        """Return what models have in common that can train in one launch."""
        model, batches = self.epochs.policy.model, self.epochs.policy.batches
        spec, engine = model.loop_loss, model.engine
        shapes = tuple((name, array.shape[1:], array.dtype.str) for name, array in sorted(batches.data.items()))
        return signature(engine), batches.batch_size, spec.kind, spec.soft, spec.ignore_index, engine.precision, shapes


@contextmanager
def _ending(candidates: Sequence[Candidate]) -> Iterator[None]:
    """Mark models as ended after the block; their fits raise its error."""
    try:
        yield
    except Exception as error:
        for candidate in candidates:
            candidate.error = error
    for candidate in candidates:
        candidate.ended = True


class Candidates:
    """Sets up and trains fits before scikit-learn asks for them: they are the clones of ``asked``, in order.

    A fit is a clone of ``estimator`` with ``parameters``, which ``fit`` fits to the rows of a fold. ``workers``:
    threads for models on the host. ``at_once`` returns how many models that share launches to set up at first.
    """

    def __init__(
        self,
        asked: Any,
        estimator: Any,
        fits: Iterator[tuple[Mapping[str, Any], Callable[[Any], object]]],
        workers: int,
        at_once: Callable[[], int],
    ) -> None:
        self._asked, self._estimator, self._fits, self._at_once = asked, estimator, fits, at_once
        self._threads = LaunchThreads(workers)
        self._most, self._together = self._threads.most, False
        # engines on the host, as they were when new, and their models
        self._lent: list[tuple[Any, Engine, dict[str, Array], weakref.ref[Model]]] = []
        self._checked: Any = None
        # None for a fit that trains when it is asked for
        self._next: deque[Candidate | None] = deque()

    def __enter__(self) -> None:
        self._asked.__sklearn_clone__ = self._clone

    def __exit__(self, *error: object) -> None:
        del self._asked.__sklearn_clone__
        self._threads.close()

    def _clone(self) -> Any:
        """Return the estimator of the next fit, whose ``fit`` waits for the end of its training."""
        if not self._next or not self._together:
            self._fill()
        candidate = self._next.popleft()
        if candidate is None:
            return clone(self._estimator)
        estimator = candidate.estimator
        estimator.set_params = lambda **parameters: estimator
        estimator.fit = partial(self._finish, candidate)
        return estimator

    def _finish(self, candidate: Candidate, *data: Any, **options: Any) -> Any:
        """Return the fitted estimator; raises what went wrong in the training."""
        estimator, epochs = candidate.estimator, candidate.epochs
        del estimator.set_params, estimator.fit
        while not candidate.ended:
            self._threads.wait()
        if candidate.error is not None:
            raise candidate.error
        warn_unconverged(epochs)
        epochs.policy.estimator._finish(epochs.policy)
        return estimator

    def _fill(self) -> None:
        """Set up the next fits."""
        waiting: dict[Any, list[Candidate]] = {}
        while len(self._next) < self._most and (following := next(self._fits, None)) is not None:
            candidate = self._set_up(*following)
            self._next.append(candidate)
            if candidate is None:
                continue
            if candidate.epochs.bound is not None:
                self._threads.start(candidate.training())
                continue
            if not self._together:
                self._most, self._together = self._at_once(), True
            waiting.setdefault(candidate.signature(), []).append(candidate)
        for candidates in waiting.values():
            with _ending(candidates):
                if not _train_together(candidates):
                    self._next = deque(None if candidate in candidates else candidate for candidate in self._next)

    def _set_up(self, parameters: Mapping[str, Any], fit: Callable[[Any], object]) -> Candidate | None:
        """Return a fit that is ready to train, or None for one that fails, prints or calls back."""
        loops: list[EpochLoop[SklearnPolicy]] = []
        estimator = clone(self._estimator)

        def collect(*data: Any) -> None:
            del model._fit
            if model.solver in STOCHASTIC and not (model.callbacks or model.verbose or model.warm_start):
                loops.append(model._set_up(*data, make=self._model))

        try:
            estimator.set_params(**clone(parameters, safe=False))
            if not isinstance(last_step(estimator), BaseMLP):
                return None
            model = last_step(estimator)
            model._fit = collect
            # a candidate's parameters are checked on its first fold
            checked = parameters is self._checked or get_config()["skip_parameter_validation"]
            with config_context(skip_parameter_validation=checked):
                fit(estimator)
            self._checked = parameters
        except Exception:
            # the fit itself fails again
            return None
        ready = loops and isinstance(loops[0].policy.batches, ResidentBatches)
        return Candidate(estimator, loops[0]) if ready else None

    def _model(self, network: Any, loss: Any, optimizer: Any, *rest: Any, **options: Any) -> Model:
        """Return a model on the engine of a like fit that scikit-learn has scored and forgotten, or on a new one."""
        key = network, loss, optimizer.rule(), options["backend"], options["precision"]
        place = next((place for place, lent in enumerate(self._lent) if lent[0] == key and lent[3]() is None), None)
        if place is None:
            # an engine of another shape is not kept for fits that may not come
            self._lent = [lent for lent in self._lent if lent[3]() is not None]
            engine = Engine(network, loss, optimizer, **options)
            state = engine.memory.snapshot()
        else:
            _, engine, state, _ = self._lent.pop(place)
            engine.optimizer, engine.seed = optimizer, options["seed"]
            engine.lay_out(None)
            engine.restore(state)
        model = Model(network, loss, optimizer, *rest, engine=engine, **options)
        if engine.memory.backend.traits.on_host:
            self._lent.append((key, engine, state, weakref.ref(model)))
        return model


def last_step(estimator: Any) -> Any:
    """Return the estimator that a pipeline ends in, or the estimator itself."""
    while isinstance(estimator, Pipeline) and estimator.steps:
        estimator = estimator.steps[-1][1]
    return estimator


def _train_together(candidates: Sequence[Candidate]) -> bool:
    """Train models of one signature in one launch; False where their plan is another."""
    loops = dict(enumerate(candidate.epochs for candidate in candidates))
    batches: list[Any] = [loop.policy.batches for loop in loops.values()]
    engines = [loop.policy.model.engine for loop in loops.values()]
    if engines[0].plan_for("auto", batches[0].batch_size, models=len(engines))[0] != "resident":
        return False
    data, firsts = _shared_data([source.data for source in batches])
    train_together(
        LaunchGroup(engines),
        loops,
        lambda loop, inputs: loop.policy.batches.program(inputs),
        on_device(engines[0].memory.backend, engines[0].network, data),
        interrupted=lambda: False,
        ended=lambda place, error: setattr(candidates[place], "error", error),
        firsts=firsts,
    )
    return True


def _shared_data(data: Sequence[Mapping[str, Array]]) -> tuple[dict[str, Array], list[int]]:
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


class SharedFits:
    """Keeps fitted steps and their transformed rows in this process, as a pipeline's ``memory``.

    Two calls are the same if the step, its parameters, the rows and the targets are. They share the fitted step and get
    rows of their own, which a later step may change in place, as steps with ``copy=False`` do.
    """

    def __init__(self) -> None:
        self._results: dict[str, tuple[Any, Any]] = {}

    def cache(self, function: Callable[..., Any], ignore: Iterable[str] = ()) -> Callable[..., Any]:
        """Return ``function`` called once for the same arguments; those named in ``ignore`` do not count."""
        ignored = frozenset(ignore)

        def call(*arguments: Any, **named: Any) -> Any:
            counted = {name: value for name, value in named.items() if name not in ignored}
            try:
                key = joblib.hash((function.__qualname__, arguments, counted))
            except UNPICKLABLE:
                # a step with a lambda, for example, cannot be compared
                return function(*arguments, **named)
            if key not in self._results:
                if sum(_bytes(rows) for rows, _ in self._results.values()) > LIMIT:
                    self._results.clear()
                self._results[key] = function(*arguments, **named)
            rows, step = self._results[key]
            return copy.deepcopy(rows), step

        return call

    def __deepcopy__(self, memo: Any) -> SharedFits:
        # clones of the pipeline share the results
        return self


def _bytes(rows: Any) -> int:
    """Return the size of transformed rows, dense, sparse or a table."""
    if hasattr(rows, "memory_usage"):
        return int(rows.memory_usage().sum())
    # a sparse matrix keeps its numbers in an array
    stored = rows if hasattr(rows, "nbytes") else getattr(rows, "data", None)
    return int(getattr(stored, "nbytes", 0))


# joblib's own backends, in whose place models train side by side.
LOCAL = {joblib.parallel.BACKENDS[name] for name in ("loky", "multiprocessing", "threading", "sequential")}
# The most models of one launch: about two for each multiprocessor of a large card.
MOST_AT_ONCE = 256
# Names of Fleet, and those of scikit-learn.
_THEIRS = {"lr": "learning_rate_init", "hidden": "hidden_layer_sizes", "weight_decay": "alpha", "epochs": "max_iter"}
_THEIRS |= {"batch": "batch_size", "seed": "random_state", "optimizer": "solver"}


class _FleetSearch(BaseSearchCV):
    """Trains models ahead of their fits; the rest is scikit-learn's search."""

    # the argument with the values of the parameters, and the search's name in scikit-learn
    _space: str
    _plain: str
    estimator: Any
    cv: Any

    def fit(self, X: Any, y: Any = None, **params: Any) -> Any:
        """Try all candidates on all folds of X (n, K) and y, and fit the best to all rows, as scikit-learn's search.

        ``params`` go where scikit-learn sends them: ``sample_weight`` to the estimator, ``groups`` to the splitter.
        Raises ArgumentTypeError for an estimator that is not fusemlp's, ArgumentError for an unknown parameter or none.
        """
        estimator, cv = self.estimator, self.cv
        spaces = _checked(self._space, getattr(self, self._space), estimator, self._plain)
        # the user's workers: scikit-learn sends them a fit each
        elsewhere = type(joblib.parallel.get_active_backend()[0]) not in LOCAL
        here: AbstractContextManager[Any] = nullcontext() if elsewhere else joblib.parallel_config(backend="sequential")
        template = clone(estimator)
        shares = not elsewhere and isinstance(estimator, Pipeline) and estimator.memory is None
        shares = shares and not any("memory" in space for space in spaces)
        if shares:
            template.set_params(memory=SharedFits())
        # splits may be given as an iterator, which can be read once
        self.cv = check_cv(cv, indexable(X, y)[1], classifier=is_classifier(estimator))
        self.estimator, self._given = template, None
        if not elsewhere and self.n_jobs != 1:
            self.estimator, self._given = clone(template), (template, X, y, params)
            # the clone that scikit-learn makes of it is asked for the fits
            self.estimator.__sklearn_clone__ = partial(getattr, self, "estimator")
        ends: list[str | None] = []
        noting = ENDS.set(ends)
        try:
            with here:
                super().fit(X, y, **params)
        finally:
            ENDS.reset(noting)
            if shares:
                # the default scorer keeps the pipeline
                self.estimator.memory = None
            self.estimator, self.cv = estimator, cv
            del self._given
        if shares and self.refit:
            self.best_estimator_.memory = None
        if messages := list(filter(None, ends)):
            many = f" {len(messages)} of the {len(ends)} fits of this {type(self).__name__} ended so: raise max_iter."
            # one alone if the folds were fitted in other processes
            warnings.warn(
                f"{messages[0]}{many if len(ends) > 1 else ''}", ConvergenceWarning, stacklevel=caller_level()
            )
        return self

    def _run_search(self, evaluate_candidates: Any, *, callback_ctx: Any = None) -> None:
        # only newer releases have callbacks, and look for this name
        context = {} if callback_ctx is None else {"callback_ctx": callback_ctx}

        def evaluate(candidates: Any, **named: Any) -> Any:
            candidates = list(candidates)
            if self._given is None:
                return evaluate_candidates(candidates, **named)
            template, X, y, params = self._given
            X, y = indexable(X, y)
            routed = self._get_routed_params_for_fit(_check_method_params(X, params=params))
            folds = list(self.cv.split(X, y, **routed.splitter.split))

            def fit(train: Any, estimator: Any) -> None:
                options = _check_method_params(X, params=routed.estimator.fit, indices=train)
                plain = type(X) is type(y) is np.ndarray and len(X) == len(y)
                rows = (X[train], y[train]) if plain else _safe_split(estimator, X, y, train)
                estimator.fit(*rows, **options)

            # scikit-learn's fits, in its order
            fits = ((candidate, partial(fit, train)) for candidate in candidates for train, _ in folds)
            several = -1 if self.n_jobs is None else self.n_jobs
            workers = several if several > 0 else max(1, cpu_threads() + 1 + several)
            with Candidates(self.estimator, template, fits, workers, lambda: several if several > 0 else _at_once(X)):
                return evaluate_candidates(candidates, cv=check_cv(folds), **named)

        # the models have a core each; the refit, which comes later, has them all
        with one_thread():
            super()._run_search(evaluate, **context)


class FleetSearchCV(_FleetSearch, GridSearchCV):
    """scikit-learn's ``GridSearchCV`` over fusemlp's MLPs: all candidates and folds train side by side.

    Parameters, attributes and what they mean are those of ``sklearn.model_selection.GridSearchCV``. ``estimator`` is an
    MLPClassifier or MLPRegressor of ``fusemlp.sklearn``, alone or as the last step of a ``Pipeline``; the steps before
    it are fitted once for each fold and each choice of their own parameters, unless the pipeline has a ``memory``.
    ``param_grid``: a mapping from names to values, or a list of mappings; an empty mapping is the estimator as it is.
    ``n_jobs``: models that train at once; None for one a core, on Triton for as many as memory holds, at most 256.

    One ConvergenceWarning counts the fits that reached ``max_iter``. A model that cannot be fitted, or whose parameters
    are no longer finite, gets ``error_score`` with a FitFailedWarning. On NumPy each model trains in one compiled loop,
    and ends with the same bits as one that is fitted alone; there are rows of two folds a core in memory, and no more.
    On Triton models of one shape, from all candidates and folds, train in one launch, which one that has converged
    leaves; within rounding they end where models end that are fitted alone. With joblib.parallel_config(backend="dask")
    or "ray" their workers train them, a fit each. On CuPy, with callbacks, ``verbose``,
    ``warm_start`` or L-BFGS they train one after another.
    """

    _space, _plain = "param_grid", "GridSearchCV"


class FleetRandomizedSearchCV(_FleetSearch, RandomizedSearchCV):
    """scikit-learn's ``RandomizedSearchCV`` over fusemlp's MLPs; the rest is as in ``FleetSearchCV``.

    With the same ``random_state`` the candidates are those of scikit-learn's.
    """

    _space, _plain = "param_distributions", "RandomizedSearchCV"


def _checked(space: str, choices: Any, estimator: Any, plain: str) -> list[Mapping[str, Any]]:
    """Return the mappings of a space; refuse estimators and names that cannot be trained, before any fit."""
    several = [choices] if isinstance(choices, Mapping) else choices
    spaces = [choice for choice in several if isinstance(choice, Mapping)] if isinstance(several, list | tuple) else []
    if not isinstance(model := last_step(estimator), BaseMLP):
        raise ArgumentTypeError(
            "estimator: expected an MLPClassifier or MLPRegressor of fusemlp.sklearn, alone or as the last step of a "
            f"Pipeline, got {model!r}; for other estimators use sklearn.model_selection.{plain}"
        )
    if isinstance(choices, list | tuple) and not choices:
        raise ArgumentError(
            f"{space}: there is nothing to try in {choices!r}; give values, such as {{'alpha': [1e-4, 1e-3]}}, or {{}} "
            "for the estimator as it is"
        )
    known = estimator.get_params()
    for mapping in spaces:
        for name in mapping:
            as_kind(space, name, str, "the names of parameters")
            # a step that is replaced may have other parameters, which its own set_params checks
            if name not in known and not any(name.startswith(f"{step}__") for step in mapping):
                step, mark, last = name.rpartition("__")
                theirs = f"{step}{mark}{_THEIRS.get(last)}"
                if theirs in known:
                    raise ArgumentError(f"{space}: {name!r} is called {theirs!r} here, as in scikit-learn")
                raise unknown_name(space, name, sorted(known))
    return spaces


def _at_once(X: Any) -> int:
    """Return how many models may share a launch: each holds rows of its own."""
    # X is an array, a table, or sparse rows that become dense; a list is never large
    shape = getattr(X, "shape", ())
    size = math.prod(shape) * getattr(getattr(X, "dtype", None), "itemsize", 8) if shape else 0
    available = available_memory()
    if not size or available is None:
        return MOST_AT_ONCE
    # the rows of the fold, and a copy of them
    return max(2, min(MOST_AT_ONCE, available // 2 // (2 * size)))
