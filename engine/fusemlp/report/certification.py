"""Certified scores of a run's model: those that hold whatever happens to the numbers of a row, within a distance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.datasets.dates import part_names
from fusemlp.datasets.prepare import network_inputs
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.checks import as_number
from fusemlp.inputs.arrays import Array
from fusemlp.report.evidence import image_shape
from fusemlp.report.metrics import spelled
from fusemlp.runtime.intervals import Propagation

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session

# The normal scores of the quartiles.
QUARTILES = -0.6744897501960817, 0.6744897501960817


def distances(preprocessor: Preprocessor) -> Array:
    """Return how far the cells of each column (columns,) move for an eps of 1.

    A pixel moves by 1, another number by the scale of its column: with "robust", "piecewise" and "quantile" the
    interquartile range of the training rows, with "standard" the standard deviation, with "minmax" the range, with
    "none" 1. Words and the parts of dates do not move.
    """
    names, scale = preprocessor.feature_names, np.array(preprocessor.feature_scale)
    if image_shape(preprocessor) is not None:
        return np.ones(len(names))
    if preprocessor.scale == "quantile":
        knots = [at or ((0.0,), (0.0,)) for at in preprocessor.feature_knots]
        scale = np.array([np.ptp(np.interp(QUARTILES, scores, values)) for values, scores in knots])
    dates = part_names(name for name, _ in preprocessor.dates)
    moves = [words is None and name not in dates for name, words in zip(names, preprocessor.categories, strict=True)]
    return np.where(moves, scale, 0.0)


def reach(preprocessor: Preprocessor, cells: Array, eps: float, precision: str) -> tuple[Array, Array]:
    """Return the least and the greatest inputs of the network (n, width) when the cells move by ``eps`` at most.

    Each input rises with its cell. A missing cell stays missing.
    """
    move = eps * distances(preprocessor)
    least, most = (network_inputs(preprocessor, end, precision) for end in (cells - move, cells + move))
    return least, most


def certify(engine: Session, preprocessor: Preprocessor, cells: Array, labels: Array, eps: Any) -> dict[str, float]:
    """Return the certified accuracy of rows as in the data, or of numbers the mean width of the bounds.

    Raises ArgumentError or ArgumentTypeError unless ``eps`` is a number of at least 0.
    """
    eps = as_number("certify", eps, low=0.0)
    low, high = reach(preprocessor, cells, eps, engine.precision)
    found = Propagation(engine)
    if preprocessor.classes is None:
        ends = found.outputs(low, high)
        with np.errstate(all="ignore"):
            if engine.loss.kind == "poisson":
                ends = np.exp(ends[0]), np.exp(ends[1])
            least, most = map(preprocessor.decode_predictions, ends)
            return {"eps": eps, "width": float(np.mean(most - least))}
    codes = preprocessor.class_codes(labels)
    if engine.loss.kind == "binary_cross_entropy":
        certified = found.certified_labels(low, high, codes[:, None] == 1)
    else:
        certified = found.certified(low, high, codes)
    return {"eps": eps, "accuracy": float(certified.mean())}


def certified_line(found: Mapping[str, float]) -> str:
    """Return a line on what ``certify`` found on test rows."""
    if "accuracy" in found:
        return f"test certified accuracy {spelled(found['accuracy'])} within eps {found['eps']:g}"
    return f"test certified width {spelled(found['width'])}, of the bounds of predictions within eps {found['eps']:g}"
