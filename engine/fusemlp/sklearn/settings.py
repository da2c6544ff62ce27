"""The estimators' parameters: their constraints, and the network, loss and optimizer that they describe."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

import numpy as np
from sklearn.neural_network import MLPClassifier
from sklearn.utils._param_validation import Interval, StrOptions

from fusemlp.describe.adversarial import as_adversary
from fusemlp.describe.conflicts import check_together, in_use
from fusemlp.describe.losses import Loss
from fusemlp.describe.network import MLP, Activation
from fusemlp.describe.optimizers import SGD, Adam, AdamW, Optimizer, Schedule
from fusemlp.engine import Engine
from fusemlp.inputs.arrays import Array
from fusemlp.program.builder import Pass
from fusemlp.program.passes import passes_against
from fusemlp.runtime.plans import first_available
from fusemlp_kernels.contract import ACTIVATIONS

STOCHASTIC = ("sgd", "adam", "adamw")
LOGISTIC = "logistic"
# scikit-learn allows a momentum of 1, the optimizers here only less: the two differ by half a rounding.
LARGEST_MOMENTUM = float(np.nextafter(1.0, 0.0))

UNIT = Interval(Real, 0, 1, closed="left")

CONSTRAINTS: dict[str, Any] = {
    **MLPClassifier._parameter_constraints,
    "activation": [StrOptions({*ACTIVATIONS, LOGISTIC}), Activation, list, tuple],
    "solver": [StrOptions({"lbfgs", *STOCHASTIC})],
    "learning_rate": [*MLPClassifier._parameter_constraints["learning_rate"], Schedule],
    "dropout": [UNIT, list, tuple],
    "clip_norm": [Interval(Real, 0, None, closed="neither"), None],
    "backend": [StrOptions({"auto", "numpy", "triton", "cupy"})],
    # fp16 keeps its gradients scaled, and the penalty is added to gradients
    "precision": [StrOptions({"auto", "fp32", "fp64", "tf32", "bf16"})],
    "callbacks": "no_validation",
    "adversarial": "no_validation",
}


@dataclass(eq=False, repr=False)
class Parameters:
    """The parameters of both estimators, scikit-learn's first; their documentation ends that of each estimator.

    activation : also every other name of ``MLP``, such as "gelu" or "selu" ("sigmoid" is another word for "logistic"),
        an ``Activation`` of fusemlp's, or a list with one of these for each hidden layer.
    solver : also "adamw", whose decay ``alpha`` is decoupled: not divided by the batch, and no part of ``loss_``.
    learning_rate : also a schedule of ``fusemlp.schedules``, for every solver but lbfgs, with its own rate in place of
        ``learning_rate_init``. A schedule without a length of its own spans ``max_iter`` epochs.
    dropout : float in [0, 1), or a list with one for each hidden layer. Not with lbfgs.
    clip_norm : float or None. The gradient, penalty included, is scaled down to this norm. Not with lbfgs.
    backend : "auto" (the first that works of triton, cupy, numpy; NumPy with lbfgs or fp64), or a name.
    precision : "auto" (on NumPy the type of X, or fp64 with lbfgs; elsewhere fp32), or one that the backend has.
    callbacks : None, or objects like ``fusemlp.Callback``. Their logs have loss, learning_rate and, with validation
        data, val_loss and val_score. Not with lbfgs.
    adversarial : None, or FGSM, PGD or IBP to train against, as in ``Engine.fit``; eps is in the units of X.
        IBP is for more than two classes. With IBP an epoch counts for convergence, early stopping, the
        best score and ReduceOnPlateau from the end of its ramp on. Not with lbfgs.

    All other parameters mean what they mean in scikit-learn. With the same ``random_state`` the initial parameters, the
    validation rows and the order of the batches are scikit-learn's, and on NumPy, to rounding, the fitted model.

    Attributes beside scikit-learn's: ``validation_loss_curve_`` is the loss of the validation rows after each epoch,
    without dropout and the penalty ``alpha`` (None without such rows), ``learning_rate_`` the rate of the next update,
    ``slopes_`` the learned slopes of PReLU layers (only if there are any).
    """

    hidden_layer_sizes: Any = (100,)
    activation: Any = "relu"
    _: KW_ONLY
    solver: str = "adam"
    alpha: float = 0.0001
    batch_size: Any = "auto"
    learning_rate: Any = "constant"
    learning_rate_init: float = 0.001
    power_t: float = 0.5
    max_iter: int = 200
    shuffle: bool = True
    random_state: Any = None
    tol: float = 1e-4
    verbose: Any = False
    warm_start: bool = False
    momentum: float = 0.9
    nesterovs_momentum: bool = True
    early_stopping: bool = False
    validation_fraction: float = 0.1
    beta_1: float = 0.9
    beta_2: float = 0.999
    epsilon: float = 1e-8
    n_iter_no_change: Any = 10
    max_fun: int = 15000
    dropout: Any = 0.0
    clip_norm: float | None = None
    backend: str = "auto"
    precision: str = "auto"
    callbacks: Any = None
    adversarial: Any = None


@dataclass(frozen=True)
class Objective:
    """A loss of the engine, and how scikit-learn normalises it.

    A row's loss, a sum over the outputs, is multiplied by ``factor`` for the gradient; what is reported as the loss is
    the mean over rows of that, divided by ``reported_by``. A function of the caller's is the mean already.
    """

    loss: Loss
    factor: float = 1.0
    reported_by: int = 1
    out_activation: str = "identity"


# A search asks for every model, and looking for the libraries takes longer than the rest of its set-up.
working_backend = functools.cache(first_available)


def backend_of(estimator: Any, loss: Loss) -> str:
    """Return the name of an estimator's backend; with "auto" one that has what the estimator and its loss need."""
    if estimator.backend != "auto":
        return str(estimator.backend)
    # The line search of lbfgs needs exact differences.
    on_host = estimator.solver == "lbfgs" or estimator.precision == "fp64" or loss.numpy_only
    return "numpy" if on_host else working_backend()


