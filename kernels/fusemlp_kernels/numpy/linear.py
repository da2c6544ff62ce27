"""Forward propagation of one layer without dropout, in NumPy: predictions need no compiler."""

from __future__ import annotations

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
    passes = activate(activation, y, z, slope if slope_param is None else slope_param)
    batch, source, into = len(y), x, gathered
    if rows is not None:
        assert into is not None
        x = into
    multiply = bind_product(z, x, w) if z.size and x.shape[1] else None

    def linear() -> None:
        if rows is not None and batch:
            offset = 0 if counters is None else int(counters[ROW_OFFSET])
            _take(source, rows[offset : offset + batch], x)
        np.copyto(z, b)
        if multiply is not None:
            multiply()
        for one in passes:
            one()

    return linear


def _take(source: Array, rows: Array, out: Array) -> None:
    """``out = source[rows]``, zeros in the rows that are padding (-1, and last)."""
    if not len(source):
        out.fill(0)
        return
    # mode "clip": with "raise" NumPy would buffer the output; the rows are checked where they are made
    np.take(source, rows, 0, out, "clip")
    if rows[-1] < 0:
        out[int(rows.argmin()) :] = 0
