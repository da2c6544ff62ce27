"""Softmax cross-entropy from logits, with its gradient.

Every kind of target is brought to one form: a row ``t`` of N target weights. With ``mass = sum(t)``

    loss of a row = mass * logsumexp(z) - sum(t * z),        d loss / dz = mass * softmax(z) - t

(C. Bishop, Pattern Recognition and Machine Learning, 2006, section 4.3.4, for one-hot ``t``). Label smoothing, class
weights, sample weights and the division by the normaliser only change ``t`` and ``mass``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np

from fusemlp_kernels.contract import CORRECT, LAST_LOSS, LOSS_SUM, NORM_SUM, ROW_COUNT, SCORED, LossSpec
from fusemlp_kernels.numpy import blas
from fusemlp_kernels.numpy.activations import Array, Run, row_blocks

# Above this many classes a table of target rows (N x N) would not stay in the cache: the rows are written instead.
TABLE_CLASSES = 512

# From this many classes on a row is best left as it is but for the one element of its class.
DIRECT_CLASSES = 64

# Writes t and mass for a batch whose first ``count`` rows are valid; returns the normaliser and how many rows count
# towards the accuracy.
Fill = Callable[[int], tuple[float, int]]


def bind_cross_entropy(
    z: Array,
    dz: Array,
    target: Array,
    weight: Array | None,
    class_weight: Array | None,
    counters: Array,
    stats: Array,
    loss: LossSpec,
    *,
    differentiate: bool,
) -> Run:
    """z, dz (M, N), contiguous, dz perhaps z itself; target (M,) int64, or (M, N) probabilities if loss.soft. Unless
    they are to ``differentiate``, dz is scratch."""
    if not loss.soft and loss.label_smoothing == 0.0 and z.shape[1] > DIRECT_CLASSES:
        return _bind_direct(z, dz, target, weight, class_weight, counters, stats, loss, differentiate)
    rows = len(z)
    real = z.dtype
    t = np.empty(z.shape, real)
    mass = np.empty(rows, real)
    labels = np.empty(rows, np.int64) if loss.soft else target
    if loss.soft:
        fill = bind_soft(t, mass, target, weight, class_weight, loss)
    elif weight is None and class_weight is None and loss.ignore_index is None and z.shape[1] <= TABLE_CLASSES:
        fill = _bind_plain(t, mass, target, loss)
    else:
        fill = bind_weighted(t, mass, target, weight, class_weight, loss)

    mean = loss.reduction == "mean"
    largest = np.empty(rows, np.int64)
    start_of_row = np.arange(rows, dtype=np.int64) * z.shape[1]
    ignored = None if loss.soft else loss.ignore_index
    right, asked = np.empty(rows, np.bool_), np.empty(rows, np.bool_)
    index = np.empty(rows, np.int64)
    shift = np.empty((rows, 1), real)
    sums = np.empty(rows, real)
    logs = np.empty(rows, real)
    flat = z.reshape(-1)
    sum_rows = blas.row_sums(sums, dz)
    mass_dot_logs = blas.dot(mass, logs)
    t_dot_shifted = blas.dot(t, dz)
    shift_column, factor_column = shift[:, 0], sums[:, None]
    add, subtract, multiply, divide = np.add, np.subtract, np.multiply, np.divide
    take, maximum, exp, log = np.take, np.maximum, np.exp, np.log
    lowest = _lowest(real)

    # one item is read or written twice as quickly through a memoryview
    counter, statistic = counters.data, cast("memoryview[float]", stats.data)

    def run() -> None:
        count = counter[ROW_COUNT]
        normaliser, scored = fill(count)
        z.argmax(1, largest)
        add(largest, start_of_row, index)
        take(flat, index, 0, shift_column, "clip")
        if loss.accuracy:
            if loss.soft:
                target.argmax(1, labels)
            np.equal(largest, labels, right)
            if ignored is not None:
                np.not_equal(labels, ignored, asked)
                np.logical_and(right, asked, right)
            statistic[CORRECT] += np.count_nonzero(right[:count])
            statistic[SCORED] += scored
        subtract(z, shift, dz)
        if count < rows:
            # padding may hold anything; from here on it is a row of equal logits without weight
            dz[count:] = 0.0
        picked = t_dot_shifted()
        if not differentiate:
            maximum(dz, lowest, out=dz)
        exp(dz, dz)
        sum_rows()
        log(sums, logs)
        value = mass_dot_logs() - picked
        if differentiate:
            divide(mass, sums, sums)
            multiply(dz, factor_column, dz)
            subtract(dz, t, dz)
        statistic[LAST_LOSS] = value
        if mean:
            statistic[LOSS_SUM] += value * normaliser
            statistic[NORM_SUM] += normaliser
        else:
            statistic[LOSS_SUM] += value

    return run


def _lowest(real: np.dtype[Any]) -> Any:
    """What is below has subnormal exponentials, which take ten times as long. Beside the largest of their row, which
    is 1, neither they nor that of this number change a sum."""
    return np.ceil(np.log(np.finfo(real).tiny))


def _bind_direct(
    z: Array,
    dz: Array,
    target: Array,
    weight: Array | None,
    class_weight: Array | None,
    counters: Array,
    stats: Array,
    loss: LossSpec,
    differentiate: bool,
) -> Run:
    """Integer targets without smoothing: ``t`` is zero but for one element a row, and is never written.

    The softmax goes over blocks of rows that stay in the cache from one pass to the next.
    """
    rows, classes = len(z), z.shape[1]
    real = z.dtype
    start_of_row = np.arange(rows, dtype=np.int64) * classes
    labels, largest, index = (np.empty(rows, np.int64) for _ in range(3))
    ignored, right = np.empty(rows, np.bool_), np.empty(rows, np.bool_)
    mass, picked, sums, logs, factors = (np.empty(rows, real) for _ in range(5))
    shift = np.empty(rows, real)
    flat_z, flat_dz = z.reshape(-1), dz.reshape(-1)
    lowest = _lowest(real)
    mass_dot_logs, mass_dot_picked = blas.dot(mass, logs), blas.dot(mass, picked)
    norm_of_class = None if class_weight is None else class_weight.astype(real)
    weigh = _bind_row_weights(mass, labels, ignored, target, weight, loss.ignore_index)
    counter, statistic = counters.data, cast("memoryview[float]", stats.data)
    mean = loss.reduction == "mean"
    blocks = [
        (
            z[block],
            dz[block],
            shift[block, None],
            blas.row_sums(sums[block], dz[block]),
            mass[block],
            sums[block],
            factors[block],
            factors[block, None],
        )
        for block in row_blocks(rows, classes)
    ]

    def fill(count: int) -> tuple[float, int]:
        """The labels, and in mass what each row weighs, not yet divided; the normaliser and the rows scored."""
        scored = weigh(count)
        if norm_of_class is not None:
            np.take(norm_of_class, labels, 0, picked, "clip")
            np.multiply(mass, picked, out=mass)
        return float(mass.sum()), scored

    def run() -> None:
        count = counter[ROW_COUNT]
        normaliser, scored = fill(count)
        if mean:
            np.multiply(mass, 0.0 if normaliser == 0.0 else 1.0 / normaliser, out=mass)
        z.argmax(1, largest)
        if loss.accuracy:
            np.equal(largest, labels, out=right)
            if loss.ignore_index is not None:
                np.logical_not(ignored, out=ignored)
                np.logical_and(right, ignored, out=right)
            statistic[CORRECT] += np.count_nonzero(right[:count])
            statistic[SCORED] += scored
        np.add(largest, start_of_row, out=index)
        np.take(flat_z, index, 0, shift, "clip")
        np.add(labels, start_of_row, out=index)
        np.take(flat_z, index, 0, picked, "clip")
        np.subtract(picked, shift, out=picked)
        for z_block, dz_block, shift_block, sum_rows, mass_block, sums_block, factor, factor_column in blocks:
            np.subtract(z_block, shift_block, out=dz_block)
            if not differentiate:
                np.maximum(dz_block, lowest, out=dz_block)
            np.exp(dz_block, out=dz_block)
            sum_rows()
            if differentiate:
                np.divide(mass_block, sums_block, out=factor)
                np.multiply(dz_block, factor_column, out=dz_block)
        if differentiate:
            np.take(flat_dz, index, 0, factors, "clip")
            np.subtract(factors, mass, out=factors)
            np.put(flat_dz, index, factors, "clip")
        if count < rows:
            # padding may hold anything; it weighs nothing
            if differentiate:
                dz[count:] = 0.0
            sums[count:] = 1.0
            picked[count:] = 0.0
        np.log(sums, out=logs)
        value = mass_dot_logs() - mass_dot_picked()
        statistic[LAST_LOSS] = value
        if mean:
            statistic[LOSS_SUM] += value * normaliser
            statistic[NORM_SUM] += normaliser
        else:
            statistic[LOSS_SUM] += value

    return run


def _bind_row_weights(
    factors: Array, labels: Array, ignored: Array, target: Array, weight: Array | None, ignore_index: int | None
) -> Callable[[int], int]:
    """``run(count)``: what each row weighs into factors (M,), the classes into labels, (M,), 0 where they are ignored,
    which goes into ignored (M,) bool; returns how many of the first ``count`` rows are scored."""

    def weigh(count: int) -> int:
        if weight is None:
            factors.fill(1.0)
        else:
            np.copyto(factors, weight)
        factors[count:] = 0.0
        np.copyto(labels, target)
        if ignore_index is None:
            return count
        np.equal(labels, ignore_index, out=ignored)
        np.copyto(factors, 0.0, where=ignored)
        np.copyto(labels, 0, where=ignored)
        return count - int(np.count_nonzero(ignored[:count]))

    return weigh


def _class_rows(classes: int, class_weight: Array | None, loss: LossSpec) -> tuple[Array, Array]:
    """Of a class with unit sample weight: what smoothing gives to every column, (N,), and what is added at the class
    itself, (N,); both float64 and with the class weights in (torch's definition: the uniform part is weighted by the
    class of the column)."""
    weights = np.ones(classes) if class_weight is None else class_weight.astype(np.float64)
    return weights * (loss.label_smoothing / classes), weights * (1.0 - loss.label_smoothing)


def target_table(classes: int, loss: LossSpec, real: np.dtype[Any]) -> Array:
    """The rows of target weights of each class, (N, N), without weights."""
    uniform, own = _class_rows(classes, None, loss)
    return np.asarray((np.diag(own) + uniform).astype(real))


def _bind_plain(t: Array, mass: Array, target: Array, loss: LossSpec) -> Fill:
    """Integer targets without weights: the table of target rows holds the division by the normaliser too."""
    rows, classes = t.shape
    unit = target_table(classes, loss, t.dtype)
    table = unit.copy()
    mean = loss.reduction == "mean"
    prepared = -1
    take = np.take

    def fill(count: int) -> tuple[float, int]:
        nonlocal prepared
        if count != prepared:
            scale = 1.0 / max(count, 1) if mean else 1.0
            np.multiply(unit, scale, out=table)
            mass[:count] = scale
            mass[count:] = 0.0
            prepared = count
        take(table, target, 0, t, "clip")
        if count < rows:
            t[count:] = 0.0
        return float(count), count

    return fill


def bind_weighted(
    t: Array, mass: Array, target: Array, weight: Array | None, class_weight: Array | None, loss: LossSpec
) -> Fill:
    """Integer targets with class weights, sample weights or an ignored index, or too many classes for a table."""
    rows, classes = t.shape
    uniform, own = _class_rows(classes, class_weight, loss)
    smooth_row = uniform.astype(t.dtype)
    own_weight = own.astype(t.dtype)
    smooth_mass = t.dtype.type(uniform.sum())
    norm_of_class = (np.ones(classes) if class_weight is None else class_weight).astype(t.dtype)
    flat = t.reshape(-1)
    start_of_row = np.arange(rows, dtype=np.int64) * classes
    labels, index = np.empty(rows, np.int64), np.empty(rows, np.int64)
    ignored = np.empty(rows, np.bool_)
    values, norms, factors = (np.empty(rows, t.dtype) for _ in range(3))
    factor_column = factors[:, None]
    weigh = _bind_row_weights(factors, labels, ignored, target, weight, loss.ignore_index)
    mean = loss.reduction == "mean"

    def fill(count: int) -> tuple[float, int]:
        scored = weigh(count)
        np.copyto(t, smooth_row)
        np.take(own_weight, labels, 0, values, "clip")
        np.add(values, smooth_mass, out=mass)
        np.add(labels, start_of_row, out=index)
        np.take(flat, index, 0, norms, "clip")
        np.add(values, norms, out=values)
        np.put(flat, index, values, "clip")
        np.take(norm_of_class, labels, 0, norms, "clip")
        np.multiply(norms, factors, out=norms)
        normaliser = float(norms.sum())
        if mean:
            np.multiply(factors, 1.0 / normaliser if normaliser else 0.0, out=factors)
        np.multiply(mass, factors, out=mass)
        np.multiply(t, factor_column, out=t)
        return normaliser, scored

    return fill


def bind_soft(
    t: Array, mass: Array, target: Array, weight: Array | None, class_weight: Array | None, loss: LossSpec
) -> Fill:
    """Rows of probabilities: smoothed, then weighted by class inside the sum; the mean is over the sample weights."""
    rows, classes = t.shape
    factors = np.empty(rows, t.dtype)
    factor_column = factors[:, None]
    sum_rows = blas.row_sums(mass, t)
    own, uniform = t.dtype.type(1.0 - loss.label_smoothing), t.dtype.type(loss.label_smoothing / classes)
    mean = loss.reduction == "mean"

    def fill(count: int) -> tuple[float, int]:
        if weight is None:
            factors.fill(1.0)
        else:
            np.copyto(factors, weight)
        factors[count:] = 0.0
        normaliser = float(factors.sum())
        if mean:
            np.multiply(factors, 1.0 / normaliser if normaliser else 0.0, out=factors)
        np.multiply(target, own, out=t)
        np.add(t, uniform, out=t)
        if class_weight is not None:
            np.multiply(t, class_weight, out=t)
        np.multiply(t, factor_column, out=t)
        if count < rows:
            t[count:] = 0.0
        sum_rows()
        return normaliser, count

    return fill
