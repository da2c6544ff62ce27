"""Convert the user's targets of a loss for the kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from fusemlp.describe.losses import CrossEntropy, Loss
from fusemlp.inputs.arrays import (
    Array,
    as_binary_targets,
    as_class_labels,
    as_counts,
    as_probability_rows,
    as_values,
    to_array,
)


class Targets(NamedTuple):
    """``values``: (n,) classes or (n, N) reals, on host or device; ``soft``: True for rows of probabilities."""

    values: Any
    soft: bool


class Examples(NamedTuple):
    """Checked rows: X (n, K), their targets and perhaps weights (n,), on host or device."""

    X: Any
    targets: Targets
    weight: Any | None

    @property
    def arrays(self) -> dict[str, Any]:
        """The arrays by the names that they have in a program."""
        found = {"x": self.X, "target": self.targets.values}
        return found if self.weight is None else {**found, "weight": self.weight}

    def map(self, change: Callable[[Any], Any]) -> Examples:
        """Return the examples with each array changed."""
        weight = None if self.weight is None else change(self.weight)
        return Examples(change(self.X), self.targets._replace(values=change(self.targets.values)), weight)


def as_targets(argument: str, y: Any, loss: Loss, *, outputs: int, rows: int | None, dtype: Any) -> Targets:
    """Check ``y`` for a loss and a network with ``outputs`` outputs; ``rows``: the number of rows it must have.

    cross_entropy takes (n,) integers, or (n, N) probabilities; binary_cross_entropy (n, N) values from 0 to 1; poisson
    counts; the others (n, N) reals. (n,) stands for (n, 1). Raises ShapeError, DTypeError or DataError.
    """
    if isinstance(loss, CrossEntropy):
        array = y if isinstance(y, np.ndarray) else to_array(argument, y)
        if array.ndim == 2 and array.shape[1] == outputs:
            return Targets(as_probability_rows(argument, array, classes=outputs, rows=rows, dtype=dtype), True)
        labels = as_class_labels(argument, array, classes=outputs, rows=rows, ignore_index=loss.ignore_index)
        return Targets(labels, False)
    check = {"binary_cross_entropy": as_binary_targets, "poisson": as_counts}.get(loss.kind, as_values)
    return Targets(check(argument, y, width=outputs, rows=rows, dtype=dtype), False)


def are_one_hot(values: Array) -> bool:
    """Return whether every row is one-hot: one 1 and zeros elsewhere, in at least two columns."""
    if values.ndim != 2 or values.shape[1] < 2 or not len(values):
        return False
    return bool(np.all((values == 0.0) | (values == 1.0)) and np.all(values.sum(axis=1) == 1.0))
