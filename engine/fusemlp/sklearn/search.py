"""Searches for parameters: scikit-learn's own, whose candidates and folds train side by side."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import joblib
import numpy as np
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from fusemlp.fleet.memory import available_memory
from fusemlp.sklearn.base import BaseMLP
from fusemlp.sklearn.settings import chosen_backend
from fusemlp.sklearn.sharing import SharedFits
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, unknown_name

# The most models that train in common launches: about two for each multiprocessor of a large card.
MOST_AT_ONCE = 256


class _FleetSearch(BaseSearchCV):
    """Trains candidates and folds on threads of this process; all else is scikit-learn's search."""

    # the argument with the values of the parameters, and scikit-learn's search
    _space: str
    _plain: str
    estimator: Any
    cv: Any

    def fit(self, X: Any, y: Any = None, **params: Any) -> Any:
        """Try all candidates on all folds of X (n, K) and y, and fit the best to all rows, as scikit-learn's search.

        ``params`` go where scikit-learn sends them: ``sample_weight`` to the estimator, ``groups`` to the splitter.
        Raises ArgumentTypeError for an estimator that is not fusemlp's, ArgumentError for a parameter that it does not
        have and for a search without candidates.
        """
        given = self.estimator
        spaces = _spaces(getattr(self, self._space))
        _check(self._space, getattr(self, self._space), given, self._plain)
        sharing = clone(given).set_params(memory=SharedFits()) if _shares(given, spaces) else None
        if sharing is not None:
            self.estimator = sharing
        try:
            with joblib.parallel_config(backend="sequential"):
                super().fit(X, y, **params)
        finally:
            self.estimator = given
            if sharing is not None:
                # the default scorer keeps it
                sharing.memory = None
        if sharing is not None and self.refit:
            self.best_estimator_.memory = None
        return self

    def _at_once(self, X: Any) -> int:
        """How many tasks there are at once if nobody says how many: no more threads than there are tasks."""
        splits = 5 if self.cv is None else self.cv
        if not isinstance(splits, Integral):
            return _at_once(X)
        return max(2, min(_at_once(X), self._candidates() * int(splits)))

    @abstractmethod
    def _candidates(self) -> int:
        """How many there are."""

    def _run_search(self, evaluate_candidates: Any, *, callback_ctx: Any = None) -> None:
        # only newer releases have callbacks
        context = {} if callback_ctx is None else {"callback_ctx": callback_ctx}
        # the models have a core each; the refit, which comes later, has them all
        with threadpool_limits(1, user_api="blas"):
            super()._run_search(evaluate_candidates, **context)


class FleetSearchCV(_FleetSearch, GridSearchCV):
    """scikit-learn's ``GridSearchCV`` over fusemlp's MLPs: all candidates and folds train side by side.

    Parameters, attributes and what they mean are those of ``sklearn.model_selection.GridSearchCV``. ``estimator`` is an
    MLPClassifier or MLPRegressor of ``fusemlp.sklearn``, alone or as the last step of a ``Pipeline``; the steps before
    it are fitted once for each fold and each choice of their own parameters, unless the pipeline has a ``memory``.
    ``param_grid``: a mapping from names to values, or a list of mappings; an empty mapping is one candidate, the
    estimator as it is. ``n_jobs``: how many models train at once; None for one a core, and where one launch trains many
    (on a GPU, and on NumPy without numba) for as many as there is memory for, at most 256.

    One that cannot be fitted, or whose parameters are no longer finite, gets ``error_score`` with a FitFailedWarning. A
    thread holds the rows of the fold that it is at and no others. On NumPy with numba each model trains in one compiled
    loop, and ends with the same bits as one that is fitted alone with BLAS on one thread. Elsewhere models of one
    shape, from all candidates and folds, train in one launch, which one that has converged leaves; within rounding they
    end where models end that are fitted alone.
    """

    _space, _plain = "param_grid", "GridSearchCV"

    def _candidates(self) -> int:
        sizes = [
            [len(values) for values in one.values() if hasattr(values, "__len__")] for one in _spaces(self.param_grid)
        ]
        return sum(math.prod(size) for size in sizes)


