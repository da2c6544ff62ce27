"""Forward propagation of one layer without dropout, in NumPy: predictions need no compiler."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from fusemlp_kernels.contract import NEEDS_Z, ROW_OFFSET
from fusemlp_kernels.numpy.activations import activate
from fusemlp_kernels.numpy.blas import bind_product
from fusemlp_kernels.numpy.tables import Array


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
    dropout: None = None,
    counters: Array | None = None,
    keep: None = None,
) -> Callable[[], None]:
    """The contract's ``linear`` over contiguous arrays; a run allocates nothing."""
    del dropout, keep
    if activation not in NEEDS_Z:
        z = y
    elif z is None:
        z = np.empty_like(y)
    runs: list[Callable[[], object]] = []
    if rows is not None and len(y):
        assert gathered is not None
        runs.append(functools.partial(_gather, x, rows, counters, gathered))
        x = gathered
    runs.append(functools.partial(np.copyto, z, b))
    if z.size and x.shape[1]:
        runs.append(bind_product(z, x, w))
    runs += activate(activation, y, z, slope if slope_param is None else slope_param)

    def linear() -> None:
        for run in runs:
            run()

    return linear


def _gather(x: Array, rows: Array, counters: Array | None, out: Array) -> None:
    """The rows of the batch, zeros for those that are padding (-1, and last)."""
    if not len(x):
        out.fill(0)
        return
    start = 0 if counters is None else int(counters[ROW_OFFSET])
    rows = rows[start : start + len(out)]
    # mode "clip": with "raise" NumPy would buffer the output; the rows are checked where they are made
    np.take(x, rows, 0, out, "clip")
    if rows[-1] < 0:
        out[int(rows.argmin()) :] = 0
