"""Inputs of unit scale: the engine's own standardisation, and the warning of inputs that would need it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from fusemlp.datasets.scaling import statistics
from fusemlp.describe.checks import check_flag
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.device import DeviceInputs
from fusemlp.runtime.inference import MEAN, SCALE, Inference, InputScale
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError

# The root mean square of the inputs that are not zero. On digits and breast_cancer, standardised and then multiplied,
# 20 epochs of SGD with rate 0.1 or Adam lose up to 3 points of accuracy at the ends of this range, more beyond them.
LEAST, MOST = 0.1, 5.0
# The rows of a sample, and the numbers in them at most.
SAMPLE_ROWS, SAMPLE_NUMBERS = 64, 1 << 16


class InputScaleWarning(UserWarning):
    """The inputs of a training are far from unit scale."""


class Normalising(DeviceInputs):
    """The part of an engine that knows the scale of its inputs.

    ``normalise`` is True, False or, if the user said neither, None.
    """

    normalise: bool | None = None
    _inference: Inference

    @property
    def input_scale(self) -> InputScale | None:
        """Mean and scale of the columns of the inputs; None if they are not measured, or not wanted."""
        return self._inference.input_scale

    @input_scale.setter
    def input_scale(self, scale: InputScale | None) -> None:
        self._inference.input_scale = scale

    def start_normalising(self, normalise: Any) -> None:
        """Take the argument ``normalise``: a flag, None, or rows (n, K) to measure."""
        if normalise is None or isinstance(normalise, bool | np.bool_):
            self.normalise = None if normalise is None else check_flag("normalise", normalise)
        elif isinstance(normalise, str | bytes | int | float):
            raise ArgumentTypeError(
                f"normalise: expected True, False, None, or an array (n, {self.network.sizes[0]}) of rows to measure, "
                f"got {normalise!r}"
            )
        else:
            self.normalise = True
            self.input_scale = self.measured(self.features("normalise", normalise))

    def measured(self, X: Any) -> InputScale:
        """Return mean and standard deviation of each column of checked rows; 1 for the latter of a constant column."""
        mean, scale = statistics(self.on_host(X), "standard", [f"column {at}" for at in range(self.network.sizes[0])])
        tiny = np.finfo(self._real).tiny
        return InputScale(mean.astype(self._real), np.maximum(scale, tiny).astype(self._real), self._backend)

    def take_in(self, X: Any) -> Any:
        """Return checked training rows as the network takes them; the first that are taken in are measured."""
        if self.normalise and self.input_scale is None:
            self.input_scale = self.measured(X)
        return self.normalised(X)

    def check_measured(self) -> None:
        """Check that rows can be normalised: batches are too few rows to measure, and predictions measure nothing."""
        if self.normalise and self.input_scale is None:
            raise ArgumentError(
                "normalise: no rows were measured yet: fit measures its arrays; before predictions, an export, batches "
                "or a loop of steps give the training rows to the engine, normalise=X"
            )

    def normalised(self, X: Any) -> Any:
        """Return checked rows as the network takes them."""
        scale = self._inference.input_scale
        return X if scale is None else scale.applied(X)

    @property
    def scale_tensors(self) -> dict[str, Array]:
        """The statistics by their names in ``state_dict``; empty if there are none."""
        return {} if self.input_scale is None else self.input_scale.tensors

    def take_scale(self, tensors: Mapping[str, Array]) -> None:
        """The inverse of ``scale_tensors``. Raises DataError for a scale that is not positive."""
        if not tensors:
            self.input_scale = None
            return
        if not (tensors[SCALE] > 0).all():
            raise DataError(f"state[{SCALE!r}]: expected numbers above 0, got {tensors[SCALE].min():.6g}")
        self.input_scale = InputScale(tensors[MEAN], tensors[SCALE], self._backend)

    def warn_of_scale(self, argument: str, X: Any, *, stacklevel: int) -> None:
        """Warn if checked training rows X are far from unit scale, judged by a sample of them."""
        if self.normalise is not None:
            return
        rows = min(SAMPLE_ROWS, max(1, SAMPLE_NUMBERS // self.network.sizes[0]))
        sample = self.on_host(X[:: -(-len(X) // rows)]).astype(np.float64).ravel()
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
                stacklevel=stacklevel,
            )
