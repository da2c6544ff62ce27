"""An estimator's data in batches, with scikit-learn's normalisation, L2 penalty and loss.

scikit-learn divides both the loss of a batch and its penalty ``alpha / 2 * sum(w ** 2)`` by the batch's number of
rows, or by the sum of their weights. A short last batch therefore has a stronger penalty, and with weights each batch
has its own. The kernels of the resident plan know all this (``Ridge`` of the contract). In the calls of any other plan
a row's weight is its share ``weight / (sum over its batch)``, and a step adds the penalty's gradient before its update.
Losses of the host take the weights themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from fusemlp.describe.adversarial import Adversary
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.columns import codes_of, coding_of
from fusemlp.inputs.examples import Examples, Targets
from fusemlp.program.builder import Inputs, Pass
from fusemlp.program.passes import Penalty
from fusemlp.program.program import Program
from fusemlp.runtime.forward import Evaluate
from fusemlp.runtime.memory import on_device
from fusemlp.runtime.programs import BoundProgram
from fusemlp.runtime.steps import TrainingStep, bind, lower
from fusemlp.sklearn.model import Model
from fusemlp.sklearn.settings import Objective
from fusemlp.training.intervals import add_worst_case
from fusemlp_kernels.contract import BATCH_LOSSES, LAST_LOSS, LOSS_SUM, PENALTIES, ROW_COUNT, ROW_STEP, Ridge


@dataclass(eq=False)
class EstimatorBatches(ABC):
    """Data bound to a model; ``steps`` trains on them in the epoch loop.

    ``data`` are x (n, K), perhaps Columns, and target. ``constants`` (n,) are parts of losses without parameters.
    """

    model: Model
    objective: Objective
    data: dict[str, Any]
    weight: Array | None
    constants: Array | None
    alpha: float
    batch_size: int
    # the attack or the intervals of a step, as ``Session.bind`` takes them
    passes: tuple[Pass, ...]
    # the most epochs of a launch
    at_once: int = 1
    steps: Any = None

    def __post_init__(self) -> None:
        self.n, self.coding = len(self.data["x"]), coding_of(self.data["x"])
        self.data = {name: codes_of(array) for name, array in self.data.items()}
        self.starts = np.arange(0, self.n, self.batch_size)
        self.lengths = np.minimum(self.batch_size, self.n - self.starts)

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
        parts = self._shares(order)[1] * self.constants[order] * np.repeat(self.lengths, self.lengths)
        return self.objective.factor * float(parts.sum())

    def _shares(self, order: Array) -> tuple[Array, Array]:
        """Return the sum of each batch's weights, and each row's share of its batch's sum, in this order."""
        assert self.weight is not None
        weight = self.weight[order].astype(np.float64)
        sums = np.add.reduceat(weight, self.starts)
        # a batch whose weights are all 0 has no loss
        return sums, weight / np.repeat(np.where(sums == 0.0, np.inf, sums), self.lengths)


@dataclass(frozen=True)
class Validation:
    """Validation rows, targets as numbers and as predicted, weights of score and loss; ``decides``: it ends a fit."""

    X: Any
    y: Array
    truth: Array
    weight: Array | None
    loss_weight: Array | None
    decides: bool


class HeldLoss:
    """The loss of validation ``rows`` like ``EstimatorBatches.loss``, but of one batch, without dropout and penalty.

    Rows whose weights are all 0 have the loss NaN. Without weights the accuracy, if each row has one class, comes from
    the same pass. ``data`` and ``constants`` are as in ``EstimatorBatches``.
    """

    def __init__(
        self, model: Model, objective: Objective, rows: Validation, data: dict[str, Array], constants: Array | None
    ) -> None:
        self.rows, weight = rows, rows.loss_weight
        self._engine, n, target = model.engine, len(data["x"]), data["target"]
        weights = np.ones(n) if weight is None else weight.astype(np.float64)
        self._scale, self._total = objective.factor / objective.reported_by, float(weights.sum())
        self._constant = 0.0 if constants is None else float(weights @ constants)
        weight = None if weight is None else weight.astype(model.dtype)
        self._examples = Examples(data["x"], Targets(target, False), weight)
        one_class = self._engine.loss.is_classification and target.reshape(n, -1).shape[1] == 1
        self._spec = replace(model.loop_loss, reduction="sum", accuracy=one_class and weight is None)

    @cached_property
    def _evaluation(self) -> Evaluate:
        # not before the first epoch: a launch of several models moves the parameters
        return self._engine.inference.evaluation(self._examples, spec=self._spec)

    def __call__(self) -> tuple[float, float | None]:
        """Return the loss at the model's present parameters, and the accuracy or None."""
        with np.errstate(all="ignore"):
            losses = self._evaluation(self._engine.memory)
            if self._engine.loss.on_host:
                return losses["loss"] if self._total else np.nan, None
            loss = np.float64(self._scale) * (losses["loss"] + self._constant) / self._total
        return float(loss), losses.get("accuracy")


