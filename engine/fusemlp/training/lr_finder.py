"""Find an initial learning rate by a sweep (Smith, Cyclical learning rates for training neural networks, 2017)."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.describe.checks import as_count, as_number
from fusemlp.describe.conflicts import check_together
from fusemlp.describe.optimizers import Exponential
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.examples import Examples
from fusemlp.report.plots import draw, sweep_figure
from fusemlp.runtime.session import Session
from fusemlp.runtime.steps import step as step_on
from fusemlp_kernels.errors import ArgumentTypeError, DivergenceError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING = 0.95
# The sweep ends when the smoothed loss exceeds its minimum by this many times the first loss.
BLOWN_UP = 3.0
FEWEST_STEPS = 20
FEWEST = 8
# The average of the first losses is noisy, so no slope is taken from them.
SETTLING = 20


@dataclass(frozen=True)
class LearningRateSweep:
    """The curve of a sweep: ``rates`` and smoothed ``losses``, one of each an update, and the suggested rate.

    ``suggestion`` is the rate in the middle of the decade over which the loss falls most. ``complete`` is False if the
    loss blew up and the remaining rates were skipped.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float
    complete: bool

    def plot(self, path: str | Path | None = None, *, title: str = "learning rate sweep") -> Figure:
        """Draw loss over learning rate, and write it to ``path`` (.png, .svg, .pdf); ArgumentError for another path."""
        return draw(lambda: sweep_figure(self.rates, self.losses, self.suggestion, title), path)


def lr_find(
    engine: Session,
    X: Any,
    y: Any,
    *,
    sample_weight: Any = None,
    start: float = 1e-6,
    end: float = 10.0,
    steps: int = 200,
) -> LearningRateSweep:
    """Raise the learning rate from ``start`` to ``end`` over ``steps`` updates and watch the loss.

    X (n, K), y and sample_weight are as in ``fit``. The sweep trains a copy of the engine with a fresh optimizer: the
    engine itself does not change, the rate is not applied. The curve is informative only where the loss still falls.

    Raises ShapeError, DTypeError, DataError, ArgumentError, ArgumentTypeError, DivergenceError if it blows up at once.
    """
    if not isinstance(engine, Session):
        raise ArgumentTypeError(f"engine: expected an Engine, got {type(engine).__name__}")
    check_together({**engine.uses, "lr_find": True})
    start = as_number("start", start, low=0.0, low_open=True)
    end = as_number("end", end, low=start, low_open=True)
    steps = as_count("steps", steps, minimum=FEWEST_STEPS)
    data = engine.inputs.examples(X, y, sample_weight, codes=True)
    engine.scaling.warn("X", data.X)
    before = engine.scaling.scale
    data = data._replace(X=engine.scaling.take_in(data.X)).map(engine.inputs.on_host)
    engine.scaling.scale = before
    gamma = (end / start) ** (1.0 / (steps - 1))
    copy = engine.like(
        Session,
        optimizer=replace(engine.optimizer, lr=Exponential(start, gamma=gamma)),
        batch_size=min(engine.batch_size, len(data.X)),
        normalise=False,
    )
    copy.load_state_dict(engine.memory.tensors())
    rates, losses = sweep(copy, data, steps=steps)
    return LearningRateSweep(tuple(rates), tuple(losses), steepest(rates, losses), len(rates) == steps)


def sweep(engine: Session, data: Examples, *, steps: int) -> tuple[list[float], list[float]]:
    """Return rate and smoothed loss of each update until the loss blows up; DivergenceError if it does so at once."""
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    accumulate = engine.optimizer.accumulate
    batches = _batches(len(data.X), engine.batch_size, engine.seed)
    for step in range(steps):
        rate = engine.learning_rate
        loss = 0.0
        # An update may take several batches.
        for rows in itertools.islice(batches, accumulate):
            batch = data.map(operator.itemgetter(rows))
            loss += float(step_on(engine, batch.X, batch.targets.values, batch.weight)) / accumulate
        # Correct the average for its start from zero, as in Adam.
        average = SMOOTHING * average + (1.0 - SMOOTHING) * loss
        smoothed = average / (1.0 - SMOOTHING ** (step + 1))
        if not math.isfinite(smoothed) or (losses and smoothed - min(losses) > BLOWN_UP * abs(losses[0])):
            break
        rates.append(rate)
        losses.append(smoothed)
    if len(rates) < FEWEST:
        place = f"after {len(rates)} updates, at a learning rate of {rate:.3g}"
        raise DivergenceError(f"loss: it blew up {place}; begin lower, with start (--from)")
    return rates, losses


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Return the rate in the middle of the decade, which averages noise, over which the loss falls most."""
    decades = math.log10(rates[-1] / rates[0])
    half = max(1, min(len(rates) // 4, round((len(rates) - 1) / decades / 2)))
    first = min(SETTLING, len(rates) // 4)
    middles = range(first + half, len(rates) - half)
    return rates[min(middles, key=lambda middle: losses[middle + half] - losses[middle - half])]


def _batches(n: int, size: int, seed: int) -> Iterator[Array]:
    """Yield whole batches of row indices forever, in a new order each pass."""
    generator = np.random.default_rng(seed)
    while True:
        order = generator.permutation(n)
        for first in range(0, n - size + 1, size):
            yield order[first : first + size]
