"""Loss and its gradient with respect to the output layer's pre-activation, and the fused output layer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from fusemlp_kernels.contract import (
    CORRECT,
    LAST_LOSS,
    LOSS_SUM,
    NEEDS_Z,
    NORM_SUM,
    ROW_COUNT,
    SCORED,
    LossSpec,
)
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.numpy import blas
from fusemlp_kernels.numpy.activations import Array, Run, activate, formula, in_sequence, multiply_by_derivative
from fusemlp_kernels.numpy.cross_entropy import bind_cross_entropy
from fusemlp_kernels.numpy.linear import bind_affine, bind_gather, bind_take
from fusemlp_kernels.ops import hands_on


def bind_loss_grad(
    *,
    z: Array,
    dz: Array | None,
    target: Array,
    counters: Array,
    stats: Array,
    loss: LossSpec,
    activation: str = "identity",
    slope: float = 0.0,
    slope_param: Array | None = None,
    dslope: Array | None = None,
    weight: Array | None = None,
    class_weight: Array | None = None,
    rows: Array | None = None,
    target_rows: Array | None = None,
    weight_rows: Array | None = None,
) -> Run:
    """The contract's ``loss_grad``."""
    if z.size == 0:

        def no_rows() -> None:
            stats[LAST_LOSS] = 0.0
            if dslope is not None:
                dslope.fill(0.0)

        return no_rows
    differentiate = dz is not None
    gradient = np.empty(z.shape, z.dtype) if dz is None or not dz.flags.c_contiguous else dz
    before: list[Run] = []
    after: list[Run] = []
    z = _contiguous(z, gradient, before)
    if rows is None:
        targets = target
    else:
        assert target_rows is not None
        targets = target_rows
        before.append(bind_take(target, rows, target_rows))
    weights = weight
    if rows is not None and weight is not None:
        assert weight_rows is not None
        weights = weight_rows
        before.append(bind_take(weight, rows, weight_rows))
    targets = _contiguous(targets, None, before)

    if loss.kind == "cross_entropy":
        if activation != "identity":
            raise ArgumentError(f"activation: cross_entropy takes logits, so it must be 'identity', got {activation!r}")
        core = bind_cross_entropy(
            z, gradient, targets, weights, class_weight, counters, stats, loss, differentiate=differentiate
        )
    else:
        y = z
        if activation != "identity":
            # z may be dz, which is written before act'(z) has been read: the activation works on a copy
            own = np.empty(z.shape, z.dtype)
            before += [lambda: np.copyto(own, z), _clear_padding(own, counters)]
            kept = own if activation in NEEDS_Z else None
            y = own if kept is None else np.empty(z.shape, z.dtype)
            before.append(activate(activation, y, kept, slope, slope_param))
            after.append(
                multiply_by_derivative(
                    activation,
                    gradient,
                    y,
                    kept,
                    slope=slope,
                    slope_param=slope_param,
                    dslope=np.empty(1, z.dtype) if dslope is None else dslope,
                )
            )
        core = _bind_elementwise(y, gradient, targets, weights, counters, stats, loss, differentiate)
    if dz is not None and gradient is not dz:
        after.append(lambda: np.copyto(dz, gradient))
    return in_sequence([*before, core, *(after if dz is not None else [])])


@hands_on(bind_loss_grad)
def bind_linear_loss_grad(
    *,
    x: Array,
    w: Array,
    b: Array,
    dz: Array | None,
    rows: Array | None = None,
    x_rows: Array | None = None,
    gathered: Array | None = None,
    counters: Array,
    **loss_operands: Any,
) -> Run:
    """The contract's ``linear_loss_grad``."""
    batch, gather = bind_gather(x, x_rows, gathered)
    z = np.empty((len(batch), len(w)), w.dtype) if dz is None else dz
    return in_sequence(
        [
            gather,
            bind_affine(z, batch, w, b),
            bind_loss_grad(z=z, dz=dz, rows=rows, counters=counters, **loss_operands),
        ]
    )


