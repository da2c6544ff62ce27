"""The losses and their gradients; the formulas are in ``reference.loss_of_output``.

Sums over rows are taken in float64, in whatever type the elements are. No product and sum of them become one rounding:
the value of a loss would depend on what else a program compiles.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from fusemlp_kernels import contract as c
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.compiled.compiler import ELEMENTWISE, EXACT, REDUCTION, part
from fusemlp_kernels.numpy.compiled.functions import exp
from fusemlp_kernels.numpy.compiled.pointwise_numba import (
    BINARY_CROSS_ENTROPY,
    GAUSSIAN,
    QUANTILES,
    SIGMOID,
    SOFTPLUS,
    activate,
    element_losses,
)
from fusemlp_kernels.numpy.compiled.vectors import sum_of


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
def _largest_value(values: Any, start: Any, columns: Any) -> Any:
    """The largest of a row of finite values: four maxima side by side."""
    a = values[start]
    b, c, d = a, a, a
    four = np.uintp(4)
    for at in range(start, start + columns - columns % four, four):
        v, w, x, y = values[at], values[at + np.uintp(1)], values[at + np.uintp(2)], values[at + np.uintp(3)]
        a, b = v if v > a else a, w if w > b else b
        c, d = x if x > c else c, y if y > d else d
    for at in range(start + columns - columns % four, start + columns):
        a = values[at] if values[at] > a else a
    return max(max(a, b), max(c, d))


@register_jitable(**REDUCTION)
def _finite(values: Any, stop: int) -> Any:
    """Say whether the first ``stop`` values are finite."""
    total = values.dtype.type(0.0)
    for at in range(np.uintp(stop)):
        total += values[at] - values[at]
    return total == 0.0


@register_jitable(**EXACT)
def _is_chosen(below: Any, start: int, place: int, chosen: int) -> bool:
    """Say whether the largest of a row is at ``place``: ``chosen``, or, if -1, the first zero of the row below it."""
    if chosen >= 0:
        return chosen == place
    if below[start + place] != 0.0:
        return False
    zeros = 0
    for at in range(np.uintp(start), np.uintp(start + place)):
        zeros += below[at] == 0.0
    return zeros == 0


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


@register_jitable(**EXACT)
def _smoothed(
    soft: Any, row: int, j: int, is_soft: bool, class_weight: Any, by_class: bool, smoothing: Any, columns: int
) -> float:
    """The weight of column j in a row of targets, but for that of the class itself where the targets are classes."""
    q = smoothing / columns
    if is_soft:
        q += soft[row * columns + j] * (1.0 - smoothing)
    return q * class_weight[j] if by_class else q


@register_jitable(**EXACT)
def present(target: Any, weight: Any, rows: Any, count: int, call: Any) -> float:
    """The sum of the row weights of a batch, once for each target that is there."""
    total, targets = 0.0, call.k
    for i in range(count):
        known, start = 0, rows[i] * targets
        for at in range(start, start + targets):
            known += target[at] == target[at]
        total += known * (float(weight[rows[i]]) if call.weighted else 1.0)
    return total


@register_jitable(**EXACT)
def shares_of(labels: Any, weight: Any, class_weight: Any, rows: Any, count: int, call: Any) -> float:
    """The sum of the row weights of a batch; a row that is ignored has none."""
    if call.missing:
        known: float = call.present
        return known
    weighted, by_class = call.weighted != 0, call.class_weighted != 0
    ignores = call.ignores != 0
    hard = call.soft == 0
    if not (weighted or ((by_class or ignores) and hard)):
        return float(count)
    total = 0.0
    for i in range(count):
        share = float(weight[rows[i]]) if weighted else 1.0
        if hard and (by_class or ignores):
            label = labels[rows[i]]
            if call.ignores and label == call.ignored:
                continue
            if by_class:
                share *= class_weight[label]
        total += share
    return total


@register_jitable(**EXACT)
def _scale(shares: float, call: Any) -> float:
    """The factor of a sum over the rows."""
    normaliser = shares * call.divisor
    if call.mean == 0:
        return 1.0
    return 1.0 / normaliser if normaliser != 0.0 else 0.0


@register_jitable(**EXACT)
def _row_scale(shares: float, call: Any) -> float:
    """The factor of a row's gradient."""
    return 1.0 / call.divisor if call.mean == t.BY_ITSELF else _scale(shares, call)


@register_jitable(**EXACT)
def record(stats: Any, value: float, correct: float, scored: float, shares: float, call: Any, count: int) -> None:
    """Note a batch or a shard; ``value`` is the sum over its rows, not yet divided, ``count`` the rows of the batch."""
    scale = _scale(shares, call)
    if call.accuracy:
        stats[c.CORRECT] += correct
        stats[c.SCORED] += scored
    # rows without weight may have targets with one
    stats[c.LOSS_SUM] += value if scale != 0.0 else value * scale
    if call.mean and call.shard == 0:
        # that of the whole batch
        stats[c.NORM_SUM] += shares * call.divisor
    stats[c.LAST_LOSS] = value * scale
    stats[c.BATCH_LOSSES] += value * scale * count


@register_jitable(**EXACT)
def cross_entropy(
    z: Any, d: Any, labels: Any, soft: Any, weight: Any, class_weight: Any, rows: Any, count: int, columns: int,
    call: Any, shares: float, partials: Any,
) -> None:  # fmt: skip
    """dz of softmax cross-entropy into d, flat (count, columns) like z; the targets are picked by ``rows``.

    labels (n,) int64, or with call[SOFT] soft, flat (n, columns); weight (n,) and class_weight (columns,) where the
    call has them. d may be z. ``shares``: see ``shares_of``. The statistics of these rows go into partials.
    """
    real = z.dtype.type
    is_soft, weighted, by_class = call.soft != 0, call.weighted != 0, call.class_weighted != 0
    smoothed, wide = call.smoothed != 0, call.wide != 0
    smoothing = call.smoothing
    scored, smooth_mass = 0, 0.0
    for j in range(columns):
        smooth_mass += (class_weight[j] if by_class else 1.0) * (smoothing / columns)
    scale = _row_scale(shares, call)
    finite = _finite(z, count * columns)
    total, correct = 0.0, 0
    for i in range(count):
        row, start = rows[i], i * columns
        if finite:
            chosen, shift = -1, _largest_value(z, np.uintp(start), np.uintp(columns))
        else:
            chosen = _largest(z, start, columns)
            shift = z[start + chosen]
        share = float(weight[row]) if weighted else 1.0
        _subtract(d, z, start, start + columns, shift)
        scored += 1
        picked = 0.0
        if smoothed:
            for j in range(columns):
                q = _smoothed(soft, row, j, is_soft, class_weight, by_class, smoothing, columns)
                picked += q * d[start + j]
        if is_soft:
            if call.accuracy:
                correct += _is_chosen(d, start, _largest(soft, row * columns, columns), chosen)
        else:
            label = labels[row]
            if call.ignores and label == call.ignored:
                scored -= 1
                continue
            correct += _is_chosen(d, start, label, chosen)
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
        label, label_mass, mass = 0, 0.0, smooth_mass
        if is_soft:
            mass = 0.0
            for j in range(columns):
                mass += _smoothed(soft, row, j, is_soft, class_weight, by_class, smoothing, columns)
        else:
            label = labels[row]
            if call.ignores and label == call.ignored:
                label, share = 0, 0.0
            label_mass = (class_weight[label] if by_class else 1.0) * (1.0 - smoothing)
            mass += label_mass
        sums = sum_of(part(d, start), columns)
        total += share * (mass * math.log(sums))
        weighed = share * scale
        factor = real(weighed * mass / sums)
        _multiply(d, start, stop, factor)
        if smoothed:
            for j in range(columns):
                q = _smoothed(soft, row, j, is_soft, class_weight, by_class, smoothing, columns)
                d[start + j] -= real(weighed * q)
        if not is_soft:
            d[start + label] -= real(weighed * label_mass)
    if call.recorded:
        partials[t.LOSS_PART], partials[t.HITS_PART], partials[t.SCORED_PART] = total, correct, scored
        partials[t.SHARES_PART] = shares


@register_jitable(**EXACT)
def _packed(
    y: Any, d: Any, target: Any, weight: Any, rows: Any, count: int, call: Any, scale: float, spare: Any
) -> tuple[float, int, int]:
    """``elementwise`` of the targets that are not missing, which lie one after another in ``spare``, (3, count,
    targets), with the outputs y and s of each beside them; the loss, hits and the number of these targets."""
    real = y.dtype.type
    kind, columns, targets, option = call.loss, call.n, call.k, real(call.option)
    missing = 1 if call.missing else 0
    t_part, y_part, s_part = spare, part(spare, count * targets), part(spare, 2 * count * targets)
    total, correct, known = 0.0, 0, 0
    for i in range(count):
        begin = known
        for j in range(targets):
            value, output = target[rows[i] * targets + j], y[i * columns + j]
            # the next one takes the place of a missing one: a branch would often be mispredicted
            there = 1 - missing * (value != value)
            t_part[known], y_part[known] = value, output
            if kind == GAUSSIAN:
                s_part[known] = y[i * columns + targets + j]
            correct += there * ((output > 0) == (value > 0.5))
            known += there
        if call.weighted:
            share = float(weight[rows[i]])
            total += share * element_losses(kind, y_part, s_part, t_part, begin, known, real(share * scale), option)
    if not call.weighted:
        total = element_losses(kind, y_part, s_part, t_part, 0, known, real(scale), option)
    place = 0
    for i in range(count):
        for j in range(targets):
            value, at, gradient = target[rows[i] * targets + j], i * columns + j, t_part[place]
            there = 1 - missing * (value != value)
            d[at] = gradient if there else real(0.0)
            if kind == GAUSSIAN:
                gradient = s_part[place]
                d[at + targets] = gradient if there else real(0.0)
            place += there
    return total, correct, known


