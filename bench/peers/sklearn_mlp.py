"""scikit-learn: ``fit`` of ``MLPClassifier`` or ``MLPRegressor`` with its own loop over epochs and batches."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor

from bench.cases import Array, Case, Data, Parameters
from bench.oracle import loss_of


class SklearnTrainer:
    """See ``peers.Trainer``. The time includes the checks and set-up of ``fit``."""

    def __init__(self, case: Case, data: Data) -> None:
        self.case, self.data = case, data
        self.y = data.y
        if case.loss == "mse" and case.sizes[-1] == 1:
            # its regressor takes a single target as a vector
            self.y = data.y[:, 0]
        self.model = (MLPRegressor if case.loss == "mse" else MLPClassifier)(
            hidden_layer_sizes=case.sizes[1:-1],
            activation=case.activation,
            solver=case.optimizer,
            alpha=0.0,
            batch_size=case.batch_size,
            learning_rate="constant",
            learning_rate_init=case.learning_rate,
            momentum=0.0,
            nesterovs_momentum=False,
            random_state=0,
            # No early end before max_iter; each fit continues from the current parameters.
            tol=0.0,
            n_iter_no_change=np.inf,
            early_stopping=False,
        )
        size = case.batch_size
        classes = {} if case.loss == "mse" else {"classes": np.arange(case.sizes[-1])}
        self.model.partial_fit(data.X[:size], self.y[:size], **classes)
        self.reset()

    def reset(self) -> None:
        # scikit-learn's weights are (inputs, outputs), row-major.
        self.model.coefs_ = [np.array(weight.T, order="C") for weight, _ in self.data.parameters]
        self.model.intercepts_ = [bias.copy() for _, bias in self.data.parameters]
        # fit makes a new optimizer; partial_fit keeps an existing one.
        vars(self.model).pop("_optimizer", None)

    def train(self, epochs: int) -> None:
        self._fit(self.data.X, self.y, epochs, shuffle=True)

    def losses(self, order: Array) -> Array:
        # fit reports one loss an epoch, so single steps give the losses. A fit then leaves train's parameters.
        X, y = self.data.X[order], self.y[order]
        # With warm_start each batch would need every class.
        self.model.set_params(shuffle=False, warm_start=False)
        losses = []
        for start in range(0, len(order), self.case.batch_size):
            batch = slice(start, start + self.case.batch_size)
            # in the loss alone, it counts a probability below 1.2e-7 as that: 15.9 is the most that a row adds
            exact = loss_of(self.case, self.data, self.parameters(), order[batch])
            self.model.partial_fit(X[batch], y[batch])
            losses.append(self.model.loss_ if self.case.loss == "mse" else exact)
        if self.case.loss == "mse" or len(np.unique(y)) == self.case.sizes[-1]:
            self.reset()
            self._fit(X, y, 1, shuffle=False)
        return np.array(losses)

    def _fit(self, X: Array, y: Array, epochs: int, *, shuffle: bool) -> None:
        self.model.set_params(max_iter=epochs, shuffle=shuffle, warm_start=True)
        with warnings.catch_warnings():
            # Reaching max_iter is intended here.
            warnings.filterwarnings("ignore", message="Stochastic Optimizer: Maximum", category=ConvergenceWarning)
            self.model.fit(X, y)

    def parameters(self) -> Parameters:
        return [(weight.T, bias) for weight, bias in zip(self.model.coefs_, self.model.intercepts_, strict=True)]


def prepare(case: Case, data: Data) -> SklearnTrainer:
    """See ``peers.prepare``."""
    return SklearnTrainer(case, data)
