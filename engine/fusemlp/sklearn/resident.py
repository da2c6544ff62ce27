"""Batches of the resident plan: whole epochs in a launch, with scikit-learn's normalisation, penalty and loss.

The kernels know the L2 penalty and the divisors of loss and penalty (``Ridge`` of the contract), so a launch may take
several epochs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusemlp.sklearn.model import Model
from fusemlp.sklearn.settings import Objective
from fusemlp_kernels.contract import BATCH_LOSSES, PENALTIES, Ridge

Array = np.ndarray[Any, Any]


class ResidentBatches:
    """X (n, K), targets and perhaps weights (n,), none of them 0, bound to a model that has a resident plan.

    ``constants`` (n,) are parts of the rows' losses that do not depend on the parameters; ``at_once``: the most epochs
    of a launch. Without ``alone`` the launch is that of several models, which sets ``steps``.
    """

    def __init__(
        self,
        model: Model,
        objective: Objective,
        X: Array,
        target: Array,
        weight: Array | None,
        *,
        alpha: float,
        batch_size: int,
        constants: Array | None = None,
        at_once: int = 1,
        alone: bool = True,
    ) -> None:
        self.n, self.batch_size, self.at_once = len(X), batch_size, at_once
        self.objective, self.weight, self.constants = objective, weight, constants
        self.batches = -(-self.n // batch_size)
        self.data = {"x": X, "target": target}
        if weight is not None:
            self.data["weight"] = weight.astype(model.dtype, copy=False)
        self.ridge = Ridge(alpha, 1.0 / objective.factor)
        self.steps: Any = None
        if alone:
            self.steps = model.bind_loop(batch_size, self.data, epochs=at_once, ridge=self.ridge)

    def loss(self, stats: Array, order: Array) -> float:
        """Return the loss, penalty included, of an epoch with these statistics over the rows in ``order``."""
        with np.errstate(all="ignore"):
            data = (stats[BATCH_LOSSES] + self._constant(order)) / self.objective.reported_by
            return float((data + stats[PENALTIES]) / self.n)

    def _constant(self, order: Array) -> float:
        """Return what ``constants`` add to the losses of an epoch's batches, each times its rows."""
        if self.constants is None:
            return 0.0
        if self.weight is None:
            return self.objective.factor * float(self.constants.sum())
        starts = np.arange(0, self.n, self.batch_size)
        weight = self.weight[order].astype(np.float64)
        shares = np.add.reduceat(weight * self.constants[order], starts) / np.add.reduceat(weight, starts)
        return self.objective.factor * float((shares * np.minimum(self.batch_size, self.n - starts)).sum())
