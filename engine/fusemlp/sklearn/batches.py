"""An estimator's data in batches, with scikit-learn's normalisation, L2 penalty and loss.

scikit-learn divides both the loss of a batch and its penalty ``alpha / 2 * sum(w ** 2)`` by the batch's number of
rows, or by the sum of their weights. A short last batch therefore has a stronger penalty, and with weights each batch
has its own. The kernels of the resident plan know all this (``Ridge`` of the contract). In the calls of any other plan
a row's weight in a sum is its share ``weight / (sum over its batch)``, and the penalty's gradient is added between the
two last calls of a step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from fusemlp.sklearn.model import Model
from fusemlp.sklearn.settings import Objective
from fusemlp.training.batches import CopiedBatches
from fusemlp_kernels.contract import (
    BATCH_LOSSES,
    LAST_LOSS,
    LOSS_SUM,
    PENALTIES,
    ROW_OFFSET,
    ROW_STEP,
    ROW_TOTAL,
    Ridge,
)

Array = np.ndarray[Any, Any]


class Penalty:
    """``alpha / 2`` times the sum of the squared weights, biases and slopes excluded, of the parameters in memory."""

    def __init__(self, model: Model, alpha: float) -> None:
        memory = model.engine.memory
        layers = range(model.engine.network.layers)
        self.alpha = alpha
        self._weights = [memory.arrays[f"w{layer}"] for layer in layers] if alpha else []
        self._gradients = [memory.arrays[f"dw{layer}"] for layer in layers] if alpha else []

    def value(self) -> Any:
        """Return a number, or a scalar on the device: reading that would wait."""
        squares = (weight.dot(weight) for weight in (weight.reshape(-1) for weight in self._weights))
        return 0.5 * self.alpha * sum(float(one) if isinstance(one, np.floating) else one for one in squares)

    def add_gradient(self, scale: float) -> None:
        """Add ``scale * alpha * w`` to the gradients in memory."""
        factor = scale * self.alpha
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            gradient += weight * factor


class Batches(ABC):
    """X (n, K), targets and perhaps weights (n,) bound to a model; ``steps`` trains on them in the epoch loop.

    ``constants`` (n,) are parts of the rows' losses that do not depend on the parameters.
    """

    # the most epochs of a launch
    at_once = 1
    steps: Any = None

    def __init__(
        self,
        model: Model,
        objective: Objective,
        X: Array,
        target: Array,
        weight: Array | None,
        constants: Array | None,
        alpha: float,
        batch_size: int,
    ) -> None:
        self.model, self.objective = model, objective
        self.weight, self.constants, self.alpha = weight, constants, alpha
        self.n, self.batch_size = len(X), batch_size
        self.starts = np.arange(0, self.n, batch_size)
        self.batches = len(self.starts)
        self.lengths = np.minimum(batch_size, self.n - self.starts)
        self.data = {"x": X, "target": target}

    def loss(self, stats: Array, order: Array) -> float:
        """Return the loss, penalty included, of an epoch with these statistics over the rows in ``order``."""
        with np.errstate(all="ignore"):
            losses, penalties = self._sums(stats)
            data = (losses + self._constant(order)) / self.objective.reported_by
            return float((data + penalties) / self.n)

    @abstractmethod
    def _sums(self, stats: Array) -> tuple[float, float]:
        """Return the losses of the epoch's batches, each times its rows, and their penalties."""

    def _constant(self, order: Array) -> float:
        """Return what ``constants`` add to the losses of an epoch's batches, each times its rows."""
        if self.constants is None:
            return 0.0
        if self.weight is None:
            return self.objective.factor * float(self.constants.sum())
        weight = self.weight[order].astype(np.float64)
        sums = self._divisors(np.add.reduceat(weight, self.starts))
        shares = np.add.reduceat(weight * self.constants[order], self.starts) / sums
        return self.objective.factor * float((shares * self.lengths).sum())

    def _divisors(self, sums: Array) -> Array:
        # a batch whose weights are all 0 has no loss
        return np.where(sums == 0.0, np.inf, sums)