def hidden_widths(hidden_layer_sizes: Any) -> list[int]:
    """Return the widths of the hidden layers. Raises ValueError for one that is not above 0."""
    widths = list(hidden_layer_sizes) if isinstance(hidden_layer_sizes, Iterable) else [hidden_layer_sizes]
    if any(width <= 0 for width in widths):
        raise ValueError(f"hidden_layer_sizes must be > 0, got {widths}.")
    return widths


def network(sizes: list[int], activation: Any, dropout: Any) -> MLP:
    """Return the network of these widths, without initial parameters; ArgumentError for lists of another length."""
    names: Any = "sigmoid" if activation == LOGISTIC else activation
    if isinstance(activation, list | tuple):
        names = ["sigmoid" if name == LOGISTIC else name for name in activation]
    return MLP(sizes, activation=names, dropout=dropout, init="zeros")


def initial_parameters(
    network: MLP, activation: Any, random_state: np.random.RandomState, dtype: Any
) -> tuple[list[Array], list[Array], list[Any]]:
    """Return coefs, intercepts and slopes of each layer, drawn in scikit-learn's order (Glorot and Bengio, 2010).

    They are uniform in +-sqrt(6 / (K + N)), with a sigmoid in +-sqrt(2 / (K + N)). The output layer's bound is that of
    the last hidden layer's activation; without hidden layers that of ``activation``.
    """
    hidden = network.activations[:-1]
    after = [*hidden, hidden[-1] if hidden else network.activations[-1]]
    if not hidden and not isinstance(activation, list | tuple):
        after = [Activation("sigmoid" if activation in (LOGISTIC, "sigmoid") else "identity")]
    coefs, intercepts = [], []
    for (fan_in, fan_out), nonlinearity in zip(pairwise(network.sizes), after, strict=True):
        bound = np.sqrt((2.0 if nonlinearity.name == "sigmoid" else 6.0) / (fan_in + fan_out))
        coefs.append(random_state.uniform(-bound, bound, (fan_in, fan_out)).astype(dtype, copy=False))
        intercepts.append(random_state.uniform(-bound, bound, fan_out).astype(dtype, copy=False))
    slopes = [
        np.full(1, nonlinearity.slope, dtype) if nonlinearity.name == "prelu" else None
        for nonlinearity in network.activations
    ]
    return coefs, intercepts, slopes


def optimizer(estimator: Any) -> Optimizer:
    """Return an estimator's optimizer, by scikit-learn's conventions; the penalty is the batches', but of AdamW."""
    schedule, clip_norm = estimator.learning_rate, estimator.clip_norm
    rate = schedule if isinstance(schedule, Schedule) else float(estimator.learning_rate_init)
    if estimator.solver in ("sgd", "lbfgs"):
        momentum = min(float(estimator.momentum), LARGEST_MOMENTUM)
        nesterov = bool(estimator.nesterovs_momentum) and momentum > 0.0
        return SGD(rate, momentum=momentum, nesterov=nesterov, convention="scikit-learn", clip_norm=clip_norm)
    options = {"betas": (float(estimator.beta_1), float(estimator.beta_2)), "eps": estimator.epsilon}
    if estimator.solver == "adam":
        return Adam(rate, **options, convention="scikit-learn", clip_norm=clip_norm)
    return AdamW(rate, **options, weight_decay=float(estimator.alpha), decay_biases=False, clip_norm=clip_norm)


def step_passes(estimator: Any, engine: Engine, rows: Any) -> tuple[Pass, ...]:
    """Return the passes of a step against ``adversarial``; errors for what cannot be, or rows out of bounds."""
    how = as_adversary("adversarial", estimator.adversarial)
    # the loss is no parameter that could be changed
    labels = in_use(**{"one label": engine.loss.answers.kind != "cross_entropy"})
    check_together({**engine.uses, **how.uses, **labels})
    engine.inputs.check_within(how, rows)
    return passes_against(how)


def check_parameters(estimator: Any, incremental: bool, X_val: Any, y_val: Any) -> None:
    """Raise ValueError for impossible combinations of parameters and arguments."""
    precise = estimator.precision in ("auto", "fp32", "fp64")
    rates = estimator.dropout if isinstance(estimator.dropout, list | tuple) else [estimator.dropout]
    features = in_use(
        lbfgs=estimator.solver not in STOCHASTIC,
        partial_fit=incremental,
        early_stopping=estimator.early_stopping,
        dropout=estimator.dropout if any(rates) else None,
        adversarial=estimator.adversarial,
        **{"fast products": None if precise else estimator.precision},
    )
    check_together({**features, **getattr(estimator.adversarial, "uses", {})})
    if (X_val is None) != (y_val is None):
        missing = "y_val" if y_val is None else "X_val"
        raise ValueError(f"X_val and y_val belong together, and {missing} is missing.")


def rows_of_a_batch(batch_size: Any, n: int) -> int:
    """Return the rows of a batch; "auto" is 200, or all of fewer. More than ``n`` are clipped with a warning."""
    if batch_size == "auto":
        return min(200, n)
    if batch_size > n:
        warnings.warn(
            "Got `batch_size` less than 1 or larger than sample size. It is going to be clipped", stacklevel=6
        )
    return min(int(batch_size), n)
