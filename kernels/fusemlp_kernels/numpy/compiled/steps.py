"""The loop over training steps: the calls of a step's program, row by row of their table, again and again.

The order of backpropagation is the table's, which ``resident`` fills from the program.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]
from numba.extending import intrinsic, register_jitable

from fusemlp_kernels.contract import BATCH_INDEX, LEARNING_RATE, PENALTIES, ROW_COUNT, ROW_OFFSET
from fusemlp_kernels.numpy.compiled.clock import advance
from fusemlp_kernels.numpy.compiled.denormals import denormals_as_zero, restore
from fusemlp_kernels.numpy.compiled.losses import cross_entropy, elementwise
from fusemlp_kernels.numpy.compiled.masks import drop, mask
from fusemlp_kernels.numpy.compiled.options import EXACT
from fusemlp_kernels.numpy.compiled.pointwise_numba import activate, multiply_by_derivative
from fusemlp_kernels.numpy.compiled.products import backward, by_weights, column_sums, forward
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


def _casts(typingctx: Any, address: Any) -> Any:
    """An address as a pointer."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), code


_pointer: Any = intrinsic(_casts)


@register_jitable(**EXACT)
def _array(like: Any, address: int, size: int) -> Any:
    """The elements at an address, of the type of ``like``'s."""
    return carray(_pointer(address), (size,), like.dtype)


@register_jitable(**EXACT)
def _gather(call: Any, like: Any, x: Any, rows: Any, count: int) -> None:
    """``batch = x[rows]``, flat (count, K)."""
    columns = x.shape[1]
    batch = _array(like, call[OUT], count * columns)
    for i in range(count):
        row, start = rows[i], i * columns
        for j in range(columns):
            batch[start + j] = x[row, j]


@register_jitable(**EXACT)
def _slope(call: Any, numbers: Any, like: Any) -> float:
    if call[SLOPE]:
        return float(_array(like, call[SLOPE], 1)[0])
    return numbers[FIXED_SLOPE]


@register_jitable(**EXACT)
def _affine(call: Any, like: Any, count: int, integers: Any, letters: Any) -> None:
    """The pre-activation, into Z."""
    inputs, outputs = call[K], call[N]
    z, x = _array(like, call[Z], count * outputs), _array(like, call[X], count * inputs)
    w, b = _array(like, call[W], outputs * inputs), _array(like, call[B], outputs)
    forward(z, x, w, b, count, inputs, outputs, integers, like, letters)


@register_jitable(**EXACT)
def _forward(call: Any, numbers: Any, like: Any, count: int, batch_index: int, lanes: Any) -> None:
    """The output of a layer from its pre-activation."""
    outputs = call[N]
    y, z = _array(like, call[Y], count * outputs), _array(like, call[Z], count * outputs)
    if call[ACTIVATION] != IDENTITY:
        activate(call[ACTIVATION], y, z, _slope(call, numbers, like))
    if call[KEEP]:
        keep = carray(_pointer(call[KEEP]), (count * outputs,), np.bool_)
        drop(
            y, keep, lanes, count, outputs, 1.0 / (1.0 - numbers[RATE]), call[THRESHOLD], call[KEY_LOW],
            call[KEY_HIGH], call[MASK_LAYER], batch_index,
        )  # fmt: skip


@register_jitable(**EXACT)
def _derivative(call: Any, numbers: Any, like: Any, y: Any, z: Any, dz: Any, undo_scale: float) -> None:
    if call[ACTIVATION] != IDENTITY:
        dslope = multiply_by_derivative(call[ACTIVATION], dz, y, z, _slope(call, numbers, like), undo_scale)
        if call[DSLOPE]:
            _array(like, call[DSLOPE], 1)[0] = dslope


