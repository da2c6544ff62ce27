"""The calls of training against attacks as rows of a table: see ``calls``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fusemlp_kernels.binders import hands_on
from fusemlp_kernels.contract import LossSpec, Perturbation, Ramp
from fusemlp_kernels.numpy.calls import activation_columns, loss_grad, row_columns
from fusemlp_kernels.numpy.compiled import tables as t
from fusemlp_kernels.numpy.tables import Array, Table
from fusemlp_kernels.philox import seed_key


def _perturb(
    table: Table,
    *,
    x: Array | None,
    change: Perturbation,
    counters: Array,
    start: Array | None = None,
    delta: Array | None = None,
    dx: Array | None = None,
    adv: Array | None = None,
    carried: Array | None = None,
    rows: Array | None = None,
) -> int:
    out = next(one for one in (start, adv, carried) if one is not None)
    columns: int = out.shape[1]
    table.height = max(table.height, len(out))
    drawn = start is not None and delta is None and change.seed is not None
    low, high = seed_key(change.seed or 0)
    table.lanes = max(table.lanes, drawn * -(-columns // 4))
    numbers = {t.LARGEST: change.eps, t.LENGTH: change.step, t.LOW: change.low, t.HIGH: change.high}
    table.add(
        "PERTURB", numbers, N=columns, K=columns, X=table.scratch(columns) if x is None else x, Y=delta, DZ=dx,
        OUT=out, CARRIED=delta is not None or carried is not None, ROUND=change.norm == "2", DRAWN=drawn,
        KEY_LOW=low, KEY_HIGH=high, **row_columns(rows, len(out)),
    )  # fmt: skip
    table.control(counters)
    return len(out)


def _ramp(ramp: Ramp) -> dict[int, float]:
    """The numbers of a ramp."""
    return {
        **{t.LARGEST: ramp.eps, t.KAPPA: ramp.kappa, t.WARMUP: ramp.warmup, t.RAMP: ramp.ramp},
        **{t.BEGUN: ramp.first, t.SPAN: ramp.updates},
    }


def _magnitudes(table: Table, *, w: Array, out: Array) -> int:
    table.add("MAGNITUDES", N=len(w), K=w.shape[1], W=w, OUT=out, PANELS=table.in_panels(out))
    table.control(None)
    return 0


def _ball(
    table: Table,
    *,
    x: Array,
    centre: Array,
    radius: Array,
    reach: Array,
    ramp: Ramp,
    counters: Array,
    least: Array | None = None,
    most: Array | None = None,
    rows: Array | None = None,
) -> int:
    table.height = max(table.height, len(centre))
    columns = centre.shape[1]
    table.add(
        "BALL", _ramp(ramp), N=columns, K=columns, X=x, CENTRE=centre, RADIUS=radius, W=reach, B=least, SUMS=most,
        **row_columns(rows, len(centre)),
    )  # fmt: skip
    table.control(counters)
    return len(centre)


def _box(
    table: Table,
    kind: str = "BOX",
    *,
    zc: Array,
    zr: Array,
    low: Array,
    high: Array,
    centre: Array,
    radius: Array,
    activation: str,
    slope: float = 0.0,
    slope_param: Array | None = None,
) -> int:
    columns, numbers = activation_columns(table, activation, slope, slope_param, None)
    table.height = max(table.height, len(zc))
    table.add(kind, numbers, N=zc.shape[1], Z=zc, Y=zr, X=low, DZ=high, CENTRE=centre, RADIUS=radius, **columns)
    table.control(None)
    return len(zc)


@hands_on(_box)
def _box_grad(table: Table, *, dc: Array, dr: Array, **others: Any) -> int:
    return _box(table, "BOX_BACK", centre=dc, radius=dr, **others)


@hands_on(loss_grad)
def _worst_loss_grad(
    table: Table, *, zc: Array, zr: Array, dzc: Array, dzr: Array, dz: Array, ramp: Ramp, **loss_operands: Any
) -> int:
    count, outputs = zc.shape
    target, logits = loss_operands["target"], table.scratch(count, outputs)
    rows = row_columns(loss_operands.get("rows"), count)
    table.height = max(table.height, count)
    table.add("WORST", N=outputs, Z=zc, Y=zr, OUT=logits, TARGET=target, **rows)
    batch = loss_grad(table, z=logits, dz=logits, **loss_operands)
    table.add(
        "WORST_BACK", _ramp(ramp), N=outputs, X=logits, CENTRE=dzc, RADIUS=dzr, DZ=dz, TARGET=target, **rows
    )  # fmt: skip
    for one in (dzc, dzr):
        table.add("PADDING", N=outputs, K=count, DZ=one)
    return batch


def _divergence(
    table: Table,
    *,
    z: Array,
    other: Array,
    dother: Array,
    strength: float,
    loss: LossSpec,
    counters: Array,
    dz: Array | None = None,
    weight: Array | None = None,
    rows: Array | None = None,
    stats: Array | None = None,
) -> int:
    count, outputs = z.shape
    table.height = max(table.height, count)
    table.control(counters, stats)
    table.add(
        "DIVERGENCE", {t.STRENGTH: strength, t.DIVISOR: 1.0}, N=outputs, Y=other, Z=z, DZ=dother, X=dz,
        OUT=table.scratch(count, outputs), MEAN=t.REDUCTIONS.index(loss.reduction), RECORDED=stats,
        WEIGHTED=weight, **row_columns(rows, count),
    )  # fmt: skip
    table.add("PADDING", N=outputs, K=count, DZ=dother)
    return t.COUNTED


ENTRIES: dict[str, Callable[..., int]] = {
    "perturb": _perturb,
    "divergence": _divergence,
    "magnitudes": _magnitudes,
    "ball": _ball,
    "box": _box,
    "box_grad": _box_grad,
    "worst_loss_grad": _worst_loss_grad,
}
