"""scikit-learn's searches for parameters, whose candidates and folds train side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import joblib
import numpy as np
from sklearn.base import clone, is_classifier
from sklearn.model_selection import GridSearchCV, RandomizedSearchCV, check_cv
from sklearn.model_selection._search import BaseSearchCV
from sklearn.pipeline import Pipeline
from sklearn.utils import indexable
from sklearn.utils.metaestimators import _safe_split
from sklearn.utils.validation import _check_method_params

from fusemlp.datasets.rows import available_memory
from fusemlp.describe.checks import as_kind
from fusemlp.runtime.plans import cpu_threads, one_thread
from fusemlp.sklearn.base import BaseMLP
from fusemlp.sklearn.candidates import Candidates, SharedFits, last_step
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, unknown_name

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
        try:
            with here:
                super().fit(X, y, **params)
        finally:
            if shares:
                # the default scorer keeps the pipeline
                self.estimator.memory = None
            self.estimator, self.cv = estimator, cv
            del self._given
        if shares and self.refit:
            self.best_estimator_.memory = None
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
