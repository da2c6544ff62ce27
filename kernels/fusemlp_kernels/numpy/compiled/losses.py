"""The losses and their gradients; the formulas are in ``reference.loss_of_output``.

Sums over rows are taken in float64, in whatever type the elements are. No product and sum of them become one rounding:
the value of a loss would depend on what else a program compiles.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels.contract import BATCH_LOSSES, CORRECT, LAST_LOSS, LOSS_SUM, NORM_SUM, SCORED
from fusemlp_kernels.numpy.compiled.functions import exp
from fusemlp_kernels.numpy.compiled.options import ELEMENTWISE, EXACT, REDUCTION
from fusemlp_kernels.numpy.compiled.pointwise_numba import BINARY_CROSS_ENTROPY, element_losses
from fusemlp_kernels.numpy.compiled.tables import (
    ACCURACY,
    CLASS_WEIGHTED,
    DIVISOR,
    IGNORED,
    IGNORES,
    KIND,
    MEAN,
    OPTION,
    SMOOTHED,
    SMOOTHING,
    SOFT,
    WEIGHTED,
    WIDE,
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


@register_jitable(**EXACT)
def _largest_of_many(values: Any, start: Any, columns: Any) -> Any:
    """``_largest`` of a row of finite values, or -1: four maxima side by side, then the place of the largest."""
    first = values[start]
    a, b, c, d = first, first, first, first
    # zero as long as all are finite
    p, q = first - first, first - first
    four = np.uintp(4)
    for at in range(start, start + columns - columns % four, four):
        v, w, x, y = values[at], values[at + np.uintp(1)], values[at + np.uintp(2)], values[at + np.uintp(3)]
        a, b = v if v > a else a, w if w > b else b
        c, d = x if x > c else c, y if y > d else d
        p += (v - v) + (w - w)
        q += (x - x) + (y - y)
    for at in range(start + columns - columns % four, start + columns):
        v = values[at]
        a = v if v > a else a
        p += v - v
    if p + q != 0.0:
        return -1
    largest = max(max(a, b), max(c, d))
    for at in range(start, start + columns):
        if values[at] == largest:
            return np.int64(at - start)
    return -1


# Unsigned indices: from a signed one that might be negative the compiler makes no vector code.
@register_jitable(**ELEMENTWISE)
def _subtract(d: Any, z: Any, start: int, stop: int, shift: Any) -> None:
    for at in range(np.uintp(start), np.uintp(stop)):
        d[at] = z[at] - shift


@register_jitable(**ELEMENTWISE)
def _multiply(d: Any, start: int, stop: int, factor: Any) -> None:
    for at in range(np.uintp(start), np.uintp(stop)):
        d[at] *= factor


@register_jitable(**ELEMENTWISE)
def _exponentials(d: Any, start: int, stop: int) -> None:
    for at in range(np.uintp(start), np.uintp(stop)):
        d[at] = exp(d[at])


@register_jitable(**REDUCTION)
def _sum(d: Any, start: int, stop: int) -> Any:
    total = d.dtype.type(0.0)
    for at in range(np.uintp(start), np.uintp(stop)):
        total += d[at]
    return total


@register_jitable(**EXACT)
def _smoothed(
    soft: Any, row: int, j: int, is_soft: bool, class_weight: Any, by_class: bool, smoothing: Any, columns: int
) -> float:
    """The weight of column j in a row of targets, but for that of the class itself where the targets are classes."""
    q = smoothing / columns
    if is_soft:
        q += soft[row, j] * (1.0 - smoothing)
    return q * class_weight[j] if by_class else q


@register_jitable(**EXACT)
def _record(stats: Any, value: float, normaliser: float, scale: float, mean: bool, count: int) -> None:
    """``value`` is the sum over the rows, not yet divided."""
    stats[LOSS_SUM] += value
    if mean:
        stats[NORM_SUM] += normaliser
    stats[LAST_LOSS] = value * scale
    stats[BATCH_LOSSES] += value * scale * count


@register_jitable(**EXACT)
def cross_entropy(
    z: Any, d: Any, labels: Any, soft: Any, weight: Any, class_weight: Any, rows: Any, count: int, columns: int,
    loss: Any, factors: Any, stats: Any,
) -> float:  # fmt: skip
    """dz of softmax cross-entropy into d, flat (count, columns) like z; the targets are picked by ``rows``.

    labels (n,) int64, or with loss[SOFT] soft (n, columns); weight (n,) and class_weight (columns,) where the loss
    says so. d may be z. Returns the sum of the row weights.
    """
    real = z.dtype.type
    is_soft, weighted, by_class = loss[SOFT] != 0, loss[WEIGHTED] != 0, loss[CLASS_WEIGHTED] != 0
    smoothed, wide = loss[SMOOTHED] != 0, loss[WIDE] != 0
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
    shares = normaliser
    normaliser *= factors[DIVISOR]
    mean = loss[MEAN] != 0
    scale = 1.0
    if mean:
        scale = 1.0 / normaliser if normaliser != 0.0 else 0.0
    total, correct = 0.0, 0
    for i in range(count):
        row, start = rows[i], i * columns
        chosen = _largest_of_many(z, np.uintp(start), np.uintp(columns)) if wide else -1
        if chosen < 0:
            chosen = _largest(z, start, columns)
        shift = z[start + chosen]
        share = float(weight[row]) if weighted else 1.0
        _subtract(d, z, start, start + columns, shift)
        picked = 0.0
        if smoothed:
            for j in range(columns):
                q = _smoothed(soft, row, j, is_soft, class_weight, by_class, smoothing, columns)
                picked += q * d[start + j]
        if is_soft:
            if loss[ACCURACY]:
                correct += chosen == _largest(soft[row], 0, columns)
        else:
            label = labels[row]
            if loss[IGNORES] and label == loss[IGNORED]:
                continue
            correct += chosen == label
            picked += (class_weight[label] if by_class else 1.0) * (1.0 - smoothing) * d[start + label]
        total -= share * picked
    if not wide:
        _exponentials(d, 0, count * columns)
    for i in range(count):
        row, start = rows[i], i * columns
        stop = start + columns
        if wide:
            _exponentials(d, start, stop)
        share = float(weight[row]) if weighted else 1.0
        label, own, mass = 0, 0.0, smooth_mass
        if is_soft:
            mass = 0.0
            for j in range(columns):
                mass += _smoothed(soft, row, j, is_soft, class_weight, by_class, smoothing, columns)
        else:
            label = labels[row]
            if loss[IGNORES] and label == loss[IGNORED]:
                label, share = 0, 0.0
            own = (class_weight[label] if by_class else 1.0) * (1.0 - smoothing)
            mass += own
        sums = _sum(d, start, stop)
        total += share * (mass * math.log(sums))
        weighed = share * scale
        factor = real(weighed * mass / sums)
        _multiply(d, start, stop, factor)
        if smoothed:
            for j in range(columns):
                q = _smoothed(soft, row, j, is_soft, class_weight, by_class, smoothing, columns)
                d[start + j] -= real(weighed * q)
        if not is_soft:
            d[start + label] -= real(weighed * own)
    if loss[ACCURACY]:
        stats[CORRECT] += correct
        stats[SCORED] += scored
    _record(stats, total, normaliser, scale, mean, count)
    return shares


@register_jitable(**EXACT)
def elementwise(
    y: Any, d: Any, target: Any, weight: Any, rows: Any, count: int, columns: int, loss: Any, factors: Any,
    stats: Any, scratch: Any,
) -> float:  # fmt: skip
    """The gradient by the outputs y into d, flat (count, columns); target (n, columns) is picked by ``rows``.

    Returns the sum of the row weights.
    """
    real = y.dtype.type
    kind, weighted, mean = loss[KIND], loss[WEIGHTED] != 0, loss[MEAN] != 0
    option = real(factors[OPTION])
    normaliser = 0.0
    for i in range(count):
        normaliser += float(weight[rows[i]]) if weighted else 1.0
    shares = normaliser
    normaliser *= factors[DIVISOR]
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
                correct += _largest(target[row], 0, columns) == _largest(y, start, columns)
        for j in range(columns):
            d[start + j] = target[row, j]
        if weighted:
            share = float(weight[row])
            total += share * element_losses(kind, y, d, start, start + columns, real(share * scale), option)
    if not weighted:
        total = element_losses(kind, y, d, 0, count * columns, real(scale), option)
    if loss[ACCURACY]:
        stats[CORRECT] += correct
        stats[SCORED] += count * columns if kind == BINARY_CROSS_ENTROPY else count
    _record(stats, total, normaliser, scale, mean, count)
    return shares
