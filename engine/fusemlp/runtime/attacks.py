"""Attacks on inputs, on any backend: gradients from the engine, projected steps on the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.describe.adversarial import Adversary, Attack, as_attack
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.contract import BATCH_INDEX, COUNTERS, LossSpec
from fusemlp_kernels.errors import DataError
from fusemlp_kernels.pointwise import LOSSES, evaluate
from fusemlp_kernels.registry import backend

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session


def attack(engine: Session, X: Any, y: Any, how: Attack) -> Array:
    """Return rows near X whose loss with the labels y is larger; see ``Engine.attack``."""
    how = as_attack("how", how)
    engine.network.check_single("how", "an attack")
    data = engine.inputs.examples(X, y, None)
    engine.scaling.check_measured()
    check_within(engine, "X", data.X, how)
    pgd, change = how.plain, how.perturbation()
    x = np.array(engine.inputs.on_host(data.X), np.float64 if engine.precision == "fp64" else np.float32)
    target, spec = engine.inputs.on_host(data.targets.values), engine.inputs.spec_for(data.targets)
    class_weight = None if engine.class_weight is None else engine.inputs.on_host(engine.class_weight)
    steps = backend("numpy", None, "fp64" if engine.precision == "fp64" else "fp32")
    adv, dx, counters = np.empty_like(x), np.empty_like(x), np.zeros(COUNTERS, np.int64)
    operands: dict[str, Any] = {"x": x, "change": change, "counters": counters}
    start, move = steps.bind("perturb", start=adv, **operands), steps.bind("perturb", dx=dx, adv=adv, **operands)
    best, losses = adv, np.full(len(x), -np.inf)
    for restart in range(pgd.restarts):
        counters[BATCH_INDEX] = restart
        start()
        for _ in range(pgd.steps):
            dx[:] = engine.inference.input_gradient(adv, y)
            move()
        if pgd.restarts > 1:
            row_loss = row_losses(spec, engine.inference.outputs(adv), target, class_weight)
            # a NaN is as bad as it gets
            worse = ~(row_loss <= losses)
            losses[worse] = row_loss[worse]
            best = np.where(worse[:, None], adv, best)
    return best


def check_within(engine: Session, argument: str, X: Any, how: Adversary) -> None:
    """Raise DataError for checked rows outside the bounds of an attack, or of a training against such."""
    if how.bounds is None:
        return
    rows = engine.inputs.on_host(X)
    low, high = float(rows.min()), float(rows.max())
    if low < how.bounds[0] or high > how.bounds[1]:
        raise DataError(
            f"{argument}: values from {low:g} to {high:g} are not within the bounds {how.bounds}; scale them, or give "
            f"the attack bounds=({low:g}, {high:g})"
        )


def row_losses(spec: LossSpec, outputs: Array, target: Array, class_weight: Array | None = None) -> Array:
    """Return the loss of each row (n,) float64 from outputs (n, N), up to a positive factor of its own."""
    from scipy.special import expit, log_softmax

    y, columns = outputs.astype(np.float64), outputs.shape[1]
    if spec.kind == "cross_entropy":
        q = target if spec.soft else np.arange(columns) == target[:, None]
        q = q * (1.0 - spec.label_smoothing) + spec.label_smoothing / columns
        q = q if class_weight is None else q * class_weight
        return np.asarray(-(q * log_softmax(y, axis=1)).sum(axis=1))
    known = {"y": y, "t": target, "delta": spec.delta, "quantile": spec.quantile}
    functions = {name: getattr(np, name) for name in ("abs", "exp", "log1p", "maximum", "minimum", "sign")}
    with np.errstate(over="ignore"):
        losses = evaluate(LOSSES[spec.kind].formula + "\nloss", known, functions | {"sigmoid": expit})
    return np.asarray(losses.sum(axis=1))
