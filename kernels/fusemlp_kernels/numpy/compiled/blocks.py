"""A block of rows of the batch through one call, and the sums over all blocks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.contract import BATCH_INDEX, ROW_OFFSET, ROW_STEP, ROW_TOTAL
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.calls import batch_rows, block, lanes_of, shard_rows
from fusemlp_kernels.numpy.compiled.layers import activate_rows, derive, derive_rows, gather
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
def by_rows(call: Any, numbers: Any, integers: Any, like: Any, counters: Any, task: int) -> None:
    """A block of rows of a call, after its product."""
    kind, outputs, batch_index = call[t.KIND_OF_ROW], call[t.N], counters[BATCH_INDEX]
    whole = batch_rows(integers, counters)
    first = task * integers[t.BLOCK]
    count = max(0, min(integers[t.BLOCK], shard_rows(call, integers, counters) - first))
    batch = elements(integers, call[t.ROWS] + 8 * call[t.WALKS] * counters[ROW_OFFSET])
    rows = part(batch, call[t.SHARD])
    partials = elements(np.float64, integers[t.AT_PARTIALS] + 8 * integers[t.PARTIALS] * task)
    if kind == t.GATHER:
        step, total, left = counters[ROW_STEP], counters[ROW_TOTAL], 0
        if call[t.WALKS] and step * total > 0 and step * call[t.K] * like.itemsize <= AHEAD:
            # none beyond the epoch
            left = total - counters[ROW_OFFSET] % total - step - call[t.SHARD]
        gather(call, like, rows, first, count, part(rows, step), left)
    elif kind == t.ACTIVATE:
        activate_rows(call, numbers, like, first, count, batch_index, lanes_of(integers, task))
    elif kind in (t.ENTROPY, t.ELEMENTWISE):
        labels, target = elements(integers, call[t.TARGET]), elements(like, call[t.TARGET])
        weight, class_weight = elements(like, call[t.WEIGHTED]), elements(like, call[t.CLASS_WEIGHTED])
        y, z = block(like, call[t.Y], first, outputs), block(like, call[t.Z], first, outputs)
        dz, own_rows = block(like, call[t.DZ], first, outputs), part(rows, first)
        shares = shares_of(labels, weight, class_weight, batch, whole if outputs else 0, call)
        scored = count if outputs else 0
        if kind == t.ENTROPY:
            cross_entropy(
                z, dz, labels, target, weight, class_weight, own_rows, scored, outputs, call, numbers, shares, partials
            )  # fmt: skip
        # no else: its code would stay where it is not used
        elif kind == t.ELEMENTWISE:
            elementwise(y, dz, target, weight, own_rows, scored, outputs, call, numbers, shares, partials)
            derive(call, numbers, like, partials, y, z, dz, count * outputs, 1.0)
    elif kind == t.PADDING:
        end = min(call[t.K], first + integers[t.BLOCK])
        dz = block(like, call[t.DZ], first, outputs)
        for i in range(count * outputs, (end - first) * outputs):
            dz[i] = 0
    elif kind == t.BACKWARD:
        derive_rows(call, numbers, like, partials, first, count)
    elif kind == t.PERTURB:
        perturb_rows(call, numbers, like, rows, first, count, batch_index, lanes_of(integers, task))
    elif kind == t.MEMBERS_AFFINE:
        affine_rows(call, numbers, integers, like, rows, first, count, batch_index, task)
    elif kind == t.MEMBERS_BACKWARD:
        backward_rows(call, numbers, like, rows, first, count, task)
    elif kind == t.HEADS:
        heads(call, integers, like, first, count)
    elif kind == t.HEADS_BACKWARD:
        heads_backward(call, integers, like, first, count)
    elif kind == t.SQUARES:
        x, dz = block(like, call[t.X], first, call[t.K]), block(like, call[t.DZ], first, outputs)
        norms = elements(np.float64, call[t.OUT] + 8 * first)
        add_squares(norms, x, dz, count, call[t.K], outputs, call[t.B], call[t.AFRESH])
    elif kind == t.SHRINK:
        norms = elements(np.float64, call[t.OUT] + 8 * first)
        shrink(norms, block(like, call[t.DZ], first, outputs), count, outputs, numbers[t.LARGEST])


@register_jitable(**EXACT)
def _sum(partials: Any, place: int, width: int, tasks: int) -> float:
    """The sum of one of the partial results of all tasks, in their order."""
    total = 0.0
    for task in range(tasks):
        total += partials[width * task + place]
    return total


@register_jitable(**EXACT)
def end_rows(call: Any, numbers: Any, integers: Any, like: Any, counters: Any, tasks: int) -> None:
    """Add up the partial results of a call by rows."""
    kind, width = call[t.KIND_OF_ROW], integers[t.PARTIALS]
    partials = elements(np.float64, integers[t.AT_PARTIALS])
    stats, whole = elements(np.float64, call[t.RECORDED]), batch_rows(integers, counters)
    if call[t.DSLOPE]:
        elements(like, call[t.DSLOPE])[0] = _sum(partials, call[t.SLOPE_PART], width, tasks)
    if kind in (t.ENTROPY, t.ELEMENTWISE) and call[t.RECORDED]:
        loss = _sum(partials, t.LOSS_PART, width, tasks)
        hits, scored = _sum(partials, t.HITS_PART, width, tasks), _sum(partials, t.SCORED_PART, width, tasks)
        shares = partials[t.SHARES_PART]
        record(stats, loss, hits, scored, shares, call, numbers, whole if call[t.N] else 0)
