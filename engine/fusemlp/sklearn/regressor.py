"""The regressor."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from scipy.special import xlogy
from sklearn.base import RegressorMixin, _fit_context
from sklearn.metrics import r2_score
from sklearn.utils import check_array, column_or_1d
from sklearn.utils._param_validation import StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import validate_data

from fusemlp.describe.losses import Huber, Quantile
from fusemlp.sklearn.base import Array, BaseMLP, keep_arguments
from fusemlp.sklearn.settings import CONSTRAINTS, REGRESSION_LOSSES, Objective, regression_objective


class MLPRegressor(RegressorMixin, BaseMLP):
    """A multi-layer perceptron for one or several real targets a row.

    Parameters that scikit-learn has mean what they mean there: ``hidden_layer_sizes``, ``activation``, ``solver``
    ("adam", "sgd", "lbfgs"), ``alpha``, ``batch_size``, ``learning_rate``, ``learning_rate_init``, ``power_t``,
    ``max_iter``, ``shuffle``, ``random_state``, ``tol``, ``verbose``, ``warm_start``, ``momentum``,
    ``nesterovs_momentum``, ``early_stopping``, ``validation_fraction``, ``beta_1``, ``beta_2``, ``epsilon``,
    ``n_iter_no_change``, ``max_fun``. With the same ``random_state`` the initial parameters, the validation rows and
    the order of the batches are scikit-learn's, and on NumPy the fitted model is, to within rounding.

    Parameters
    ----------
    loss : "squared_error" (half the square), "poisson" (the output is the logarithm of the mean), "absolute_error",
        "huber", "quantile" (the median), or ``fusemlp.Huber(delta)``, ``fusemlp.Quantile(q)``. The last three are
        means over the outputs.
    activation : also "leaky_relu", "prelu", "gelu", "silu", "sigmoid" (another word for "logistic"), an ``Activation``
        of fusemlp's, or a list with one of these for each hidden layer.
    solver : also "adamw", whose decay ``alpha`` is decoupled: not divided by the batch, and no part of ``loss_``.
    learning_rate : also a schedule of ``fusemlp.schedules``, for every solver but lbfgs, with its own rate in place of
        ``learning_rate_init``. A schedule without a length of its own spans ``max_iter`` epochs.
    dropout : float in [0, 1), or a list with one for each hidden layer. Not with lbfgs.
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
        "loss": [StrOptions(set(REGRESSION_LOSSES)), Huber, Quantile],
    }
    _stratifies = False

    def __init__(
        self,
        loss: Any = "squared_error",
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
            y_numeric=True,
            dtype=(np.float64, np.float32),
            reset=reset,
        )
        if y.ndim == 2 and y.shape[1] == 1:
            y = column_or_1d(y, warn=True)
        return X, self._check_counts(y)

    def _validate_targets(self, y: Any) -> Array:
        return self._check_counts(check_array(y, ensure_2d=False, dtype="numeric", input_name="y_val"))

    def _check_counts(self, y: Any) -> Array:
        if self.loss == "poisson" and y.min() < 0:
            raise ValueError(f"loss='poisson' requires y >= 0, got {y.min()}; use another loss for negative targets.")
        return np.asarray(y)

    def _objective(self, outputs: int) -> Objective:
        return regression_objective(self.loss, outputs)

    def _targets(self, y: Array, dtype: np.dtype[Any]) -> tuple[Array, Array | None]:
        target = np.require(y, dtype, ["C", "A"])
        if self.loss != "poisson":
            return target, None
        # turns the likelihood into the deviance: a perfect prediction has loss 0
        return target, (xlogy(y, y) - y).sum(axis=1)

    def _truth(self, y: Array) -> Array:
        return y

    def _score_of(self, predicted: Array, truth: Array, weight: Array | None) -> float:
        """Return R squared; NaN if a prediction is not finite."""
        if not np.isfinite(predicted).all():
            return float("nan")
        return float(r2_score(truth, predicted, sample_weight=weight))

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(self, X: Any, y: Any, sample_weight: Any = None, *, X_val: Any = None, y_val: Any = None) -> MLPRegressor:
        """Fit to X (n, K), dense or sparse, and the targets y (n,) or (n, N).

        sample_weight: (n,). X_val, y_val: validation data; its score is recorded in ``validation_scores_`` after each
        epoch and, with ``early_stopping``, decides in place of a part of X.
        """
        return self._fit(X, y, sample_weight, incremental=False, X_val=X_val, y_val=y_val)

    @available_if(lambda estimator: estimator._check_solver())
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> MLPRegressor:
        """Train for one more epoch."""
        return self._fit(X, y, sample_weight, incremental=True)

    def predict(self, X: Any) -> Array:
        """Return the predicted targets of X (n, K): (n,), or (n, N) for several."""
        return self._ask("predict", X)
