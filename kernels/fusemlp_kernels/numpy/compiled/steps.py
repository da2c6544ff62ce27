"""The work of a training step: the calls of its program, phase by phase and task by task.

The order of backpropagation is the table's, which ``calls`` fills from the program; ``plan`` cuts it into phases. A
call by itself is a table of its own rows, run once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.contract import BATCH_INDEX, PENALTIES, ROW_COUNT, ROW_OFFSET
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.blocks import by_rows, end_rows
from fusemlp_kernels.numpy.compiled.calls import batch_rows, row_of, shard_rows
from fusemlp_kernels.numpy.compiled.clock import advance
from fusemlp_kernels.numpy.compiled.layers import product
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.pieces import by_piece
from fusemlp_kernels.numpy.compiled.updates import clip_factor
from fusemlp_kernels.numpy.compiled.views import elements, part

# The type of the parameters; another copy of this module has another.
REAL: Any = np.float32


@register_jitable(**EXACT)
def _end_phase(integers: Any, factors: Any, like: Any, counters: Any, phase: Any) -> None:
    """Do the rest of a phase, in one thread, when all its tasks have ended."""
    if phase[t.CUT] == t.BY_ROWS:
        for at in range(phase[t.ROW_FIRST], phase[t.ROW_END]):
            call, numbers = row_of(integers, factors, at)
            end_rows(call, numbers, integers, like, counters, phase[t.TASKS])
    elif phase[t.CUT] == t.BY_PIECES:
        total = 0.0
        tasks = part(integers, integers[t.AT_TASKS] + t.TASK_COLUMNS * phase[t.TASK_FIRST])
        first, end = tasks[t.PIECE_FIRST], tasks[t.TASK_COLUMNS * (phase[t.TASKS] - 1) + t.PIECE_END]
        sums = elements(np.float64, integers[t.AT_SUMS])
        for at in range(first, end):
            total += sums[at]
        call, _ = row_of(integers, factors, phase[t.ROW_FIRST])
        if call[t.KIND_OF_ROW] == t.NORM:
            tensors = part(integers, t.HEAD_COLUMNS + t.CALL_COLUMNS * integers[t.CALLS])
            grads, scale = elements(like, call[t.DZ]), 1.0 / integers[t.ACCUMULATE]
            scale *= clip_factor(grads, tensors, call[t.FIRST], call[t.END], total, scale, factors[t.CLIP_NORM])
            factors[t.SCALE] = scale
        elif total != 0.0:
            # penalties
            elements(np.float64, integers[t.AT_STATS])[PENALTIES] += 0.5 * total * batch_rows(integers, counters)


@register_jitable(**EXACT)
def _open(integers: Any, factors: Any, like: Any) -> int:
    """End the phase under way and open the next that has tasks; their number, or 0 at the end of the last step."""
    counters = elements(np.int64, integers[t.AT_COUNTERS])
    at = integers[t.PHASE]
    if at >= 0:
        _end_phase(integers, factors, like, counters, part(integers, integers[t.AT_PHASES] + t.PHASE_COLUMNS * at))
    while True:
        at += 1
        if at == integers[t.PHASES]:
            integers[t.STEP] += 1
            if integers[t.STEP] == integers[t.STEPS]:
                return 0
            at = integers[t.PROLOGUE]
        phase = part(integers, integers[t.AT_PHASES] + t.PHASE_COLUMNS * at)
        updated = (counters[BATCH_INDEX] + 1) % integers[t.ACCUMULATE] == 0
        if phase[t.CUT] == t.AT_ONCE:
            hyper, rates = elements(np.float64, integers[t.AT_HYPER]), elements(np.float64, integers[t.AT_RATES])
            stats = elements(np.float64, integers[t.AT_STATS])
            epoch_stats = elements(np.float64, integers[t.AT_EPOCH_STATS])
            advance(counters, hyper, rates, updated, stats, epoch_stats, integers[t.EPOCHS])
            if integers[t.NOISY]:
                rows = elements(integers, integers[t.NOISY] + 8 * counters[ROW_OFFSET])
                while counters[ROW_COUNT] > 0 and rows[counters[ROW_COUNT] - 1] < 0:
                    counters[ROW_COUNT] -= 1
            continue
        call, _ = row_of(integers, factors, phase[t.ROW_FIRST])
        kind = call[t.KIND_OF_ROW]
        if kind in (t.NORM, t.UPDATE):
            if not updated:
                continue
            if not integers[t.CLIPS]:
                factors[t.SCALE] = 1.0 / integers[t.ACCUMULATE]
        if phase[t.TASKS] == 0:
            continue
        integers[t.PHASE] = at
        return -(-phase[t.TASKS] // integers[t.TOGETHER]) if phase[t.CUT] == t.BY_ROWS else phase[t.TASKS]


def work(job: int, task: int) -> int:
    """Do a task of the phase under way, or, for a negative number, open the next: see ``team``.

    job is the address of a table's integers; ``tables`` says what is in them.
    """
    integers = elements(np.int64, job)
    factors = elements(np.float64, integers[t.AT_FACTORS])
    like = elements(REAL, job)
    if task < 0:
        return _open(integers, factors, like)
    counters = elements(np.int64, integers[t.AT_COUNTERS])
    phase = part(integers, integers[t.AT_PHASES] + t.PHASE_COLUMNS * integers[t.PHASE])
    if phase[t.CUT] == t.BY_ROWS:
        first, end = task * integers[t.TOGETHER], min((task + 1) * integers[t.TOGETHER], integers[t.BLOCKS])
        rows = integers[t.BLOCK] * first
        for at in range(phase[t.ROW_FIRST], phase[t.ROW_END]):
            call, numbers = row_of(integers, factors, at)
            if call[t.KIND_OF_ROW] in (t.AFFINE, t.BACKWARD):
                count = min(integers[t.BLOCK] * (end - first), shard_rows(call, integers, counters) - rows)
                product(call, numbers, integers, like, rows, count)
            for number in range(first, end):
                by_rows(call, numbers, integers, like, counters, number)
        return 0
    hyper = elements(np.float64, integers[t.AT_HYPER])
    tensors = part(integers, t.HEAD_COLUMNS + t.CALL_COLUMNS * integers[t.CALLS])
    tensor_factors = part(factors, t.HEAD_FACTORS + t.CALL_FACTORS * integers[t.CALLS])
    pieces = part(integers, integers[t.AT_TASKS] + t.TASK_COLUMNS * (phase[t.TASK_FIRST] + task))
    sums = elements(np.float64, integers[t.AT_SUMS])
    for at in range(pieces[t.PIECE_FIRST], pieces[t.PIECE_END]):
        piece = part(integers, integers[t.AT_PIECES] + t.PIECE_COLUMNS * at)
        call, numbers = row_of(integers, factors, piece[t.PIECE_ROW])
        sums[at] = by_piece(
            call, numbers, integers, factors, like, counters, hyper, tensors, tensor_factors, piece, task
        )  # fmt: skip
    return 0
