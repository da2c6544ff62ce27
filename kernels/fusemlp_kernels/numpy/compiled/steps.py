"""The loop over training steps: the calls of a step's program, row by row of their table, again and again.

The order of backpropagation is the table's, which ``calls`` fills from the program. A call by itself is a table of its
own rows, run once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.contract import BATCH_INDEX, LEARNING_RATE, PENALTIES, ROW_COUNT, ROW_OFFSET
from fusemlp_kernels.numpy.compiled.clock import advance
from fusemlp_kernels.numpy.compiled.denormals import AS_ZERO, read_control, write_control
from fusemlp_kernels.numpy.compiled.losses import cross_entropy, elementwise
from fusemlp_kernels.numpy.compiled.masks import drop, mask
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.pointwise_numba import activate, multiply_by_derivative
from fusemlp_kernels.numpy.compiled.products import column_sums, gemm
from fusemlp_kernels.numpy.compiled.tables import (
    ACCUMULATE,
    ACTIVATE,
    ACTIVATION,
    AFFINE,
    AT_COUNTERS,
    AT_EPOCH_STATS,
    AT_HYPER,
    AT_LANES,
    AT_RATES,
    AT_STATS,
    BACKWARD,
    BATCH,
    BIAS,
    CALL_COLUMNS,
    CALL_FACTORS,
    CALLS,
    CLASS_WEIGHTED,
    CLIP_NORM,
    CLIPS,
    CLOCK,
    COUNTED,
    DECAY,
    DESCENDS,
    DSLOPE,
    DZ,
    ELEMENTWISE,
    END,
    ENTROPY,
    EPOCHS,
    FIRST,
    FIXED_SLOPE,
    GATHER,
    HEAD_COLUMNS,
    HEAD_FACTORS,
    IDENTITY,
    KEEP,
    KEY_HIGH,
    KEY_LOW,
    KIND_OF_ROW,
    LR_FACTOR,
    MASK_LAYER,
    OUT,
    PADDING,
    PENALTY,
    RATE,
    REALS,
    ROWS,
    SLOPE,
    STRENGTH,
    TARGET,
    TENSOR_FACTORS,
    THRESHOLD,
    UPDATE,
    WALKS,
    WEIGHT,
    WEIGHTED,
    B,
    K,
    N,
    W,
    X,
    Y,
    Z,
)
from fusemlp_kernels.numpy.compiled.updates import clip_factor, penalise, update_all
from fusemlp_kernels.numpy.compiled.views import elements, part


@register_jitable(**EXACT)
def _gather(call: Any, like: Any, rows: Any, count: int) -> None:
    """``out = x[rows]``, flat (count, K); zeros where a row is -1."""
    columns = call[K]
    # of a size that no row number passes: nothing looks at it
    x, out = elements(like, call[X], 1), elements(like, call[OUT], count * columns)
    for i in range(count):
        row, start = rows[i], i * columns
        if row < 0:
            for j in range(columns):
                out[start + j] = 0
        else:
            for j in range(columns):
                out[start + j] = x[row * columns + j]


@register_jitable(**EXACT)
def _affine(call: Any, like: Any, count: int, words: Any) -> None:
    """The pre-activation, into Z."""
    inputs, outputs = call[K], call[N]
    z, b = elements(like, call[Z], count * outputs), elements(like, call[B], outputs)
    for i in range(count):
        start = i * outputs
        for j in range(outputs):
            z[start + j] = b[j]
    gemm(1, 0, outputs, count, inputs, 1.0, call[W], inputs, call[X], inputs, 1.0, call[Z], outputs, words, like)


@register_jitable(**EXACT)
def _slope(call: Any, numbers: Any, like: Any) -> float:
    if call[SLOPE]:
        return float(elements(like, call[SLOPE], 1)[0])
    return numbers[FIXED_SLOPE]


@register_jitable(**EXACT)
def _activate(call: Any, numbers: Any, like: Any, count: int, batch_index: int, lanes: int) -> None:
    """The output of a layer from its pre-activation; lanes is an address."""
    outputs = call[N]
    y, z = elements(like, call[Y], count * outputs), elements(like, call[Z], count * outputs)
    if call[ACTIVATION] != IDENTITY:
        activate(call[ACTIVATION], y, z, _slope(call, numbers, like))
    if call[KEEP]:
        keep = elements(np.bool_, call[KEEP], count * outputs)
        drop(
            y, keep, elements(np.uint64, lanes, 1), elements(np.uint16, lanes, 1), count, outputs,
            1.0 / (1.0 - numbers[RATE]), call[THRESHOLD], call[KEY_LOW], call[KEY_HIGH], call[MASK_LAYER], batch_index,
        )  # fmt: skip


@register_jitable(**EXACT)
def _derivative(call: Any, numbers: Any, like: Any, y: Any, z: Any, dz: Any, undo_scale: float) -> None:
    if call[ACTIVATION] != IDENTITY:
        dslope = multiply_by_derivative(call[ACTIVATION], dz, y, z, _slope(call, numbers, like), undo_scale)
        if call[DSLOPE]:
            elements(like, call[DSLOPE], 1)[0] = dslope


@register_jitable(**EXACT)
def _backward(call: Any, numbers: Any, like: Any, count: int, words: Any) -> None:
    """dz of the layer before."""
    inputs, outputs = call[K], call[N]
    scale = 1.0 / (1.0 - numbers[RATE])
    gemm(0, 0, inputs, count, outputs, scale, call[W], inputs, call[DZ], outputs, 0.0, call[OUT], inputs, words, like)
    out = elements(like, call[OUT], count * inputs)
    if call[KEEP]:
        mask(out, elements(np.bool_, call[KEEP], count * inputs))
    y, z = elements(like, call[Y], count * inputs), elements(like, call[Z], count * inputs)
    _derivative(call, numbers, like, y, z, out, 1.0 - numbers[RATE])


@register_jitable(**EXACT)
def _gradient(call: Any, like: Any, count: int, begins: bool, tensor_factors: Any, hyper: Any, words: Any) -> None:
    """The gradient by a weight matrix, a bias or a slope; with DESCENDS straight into the parameter."""
    alpha, beta = 1.0, 0.0 if begins else 1.0
    if call[DESCENDS]:
        start = call[FIRST] * TENSOR_FACTORS
        alpha = -hyper[LEARNING_RATE] * tensor_factors[start + LR_FACTOR]
        beta = 1.0 + alpha * tensor_factors[start + DECAY]
    outputs = call[N]
    if call[KIND_OF_ROW] == WEIGHT:
        inputs = call[K]
        out, dz, x = call[OUT], call[DZ], call[X]
        gemm(0, 1, inputs, outputs, count, alpha, x, inputs, dz, outputs, beta, out, inputs, words, like)
    else:
        # a bias, or a slope, whose gradient is one number already
        rows = count if call[KIND_OF_ROW] == BIAS else 1
        dz = elements(like, call[DZ], rows * outputs)
        column_sums(elements(like, call[OUT], outputs), dz, part(like, REALS, outputs), rows, outputs, alpha, beta)


def run(steps: int, integers: Any, factors: Any, reals: Any, words: Any) -> None:
    """``steps`` times the calls of the tables; see ``tables`` for integers and factors.

    reals has the type of the parameters: two elements for ``products``, then as many as the widest layer. words are
    those of ``products``.
    """
    before = read_control()
    write_control(before | AS_ZERO)
    every, calls = integers[ACCUMULATE], integers[CALLS]
    # a size is given where something looks at it
    counters, epoch_stats = elements(integers, integers[AT_COUNTERS], 1), elements(factors, integers[AT_EPOCH_STATS], 1)
    hyper, rates = elements(factors, integers[AT_HYPER], 1), elements(factors, integers[AT_RATES], 1)
    stats = elements(factors, integers[AT_STATS], 1)
    first_call = integers.ctypes.data + 8 * HEAD_COLUMNS
    first_factors = factors.ctypes.data + 8 * HEAD_FACTORS
    tensors = elements(integers, first_call + 8 * CALL_COLUMNS * calls, 1)
    tensor_factors = elements(factors, first_factors + 8 * CALL_FACTORS * calls, 1)
    for _ in range(steps):
        count = integers[BATCH] if integers[BATCH] != COUNTED else counters[ROW_COUNT]
        offset, batch_index = counters[ROW_OFFSET], counters[BATCH_INDEX]
        begins, updated = batch_index % every == 0, (batch_index + 1) % every == 0
        shares = 0.0
        for at in range(calls):
            call = elements(integers, first_call + 8 * CALL_COLUMNS * at, CALL_COLUMNS)
            numbers = elements(factors, first_factors + 8 * CALL_FACTORS * at, CALL_FACTORS)
            rows = elements(integers, call[ROWS] + 8 * call[WALKS] * offset, 1)
            size, kind = count * call[N], call[KIND_OF_ROW]
            if kind == GATHER:
                _gather(call, reals, rows, count)
            elif kind == AFFINE:
                _affine(call, reals, count, words)
            elif kind == ACTIVATE:
                _activate(call, numbers, reals, count, batch_index, integers[AT_LANES])
            elif kind == ENTROPY:
                labels, target = elements(integers, call[TARGET], 1), elements(reals, call[TARGET], 1)
                weight, class_weight = elements(reals, call[WEIGHTED], 1), elements(reals, call[CLASS_WEIGHTED], 1)
                z, dz = elements(reals, call[Z], size), elements(reals, call[DZ], size)
                shares = cross_entropy(
                    z, dz, labels, target, weight, class_weight, rows, count if size else 0, call[N], call, numbers,
                    stats,
                )  # fmt: skip
            elif kind == ELEMENTWISE:
                target, weight = elements(reals, call[TARGET], 1), elements(reals, call[WEIGHTED], 1)
                y, z = elements(reals, call[Y], size), elements(reals, call[Z], size)
                dz = elements(reals, call[DZ], size)
                shares = elementwise(
                    y, dz, target, weight, rows, count if size else 0, call[N], call, numbers, stats
                )  # fmt: skip
                _derivative(call, numbers, reals, y, z, dz, 1.0)
            elif kind == PADDING:
                dz = elements(reals, call[DZ], call[K] * call[N])
                for i in range(size, dz.size):
                    dz[i] = 0
            elif kind == BACKWARD:
                _backward(call, numbers, reals, count, words)
            elif kind == UPDATE:
                if updated:
                    params, grads = elements(reals, call[OUT], call[N]), elements(reals, call[DZ], call[N])
                    states0, states1 = elements(reals, call[Y], call[N]), elements(reals, call[Z], call[N])
                    scale = 1.0 / every
                    if integers[CLIPS]:
                        scale *= clip_factor(grads, tensors, call[FIRST], call[END], scale, factors[CLIP_NORM])
                    update_all(
                        params, grads, states0, states1, tensors, tensor_factors, call[FIRST], call[END], integers,
                        factors, hyper, scale,
                    )  # fmt: skip
            elif kind == PENALTY:
                if shares != 0.0:
                    pull = numbers[STRENGTH] / shares
                    weights = call[N] * call[K]
                    squares = penalise(elements(reals, call[W], weights), elements(reals, call[OUT], weights), pull)
                    stats[PENALTIES] += 0.5 * pull * squares * count
            elif kind == CLOCK:
                advance(counters, hyper, rates, updated, stats, epoch_stats, integers[EPOCHS])
            else:
                _gradient(call, reals, count, begins, tensor_factors, hyper, words)
    write_control(before)
