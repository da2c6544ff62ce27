"""The estimators' parameters: their constraints, and the network, loss and optimizer that they describe."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Any

import numpy as np
from sklearn.utils._param_validation import Interval, Options, StrOptions

from fusemlp.describe.losses import MAE, MSE, BinaryCrossEntropy, CrossEntropy, Huber, Loss, Poisson, Quantile
from fusemlp.describe.network import MLP, Activation, as_activation
from fusemlp.describe.optimizers import SGD, Adam, AdamW, Optimizer
from fusemlp.describe.schedules import Schedule
from fusemlp.runtime.backends import TRAITS, first_available
from fusemlp_kernels.contract import ACTIVATIONS

STOCHASTIC = ("sgd", "adam", "adamw")
LOGISTIC = "logistic"
REGRESSION_LOSSES = ("squared_error", "poisson", "absolute_error", "huber", "quantile")
# scikit-learn allows a momentum of 1, the optimizers here only less: the two differ by half a rounding.
LARGEST_MOMENTUM = float(np.nextafter(1.0, 0.0))

_AT_LEAST_0 = Interval(Real, 0, None, closed="left")
_ABOVE_0 = Interval(Real, 0, None, closed="neither")
_COUNT = Interval(Integral, 1, None, closed="left")
UNIT = Interval(Real, 0, 1, closed="left")

CONSTRAINTS: dict[str, Any] = {
    "hidden_layer_sizes": ["array-like", _COUNT],
    "activation": [StrOptions({*ACTIVATIONS, LOGISTIC}), Activation, list, tuple],
    "solver": [StrOptions({"lbfgs", *STOCHASTIC})],
    "alpha": [_AT_LEAST_0],
    "batch_size": [StrOptions({"auto"}), _COUNT],
    "learning_rate": [StrOptions({"constant", "invscaling", "adaptive"}), Schedule],
    "learning_rate_init": [_ABOVE_0],
    "power_t": [_AT_LEAST_0],
    "max_iter": [_COUNT],
    "shuffle": ["boolean"],
    "random_state": ["random_state"],
    "tol": [_AT_LEAST_0],
    "verbose": ["verbose"],
    "warm_start": ["boolean"],
    "momentum": [Interval(Real, 0, 1, closed="both")],
    "nesterovs_momentum": ["boolean"],
    "early_stopping": ["boolean"],
    "validation_fraction": [UNIT],
    "beta_1": [UNIT],
    "beta_2": [UNIT],
    "epsilon": [_ABOVE_0],
    "n_iter_no_change": [_COUNT, Options(Real, {np.inf})],
    "max_fun": [_COUNT],
    "dropout": [UNIT, list, tuple],
    "clip_norm": [_ABOVE_0, None],
    "backend": [StrOptions({"auto", "numpy", "triton", "cupy"})],
    # fp16 keeps its gradients scaled, and the penalty is added to gradients
    "precision": [StrOptions({"auto", "fp32", "fp64", "tf32", "bf16"})],
    "callbacks": "no_validation",
}


@dataclass(frozen=True)
class Objective:
    """A loss of the engine, and how scikit-learn normalises it.

    A row's loss, a sum over the outputs, is multiplied by ``factor`` for the gradient; what is reported as the loss is
    the mean over rows of that, divided by ``reported_by``.
    """

    loss: Loss
    factor: float = 1.0
    reported_by: int = 1
    out_activation: str = "identity"


def classification_objective(out_activation: str, label_smoothing: float) -> Objective:
    """Return the cross-entropy of a softmax, or of one logistic output for two classes or for each label."""
    if out_activation == "softmax":
        return Objective(CrossEntropy(label_smoothing=label_smoothing, reduction="sum"), out_activation=out_activation)
    return Objective(BinaryCrossEntropy(reduction="sum"), out_activation=out_activation)


def regression_objective(loss: str | Loss, outputs: int) -> Objective:
    """Return the objective of a regression loss.

    squared_error is scikit-learn's: half the square, summed over the outputs for the gradient, averaged in the report.
    poisson sums over the outputs. The others, which scikit-learn does not have, are means over the outputs.
    """
    if loss == "squared_error":
        return Objective(MSE(reduction="sum"), 0.5, outputs)
    if loss == "poisson":
        return Objective(Poisson(reduction="sum"), out_activation="exp")
    if isinstance(loss, str):
        loss = {"absolute_error": MAE(), "huber": Huber(), "quantile": Quantile()}[loss]
    return Objective(replace(loss, reduction="sum"), 1.0 / outputs)


def hidden_widths(hidden_layer_sizes: Any) -> list[int]:
    """Return the widths of the hidden layers. Raises ValueError for one that is not above 0."""
    several = isinstance(hidden_layer_sizes, Iterable)
    widths = list(hidden_layer_sizes) if several else [hidden_layer_sizes]
    if any(width <= 0 for width in widths):
        raise ValueError(f"hidden_layer_sizes must be > 0, got {widths}.")
    return widths


def hidden_activations(activation: Any, hidden: int) -> list[Activation]:
    """Return an activation for each of ``hidden`` layers. Raises ValueError for a list of another length."""
    several = isinstance(activation, list | tuple)
    given = list(activation) if several else [activation] * hidden
    if len(given) != hidden:
        raise ValueError(f"activation must have one entry for each of the {hidden} hidden layers, got {activation!r}.")
    return [as_activation("activation", "sigmoid" if one == LOGISTIC else one) for one in given]


def network(sizes: list[int], activation: Any, dropout: Any) -> MLP:
    """Return the network of these widths; the estimator draws its initial parameters."""
    hidden = len(sizes) - 2
    rates = list(dropout) if isinstance(dropout, list | tuple) else [dropout] * hidden
    if len(rates) != hidden:
        raise ValueError(f"dropout must have one entry for each of the {hidden} hidden layers, got {dropout!r}.")
    return MLP(sizes, activation=hidden_activations(activation, hidden), dropout=rates, init="zeros")


def optimizer(estimator: Any) -> Optimizer:
    """Return the optimizer of an estimator, with scikit-learn's conventions where it has the same one.

    The L2 penalty is not part of it: its strength depends on the batch. Only AdamW's decay, which scikit-learn does not
    have, is a constant: ``alpha``.
    """
    schedule = estimator.learning_rate
    rate = schedule if isinstance(schedule, Schedule) else float(estimator.learning_rate_init)
    if estimator.solver in ("sgd", "lbfgs"):
        momentum = min(float(estimator.momentum), LARGEST_MOMENTUM)
        return SGD(
            rate,
            momentum=momentum,
            nesterov=bool(estimator.nesterovs_momentum) and momentum > 0.0,
            convention="scikit-learn",
            clip_norm=estimator.clip_norm,
        )
    betas = (float(estimator.beta_1), float(estimator.beta_2))
    if estimator.solver == "adam":
        return Adam(rate, betas=betas, eps=estimator.epsilon, convention="scikit-learn", clip_norm=estimator.clip_norm)
    return AdamW(
        rate,
        betas=betas,
        eps=estimator.epsilon,
        weight_decay=float(estimator.alpha),
        decay_biases=False,
        clip_norm=estimator.clip_norm,
    )


def chosen_backend(backend: str) -> str:
    """Return the name of the backend; "auto" is the first that works here."""
    return first_available() if backend == "auto" else backend


def chosen_precision(precision: str, backend: str, dtype: Any, solver: str) -> str:
    """Return the precision; "auto" is that of ``dtype``, and fp64 for lbfgs, whose line search needs exact differences.

    A backend without fp64 takes fp32.
    """
    if precision != "auto":
        return precision
    exact = "fp64" in TRAITS[backend].precisions and (solver == "lbfgs" or dtype == np.float64)
    return "fp64" if exact else "fp32"


def rows_of_a_batch(batch_size: Any, n: int) -> int:
    """Return the rows of a batch; "auto" is 200, or all of fewer. More than ``n`` are clipped with a warning."""
    if batch_size == "auto":
        return min(200, n)
    if batch_size > n:
        warnings.warn(
            "Got `batch_size` less than 1 or larger than sample size. It is going to be clipped", stacklevel=6
        )
    return min(int(batch_size), n)
