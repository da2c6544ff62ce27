"""The host's part of the contract's clock: bias corrections, and the table of learning rates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import repeat
from typing import Any

import numpy as np

from fusemlp_kernels import pointwise
from fusemlp_kernels.contract import (
    BIAS_CORRECTION_1,
    BIAS_CORRECTION_2,
    FIRST_UPDATE,
    GOOD_UPDATES,
    HYPER,
    LEARNING_RATE,
    RATE_COLUMNS,
    RATE_SCALE,
    RATE_SHARE,
    ROWS_FILLED,
    SHARE,
    UpdateRule,
)

Array = np.ndarray[Any, Any]

# 1 - x is 1 for an x up to this: half the distance from 1 to the next smaller number.
_VANISHES = 2.0**-54


@lru_cache(maxsize=16)
def corrections(beta: float, first: int, count: int) -> Array:
    """Return 1 - beta ** (t + 1) for t from ``first`` on, (count,) float64, read-only.

    These are Adam's bias corrections after t updates. Python computes each power by itself, so a number does not depend
    on the rest of the table.
    """
    found = np.ones(count)
    # from this exponent on the correction is exactly 1
    ends = math.log(_VANISHES) / math.log(beta) + 1.0 if beta > 0.0 else 1.0
    below = max(0, min(count, math.ceil(ends) - first))
    exponents = range(first + 1, first + 1 + below)
    found[:below] -= np.fromiter(map(math.pow, repeat(beta), exponents), np.float64, below)
    # read-only since it is cached: the models of a fleet share most tables
    found.flags.writeable = False
    return found


@cache
def _read(formula: str) -> frozenset[str]:
    """Return the names that a formula reads."""
    return frozenset(pointwise.named(pointwise.lines(formula)))


def rate_table(rule: UpdateRule, rates: Array | Sequence[float], first: int = 0) -> Array:
    """Return the contract's ``rates``, (1 + R, RATE_COLUMNS) float64, for R updates after the first ``first``.

    ``rates`` (R,) are their learning rates.
    """
    count = len(rates)
    table = np.zeros((1 + count, RATE_COLUMNS))
    table[0, FIRST_UPDATE], table[0, ROWS_FILLED] = first, count
    table[1:, LEARNING_RATE] = rates
    read = _read(list(pointwise.OPTIMIZERS.values())[rule.code].scalars)
    table[1:, BIAS_CORRECTION_1] = corrections(rule.beta1, first, count) if "bias_correction_1" in read else 1.0
    table[1:, BIAS_CORRECTION_2] = corrections(rule.beta2, first, count) if "bias_correction_2" in read else 1.0
    table[1:, RATE_SHARE] = (1.0 - rule.ema) / corrections(rule.ema, first, count) if rule.ema else 1.0
    return table


def hyper_at(rule: UpdateRule, rate: float, update_count: int = 0, rate_scale: float = 1.0) -> Array:
    """Return ``hyper``, (HYPER,) float64, after ``update_count`` updates.

    The next update has this rate times ``rate_scale``.
    """
    hyper = np.ones(HYPER)
    hyper[RATE_SCALE], hyper[GOOD_UPDATES] = rate_scale, 0.0
    row = rate_table(rule, [rate], update_count)[1]
    hyper[:RATE_SHARE], hyper[SHARE] = row[:RATE_SHARE], row[RATE_SHARE]
    hyper[LEARNING_RATE] *= rate_scale
    return hyper
