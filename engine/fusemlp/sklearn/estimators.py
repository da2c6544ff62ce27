"""The classifier and the regressor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from scipy.special import xlogy
from sklearn.base import ClassifierMixin, RegressorMixin, _fit_context
from sklearn.metrics import r2_score
from sklearn.preprocessing import LabelBinarizer
from sklearn.utils import compute_sample_weight
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.multiclass import _check_partial_fit_first_call, type_of_target, unique_labels

from fusemlp.describe import losses
from fusemlp.describe.conflicts import check_together, in_use
from fusemlp.describe.losses import BinaryCrossEntropy, CrossEntropy, Loss, OwnLoss, as_loss
from fusemlp.inputs.arrays import Array
from fusemlp.sklearn.base import BaseMLP, has_steps
from fusemlp.sklearn.settings import CONSTRAINTS, UNIT, Objective

# losses that scikit-learn does not have, as means over the outputs, and the kinds of those that are given as objects
OBJECTS = losses.Huber, losses.Quantile, losses.Quantiles, losses.GaussianNLL
MEAN_LOSSES: dict[str, Loss] = {"absolute_error": losses.MAE(), "huber": losses.Huber(), "quantile": losses.Quantile()}


def _classes_of(y: Array) -> tuple[Array, bool]:
    """Return the classes of y, and whether its rows have several labels, as ``LabelBinarizer`` finds them."""
    if y.ndim == 1 and y.dtype.kind in "iub":
        classes = np.unique(y).astype(y.dtype.newbyteorder("="))
        # scikit-learn warns of few rows for more classes
        if 2 * len(classes) <= len(y):
            return classes, False
    binarizer = LabelBinarizer().fit(y)
    return binarizer.classes_, binarizer.y_type_.startswith("multilabel")


@dataclass(eq=False, repr=False, kw_only=True)
class MLPClassifier(ClassifierMixin, BaseMLP):
    """A multi-layer perceptron for classes, or for several labels a row, that minimises the cross-entropy.

    Parameters
    ----------
    class_weight : None, "balanced", or a dict from classes to weights, as in scikit-learn's other classifiers.
    label_smoothing : float in [0, 1). How much of a target is spread over all classes.
    loss : "log_loss", or a function ``f(outputs, targets) -> (loss, gradient)``, as ``fusemlp.losses.OwnLoss`` says.
        ``outputs`` are logits: (n, N) with the indices (n,) of more than two classes, (n, 1) or (n, N) with 0 or 1 for
        two classes or several labels. ``weights`` are those of rows and classes. On NumPy.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **CONSTRAINTS,
        "class_weight": [dict, list, StrOptions({"balanced"}), None],
        "label_smoothing": [UNIT],
        "loss": [StrOptions({"log_loss"}), OwnLoss, callable],
    }

    class_weight: Any = None
    label_smoothing: float = 0.0
    loss: Any = "log_loss"

    def _encode(self, y: Array, fresh: bool) -> Array:
        # fit finds the classes; partial_fit keeps those it was given, and a warm start needs the same ones
        if fresh:
            self.classes_, self._several_labels = _classes_of(y)
            return self._encoded(y)
        if self.warm_start and set(unique_labels(y)) != set(self.classes_):
            raise ValueError(
                "warm_start can only be used where `y` has the same classes as in the previous call to fit. Previously "
                f"got {self.classes_}, `y` has {unique_labels(y)}"
            )
        return self._validate_targets(y)

    def _validate_targets(self, y: Any) -> Array:
        classes = unique_labels(y)
        if len(np.setdiff1d(classes, self.classes_, assume_unique=True)):
            raise ValueError(
                f"`y` has classes not in `self.classes_`. `self.classes_` has {self.classes_}. 'y' has {classes}."
            )
        return self._encoded(y)

    def _encoded(self, y: Any) -> Array:
        """Return for each row and class, or label, whether it applies; two classes make one column."""
        if y.ndim == 2:
            if not self._several_labels:
                raise ValueError("The object was not fitted with multilabel input.")
            return np.asarray(y.toarray() if hasattr(y, "toarray") else y).astype(bool)
        position = np.searchsorted(self.classes_, y).reshape(-1, 1)
        return np.asarray(position == np.arange(len(self.classes_)) if len(self.classes_) > 2 else position == 1)

    @property
    def _picks_one(self) -> bool:
        """True if a row has one of more than two classes."""
        return not self._several_labels and len(self.classes_) > 2

    def _labels(self, codes: Array) -> Any:
        """Return the classes with these indices; of several labels a row, whether each applies."""
        if self._several_labels:
            return codes.astype(int)
        # a single class is predicted by either sign of the logit
        return self.classes_[np.minimum(codes.ravel(), len(self.classes_) - 1)]

    def _row_weights(self, y: Array, weight: Array | None, incremental: bool) -> Array | None:
        if self.class_weight is None:
            return weight
        if incremental and isinstance(self.class_weight, str):
            raise ValueError(
                "class_weight 'balanced' is not supported for partial_fit, which does not see all of the data. Use "
                "compute_class_weight('balanced', classes=classes, y=y) for a dict of weights to pass as class_weight."
            )
        by_class = compute_sample_weight(self.class_weight, self._labels(self._truth(y)))
        return np.asarray(by_class if weight is None else by_class * weight)

    def _held_weights(self, y_val: Array, y: Array) -> Array | None:
        if self.class_weight is None:
            return None
        labels = np.concatenate([self._labels(self._truth(rows)) for rows in (y, y_val)])
        # balanced are the training rows
        counted = np.arange(len(y)) if isinstance(self.class_weight, str) else None
        return np.asarray(compute_sample_weight(self.class_weight, labels, indices=counted)[len(y) :])

    def _objective(self, outputs: int) -> Objective:
        loss: Loss = BinaryCrossEntropy(reduction="sum")
        if self._picks_one:
            loss = CrossEntropy(label_smoothing=self.label_smoothing, reduction="sum")
        out_activation = "softmax" if self._picks_one else "logistic"
        if self.loss != "log_loss":
            own = as_loss(self.loss)
            assert isinstance(own, OwnLoss)
            loss = replace(own, like=loss)
            check_together({**loss.uses, **in_use(label_smoothing=self.label_smoothing or None)})
        return Objective(loss, out_activation=out_activation)

    def _targets(self, y: Array, dtype: np.dtype[Any]) -> tuple[Array, Array | None]:
        if self._picks_one:
            return np.asarray(y.argmax(axis=1)), None
        # of two classes
        smoothing = self.label_smoothing
        return y.astype(dtype) * dtype.type(1.0 - smoothing) + dtype.type(0.5 * smoothing), None

    def _truth(self, y: Array) -> Array:
        return y.argmax(axis=1) if self._picks_one else y

    def _score_of(self, predicted: Array, truth: Array, weight: Array | None) -> float:
        # the accuracy: the share of rows whose labels are all right
        right = predicted.reshape(len(truth), -1) == truth.reshape(len(truth), -1)
        return float(np.average(right.all(axis=1), weights=weight))

    @available_if(has_steps)
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None, classes: Any = None) -> Self:
        """Train for one more epoch. ``classes``: all classes that will ever occur; the first call needs them."""
        if _check_partial_fit_first_call(self, classes):
            self._several_labels = type_of_target(y).startswith("multilabel")
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X: Any) -> Any:
        """Return the classes (n,), or the labels (n, N), of X (n, K)."""
        return self._labels(self._ask("predict", X))

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

    def _onnx_classes(self) -> Any:
        # labels of several a row are 0 and 1
        if self._several_labels:
            return None
        # a single class is predicted by either sign of the logit
        return np.repeat(self.classes_, 2) if len(self.classes_) == 1 else self.classes_

    def _restore(self, content: Any, *, several_labels: bool | None = None, **state: Any) -> None:
        super()._restore(content, **state)
        # files of earlier releases have it apart
        if several_labels is not None:
            self._several_labels = several_labels

    def __setstate__(self, state: dict[str, Any]) -> None:
        # pickles of earlier releases have a fitted LabelBinarizer
        binarizer = state.pop("_label_binarizer", None)
        if binarizer is not None:
            state["_several_labels"] = binarizer.y_type_.startswith("multilabel")
        super().__setstate__(state)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags


