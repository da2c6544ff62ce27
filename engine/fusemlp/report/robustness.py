"""Scores of a model on rows that an attack has changed, and certified scores.

The latter hold whatever happens to the numbers of a row, within a distance.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.rows import network_inputs
from fusemlp.describe.adversarial import Attack
from fusemlp.describe.checks import as_number
from fusemlp.inputs.arrays import Array
from fusemlp.report.evidence import image_shape
from fusemlp.report.metrics import headline, score, spelled
from fusemlp.runtime.attacks import attack
from fusemlp.runtime.intervals import Propagation

if TYPE_CHECKING:
    from fusemlp.runtime.session import Session

FIGURES = ("loss", "accuracy", "rmse")


def robust_score(
    engine: Any, preprocessor: Preprocessor, X: Array, labels: Array, how: Attack, weight: Any = None
) -> dict[str, Any]:
    """Return the attack, and loss and accuracy (of numbers the rmse) under it; arguments as of ``metrics.score``."""
    changed = attack(engine, X, preprocessor.encode_targets(labels), how)
    found = score(engine, preprocessor, changed, labels, weight)
    return {"attack": how.to_config(), **{name: found[name] for name in FIGURES if name in found}}


def robust_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield lines on the scores under an attack, if there was one."""
    if "robust" not in report:
        return
    found, told = report["robust"], report["robust"]["attack"]
    size = f"eps {told['eps']:g}" + (f", norm {told['norm']}, {told['steps']} steps" if "steps" in told else "")
    yield f"under attack by {told['kind']}, {size}:"
    yield from headline({name: found[name] for name in FIGURES if name in found}, "robust")


def reach(preprocessor: Preprocessor, cells: Array, eps: float, precision: str) -> tuple[Array, Array]:
    """Return the least and the greatest inputs of the network (n, width) when numbers move by ``eps`` at most.

    The input of a number moves by eps after scaling. A column of pieces moves by eps interquartile ranges, and its
    inputs with it. Words, dates and missing cells do not move. Pixels that are not scaled stay within the least and the
    greatest of these rows.
    """
    # the parts of a date have another source
    columns = zip(preprocessor.feature_names, preprocessor.sources, preprocessor.categories, strict=True)
    moves = np.array([words is None and name == source for name, source, words in columns])
    cut = np.array([preprocessor.pieces(column) > 1 for column in range(len(moves))])
    shift = eps * np.where(moves & cut, preprocessor.feature_scale, 0.0)
    low, high = (network_inputs(preprocessor, end, precision) for end in (cells - shift, cells + shift))
    alone = np.flatnonzero(moves & ~cut)
    first = (np.cumsum(preprocessor.widths) - preprocessor.widths)[alone]
    radius = np.zeros(low.shape)
    radius[:, first] = np.where(np.isnan(cells[:, alone]), 0.0, eps)
    least, most = low - radius, high + radius
    if image_shape(preprocessor) is not None and preprocessor.scale == "none":
        least, most = np.maximum(least, low.min()), np.minimum(most, high.max())
    return least, most


def certify(
    engine: Session, preprocessor: Preprocessor, cells: Array, labels: Array, eps: Any, *, argument: str = "eps"
) -> dict[str, float]:
    """Return the certified accuracy of rows as in the data, or of numbers the mean width of the bounds.

    Raises ArgumentError or ArgumentTypeError unless ``eps``, which errors call ``argument``, is at least 0.
    """
    eps = as_number(argument, eps, low=0.0)
    engine.network.check_single(argument, "interval bounds")
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


def certified_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line on what ``certify`` found on test rows, if it was asked."""
    if "certified" not in report:
        return
    found, within = report["certified"], f"within eps {report['certified']['eps']:g}"
    if "accuracy" in found:
        yield f"test certified accuracy {spelled(found['accuracy'])} {within}"
    else:
        yield f"test certified width {spelled(found['width'])}, of the bounds of predictions {within}"