@register_jitable(**EXACT)
def _backward(call: Any, numbers: Any, like: Any, count: int, integers: Any, letters: Any) -> None:
    """dz of the layer before."""
    inputs, outputs = call[K], call[N]
    out, dz = _array(like, call[OUT], count * inputs), _array(like, call[DZ], count * outputs)
    w = _array(like, call[W], outputs * inputs)
    backward(out, dz, w, 1.0 / (1.0 - numbers[RATE]), count, inputs, outputs, integers, like, letters)
    if call[KEEP]:
        mask(out, carray(_pointer(call[KEEP]), (count * inputs,), np.bool_))
    y, z = _array(like, call[Y], count * inputs), _array(like, call[Z], count * inputs)
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
        out, dz = _array(like, call[OUT], outputs * inputs), _array(like, call[DZ], count * outputs)
        x = _array(like, call[X], count * inputs)
        by_weights(out, dz, x, alpha, beta, count, inputs, outputs, integers, like, letters)
    elif call[KIND_OF_ROW] == BIAS:
        column_sums(spare, _array(like, call[DZ], count * outputs), count, outputs)
        _into(_array(like, call[OUT], outputs), spare, outputs, alpha, beta)
    elif call[KIND_OF_ROW] == SLOPES:
        _into(_array(like, call[OUT], 1), _array(like, call[DZ], 1), 1, alpha, beta)


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
    before = denormals_as_zero()
    every = rule[ACCUMULATE]
    for _ in range(steps):
        count, offset, batch_index = counters[ROW_COUNT], counters[ROW_OFFSET], counters[BATCH_INDEX]
        picked = rows[offset : offset + count]
        begins, updated = batch_index % every == 0, (batch_index + 1) % every == 0
        shares = 0.0
        for at in range(len(calls)):
            # by address: rows of the arrays would be counted as references, atomically
            call = _array(calls, calls.ctypes.data + at * 8 * CALL_COLUMNS, CALL_COLUMNS)
            numbers = _array(call_factors, call_factors.ctypes.data + at * 8 * CALL_FACTORS, CALL_FACTORS)
            kind = call[KIND_OF_ROW]
            if kind == GATHER:
                _gather(call, reals, x, picked, count)
            elif kind == FORWARD:
                _affine(call, reals, count, integers, letters)
                _forward(call, numbers, reals, count, batch_index, lanes)
            elif kind == ENTROPY:
                _affine(call, reals, count, integers, letters)
                z, dz = _array(reals, call[Z], count * call[N]), _array(reals, call[DZ], count * call[N])
                shares = cross_entropy(
                    z, dz, labels, target, weight, class_weight, picked, count, call[N], loss, loss_factors, stats
                )
            elif kind == ELEMENTWISE:
                _affine(call, reals, count, integers, letters)
                _forward(call, numbers, reals, count, batch_index, lanes)
                y, z = _array(reals, call[Y], count * call[N]), _array(reals, call[Z], count * call[N])
                dz = _array(reals, call[DZ], count * call[N])
                shares = elementwise(y, dz, target, weight, picked, count, call[N], loss, loss_factors, stats, spare)
                _derivative(call, numbers, reals, y, z, dz, 1.0)
            elif kind == BACKWARD:
                _backward(call, numbers, reals, count, integers, letters)
            elif kind == UPDATE:
                if updated:
                    params, grads = _array(reals, call[OUT], call[N]), _array(reals, call[DZ], call[N])
                    first, second = _array(reals, call[Y], call[N]), _array(reals, call[Z], call[N])
                    own, own_factors = tensors[call[FIRST] : call[END]], tensor_factors[call[FIRST] : call[END]]
                    scale = 1.0 / every
                    if rule[CLIPS]:
                        scale *= clip_factor(grads, own, scale, rule_factors[CLIP_NORM])
                    update_all(params, grads, first, second, own, own_factors, rule, rule_factors, hyper, scale)
            elif kind == PENALTY:
                if shares != 0.0:
                    size = call[N] * call[K]
                    pull = numbers[STRENGTH] / shares
                    squares = penalise(_array(reals, call[W], size), _array(reals, call[OUT], size), pull)
                    stats[PENALTIES] += 0.5 * pull * squares * count
            elif kind == CLOCK:
                advance(counters, hyper, rates, updated, stats, epoch_stats)
            else:
                _gradient(call, reals, count, begins, tensor_factors, hyper, spare, integers, letters)
    restore(before)
