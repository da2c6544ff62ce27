"""The call that moves inputs to where their loss is larger as a row of a table: see ``calls``."""

from __future__ import annotations

from collections.abc import Callable

from fusemlp_kernels.contract import Perturbation
from fusemlp_kernels.numpy.calls import row_columns
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.tables import Array, Table
from fusemlp_kernels.philox import seed_key


def _perturb(
    table: Table,
    *,
    x: Array,
    change: Perturbation,
    counters: Array,
    start: Array | None = None,
    dx: Array | None = None,
    adv: Array | None = None,
    rows: Array | None = None,
) -> int:
    out = adv if start is None else start
    assert out is not None
    columns: int = out.shape[1]
    table.height = max(table.height, len(out))
    drawn = start is not None and change.seed is not None
    low, high = seed_key(change.seed or 0)
    table.lanes = max(table.lanes, drawn * -(-columns // 4))
    numbers = {t.LARGEST: change.eps, t.LENGTH: change.step, t.LOW: change.low, t.HIGH: change.high}
    table.add(
        "PERTURB", numbers, N=columns, K=columns, X=x, DZ=dx, OUT=out, ROUND=change.norm == "2", DRAWN=drawn,
        KEY_LOW=low, KEY_HIGH=high, **row_columns(rows, len(out)),
    )  # fmt: skip
    table.control(counters)
    return len(out)


ENTRIES: dict[str, Callable[..., int]] = {"perturb": _perturb}
