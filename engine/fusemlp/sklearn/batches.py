"""One pass over the data in batches, with scikit-learn's normalisation, L2 penalty and account of the loss.

scikit-learn divides both the loss of a batch and its penalty ``alpha / 2 * sum(w ** 2)`` by the batch's number of
rows, or by the sum of their weights. So the strength of the penalty is another for a short last batch, and for each
batch where there are weights. Here a row carries its share ``weight / (sum over its batch)`` as its weight in a sum,
and the penalty's gradient is added between the two last calls of a step. ``loop`` has the epochs of a resident plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
        """A number, or a scalar on the device: reading it would wait."""
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
    """X (n, K), targets and perhaps weights (n,) bound to a model, to be gone through in batches.

    ``constants`` (n,) are parts of the rows' losses that do not depend on the parameters. ``keep`` is for
    ``partial_fit``: memory stays for the next call. A batch in which no row counts is passed over.
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
        keep: bool = False,
    ) -> None:
        n = len(X)
        self.n, self.batch_size = n, batch_size
        self.model, self.objective = model, objective
        self.weight, self.constants = weight, constants
        self.starts = np.arange(0, n, batch_size)
        self.batches, self.at_once = len(self.starts), 1
        self.lengths = np.minimum(batch_size, n - self.starts)
        self.share = np.empty(n, model.dtype)
        arrays = {"x": X, "target": target, "weight": self.share}
        inputs = Inputs(n, indexed=True, weighted=True)
        self.penalty = Penalty(model, alpha)
        self.bound = model.bind(inputs, batch_size, arrays, keep=keep)
        # a loop that was there before has walked over longer lists of rows, and may not have come to their end
        for counter in (ROW_OFFSET, ROW_TOTAL, ROW_STEP):
            model.engine.memory.counters[counter] = 0
        *self.gradient_calls, self.update = self.bound.calls
        self._uneven = weight is not None or bool(n % batch_size)
        self.sums = self.lengths.astype(np.float64)
        self._set_shares(np.arange(n))

    def _set_shares(self, order: Array) -> None:
        """For each row the factor of its loss in the batch that it is in, when they are taken in this order."""
        factor = self.objective.factor
        if self.weight is None:
            # only the rows of a short last batch have another one
            self.share[:] = factor / self.batch_size
            self.share[order[self.starts[-1] :]] = factor / self.sums[-1]
        else:
            weight = self.weight[order]
            self.sums = np.add.reduceat(weight, self.starts, dtype=np.float64)
            # a batch in which no row counts is passed over
            divisors = np.where(self.sums == 0.0, np.inf, self.sums)
            self.share[order] = factor * weight / np.repeat(divisors, self.lengths)
        self.model.engine.memory.backend.copy_into(self.bound.arrays["weight"], self.share)

    def _constant(self, order: Array) -> float:
        """What ``constants`` add to the loss of an epoch."""
        if self.constants is None:
            return 0.0
        shares = self.share[order] * self.constants[order] * np.repeat(self.lengths, self.lengths)
        return float(shares.sum())

    def epochs(
        self, orders: Sequence[Array], stop: Callable[[], bool], begin: Callable[[], None] | None = None
    ) -> list[float]:
        """Train on every batch of each of ``orders``: the losses of the epochs that came to their end before ``stop``
        said so between two batches. ``begin`` is called before each batch, and ``stop`` asked after it."""
        losses = []
        for order in orders:
            loss = self._epoch(order, stop, begin)
            if loss is None:
                break
            losses.append(loss)
        return losses

    def _epoch(self, order: Array, stop: Callable[[], bool], begin: Callable[[], None] | None) -> float | None:
        if self._uneven:
            self._set_shares(order)
        self.model.engine.memory.stats[:] = 0.0
        with np.errstate(all="ignore"):
            sums = self._steps(order, stop, begin)
            if sums is None:
                return None
            loss, short, penalties = sums
            rest = self.n % self.batch_size
            data = (
                (loss - short) * self.batch_size + short * rest + self._constant(order)
            ) / self.objective.reported_by
            return (data + penalties) / self.n

    def _steps(
        self, order: Array, stop: Callable[[], bool], begin: Callable[[], None] | None
    ) -> tuple[float, float, float] | None:
        """Train on every batch: the sum of their losses, that of a short one among them, and of their penalties."""
        stats, copy = self.model.engine.memory.stats, self.model.engine.memory.backend.copy_into
        bound, rows, size = self.bound, self.bound.arrays["rows"], self.batch_size
        gradient, update, penalty = self.gradient_calls, self.update, self.penalty
        cover = self.model.cover
        penalised = penalty.alpha > 0.0
        penalties: Any = 0.0
        short = 0.0
        bound.set_row_count(size)
        for start, length, total in zip(self.starts.tolist(), self.lengths.tolist(), self.sums.tolist(), strict=True):
            if total == 0.0:
                continue
            if begin is not None:
                begin()
            if length == size:
                copy(rows, order[start : start + size])
            else:
                copy(rows[:length], order[start:])
                rows[length:] = -1
                bound.set_row_count(length)
            if penalised:
                penalties = penalties + penalty.value() * (length / total)
            for call in gradient:
                call()
            if length != size:
                short = float(stats[LAST_LOSS])
            if penalised:
                penalty.add_gradient(1.0 / total)
            cover(1)
            update()
            if stop() and start != self.starts[-1]:
                return None
        return float(stats[LOSS_SUM]), short, float(penalties)

    def loss_and_gradient(self) -> float:
        """The loss of all rows as one batch; its gradient is left in memory."""
        memory = self.model.engine.memory
        total = float(self.sums[0])
        self.bound.set_row_count(self.n)
        memory.backend.copy_into(self.bound.arrays["rows"], np.arange(self.n))
        with np.errstate(all="ignore"):
            penalty = float(self.penalty.value()) / total
            for call in self.gradient_calls:
                call()
            self.penalty.add_gradient(1.0 / total)
        data = float(memory.stats[LAST_LOSS]) + self._constant(np.arange(self.n)) / self.n
        return data / self.objective.reported_by + penalty
