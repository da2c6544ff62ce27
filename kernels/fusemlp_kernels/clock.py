"""What the contract's clock writes: the learning rate and bias corrections of the update that comes next."""

from __future__ import annotations

from typing import Any

import numpy as np

from fusemlp_kernels.contract import (
    BIAS_CORRECTION_1,
    BIAS_CORRECTION_2,
    GOOD_UPDATES,
    HYPER,
    LEARNING_RATE,
    RATE_SCALE,
    UpdateRule,
)
from fusemlp_kernels.reference import learning_rate


def hyper_at(rule: UpdateRule, update_count: int, rate_scale: float = 1.0) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The ``hyper`` array, (HYPER,) float64, after ``update_count`` updates; ``rate_scale`` multiplies the rate."""
    hyper = np.ones(HYPER)
    hyper[RATE_SCALE], hyper[GOOD_UPDATES] = rate_scale, 0.0
    write_hyper(rule, update_count, hyper)
    return hyper


def write_hyper(rule: UpdateRule, update_count: int, hyper: np.ndarray[Any, np.dtype[np.float64]]) -> None:
    """Write ``hyper`` for the update after ``update_count`` others; its RATE_SCALE is read and kept."""
    hyper[LEARNING_RATE] = learning_rate(rule.schedule, update_count) * hyper[RATE_SCALE]
    if rule.kind == "adam":
        hyper[BIAS_CORRECTION_1] = 1.0 - rule.beta1 ** (update_count + 1)
        hyper[BIAS_CORRECTION_2] = 1.0 - rule.beta2 ** (update_count + 1)