def _contiguous(array: Array, scratch: Array | None, before: list[Run]) -> Array:
    """``array``, or where it has gaps a copy that is brought up to date in ``before``.

    BLAS cannot read an array with gaps, and ``argmax`` would allocate a copy at every run.
    """
    if array.flags.c_contiguous:
        return array
    copy = np.empty(array.shape, array.dtype) if scratch is None else scratch
    before.append(lambda: np.copyto(copy, array))
    return copy


def _clear_padding(array: Array, counters: Array) -> Run:
    """Zero the rows that are padding: whatever they hold, their activations and derivatives are then finite."""
    rows = len(array)

    def run() -> None:
        count = counters[ROW_COUNT]
        if count < rows:
            array[count:] = 0.0

    return run


def _bind_elementwise(
    y: Array,
    d: Array,
    target: Array,
    weight: Array | None,
    counters: Array,
    stats: Array,
    loss: LossSpec,
    differentiate: bool,
) -> Run:
    """The losses that are sums over elements; y, d, target (M, N), d written, may be y itself. Unless they are to
    ``differentiate``, d is scratch."""
    rows, columns = y.shape
    values, evaluate = bind_values(loss, y, d, target, differentiate=differentiate)
    sums = np.empty(rows, y.dtype)
    sum_rows = blas.row_sums(sums, values)
    mean = loss.reduction == "mean"
    hits = bind_hits(loss, y, target) if loss.accuracy else None
    factors = np.empty(rows, y.dtype)
    total = blas.dot(sums, factors)
    column = factors[:, None]

    counter, statistic = counters.data, cast("memoryview[float]", stats.data)

    def run() -> None:
        count = counter[ROW_COUNT]
        if hits is not None:
            correct, scored = hits(count)
            statistic[CORRECT] += correct
            statistic[SCORED] += scored
        evaluate()
        if weight is None:
            factors.fill(1.0)
            normaliser = float(count * columns)
        else:
            np.copyto(factors, weight)
            normaliser = float(factors[:count].sum()) * columns
        if count < rows:
            factors[count:] = 0.0
            values[count:] = 0.0
            if differentiate:
                d[count:] = 0.0
        sum_rows()
        value = total()
        if mean:
            scale = 1.0 / normaliser if normaliser else 0.0
            statistic[LOSS_SUM] += value
            statistic[NORM_SUM] += normaliser
            value *= scale
            if differentiate:
                np.multiply(factors, scale, out=factors)
        else:
            statistic[LOSS_SUM] += value
        if differentiate:
            np.multiply(d, column, out=d)
        statistic[LAST_LOSS] = value

    return run


def bind_values(loss: LossSpec, y: Array, d: Array, target: Array, *, differentiate: bool = True) -> tuple[Array, Run]:
    """The losses of the elements (M, N), and what computes them and their derivatives; d is scratch unless those are
    wanted."""
    function, count = formula("loss", loss.kind)
    values, scratch = np.empty(y.shape, y.dtype), np.empty((count, *y.shape), y.dtype)
    return values, functools.partial(function, y, target, values, d, differentiate, loss.option, *scratch)


def bind_hits(loss: LossSpec, y: Array, target: Array) -> Callable[[int], tuple[int, int]]:
    """``run(count)``: right answers among the first ``count`` rows, and the answers asked for."""
    rows, columns = y.shape
    if loss.kind == "binary_cross_entropy":
        said = np.empty(y.shape, np.bool_)
        meant = np.empty(y.shape, np.bool_)
        zero, half = y.dtype.type(0.0), y.dtype.type(0.5)

        def elements(count: int) -> tuple[int, int]:
            np.greater(y, zero, out=said)
            np.greater(target, half, out=meant)
            np.equal(said, meant, out=said)
            return int(np.count_nonzero(said[:count])), count * columns

        return elements
    chosen = np.empty(rows, np.int64)
    wanted = np.empty(rows, np.int64)
    right = np.empty(rows, np.bool_)

    def largest(count: int) -> tuple[int, int]:
        y.argmax(1, chosen)
        target.argmax(1, wanted)
        np.equal(chosen, wanted, out=right)
        return int(np.count_nonzero(right[:count])), count

    return largest
