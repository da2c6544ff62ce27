"""The optimizers, as passes over blocks that stay in the cache; ``pointwise_numpy`` has the passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fusemlp_kernels.contract import (
    BATCH_INDEX,
    BIAS_CORRECTION_1,
    BIAS_CORRECTION_2,
    FIRST_UPDATE,
    LEARNING_RATE,
    RATE_COLUMNS,
    RATE_SCALE,
    ROWS_FILLED,
    UPDATE_COUNT,
    Segment,
    TensorRule,
    UpdateRule,
)
from fusemlp_kernels.numpy import blas
from fusemlp_kernels.numpy.activations import BLOCK, Array, Run, formula, in_sequence

Accumulate = Callable[[float, float], None]

# Tensors start at multiples of this in the arenas.
ALIGNMENT_BYTES = 256


def bind_clock(hyper: Array, rates: Array, counters: Array) -> Run:
    """The contract's advancing of the clock after a batch with an update."""
    # one item is read or written in half the time through a memoryview
    counter, setting, table = counters.data, hyper.data, rates.reshape(-1).data

    def clock() -> None:
        counter[BATCH_INDEX] += 1
        count = counter[UPDATE_COUNT] + 1
        counter[UPDATE_COUNT] = count
        row = RATE_COLUMNS + RATE_COLUMNS * int(max(0.0, min(count - table[FIRST_UPDATE], table[ROWS_FILLED] - 1.0)))
        setting[LEARNING_RATE] = table[row + LEARNING_RATE] * setting[RATE_SCALE]
        setting[BIAS_CORRECTION_1] = table[row + BIAS_CORRECTION_1]
        setting[BIAS_CORRECTION_2] = table[row + BIAS_CORRECTION_2]

    return clock


def bind_advance(*, rule: UpdateRule, hyper: Array, rates: Array, counters: Array) -> Run:
    """The contract's ``advance``."""
    tick = bind_clock(hyper, rates, counters)
    every = rule.accumulate

    def advance() -> None:
        if every > 1 and (counters[BATCH_INDEX] + 1) % every:
            counters[BATCH_INDEX] += 1
        else:
            tick()

    return advance


def bind_tensor_update(
    param: Array,
    state: tuple[Array, ...],
    produce: Callable[[Array], Accumulate],
    rule: UpdateRule,
    tensor: TensorRule,
    hyper: Array,
) -> Run:
    """The update of one tensor whose gradient is still to be computed.

    ``produce(out)`` binds ``run(alpha, beta)``: ``out = alpha * gradient + beta * out``. SGD, with or without
    momentum, needs the gradient nowhere else: the product lands in the parameter or in its velocity.
    """
    factor, decay = tensor.lr_factor, tensor.weight_decay
    setting = hyper.data
    if rule.name == "sgd":
        into_param = produce(param)

        def sgd() -> None:
            rate = setting[LEARNING_RATE] * factor
            into_param(-rate, 1.0 - rate * decay)

        return sgd
    if rule.name == "momentum" and not rule.decoupled:
        (velocity,) = state
        into_velocity = produce(velocity)
        add_decay, add_velocity = blas.axpy(param, velocity), blas.axpy(velocity, param)
        momentum = rule.momentum
        rate_inside = rule.convention == "scikit-learn"

        def momentum_sgd() -> None:
            rate = setting[LEARNING_RATE] * factor
            inside = -rate if rate_inside else 1.0
            into_velocity(inside, momentum)
            if decay:
                add_decay(inside * decay)
            add_velocity(1.0 if rate_inside else -rate)

        return momentum_sgd
    gradient = np.empty(param.shape, param.dtype)
    into_gradient = produce(gradient)
    apply = bind_elementwise(param, gradient, state, rule, tensor, hyper)

    def through_gradient() -> None:
        into_gradient(1.0, 0.0)
        apply()

    return through_gradient


def bind_elementwise(
    param: Array, grad: Array, state: tuple[Array, ...], rule: UpdateRule, tensor: TensorRule, hyper: Array
) -> Run:
    """The update of one tensor, or of several of one rule that lie side by side, from its gradient.

    ``grad`` is written to: weight decay is added to it.
    """
    if not all(array.flags.c_contiguous for array in (param, grad, *state)):
        return _bind_block(param, grad, state, rule, tensor, hyper)
    flat_param, flat_grad = param.reshape(-1), grad.reshape(-1)
    flat_state = [array.reshape(-1) for array in state]
    runs = []
    for start in range(0, flat_param.size, BLOCK):
        block = slice(start, start + BLOCK)
        states = tuple(array[block] for array in flat_state)
        runs.append(_bind_block(flat_param[block], flat_grad[block], states, rule, tensor, hyper))
    return in_sequence(runs)


def _bind_block(
    p: Array, g: Array, state: tuple[Array, ...], rule: UpdateRule, tensor: TensorRule, hyper: Array
) -> Run:
    factor, decay = tensor.lr_factor, tensor.weight_decay
    setting = hyper.data
    function, count = formula("update", rule.name)
    decayed, most = formula("update", "decay")
    scratch = tuple(np.empty(p.shape, p.dtype) for _ in range(max(count, most)))
    own, shared = scratch[:count], scratch[:most]

    def run() -> None:
        rate = setting[LEARNING_RATE] * factor
        if decay:
            decayed(p, g, rate, decay, rule, setting, *shared)
        function(p, g, *state, rate, decay, rule, setting, *own)

    return run


def bind_update(
    *,
    params: Array,
    grads: Array,
    states: tuple[Array, ...],
    segments: Sequence[Segment],
    rule: UpdateRule,
    hyper: Array,
    rates: Array,
    counters: Array,
) -> Run:
    """The contract's ``update``."""
    runs = []
    for start, stop, tensor in merged(segments, ALIGNMENT_BYTES // params.itemsize):
        block = slice(start, stop)
        state = tuple(array[block] for array in states)
        runs.append(bind_elementwise(params[block], grads[block], state, rule, tensor, hyper))
    tick = bind_clock(hyper, rates, counters)
    norm = blas.norm(grads)
    every, limit = rule.accumulate, rule.clip_norm

    def update() -> None:
        if every > 1 and (counters[BATCH_INDEX] + 1) % every:
            counters[BATCH_INDEX] += 1
            return
        scale = 1.0 / every
        if limit is not None:
            # in this order a NaN stays
            scale *= min(limit / (norm() * scale + 1e-6), 1.0)
        if scale != 1.0:
            np.multiply(grads, scale, out=grads)
        for run in runs:
            run()
        if scale != scale:
            # a norm that was NaN must not stay between the tensors, where no gradient is written
            grads.fill(0.0)
        tick()

    return update


def merged(segments: Sequence[Segment], alignment: int) -> list[tuple[int, int, TensorRule]]:
    """Segments of one rule with nothing but padding between them, as one stretch (start, stop, rule)."""
    stretches: list[tuple[int, int, TensorRule]] = []
    for segment in segments:
        stop = segment.offset + segment.size
        if stretches:
            start, last, rule = stretches[-1]
            if rule == segment.rule and segment.offset == -(-last // alignment) * alignment:
                stretches[-1] = (start, stop, rule)
                continue
        stretches.append((segment.offset, stop, segment.rule))
    return stretches
