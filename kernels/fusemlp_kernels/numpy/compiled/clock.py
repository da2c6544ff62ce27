"""The clock of the contract: counters, learning rate, bias corrections; as ``fusemlp_kernels.clock``.

Compiled without any relaxation, so that the rates are the very numbers of the other plans.
"""

from __future__ import annotations

import math
from typing import Any

from numba.extending import register_jitable

from fusemlp_kernels.contract import (
    BATCH_INDEX,
    BIAS_CORRECTION_1,
    BIAS_CORRECTION_2,
    LEARNING_RATE,
    LOSS_SUM,
    RATE_SCALE,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_STEP,
    ROW_TOTAL,
    STATS,
    UPDATE_COUNT,
)
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.tables import (
    ADAM,
    BASE,
    BETA1,
    BETA2,
    COSINE,
    EXPONENTIAL,
    FINAL,
    GAMMA,
    ONE_CYCLE,
    OPTIMIZER,
    PEAK_FRACTION,
    SCHEDULE,
    STEP,
    STEPS,
    WARMUP,
)


@register_jitable(**EXACT)
def _anneal(start: float, end: float, done: float) -> float:
    return end + (start - end) * (1.0 + math.cos(math.pi * done)) / 2.0


@register_jitable(**EXACT)
def _learning_rate(rule: Any, factors: Any, count: int) -> float:
    """``reference.learning_rate`` after ``count`` updates."""
    warmup, steps, base, final = rule[WARMUP], rule[STEPS], factors[BASE], factors[FINAL]
    warm = (count + 1) / warmup if count < warmup else 1.0
    t = max(count - warmup, 0)
    kind = rule[SCHEDULE]
    rate = base
    if kind == STEP:
        rate = base * math.pow(factors[GAMMA], float(t // steps))
    elif kind == EXPONENTIAL:
        rate = base * math.pow(factors[GAMMA], float(t))
    elif kind == COSINE:
        rate = _anneal(base, final, min(t / steps, 1.0))
    elif kind == ONE_CYCLE:
        peak, last = factors[PEAK_FRACTION] * steps - 1.0, steps - 1.0
        if t <= peak and peak > 0:
            rate = _anneal(base / 25.0, base, t / peak)
        else:
            rate = _anneal(base, final, min((t - peak) / (last - peak), 1.0) if t < last else 1.0)
    return warm * rate


@register_jitable(**EXACT)
def _next_rows(counters: Any, stats: Any, history: Any) -> None:
    """The rows of the next batch; behind the last of an epoch its account is closed."""
    total, step = counters[ROW_TOTAL], counters[ROW_STEP]
    epoch = counters[ROW_OFFSET] // total if total > 0 else 0
    inside = counters[ROW_OFFSET] - epoch * total + step
    if inside >= total:
        if epoch < len(history):
            # element by element: what numba compiles for a slice takes seconds to compile
            for i in range(STATS):
                history[epoch, i] = stats[i]
                if i >= LOSS_SUM:
                    stats[i] = 0.0
        epoch = epoch + 1 if epoch + 1 < len(history) else 0
        inside = 0
    counters[ROW_OFFSET] = epoch * total + inside
    counters[ROW_COUNT] = min(total - inside, step)


@register_jitable(**EXACT)
def advance(rule: Any, factors: Any, counters: Any, hyper: Any, updated: bool, stats: Any, history: Any) -> None:
    """Behind a batch: the next rows, and where an update was applied what the next one needs."""
    counters[BATCH_INDEX] += 1
    if counters[ROW_STEP] != 0:
        _next_rows(counters, stats, history)
    if not updated:
        return
    counters[UPDATE_COUNT] += 1
    count = counters[UPDATE_COUNT]
    hyper[LEARNING_RATE] = _learning_rate(rule, factors, count) * hyper[RATE_SCALE]
    if rule[OPTIMIZER] == ADAM:
        hyper[BIAS_CORRECTION_1] = 1.0 - math.pow(factors[BETA1], float(count + 1))
        hyper[BIAS_CORRECTION_2] = 1.0 - math.pow(factors[BETA2], float(count + 1))
