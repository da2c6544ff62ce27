"""scikit-learn's multi-layer perceptrons, trained by fusemlp: changing the import is the whole migration.

``from fusemlp.sklearn import MLPClassifier, MLPRegressor`` in place of ``from sklearn.neural_network import ...``.
"""

from __future__ import annotations

from fusemlp.sklearn.classifier import MLPClassifier
from fusemlp.sklearn.regressor import MLPRegressor

__all__ = ["MLPClassifier", "MLPRegressor"]
