"""The common base of the classifier and the regressor."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from itertools import pairwise
from typing import Any, ClassVar

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.model_selection import train_test_split
from sklearn.utils import check_array, check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from fusemlp.callbacks import announce, checked_callbacks, exits
from fusemlp.describe.network import Activation
from fusemlp.describe.schedules import Schedule
from fusemlp.runtime.plans import shares_launches
from fusemlp.sklearn import settings
from fusemlp.sklearn.ahead import trained_ahead
from fusemlp.sklearn.batches import Batches, CalledBatches, ResidentBatches
from fusemlp.sklearn.lbfgs import minimise
from fusemlp.sklearn.model import Model, Rates, copies, dense
from fusemlp.sklearn.settings import Objective
from fusemlp.sklearn.stochastic import (
    Ready,
    ValidationScore,
    epoch_loop,
    epochs_at_once,
    logged,
    train,
    warn_unconverged,
)

Array = np.ndarray[Any, Any]

# The greatest seed of a dropout mask.
SEEDS = 2**31


def keep_arguments(estimator: Any, arguments: dict[str, Any]) -> None:
    """Make an attribute of each of the constructor's ``arguments``, its locals, as scikit-learn requires."""
    own = {name: value for name, value in arguments.items() if name not in ("self", "__class__")}
    vars(estimator).update(own)


