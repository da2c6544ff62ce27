"""Whole epochs launch by launch, with scikit-learn's normalisation, L2 penalty and account of the loss.

The step knows the penalty and what it and the loss are divided by (``Ridge`` of the contract), so several epochs may be
one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fusemlp.sklearn.model import Model
from fusemlp.sklearn.settings import Objective
from fusemlp_kernels.contract import BATCH_LOSSES, PENALTIES

Array = np.ndarray[Any, Any]


class Loop:
    """X (n, K), targets and perhaps weights (n,), none of them 0, bound to a model that has a resident plan.

    ``constants`` (n,) are parts of the rows' losses that do not depend on the parameters; ``at_once``: the most epochs
    of a launch.
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
    ) -> None:
        self.n, self.batch_size, self.at_once = len(X), batch_size, at_once
        self.model, self.objective = model, objective
        self.weight, self.constants = weight, constants
        self.batches = -(-self.n // batch_size)
        arrays = {"x": X, "target": target}
        if weight is not None:
            arrays["weight"] = weight.astype(model.dtype, copy=False)
        self.bound = model.bind_loop(batch_size, arrays, epochs=at_once, strength=alpha, divisor=1.0 / objective.factor)

    def epochs(
        self, orders: Sequence[Array], stop: Callable[[], bool], begin: Callable[[], None] | None = None
    ) -> list[float]:
        """Train on the rows in each of ``orders``, at most ``at_once``: the losses of the epochs that came to their end
        before ``stop`` said so between two batches.

        ``begin`` is called before each batch; where it is given, ``stop`` is asked after each.
        """
        bound, memory = self.bound, self.model.engine.memory
        memory.stats[:] = 0.0
        bound.set_rows(orders[0] if len(orders) == 1 else np.concatenate(orders), 0, self.batch_size, len(orders))
        done, total = 0, len(orders) * self.batches
        while done < total:
            if begin is not None:
                begin()
            count = self.model.cover(min(total - done, bound.chunk) if begin is None else 1)
            bound.run_many(count)
            done += count
            if stop():
                break
        ended = done // self.batches
        history, to_host = bound.arrays.get("history"), memory.backend.to_host
        accounts = to_host(memory.stats)[None] if history is None else to_host(history[:ended])
        return [self._loss(account, order) for account, order in zip(accounts[:ended], orders, strict=False)]

    def _loss(self, account: Array, order: Array) -> float:
        with np.errstate(all="ignore"):
            data = (account[BATCH_LOSSES] + self._constant(order)) / self.objective.reported_by
            return float((data + account[PENALTIES]) / self.n)

    def _constant(self, order: Array) -> float:
        """What ``constants`` add to the losses of an epoch's batches, each times its rows."""
        if self.constants is None:
            return 0.0
        if self.weight is None:
            return self.objective.factor * float(self.constants.sum())
        starts = np.arange(0, self.n, self.batch_size)
        weight = self.weight[order].astype(np.float64)
        shares = np.add.reduceat(weight * self.constants[order], starts) / np.add.reduceat(weight, starts)
        return self.objective.factor * float((shares * np.minimum(self.batch_size, self.n - starts)).sum())
