"""Train an engine with a loss of your own, in NumPy: the focal loss, for a class that is rare.

    python engine/examples/focal_loss.py

A loss takes the outputs and the targets of a batch, and returns a number and its gradient by the outputs.
``check_gradient`` compares the two before the training. The focal loss finds more of the rare class than the
cross-entropy, at the price of more false alarms.

Source: Lin et al., 2017.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.datasets import make_classification
from sklearn.metrics import precision_score, recall_score
from sklearn.model_selection import train_test_split

from fusemlp import MLP, Adam, Engine, check_gradient

Array = np.ndarray[Any, Any]


def focal(outputs: Array, targets: Array, gamma: float = 2.0, alpha: float = 0.75) -> tuple[float, Array]:
    """Return the focal loss of logits (n, 2) with classes (n,), and its gradient.

    With p for the probability of the right class it is the mean of ``-(1 - p) ** gamma * log(p)``, ``gamma`` at least
    1: rows that are right already count little. ``alpha`` weighs class 1, and ``1 - alpha`` class 0.
    """
    shifted = outputs - outputs.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p, rows = np.exp(log_p), np.arange(len(outputs))
    right, log_right = p[rows, targets], log_p[rows, targets]
    wrong, weights = 1.0 - right, np.where(targets == 1, alpha, 1.0 - alpha) / len(outputs)
    # the derivative by log(p), times that of log(p) by the logits
    slope = weights * (gamma * wrong ** (gamma - 1.0) * right * log_right - wrong**gamma)
    gradient = -slope[:, None] * p
    gradient[rows, targets] += slope
    return float(np.sum(-weights * wrong**gamma * log_right)), gradient.astype(outputs.dtype)


def data(seed: int = 0) -> list[Array]:
    """Return training and test rows, then their classes; 3 % are of class 1."""
    X, y = make_classification(
        20_000, 20, n_informative=8, n_clusters_per_class=4, weights=[0.97], flip_y=0.0, random_state=seed
    )
    split: list[Array] = train_test_split(X, y, test_size=0.5, stratify=y, random_state=seed)
    return split


def train(loss: Any, X: Array, y: Array, seed: int = 0) -> Engine:
    """Return an engine trained with a loss."""
    engine = Engine(MLP([20, 64, 32, 2]), loss=loss, optimizer=Adam(lr=1e-3), seed=seed, normalise=True)
    engine.fit(X, y, epochs=20, batch_size=128)
    return engine


def classes(engine: Engine, X: Array) -> Array:
    """Return the predicted classes (n,); with a loss of your own ``predict`` returns the outputs."""
    predicted = engine.predict(X)
    return predicted if engine.loss.is_classification else predicted.argmax(axis=1)


if __name__ == "__main__":
    X, X_test, y, y_test = data()
    error = check_gradient(focal, np.random.default_rng(0).normal(size=(4, 2)), y[:4])
    print(f"largest relative error of the gradient: {error:.1e}")
    for name, loss in (("cross-entropy", "cross_entropy"), ("focal loss", focal)):
        predicted = classes(train(loss, X, y), X_test)
        recall, precision = recall_score(y_test, predicted), precision_score(y_test, predicted)
        print(f"{name:13s}: {recall:.1%} of class 1 found, {precision:.1%} of the alarms right")
