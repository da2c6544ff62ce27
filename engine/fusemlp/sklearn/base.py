"""The common base of the classifier and the regressor."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context
from sklearn.model_selection import train_test_split
from sklearn.utils import check_array, check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from fusemlp.callbacks.forms import announce, checked_callbacks, exits
from fusemlp.describe.losses import Loss
from fusemlp.describe.network import MLP
from fusemlp.describe.optimizers import Schedule
from fusemlp.inputs.arrays import Array, is_sparse
from fusemlp.inputs.columns import Columns, coding_of, from_sparse
from fusemlp.report.onnx import to_onnx
from fusemlp.runtime.files import CHECKPOINT, reading_file
from fusemlp.runtime.plans import TRAITS, shares_launches
from fusemlp.sklearn import settings
from fusemlp.sklearn.batches import CalledBatches, HeldLoss, ResidentBatches, Validation
from fusemlp.sklearn.model import Model, Rates, read_estimator, save_estimator
from fusemlp.sklearn.settings import Objective
from fusemlp.sklearn.solvers import SklearnPolicy, minimise, train
from fusemlp.training.loop import EpochLoop, epochs_at_once
from fusemlp.training.trainer import FitState, History

# attributes that a file holds as tensors, makes anew, or leaves out
NOT_AS_JSON = ("coefs_", "intercepts_", "slopes_", "_model", "_metadata_request")


def has_steps(estimator: Any) -> bool:
    """Return True if the solver can take single steps; raises AttributeError if not."""
    if (solver := estimator.solver) not in settings.STOCHASTIC:
        raise AttributeError(f"partial_fit is only available for stochastic optimizers. {solver} is not stochastic.")
    return True


def _is_plain(X: Any, y: Any = None) -> bool:
    """Return whether scikit-learn's checks would return both as they are; they take longer than a small fit does."""
    arrays = [X] if y is None else [X, y]
    if any(type(array) is not np.ndarray or array.dtype.kind not in "biuf" for array in arrays):
        return False
    if X.ndim != 2 or not X.size or X.dtype not in (np.float64, np.float32) or (y is not None and y.shape != (len(X),)):
        return False
    with np.errstate(all="ignore"):
        # a sum of finite numbers may be infinite, and then the checks decide
        return all(np.isfinite(array.sum()) for array in arrays)


