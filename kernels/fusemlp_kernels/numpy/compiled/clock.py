"""The clock of the contract: counters, and the learning rate and bias corrections of the next update.

Compiled without any relaxation, so that the rates are the very numbers of the other plans.
"""

from __future__ import annotations

from typing import Any

from numba.extending import register_jitable

from fusemlp_kernels.contract import (
    BATCH_INDEX,
    BIAS_CORRECTION_1,
    BIAS_CORRECTION_2,
    FIRST_UPDATE,
    LEARNING_RATE,
    LOSS_SUM,
    RATE_COLUMNS,
    RATE_SCALE,
    RATE_SHARE,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_STEP,
    ROW_TOTAL,
    ROWS_FILLED,
    SHARE,
    STATS,
    UPDATE_COUNT,
)
from fusemlp_kernels.numpy.compiled.options import EXACT


@register_jitable(**EXACT)
def advance(
    counters: Any, hyper: Any, rates: Any, updated: bool, stats: Any, epoch_stats: Any, epochs: int
) -> None:  # fmt: skip
    """Go on to the next batch, and after an update to the next row of ``rates``.

    The statistics of an epoch go into ``epoch_stats`` after its last batch. Both are flat.
    """
    counters[BATCH_INDEX] += 1
    step, total = counters[ROW_STEP], counters[ROW_TOTAL]
    if step != 0:
        epoch = counters[ROW_OFFSET] // total if total > 0 else 0
        inside = counters[ROW_OFFSET] - epoch * total + step
        if inside >= total:
            if epoch < epochs:
                # element by element: what numba compiles for a slice takes seconds to compile
                for i in range(STATS):
                    epoch_stats[epoch * STATS + i] = stats[i]
                    if i >= LOSS_SUM:
                        stats[i] = 0.0
            epoch = epoch + 1 if epoch + 1 < epochs else 0
            inside = 0
        counters[ROW_OFFSET] = epoch * total + inside
        counters[ROW_COUNT] = step if step < total - inside else total - inside
    if not updated:
        return
    counters[UPDATE_COUNT] += 1
    # the first row for updates before the table's, the last for those after it
    at, last = counters[UPDATE_COUNT] - int(rates[FIRST_UPDATE]), int(rates[ROWS_FILLED]) - 1
    start = RATE_COLUMNS * (1 + (0 if at < 0 else (at if at < last else last)))
    hyper[LEARNING_RATE] = rates[start + LEARNING_RATE] * hyper[RATE_SCALE]
    hyper[BIAS_CORRECTION_1] = rates[start + BIAS_CORRECTION_1]
    hyper[BIAS_CORRECTION_2] = rates[start + BIAS_CORRECTION_2]
    hyper[SHARE] = rates[start + RATE_SHARE]
