"""Weights of the rows by their class."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from fusemlp.describe.checks import as_number
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError


def balanced(codes: Array, classes: int) -> list[float]:
    """Return for each class: rows / (present classes * rows of the class); 0 for a class without rows."""
    counts = np.bincount(codes, minlength=classes)
    present = int(np.count_nonzero(counts))
    return [len(codes) / (present * int(count)) if count else 0.0 for count in counts]


def as_class_weights(argument: str, given: Any, classes: int) -> Array:
    """Return one weight for each class (classes,): from a sequence, or a mapping, whose missing classes weigh 1.

    Raises ArgumentTypeError, and ArgumentError for other classes, another number of weights, or all zero.
    """
    expected = f"{argument}: expected a mapping such as {{0: 1.0, 1: 5.0}}, {classes} numbers or 'balanced', got"
    if isinstance(given, Mapping):
        strange = [key for key in given if isinstance(key, bool) or key not in range(classes)]
        if strange:
            raise ArgumentError(f"{argument}: {strange[0]!r} is not one of the classes 0 to {classes - 1}")
        numbers = [given.get(code, 1.0) for code in range(classes)]
    elif isinstance(given, str) or not isinstance(given, Iterable):
        raise ArgumentTypeError(f"{expected} {given!r}")
    else:
        numbers = list(given)
        if len(numbers) != classes:
            raise ArgumentError(f"{expected} {len(numbers)} numbers")
    weights = np.array([as_number(f"{argument}[{code}]", one, low=0.0) for code, one in enumerate(numbers)])
    if not weights.any():
        raise ArgumentError(f"{argument}: expected at least one weight above 0, got {numbers!r}")
    return weights
