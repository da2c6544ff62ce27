"""Temperature scaling: one number that divides a classifier's logits, so that its probabilities are honest.

Guo, Pleiss, Sun and Weinberger, "On calibration of modern neural networks", 2017. The predicted classes stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fusemlp.inputs.arrays import Array
from fusemlp.runtime.session import Session

# Fewer held-out rows decide nothing, and a smaller gain in their log loss is none.
LEAST_ROWS, LEAST_GAIN = 100, 1e-4
# The number's logarithm is normal beforehand, with this deviation: few rows move it little. Without that, tables of the
# half "development" of ``python -m bench tables`` lost by it up to some 500 rows.
DEVIATION = 0.15
BOUNDS = 0.1, 10.0


@dataclass(frozen=True)
class Temperature:
    """The number ``value``, and the log loss of ``rows`` held-out rows before and after."""

    value: float
    rows: int
    before: float
    after: float

    def __str__(self) -> str:
        return (
            f"temperature {self.value:.4g} divides the logits: log loss of {self.rows} held-out rows {self.after:.4g}, "
            f"{self.before:.4g} without"
        )


def held_out_logits(engine: Session, X: Array, y: Array, weight: Array | None) -> tuple[Array, Array, Array]:
    """Return logits (n, members, classes), classes (n,) and weights (n,) of rows as ``fit`` takes them, for
    ``temperature_of``.

    The weights are those of the loss of validation: of the rows, times those of the classes.
    """
    logits, codes = engine.inference.member_outputs(X).astype(np.float64), np.asarray(y).reshape(-1).astype(np.int64)
    if logits.shape[2] == 1:
        logits = np.concatenate([np.zeros_like(logits), logits], axis=2)
    weights = np.ones(len(codes)) if weight is None else weight.astype(np.float64)
    by_class = engine.loss.class_weight
    return logits, codes, weights if by_class is None else weights * np.array(by_class)[codes]


def temperature_of(parts: Iterable[tuple[Array, Array, Array]]) -> Temperature | None:
    """Return the most probable number by held-out rows, given as ``held_out_logits`` returns them, by model.

    It minimises the sum of their log losses and ``(log T / DEVIATION) ** 2 / 2``. None with fewer than ``LEAST_ROWS``
    rows of a weight above 0, and if their log loss falls by less than ``LEAST_GAIN``.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import logsumexp

    logits, codes, weights = map(np.concatenate, zip(*parts, strict=True))
    # without members (n, classes)
    logits = logits.reshape(len(logits), -1, logits.shape[-1])
    rows = int((weights > 0).sum())
    if rows < LEAST_ROWS:
        return None
    margins, shares = logits - np.take_along_axis(logits, codes[:, None, None], axis=2), weights / weights.sum()

    def log_loss(logarithm: float) -> float:
        # of the mean of the members' probabilities
        losses = logsumexp(margins / np.exp(logarithm), axis=2)
        return float(shares @ -logsumexp(-losses, axis=1, b=1.0 / losses.shape[1]))

    def objective(logarithm: float) -> float:
        return rows * log_loss(logarithm) + 0.5 * (logarithm / DEVIATION) ** 2

    found = minimize_scalar(objective, bounds=np.log(BOUNDS), method="bounded", options={"xatol": 1e-4})
    value = round(float(np.exp(found.x)), 4)
    before, after = log_loss(0.0), log_loss(np.log(value))
    return Temperature(value, rows, before, after) if before - after >= LEAST_GAIN else None


def scale_logits(engine: Session, value: float) -> None:
    """Divide the last layer's weights and biases by the number ``value``."""
    state, last = engine.state_dict(), 2 * (engine.network.layers - 1)
    for name in (f"{last}.weight", f"{last}.bias"):
        state[name] = state[name] / value
    engine.load_state_dict(state)
    if engine.merged_biases is not None:
        engine.merged_biases = engine.merged_biases / value