class BaseMLP(settings.Parameters, BaseEstimator, ABC):
    """Checks parameters and data as scikit-learn does, and trains with an engine."""

    _parameter_constraints: ClassVar[dict[str, Any]] = settings.CONSTRAINTS

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # Python's -OO leaves no documentation
        shared = (settings.Parameters.__doc__ or "").partition("\n\n")[2]
        if BaseMLP in cls.__bases__:
            cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n{shared}"

    # cached: a search asks four times a model, and reading a signature is slow
    @classmethod
    @functools.cache
    def _get_param_names(cls) -> list[str]:
        return list(super()._get_param_names())

    @abstractmethod
    def _validate_targets(self, y: Any) -> Array:
        """Return targets, (n,) or (n, N), checked and as numbers."""

    @abstractmethod
    def _objective(self, outputs: int) -> Objective:
        """Return the objective to minimise."""

    @abstractmethod
    def _targets(self, y: Array, dtype: np.dtype[Any]) -> tuple[Array, Array | None]:
        """Return the engine's targets (n, N), and the parts (n,) of the losses that the engine leaves out."""

    @abstractmethod
    def _score_of(self, predicted: Array, truth: Array, weight: Array | None) -> float:
        """Return the score of predictions of validation rows."""

    def _truth(self, y: Array) -> Array:
        """Return targets (n, N) in the form of the model's predictions."""
        return y

    def _row_weights(self, y: Array, weight: Array | None, incremental: bool) -> Array | None:
        """Return the rows' weights in the loss; ``y`` as ``_validate_input`` returns it."""
        return weight

    def _held_weights(self, y_val: Array, y: Array) -> Array | None:
        """Return the weights in the loss of validation rows y_val, for training rows y."""
        return None

    def _validate_input(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Any, Array]:
        """Return X and the targets, checked and as numbers."""
        if reset and y is not None and not hasattr(self, "feature_names_in_") and _is_plain(X, y):
            self.n_features_in_ = X.shape[1]
            return X, self._encode(y, not incremental)
        X, y = validate_data(
            self,
            X,
            y,
            accept_sparse=["csr", "csc"],
            multi_output=True,
            y_numeric=not isinstance(self, ClassifierMixin),
            dtype=(np.float64, np.float32),
            reset=reset,
        )
        y = column_or_1d(y, warn=True) if y.ndim == 2 and y.shape[1] == 1 else y
        return X, self._encode(y, reset and not incremental)

    def _encode(self, y: Array, fresh: bool) -> Array:
        """Return the targets of a fit as numbers; a ``fresh`` one begins anew."""
        return self._validate_targets(y)

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, X_val: Any = None, y_val: Any = None) -> Self:
        """Fit to X (n, K), dense or sparse, and its targets: values or classes y (n,), values or labels y (n, N).

        sample_weight: (n,). X_val, y_val: validation data; its score and loss after each epoch are recorded in
        ``validation_scores_`` and ``validation_loss_curve_``; ``early_stopping`` goes by it, and not by a part of X.
        """
        return self._fit(X, y, sample_weight, (X_val, y_val))

    def _fit(self, X: Any, y: Any, sample_weight: Any, held: Any = (None, None), *, incremental: bool = False) -> Self:
        before = self.__dict__.copy()
        try:
            epochs = self._set_up(X, y, sample_weight, held, incremental=incremental)
        except BaseException:
            # a refused call leaves a fitted model unchanged
            self.__dict__ = before
            raise
        if self.solver in settings.STOCHASTIC:
            try:
                with exits(epochs.callbacks, epochs.engine):
                    train(epochs, incremental=incremental)
            except Exception:
                self.__dict__ = before
                raise
        else:
            minimise(epochs.policy)
        return self._finish(epochs.policy)

    def _finish(self, policy: SklearnPolicy) -> Self:
        """Take over the parameters of the model."""
        self._model = policy.model
        decided = policy.held is not None and policy.held.rows.decides
        self._take(*((decided and policy.best) or policy.model.parameters()))
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
        held: Any,
        *,
        incremental: bool = False,
        make: Callable[..., Model] | None = None,
    ) -> EpochLoop[SklearnPolicy]:
        """Check all arguments, draw initial parameters, set rows aside, and bind the data to a model of ``make``."""
        stochastic = self.solver in settings.STOCHASTIC
        X_val, y_val = held
        settings.check_parameters(self, incremental, X_val, y_val)
        callbacks = [] if self.callbacks is None else checked_callbacks(self.callbacks)
        last_epoch = 1 if incremental else self.max_iter
        if stochastic:
            scores = ["val_loss", "val_score"] if self.early_stopping or X_val is not None else []
            announce(callbacks, ["loss", "learning_rate", *scores], last_epoch)
        first = not hasattr(self, "coefs_") or (not self.warm_start and not incremental)
        X, y = self._validate_input(X, y, incremental, first)
        weight = None if sample_weight is None else _check_sample_weight(sample_weight, X)
        y = y.reshape(-1, 1) if y.ndim == 1 else y
        objective = self._objective(y.shape[1])
        objective.loss.check_given()
        outputs = y.shape[1] * objective.loss.width
        sizes = [X.shape[1], *settings.hidden_widths(self.hidden_layer_sizes), outputs]
        if not first and [coef.shape for coef in self.coefs_] != list(pairwise(sizes)):
            raise ValueError(
                f"hidden_layer_sizes: the layers {sizes} do not continue the fitted ones, "
                f"{[coef.shape for coef in self.coefs_]}. Keep the sizes, or fit with warm_start=False."
            )
        network = settings.network(sizes, self.activation, self.dropout)
        row_weights = self._row_weights(y, weight, incremental)
        if row_weights is not None and not row_weights.any():
            raise ValueError("Sample weights must contain at least one non-zero number.")
        if row_weights is not None:
            objective.loss.check_weights("sample_weight" if weight is not None else "class_weight")
        validation = None if X_val is None else self._given_validation(X_val, y_val, y)

        self.n_outputs_ = y.shape[1]
        random_state = check_random_state(self.random_state)
        if first:
            self.n_iter_, self.t_ = 0, 0
            self.n_layers_ = network.layers + 1
            self.out_activation_ = objective.out_activation
            self._take(*settings.initial_parameters(network, self.activation, random_state, X.dtype))
        if stochastic:
            self._start_accounts(first, validation is not None)
        if stochastic and self.early_stopping and validation is None:
            X, y, row_weights, validation = self._split(X, y, row_weights, weight, random_state)
        n = X.shape[0]
        size = settings.rows_of_a_batch(self.batch_size, n) if stochastic else n
        model = self._model_for(network, objective.loss, incremental, random_state, -(-n // size), make or Model)
        model.load(self.coefs_, self.intercepts_, getattr(self, "slopes_", None))
        data, constants = self._data(X, y, model)
        model.engine.lay_out(coding_of(data["x"]))
        alpha = 0.0 if self.solver == "adamw" else float(self.alpha)
        passes = settings.step_passes(self, model.engine, data["x"])
        rules = (model, objective, data, row_weights, constants, alpha, size, passes)
        # a launch of many steps cannot leave out the update of a batch whose weights are all 0
        traits = model.engine.memory.backend.traits
        together = make is not None and shares_launches(traits) and not passes
        weighed = row_weights is None or bool(row_weights.all())
        # IBP trains against more from update to update
        ramps = getattr(self.adversarial, "ramps", False)
        looped = stochastic and not incremental and weighed and not ramps and not objective.loss.on_host
        batches: ResidentBatches | CalledBatches
        if looped and (together or (model.engine.plan == "resident" and (traits.on_host or not passes))):
            asked = validation is not None or bool(callbacks) or bool(self.verbose) or model.rates.kind == "invscaling"
            at_once = epochs_at_once(model.engine, int(min(self.max_iter, self.n_iter_no_change + 1)), n, asked=asked)
            batches = ResidentBatches(*rules, at_once=at_once, alone=not together)
        else:
            batches = CalledBatches(*rules, keep=incremental)
        if ramps:
            assert isinstance(batches, CalledBatches)
            batches.train_against(self.adversarial, self.max_iter)
        # as in scikit-learn: a warm start that never scores better than before keeps its last parameters; so does a fit
        # that ends within a ramp, where epochs are not judged
        begins = first and stochastic and not ramps
        best = (self.coefs_, self.intercepts_, getattr(self, "slopes_", [])) if begins else None
        state = FitState(0, 0, last_epoch, total_updates=0, history=History())
        held_loss = None
        if stochastic and validation is not None:
            held_loss = HeldLoss(model, objective, validation, *self._data(validation.X, validation.y, model))
        policy = SklearnPolicy(self, model, batches, state, held_loss, random_state, best)
        if ramps:
            policy.settles = self.adversarial.settled(self.max_iter)
        counts = size, len(batches.starts), batches.at_once
        return EpochLoop(model.engine, batches.steps, policy, state, *counts, callbacks)

    def _take(self, coefs: list[Array], intercepts: list[Array], slopes: list[Any]) -> None:
        """Set the parameters; ``slopes_`` only if a layer has one."""
        self.coefs_, self.intercepts_ = coefs, intercepts
        if any(slope is not None for slope in slopes):
            self.slopes_ = slopes
        elif hasattr(self, "slopes_"):
            del self.slopes_

    def _start_accounts(self, first: bool, validated: bool) -> None:
        """Start the records of a stochastic solver; a warm start continues them."""
        kept = {} if first else vars(self)
        scored = self.early_stopping or validated
        self._stalled_epochs = kept.get("_stalled_epochs", 0)
        self.loss_curve_ = kept.get("loss_curve_", [])
        self.best_loss_ = kept.get("best_loss_")
        if self.best_loss_ is None and not self.early_stopping:
            self.best_loss_ = np.inf
        self.validation_scores_ = kept.get("validation_scores_")
        self.validation_loss_curve_ = kept.get("validation_loss_curve_") or ([] if scored else None)
        if self.validation_scores_ is None:
            self.validation_scores_ = [] if scored else None
            self.best_validation_score_ = -np.inf if scored else None

    def _split(
        self, X: Any, y: Array, row_weights: Any, weight: Any, random_state: np.random.RandomState
    ) -> tuple[Any, Array, Any, Validation]:
        """Set ``validation_fraction`` of the rows aside, as scikit-learn does: stratified for one column of classes."""
        stratify = y if isinstance(self, ClassifierMixin) and self.n_outputs_ == 1 else None
        trained, held = train_test_split(
            np.arange(len(y)), random_state=random_state, test_size=self.validation_fraction, stratify=stratify
        )
        if len(held) < 2:
            raise ValueError(
                "The validation set is too small. Increase 'validation_fraction' or the size of your dataset."
            )
        score_weights = None if weight is None else weight[held]
        loss_weights = None if row_weights is None else row_weights[held]
        validation = Validation(X[held], y[held], self._truth(y[held]), score_weights, loss_weights, True)
        return X[trained], y[trained], None if row_weights is None else row_weights[trained], validation

    def _given_validation(self, X_val: Any, y_val: Any, y: Array) -> Validation:
        X_val = validate_data(self, X_val, accept_sparse=["csr", "csc"], reset=False)
        dtype = None if isinstance(self, ClassifierMixin) else "numeric"
        y_val = check_array(y_val, accept_sparse="csr", ensure_2d=False, dtype=dtype, input_name="y_val")
        check_consistent_length(X_val, y_val)
        y_val = column_or_1d(y_val, warn=True) if y_val.ndim == 2 and y_val.shape[1] == 1 else y_val
        y_val = self._validate_targets(y_val)
        y_val = y_val.reshape(-1, 1) if y_val.ndim == 1 else y_val
        if y_val.shape[1] != y.shape[1]:
            raise ValueError(f"y_val has {y_val.shape[1]} outputs, but y has {y.shape[1]}.")
        row_weights = self._held_weights(y_val, y)
        return Validation(X_val, y_val, self._truth(y_val), None, row_weights, bool(self.early_stopping))

    def _data(self, X: Any, y: Array, model: Model) -> tuple[dict[str, Any], Array | None]:
        """Return rows, perhaps Columns, and their targets by the engine's names, and the constants of ``_targets``."""
        target, constants = self._targets(y, model.dtype)
        if is_sparse(X):
            X = from_sparse("X", X, model.dtype, codes=model.engine.inputs.reads_codes and self.adversarial is None)
        rows = X if isinstance(X, Columns) else np.require(X, model.dtype, ["C", "A"])
        return {"x": rows, "target": target}, constants

    def _model_for(
        self,
        network: MLP,
        loss: Loss,
        incremental: bool,
        random_state: np.random.RandomState,
        batches: int,
        make: Callable[..., Model] = Model,
    ) -> Model:
        """Return a new model, or the one that ``partial_fit`` goes on with."""
        backend, precision = settings.backend_of(self, loss), self.precision
        if precision == "auto":
            exact = self.solver == "lbfgs" or self.coefs_[0].dtype == np.float64
            precision = "fp64" if exact and "fp64" in TRAITS[backend].precisions else "fp32"
        model: Model | None = getattr(self, "_model", None)
        if incremental and model is not None and model.serves(network, loss, backend, precision):
            model.engine.take_loss(loss)
            return model
        optimizer = settings.optimizer(self)
        kind = "schedule" if isinstance(self.learning_rate, Schedule) else self.learning_rate
        if self.solver == "lbfgs":
            kind = "none"
        elif self.solver != "sgd" and kind != "schedule":
            kind = "constant"
        # only dropout draws a seed: without it the random state is consumed as in scikit-learn
        seed = int(random_state.randint(2**31)) if any(network.dropouts) else 0
        rates = Rates(kind, float(self.learning_rate_init), float(self.power_t))
        schedule = optimizer.schedule.over(None if incremental else self.max_iter * batches)
        return make(network, loss, optimizer, schedule, rates, seed=seed, backend=backend, precision=precision)

    def _ask(self, question: str, X: Any) -> Array:
        """Return the model's answer."""
        check_is_fitted(self)
        if hasattr(self, "feature_names_in_") or not _is_plain(X) or X.shape[1] != self.n_features_in_:
            X = validate_data(self, X, accept_sparse=["csr", "csc"], reset=False)
        with self._own_model() as model:
            return model.ask(question, X)

    @contextmanager
    def _own_model(self) -> Iterator[Model]:
        """Give the model with ``coefs_`` and ``intercepts_``, which the user may have changed, to one thread."""
        model: Model | None = getattr(self, "_model", None)
        if model is None:
            sizes = [len(self.coefs_[0]), *(len(bias) for bias in self.intercepts_)]
            network = settings.network(sizes, self.activation, 0.0)
            model = self._model_for(network, self._objective(self.n_outputs_).loss, False, np.random.RandomState(0), 1)
        with model.engine.inference.forward.turn:
            model.load(self.coefs_, self.intercepts_, getattr(self, "slopes_", None))
            yield model

    def to_onnx(self, path: str | Path) -> None:
        """Write an ONNX graph, ``fusemlp.onnx``, that takes X and whose ``prediction`` is that of ``predict``.

        X is float32, and double if the model is fp64, as on NumPy after a fit to float64. Steps before the estimator in
        a ``Pipeline`` are not in the graph.
        """
        check_is_fitted(self)
        with self._own_model() as model:
            to_onnx(model.engine, path, classes=self._onnx_classes())

    def _onnx_classes(self) -> Any:
        """Return the labels that an ONNX graph predicts, or None for numbers."""
        return None

    def save(self, path: str | Path) -> None:
        """Write the fitted estimator to one safetensors file, without pickle; ``load`` reads it.

        The file is a checkpoint of the network too, for ``fusemlp.load``. ``partial_fit`` continues from it with the
        same bits. ``callbacks``, metadata requests and a ``random_state`` that is no number are left out.

        Raises ArgumentError, ArgumentTypeError for an impossible path or parameter of a file, OSError from the disk.
        """
        check_is_fitted(self)
        with self._own_model() as model:
            rates = model.rates
            state = {"schedule": model.schedule, "rates": (rates.kind, rates.initial, rates.power)}
            save_estimator(self, model.engine, path, without=NOT_AS_JSON, **state, plateau=model.plateau)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Return the estimator that ``save`` wrote, on NumPy without its backend; CheckpointError for other files."""
        estimator, beside, content = read_estimator(cls, path)
        with reading_file(path, CHECKPOINT):
            estimator._restore(content, **beside)
        return estimator

    def _restore(self, content: Any, *, schedule: Schedule, rates: Any, plateau: Any) -> None:
        self._model = Model.restored(content, schedule, rates, plateau)
        self._take(*self._model.parameters())

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags
