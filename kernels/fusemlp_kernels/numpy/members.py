"""The calls of members that share weights as rows of a table: see ``calls``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusemlp_kernels.contract import Dropout, UpdateRule
from fusemlp_kernels.errors import ArgumentError
from fusemlp_kernels.numpy.calls import activation_columns, dropout_columns, row_columns
from fusemlp_kernels.numpy.plan import MOST_TASKS
from fusemlp_kernels.numpy.tables import Array, Table


def _of_members(table: Table, vectors: Array | None, rows: int, outputs: int = 1) -> int:
    """The number of members; a task has as many rows of each."""
    assert vectors is not None
    table.height, table.members = max(table.height, rows), len(vectors) // outputs
    return table.members


def _affine_columns(
    table: Table, activation: str, slope: float, dropout: Dropout | None, keep: Array | None, width: int
) -> tuple[dict[str, Any], dict[int, float]]:
    """The columns and numbers of what members do between products, with memory for two rows of each task."""
    if activation == "prelu":
        raise ArgumentError("activation: members share no learned slope; give another activation than prelu")
    columns, numbers = activation_columns(table, activation, slope, None, None)
    dropped, rates = dropout_columns(dropout, keep)
    return {**columns, **dropped, "Z": (table.scratch(2 * MOST_TASKS, width), 0)}, numbers | rates


def _affine_members(
    table: Table,
    *,
    x: Array,
    y: Array,
    s: Array | None = None,
    b: Array | None = None,
    r: Array | None = None,
    activation: str = "identity",
    slope: float = 0.0,
    rows: Array | None = None,
    dropout: Dropout | None = None,
    counters: Array | None = None,
    keep: Array | None = None,
) -> int:
    columns, numbers = _affine_columns(table, activation, slope, dropout, keep, y.shape[1])
    members = _of_members(table, r if s is None else s, len(y))
    table.add(
        "MEMBERS_AFFINE", numbers, N=y.shape[1], MEMBERS=members, X=x, OUT=y, BY_S=s, B=b, BY_R=r, **columns,
        **row_columns(rows, len(y)),
    )  # fmt: skip
    table.control(counters)
    return len(y)


def _grad_affine_members(
    table: Table,
    *,
    dy: Array,
    x: Array,
    rule: UpdateRule,
    counters: Array,
    dx: Array | None = None,
    s: Array | None = None,
    b: Array | None = None,
    r: Array | None = None,
    ds: Array | None = None,
    db: Array | None = None,
    dr: Array | None = None,
    activation: str = "identity",
    slope: float = 0.0,
    rows: Array | None = None,
    dropout: Dropout | None = None,
    keep: Array | None = None,
) -> int:
    count: int = len(dy)
    width = dy.shape[1]
    columns, numbers = _affine_columns(table, activation, slope, dropout, keep, width)
    members = _of_members(table, r if s is None else s, count)
    if s is not None:
        columns["OUT"] = table.scratch(count, width) if dx is None else dx
    given = (("SUM_S", s, ds), ("SUM_B", b, db), ("SUM_R", r, dr))
    sums = {name: table.scratch(MOST_TASKS, members * width) for name, own, _ in given if own is not None}
    table.add(
        "MEMBERS_BACKWARD", numbers, N=width, MEMBERS=members, X=x, DZ=dy, BY_S=s, B=b, BY_R=r, **columns,
        **{name: (array, 0) for name, array in sums.items()}, **row_columns(rows, count),
    )  # fmt: skip
    for name, _, out in given:
        if out is not None:
            summed = {"DZ": (sums[name], 0), "SUMS": table.scratch(members * width), "OUT": (out, 0)}
            table.later.append({"N": members * width, "PARTS": True, **summed})
    table.accumulate(rule, counters)
    return count


def _linear_members(table: Table, *, x: Array, w: Array, b: Array, z: Array) -> int:
    outputs = z.shape[1]
    members = _of_members(table, w, len(z), outputs)
    table.add("HEADS", N=outputs, K=w.shape[1], MEMBERS=members, X=x, PANELS=table.in_panels(w), B=b, Z=z)
    table.control(None)
    rows: int = len(z)
    return rows


def _grad_input_members(table: Table, *, dz: Array, w: Array, dx: Array) -> int:
    outputs = dz.shape[1]
    members = _of_members(table, w, len(dz), outputs)
    table.add("HEADS_BACKWARD", N=outputs, K=w.shape[1], MEMBERS=members, DZ=dz, W=w, OUT=dx)
    table.control(None)
    rows: int = len(dz)
    return rows


def _grad_weight_members(
    table: Table, *, dz: Array, x: Array, dw: Array | None, db: Array | None, rule: UpdateRule, counters: Array
) -> int:
    count: int = len(dz)
    outputs = dz.shape[1]
    for kind, out, inputs in (("WEIGHT", dw, x.shape[1]), ("BIAS", db, 0)):
        if out is not None:
            members = _of_members(table, out, count, outputs)
            sums = table.scratch(len(out)) if kind == "BIAS" else None
            table.add(kind, N=len(out), K=inputs, MEMBERS=members, X=x, DZ=dz, OUT=out, SUMS=sums)
    table.accumulate(rule, counters)
    return count


ENTRIES: dict[str, Callable[..., int]] = {
    "affine_members": _affine_members,
    "grad_affine_members": _grad_affine_members,
    "linear_members": _linear_members,
    "grad_input_members": _grad_input_members,
    "grad_weight_members": _grad_weight_members,
}
