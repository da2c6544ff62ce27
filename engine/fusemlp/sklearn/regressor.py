"""The regressor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np
from scipy.special import xlogy
from sklearn.base import RegressorMixin, _fit_context
from sklearn.metrics import r2_score
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.metaestimators import available_if

from fusemlp.describe import losses
from fusemlp.describe.conflicts import check_together
from fusemlp.describe.losses import Loss, OwnLoss, as_loss
from fusemlp.inputs.arrays import Array
from fusemlp.sklearn.base import BaseMLP, has_steps
from fusemlp.sklearn.settings import CONSTRAINTS, Objective

# losses that scikit-learn does not have, as means over the outputs, and the kinds of those that are given as objects
OBJECTS = losses.Huber, losses.Quantile, losses.Quantiles, losses.GaussianNLL
MEAN_LOSSES: dict[str, Loss] = {"absolute_error": losses.MAE(), "huber": losses.Huber(), "quantile": losses.Quantile()}


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
