"""The loop over training steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba.extending import register_jitable

from fusemlp_kernels.contract import BATCH_INDEX, LEARNING_RATE, PENALTIES, ROW_COUNT, ROW_OFFSET
from fusemlp_kernels.numpy.compiled.clock import advance
from fusemlp_kernels.numpy.compiled.denormals import denormals_as_zero, restore
from fusemlp_kernels.numpy.compiled.losses import cross_entropy, elementwise
from fusemlp_kernels.numpy.compiled.masks import drop, mask
from fusemlp_kernels.numpy.compiled.options import EXACT, contents, kept
from fusemlp_kernels.numpy.compiled.pointwise_numba import activate, multiply_by_derivative
from fusemlp_kernels.numpy.compiled.products import backward, by_weights, column_sums, forward
from fusemlp_kernels.numpy.compiled.tables import (
    ACCUMULATE,
    ACTIVATION,
    ALIGNMENT,
    B_RULE,
    CLIP_NORM,
    CLIPS,
    CROSS_ENTROPY,
    DECAY,
    DROPS,
    DZ,
    FIXED_SLOPE,
    IDENTITY,
    INPUTS,
    KEEP,
    KEY_HIGH,
    KEY_LOW,
    KIND,
    LR_FACTOR,
    MASK_LAYER,
    MOMENTUM,
    OPTIMIZER,
    OUTPUTS,
    RATE,
    SGD,
    SLOPE,
    SLOPE_RULE,
    STRENGTH,
    THRESHOLD,
    W_RULE,
    B,
    W,
    Y,
    Z,
)
from fusemlp_kernels.numpy.compiled.updates import clip_factor, penalise, update_all


@register_jitable(**EXACT)
def _gather(batch: Any, x: Any, rows: Any, count: int) -> None:
    """``batch = x[rows]``, flat (count, K)."""
    columns = x.shape[1]
    for i in range(count):
        row, start = rows[i], i * columns
        for j in range(columns):
            batch[start + j] = x[row, j]


@register_jitable(**EXACT)
def _slope(params: Any, layers: Any, layer_factors: Any, index: int) -> float:
    at = layers[index, SLOPE]
    return float(params[at]) if at >= 0 else layer_factors[index, FIXED_SLOPE]


@register_jitable(**EXACT)
def _into(arena: Any, at: int, values: Any, size: int, alpha: float, beta: float) -> None:
    """``arena = alpha * values + beta * arena``, ``size`` elements from ``at`` on."""
    real = arena.dtype.type
    a, b = real(alpha), real(beta)
    if beta == 0.0:
        for i in range(size):
            arena[at + i] = a * values[i]
    else:
        for i in range(size):
            arena[at + i] = a * values[i] + b * arena[at + i]


def _make(version: int) -> Callable[..., int]:
    """The loop; ``version`` changes where the functions that it is made of change."""

    def run(
        steps: int,
        first: int,
        x: Any,
        labels: Any,
        target: Any,
        weight: Any,
        class_weight: Any,
        rows: Any,
        params: Any,
        grads: Any,
        state0: Any,
        state1: Any,
        work: Any,
        masks: Any,
        sums: Any,
        layers: Any,
        layer_factors: Any,
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
        history: Any,
        integers: Any,
        reals: Any,
        letters: Any,
    ) -> int:
        """``steps`` steps; ``first`` is the lowest layer with something to train. Returns ``version``."""
        before = denormals_as_zero()
        depth = len(layers)
        last = depth - 1
        every = rule[ACCUMULATE]
        # with nothing else to do with the gradient the product lands in the parameter
        direct = rule[OPTIMIZER] == SGD and rule_factors[MOMENTUM] == 0.0 and every == 1 and rule[CLIPS] == 0
        strength = loss_factors[STRENGTH]
        direct = direct and strength == 0.0
        for _ in range(steps):
            count = counters[ROW_COUNT]
            offset = counters[ROW_OFFSET]
            picked = rows[offset : offset + count]
            inputs = layers[0, INPUTS]
            _gather(work, x, picked, count)
            source = work[: count * inputs]
            for index in range(depth):
                layer = layers[index]
                inputs, outputs = layer[INPUTS], layer[OUTPUTS]
                size = count * outputs
                y, z = work[layer[Y] : layer[Y] + size], work[layer[Z] : layer[Z] + size]
                w, b = params[layer[W] : layer[W] + outputs * inputs], params[layer[B] : layer[B] + outputs]
                forward(z, source, w, b, count, inputs, outputs, integers, reals, letters)
                kind = layer[ACTIVATION]
                if kind != IDENTITY:
                    activate(kind, y, z, _slope(params, layers, layer_factors, index))
                if layer[DROPS]:
                    # nothing is in the place of the gradient yet; it takes whole multiples of the alignment
                    spare = work[layer[DZ] : layer[DZ] + (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT]
                    drop(
                        y, masks[layer[KEEP] : layer[KEEP] + size], spare, count, outputs,
                        1.0 / (1.0 - layer_factors[index, RATE]), layer[THRESHOLD], layer[KEY_LOW], layer[KEY_HIGH],
                        layer[MASK_LAYER], counters[BATCH_INDEX],
                    )  # fmt: skip
                source = y
            layer = layers[last]
            outputs = layer[OUTPUTS]
            size = count * outputs
            y, z = work[layer[Y] : layer[Y] + size], work[layer[Z] : layer[Z] + size]
            dz = work[layer[DZ] : layer[DZ] + size]
            if loss[KIND] == CROSS_ENTROPY:
                shares = cross_entropy(
                    z, dz, labels, target, weight, class_weight, picked, count, outputs, loss, loss_factors, stats
                )
            else:
                shares = elementwise(
                    y, dz, target, weight, picked, count, outputs, loss, loss_factors, stats, sums[2 * depth :]
                )
                if layer[ACTIVATION] != IDENTITY:
                    # the gradient by prelu's slope stands behind the others
                    sums[depth + last] = multiply_by_derivative(
                        layer[ACTIVATION], dz, y, z, _slope(params, layers, layer_factors, last), 1.0
                    )
            for index in range(last, first, -1):
                above, layer = layers[index], layers[index - 1]
                inputs, outputs = above[INPUTS], above[OUTPUTS]
                size = count * inputs
                d, dz = work[layer[DZ] : layer[DZ] + size], work[above[DZ] : above[DZ] + count * outputs]
                y, z = work[layer[Y] : layer[Y] + size], work[layer[Z] : layer[Z] + size]
                rate = layer_factors[index - 1, RATE]
                w = params[above[W] : above[W] + outputs * inputs]
                backward(d, dz, w, 1.0 / (1.0 - rate), count, inputs, outputs, integers, reals, letters)
                if layer[DROPS]:
                    mask(d, masks[layer[KEEP] : layer[KEEP] + size])
                slope = _slope(params, layers, layer_factors, index - 1)
                sums[depth + index - 1] = multiply_by_derivative(layer[ACTIVATION], d, y, z, slope, 1.0 - rate)
            begins = counters[BATCH_INDEX] % every == 0
            for index in range(first, depth):
                layer = layers[index]
                inputs, outputs = layer[INPUTS], layer[OUTPUTS]
                dz = work[layer[DZ] : layer[DZ] + count * outputs]
                source = work[: count * inputs]
                if index > 0:
                    start = layers[index - 1, Y]
                    source = work[start : start + count * inputs]
                arena = params if direct else grads
                alpha, beta = 1.0, 0.0 if begins else 1.0
                if layer[W_RULE] >= 0:
                    if direct:
                        alpha = -hyper[LEARNING_RATE] * tensor_factors[layer[W_RULE], LR_FACTOR]
                        beta = 1.0 + alpha * tensor_factors[layer[W_RULE], DECAY]
                    out = arena[layer[W] : layer[W] + outputs * inputs]
                    by_weights(out, dz, source, alpha, beta, count, inputs, outputs, integers, reals, letters)
                if layer[B_RULE] >= 0:
                    if direct:
                        alpha = -hyper[LEARNING_RATE] * tensor_factors[layer[B_RULE], LR_FACTOR]
                        beta = 1.0 + alpha * tensor_factors[layer[B_RULE], DECAY]
                    column_sums(sums[2 * depth :], dz, count, outputs)
                    _into(arena, layer[B], sums[2 * depth :], outputs, alpha, beta)
                if layer[SLOPE_RULE] >= 0:
                    if direct:
                        alpha = -hyper[LEARNING_RATE] * tensor_factors[layer[SLOPE_RULE], LR_FACTOR]
                        beta = 1.0 + alpha * tensor_factors[layer[SLOPE_RULE], DECAY]
                    _into(arena, layer[SLOPE], sums[depth + index :], 1, alpha, beta)
            if strength != 0.0 and shares != 0.0:
                squares = 0.0
                for index in range(first, depth):
                    layer = layers[index]
                    if layer[W_RULE] >= 0:
                        start, stop = layer[W], layer[W] + layer[OUTPUTS] * layer[INPUTS]
                        squares += penalise(params[start:stop], grads[start:stop], strength / shares)
                stats[PENALTIES] += 0.5 * strength / shares * squares * count
            updated = (counters[BATCH_INDEX] + 1) % every == 0
            if updated and not direct and len(tensors) > 0:
                scale = 1.0 / every
                if rule[CLIPS]:
                    scale *= clip_factor(grads, tensors, scale, rule_factors[CLIP_NORM])
                update_all(params, grads, state0, state1, tensors, tensor_factors, rule, rule_factors, hyper, scale)
            advance(counters, hyper, rates, updated, stats, history)
        restore(before)
        return version

    return run


def compiled_loop() -> Callable[..., int]:
    """The loop, compiled for an element type when it is first called with it, or read from the disk."""
    return kept(_make(contents()))
