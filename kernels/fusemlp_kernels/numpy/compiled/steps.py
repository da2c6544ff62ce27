"""The work of a training step: the calls of its program, phase by phase and task by task, and the clock.

The order of backpropagation is the table's, which ``calls`` fills from the program; ``plan`` cuts it into phases. A
task is blocks of rows of the batch, which go through one call after another, or pieces of tensors. A call by itself is
a table of its own rows, run once. The clock is compiled without any relaxation, so that the rates are the very numbers
of the other plans.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels import contract as c
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.columns import add_columns
from fusemlp_kernels.numpy.compiled.compiler import (
    EXACT,
    block,
    call_at,
    elements,
    head_at,
    part,
    phase_at,
    piece_at,
    task_at,
)
from fusemlp_kernels.numpy.compiled.inputs import encode_rows, perturb_rows
from fusemlp_kernels.numpy.compiled.layers import (
    activate_rows,
    add_rows,
    batch_rows,
    derive,
    derive_rows,
    gather,
    heads,
    heads_backward,
    lanes_of,
    product,
    scale_rows,
    scale_rows_backward,
    shard_rows,
)
from fusemlp_kernels.numpy.compiled.losses import cross_entropy, elementwise, present, record, shares_of
from fusemlp_kernels.numpy.compiled.pieces import by_piece, clip_factor
from fusemlp_kernels.numpy.compiled.random import add_squares, shrink

# The type of the parameters; another copy of this module has another.
REAL: Any = np.float32
# The rows of the next batch are asked for a step ahead, if a batch has at most this many bytes: a larger one takes the
# place of what is needed before.
AHEAD = 1 << 19


@register_jitable(**EXACT)
def _by_rows(call: Any, head: Any, like: Any, counters: Any, task: int, room: int) -> None:
    """A block of rows of a call, after its product."""
    kind, outputs, batch_index = call.kind, call.n, counters[c.BATCH_INDEX]
    whole = batch_rows(head, counters)
    first = task * head.block
    count = max(0, min(head.block, shard_rows(call, head, counters) - first))
    batch = elements(np.int64, call.rows + 8 * call.walks * counters[c.ROW_OFFSET])
    rows = part(batch, call.shard)
    partials = elements(np.float64, head.partials + 8 * head.partial_count * task)
    if kind == t.Kind.GATHER:
        step, total, left = counters[c.ROW_STEP], counters[c.ROW_TOTAL], 0
        if call.walks and step * total > 0 and step * call.k * like.itemsize <= AHEAD:
            # none beyond the epoch
            left = total - counters[c.ROW_OFFSET] % total - step - call.shard
        gather(call, like, rows, first, count, part(rows, step), left)
    elif kind == t.Kind.ACTIVATE:
        activate_rows(call, like, first, count, batch_index, lanes_of(head, task))
    elif kind in (t.Kind.ENTROPY, t.Kind.ELEMENTWISE):
        labels, target = elements(np.int64, call.target), elements(like, call.target)
        weight, class_weight = elements(like, call.weighted), elements(like, call.class_weighted)
        y, z = block(like, call.y, first, outputs), block(like, call.z, first, outputs)
        dz, own_rows = block(like, call.dz, first, outputs), part(rows, first)
        shares = shares_of(labels, weight, class_weight, batch, whole if outputs else 0, call)
        scored = count if outputs else 0
        if kind == t.Kind.ENTROPY:
            cross_entropy(
                z, dz, labels, target, weight, class_weight, own_rows, scored, outputs, call, shares, partials
            )
        # no else: its code would stay where it is not used
        elif kind == t.Kind.ELEMENTWISE:
            spare, levels = elements(like, call.out), elements(like, call.b)
            spare = part(spare, first * (outputs if call.b else 3 * call.k))
            elementwise(y, dz, target, weight, own_rows, scored, outputs, call, shares, partials, spare, levels)
            derive(call, like, partials, y, z, dz, count * outputs, 1.0)
    elif kind == t.Kind.PADDING:
        end = min(call.k, first + head.block)
        dz = block(like, call.dz, first, outputs)
        for i in range(count * outputs, (end - first) * outputs):
            dz[i] = 0
    elif kind == t.Kind.BACKWARD:
        derive_rows(call, like, partials, first, count)
    elif kind == t.Kind.COLUMNS:
        add_columns(call, head, like, first, count, task)
    elif kind == t.Kind.PERTURB:
        perturb_rows(call, like, rows, first, count, batch_index, lanes_of(head, task))
    elif kind == t.Kind.ENCODE:
        encode_rows(call, like, rows, first, count, task)
    elif kind == t.Kind.SCALE:
        scale_rows(call, head, like, rows, first, count, batch_index, task)
    elif kind == t.Kind.SCALE_BACKWARD:
        scale_rows_backward(call, like, rows, first, count, task)
    elif kind == t.Kind.HEADS:
        heads(call, head, like, first, count, room)
    elif kind == t.Kind.HEADS_BACKWARD:
        heads_backward(call, head, like, first, count, room)
    elif kind == t.Kind.ADD:
        add_rows(call, like, first, count)
    elif kind == t.Kind.SQUARES:
        x, dz = block(like, call.x, first, call.k), block(like, call.dz, first, outputs)
        norms = elements(np.float64, call.out + 8 * first)
        add_squares(norms, x, dz, count, call.k, outputs, call.b, call.afresh)
    elif kind == t.Kind.SHRINK:
        norms = elements(np.float64, call.out + 8 * first)
        shrink(norms, block(like, call.dz, first, outputs), count, outputs, call.largest)


@register_jitable(**EXACT)
def _sum(partials: Any, place: int, width: int, tasks: int) -> float:
    """The sum of one of the partial results of all tasks, in their order."""
    total = 0.0
    for task in range(tasks):
        total += partials[width * task + place]
    return total


@register_jitable(**EXACT)
def _end_rows(call: Any, head: Any, like: Any, counters: Any, tasks: int) -> None:
    """Add up the partial results of a call by rows."""
    kind, width = call.kind, head.partial_count
    partials = elements(np.float64, head.partials)
    stats, whole = elements(np.float64, call.recorded), batch_rows(head, counters)
    if call.dslope:
        elements(like, call.dslope)[0] = _sum(partials, call.slope_part, width, tasks)
    if kind in (t.Kind.ENTROPY, t.Kind.ELEMENTWISE) and call.recorded:
        loss = _sum(partials, t.LOSS_PART, width, tasks)
        hits, scored = _sum(partials, t.HITS_PART, width, tasks), _sum(partials, t.SCORED_PART, width, tasks)
        shares = partials[t.SHARES_PART]
        record(stats, loss, hits, scored, shares, call, whole if call.n else 0)


@register_jitable(**EXACT)
def _advance(head: Any, counters: Any, updated: bool) -> None:
    """Go on to the next batch, and after an update to the next row of ``rates``.

    The statistics of an epoch go into ``epoch_stats`` after its last batch.
    """
    hyper, rates = elements(np.float64, head.hyper), elements(np.float64, head.rates)
    stats, epoch_stats = elements(np.float64, head.stats), elements(np.float64, head.epoch_stats)
    counters[c.BATCH_INDEX] += 1
    step, total = counters[c.ROW_STEP], counters[c.ROW_TOTAL]
    if step != 0:
        epoch = counters[c.ROW_OFFSET] // total if total > 0 else 0
        inside = counters[c.ROW_OFFSET] - epoch * total + step
        if inside >= total:
            if epoch < head.epochs:
                # element by element: what numba compiles for a slice takes seconds to compile
                for i in range(c.STATS):
                    epoch_stats[epoch * c.STATS + i] = stats[i]
                    if i >= c.LOSS_SUM:
                        stats[i] = 0.0
            epoch = epoch + 1 if epoch + 1 < head.epochs else 0
            inside = 0
        counters[c.ROW_OFFSET] = epoch * total + inside
        counters[c.ROW_COUNT] = step if step < total - inside else total - inside
    if not updated:
        return
    counters[c.UPDATE_COUNT] += 1
    # the first row for updates before the table's, the last for those after it
    at, last = counters[c.UPDATE_COUNT] - int(rates[c.FIRST_UPDATE]), int(rates[c.ROWS_FILLED]) - 1
    start = c.RATE_COLUMNS * (1 + (0 if at < 0 else (at if at < last else last)))
    hyper[c.LEARNING_RATE] = rates[start + c.LEARNING_RATE] * hyper[c.RATE_SCALE]
    hyper[c.BIAS_CORRECTION_1] = rates[start + c.BIAS_CORRECTION_1]
    hyper[c.BIAS_CORRECTION_2] = rates[start + c.BIAS_CORRECTION_2]
    hyper[c.SHARE] = rates[start + c.RATE_SHARE]


@register_jitable(**EXACT)
def _end_phase(head: Any, like: Any, counters: Any, phase: Any) -> None:
    """Do the rest of a phase, in one thread, when all its tasks have ended."""
    if phase.cut == t.BY_ROWS:
        for at in range(phase.first, phase.end):
            _end_rows(call_at(head.calls, at), head, like, counters, phase.tasks)
    elif phase.cut == t.BY_PIECES:
        total = 0.0
        first = task_at(head.tasks, phase.first_task).first
        end = task_at(head.tasks, phase.first_task + phase.tasks - 1).end
        sums = elements(np.float64, head.sums)
        for at in range(first, end):
            total += sums[at]
        call = call_at(head.calls, phase.first)
        if call.kind == t.Kind.NORM:
            grads, scale = elements(like, call.dz), 1.0 / head.accumulate
            scale *= clip_factor(grads, head.tensors, call.first, call.end, total, scale, head.clip_norm)
            head.scale = scale
        elif total != 0.0:
            # penalties
            elements(np.float64, head.stats)[c.PENALTIES] += 0.5 * total * batch_rows(head, counters)


@register_jitable(**EXACT)
def _open(head: Any, like: Any) -> int:
    """End the phase under way and open the next that has tasks; their number, or 0 at a pause and after all steps."""
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
        updated = (counters[c.BATCH_INDEX] + 1) % head.accumulate == 0
        if phase.cut == t.AT_ONCE:
            _advance(head, counters, updated)
            if head.noisy:
                rows = elements(np.int64, head.noisy + 8 * counters[c.ROW_OFFSET])
                while counters[c.ROW_COUNT] > 0 and rows[counters[c.ROW_COUNT] - 1] < 0:
                    counters[c.ROW_COUNT] -= 1
            continue
        if call_at(head.calls, phase.first).kind in (t.Kind.NORM, t.Kind.UPDATE):
            if not updated:
                continue
            if not head.clips:
                head.scale = 1.0 / head.accumulate
        for number in range(phase.first, phase.end):
            call = call_at(head.calls, number)
            if call.missing:
                rows = elements(np.int64, call.rows + 8 * call.walks * counters[c.ROW_OFFSET])
                target, weight = elements(like, call.target), elements(like, call.weighted)
                call.present = present(target, weight, rows, batch_rows(head, counters), call)
        if phase.tasks == 0:
            if call_at(head.calls, phase.first).kind == t.Kind.PAUSE:
                head.phase = at
                return 0
            continue
        head.phase = at
        return head.row_tasks if phase.cut == t.BY_ROWS else phase.tasks - phase.large + _large_tasks(head, phase)


@register_jitable(**EXACT)
def _large_tasks(head: Any, phase: Any) -> int:
    """Return the number of tasks that the large ones of a phase make in this launch."""
    return -(-phase.large // phase.together) if head.few else phase.large


@register_jitable(**EXACT)
def _continues(head: Any, at: int) -> bool:
    """True if a piece is of a weight and the rows below those of the piece before it."""
    piece, above = piece_at(head.pieces, at), piece_at(head.pieces, at - 1)
    beside = piece.row == above.row and piece.left == above.left and piece.right == above.right
    return beside and piece.top == above.bottom and call_at(head.calls, piece.row).kind == t.Kind.WEIGHT


def work(job: int, task: int, room: int) -> int:
    """Do a task of the phase under way, or, for a negative number, open the next: see ``team``.

    job is the address of a table: see ``tables``; room that of the thread's memory for ``products``.
    """
    head = head_at(job, 0)
    like = elements(REAL, job)
    if task < 0:
        return _open(head, like)
    counters = elements(np.int64, head.counters)
    phase = phase_at(head.phases, head.phase)
    if phase.cut == t.BY_ROWS:
        # of about as many blocks each
        first, end = task * head.blocks // head.row_tasks, (task + 1) * head.blocks // head.row_tasks
        rows = head.block * first
        for at in range(phase.first, phase.end):
            call = call_at(head.calls, at)
            if call.kind in (t.Kind.AFFINE, t.Kind.BACKWARD):
                count = min(head.block * (end - first), shard_rows(call, head, counters) - rows)
                product(call, head, like, rows, count, room)
            for number in range(first, end):
                _by_rows(call, head, like, counters, number, room)
        return 0
    large, together = _large_tasks(head, phase), phase.together if head.few else 1
    first, last = task * together, min((task + 1) * together, phase.large) - 1
    if task >= large:
        first = last = phase.large + task - large
    at, end = task_at(head.tasks, phase.first_task + first).first, task_at(head.tasks, phase.first_task + last).end
    sums, done = elements(np.float64, head.sums), at
    while at < end:
        piece = piece_at(head.pieces, at)
        bottom = piece.top
        if at == done:
            # the gradients of the pieces below it at once: their product copies its operands once
            done += 1
            while done < end and _continues(head, done):
                done += 1
            bottom = piece_at(head.pieces, done - 1).bottom
        sums[at] = by_piece(call_at(head.calls, piece.row), head, like, counters, piece, bottom, task, room)
        at += 1
    return 0