class ResidentBatches(EstimatorBatches):
    """Batches of a resident plan, ``at_once`` epochs a launch, no weight 0; ``alone``: not with other models."""

    def __init__(self, *data: Any, at_once: int, alone: bool) -> None:
        super().__init__(*data)
        self.at_once = at_once
        if self.weight is not None:
            self.data["weight"] = self.weight.astype(self.model.dtype, copy=False)
        self.passes = (*self.passes, Penalty(Ridge(self.alpha, 1.0 / self.objective.factor)))
        if alone:
            engine, weighted = self.model.engine, self.weight is not None
            inputs = Inputs(self.n, indexed=True, weighted=weighted, coding=self.coding)
            arrays = on_device(engine.memory.backend, engine.network, self.data)
            self.steps = bind(engine, self._loop(inputs), arrays, batches=len(self.starts), epochs=at_once)

    def program(self, inputs: Inputs) -> Program:
        """Return the program of a loop over the steps, for a launch of several models."""
        return lower(self.model.engine, self._loop(inputs))

    def _loop(self, inputs: Inputs) -> TrainingStep:
        return TrainingStep(inputs, self.model.loop_loss, self.model.rule, self.batch_size, True, self.passes)

    def _sums(self, stats: Array) -> tuple[float, float]:
        return stats[BATCH_LOSSES], stats[PENALTIES]


