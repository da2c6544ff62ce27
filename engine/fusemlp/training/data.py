"""Checked rows on their way into ``fit``: the share that is held out for validation, and weights by class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.describe.checks import caller_level
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.class_weights import as_class_weights, balanced
from fusemlp.inputs.targets import Examples, Targets
from fusemlp_kernels.errors import ArgumentError, DataError

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session


def split(engine: Session, data: Examples, share: float) -> tuple[Examples, Examples]:
    """Return the first rows, to train on, and the last ``share`` of them, to validate on, as Keras does.

    Raises ArgumentError if a part has no row, DataError if all its weights are zero. Warns of classes that only the
    last rows have.
    """
    rows = len(data.X)
    kept = math.floor(rows * (1.0 - share))
    if not 0 < kept < rows:
        raise ArgumentError(
            f"validation_split: {share:g} of {rows} rows leaves {kept} to train on and {rows - kept} to validate on; "
            "give another share"
        )
    parts = data.map(lambda array: array[:kept]), data.map(lambda array: array[kept:])
    for name, part in zip(("first", "last"), parts, strict=True):
        if part.weight is not None and not engine.inputs.largest(part.weight):
            raise DataError(
                f"validation_split: all weights of the {name} {len(part.X)} rows are zero; shuffle the rows before fit"
            )
    trained, held = (_codes(engine, part.targets) for part in parts)
    if trained is not None and held is not None and (unseen := np.setdiff1d(held, trained)).size:
        warnings.warn(
            f"validation_split: it takes the last rows as they are, and only these have the classes "
            f"{', '.join(map(str, unseen[:5]))}{', ...' if unseen.size > 5 else ''}; shuffle the rows before fit",
            stacklevel=caller_level(),
        )
    return parts


def by_class(engine: Session, given: Any, data: Examples, *, whole: bool) -> Callable[[Examples], Examples]:
    """Return a function that multiplies the weights of rows by those of their classes.

    ``given``: see ``fit``; "balanced" weighs the classes of ``data``, the ``whole`` of the training rows. Raises
    ArgumentError or ArgumentTypeError if the weights are impossible or the targets are no classes.
    """
    if given is None:
        return lambda rows: rows
    codes = _codes(engine, data.targets)
    if codes is None:
        raise ArgumentError(
            f"class_weight: it needs one class for each row, and the loss {engine.loss.kind!r} has other targets here; "
            "give the weight of each row: sample_weight"
        )
    classes = max(2, engine.network.sizes[-1])
    if isinstance(given, str) and given == "balanced":
        if not whole:
            raise ArgumentError(
                "class_weight: 'balanced' needs all training rows at once, and batches come one by one; give the "
                "weight of each class"
            )
        valid = codes[(codes >= 0) & (codes < classes)]
        weights = np.asarray(balanced(valid, classes))
    else:
        weights = as_class_weights("class_weight", given, classes)

    def weighted(rows: Examples) -> Examples:
        codes = _codes(engine, rows.targets)
        if codes is None:
            raise DataError("class_weight: every batch needs one class for each row")
        valid = (codes >= 0) & (codes < classes)
        factors = np.where(valid, weights[np.where(valid, codes, 0)], 1.0)
        if rows.weight is not None:
            factors = factors * engine.inputs.on_host(rows.weight)
        if whole and not factors.any():
            raise DataError("class_weight: it leaves no training row a weight above 0; give its class a weight")
        return rows._replace(weight=factors.astype(f"f{engine.memory.real_bytes}"))

    return weighted


def _codes(engine: Session, targets: Targets) -> Array | None:
    """Return the class of each row, an ignored index as it is; None if the targets are no classes."""
    values = engine.inputs.on_host(targets.values)
    if targets.soft:
        return np.asarray(values.argmax(axis=1))
    kind = engine.inputs.kind_of(targets)
    if kind == "one-hot rows":
        return np.asarray(values.argmax(axis=1))
    return np.asarray(values).reshape(-1).astype(np.int64) if kind == "classes" else None