class BaseMLP(BaseEstimator, ABC):
    """Checks parameters and data as scikit-learn does, and trains with an engine."""

    _parameter_constraints: ClassVar[dict[str, Any]] = settings.CONSTRAINTS

    # cached: a search asks four times a model, and reading a signature is slow
    @classmethod
    @functools.cache
    def _get_param_names(cls) -> list[str]:
        return list(super()._get_param_names())

    # whether validation rows keep the proportions of the classes
    _stratifies: bool
    # coefs, intercepts and slopes with the best validation score
    _best_parameters: tuple[list[Array], list[Array], list[Any]] | None
    loss: Any
    coefs_: list[Array]
    intercepts_: list[Array]
    loss_curve_: list[float]
    best_loss_: float | None
    validation_scores_: list[float] | None
    best_validation_score_: float | None

    @abstractmethod
    def _validate_input(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Any, Array]:
        """Return X and the targets, checked and as numbers."""

    @abstractmethod
    def _validate_targets(self, y: Any) -> Array:
        """Return validation targets, (n,) or (n, N), in the form of ``_validate_input``."""

    @abstractmethod
    def _objective(self, outputs: int) -> Objective:
        """Return the objective to minimise."""

    @abstractmethod
    def _targets(self, y: Array, dtype: np.dtype[Any]) -> tuple[Array, Array | None]:
        """Return the engine's targets (n, N), and the parts (n,) of the losses that the engine leaves out."""

    @abstractmethod
    def _truth(self, y: Array) -> Array:
        """Return targets (n, N) in the form of the model's predictions."""

    @abstractmethod
    def _score_of(self, predicted: Array, truth: Array, weight: Array | None) -> float:
        """Return the score of predictions of validation rows."""

    def _row_weights(self, y: Array, weight: Array | None, incremental: bool) -> Array | None:
        """Return the rows' weights in the loss; ``y`` as ``_validate_input`` returns it."""
        return weight

    def _fit(
        self, X: Any, y: Any, sample_weight: Any, *, incremental: bool, X_val: Any = None, y_val: Any = None
    ) -> BaseMLP:
        ahead = None if incremental or X_val is not None else trained_ahead()
        if ahead is not None and ahead.expects(self):
            ahead.collect(X, y, sample_weight)
            return self
        found = None if ahead is None else ahead.take(self, X, y, sample_weight)
        if found is not None:
            self.__dict__.update(found.estimator.__dict__)
            warn_unconverged(found.epochs)
            return self._finish(found.ready)
        before = self.__dict__.copy()
        try:
            ready = self._set_up(X, y, sample_weight, incremental=incremental, X_val=X_val, y_val=y_val)
        except BaseException:
            # a refused call leaves a fitted model unchanged
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        if ready.stochastic:
            with exits(ready.callbacks, ready.model.engine):
                train(epoch_loop(self, ready, incremental=incremental), incremental=incremental)
        else:
            assert isinstance(ready.batches, CalledBatches)
            minimise(self, ready.model, ready.batches)
        return self._finish(ready)

    def _finish(self, ready: Ready) -> BaseMLP:
        """Take over the parameters of the model."""
        self._model = ready.model
        decided = ready.stochastic and self.early_stopping and ready.validation is not None
        self._take((decided and self._best_parameters) or ready.model.parameters())
        self._best_parameters = None
        if not all(np.isfinite(values).all() for values in (*self.coefs_, *self.intercepts_)):
            raise ValueError(
                "Solver produced non-finite parameter weights. The input data may contain large values and need to be "
                "preprocessed."
            )
        return self

    def _set_up(
        self,
        X: Any,
        y: Any,
        sample_weight: Any,
        *,
        incremental: bool = False,
        X_val: Any = None,
        y_val: Any = None,
        together: bool = False,
    ) -> Ready:
        """Check all arguments, draw the initial parameters, set rows aside, and bind the data to a model.

        ``together``: a launch of several models may train it.
        """
        widths = settings.hidden_widths(self.hidden_layer_sizes)
        stochastic = self.solver in settings.STOCHASTIC
        self._refuse(stochastic, incremental, X_val, y_val)
        callbacks = [] if self.callbacks is None else checked_callbacks(self.callbacks)
        if stochastic:
            announce(callbacks, logged(self.early_stopping or X_val is not None), 1 if incremental else self.max_iter)
        first = not hasattr(self, "coefs_") or (not self.warm_start and not incremental)
        X, y = self._validate_input(X, y, incremental, first)
        weight = None if sample_weight is None else _check_sample_weight(sample_weight, X)
        y = y.reshape(-1, 1) if y.ndim == 1 else y
        sizes = [X.shape[1], *widths, y.shape[1]]
        if not first and [coef.shape for coef in self.coefs_] != list(pairwise(sizes)):
            raise ValueError(
                f"hidden_layer_sizes: the layers {sizes} do not continue the fitted ones, "
                f"{[coef.shape for coef in self.coefs_]}. Keep the sizes, or fit with warm_start=False."
            )
        network = settings.network(sizes, self.activation, self.dropout)
        row_weights = self._row_weights(y, weight, incremental)
        if row_weights is not None and not row_weights.any():
            raise ValueError("Sample weights must contain at least one non-zero number.")
        validation = None if X_val is None else self._given_validation(X_val, y_val, y.shape[1])

        self.n_outputs_ = y.shape[1]
        random_state = check_random_state(self.random_state)
        if first:
            self._initialize(network, random_state, X.dtype)
        self._start_accounts(first, stochastic, validation is not None)
        if stochastic and self.early_stopping and validation is None:
            X, y, row_weights, validation = self._split(X, y, row_weights, weight, random_state)
        n = X.shape[0]
        size = settings.rows_of_a_batch(self.batch_size, n) if stochastic else n
        dtype = X.dtype if first else self.coefs_[0].dtype
        model = self._model_for(network, incremental, random_state, dtype, n, size)
        model.load(self.coefs_, self.intercepts_, getattr(self, "slopes_", None))
        target, constants = self._targets(y, model.dtype)
        data = (model, self._objective(self.n_outputs_), dense(X, model.dtype), target, row_weights)
        # a launch of many steps cannot leave out the update of a batch whose weights are all 0
        together = together and shares_launches(model.engine.memory.backend.traits)
        looped = stochastic and not incremental and (row_weights is None or bool(row_weights.all()))
        looped = looped and (model.loops or together)
        rules: dict[str, Any] = {
            "alpha": 0.0 if self.solver == "adamw" else float(self.alpha),
            "batch_size": size,
            "constants": constants,
        }
        batches: Batches
        if looped:
            at_once = epochs_at_once(self, model, n, validation, callbacks)
            batches = ResidentBatches(*data, **rules, at_once=at_once, alone=not together)
        else:
            batches = CalledBatches(*data, **rules, keep=incremental)
        return Ready(stochastic, model, batches, validation, random_state, callbacks)

    def _refuse(self, stochastic: bool, incremental: bool, X_val: Any, y_val: Any) -> None:
        """Raise ValueError for impossible combinations of arguments."""
        if incremental and self.early_stopping:
            raise ValueError("partial_fit does not support early_stopping=True")
        if (X_val is None) != (y_val is None):
            missing = "y_val" if y_val is None else "X_val"
            raise ValueError(f"X_val and y_val belong together, and {missing} is missing.")
        rates = self.dropout if isinstance(self.dropout, list | tuple) else [self.dropout]
        if not stochastic and any(rates):
            raise ValueError(
                f"dropout: lbfgs needs the same loss at each evaluation, got {self.dropout!r}. Use solver='adam'."
            )
        if not stochastic and self.precision not in ("auto", "fp32", "fp64"):
            raise ValueError(f"precision: lbfgs needs 'fp32' or 'fp64', got {self.precision!r}.")

    def _initialize(self, network: Any, random_state: np.random.RandomState, dtype: Any) -> None:
        """Draw weights and biases in scikit-learn's order (Glorot and Bengio, 2010).

        They are uniform in +-sqrt(6 / (K + N)), with a sigmoid in +-sqrt(2 / (K + N)). The output layer's bound is that
        of the last hidden layer's activation.
        """
        hidden = network.activations[:-1]
        after = [*hidden, hidden[-1] if hidden else network.activations[-1]]
        if not hidden and not isinstance(self.activation, list | tuple):
            after = [Activation("sigmoid" if self.activation in ("logistic", "sigmoid") else "identity")]
        self.n_iter_, self.t_ = 0, 0
        self.n_layers_ = network.layers + 1
        self.out_activation_ = self._objective(self.n_outputs_).out_activation
        self.coefs_, self.intercepts_ = [], []
        for (fan_in, fan_out), activation in zip(pairwise(network.sizes), after, strict=True):
            bound = np.sqrt((2.0 if activation.name == "sigmoid" else 6.0) / (fan_in + fan_out))
            weight = random_state.uniform(-bound, bound, (fan_in, fan_out))
            bias = random_state.uniform(-bound, bound, fan_out)
            self.coefs_.append(weight.astype(dtype, copy=False))
            self.intercepts_.append(bias.astype(dtype, copy=False))
        self._set_slopes([np.full(1, one.slope, dtype) if one.name == "prelu" else None for one in network.activations])

    def _set_slopes(self, slopes: list[Any]) -> None:
        """Set ``slopes_`` if a layer has one."""
        if any(slope is not None for slope in slopes):
            self.slopes_ = slopes
        elif hasattr(self, "slopes_"):
            del self.slopes_

    def _start_accounts(self, first: bool, stochastic: bool, validated: bool) -> None:
        """Start the records of a stochastic solver; a warm start continues them."""
        # as in scikit-learn: a warm start that never scores better than before keeps its last parameters
        self._best_parameters = None
        if first:
            slopes = copies(getattr(self, "slopes_", [None] * len(self.coefs_)))
            self._best_parameters = (copies(self.coefs_), copies(self.intercepts_), slopes)
        if not stochastic:
            return
        if first or not hasattr(self, "_stalled_epochs"):
            self._stalled_epochs = 0
        if first or not hasattr(self, "loss_curve_"):
            self.loss_curve_ = []
        by_score = self.early_stopping
        if first or not hasattr(self, "best_loss_") or (self.best_loss_ is None and not by_score):
            self.best_loss_ = None if by_score else np.inf
        scored = by_score or validated
        if first or not hasattr(self, "validation_scores_") or (scored and self.validation_scores_ is None):
            self.validation_scores_ = [] if scored else None
            self.best_validation_score_ = -np.inf if scored else None

    def _split(
        self, X: Any, y: Array, row_weights: Any, weight: Any, random_state: np.random.RandomState
    ) -> tuple[Any, Array, Any, ValidationScore]:
        """Set ``validation_fraction`` of the rows aside, as scikit-learn does: stratified for one column of classes."""
        stratify = y if self._stratifies and self.n_outputs_ == 1 else None
        trained, held = train_test_split(
            np.arange(len(y)), random_state=random_state, test_size=self.validation_fraction, stratify=stratify
        )
        if len(held) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of your dataset."
            )
        score_weights = None if weight is None else weight[held]
        validation = ValidationScore(X[held], self._truth(y[held]), score_weights, True)
        return X[trained], y[trained], None if row_weights is None else row_weights[trained], validation

    def _given_validation(self, X_val: Any, y_val: Any, outputs: int) -> ValidationScore:
        X_val = validate_data(self, X_val, accept_sparse=["csr", "csc"], reset=False)
        y_val = check_array(y_val, accept_sparse="csr", ensure_2d=False, dtype=None, input_name="y_val")
        check_consistent_length(X_val, y_val)
        if y_val.ndim == 2 and y_val.shape[1] == 1:
            y_val = column_or_1d(y_val, warn=True)
        y_val = self._validate_targets(y_val)
        y_val = y_val.reshape(-1, 1) if y_val.ndim == 1 else y_val
        if y_val.shape[1] != outputs:
            raise ValueError(f"y_val has {y_val.shape[1]} outputs, but y has {outputs}.")
        return ValidationScore(X_val, self._truth(y_val), None, bool(self.early_stopping))

    def _model_for(
        self, network: Any, incremental: bool, random_state: np.random.RandomState, dtype: Any, n: int, size: int
    ) -> Model:
        """Return a new model, or the one that ``partial_fit`` goes on with."""
        backend = settings.chosen_backend(self.backend)
        precision = settings.chosen_precision(self.precision, backend, dtype, self.solver)
        loss = self._objective(self.n_outputs_).loss
        model: Model | None = getattr(self, "_model", None)
        if incremental and model is not None and model.serves(network, loss, backend, precision):
            return model
        optimizer = settings.optimizer(self)
        updates = None if incremental else self.max_iter * -(-n // size)
        kind = "schedule" if isinstance(self.learning_rate, Schedule) else self.learning_rate
        if self.solver == "lbfgs":
            kind = "none"
        elif self.solver != "sgd" and kind != "schedule":
            kind = "constant"
        # only dropout draws a seed: without it the random state is consumed as in scikit-learn
        seed = int(random_state.randint(SEEDS)) if any(network.dropouts) else 0
        return Model(
            network,
            loss,
            optimizer,
            schedule=optimizer.schedule.over(updates),
            rates=Rates(kind, float(self.learning_rate_init), float(self.power_t)),
            seed=seed,
            backend=backend,
            precision=precision,
        )

    def _take(self, parameters: tuple[list[Array], list[Array], list[Any]]) -> None:
        self.coefs_, self.intercepts_ = list(parameters[0]), list(parameters[1])
        self._set_slopes(list(parameters[2]))

    def _ask(self, question: str, X: Any) -> Array:
        """Return the model's answer with ``coefs_`` and ``intercepts_``, which the user may have changed."""
        check_is_fitted(self)
        X = validate_data(self, X, accept_sparse=["csr", "csc"], reset=False)
        model: Model | None = getattr(self, "_model", None)
        if model is None:
            sizes = [len(self.coefs_[0]), *(len(bias) for bias in self.intercepts_)]
            network = settings.network(sizes, self.activation, 0.0)
            model = self._model_for(network, False, np.random.RandomState(0), self.coefs_[0].dtype, 1, 1)
        with model.lock:
            model.load(self.coefs_, self.intercepts_, getattr(self, "slopes_", None))
            return np.asarray(getattr(model, question)(X))

    def _check_solver(self) -> bool:
        if self.solver not in settings.STOCHASTIC:
            raise AttributeError(
                f"partial_fit is only available for stochastic optimizers. {self.solver} is not stochastic."
            )
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags
