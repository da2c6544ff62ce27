"""The loss of each member and its gradient, over the logits of a crew.

What is element-wise, and the largest of a row, are found for all members at once. The losses that work on long rows
(``cross_entropy.DIRECT_CLASSES``) are left to the single calls, one member after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fusemlp_kernels.contract import (
    BATCH_LOSSES,
    CORRECT,
    COUNTERS,
    LAST_LOSS,
    LOSS_SUM,
    NEEDS_Z,
    NORM_SUM,
    ROW_COUNT,
    SCORED,
    LossSpec,
    ResidentLayer,
)
from fusemlp_kernels.numpy import blas
from fusemlp_kernels.numpy.activations import Array, Run, activate, in_sequence, multiply_by_derivative
from fusemlp_kernels.numpy.batched.common import Models, rows_of, stretches
from fusemlp_kernels.numpy.batched.walk import Batches, Clocks
from fusemlp_kernels.numpy.cross_entropy import (
    DIRECT_CLASSES,
    TABLE_CLASSES,
    bind_soft,
    bind_weighted,
    target_table,
)
from fusemlp_kernels.numpy.loss import bind_hits, bind_loss_grad, bind_values

# Of the numbers of valid rows of the members' batches.
Step = Callable[[Sequence[int]], None]


def bind_losses(
    models: Models,
    members: Sequence[int],
    height: int,
    z: Array,
    batches: Batches,
    clocks: Clocks,
    output: Sequence[ResidentLayer],
    slopes: Sequence[Array | None],
    dslopes: Sequence[Array | None],
) -> Step:
    """z (members * height, N), the pre-activation of the output layers, becomes their dz; the stats are updated.

    ``slopes``, ``dslopes``: prelu's, (1,) each, those of ``dslopes`` written.
    """
    losses = [models.losses[member] for member in members]
    first = losses[0]
    if first.kind != "cross_entropy":
        return _bind_elementwise(models, members, height, z, batches, clocks, output, slopes, dslopes)
    if not first.soft and first.label_smoothing == 0.0 and z.shape[1] > DIRECT_CLASSES:
        return _bind_each(models, members, height, z, batches, clocks)
    return _bind_cross_entropy(models, members, height, z, batches, clocks)


def _bind_each(models: Models, members: Sequence[int], height: int, z: Array, batches: Batches, clocks: Clocks) -> Step:
    runs, counters = [], np.zeros((len(members), COUNTERS), np.int64)
    for place, member in enumerate(members):
        rows = rows_of(slice(place, place + 1), height)
        runs.append(
            bind_loss_grad(
                z=z[rows],
                dz=z[rows],
                target=batches.target[rows],
                weight=None if batches.weight is None else batches.weight[rows],
                class_weight=models.class_weight,
                counters=counters[place],
                stats=clocks.stats[place],
                loss=models.losses[member],
            )
        )
    evaluate, account = in_sequence(runs), clocks.stats

    def run(counts: Sequence[int]) -> None:
        counters[:, ROW_COUNT] = counts
        evaluate()
        account[:, BATCH_LOSSES] += account[:, LAST_LOSS] * counts

    return run


def _bind_cross_entropy(
    models: Models, members: Sequence[int], height: int, z: Array, batches: Batches, clocks: Clocks
) -> Step:
    losses = [models.losses[member] for member in members]
    loss, count = losses[0], len(members)
    rows, classes = z.shape
    real = z.dtype
    t, mass = np.empty(z.shape, real), np.empty(rows, real)
    each = [rows_of(slice(place, place + 1), height) for place in range(count)]
    target = batches.target
    labels = np.empty(rows, np.int64) if loss.soft else target
    plain = loss.ignore_index is None and batches.weight is None and models.class_weight is None
    if not loss.soft and plain and classes <= TABLE_CLASSES:
        fill = _bind_tables(t, mass, target, losses, height)
    else:
        bind = bind_soft if loss.soft else bind_weighted
        fills = [
            bind(
                t[one],
                mass[one],
                target[one],
                None if batches.weight is None else batches.weight[one],
                models.class_weight,
                own,
            )
            for one, own in zip(each, losses, strict=True)
        ]

        def fill(counts: Sequence[int]) -> tuple[Array, Array]:
            normalisers, scored = zip(*(one(valid) for one, valid in zip(fills, counts, strict=True)), strict=True)
            return np.array(normalisers), np.array(scored)

    ignored = None if loss.soft else loss.ignore_index
    mean = loss.reduction == "mean"
    right, asked = np.empty(rows, np.bool_), np.empty(rows, np.bool_)
    in_right = right.reshape(count, height)
    largest, index = np.empty(rows, np.int64), np.empty(rows, np.int64)
    start_of_row = np.arange(rows, dtype=np.int64) * classes
    shift = np.empty((rows, 1), real)
    sums, logs = np.empty(rows, real), np.empty(rows, real)
    flat, members_z = z.reshape(-1), z.reshape(count, height, classes)
    sum_rows = [blas.row_sums(sums[one], z[one]) for one in each]
    mass_dot_logs = [blas.dot(mass[one], logs[one]) for one in each]
    t_dot_shifted = [blas.dot(t[one], z[one]) for one in each]
    shift_column, factor_column = shift[:, 0], sums[:, None]
    account = clocks.stats

    def run(counts: Sequence[int]) -> None:
        whole = min(counts) == height
        normalisers, scored = fill(counts)
        z.argmax(1, largest)
        np.add(largest, start_of_row, index)
        np.take(flat, index, 0, shift_column, "clip")
        if loss.accuracy:
            if loss.soft:
                target.argmax(1, labels)
            np.equal(largest, labels, right)
            if ignored is not None:
                np.not_equal(labels, ignored, asked)
                np.logical_and(right, asked, right)
            if not whole:
                for hits, valid in zip(in_right, counts, strict=True):
                    hits[valid:] = False
            account[:, CORRECT] += np.add.reduce(in_right, 1, np.float64)
            account[:, SCORED] += scored
        np.subtract(z, shift, z)
        if not whole:
            for logits, valid in zip(members_z, counts, strict=True):
                # padding may hold anything; from here on it is a row of equal logits without weight
                logits[valid:] = 0.0
        picked = [dot() for dot in t_dot_shifted]
        np.exp(z, z)
        for one in sum_rows:
            one()
        np.log(sums, logs)
        value = np.array([dot() - less for dot, less in zip(mass_dot_logs, picked, strict=True)])
        np.divide(mass, sums, sums)
        np.multiply(z, factor_column, z)
        np.subtract(z, t, z)
        account[:, LAST_LOSS] = value
        account[:, BATCH_LOSSES] += value * counts
        if mean:
            account[:, NORM_SUM] += normalisers
            value *= normalisers
        account[:, LOSS_SUM] += value

    return run


def _bind_tables(
    t: Array, mass: Array, target: Array, losses: Sequence[LossSpec], height: int
) -> Callable[[Sequence[int]], tuple[Array, Array]]:
    """Integer targets without weights: rows of a table, one table for members of one smoothing and number of rows."""
    classes, mean = t.shape[1], losses[0].reduction == "mean"
    smoothings = [loss.label_smoothing for loss in losses]
    groups = [(rows_of(places, height), smoothings[places.start]) for places in stretches(smoothings)]
    each = [(rows_of(slice(at, at + 1), height), smoothing) for at, smoothing in enumerate(smoothings)]
    units: dict[float, Array] = {}
    for loss in losses:
        if loss.label_smoothing not in units:
            units[loss.label_smoothing] = target_table(classes, loss, t.dtype)
    tables: dict[tuple[float, int], Array] = {}
    prepared: list[int] = []
    valid, one_count, whole = np.zeros(0), True, True

    def table(smoothing: float, count: int) -> Array:
        key = smoothing, count
        if key not in tables:
            if len(tables) > 2 * len(losses):
                tables.clear()
            tables[key] = units[smoothing] * t.dtype.type(_share(count, mean))
        return tables[key]

    def fill(counts: Sequence[int]) -> tuple[Array, Array]:
        nonlocal prepared, valid, one_count, whole
        if counts != prepared:
            for (rows, _), count in zip(each, counts, strict=True):
                mass[rows][:count] = _share(count, mean)
                mass[rows][count:] = 0.0
            prepared, valid = list(counts), np.array(counts, np.float64)
            one_count, whole = len(set(counts)) == 1, min(counts) == height
        for place, (rows, smoothing) in enumerate(groups if one_count else each):
            np.take(table(smoothing, counts[0 if one_count else place]), target[rows], 0, t[rows], "clip")
        if not whole:
            for (rows, _), count in zip(each, counts, strict=True):
                t[rows][count:] = 0.0
        return valid, valid

    return fill


def _share(count: int, mean: bool) -> float:
    return 1.0 / max(count, 1) if mean else 1.0


def _bind_elementwise(
    models: Models,
    members: Sequence[int],
    height: int,
    z: Array,
    batches: Batches,
    clocks: Clocks,
    output: Sequence[ResidentLayer],
    slopes: Sequence[Array | None],
    dslopes: Sequence[Array | None],
) -> Step:
    losses = [models.losses[member] for member in members]
    count, columns = len(members), z.shape[1]
    target, weight = batches.target, batches.weight
    in_members = z.reshape(count, height, columns)
    before, after, y, own = _bind_output(z, height, output, slopes, dslopes)
    elements, values = [], []
    for places in stretches([(loss.delta, loss.quantile) for loss in losses]):
        rows = rows_of(places, height)
        losses_of, evaluate_of = bind_values(losses[places.start], y[rows], z[rows], target[rows])
        values.append(evaluate_of)
        elements += list(losses_of.reshape(-1, height, columns))
    evaluate = in_sequence(values)
    sums, factors = np.empty((count, height), z.dtype), np.empty((count, height), z.dtype)
    sum_rows = [blas.row_sums(into, each) for into, each in zip(sums, elements, strict=True)]
    totals = [blas.dot(one, factor) for one, factor in zip(sums, factors, strict=True)]
    rows_y, rows_target = y.reshape(count, height, columns), target.reshape(count, height, columns)
    hits: list[Any] = []
    if losses[0].accuracy:
        hits = [bind_hits(losses[0], rows_y[place], rows_target[place]) for place in range(count)]
    scales = np.empty((count, 1), z.dtype)
    mean = losses[0].reduction == "mean"
    account = clocks.stats
    factor_column = factors.reshape(-1, 1)

    def run(counts: Sequence[int]) -> None:
        whole = min(counts) == height
        if own is not None:
            np.copyto(own, z)
            for place, valid in enumerate(counts):
                if valid < height:
                    # whatever the padding holds, its activations and derivatives are finite
                    own[rows_of(slice(place, place + 1), height)][valid:] = 0.0
            before()
        for stats, hit, valid in zip(account, hits, counts, strict=False):
            correct, scored = hit(valid)
            stats[CORRECT] += correct
            stats[SCORED] += scored
        evaluate()
        if weight is None:
            factors.fill(1.0)
            normalisers = [float(valid * columns) for valid in counts]
        else:
            np.copyto(factors, weight.reshape(count, height))
            normalisers = [float(factors[place, :valid].sum()) * columns for place, valid in enumerate(counts)]
        if not whole:
            for place, valid in enumerate(counts):
                factors[place, valid:] = 0.0
                elements[place][valid:] = 0.0
                in_members[place, valid:] = 0.0
        for one in sum_rows:
            one()
        value = np.array([total() for total in totals])
        account[:, LOSS_SUM] += value
        if mean:
            account[:, NORM_SUM] += normalisers
            each = [1.0 / normaliser if normaliser else 0.0 for normaliser in normalisers]
            scales[:, 0] = each
            np.multiply(factors, scales, out=factors)
            value *= each
        account[:, LAST_LOSS] = value
        account[:, BATCH_LOSSES] += value * counts
        np.multiply(z, factor_column, out=z)
        after()

    return run


def _bind_output(
    z: Array,
    height: int,
    output: Sequence[ResidentLayer],
    slopes: Sequence[Array | None],
    dslopes: Sequence[Array | None],
) -> tuple[Run, Run, Array, Array | None]:
    """The output's activation: how it is computed, how dz is multiplied by its derivative, the outputs, and where the
    pre-activation has to be copied before, since dz is written over it."""
    name = output[0].activation
    if name == "identity":
        return in_sequence([]), in_sequence([]), z, None
    own = np.empty(z.shape, z.dtype)
    y = np.empty(z.shape, z.dtype) if name in NEEDS_Z else own
    before, after = [], []
    keys = [
        layer.slope if slope is None else place for place, (layer, slope) in enumerate(zip(output, slopes, strict=True))
    ]
    for places in stretches(keys):
        rows, at = rows_of(places, height), places.start
        kept = own[rows] if name in NEEDS_Z else None
        before.append(activate(name, y[rows], kept, output[at].slope, slopes[at]))
        after.append(
            multiply_by_derivative(
                name, z[rows], y[rows], kept, slope=output[at].slope, slope_param=slopes[at], dslope=dslopes[at]
            )
        )
    return in_sequence(before), in_sequence(after), y, own
