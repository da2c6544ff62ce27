"""Functions of ``pointwise.FUNCTIONS`` that NumPy lacks: passes from ``x`` into ``out``, which may be one array."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np


def sigmoid(x: Any, out: Any) -> None:
    """(1 + tanh(x / 2)) / 2 cannot overflow, and NumPy's tanh is vectorised."""
    np.multiply(x, 0.5, out)
    np.tanh(out, out)
    np.multiply(out, 0.5, out)
    np.add(out, 0.5, out)


def maximum(x: Any, other: Any, out: Any) -> None:
    """The larger one. ``clip`` has vector code where the limit is a number, NumPy's ``maximum`` has none."""
    if isinstance(other, float):
        x.clip(other, math.inf, out)
    else:
        np.maximum(x, other, out=out)


def minimum(x: Any, other: Any, out: Any) -> None:
    """The smaller one, as ``maximum``."""
    if isinstance(other, float):
        x.clip(-math.inf, other, out)
    else:
        np.minimum(x, other, out=out)


def step(x: Any, below: Any, out: Any) -> None:
    """1 above zero, ``below`` elsewhere, and NaN for NaN."""
    x.clip(0.0, 1.0, out)
    np.ceil(out, out)
    if not isinstance(below, float) or below != 0.0:
        np.multiply(out, 1.0 - below, out)
        np.add(out, below, out)


@functools.cache
def _erf() -> Any:
    # loads half of SciPy, for which only this should wait
    from scipy.special import erf

    return erf


def normal_cdf(x: Any, out: Any) -> None:
    """The normal distribution function."""
    np.multiply(x, math.sqrt(0.5), out)
    _erf()(out, out)
    np.add(out, 1.0, out)
    np.multiply(out, 0.5, out)


def normal_pdf(x: Any, out: Any) -> None:
    """The normal density."""
    np.multiply(x, x, out)
    np.multiply(out, -0.5, out)
    np.exp(out, out)
    np.multiply(out, 1.0 / math.sqrt(2.0 * math.pi), out)
