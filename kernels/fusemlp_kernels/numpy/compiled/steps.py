"""The work of a training step: the calls of its program, phase by phase and task by task.

The order of backpropagation is the table's, which ``calls`` fills from the program; ``plan`` cuts it into phases. A
call by itself is a table of its own rows, run once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.contract import (
    BATCH_INDEX,
    LEARNING_RATE,
    PENALTIES,
    ROW_COUNT,
    ROW_OFFSET,
    ROW_STEP,
    ROW_TOTAL,
    UPDATE_COUNT,
)
from fusemlp_kernels.numpy.compiled.boxes import (
    ball_rows,
    box_rows,
    from_worst,
    kappa,
    magnitudes,
    turn,
    worst,
)
from fusemlp_kernels.numpy.compiled.calls import block, slope_of
from fusemlp_kernels.numpy.compiled.clock import advance
from fusemlp_kernels.numpy.compiled.losses import (
    cross_entropy,
    divergence,
    elementwise,
    record,
    record_divergence,
    shares_of,
)
from fusemlp_kernels.numpy.compiled.masks import drop, mask
from fusemlp_kernels.numpy.compiled.members import affine_rows, backward_rows, heads, heads_backward
from fusemlp_kernels.numpy.compiled.noise import WORDS, add_noise, add_squares, shrink
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.perturb import move, moved, start
from fusemlp_kernels.numpy.compiled.pointwise_numba import activate, multiply_by_derivative, update_average
from fusemlp_kernels.numpy.compiled.products import column_sums
from fusemlp_kernels.numpy.compiled.tables import (
    ACCUMULATE,
    ACTIVATE,
    ACTIVATION,
    AFFINE,
    AFRESH,
    AT_COUNTERS,
    AT_DOTS,
    AT_EPOCH_STATS,
    AT_FACTORS,
    AT_HYPER,
    AT_LANES,
    AT_ONCE,
    AT_PACK,
    AT_PARTIALS,
    AT_PHASES,
    AT_PIECES,
    AT_PRODUCT,
    AT_RATES,
    AT_STATS,
    AT_SUMS,
    AT_TASKS,
    AT_ZEROS,
    AVERAGE,
    BACKWARD,
    BALL,
    BATCH,
    BIAS,
    BLOCK,
    BLOCKS,
    BOTTOM,
    BOX,
    BOX_BACK,
    BY_PIECES,
    BY_ROWS,
    CALL_COLUMNS,
    CALL_FACTORS,
    CALLS,
    CARRIED,
    CENTRE,
    CLASS_WEIGHTED,
    CLIP_NORM,
    CLIPS,
    COUNTED,
    CUT,
    DECAY,
    DEPTH,
    DESCENDS,
    DEVIATION,
    DIVERGENCE,
    DIVERGENCE_PART,
    DRAWN,
    DSLOPE,
    DZ,
    ELEMENTWISE,
    END,
    ENTROPY,
    EPOCHS,
    FIRST,
    GATHER,
    HEAD_COLUMNS,
    HEAD_FACTORS,
    HEADS,
    HEADS_BACKWARD,
    HIGH,
    HITS_PART,
    IDENTITY,
    KEEP,
    KEY_HIGH,
    KEY_LOW,
    KIND_OF_ROW,
    LANES_ROW,
    LARGEST,
    LEFT,
    LENGTH,
    LOSS_PART,
    LOW,
    LR_FACTOR,
    MAGNITUDES,
    MASK_LAYER,
    MEMBERS,
    MEMBERS_AFFINE,
    MEMBERS_BACKWARD,
    NOISE_HIGH,
    NOISE_LOW,
    NOISY,
    NORM,
    OFFSET,
    OUT,
    PACK,
    PADDING,
    PANEL,
    PANELS,
    PARAM,
    PARTIALS,
    PARTS,
    PERTURB,
    PHASE,
    PHASE_COLUMNS,
    PHASES,
    PIECE_COLUMNS,
    PIECE_END,
    PIECE_FIRST,
    PIECE_ROW,
    PROLOGUE,
    PULLS,
    RADIUS,
    RATE,
    RECORDED,
    RIGHT,
    ROUND,
    ROW_END,
    ROW_FIRST,
    ROWS,
    SCALE,
    SCORED_PART,
    SHARD,
    SHARD_ROWS,
    SHARED_BY,
    SHARES_PART,
    SHRINK,
    SIGNS,
    SLOPE_PART,
    SPREAD,
    SQUARES,
    STATE0,
    STATE1,
    STEP,
    STEPS,
    STRENGTH,
    SUMS,
    TARGET,
    TASK_COLUMNS,
    TASK_FIRST,
    TASKS,
    TENSOR_COLUMNS,
    TENSOR_FACTORS,
    THRESHOLD,
    TOGETHER,
    TOP,
    UPDATE,
    WALKS,
    WEIGHT,
    WEIGHTED,
    WORST,
    WORST_BACK,
    B,
    K,
    N,
    W,
    X,
    Y,
    Z,
)
from fusemlp_kernels.numpy.compiled.tiles import copy, prefetch
from fusemlp_kernels.numpy.compiled.updates import clip_factor, penalise, squares, update_part
from fusemlp_kernels.numpy.compiled.views import call as call_function
from fusemlp_kernels.numpy.compiled.views import elements, part

# Rows of at least this many bytes are copied by a loop: memcpy takes a tenth longer for a batch that no cache holds.
LONG = 2048
# The rows of the next batch are asked for a step ahead, if a batch has at most this many bytes: a larger one takes the
# place of what is needed before.
AHEAD = 1 << 19
LINE = 64
# The type of the parameters; another copy of this module has another.
REAL: Any = np.float32


@register_jitable(**EXACT)
def _gather(
    call: Any, like: Any, rows: Any, first: int, count: int, following: Any, left: int
) -> None:  # fmt: skip
    """Rows of ``out = x[rows]``, flat (M, K); zeros where a row is -1. ``following``: the rows of the next batch, of
    which the first ``left`` are asked for."""
    columns, size = call[K], like.itemsize
    x, out = call[X], call[OUT]
    for i in range(first, first + count):
        row = elements(like, out + size * i * columns)
        if rows[i] < 0:
            for j in range(columns):
                row[j] = 0
        elif size * columns >= LONG:
            source = elements(like, x + size * rows[i] * columns)
            for j in range(columns):
                row[j] = source[j]
        else:
            copy(like, out + size * i * columns, x + size * rows[i] * columns, columns)
        if i < left and following[i] >= 0:
            at = x + size * following[i] * columns
            for line in range(0, size * columns, LINE):
                prefetch(at + line)


@register_jitable(**EXACT)
def _whole(integers: Any, counters: Any) -> int:
    """The rows of the batch."""
    return integers[BATCH] if integers[BATCH] != COUNTED else counters[ROW_COUNT]


@register_jitable(**EXACT)
def _count(call: Any, integers: Any, counters: Any) -> int:
    """The rows of the batch that a call has: all, or those of its shard."""
    whole = _whole(integers, counters)
    return max(0, min(integers[SHARD_ROWS], whole - call[SHARD])) if integers[SHARD_ROWS] else whole


@register_jitable(**EXACT)
def _activate(
    call: Any, numbers: Any, like: Any, first: int, count: int, batch_index: int, lanes: int
) -> None:  # fmt: skip
    """The output of a layer from its pre-activation; lanes is an address."""
    outputs = call[N]
    y, z = block(like, call[Y], first, outputs), block(like, call[Z], first, outputs)
    if call[ACTIVATION] != IDENTITY:
        activate(call[ACTIVATION], y, z, count * outputs, slope_of(call, numbers, like))
    if call[KEEP]:
        keep = elements(np.uint8, call[KEEP] + first * outputs)
        drop(
            y, keep, elements(np.uint64, lanes), elements(np.uint16, lanes), call[SHARD] + first, count, outputs,
            1.0 / (1.0 - numbers[RATE]), call[THRESHOLD], call[KEY_LOW], call[KEY_HIGH], call[MASK_LAYER], batch_index,
        )  # fmt: skip


@register_jitable(**EXACT)
def _derivative(
    call: Any, numbers: Any, like: Any, partials: Any, y: Any, z: Any, dz: Any, count: int, undo_scale: float
) -> None:  # fmt: skip
    if call[ACTIVATION] != IDENTITY:
        slope = slope_of(call, numbers, like)
        dslope = multiply_by_derivative(call[ACTIVATION], dz, y, z, count, slope, undo_scale)
        if call[DSLOPE]:
            partials[call[SLOPE_PART]] = dslope


@register_jitable(**EXACT)
def _product(call: Any, numbers: Any, integers: Any, like: Any, first: int, count: int) -> None:
    """The product of a layer, or of the gradient by its inputs, for rows of the batch."""
    inputs, outputs, size = call[K], call[N], like.itemsize
    if call[KIND_OF_ROW] == BACKWARD:
        call_function(
            integers[AT_PRODUCT], call[DZ] + size * first * outputs, outputs, 1, call[W], PANEL, inputs, outputs,
            integers[AT_ZEROS], 0, 1.0 / (1.0 - numbers[RATE]), 0.0, call[OUT] + size * first * inputs, inputs, count,
            inputs,
        )  # fmt: skip
        return
    x, z = call[X] + size * first * inputs, call[Z] + size * first * outputs
    if call[PANELS]:
        call_function(
            integers[AT_PRODUCT], x, inputs, 1, call[PANELS], PANEL * inputs, PANEL, inputs, call[B], 1, 1.0, 0.0, z,
            outputs, count, outputs,
        )  # fmt: skip
    else:
        call_function(integers[AT_DOTS], x, call[W], inputs, call[B], z, count, outputs)


@register_jitable(**EXACT)
def _backward(call: Any, numbers: Any, like: Any, partials: Any, first: int, count: int) -> None:
    """dz of the layer before, from its product."""
    inputs = call[K]
    out = block(like, call[OUT], first, inputs)
    if call[KEEP]:
        mask(out, elements(np.uint8, call[KEEP] + first * inputs), count * inputs)
    y, z = block(like, call[Y], first, inputs), block(like, call[Z], first, inputs)
    _derivative(call, numbers, like, partials, y, z, out, count * inputs, 1.0 - numbers[RATE])


@register_jitable(**EXACT)
def _perturb(
    call: Any, numbers: Any, like: Any, rows: Any, first: int, count: int, batch_index: int, lanes: int
) -> None:  # fmt: skip
    """Rows of the inputs that an attack moves; lanes is an address."""
    columns, size = call[K], like.itemsize
    for i in range(first, first + count):
        adv = block(like, call[OUT], i, columns)
        if rows[i] < 0:
            if not (call[CARRIED] and call[DZ]):
                for j in range(columns):
                    adv[j] = 0
            continue
        x = block(like, call[X], 0 if call[CARRIED] and call[DZ] else rows[i], columns)
        if call[CARRIED] and not call[DZ]:
            copy(like, call[OUT] + size * i * columns, call[Y] + size * i * columns, columns)
            moved(adv, x, columns, 1.0, numbers[LOW], numbers[HIGH])
        elif call[DZ]:
            dx = block(like, call[DZ], i, columns)
            move(
                adv, x, dx, columns, call[ROUND], numbers[LENGTH], numbers[LARGEST], numbers[LOW], numbers[HIGH]
            )  # fmt: skip
        elif call[DRAWN]:
            start(
                adv, x, elements(np.uint64, lanes), elements(np.uint32, lanes), columns, call[ROUND], numbers[LARGEST],
                numbers[LOW], numbers[HIGH], i, batch_index, call[KEY_LOW], call[KEY_HIGH],
            )  # fmt: skip
        else:
            copy(like, call[OUT] + size * i * columns, call[X] + size * rows[i] * columns, columns)


@register_jitable(**EXACT)
def _by_rows(call: Any, numbers: Any, integers: Any, like: Any, counters: Any, task: int) -> None:
    """A block of rows of a call, after its product."""
    kind, batch_index = call[KIND_OF_ROW], counters[BATCH_INDEX]
    whole = _whole(integers, counters)
    first = task * integers[BLOCK]
    count = max(0, min(integers[BLOCK], _count(call, integers, counters) - first))
    batch = elements(integers, call[ROWS] + 8 * call[WALKS] * counters[ROW_OFFSET])
    rows = part(batch, call[SHARD])
    partials = elements(np.float64, integers[AT_PARTIALS] + 8 * integers[PARTIALS] * task)
    if kind == GATHER:
        step, total, left = counters[ROW_STEP], counters[ROW_TOTAL], 0
        if call[WALKS] and step * total > 0 and step * call[K] * like.itemsize <= AHEAD:
            # none beyond the epoch
            left = total - counters[ROW_OFFSET] % total - step - call[SHARD]
        _gather(call, like, rows, first, count, part(rows, step), left)
    elif kind == ACTIVATE:
        lanes = integers[AT_LANES] + 8 * integers[LANES_ROW] * task
        _activate(call, numbers, like, first, count, batch_index, lanes)
    elif kind == ENTROPY:
        labels, target = elements(integers, call[TARGET]), elements(like, call[TARGET])
        weight, class_weight = elements(like, call[WEIGHTED]), elements(like, call[CLASS_WEIGHTED])
        z, dz = block(like, call[Z], first, call[N]), block(like, call[DZ], first, call[N])
        shares = shares_of(labels, weight, class_weight, batch, whole if call[N] else 0, call)
        own_rows = part(rows, first)
        cross_entropy(
            z, dz, labels, target, weight, class_weight, own_rows, count if call[N] else 0, call[N], call, numbers,
            shares, partials,
        )  # fmt: skip
    elif kind == ELEMENTWISE:
        labels = elements(integers, call[TARGET])
        target, weight = elements(like, call[TARGET]), elements(like, call[WEIGHTED])
        y, z = block(like, call[Y], first, call[N]), block(like, call[Z], first, call[N])
        dz = block(like, call[DZ], first, call[N])
        shares = shares_of(labels, weight, weight, batch, whole if call[N] else 0, call)
        own_rows = part(rows, first)
        elementwise(y, dz, target, weight, own_rows, count if call[N] else 0, call[N], call, numbers, shares, partials)
        _derivative(call, numbers, like, partials, y, z, dz, count * call[N], 1.0)
    elif kind == DIVERGENCE:
        weight, outputs = elements(like, call[WEIGHTED]), call[N]
        z, other = block(like, call[Z], first, outputs), block(like, call[Y], first, outputs)
        dz, dother = block(like, call[X], first, outputs), block(like, call[DZ], first, outputs)
        shares = shares_of(rows, weight, weight, rows, whole, call)
        divergence(
            z, other, dother, dz, block(like, call[OUT], first, outputs), weight, part(rows, first), count, outputs,
            call, numbers, shares, partials,
        )  # fmt: skip
        partials[SHARES_PART] = shares
    elif kind == BALL:
        ball_rows(call, numbers, like, rows, first, count, counters[UPDATE_COUNT])
    elif kind in (BOX, BOX_BACK):
        box_rows(call, numbers, like, kind == BOX, first, count)
    elif kind in (WORST, WORST_BACK):
        labels, outputs = elements(integers, call[TARGET]), call[N]
        own_rows = part(rows, first)
        if kind == WORST:
            zc, zr = block(like, call[Z], first, outputs), block(like, call[Y], first, outputs)
            worst(zc, zr, block(like, call[OUT], first, outputs), labels, own_rows, count, outputs)
        else:
            dzc, dzr = block(like, call[CENTRE], first, outputs), block(like, call[RADIUS], first, outputs)
            d, dz = block(like, call[X], first, outputs), block(like, call[DZ], first, outputs)
            own = kappa(numbers, counters[UPDATE_COUNT])
            from_worst(d, dzc, dzr, dz, labels, own_rows, count, outputs, own)
    elif kind == PADDING:
        end = min(call[K], first + integers[BLOCK])
        dz = block(like, call[DZ], first, call[N])
        for i in range(count * call[N], (end - first) * call[N]):
            dz[i] = 0
    elif kind == BACKWARD:
        _backward(call, numbers, like, partials, first, count)
    elif kind == PERTURB:
        lanes = integers[AT_LANES] + 8 * integers[LANES_ROW] * task
        _perturb(call, numbers, like, rows, first, count, batch_index, lanes)
    elif kind == MEMBERS_AFFINE:
        affine_rows(call, numbers, integers, like, rows, first, count, batch_index, task)
    elif kind == MEMBERS_BACKWARD:
        backward_rows(call, numbers, like, rows, first, count, task)
    elif kind == HEADS:
        heads(call, integers, like, first, count)
    elif kind == HEADS_BACKWARD:
        heads_backward(call, integers, like, first, count)
    elif kind == SQUARES:
        x, dz = block(like, call[X], first, call[K]), block(like, call[DZ], first, call[N])
        add_squares(elements(np.float64, call[OUT] + 8 * first), x, dz, count, call[K], call[N], call[B], call[AFRESH])
    elif kind == SHRINK:
        norms = elements(np.float64, call[OUT] + 8 * first)
        shrink(norms, block(like, call[DZ], first, call[N]), count, call[N], numbers[LARGEST])


@register_jitable(**EXACT)
def _spread(call: Any, integers: Any, like: Any, count: int, piece: Any) -> None:
    """The gradient by a piece of the weights through their magnitudes."""
    size, outputs, inputs, top, left = like.itemsize, call[N], call[K], piece[TOP], piece[LEFT]
    width, beta = piece[RIGHT] - left, 0.0
    for first in range(0, max(count, 1), DEPTH):
        call_function(
            integers[AT_PRODUCT], call[SPREAD] + size * (first * outputs + top), 1, outputs,
            call[RADIUS] + size * (first * inputs + left), PANEL, inputs, min(DEPTH, count - first),
            integers[AT_ZEROS], 0, 1.0, beta,
            call[OUT] + size * (top * inputs + left), inputs, piece[BOTTOM] - top, width,
        )  # fmt: skip
        beta = 1.0
    for row in range(top, piece[BOTTOM]):
        at = size * (row * inputs + left)
        turn(elements(like, call[OUT] + at), elements(like, call[SIGNS] + at), width)


@register_jitable(**EXACT)
def _gradient(call: Any, integers: Any, like: Any, counters: Any, tensor_factors: Any, hyper: Any, piece: Any) -> None:
    """A piece of the gradient by a weight matrix, a bias or a slope; with DESCENDS straight into the parameter."""
    size, outputs = like.itemsize, call[N]
    count = _count(call, integers, counters)
    alpha, beta = 1.0, 0.0 if counters[BATCH_INDEX] % integers[ACCUMULATE] == 0 else 1.0
    if call[DESCENDS]:
        start = call[FIRST] * TENSOR_FACTORS
        alpha = -hyper[LEARNING_RATE] * tensor_factors[start + LR_FACTOR]
        beta = 1.0 + alpha * tensor_factors[start + DECAY]
    top, left = piece[TOP], piece[LEFT]
    if call[KIND_OF_ROW] == WEIGHT and call[MEMBERS]:
        # the rows of the weights of one member after another, each by its own rows of the batch
        inputs, members = call[K], call[MEMBERS]
        own = outputs // members
        while top < piece[BOTTOM]:
            member = top // own
            stop = min(piece[BOTTOM], (member + 1) * own)
            call_function(
                integers[AT_PRODUCT], call[DZ] + size * top, 1, outputs, call[X] + size * (member * inputs + left),
                PANEL, members * inputs, count // members, integers[AT_ZEROS], 0, alpha, beta,
                call[OUT] + size * (top * inputs + left), inputs, stop - top, piece[RIGHT] - left,
            )  # fmt: skip
            top = stop
    elif call[KIND_OF_ROW] == WEIGHT:
        inputs = call[K]
        if call[SIGNS]:
            _spread(call, integers, like, count, piece)
            alpha, beta = 1.0, 1.0
        # those of a second batch are added
        for batch in range(2 if call[Z] else 1):
            x, dz = (call[Y], call[Z]) if batch else (call[X], call[DZ])
            for first in range(0, max(count, 1), DEPTH):
                call_function(
                    integers[AT_PRODUCT], dz + size * (first * outputs + top), 1, outputs,
                    x + size * (first * inputs + left), PANEL, inputs, min(DEPTH, count - first),
                    integers[AT_ZEROS], 0, alpha, beta,
                    call[OUT] + size * (top * inputs + left), inputs, piece[BOTTOM] - top, piece[RIGHT] - left,
                )  # fmt: skip
                beta = 1.0
    else:
        # a bias, or a slope, whose gradient is one number already
        rows = count if call[KIND_OF_ROW] == BIAS else 1
        if call[MEMBERS]:
            rows = count // call[MEMBERS]
        if call[PARTS]:
            rows = integers[BLOCKS]
        for batch in range(2 if call[Z] else 1):
            dz = call[Z] if batch else call[DZ]
            column_sums(
                like, call[OUT] + size * left, dz + size * left, call[SUMS] + size * left, rows, outputs,
                piece[RIGHT] - left, alpha, beta,
            )  # fmt: skip
            beta = 1.0


@register_jitable(**EXACT)
def _pack(call: Any, integers: Any, piece: Any) -> None:
    """A piece of the weights into its panel."""
    call_function(
        integers[AT_PACK], call[W], call[K], call[PANELS], piece[TOP], piece[BOTTOM], piece[LEFT], piece[RIGHT]
    )


@register_jitable(**EXACT)
def _noise(
    integers: Any, factors: Any, counters: Any, grads: Any, first: int, count: int, tensor: int, task: int
) -> None:
    """Add noise to elements of a gradient, from ``first`` on, and divide them."""
    lanes = integers[AT_LANES] + 8 * integers[LANES_ROW] * task
    add_noise(
        grads, elements(np.uint64, lanes), elements(np.float64, lanes + 8 * WORDS), first, count, tensor,
        counters[UPDATE_COUNT], integers[NOISE_LOW], integers[NOISE_HIGH], factors[DEVIATION], factors[SHARED_BY],
    )  # fmt: skip


@register_jitable(**EXACT)
def _after_gradient(
    call: Any, numbers: Any, integers: Any, factors: Any, like: Any, counters: Any, hyper: Any, tensor_factors: Any,
    piece: Any, task: int,
) -> float:  # fmt: skip
    """Penalty, noise and update of a piece, and its panels for the next step; the sum of squares of a penalty."""
    size, left, width = like.itemsize, piece[LEFT], piece[RIGHT] - piece[LEFT]
    inputs, top, bottom = call[K], piece[TOP], piece[BOTTOM]
    if call[KIND_OF_ROW] != WEIGHT:
        inputs, top, bottom = 0, 0, 1
    elif width == inputs:
        # whole rows lie together
        width, bottom = width * (bottom - top), top + 1
    total = 0.0
    for row in range(top, bottom):
        at = size * (row * inputs + left)
        if call[PULLS]:
            shares = elements(factors, integers[AT_PARTIALS])[SHARES_PART]
            if shares != 0.0:
                pull, w = numbers[STRENGTH] / shares, elements(like, call[W] + at)
                total += pull * penalise(w, elements(like, call[OUT] + at), width, pull)
        if call[PARAM]:
            grads = elements(like, call[OUT] + at)
            if integers[NOISY]:
                _noise(integers, factors, counters, grads, row * inputs + left, width, call[FIRST], task)
            update_part(
                elements(like, call[PARAM] + at), grads,
                elements(like, call[STATE0] + at), elements(like, call[STATE1] + at), width, tensor_factors,
                call[FIRST], integers, factors, hyper, 1.0,
            )  # fmt: skip
            if call[AVERAGE]:
                update_average(elements(like, call[PARAM] + at), elements(like, call[AVERAGE] + at), width, hyper)
    if call[PANELS] and integers[STEP] + 1 < integers[STEPS]:
        _pack(call, integers, piece)
    return total


@register_jitable(**EXACT)
def _by_piece(
    call: Any, numbers: Any, integers: Any, factors: Any, like: Any, counters: Any, hyper: Any, tensors: Any,
    tensor_factors: Any, piece: Any, task: int,
) -> float:  # fmt: skip
    """A piece of a tensor; what it adds to the sums of its phase."""
    kind = call[KIND_OF_ROW]
    if kind in (NORM, UPDATE):
        at = tensors[piece[TOP] * TENSOR_COLUMNS + OFFSET] + piece[LEFT]
        size, width = like.itemsize, piece[RIGHT] - piece[LEFT]
        grads = elements(like, call[DZ] + size * at)
        if kind == NORM:
            return squares(grads, width, 1.0)
        if integers[NOISY]:
            _noise(integers, factors, counters, grads, piece[LEFT], width, piece[TOP], task)
        update_part(
            elements(like, call[PARAM] + size * at), grads, elements(like, call[STATE0] + size * at),
            elements(like, call[STATE1] + size * at), width, tensor_factors, piece[TOP], integers, factors, hyper,
            factors[SCALE],
        )  # fmt: skip
        if call[AVERAGE]:
            at = size * at
            update_average(elements(like, call[PARAM] + at), elements(like, call[AVERAGE] + at), width, hyper)
        return 0.0
    if kind == PACK:
        _pack(call, integers, piece)
        return 0.0
    if kind == MAGNITUDES:
        for row in range(piece[TOP], piece[BOTTOM]):
            at = like.itemsize * (row * call[K] + piece[LEFT])
            out, width = elements(like, call[OUT] + at), piece[RIGHT] - piece[LEFT]
            magnitudes(out, elements(like, call[W] + at), width)
        call_function(
            integers[AT_PACK], call[OUT], call[K], call[PANELS], piece[TOP], piece[BOTTOM], piece[LEFT], piece[RIGHT]
        )
        return 0.0
    _gradient(call, integers, like, counters, tensor_factors, hyper, piece)
    return _after_gradient(call, numbers, integers, factors, like, counters, hyper, tensor_factors, piece, task)


@register_jitable(**EXACT)
def _end_rows(call: Any, numbers: Any, integers: Any, like: Any, counters: Any, tasks: int) -> None:
    """Add up the partial results of a call by rows, in the order of its tasks."""
    width = integers[PARTIALS]
    partials = elements(np.float64, integers[AT_PARTIALS])
    kind = call[KIND_OF_ROW]
    if call[DSLOPE]:
        total = 0.0
        for task in range(tasks):
            total += partials[width * task + call[SLOPE_PART]]
        elements(like, call[DSLOPE])[0] = total
    if kind in (ENTROPY, ELEMENTWISE) and call[RECORDED]:
        loss, hits, scored = 0.0, 0.0, 0.0
        for task in range(tasks):
            loss += partials[width * task + LOSS_PART]
            hits += partials[width * task + HITS_PART]
            scored += partials[width * task + SCORED_PART]
        whole = _whole(integers, counters)
        stats = elements(np.float64, call[RECORDED])
        record(stats, loss, hits, scored, partials[SHARES_PART], call, numbers, whole if call[N] else 0)
    if kind == DIVERGENCE and call[RECORDED]:
        value = 0.0
        for task in range(tasks):
            value += partials[width * task + DIVERGENCE_PART]
        stats = elements(np.float64, call[RECORDED])
        record_divergence(stats, value, partials[SHARES_PART], call, numbers, _whole(integers, counters))


@register_jitable(**EXACT)
def _table_row(integers: Any, factors: Any, at: int) -> Any:
    """A row of calls and its factors."""
    call = part(integers, HEAD_COLUMNS + CALL_COLUMNS * at)
    return call, part(factors, HEAD_FACTORS + CALL_FACTORS * at)


@register_jitable(**EXACT)
def _end_phase(integers: Any, factors: Any, like: Any, counters: Any, phase: Any) -> None:
    """Do the rest of a phase, in one thread, when all its tasks have ended."""
    if phase[CUT] == BY_ROWS:
        for at in range(phase[ROW_FIRST], phase[ROW_END]):
            call, numbers = _table_row(integers, factors, at)
            _end_rows(call, numbers, integers, like, counters, phase[TASKS])
    elif phase[CUT] == BY_PIECES:
        total = 0.0
        tasks = part(integers, integers[AT_TASKS] + TASK_COLUMNS * phase[TASK_FIRST])
        first, end = tasks[PIECE_FIRST], tasks[TASK_COLUMNS * (phase[TASKS] - 1) + PIECE_END]
        sums = elements(np.float64, integers[AT_SUMS])
        for at in range(first, end):
            total += sums[at]
        call, _ = _table_row(integers, factors, phase[ROW_FIRST])
        if call[KIND_OF_ROW] == NORM:
            tensors = part(integers, HEAD_COLUMNS + CALL_COLUMNS * integers[CALLS])
            grads, scale = elements(like, call[DZ]), 1.0 / integers[ACCUMULATE]
            scale *= clip_factor(grads, tensors, call[FIRST], call[END], total, scale, factors[CLIP_NORM])
            factors[SCALE] = scale
        elif total != 0.0:
            # penalties
            elements(np.float64, integers[AT_STATS])[PENALTIES] += 0.5 * total * _whole(integers, counters)


@register_jitable(**EXACT)
def _open(integers: Any, factors: Any, like: Any) -> int:
    """End the phase under way and open the next that has tasks; their number, or 0 at the end of the last step."""
    counters = elements(np.int64, integers[AT_COUNTERS])
    at = integers[PHASE]
    if at >= 0:
        _end_phase(integers, factors, like, counters, part(integers, integers[AT_PHASES] + PHASE_COLUMNS * at))
    while True:
        at += 1
        if at == integers[PHASES]:
            integers[STEP] += 1
            if integers[STEP] == integers[STEPS]:
                return 0
            at = integers[PROLOGUE]
        phase = part(integers, integers[AT_PHASES] + PHASE_COLUMNS * at)
        updated = (counters[BATCH_INDEX] + 1) % integers[ACCUMULATE] == 0
        if phase[CUT] == AT_ONCE:
            hyper, rates = elements(np.float64, integers[AT_HYPER]), elements(np.float64, integers[AT_RATES])
            stats = elements(np.float64, integers[AT_STATS])
            epoch_stats = elements(np.float64, integers[AT_EPOCH_STATS])
            advance(counters, hyper, rates, updated, stats, epoch_stats, integers[EPOCHS])
            if integers[NOISY]:
                rows = elements(integers, integers[NOISY] + 8 * counters[ROW_OFFSET])
                while counters[ROW_COUNT] > 0 and rows[counters[ROW_COUNT] - 1] < 0:
                    counters[ROW_COUNT] -= 1
            continue
        call, _ = _table_row(integers, factors, phase[ROW_FIRST])
        kind = call[KIND_OF_ROW]
        if kind in (NORM, UPDATE):
            if not updated:
                continue
            if not integers[CLIPS]:
                factors[SCALE] = 1.0 / integers[ACCUMULATE]
        if phase[TASKS] == 0:
            continue
        integers[PHASE] = at
        return -(-phase[TASKS] // integers[TOGETHER]) if phase[CUT] == BY_ROWS else phase[TASKS]


def work(job: int, task: int) -> int:
    """Do a task of the phase under way, or, for a negative number, open the next: see ``team``.

    job is the address of a table's integers; ``tables`` says what is in them.
    """
    integers = elements(np.int64, job)
    factors = elements(np.float64, integers[AT_FACTORS])
    like = elements(REAL, job)
    if task < 0:
        return _open(integers, factors, like)
    counters = elements(np.int64, integers[AT_COUNTERS])
    phase = part(integers, integers[AT_PHASES] + PHASE_COLUMNS * integers[PHASE])
    if phase[CUT] == BY_ROWS:
        first, end = task * integers[TOGETHER], min((task + 1) * integers[TOGETHER], integers[BLOCKS])
        rows = integers[BLOCK] * first
        for at in range(phase[ROW_FIRST], phase[ROW_END]):
            call, numbers = _table_row(integers, factors, at)
            if call[KIND_OF_ROW] in (AFFINE, BACKWARD):
                count = min(integers[BLOCK] * (end - first), _count(call, integers, counters) - rows)
                _product(call, numbers, integers, like, rows, count)
            for number in range(first, end):
                _by_rows(call, numbers, integers, like, counters, number)
        return 0
    hyper = elements(np.float64, integers[AT_HYPER])
    tensors = part(integers, HEAD_COLUMNS + CALL_COLUMNS * integers[CALLS])
    tensor_factors = part(factors, HEAD_FACTORS + CALL_FACTORS * integers[CALLS])
    pieces = part(integers, integers[AT_TASKS] + TASK_COLUMNS * (phase[TASK_FIRST] + task))
    sums = elements(np.float64, integers[AT_SUMS])
    for at in range(pieces[PIECE_FIRST], pieces[PIECE_END]):
        piece = part(integers, integers[AT_PIECES] + PIECE_COLUMNS * at)
        call, numbers = _table_row(integers, factors, piece[PIECE_ROW])
        sums[at] = _by_piece(
            call, numbers, integers, factors, like, counters, hyper, tensors, tensor_factors, piece, task
        )  # fmt: skip
    return 0
