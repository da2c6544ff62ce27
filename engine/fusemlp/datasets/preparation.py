"""The preparation of rows for a training: preprocessing, encoded labels, the network's inputs and their memory.

The command line and the estimators of tables share it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusemlp.datasets.dataset import Dataset
from fusemlp.datasets.parts import Fold
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.describe.checks import check_choice
from fusemlp.describe.losses import Loss
from fusemlp.describe.metrics import METRICS, Judged, metrics_for
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, DataError

# Losses that train classes as one-hot rows.
ONE_HOT = frozenset({"mse", "mae", "huber"})
# Adam's weight decay where a table's classes are learned and none is given; numbers do without.
CLASS_DECAY = 3e-4
_PIECE = 2**15


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows for the engine: X (n, inputs), y for the loss, and ``labels`` as in the data."""

    X: Array
    y: Array
    labels: Array
    weight: Array | None = None

    def __len__(self) -> int:
        return len(self.X)


def fit_data(train: Rows, validation: Rows | None, folds: Sequence[Fold] = ()) -> dict[str, Any]:
    """Return the arguments of ``fit`` that hold training and validation rows; with ``folds``, indices of ``train``,
    those of a fleet's."""
    held = None if validation is None else (validation.X, validation.y, validation.weight)
    given: dict[str, Any] = {"X": train.X, "y": train.y, "sample_weight": train.weight, "validation_data": held}
    if folds:
        given |= {"rows": [own for own, _ in folds], "validation_rows": [held for _, held in folds]}
    return given


def fit_preprocessor(dataset: Dataset, rows: npt.ArrayLike, *, loss: str, **options: Any) -> Preprocessor:
    """Return a Preprocessor of the training ``rows`` with targets as ``loss`` takes them."""
    return Preprocessor.fit(dataset, rows, one_hot_targets=loss in ONE_HOT, scale_targets=loss != "poisson", **options)


def network_ends(preprocessor: Preprocessor, loss: str) -> tuple[int, int]:
    """Return the widths of the network's first and last layer."""
    return preprocessor.width, 1 if loss == "binary_cross_entropy" else preprocessor.outputs


def watch(metric: str | None, preprocessor: Preprocessor, loss: Loss, *, validates: bool) -> dict[str, Any]:
    """Return the arguments of ``fit`` for the score that decides; a score of numbers is in their original units."""
    if metric is None:
        return {}
    numbers = preprocessor.classes is None
    of_training = ["loss"] if numbers else ["loss", "accuracy"]
    kind = "numbers" if numbers else "classes" if loss.is_classification else "one-hot rows"
    metrics = metrics_for(kind) if validates else {}
    named = [f"val_{name}" for name in (*of_training, *metrics)] if validates else of_training
    if metric.startswith("val_") and not validates:
        raise ArgumentError(f"metric: {metric!r} is of validation rows, and there are none")
    bare = metric.removeprefix("val_")
    if (bare == "accuracy" and numbers) or (bare in METRICS and ("numbers" in METRICS[bare].kinds) != numbers):
        judged, holds = ("classes", "numbers") if numbers else ("numbers", "classes")
        raise ArgumentError(
            f"metric: {metric!r} is a score of {judged}, and the target holds {holds}; expected one of: "
            f"{', '.join(dict.fromkeys([*metrics, *named]))}"
        )
    short = f"val_{metric}" if metric in metrics else metric
    monitor = check_choice("metric", short, [*dict.fromkeys([*named, *of_training])])
    score = metrics.get(monitor.removeprefix("val_"))
    if score is None or not numbers:
        return {"monitor": monitor}
    decode, of = preprocessor.decode_predictions, score.of

    def in_units(rows: Judged) -> float:
        return of(replace(rows, truth=decode(rows.truth), predicted=decode(rows.predicted)))

    return {"monitor": monitor, "metrics": [replace(score, of=in_units)]}


def rows_for(
    preprocessor: Preprocessor,
    X: Array,
    labels: Array,
    *,
    precision: str,
    rows: Array | None = None,
    weight: Array | None = None,
    by_class: Array | None = None,
) -> Rows:
    """Return rows of X as ``load_data`` gives them (``rows`` are their indices, None for all) for an engine.

    ``weight`` (n,) are weights of the rows, ``by_class`` (classes,) those of their classes, which multiply these.
    """
    if by_class is not None:
        weight = by_class[preprocessor.class_codes(labels)] * (1.0 if weight is None else weight)
    inputs = network_inputs(preprocessor, X, precision, rows)
    return Rows(inputs, preprocessor.encode_targets(labels), labels, weight)


def network_inputs(preprocessor: Preprocessor, X: Array, precision: str, rows: Array | None = None) -> Array:
    """Return the inputs of rows (None: all) in the network's type, a piece at a time: float64 takes twice the memory.

    Raises DataError, before it takes the memory, if there is not enough.
    """
    count = len(X) if rows is None else len(rows)
    check_memory(preprocessor, count, precision)
    inputs = np.empty((count, preprocessor.width), np.float64 if precision == "fp64" else np.float32)
    finite = True
    try:
        with np.errstate(over="ignore"):
            for start in range(0, count, _PIECE):
                piece = inputs[start : start + _PIECE]
                selection = slice(start, start + _PIECE) if rows is None else rows[start : start + _PIECE]
                piece[:] = preprocessor.transform_features(X[selection])
                finite = finite and bool(np.isfinite(piece).all())
    except DataError:
        # Its message has the row in the piece.
        finite = False
    # The engine's error names a value that float32 cannot hold.
    return inputs if finite else preprocessor.transform_features(X if rows is None else X[rows])


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that the system and the control group still allow this process; None if unknown."""
    limits = []
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError):
        # not Linux: free pages leave out the caches that the system could give up
        if "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):
            limits.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    group = root / "sys/fs/cgroup"
    # no control groups, or those of version 1
    with suppress(OSError, ValueError):
        most, used, stat = (
            (group / f"memory.{name}").read_text(encoding="ascii") for name in ("max", "current", "stat")
        )
        if most.strip() != "max":
            figures = dict(line.split() for line in stat.splitlines())
            # cached files count as used, and give way when memory is needed
            files = sum(int(figures.get(name, 0)) for name in ("active_file", "inactive_file"))
            limits.append(max(0, int(most) - int(used) + files))
    return min(limits, default=None)


def check_memory(preprocessor: Preprocessor, rows: int, precision: str) -> None:
    """Raise DataError if the inputs of this many rows do not fit into memory; it names the columns that take most."""
    free, width = available_memory(), preprocessor.width
    need = rows * width * (8 if precision == "fp64" else 4)
    if free is None or need <= free:
        return
    widest = sorted(zip(preprocessor.widths, preprocessor.feature_names, strict=True), reverse=True)[:3]
    told = ", ".join(f"{count} of {name!r}" for count, name in widest)
    raise DataError(
        f"the inputs of the network take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: {rows} rows "
        f"have {width} inputs, {told} among them; --drop a column of many words, or give fewer rows"
    )
