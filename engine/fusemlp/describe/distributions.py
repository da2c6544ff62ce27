"""Losses whose outputs describe the distribution of a target: several quantiles, or mean and standard deviation."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import numpy as np

from fusemlp.describe.checks import as_number
from fusemlp.describe.description import Positive
from fusemlp.describe.loss import Array, HostLoss
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError


def _check_quantiles(argument: str, given: object) -> tuple[float, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise ArgumentTypeError(f"{argument}: expected numbers such as [0.1, 0.5, 0.9], got {given!r}")
    levels = [as_number(argument, level, low=0.0, high=1.0, low_open=True, high_open=True) for level in given]
    if not levels or any(low >= high for low, high in pairwise(levels)):
        raise ArgumentError(f"{argument}: expected at least one number, in rising order, got {levels!r}")
    return tuple(levels)


@dataclass(frozen=True)
class Quantiles(HostLoss):
    """The mean of the losses ``Quantile`` of one target, for each number of ``q``, in rising order.

    The network has an output for each. The middle quantile, the nearest to 0.5, is its output; each other one is a
    step from its neighbour, log(1 + exp(output)), so that they never cross (increments as in Park et al., "Learning
    quantile functions without quantile crossing for distribution-free time series forecasting", 2022). ``predict``
    returns the quantiles (M, Q). On the NumPy backend.
    """

    kind = "quantiles"
    takes_logits = "steps between quantiles and makes them positive itself (predict does too)"
    q: Annotated[tuple[float, ...], _check_quantiles] = (0.1, 0.5, 0.9)

    @property
    def width(self) -> int:
        return len(self.q)

    @property
    def middle(self) -> int:
        """The place of the quantile that is the nearest to the median."""
        return min(range(len(self.q)), key=lambda at: abs(self.q[at] - 0.5))

    def point(self, outputs: int) -> int:
        return self.middle

    def judged(self, predicted: Array) -> tuple[Array, float]:
        return predicted.reshape(len(predicted), -1)[:, self.middle], self.q[self.middle]

    def transform(self, outputs: Array) -> Array:
        steps, at, quantiles = np.logaddexp(0, outputs), self.middle, outputs.copy()
        # one step after another: rounding keeps their order
        for below in range(at - 1, -1, -1):
            quantiles[:, below] = quantiles[:, below + 1] - steps[:, below]
        for above in range(at + 1, len(self.q)):
            quantiles[:, above] = quantiles[:, above - 1] + steps[:, above]
        return quantiles

    def of_rows(self, outputs: Array, targets: Array) -> tuple[Array, Array, Any]:
        at, errors = self.middle, self.transform(outputs) - targets
        slopes = (errors > 0) - np.asarray(self.q, outputs.dtype) * (errors != 0)
        # a step moves all quantiles from its own on, away from the middle
        gradient = -np.expm1(-np.logaddexp(0, outputs))
        gradient[:, :at] *= -slopes[:, :at].cumsum(axis=1)
        gradient[:, at + 1 :] *= slopes[:, :at:-1].cumsum(axis=1)[:, ::-1]
        gradient[:, at] = slopes.sum(axis=1)
        return (slopes * errors).sum(axis=1), gradient, len(self.q)


@dataclass(frozen=True)
class GaussianNLL(HostLoss):
    """``(log(v) + (mean - target)**2 / v) / 2``: the negative log-likelihood of normal targets, without its constant.

    For N targets the network has 2 N outputs: means, then raw deviations s, of which ``v = max(log(1 + exp(s))**2,
    eps)`` (Nix and Weigend, "Estimating the mean and variance of the target probability distribution", 1994). Softplus
    grows like s, in the units of the target; the exponential would make one large s overflow. The gradient passes
    through the floor ``eps``, as in torch's ``GaussianNLLLoss``. On the NumPy backend.
    """

    kind = "gaussian"
    takes_logits = "means and raw deviations, which it makes positive itself (predict does too)"
    width = 2
    eps: Positive = 1e-6

    def transform(self, outputs: Array) -> Array:
        return outputs[:, : outputs.shape[1] // 2]

    def std(self, outputs: Array) -> Array:
        """Return the standard deviations (n, N) of outputs (n, 2 N)."""
        raw = outputs[:, outputs.shape[1] // 2 :]
        return np.asarray(np.maximum(np.logaddexp(0, raw), self.eps**0.5))

    def of_rows(self, outputs: Array, targets: Array) -> tuple[Array, Array, Any]:
        raw = outputs[:, targets.shape[1] :]
        std, variance = np.logaddexp(0, raw), self.std(outputs) ** 2
        errors = self.transform(outputs) - targets
        scaled = errors / variance
        losses = 0.5 * (np.log(variance) + errors * scaled)
        # expm1(-softplus(s)) is minus its derivative
        by_raw = (scaled**2 - 1 / variance) * std * np.expm1(-std)
        return losses.sum(axis=1), np.hstack([scaled, by_raw]), targets.shape[1]
