"""Inputs of unit scale: the engine's own standardisation, and the warnings of inputs and targets that would need it."""

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusemlp.datasets.cells import statistics
from fusemlp.describe.checks import caller_level, check_flag
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.examples import DeviceInputs
from fusemlp_kernels.contract import Backend
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError

# The names of the statistics of inputs beside the parameters in ``state_dict``.
MEAN, SCALE = "normalise.mean", "normalise.scale"
# The root mean square of the inputs that are not zero. On digits and breast_cancer, standardised and then multiplied,
# 20 epochs of SGD with rate 0.1 or Adam lose up to 3 points of accuracy at the ends of this range, more beyond them.
LEAST, MOST = 0.1, 5.0
# Of targets that are numbers: the least and the greatest deviation, and how many deviations the mean may be from 0.
# Beyond them, on friedman1 and diabetes, 20 epochs end with an R2 below 0 (Adam at 0.1, and at a mean of 10) or
# diverge (SGD with rate 0.01 at 100): outputs begin near 0 with a spread near 1.
SPREAD, OFFSET = (0.1, 100.0), 10.0
NUMBERS = ("mse", "mae", "huber", "quantile", "quantiles", "gaussian")
# The rows of a sample, and the numbers in them at most.
SAMPLE_ROWS, SAMPLE_NUMBERS = 64, 1 << 16


class InputScaleWarning(UserWarning):
    """The inputs of a training are far from unit scale."""


class TargetScaleWarning(UserWarning):
    """The targets of a regression are far from unit scale."""


def as_normalise(given: Any, width: int) -> bool | None:
    """Return the flag of the argument ``normalise``: a flag, None, or rows (n, ``width``) to measure."""
    if given is None or isinstance(given, bool | np.bool_):
        return None if given is None else check_flag("normalise", given)
    if isinstance(given, str | bytes | int | float):
        raise ArgumentTypeError(
            f"normalise: expected True, False, None, or an array (n, {width}) of rows to measure, got {given!r}"
        )
    return True


class InputScale:
    """The inputs x (n, K) of a network as (x - mean) / scale; ``mean`` and ``scale`` (K,) are host arrays."""

    def __init__(self, mean: Array, scale: Array, backend: Backend) -> None:
        self.mean, self.scale = mean, scale
        # On a device a bool or integer array takes a sum, and not all take a difference.
        self._shift, self._divisor = backend.from_host(-mean), backend.from_host(scale)

    def applied(self, X: Any) -> Any:
        """Return checked rows, on the host or on the device, as the network takes them."""
        if isinstance(X, np.ndarray):
            scaled = X - self.mean
            scaled /= self.scale
            return scaled
        return (X + self._shift) / self._divisor


class Scaling:
    """The scale of an engine's inputs, ``scale``: None if it is not measured, or not wanted.

    ``normalise`` is True, False or, if the user said neither, None.
    """

    def __init__(self, inputs: DeviceInputs, normalise: bool | None) -> None:
        self.inputs, self.normalise = inputs, normalise
        self.scale: InputScale | None = None

    def measured(self, X: Any) -> InputScale:
        """Return mean and standard deviation of each column of checked rows; 1 for the latter of a constant column."""
        mean, scale = statistics(
            self.inputs.on_host(X), "standard", [f"column {at}" for at in range(self.inputs.network.sizes[0])]
        )
        real = self.inputs.real
        return InputScale(mean.astype(real), np.maximum(scale, np.finfo(real).tiny).astype(real), self.inputs.backend)

    def measure(self, X: Any) -> None:
        """Measure checked rows, if the inputs are to be scaled and no rows were measured before."""
        if self.normalise and self.scale is None:
            self.scale = self.measured(X)

    def take_in(self, X: Any) -> Any:
        """Return checked training rows as the network takes them; the first that are taken in are measured."""
        self.measure(X)
        return self.normalised(X)

    def check_measured(self) -> None:
        """Check that rows can be normalised: batches are too few rows to measure, and predictions measure nothing."""
        if self.normalise and self.scale is None:
            raise ArgumentError(
                "normalise: no rows were measured yet: fit measures its arrays; before predictions, an export, batches "
                "or a loop of steps give the training rows to the engine, normalise=X"
            )

    def normalised(self, X: Any) -> Any:
        """Return checked rows as the network takes them."""
        return X if self.scale is None else self.scale.applied(X)

    @property
    def tensors(self) -> dict[str, Array]:
        """Copies of the statistics by their names in ``state_dict``; empty if there are none."""
        return {} if self.scale is None else {MEAN: self.scale.mean.copy(), SCALE: self.scale.scale.copy()}

    def take_tensors(self, tensors: Mapping[str, Array]) -> None:
        """The inverse of ``tensors``. Raises DataError for a scale that is not positive."""
        if not tensors:
            self.scale = None
            return
        if not (tensors[SCALE] > 0).all():
            raise DataError(f"state[{SCALE!r}]: expected numbers above 0, got {tensors[SCALE].min():.6g}")
        self.scale = InputScale(tensors[MEAN], tensors[SCALE], self.inputs.backend)

    def warn(self, argument: str, X: Any) -> None:
        """Warn if checked training rows X are far from unit scale, judged by a sample of them."""
        if self.normalise is not None:
            return
        rows = min(SAMPLE_ROWS, max(1, SAMPLE_NUMBERS // self.inputs.network.sizes[0]))
        sample = np.asarray(self.inputs.on_host(X[:: -(-len(X) // rows)]), np.float64).ravel()
        count = int(np.count_nonzero(sample))
        with np.errstate(over="ignore"):
            # no BLAS: its threads would go on spinning beside those of the training
            size = math.sqrt(float(np.square(sample).sum()) / max(1, count))
        # a step may bring NaN
        if count and (size < LEAST or size > MOST):
            warnings.warn(
                f"{argument}: the inputs are far from unit scale: the root mean square of those that are not zero is "
                f"{size:.3g}, and networks train well from {LEAST:g} to {MOST:g}. Let the engine scale them, with "
                "normalise=True, or scale them yourself; normalise=False turns this warning off",
                InputScaleWarning,
                stacklevel=caller_level(),
            )

    def warn_of_targets(self, kind: str, y: Any) -> None:
        """Warn if checked targets of a loss of this kind are numbers far from unit scale.

        If a sample of them is far, all are looked at: most rows of a long tail lie close together.
        """
        if kind not in NUMBERS:
            return
        mean = spread = 0.0
        # an odd step: gaps in every second row leave some of the sample
        for step in (len(y) // SAMPLE_ROWS | 1, 1):
            values = np.asarray(self.inputs.on_host(y[::step]), np.float64)
            values = values[np.isfinite(values)]
            with np.errstate(over="ignore"):
                mean, spread = (float(values.mean()), float(values.std())) if len(values) else (0.0, 0.0)
            if not spread or (SPREAD[0] <= spread <= SPREAD[1] and abs(mean) <= OFFSET * spread):
                return
        warnings.warn(
            f"y: the targets are far from unit scale: their mean is {mean:.3g} and their standard deviation "
            f"{spread:.3g}, and a {kind} loss learns them slowly or not at all. Give (y - y.mean()) / y.std(), and "
            "scale the predictions back; the table estimators do both",
            TargetScaleWarning,
            stacklevel=caller_level(),
        )
