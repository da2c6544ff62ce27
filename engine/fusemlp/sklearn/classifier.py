"""The classifier."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import numpy as np
from sklearn.base import ClassifierMixin, _fit_context
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import column_or_1d, compute_sample_weight
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import _check_partial_fit_first_call, type_of_target, unique_labels
from sklearn.utils.validation import validate_data

from fusemlp.sklearn.base import Array, BaseMLP, keep_arguments
from fusemlp.sklearn.settings import CONSTRAINTS, UNIT, Objective, classification_objective


def _fitted_binarizer(y: Array) -> LabelBinarizer:
    """Return a ``LabelBinarizer`` fitted to y; models of a search that have the same integers share one.

    It is not changed any more.
    """
    if y.ndim == 1 and y.dtype.kind in "iub":
        classes = np.unique(y)
        # scikit-learn warns of few rows for more classes
        if 2 * len(classes) <= len(y):
            return _binarizer_of(classes.dtype, classes.tobytes())
    return LabelBinarizer().fit(y)


@functools.lru_cache(maxsize=64)
def _binarizer_of(dtype: np.dtype[Any], classes: bytes) -> LabelBinarizer:
    # three rows a class, or scikit-learn would warn
    return LabelBinarizer().fit(np.repeat(np.frombuffer(classes, dtype), 3))


class MLPClassifier(ClassifierMixin, BaseMLP):
    """A multi-layer perceptron for classes, or for several labels a row, that minimises the cross-entropy.

    Parameters that scikit-learn has mean what they mean there: ``hidden_layer_sizes``, ``activation``, ``solver``
    ("adam", "sgd", "lbfgs"), ``alpha``, ``batch_size``, ``learning_rate``, ``learning_rate_init``, ``power_t``,
    ``max_iter``, ``shuffle``, ``random_state``, ``tol``, ``verbose``, ``warm_start``, ``momentum``,
    ``nesterovs_momentum``, ``early_stopping``, ``validation_fraction``, ``beta_1``, ``beta_2``, ``epsilon``,
    ``n_iter_no_change``, ``max_fun``. With the same ``random_state`` the initial parameters, the validation rows and
    the order of the batches are scikit-learn's, and on NumPy the fitted model is, to within rounding.

    Parameters
    ----------
    activation : also "leaky_relu", "prelu", "gelu", "silu", "sigmoid" (another word for "logistic"), an ``Activation``
        of fusemlp's, or a list with one of these for each hidden layer.
    solver : also "adamw", whose decay ``alpha`` is decoupled: not divided by the batch, and no part of ``loss_``.
    learning_rate : also a schedule of ``fusemlp.schedules``, for every solver but lbfgs, with its own rate in place of
        ``learning_rate_init``. A schedule without a length of its own spans ``max_iter`` epochs.
    dropout : float in [0, 1), or a list with one for each hidden layer. Not with lbfgs.
    class_weight : None, "balanced", or a dict from classes to weights, as in scikit-learn's other classifiers.
    label_smoothing : float in [0, 1). How much of a target is spread over all classes.
    clip_norm : float or None. The gradient, penalty included, is scaled down to this norm. Not with lbfgs.
    backend : "numpy", "auto" (the first that works of triton, cupy, numpy), or a name.
    precision : "auto" (on NumPy the type of X, or fp64 with lbfgs; elsewhere fp32), or one that the backend has.
    callbacks : None, or objects like ``fusemlp.Callback``. Their logs have loss, learning_rate and, with validation
        data, val_score. Not with lbfgs.

    Attributes beside scikit-learn's: ``learning_rate_`` is the rate of the next update, ``slopes_`` the learned slopes
    of PReLU layers (only if there are any).
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **CONSTRAINTS,
        "class_weight": [dict, list, StrOptions({"balanced"}), None],
        "label_smoothing": [UNIT],
    }
    loss = "log_loss"
    _stratifies = True

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        activation: Any = "relu",
        *,
        solver: str = "adam",
        alpha: float = 0.0001,
        batch_size: Any = "auto",
        learning_rate: Any = "constant",
        learning_rate_init: float = 0.001,
        power_t: float = 0.5,
        max_iter: int = 200,
        shuffle: bool = True,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: Any = False,
        warm_start: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        n_iter_no_change: Any = 10,
        max_fun: int = 15000,
        dropout: Any = 0.0,
        class_weight: Any = None,
        label_smoothing: float = 0.0,
        clip_norm: float | None = None,
        backend: str = "numpy",
        precision: str = "auto",
        callbacks: Any = None,
    ) -> None:
        keep_arguments(self, locals())

    def _validate_input(self, X: Any, y: Any, incremental: bool, reset: bool) -> tuple[Any, Array]:
        X, y = validate_data(
            self,
            X,
            y,
            accept_sparse=["csr", "csc"],
            multi_output=True,
            dtype=(np.float64, np.float32),
            reset=reset,
        )
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        # fit finds the classes; partial_fit keeps those it was given, and a warm start needs the same ones
        if not hasattr(self, "classes_") or (not self.warm_start and not incremental):
            self._label_binarizer = _fitted_binarizer(y)
            self.classes_ = self._label_binarizer.classes_.copy()
        elif self.warm_start and set(unique_labels(y)) != set(self.classes_):
            raise ValueError(
                "warm_start can only be used where `y` has the same classes as in the previous call to fit. Previously "
                f"got {self.classes_}, `y` has {unique_labels(y)}"
            )
        else:
            self._check_classes(y)
        return X, self._encoded(y)

    def _validate_targets(self, y: Any) -> Array:
        self._check_classes(y)
        return self._encoded(y)

    def _check_classes(self, y: Any) -> None:
        classes = unique_labels(y)
        if len(np.setdiff1d(classes, self.classes_, assume_unique=True)):
            raise ValueError(
                f"`y` has classes not in `self.classes_`. `self.classes_` has {self.classes_}. 'y' has {classes}."
            )

    def _encoded(self, y: Any) -> Array:
        """Return for each row and class, or label, whether it applies; two classes make one column."""
        if y.ndim == 2:
            encoded = self._label_binarizer.transform(y)
            return np.asarray(encoded.toarray() if hasattr(encoded, "toarray") else encoded).astype(bool)
        # LabelBinarizer's result for a vector, in a tenth of its time: two classes make one column
        position = np.searchsorted(self.classes_, y).reshape(-1, 1)
        return np.asarray(position == np.arange(len(self.classes_)) if len(self.classes_) > 2 else position == 1)

    @property
    def _picks_one(self) -> bool:
        """True if a row has one of more than two classes."""
        return bool(self._label_binarizer.y_type_ == "multiclass")

    def _row_weights(self, y: Array, weight: Array | None, incremental: bool) -> Array | None:
        if self.class_weight is None:
            return weight
        if incremental and isinstance(self.class_weight, str):
            raise ValueError(
                "class_weight 'balanced' is not supported for partial_fit, which does not see all of the data. Use "
                "compute_class_weight('balanced', classes=classes, y=y) for a dict of weights to pass as class_weight."
            )
        by_class = compute_sample_weight(self.class_weight, self._label_binarizer.inverse_transform(y))
        return np.asarray(by_class if weight is None else by_class * weight)

    def _objective(self, outputs: int) -> Objective:
        return classification_objective("softmax" if self._picks_one else "logistic", self.label_smoothing)

    def _targets(self, y: Array, dtype: np.dtype[Any]) -> tuple[Array, Array | None]:
        if self._picks_one:
            return np.asarray(y.argmax(axis=1)), None
        # of two classes
        smoothing = self.label_smoothing
        return y.astype(dtype) * dtype.type(1.0 - smoothing) + dtype.type(0.5 * smoothing), None

    def _truth(self, y: Array) -> Array:
        return y.argmax(axis=1) if self._picks_one else y

    def _score_of(self, predicted: Array, truth: Array, weight: Array | None) -> float:
        """Return the accuracy: the share of rows whose labels are all right."""
        right = predicted.reshape(len(truth), -1) == truth.reshape(len(truth), -1)
        return float(np.average(right.all(axis=1), weights=weight))

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, X_val: Any = None, y_val: Any = None) -> MLPClassifier:
        """Fit to X (n, K), dense or sparse, and the classes y (n,) or the labels (n, N) of the rows.

        sample_weight: (n,). X_val, y_val: validation data; its score is recorded in ``validation_scores_`` after each
        epoch and, with ``early_stopping``, decides in place of a part of X.
        """
        return self._fit(X, y, sample_weight, incremental=False, X_val=X_val, y_val=y_val)

    @available_if(lambda estimator: estimator._check_solver())
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> MLPClassifier:
        """Train for one more epoch. ``classes``: all classes that will ever occur; the first call needs them."""
        if _check_partial_fit_first_call(self, classes):
            labels = y if type_of_target(y).startswith("multilabel") else classes
            self._label_binarizer = LabelBinarizer().fit(labels)
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X: Any) -> Any:
        """Return the classes (n,), or the labels (n, N), of X (n, K)."""
        predicted = self._ask("predict", X)
        if self._picks_one:
            return self.classes_[predicted]
        return self._label_binarizer.inverse_transform(predicted)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return the accuracy on X (n, K): the share of rows whose labels are all right."""
        quick = sample_weight is None and isinstance(y, np.ndarray) and y.ndim == 1 and y.dtype.kind in "iub"
        if quick and y.dtype == getattr(getattr(self, "classes_", None), "dtype", None):
            # accuracy_score's result for labels of the model's own type, in a tenth of its time
            predicted = self.predict(X)
            if predicted.shape == y.shape:
                return float(np.average(predicted == y))
        return float(super().score(X, y, sample_weight))

    def predict_proba(self, X: Any) -> Array:
        """Return the probabilities (n, N) of the classes, in the order of ``classes_``, or of each label."""
        return self._ask("predict_proba", X)

    def predict_log_proba(self, X: Any) -> Array:
        """Return the logarithms of ``predict_proba``."""
        probabilities = self.predict_proba(X)
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(probabilities, out=probabilities))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags
