"""The losses and their gradients; the formulas are in ``reference.loss_of_output``.

Sums over rows are taken in float64, in whatever type the elements are.
"""

from __future__ import annotations

import math
from typing import Any

from numba.extending import register_jitable

from fusemlp_kernels.contract import CORRECT, LAST_LOSS, LOSS_SUM, NORM_SUM, SCORED
from fusemlp_kernels.numpy.compiled.functions import exp, sigmoid
from fusemlp_kernels.numpy.compiled.options import ELEMENTWISE, EXACT, REDUCTION
from fusemlp_kernels.numpy.compiled.tables import (
    ACCURACY,
    BINARY_CROSS_ENTROPY,
    CLASS_WEIGHTED,
    DELTA,
    HUBER,
    IGNORED,
    IGNORES,
    KIND,
    MAE,
    MEAN,
    MSE,
    POISSON,
    QUANTILE,
    SMOOTHING,
    SOFT,
    WEIGHTED,
)


@register_jitable(**EXACT)
def _largest(values: Any, start: int, columns: int) -> int:
    """The first of the largest, or the first NaN, as ``argmax``."""
    best, found = values[start], 0
    for j in range(1, columns):
        v = values[start + j]
        if v > best or (v != v and best == best):
            best, found = v, j
    return found


@register_jitable(**REDUCTION)
def _exponentials(d: Any, z: Any, start: int, stop: int, shift: Any) -> float:
    """``d = exp(z - shift)`` in a row; their sum."""
    total = d.dtype.type(0.0)
    for at in range(start, stop):
        e = exp(z[at] - shift)
        d[at] = e
        total += e
    return total


@register_jitable(**EXACT)
def _record(stats: Any, value: float, normaliser: float, scale: float, mean: bool) -> None:
    """``value`` is the sum over the rows, not yet divided."""
    stats[LOSS_SUM] += value
    if mean:
        stats[NORM_SUM] += normaliser
    stats[LAST_LOSS] = value * scale


@register_jitable(**ELEMENTWISE)
def cross_entropy(
    z: Any, d: Any, labels: Any, soft: Any, weight: Any, class_weight: Any, rows: Any, count: int, columns: int,
    loss: Any, factors: Any, stats: Any,
) -> None:  # fmt: skip
    """dz of softmax cross-entropy into d, flat (count, columns) like z; the targets are picked by ``rows``.

    labels (n,) int64, or with loss[SOFT] soft (n, columns); weight (n,) and class_weight (columns,) where the loss
    says so. d may be z.
    """
    real = z.dtype.type
    is_soft, weighted, by_class = loss[SOFT] != 0, loss[WEIGHTED] != 0, loss[CLASS_WEIGHTED] != 0
    smoothing = factors[SMOOTHING]
    normaliser, scored = 0.0, 0
    smooth_mass = 0.0
    for j in range(columns):
        smooth_mass += (class_weight[j] if by_class else 1.0) * (smoothing / columns)
    for i in range(count):
        share = float(weight[rows[i]]) if weighted else 1.0
        if not is_soft:
            label = labels[rows[i]]
            if loss[IGNORES] and label == loss[IGNORED]:
                continue
            if by_class:
                share *= class_weight[label]
        normaliser += share
        scored += 1
    mean = loss[MEAN] != 0
    scale = 1.0
    if mean:
        scale = 1.0 / normaliser if normaliser != 0.0 else 0.0
    total, correct = 0.0, 0
    for i in range(count):
        row, start = rows[i], i * columns
        stop = start + columns
        chosen = _largest(z, start, columns)
        shift = z[start + chosen]
        label = 0
        ignored = False
        if not is_soft:
            label = labels[row]
            ignored = loss[IGNORES] != 0 and label == loss[IGNORED]
            if ignored:
                label = 0
            correct += chosen == label and not ignored
        elif loss[ACCURACY]:
            best = 0
            for j in range(1, columns):
                if soft[row, j] > soft[row, best]:
                    best = j
            correct += chosen == best
        share = float(weight[row]) if weighted else 1.0
        if ignored:
            share = 0.0
        # what the targets give of the loss, before z is overwritten
        picked, mass = 0.0, 0.0
        if is_soft:
            for j in range(columns):
                q = soft[row, j] * (1.0 - smoothing) + smoothing / columns
                if by_class:
                    q *= class_weight[j]
                mass += q
                picked += q * (z[start + j] - shift)
        else:
            own = (class_weight[label] if by_class else 1.0) * (1.0 - smoothing)
            mass = own + smooth_mass
            picked = own * (z[start + label] - shift)
            if smoothing != 0.0:
                for j in range(columns):
                    part = (class_weight[j] if by_class else 1.0) * (smoothing / columns)
                    picked += part * (z[start + j] - shift)
        sums = _exponentials(d, z, start, stop, shift)
        total += share * (mass * math.log(sums) - picked)
        weighed = share * scale
        factor = real(weighed * mass / sums)
        for at in range(start, stop):
            d[at] *= factor
        if is_soft:
            for j in range(columns):
                q = soft[row, j] * (1.0 - smoothing) + smoothing / columns
                if by_class:
                    q *= class_weight[j]
                d[start + j] -= real(weighed * q)
        else:
            if smoothing != 0.0:
                for j in range(columns):
                    part = (class_weight[j] if by_class else 1.0) * (smoothing / columns)
                    d[start + j] -= real(weighed * part)
            d[start + label] -= real(weighed * own)
    if loss[ACCURACY]:
        stats[CORRECT] += correct
        stats[SCORED] += scored
    _record(stats, total, normaliser, scale, mean)


@register_jitable(**ELEMENTWISE)
def _element(kind: int, y: Any, t: Any, factors: Any) -> Any:
    """The loss of one output and its derivative by it."""
    real = type(y)
    zero, half, one = real(0.0), real(0.5), real(1.0)
    r = y - t
    value, slope = r * r, r + r
    if kind == MAE:
        value, slope = abs(r), one if r > zero else (-one if r < zero else r)
    elif kind == HUBER:
        delta = real(factors[DELTA])
        c = delta if r > delta else (-delta if r < -delta else r)
        value, slope = c * (r - half * c), c
    elif kind == POISSON:
        e = exp(y)
        value, slope = e - t * y, e - t
    elif kind == BINARY_CROSS_ENTROPY:
        value = (y if y > zero else (zero if y <= zero else y)) + math.log1p(exp(-abs(y))) - t * y
        slope = sigmoid(y) - t
    elif kind != MSE:
        q = real(factors[QUANTILE])
        side = one - q if r > zero else q
        value, slope = side * abs(r), side if r > zero else (-side if r < zero else r)
    return value, slope


@register_jitable(**ELEMENTWISE)
def elementwise(
    y: Any, d: Any, target: Any, weight: Any, rows: Any, count: int, columns: int, loss: Any, factors: Any, stats: Any
) -> None:
    """The gradient by the outputs y into d, flat (count, columns); target (n, columns) is picked by ``rows``."""
    real = y.dtype.type
    kind, weighted, mean = loss[KIND], loss[WEIGHTED] != 0, loss[MEAN] != 0
    normaliser = 0.0
    for i in range(count):
        normaliser += float(weight[rows[i]]) if weighted else 1.0
    normaliser *= columns
    scale = 1.0
    if mean:
        scale = 1.0 / normaliser if normaliser != 0.0 else 0.0
    total, correct = 0.0, 0
    for i in range(count):
        row, start = rows[i], i * columns
        if loss[ACCURACY]:
            if kind == BINARY_CROSS_ENTROPY:
                for j in range(columns):
                    correct += (y[start + j] > 0) == (target[row, j] > 0.5)
            else:
                best = 0
                for j in range(1, columns):
                    if target[row, j] > target[row, best]:
                        best = j
                correct += best == _largest(y, start, columns)
        share = float(weight[row]) if weighted else 1.0
        factor = real(share * scale)
        of_row = 0.0
        for j in range(columns):
            value, slope = _element(kind, y[start + j], target[row, j], factors)
            of_row += value
            d[start + j] = slope * factor
        total += share * of_row
    if loss[ACCURACY]:
        stats[CORRECT] += correct
        stats[SCORED] += count * columns if kind == BINARY_CROSS_ENTROPY else count
    _record(stats, total, normaliser, scale, mean)
