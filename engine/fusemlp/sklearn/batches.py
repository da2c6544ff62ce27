"""Batches of an uncompiled step, with scikit-learn's normalisation, L2 penalty and loss.

scikit-learn divides both the loss of a batch and its penalty ``alpha / 2 * sum(w ** 2)`` by the batch's number of
rows, or by the sum of their weights. A short last batch therefore has a stronger penalty, and with weights each batch
has its own. Here a row's weight in a sum is its share ``weight / (sum over its batch)``, and the penalty's gradient is
added between the two last calls of a step.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fusemlp.program.lowering import Inputs
from fusemlp.sklearn.model import Model
from fusemlp.sklearn.settings import Objective
from fusemlp_kernels.contract import LAST_LOSS, LOSS_SUM, ROW_OFFSET, ROW_STEP, ROW_TOTAL

Array = np.ndarray[Any, Any]


class Penalty:
    """``alpha / 2`` times the sum of the squared weights, biases and slopes excluded, of the parameters in memory."""

    def __init__(self, model: Model, alpha: float) -> None:
        memory = model.engine.memory
        layers = range(model.engine.network.layers)
        self.alpha = alpha
        self._weights = [memory.arrays[f"w{layer}"] for layer in layers] if alpha else []
        self._gradients = [memory.arrays[f"dw{layer}"] for layer in layers] if alpha else []
        self._on_host = isinstance(memory.params, np.ndarray)
        if self._on_host:
            # the host's matrices have no gaps between their rows; scratch memory saves an allocation a step
            self._weights = [weight.reshape(-1) for weight in self._weights]
            self._gradients = [gradient.reshape(-1) for gradient in self._gradients]
            self._scratch = [np.empty_like(weight) for weight in self._weights]

    def value(self) -> Any:
        """Return a number, or a scalar on the device: reading that would wait."""
        if self._on_host:
            return 0.5 * self.alpha * sum(float(weight.dot(weight)) for weight in self._weights)
        return 0.5 * self.alpha * sum((weight * weight).sum() for weight in self._weights)

    def add_gradient(self, scale: float) -> None:
        """Add ``scale * alpha * w`` to the gradients in memory."""
        factor = scale * self.alpha
        if self._on_host:
            for weight, gradient, scratch in zip(self._weights, self._gradients, self._scratch, strict=True):
                np.multiply(weight, factor, scratch)
                np.add(gradient, scratch, gradient)
            return
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            gradient += weight * factor


class Batches:
    """X (n, K), targets and perhaps weights (n,) bound to a model, which trains on them batch by batch.

    ``constants`` (n,) are parts of the rows' losses that do not depend on the parameters. ``keep`` is for
    ``partial_fit``: memory stays for the next call. A batch whose weights are all 0 updates nothing.
    """

    # the epoch loop asks for one step of one epoch at a time
    chunk = at_once = 1

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
        keep: bool = False,
    ) -> None:
        n = len(X)
        self.n, self.batch_size = n, batch_size
        self.model, self.objective = model, objective
        self.weight, self.constants = weight, constants
        self.starts = np.arange(0, n, batch_size)
        self.batches = len(self.starts)
        self.lengths = np.minimum(batch_size, n - self.starts)
        self.share = np.empty(n, model.dtype)
        inputs = Inputs(n, indexed=True, weighted=True)
        self.penalty = Penalty(model, alpha)
        self.bound = model.bind(inputs, batch_size, {"x": X, "target": target, "weight": self.share}, keep=keep)
        self.arrays = self.bound.arrays
        # an earlier resident program has walked over longer lists of rows, and may not have reached their end
        for counter in (ROW_OFFSET, ROW_TOTAL, ROW_STEP):
            model.engine.memory.counters[counter] = 0
        *self.gradient_calls, self.update = self.bound.calls
        self._uneven = weight is not None or bool(n % batch_size)
        self.sums = self.lengths.astype(np.float64)
        self._set_shares(np.arange(n))

    @property
    def steps(self) -> Batches:
        """The steps for the epoch loop."""
        return self

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
            # no division by 0 in a batch that updates nothing
            divisors = np.where(self.sums == 0.0, np.inf, self.sums)
            self.share[order] = factor * weight / np.repeat(divisors, self.lengths)
        self.model.engine.memory.backend.copy_into(self.arrays["weight"], self.share)

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """Take the rows of an epoch in their order."""
        assert first_batch == 0 and epochs == 1
        if self._uneven:
            self._set_shares(order)
        self._order, self._batch = order, 0
        # of the short last batch, and of all
        self._short, self._penalties = 0.0, 0.0
        self.bound.set_row_count(size)

    def run_many(self, count: int) -> None:
        """Train on the next ``count`` batches of the epoch."""
        with np.errstate(all="ignore"):
            for _ in range(count):
                self._step(int(self.lengths[self._batch]), float(self.sums[self._batch]))
                self._batch += 1

    def _step(self, length: int, total: float) -> None:
        if total == 0.0:
            return
        backend, rows, size = self.model.engine.memory.backend, self.arrays["rows"], self.batch_size
        start, penalty = self._batch * size, self.penalty
        backend.copy_into(rows[:length], self._order[start : start + length])
        if length < size:
            rows[length:] = -1
            self.bound.set_row_count(length)
        if penalty.alpha:
            self._penalties = self._penalties + penalty.value() * (length / total)
        for call in self.gradient_calls:
            call()
        if length < size:
            self._short = float(self.model.engine.memory.stats[LAST_LOSS])
        if penalty.alpha:
            penalty.add_gradient(1.0 / total)
        self.update()

    def loss(self, stats: Array, order: Array) -> float:
        """Return the loss, penalty included, of the epoch that has ended with these statistics."""
        with np.errstate(all="ignore"):
            loss, rest = float(stats[LOSS_SUM]), self.n % self.batch_size
            data = (loss - self._short) * self.batch_size + self._short * rest + self._constant(order)
            return (data / self.objective.reported_by + float(self._penalties)) / self.n

    def _constant(self, order: Array) -> float:
        """Return what ``constants`` add to the loss of an epoch."""
        if self.constants is None:
            return 0.0
        shares = self.share[order] * self.constants[order] * np.repeat(self.lengths, self.lengths)
        return float(shares.sum())

    def loss_and_gradient(self) -> float:
        """Return the loss of all rows as one batch, and leave its gradient in memory."""
        memory = self.model.engine.memory
        total = float(self.sums[0])
        self.bound.set_row_count(self.n)
        memory.backend.copy_into(self.arrays["rows"], np.arange(self.n))
        with np.errstate(all="ignore"):
            penalty = float(self.penalty.value()) / total
            for call in self.gradient_calls:
                call()
            self.penalty.add_gradient(1.0 / total)
        data = float(memory.stats[LAST_LOSS]) + self._constant(np.arange(self.n)) / self.n
        return data / self.objective.reported_by + penalty
