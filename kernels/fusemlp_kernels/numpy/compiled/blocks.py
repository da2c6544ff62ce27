"""A block of rows of the batch through one call, and the sums over all blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.contract import BATCH_INDEX, ROW_OFFSET, ROW_STEP, ROW_TOTAL
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.layers import (
    activate_rows,
    batch_rows,
    block,
    derive,
    derive_rows,
    gather,
    lanes_of,
    shard_rows,
)
from fusemlp_kernels.numpy.compiled.losses import cross_entropy, elementwise, record, shares_of
from fusemlp_kernels.numpy.compiled.members import affine_rows, backward_rows, heads, heads_backward
from fusemlp_kernels.numpy.compiled.noise import add_squares, shrink
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.perturb import perturb_rows
from fusemlp_kernels.numpy.compiled.views import elements, part

# The rows of the next batch are asked for a step ahead, if a batch has at most this many bytes: a larger one takes the
# place of what is needed before.
AHEAD = 1 << 19


@register_jitable(**EXACT)
def by_rows(call: Any, head: Any, like: Any, counters: Any, task: int) -> None:
    """A block of rows of a call, after its product."""
    kind, outputs, batch_index = call.kind, call.n, counters[BATCH_INDEX]
    whole = batch_rows(head, counters)
    first = task * head.block
    count = max(0, min(head.block, shard_rows(call, head, counters) - first))
    batch = elements(np.int64, call.rows + 8 * call.walks * counters[ROW_OFFSET])
    rows = part(batch, call.shard)
    partials = elements(np.float64, head.partials + 8 * head.partial_count * task)
    if kind == t.GATHER:
        step, total, left = counters[ROW_STEP], counters[ROW_TOTAL], 0
        if call.walks and step * total > 0 and step * call.k * like.itemsize <= AHEAD:
            # none beyond the epoch
            left = total - counters[ROW_OFFSET] % total - step - call.shard
        gather(call, like, rows, first, count, part(rows, step), left)
    elif kind == t.ACTIVATE:
        activate_rows(call, like, first, count, batch_index, lanes_of(head, task))
    elif kind in (t.ENTROPY, t.ELEMENTWISE):
        labels, target = elements(np.int64, call.target), elements(like, call.target)
        weight, class_weight = elements(like, call.weighted), elements(like, call.class_weighted)
        y, z = block(like, call.y, first, outputs), block(like, call.z, first, outputs)
        dz, own_rows = block(like, call.dz, first, outputs), part(rows, first)
        shares = shares_of(labels, weight, class_weight, batch, whole if outputs else 0, call)
        scored = count if outputs else 0
        if kind == t.ENTROPY:
            cross_entropy(
                z, dz, labels, target, weight, class_weight, own_rows, scored, outputs, call, shares, partials
            )  # fmt: skip
        # no else: its code would stay where it is not used
        elif kind == t.ELEMENTWISE:
            elementwise(y, dz, target, weight, own_rows, scored, outputs, call, shares, partials)
            derive(call, like, partials, y, z, dz, count * outputs, 1.0)
    elif kind == t.PADDING:
        end = min(call.k, first + head.block)
        dz = block(like, call.dz, first, outputs)
        for i in range(count * outputs, (end - first) * outputs):
            dz[i] = 0
    elif kind == t.BACKWARD:
        derive_rows(call, like, partials, first, count)
    elif kind == t.PERTURB:
        perturb_rows(call, like, rows, first, count, batch_index, lanes_of(head, task))
    elif kind == t.MEMBERS_AFFINE:
        affine_rows(call, head, like, rows, first, count, batch_index, task)
    elif kind == t.MEMBERS_BACKWARD:
        backward_rows(call, like, rows, first, count, task)
    elif kind == t.HEADS:
        heads(call, head, like, first, count)
    elif kind == t.HEADS_BACKWARD:
        heads_backward(call, head, like, first, count)
    elif kind == t.SQUARES:
        x, dz = block(like, call.x, first, call.k), block(like, call.dz, first, outputs)
        norms = elements(np.float64, call.out + 8 * first)
        add_squares(norms, x, dz, count, call.k, outputs, call.b, call.afresh)
    elif kind == t.SHRINK:
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
def end_rows(call: Any, head: Any, like: Any, counters: Any, tasks: int) -> None:
    """Add up the partial results of a call by rows."""
    kind, width = call.kind, head.partial_count
    partials = elements(np.float64, head.partials)
    stats, whole = elements(np.float64, call.recorded), batch_rows(head, counters)
    if call.dslope:
        elements(like, call.dslope)[0] = _sum(partials, call.slope_part, width, tasks)
    if kind in (t.ENTROPY, t.ELEMENTWISE) and call.recorded:
        loss = _sum(partials, t.LOSS_PART, width, tasks)
        hits, scored = _sum(partials, t.HITS_PART, width, tasks), _sum(partials, t.SCORED_PART, width, tasks)
        shares = partials[t.SHARES_PART]
        record(stats, loss, hits, scored, shares, call, whole if call.n else 0)
