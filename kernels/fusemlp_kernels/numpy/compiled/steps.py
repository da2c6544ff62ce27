"""The loop over training steps: the calls of a step's program, row by row of their table, again and again.

The order of backpropagation is the table's, which ``resident`` fills from the program.
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
    ACTIVATION,
    BACKWARD,
    BIAS,
    CALL_COLUMNS,
    CALL_FACTORS,
    CLIP_NORM,
    CLIPS,
    CLOCK,
    DECAY,
    DESCENDS,
    DSLOPE,
    DZ,
    ELEMENTWISE,
    END,
    ENTROPY,
    FIRST,
    FIXED_SLOPE,
    FORWARD,
    GATHER,
    IDENTITY,
    KEEP,
    KEY_HIGH,
    KEY_LOW,
    KIND_OF_ROW,
    LR_FACTOR,
    MASK_LAYER,
    OUT,
    PENALTY,
    RATE,
    SLOPE,
    SLOPES,
    STRENGTH,
    THRESHOLD,
    UPDATE,
    WEIGHT,
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
def _gather(call: Any, like: Any, x: Any, rows: Any, count: int) -> None:
    """``batch = x[rows]``, flat (count, K)."""
    columns = x.shape[1]
    batch = elements(like, call[OUT], count * columns)
    for i in range(count):
        row, start = rows[i], i * columns
        for j in range(columns):
            batch[start + j] = x[row, j]


@register_jitable(**EXACT)
def _slope(call: Any, numbers: Any, like: Any) -> float:
    if call[SLOPE]:
        return float(elements(like, call[SLOPE], 1)[0])
    return numbers[FIXED_SLOPE]


@register_jitable(**EXACT)
def _affine(call: Any, like: Any, count: int, integers: Any, letters: Any) -> None:
    """The pre-activation, into Z."""
    inputs, outputs = call[K], call[N]
    z, b = elements(like, call[Z], count * outputs), elements(like, call[B], outputs)
    for i in range(count):
        start = i * outputs
        for j in range(outputs):
            z[start + j] = b[j]
    gemm(
        1, 0, outputs, count, inputs, 1.0, call[W], inputs, call[X], inputs, 1.0, call[Z], outputs, integers, like,
        letters,
    )  # fmt: skip


@register_jitable(**EXACT)
def _forward(call: Any, numbers: Any, like: Any, count: int, batch_index: int, lanes: Any) -> None:
    """The output of a layer from its pre-activation."""
    outputs = call[N]
    y, z = elements(like, call[Y], count * outputs), elements(like, call[Z], count * outputs)
    if call[ACTIVATION] != IDENTITY:
        activate(call[ACTIVATION], y, z, _slope(call, numbers, like))
    if call[KEEP]:
        keep = elements(np.bool_, call[KEEP], count * outputs)
        drop(
            y, keep, lanes, count, outputs, 1.0 / (1.0 - numbers[RATE]), call[THRESHOLD], call[KEY_LOW],
            call[KEY_HIGH], call[MASK_LAYER], batch_index,
        )  # fmt: skip


@register_jitable(**EXACT)
def _derivative(call: Any, numbers: Any, like: Any, y: Any, z: Any, dz: Any, undo_scale: float) -> None:
    if call[ACTIVATION] != IDENTITY:
        dslope = multiply_by_derivative(call[ACTIVATION], dz, y, z, _slope(call, numbers, like), undo_scale)
        if call[DSLOPE]:
            elements(like, call[DSLOPE], 1)[0] = dslope


@register_jitable(**EXACT)
def _backward(call: Any, numbers: Any, like: Any, count: int, integers: Any, letters: Any) -> None:
    """dz of the layer before."""
    inputs, outputs = call[K], call[N]
    scale = 1.0 / (1.0 - numbers[RATE])
    gemm(
        0, 0, inputs, count, outputs, scale, call[W], inputs, call[DZ], outputs, 0.0, call[OUT], inputs, integers, like,
        letters,
    )  # fmt: skip
    out = elements(like, call[OUT], count * inputs)
    if call[KEEP]:
        mask(out, elements(np.bool_, call[KEEP], count * inputs))
    y, z = elements(like, call[Y], count * inputs), elements(like, call[Z], count * inputs)
    _derivative(call, numbers, like, y, z, out, 1.0 - numbers[RATE])


@register_jitable(**EXACT)
def _into(out: Any, values: Any, size: int, alpha: float, beta: float) -> None:
    """``out = alpha * values + beta * out``."""
    real = out.dtype.type
    a, b = real(alpha), real(beta)
    if beta == 0.0:
        for i in range(size):
            out[i] = a * values[i]
    else:
        for i in range(size):
            out[i] = a * values[i] + b * out[i]


@register_jitable(**EXACT)
def _gradient(
    call: Any, like: Any, count: int, begins: bool, tensor_factors: Any, hyper: Any, spare: Any, integers: Any,
    letters: Any,
) -> None:  # fmt: skip
    """The gradient by a weight matrix, a bias or a slope; with DESCENDS straight into the parameter."""
    alpha, beta = 1.0, 0.0 if begins else 1.0
    if call[DESCENDS]:
        factors = tensor_factors[call[FIRST]]
        alpha = -hyper[LEARNING_RATE] * factors[LR_FACTOR]
        beta = 1.0 + alpha * factors[DECAY]
    outputs = call[N]
    if call[KIND_OF_ROW] == WEIGHT:
        inputs = call[K]
        gemm(
            0, 1, inputs, outputs, count, alpha, call[X], inputs, call[DZ], outputs, beta, call[OUT], inputs, integers,
            like, letters,
        )  # fmt: skip
    elif call[KIND_OF_ROW] == BIAS:
        column_sums(spare, elements(like, call[DZ], count * outputs), count, outputs)
        _into(elements(like, call[OUT], outputs), spare, outputs, alpha, beta)
    elif call[KIND_OF_ROW] == SLOPES:
        _into(elements(like, call[OUT], 1), elements(like, call[DZ], 1), 1, alpha, beta)


def run(
    steps: int,
    calls: Any,
    call_factors: Any,
    x: Any,
    labels: Any,
    target: Any,
    weight: Any,
    class_weight: Any,
    rows: Any,
    tensors: Any,
    tensor_factors: Any,
    loss: Any,
    loss_factors: Any,
    rule: Any,
    rule_factors: Any,
    counters: Any,
    hyper: Any,
    rates: Any,
    stats: Any,
    epoch_stats: Any,
    spare: Any,
    lanes: Any,
    integers: Any,
    reals: Any,
    letters: Any,
) -> None:
    """``steps`` steps. ``spare``: as many reals as the widest layer; ``lanes``: the random numbers of its row."""
    before = read_control()
    write_control(before | AS_ZERO)
    every = rule[ACCUMULATE]
    for _ in range(steps):
        count, offset, batch_index = counters[ROW_COUNT], counters[ROW_OFFSET], counters[BATCH_INDEX]
        picked = part(rows, offset, count)
        begins, updated = batch_index % every == 0, (batch_index + 1) % every == 0
        shares = 0.0
        for at in range(len(calls)):
            # by address: rows of the arrays would be counted as references, atomically
            call = elements(calls, calls.ctypes.data + at * 8 * CALL_COLUMNS, CALL_COLUMNS)
            numbers = elements(call_factors, call_factors.ctypes.data + at * 8 * CALL_FACTORS, CALL_FACTORS)
            kind = call[KIND_OF_ROW]
            if kind == GATHER:
                _gather(call, reals, x, picked, count)
            elif kind == FORWARD:
                _affine(call, reals, count, integers, letters)
                _forward(call, numbers, reals, count, batch_index, lanes)
            elif kind == ENTROPY:
                _affine(call, reals, count, integers, letters)
                z, dz = elements(reals, call[Z], count * call[N]), elements(reals, call[DZ], count * call[N])
                shares = cross_entropy(
                    z, dz, labels, target, weight, class_weight, picked, count, call[N], loss, loss_factors, stats
                )
            elif kind == ELEMENTWISE:
                _affine(call, reals, count, integers, letters)
                _forward(call, numbers, reals, count, batch_index, lanes)
                y, z = elements(reals, call[Y], count * call[N]), elements(reals, call[Z], count * call[N])
                dz = elements(reals, call[DZ], count * call[N])
                shares = elementwise(y, dz, target, weight, picked, count, call[N], loss, loss_factors, stats, spare)
                _derivative(call, numbers, reals, y, z, dz, 1.0)
            elif kind == BACKWARD:
                _backward(call, numbers, reals, count, integers, letters)
            elif kind == UPDATE:
                if updated:
                    params, grads = elements(reals, call[OUT], call[N]), elements(reals, call[DZ], call[N])
                    first, second = elements(reals, call[Y], call[N]), elements(reals, call[Z], call[N])
                    begin, end, scale = call[FIRST], call[END], 1.0 / every
                    if rule[CLIPS]:
                        scale *= clip_factor(grads, tensors, begin, end, scale, rule_factors[CLIP_NORM])
                    update_all(
                        params, grads, first, second, tensors, tensor_factors, begin, end, rule, rule_factors, hyper,
                        scale,
                    )  # fmt: skip
            elif kind == PENALTY:
                if shares != 0.0:
                    size = call[N] * call[K]
                    pull = numbers[STRENGTH] / shares
                    squares = penalise(elements(reals, call[W], size), elements(reals, call[OUT], size), pull)
                    stats[PENALTIES] += 0.5 * pull * squares * count
            elif kind == CLOCK:
                advance(counters, hyper, rates, updated, stats, epoch_stats)
            else:
                _gradient(call, reals, count, begins, tensor_factors, hyper, spare, integers, letters)
    write_control(before)