class FleetRandomizedSearchCV(_FleetSearch, RandomizedSearchCV):
    """scikit-learn's ``RandomizedSearchCV`` over fusemlp's MLPs; the rest is as in ``FleetSearchCV``.

    With the same ``random_state`` the candidates are those of scikit-learn's.
    """

    _space, _plain = "param_distributions", "RandomizedSearchCV"

    def _candidates(self) -> int:
        return int(self.n_iter) if isinstance(self.n_iter, Integral) else MOST_AT_ONCE


def _spaces(given: Any) -> list[Mapping[str, Any]]:
    """The mappings of a space; what is none is left to scikit-learn, which refuses it in its own words."""
    several = [given] if isinstance(given, Mapping) else given
    return [one for one in several if isinstance(one, Mapping)] if isinstance(several, list | tuple) else []


def _last_step(estimator: Any) -> tuple[str, Any]:
    """The name that the parameters of a pipeline's last step begin with, such as "mlp__", and the step."""
    prefix = ""
    while isinstance(estimator, Pipeline) and estimator.steps:
        name, estimator = estimator.steps[-1]
        prefix += f"{name}__"
    return prefix, estimator


def _values(name: str, spaces: list[Mapping[str, Any]]) -> list[Any]:
    """The values of a parameter; of a distribution there is no list."""
    values = [space[name] for space in spaces if name in space]
    kinds = (Sequence, np.ndarray)
    return [one for listed in values if isinstance(listed, kinds) and not isinstance(listed, str) for one in listed]


def _models(estimator: Any, spaces: list[Mapping[str, Any]], prefix: str = "") -> list[Any]:
    """The estimator that the pipeline ends in, and those that the space puts in its place."""
    if not isinstance(estimator, Pipeline) or not estimator.steps:
        return [estimator]
    name, last = estimator.steps[-1]
    found = _models(last, spaces, f"{prefix}{name}__")
    for replaced in _values(f"{prefix}{name}", spaces):
        found += _models(replaced, [])
    for steps in _values(f"{prefix}steps", spaces):
        found += _models(Pipeline(steps), [])
    return found


def _check(space: str, given: Any, estimator: Any, plain: str) -> None:
    """Refuse what could not be trained, before anything is; ``plain`` is scikit-learn's own search."""
    spaces = _spaces(given)
    for model in _models(estimator, spaces):
        if not isinstance(model, BaseMLP):
            raise ArgumentTypeError(
                "estimator: expected an MLPClassifier or MLPRegressor of fusemlp.sklearn, alone or as the last step of "
                f"a Pipeline, got {model!r}; for other estimators use sklearn.model_selection.{plain}"
            )
    if isinstance(given, list | tuple) and not given:
        raise ArgumentError(
            f"{space}: there is nothing to try in {given!r}; give values, such as {{'alpha': [1e-4, 1e-3]}}, or {{}} "
            "for the estimator as it is"
        )
    known = estimator.get_params()
    for mapping in spaces:
        for name in mapping:
            if not isinstance(name, str):
                raise ArgumentTypeError(f"{space}: expected the names of parameters, got {name!r}")
            # a step that is replaced may have other parameters, which its own set_params knows
            replaced = any(name.startswith(f"{step}__") for step in mapping)
            if name not in known and not replaced:
                raise unknown_name(space, name, sorted(known))


def _backends(estimator: Any, spaces: list[Mapping[str, Any]]) -> set[str]:
    """The names of the backends that are asked for."""
    names = [model.backend for model in _models(estimator, spaces)]
    names += _values(f"{_last_step(estimator)[0]}backend", spaces)
    return {chosen_backend(name) for name in names if isinstance(name, str)}


def _at_once(X: Any) -> int:
    """How many models train in common launches: each task holds rows of its own."""
    # of an array, a table, or rows that are sparse and become dense; a list is never large
    shape = getattr(X, "shape", ())
    size = math.prod(shape) * getattr(getattr(X, "dtype", None), "itemsize", 8) if shape else 0
    available = available_memory()
    if not size or available is None:
        return MOST_AT_ONCE
    # the rows of the fold, and those that are held out
    return max(2, min(MOST_AT_ONCE, available // 2 // (2 * size)))


def _shares(estimator: Any, spaces: list[Mapping[str, Any]]) -> bool:
    """Whether there are steps that candidates may have in common, and no memory of the user's."""
    chosen = any("memory" in space for space in spaces)
    return isinstance(estimator, Pipeline) and estimator.memory is None and not chosen
