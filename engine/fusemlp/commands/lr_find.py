"""``fusemlp lr-find``: a sweep of the learning rate (Smith, Cyclical learning rates for training networks, 2017)."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fusemlp.commands import recipe
from fusemlp.commands.apply import check_output, write_output
from fusemlp.commands.options import FindOptions
from fusemlp.commands.prepare import Prepared, prepare
from fusemlp.engine import Engine
from fusemlp.plots import HINT, can_plot, sweep_png
from fusemlp.reports import aligned
from fusemlp.schedules import Exponential
from fusemlp.validation import Array, as_count, as_number
from fusemlp_kernels.errors import ArgumentError, DivergenceError

SMOOTHING = 0.95
# The sweep ends where the smoothed loss is this many times the first loss above its lowest.
BLOWN_UP = 3.0
TABLE_ROWS = 20
FEWEST = 8
# The average of the first losses is still rough: no slope is read off them.
SETTLING = 20


def lr_find(options: FindOptions) -> None:
    """Sweep, print a table of rate and smoothed loss, and suggest the rate where the loss falls most steeply."""
    start = as_number("from", options.start, low=0.0, low_open=True)
    end = as_number("to", options.end, low=start, low_open=True)
    as_count("steps", options.steps, minimum=20)
    if options.lr is not None:
        raise ArgumentError("lr: lr-find goes through the rates itself; say which with --from and --to")
    if options.data is None:
        raise ArgumentError("DATA: say which data the learning rate is for, such as digits")
    if options.plot is not None:
        check_output("plot", Path(options.plot), (".png",), force=options.force)
        if not can_plot():
            raise ArgumentError(f"plot: it needs matplotlib: {HINT}")
    prepared = prepare(options)
    gamma = (end / start) ** (1.0 / (options.steps - 1))
    engine = Engine(
        prepared.network,
        loss=prepared.loss,
        optimizer=recipe.optimizer(options, Exponential(start, gamma=gamma)),
        batch_size=min(as_count("batch_size", options.batch_size), len(prepared.train)),
        seed=options.seed,
        backend=options.backend,
        device=options.device,
        precision=options.precision,
        plan=options.plan,
    )
    rates, losses = sweep(engine, prepared, steps=options.steps)
    suggested = steepest(rates, losses)
    if options.plot is not None:
        title = f"{prepared.dataset.name}: {'-'.join(map(str, engine.network.sizes))}, {engine.optimizer.kind}"
        write_output("plot", Path(options.plot), sweep_png(rates, losses, suggested, title))
    if options.as_json:
        content = {"suggested": suggested, "rates": rates, "losses": losses, "plot": options.plot}
        print(json.dumps(content))
        return
    if len(rates) < options.steps:
        print(f"the loss blew up after {len(rates)} of {options.steps} updates", file=sys.stderr)
    shown = np.unique(np.linspace(0, len(rates) - 1, TABLE_ROWS).round().astype(int))
    print(aligned([["rate", "loss"], *([f"{rates[i]:.2e}", f"{losses[i]:.4g}"] for i in shown)]))
    print(f"suggested learning rate {suggested:.2g}")
    if options.plot is not None:
        print(f"plot {options.plot}")


def sweep(engine: Engine, prepared: Prepared, *, steps: int) -> tuple[list[float], list[float]]:
    """The rate and the smoothed loss of each update, to the last or to where the loss blows up.

    Raises DivergenceError if that happens at once.
    """
    rates: list[float] = []
    losses: list[float] = []
    average = 0.0
    batches = _batches(prepared, engine.batch_size, engine.seed)
    for step in range(steps):
        rate = engine.learning_rate
        X, y, weight = next(batches)
        loss = float(engine.step(X, y, weight))
        # The average is corrected for its start from zero, as Adam's are.
        average = SMOOTHING * average + (1.0 - SMOOTHING) * loss
        smoothed = average / (1.0 - SMOOTHING ** (step + 1))
        if not math.isfinite(smoothed) or (losses and smoothed - min(losses) > BLOWN_UP * abs(losses[0])):
            break
        rates.append(rate)
        losses.append(smoothed)
    if len(rates) < FEWEST:
        raise DivergenceError(
            f"loss: it blew up after {len(rates)} updates, at a learning rate of {rate:.3g}; begin lower with --from"
        )
    return rates, losses


def steepest(rates: Sequence[float], losses: Sequence[float]) -> float:
    """The rate in the middle of the decade over which the loss falls most.

    Batches differ, and so does the loss from step to step: the slope from one to the next says little.
    """
    decades = math.log10(rates[-1] / rates[0])
    half = max(1, min(len(rates) // 4, round((len(rates) - 1) / decades / 2)))
    first = min(SETTLING, len(rates) // 4)
    middles = range(first + half, len(rates) - half)
    return rates[min(middles, key=lambda middle: losses[middle + half] - losses[middle - half])]


def _batches(prepared: Prepared, size: int, seed: int) -> Iterator[tuple[Array, Array, Array | None]]:
    """Whole batches of the training rows, in a new order each time round, without end."""
    rows, generator = prepared.train, np.random.default_rng(seed)
    while True:
        order = generator.permutation(len(rows))
        for first in range(0, len(rows) - size + 1, size):
            chosen = order[first : first + size]
            yield rows.X[chosen], rows.y[chosen], None if rows.weight is None else rows.weight[chosen]
