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
from fusemlp_kernels.numpy.compiled.clock import advance
from fusemlp_kernels.numpy.compiled.layers import batch_rows, product, shard_rows
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.pieces import by_piece, clip_factor
from fusemlp_kernels.numpy.compiled.views import call_at, elements, head_at, phase_at, piece_at, task_at

# The type of the parameters; another copy of this module has another.
REAL: Any = np.float32


@register_jitable(**EXACT)
def _end_phase(head: Any, like: Any, counters: Any, phase: Any) -> None:
    """Do the rest of a phase, in one thread, when all its tasks have ended."""
    if phase.cut == t.BY_ROWS:
        for at in range(phase.first, phase.end):
            call = call_at(head.calls, at)
            end_rows(call, head, like, counters, phase.tasks)
    elif phase.cut == t.BY_PIECES:
        total = 0.0
        first = task_at(head.tasks, phase.first_task).first
        end = task_at(head.tasks, phase.first_task + phase.tasks - 1).end
        sums = elements(np.float64, head.sums)
        for at in range(first, end):
            total += sums[at]
        call = call_at(head.calls, phase.first)
        if call.kind == t.NORM:
            grads, scale = elements(like, call.dz), 1.0 / head.accumulate
            scale *= clip_factor(grads, head.tensors, call.first, call.end, total, scale, head.clip_norm)
            head.scale = scale
        elif total != 0.0:
            # penalties
            elements(np.float64, head.stats)[PENALTIES] += 0.5 * total * batch_rows(head, counters)


@register_jitable(**EXACT)
def _open(head: Any, like: Any) -> int:
    """End the phase under way and open the next that has tasks; their number, or 0 at the end of the last step."""
    counters = elements(np.int64, head.counters)
    at = head.phase
    if at >= 0:
        _end_phase(head, like, counters, phase_at(head.phases, at))
    while True:
        at += 1
        if at == head.phase_count:
            head.step += 1
            if head.step == head.steps:
                return 0
            at = head.prologue
        phase = phase_at(head.phases, at)
        updated = (counters[BATCH_INDEX] + 1) % head.accumulate == 0
        if phase.cut == t.AT_ONCE:
            hyper, rates = elements(np.float64, head.hyper), elements(np.float64, head.rates)
            stats = elements(np.float64, head.stats)
            epoch_stats = elements(np.float64, head.epoch_stats)
            advance(counters, hyper, rates, updated, stats, epoch_stats, head.epochs)
            if head.noisy:
                rows = elements(np.int64, head.noisy + 8 * counters[ROW_OFFSET])
                while counters[ROW_COUNT] > 0 and rows[counters[ROW_COUNT] - 1] < 0:
                    counters[ROW_COUNT] -= 1
            continue
        if call_at(head.calls, phase.first).kind in (t.NORM, t.UPDATE):
            if not updated:
                continue
            if not head.clips:
                head.scale = 1.0 / head.accumulate
        if phase.tasks == 0:
            continue
        head.phase = at
        return -(-phase.tasks // head.together) if phase.cut == t.BY_ROWS else phase.tasks


def work(job: int, task: int) -> int:
    """Do a task of the phase under way, or, for a negative number, open the next: see ``team``.

    job is the address of a table: see ``tables``.
    """
    head = head_at(job, 0)
    like = elements(REAL, job)
    if task < 0:
        return _open(head, like)
    counters = elements(np.int64, head.counters)
    phase = phase_at(head.phases, head.phase)
    if phase.cut == t.BY_ROWS:
        first, end = task * head.together, min((task + 1) * head.together, head.blocks)
        rows = head.block * first
        for at in range(phase.first, phase.end):
            call = call_at(head.calls, at)
            if call.kind in (t.AFFINE, t.BACKWARD):
                count = min(head.block * (end - first), shard_rows(call, head, counters) - rows)
                product(call, head, like, rows, count)
            for number in range(first, end):
                by_rows(call, head, like, counters, number)
        return 0
    pieces, sums = task_at(head.tasks, phase.first_task + task), elements(np.float64, head.sums)
    for at in range(pieces.first, pieces.end):
        piece = piece_at(head.pieces, at)
        sums[at] = by_piece(call_at(head.calls, piece.row), head, like, counters, piece, task)
    return 0
