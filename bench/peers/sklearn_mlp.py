"""scikit-learn: ``MLPClassifier.fit`` with its own loop over epochs and batches."""

from __future__ import annotations

import warnings

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier

from bench.cases import Array, Case, Data


class SklearnTrainer:
    """See ``peers.Trainer``. What ``fit`` checks and sets up before the first epoch is part of the time."""

    def __init__(self, case: Case, data: Data) -> None:
        self.data = data
        self.model = MLPClassifier(
            case.sizes[1:-1],
            activation="relu",
            solver="sgd",
            alpha=0.0,
            batch_size=case.batch_size,
            learning_rate="constant",
            learning_rate_init=case.learning_rate,
            momentum=0.0,
            nesterovs_momentum=False,
            random_state=0,
            # no end before max_iter; each fit goes on with the parameters that are there
            tol=0.0,
            n_iter_no_change=np.inf,
            early_stopping=False,
            warm_start=True,
        )
        self.model.partial_fit(data.X, data.y, classes=np.arange(case.sizes[-1]))
        self.reset()

    def reset(self) -> None:
        # scikit-learn's weights are (inputs, outputs), row-major
        self.model.coefs_ = [np.ascontiguousarray(weight.T) for weight, _ in self.data.parameters]
        self.model.intercepts_ = [bias.copy() for _, bias in self.data.parameters]

    def train(self, epochs: int) -> None:
        self._fit(self.data.X, self.data.y, epochs, shuffle=True)

    def train_in_order(self, order: Array) -> None:
        self._fit(self.data.X[order], self.data.y[order], 1, shuffle=False)

    def _fit(self, X: Array, y: Array, epochs: int, *, shuffle: bool) -> None:
        self.model.set_params(max_iter=epochs, shuffle=shuffle)
        with warnings.catch_warnings():
            # reaching max_iter is what is wanted here
            warnings.filterwarnings("ignore", message="Stochastic Optimizer: Maximum", category=ConvergenceWarning)
            self.model.fit(X, y)

    def parameters(self) -> list[tuple[Array, Array]]:
        return [(weight.T, bias) for weight, bias in zip(self.model.coefs_, self.model.intercepts_, strict=True)]


def prepare(case: Case, data: Data) -> SklearnTrainer:
    """See ``peers.prepare``."""
    return SklearnTrainer(case, data)
