"""Forward propagation of one layer: ``y = dropout(act(x @ w.T + b))``."""

from __future__ import annotations

import numpy as np

from fusemlp_kernels.contract import BATCH_INDEX, NEEDS_Z, Dropout
from fusemlp_kernels.numpy import blas
from fusemlp_kernels.numpy.activations import Array, Run, activate, drop, in_sequence, nothing
from fusemlp_kernels.philox import DropoutMask


def bind_take(source: Array, rows: Array, out: Array) -> Run:
    """``out = source[rows]``; what stands in the rows of out that are -1 in ``rows`` does not matter."""
    if len(source) == 0:
        return lambda: out.fill(0)
    if source.flags.c_contiguous and out.flags.c_contiguous:
        # mode "clip": with "raise" NumPy would buffer the output; the rows are checked where they are made
        return lambda: np.take(source, rows, 0, out, "clip")

    def one_by_one() -> None:
        # np.take would copy the whole of a source with gaps
        for i, row in enumerate(rows):
            out[i] = source[max(row, 0)]

    return one_by_one


def bind_gather(x: Array, rows: Array | None, gathered: Array | None) -> tuple[Array, Run]:
    """The batch as an array, and the callable that brings x[rows] into it.

    x (n, K) or, without ``rows`` (M,), (M, K); gathered (M, K), written. Padding rows, -1, come last: they become
    zero, so that nothing they hold (a NaN, an infinity) can reach a sum.
    """
    if rows is None:
        return x, nothing
    assert gathered is not None
    size = len(rows)
    if size == 0:
        return gathered, nothing
    batch, take = gathered, bind_take(x, rows, gathered)
    padding = np.empty(size, np.bool_)

    def gather() -> None:
        take()
        if rows[-1] < 0:
            np.less(rows, 0, out=padding)
            batch[size - np.count_nonzero(padding) :] = 0.0

    return batch, gather


def bind_affine(y: Array, x: Array, w: Array, b: Array) -> Run:
    """``y = x @ w.T + b``: the bias is laid down first, and the product is added to it."""
    if y.size == 0:
        return nothing
    if x.shape[1] == 0:
        return lambda: np.copyto(y, b)
    multiply = blas.product(y, x, w, transpose_b=True)

    def affine() -> None:
        np.copyto(y, b)
        multiply(1.0, 1.0)

    return affine


def bind_dropout(y: Array, keep: Array, dropout: Dropout, counters: Array) -> Run:
    """``y = y * keep / (1 - rate)``, with the mask of this batch written into keep (M, N) bool."""
    rows, columns = y.shape
    mask = DropoutMask(rows, columns, dropout.rate)
    scale = y.dtype.type(1.0 / (1.0 - dropout.rate))
    drop_others = drop(y, keep)

    def run() -> None:
        mask.fill(keep, seed=dropout.seed, layer=dropout.layer, batch_index=int(counters[BATCH_INDEX]))
        drop_others()
        np.multiply(y, scale, out=y)

    return run


def bind_linear(
    *,
    x: Array,
    w: Array,
    b: Array,
    y: Array,
    activation: str,
    slope: float = 0.0,
    slope_param: Array | None = None,
    z: Array | None = None,
    rows: Array | None = None,
    gathered: Array | None = None,
    dropout: Dropout | None = None,
    counters: Array | None = None,
    keep: Array | None = None,
) -> Run:
    """The contract's ``linear``."""
    batch, gather = bind_gather(x, rows, gathered)
    if z is None and activation in NEEDS_Z:
        z = np.empty_like(y)
    target = y if z is None else z
    runs = [
        gather,
        bind_affine(target, batch, w, b),
        activate(activation, y, z, slope, slope_param),
    ]
    if dropout is not None:
        assert keep is not None and counters is not None
        runs.append(bind_dropout(y, keep, dropout, counters))
    return in_sequence(runs)