@dataclass(eq=False, repr=False)
class _Loss:
    # scikit-learn's first parameter: a dataclass takes the last base's fields first
    loss: Any = "squared_error"


@dataclass(eq=False, repr=False)
class MLPRegressor(RegressorMixin, BaseMLP, _Loss):
    """A multi-layer perceptron for one or several real targets a row.

    Parameters
    ----------
    loss : "squared_error" (half the square), "poisson" (the output is the logarithm of the mean), "absolute_error",
        "huber", "quantile" (the median), ``fusemlp.Huber(delta)``, ``fusemlp.Quantile(q)``: these are output means.
        ``fusemlp.Quantiles(q)``, of one target: ``predict`` returns the quantiles (n, Q), which never cross, and the
        score is that of the middle one. ``fusemlp.GaussianNLL()``: ``predict`` returns deviations too.
        A function ``f(outputs, targets) -> (loss, gradient)`` of arrays (n, N), as ``fusemlp.losses.OwnLoss`` says;
        with a parameter ``weights`` it takes ``sample_weight``. On NumPy.
    """

    _parameter_constraints: ClassVar[dict[str, Any]] = {
        **CONSTRAINTS,
        "loss": [StrOptions({"squared_error", "poisson", *MEAN_LOSSES}), *OBJECTS, OwnLoss, callable],
    }

    def _validate_targets(self, y: Any) -> Array:
        if self.loss == "poisson" and y.min() < 0:
            raise ValueError(f"loss='poisson' requires y >= 0, got {y.min()}; use another loss for negative targets.")
        return np.asarray(y)

    def _objective(self, outputs: int) -> Objective:
        # scikit-learn's: half the square, summed over the outputs for the gradient, averaged in the report
        if self.loss == "squared_error":
            return Objective(losses.MSE(reduction="sum"), 0.5, outputs)
        if self.loss == "poisson":
            return Objective(losses.Poisson(reduction="sum"), out_activation="exp")
        loss = MEAN_LOSSES[self.loss] if isinstance(self.loss, str) else as_loss(self.loss)
        several = {"several targets": outputs} if outputs > 1 else {}
        check_together({**loss.uses, **several, "estimator": True})
        if isinstance(loss, OwnLoss):
            return Objective(loss)
        summands = loss.spec(accuracy=False).summands(outputs * loss.width)
        return Objective(replace(loss, reduction="sum"), 1.0 / summands)

    def _targets(self, y: Array, dtype: np.dtype[Any]) -> tuple[Array, Array | None]:
        target = np.require(y, dtype, ["C", "A"])
        if self.loss != "poisson":
            return target, None
        # turns the likelihood into the deviance: a perfect prediction has loss 0
        return target, (xlogy(y, y) - y).sum(axis=1)

    def _score_of(self, predicted: Array, truth: Array, weight: Array | None) -> float:
        """Return R squared; NaN if a prediction is not finite."""
        predicted, _ = self._objective(truth.shape[1]).loss.judged(predicted)
        if not np.isfinite(predicted).all():
            return float("nan")
        return float(r2_score(truth, predicted, sample_weight=weight))

    @available_if(has_steps)
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train for one more epoch."""
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """Return the predicted targets of X (n, K): (n,), or (n, N) for several; with Quantiles (n, Q).

        With return_std, of the loss GaussianNLL alone, return them and their standard deviations, of the same shape.
        """
        return tuple(self._ask("predict_std", X)) if return_std else self._ask("predict", X)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Return R squared on X (n, K) and y, with Quantiles that of the middle one."""
        predicted = self.predict(X)
        # that of the fit: a parameter may have been set since
        with self._own_model() as model:
            judged, _ = model.engine.loss.judged(predicted)
        return float(r2_score(y, judged, sample_weight=sample_weight))