class CalledBatches(EstimatorBatches):
    """Batches of a step that Python calls, none for a batch of weights 0; ``keep``: memory for the next call."""

    chunk = 1

    def __init__(self, *data: Any, keep: bool = False) -> None:
        super().__init__(*data)
        self.steps = self
        # a function of the caller's is a mean, of rows that may have weights
        self.means = self.model.engine.loss.on_host
        self.share = np.empty(self.n, self.model.dtype)
        shares = {"weight": self.share}
        if self.means:
            shares = {} if self.weight is None else {"weight": self.weight.astype(self.model.dtype)}
        self.bound = self._bound({**self.data, **shares}, keep)
        self.arrays = self.bound.arrays
        memory = self.model.engine.memory
        # an earlier resident program has walked over longer lists of rows, and may not have reached their end
        memory.counters[ROW_COUNT : ROW_STEP + 1] = 0
        *self.gradient_calls, self.update = self.bound.calls
        layers = range(self.model.engine.network.layers if self.alpha else 0)
        self._weights = [memory.arrays[f"w{layer}"] for layer in layers]
        self._gradients = [memory.arrays[f"dw{layer}"] for layer in layers]
        self.sums = self.lengths.astype(np.float64)
        self._set_shares(np.arange(self.n))

    def _bound(self, arrays: dict[str, Array], keep: bool) -> BoundProgram:
        """Return the program of a step, whose gradients can be read before its last call."""
        model, engine = self.model, self.model.engine
        inputs = Inputs(self.n, indexed=True, weighted="weight" in arrays, coding=self.coding)
        key = inputs, self.batch_size, self.passes
        if keep and model.staged is not None and model.staged[0] == key:
            bound = model.staged[1]
        else:
            operands = {} if keep else on_device(engine.memory.backend, engine.network, arrays)
            targets = Targets(arrays["target"], False)
            spec = engine.inputs.spec_for(targets) if self.means else engine.loss.spec(accuracy=False)
            described = inputs, spec, model.rule, self.batch_size
            bound = bind(engine, TrainingStep(*described, passes=self.passes, keep_gradients=True), operands)
        if keep:
            model.staged = key, bound
            for name, array in arrays.items():
                engine.memory.backend.copy_into(bound.arrays[name], array)
        return bound

    def train_against(self, ibp: Adversary, epochs: int) -> None:
        """Train for certified accuracy, in ``epochs`` epochs at most."""
        add_worst_case(self.model.engine, self.bound, ibp, first=0, updates=epochs * len(self.starts))
        *self.gradient_calls, self.update = self.bound.calls

    def _set_shares(self, order: Array) -> None:
        """Set the factor of each row's loss in its batch when the rows are taken in this order."""
        factor = self.objective.factor
        if self.weight is None:
            # only the rows of a short last batch have another one
            self.share[:] = factor / self.batch_size
            self.share[order[self.starts[-1] :]] = factor / self.sums[-1]
        else:
            self.sums, shares = self._shares(order)
            self.share[order] = factor * shares
        if not self.means:
            self.model.engine.memory.backend.copy_into(self.arrays["weight"], self.share)

    def set_rows(self, order: Array, first_batch: int, size: int, epochs: int = 1) -> None:
        """Take the rows of an epoch in their order."""
        assert epochs == 1
        self._order, self._start = order, first_batch * size
        self.arrays["counters"][ROW_COUNT] = size
        if self.weight is not None or self.n % size:
            self._set_shares(order)
        # the loss of the short last batch, and the penalties of all
        self._short, self._penalties = 0.0, 0.0

    def run_many(self, count: int) -> None:
        """Train on the next ``count`` batches."""
        with np.errstate(all="ignore"):
            for _ in range(count):
                self.step(self._order[self._start : self._start + self.batch_size])
                self._start += self.batch_size

    def copy(self, batch: Array) -> None:
        """Make these the rows of the next step."""
        rows, count = self.arrays["rows"], len(batch)
        self.bound.backend.copy_into(rows[:count], batch)
        if count < len(rows):
            rows[count:] = -1
            self.arrays["counters"][ROW_COUNT] = count

    def step(self, batch: Array) -> None:
        """Train on these rows, unless their weights are all 0."""
        count, total = len(batch), float(self.sums[self._start // self.batch_size])
        if total == 0.0:
            return
        self.copy(batch)
        self._penalties = self._penalties + self.penalty() * (count / total)
        for call in self.gradient_calls:
            call()
        if count < self.batch_size:
            self._short = float(self.model.engine.memory.stats[LAST_LOSS])
        self.add_penalty_gradient(1.0 / total)
        self.update()

    def penalty(self) -> Any:
        """Return ``alpha / 2`` times the sum of the squared weights, on a device as a scalar there: reading waits."""
        if self.model.engine.memory.backend.traits.on_host:
            return 0.5 * self.alpha * sum(float(np.vdot(weight, weight)) for weight in self._weights)
        return 0.5 * self.alpha * sum((weight * weight).sum() for weight in self._weights)

    def add_penalty_gradient(self, scale: float) -> None:
        """Add ``scale`` times the penalty's gradient to the gradients in memory."""
        for weight, gradient in zip(self._weights, self._gradients, strict=True):
            gradient += weight * (scale * self.alpha)

    def _sums(self, stats: Array) -> tuple[float, float]:
        if self.means:
            return stats[BATCH_LOSSES], float(self._penalties)
        whole = float(stats[LOSS_SUM]) - self._short
        return whole * self.batch_size + self._short * (self.n % self.batch_size), float(self._penalties)

    def loss_and_gradient(self) -> float:
        """Return the loss of all rows as one batch, and leave its gradient in memory."""
        order, total = np.arange(self.n), float(self.sums[0])
        self.arrays["counters"][ROW_COUNT] = self.n
        self.copy(order)
        with np.errstate(all="ignore"):
            penalty = float(self.penalty()) / total
            for call in self.gradient_calls:
                call()
            self.add_penalty_gradient(1.0 / total)
        data = float(self.model.engine.memory.stats[LAST_LOSS]) + self._constant(order) / self.n
        return data / self.objective.reported_by + penalty