class ResidentBatches(Batches):
    """Batches of a model that has a resident plan: up to ``at_once`` epochs in a launch. No weight is 0.

    Without ``alone`` a launch of several models trains them, which sets ``steps``.
    """

    def __init__(self, *data: Any, at_once: int, alone: bool) -> None:
        super().__init__(*data)
        self.at_once = at_once
        if self.weight is not None:
            self.data["weight"] = self.weight.astype(self.model.dtype, copy=False)
        self.ridge = Ridge(self.alpha, 1.0 / self.objective.factor)
        if alone:
            self.steps = self.model.bind_loop(self.batch_size, self.data, epochs=at_once, ridge=self.ridge)

    def _sums(self, stats: Array) -> tuple[float, float]:
        return stats[BATCH_LOSSES], stats[PENALTIES]


class CalledBatches(Batches, CopiedBatches):
    """Batches of a model whose step is called from Python; a batch whose weights are all 0 updates nothing.

    ``keep`` is for ``partial_fit``: memory stays for the next call.
    """

    def __init__(self, *data: Any, keep: bool = False, **rules: Any) -> None:
        super().__init__(*data, **rules)
        model = self.model
        self.steps = self
        self.share = np.empty(self.n, model.dtype)
        self.penalty = Penalty(model, self.alpha)
        CopiedBatches.__init__(self, model.bind(self.batch_size, {**self.data, "weight": self.share}, keep=keep))
        # an earlier resident program has walked over longer lists of rows, and may not have reached their end
        for counter in (ROW_OFFSET, ROW_TOTAL, ROW_STEP):
            model.engine.memory.counters[counter] = 0
        *self.gradient_calls, self.update = self.bound.calls
        self.sums = self.lengths.astype(np.float64)
        self._set_shares(np.arange(self.n))

    def _set_shares(self, order: Array) -> None:
        """Set the factor of each row's loss in its batch when the rows are taken in this order."""
        factor = self.objective.factor
        if self.weight is None:
            # only the rows of a short last batch have another one
            self.share[:] = factor / self.batch_size
            self.share[order[self.starts[-1] :]] = factor / self.sums[-1]
        else:
            weight = self.weight[order]
            self.sums = np.add.reduceat(weight, self.starts, dtype=np.float64)
            self.share[order] = factor * weight / np.repeat(self._divisors(self.sums), self.lengths)
        self.model.engine.memory.backend.copy_into(self.arrays["weight"], self.share)

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """Take the rows of an epoch in their order."""
        super().set_rows(order, first_batch, size, epochs)
        if self.weight is not None or self.n % size:
            self._set_shares(order)
        # the loss of the short last batch, and the penalties of all
        self._short, self._penalties = 0.0, 0.0

    def step(self, batch: Array) -> None:
        """Train on these rows, unless their weights are all 0."""
        count, total = len(batch), float(self.sums[self._start // self.batch_size])
        if total == 0.0:
            return
        self.copy(batch)
        self._penalties = self._penalties + self.penalty.value() * (count / total)
        for call in self.gradient_calls:
            call()
        if count < self.batch_size:
            self._short = float(self.model.engine.memory.stats[LAST_LOSS])
        self.penalty.add_gradient(1.0 / total)
        self.update()

    def _sums(self, stats: Array) -> tuple[float, float]:
        whole = float(stats[LOSS_SUM]) - self._short
        return whole * self.batch_size + self._short * (self.n % self.batch_size), float(self._penalties)

    def loss_and_gradient(self) -> float:
        """Return the loss of all rows as one batch, and leave its gradient in memory."""
        order, total = np.arange(self.n), float(self.sums[0])
        self.bound.set_row_count(self.n)
        self.copy(order)
        with np.errstate(all="ignore"):
            penalty = float(self.penalty.value()) / total
            for call in self.gradient_calls:
                call()
            self.penalty.add_gradient(1.0 / total)
        data = float(self.model.engine.memory.stats[LAST_LOSS]) + self._constant(order) / self.n
        return data / self.objective.reported_by + penalty