@register_jitable(**EXACT)
def _pinball(error: Any, level: Any) -> Any:
    """The derivative of the quantile loss of an error; 0 or NaN where the error is."""
    return type(error)(1.0) - level if error > 0 else (-level if error < 0 else error)


@register_jitable(**EXACT)
def _quantiles(
    y: Any, d: Any, target: Any, weight: Any, rows: Any, count: int, call: Any, scale: float, slopes: Any, levels: Any
) -> float:
    """The loss of quantiles that never cross, and in d its gradient by the outputs y, flat (count, N).

    The middle output is a quantile, each other one by softplus a step from its neighbour: so it moves all quantiles
    from its own on, away from the middle.
    """
    real = y.dtype.type
    columns, middle, total = call.n, call.k, 0.0
    for array in (d, slopes):
        _subtract(array, y, 0, count * columns, real(0.0))
    activate(SOFTPLUS, d, d, count * columns, real(0.0))
    activate(SIGMOID, slopes, slopes, count * columns, real(0.0))
    for i in range(count):
        start, value = i * columns, target[rows[i]]
        share = float(weight[rows[i]]) if call.weighted else 1.0
        factor, loss, low = real(share * scale), 0.0, y[start + middle]
        # the place of the middle in d is free
        d[start + middle] = real(0.0)
        quantile = low
        for at in range(middle, columns):
            quantile += d[start + at]
            error = quantile - value
            d[start + at] = _pinball(error, levels[at])
            loss += d[start + at] * error
        for at in range(middle - 1, -1, -1):
            low -= d[start + at]
            error = low - value
            d[start + at] = _pinball(error, levels[at])
            loss += d[start + at] * error
        below, above = real(0.0), real(0.0)
        for at in range(middle):
            below += d[start + at]
            d[start + at] = -factor * below * slopes[start + at]
        for at in range(columns - 1, middle, -1):
            above += d[start + at]
            d[start + at] = factor * above * slopes[start + at]
        d[start + middle] = factor * (below + d[start + middle] + above)
        total += share * loss
    return total


@register_jitable(**EXACT)
def elementwise(
    y: Any, d: Any, target: Any, weight: Any, rows: Any, count: int, columns: int, call: Any,
    shares: float, partials: Any, spare: Any, levels: Any,
) -> None:  # fmt: skip
    """The gradient by the outputs y into d, flat (count, columns); target, flat (n, targets), is picked by ``rows``.

    ``shares``: see ``shares_of``. The statistics of these rows go into partials. ``spare``, ``levels``: ``call.out``
    and ``call.b`` of these rows.
    """
    real = y.dtype.type
    kind, weighted = call.loss, call.weighted != 0
    option, scale = real(call.option), _row_scale(shares, call)
    total, correct = 0.0, 0
    partials[t.SCORED_PART] = count * columns if kind == BINARY_CROSS_ENTROPY else count
    partials[t.SHARES_PART] = shares
    if call.packed:
        total, correct, known = _packed(y, d, target, weight, rows, count, call, scale, spare)
        partials[t.LOSS_PART], partials[t.HITS_PART], partials[t.SCORED_PART] = total, correct, known
        return
    if kind == QUANTILES:
        partials[t.LOSS_PART] = _quantiles(y, d, target, weight, rows, count, call, scale, spare, levels)
        return
    for i in range(count):
        row, start = rows[i], i * columns
        if call.accuracy:
            if kind == BINARY_CROSS_ENTROPY:
                for j in range(columns):
                    correct += (y[start + j] > 0) == (target[row * columns + j] > 0.5)
            else:
                correct += _largest(target, row * columns, columns) == _largest(y, start, columns)
        for j in range(columns):
            d[start + j] = target[row * columns + j]
        if weighted:
            share = float(weight[row])
            total += share * element_losses(kind, y, y, d, start, start + columns, real(share * scale), option)
    if not weighted:
        total = element_losses(kind, y, y, d, 0, count * columns, real(scale), option)
    partials[t.LOSS_PART], partials[t.HITS_PART] = total, correct
