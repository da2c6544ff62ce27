"""The rows that train, validate and test, and the network's inputs of them.

Rows are files of their own, whole groups, the last ones in the order of time, or drawn; a hash knows each again.
"""

import os
import warnings
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fusemlp.datasets.cells import Features, Indices, different, spellings
from fusemlp.datasets.dataset import Dataset
from fusemlp.datasets.load import existing, load_labelled
from fusemlp.datasets.preprocessing import Preprocessor, split
from fusemlp.datasets.textfiles import Form
from fusemlp.describe.checks import listed
from fusemlp.inputs.arrays import Array
from fusemlp.inputs.columns import Columns
from fusemlp_kernels.errors import ArgumentError, DataError

Hashes = npt.NDArray[np.uint64]
Fold = tuple[Array, Array]
# Random orders of the groups, of which the one with the closest shares of the classes is taken.
_DRAWS = 10
# Numbers hashed, and rows transformed, at a time: they stay in a core's cache.
_PIECE = 2**15
# The rows are cut into this many folds, or one a model if there are more models.
FOLDS = 5
# Codes replace inputs where there are at least this many inputs a code.
SAVING = 2
# Losses that train classes as one-hot rows.
ONE_HOT = frozenset({"mse", "mae", "huber"})


def with_files(
    dataset: Dataset, source: str, *, validation: str | None = None, test: str | None = None, form: Form | None = None
) -> Dataset:
    """Return the data set of ``source`` with the rows of the files ``validation`` and ``test``.

    They are read by the columns and categories of ``source``. Raises ArgumentError for a file that is given twice,
    DataError for other columns and for labels of another type.
    """
    earlier = {"DATA": source}
    for option, path in (("validation", validation), ("test", test)):
        if path is None:
            continue
        if option == "test" and dataset.test is not None:
            raise ArgumentError(f"test: {source!r} brings a test set of its own, so {path!r} would be a second one")
        for other, known in earlier.items():
            if known == path or (Path(known).exists() and Path(path).exists() and Path(known).samefile(path)):
                raise ArgumentError(f"{option}: {path!r} is the file of {other} too; give a file with other rows")
        earlier[f"--{option}"] = path
        notes: list[str] = []
        existing(path, option)
        X, labels = load_labelled(path, dataset, form=form, notes=notes)
        y = _alike(path, labels, dataset)
        if dataset.task == "classification":
            strange = np.setdiff1d(y, dataset.classes).tolist()
            if strange:
                notes.append(f"labels that {dataset.name} does not have, so no row trains them: {listed(strange)}")
        if option == "validation":
            dataset = replace(dataset, validation=(X, y))
        else:
            dataset = replace(dataset, test=(X, y), test_source="a file of its own")
        same = among(row_hashes(X, _numbers(dataset, y)), row_hashes(dataset.X, _numbers(dataset, dataset.y)))
        if same:
            notes.append(f"{same} of {len(y)} rows stand in {dataset.name} too, with the same features and target")
        dataset = replace(dataset, notes=(*dataset.notes, *(f"{option} file: {note}" for note in notes)))
    return dataset


def _alike(path: str, y: Array, dataset: Dataset) -> Array:
    """Return the labels in the type of the data set's; DataError if they are of another kind."""
    there = dataset.y
    if y.dtype.kind == there.dtype.kind == "U" and dataset.joins_spellings:
        same = spellings(np.unique(y).tolist(), np.unique(there).tolist())
        return np.array([same.get(label, label) for label in y.tolist()])
    if y.dtype.kind == there.dtype.kind or (dataset.task == "regression" and y.dtype.kind in "iuf"):
        return y
    if y.dtype.kind in "iuf" and there.dtype.kind in "iuf" and (y == y.astype(there.dtype)).all():
        return y.astype(there.dtype)
    raise DataError(
        f"{path}: the target {dataset.target_name!r} holds values such as {y[0].item()!r}, in {dataset.name} such as "
        f"{there[0].item()!r}; write both in the same way"
    )


def hold_out(dataset: Dataset, rows: Indices, *, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Return those of the ``rows`` to keep, and about a ``fraction`` of them to hold out.

    They are the last in time, or whole groups, if the data set has these, else drawn by ``seed``, each class alike.
    """
    classify = dataset.task == "classification"
    if dataset.times is not None:
        kept, held = _last(dataset.times[rows], fraction)
    elif dataset.groups is not None:
        y = dataset.y[rows] if classify else np.zeros(len(rows))
        kept, held = _groups(dataset.groups[rows], y, fraction, seed)
    else:
        kept, held = split(dataset.y[rows], fraction=fraction, seed=seed, stratify=classify)
    return rows[kept], rows[held]


def folds(labels: Array, models: int, *, seed: int, stratify: bool) -> tuple[Fold, ...]:
    """Return training and validation rows for each model, as indices of ``labels``; no two models validate on a row."""
    count = max(models, FOLDS)
    if len(labels) < count:
        raise DataError(f"models: {models} need {count} folds of the training rows, and these are {len(labels)}")
    # as codes: scikit-learn takes labels beyond int64 for measurements
    _, codes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if not stratify or int(sizes.max()) < count:
        # as KFold cuts them: the import of scikit-learn takes a second
        rows = np.arange(len(labels))
        parts = np.array_split(np.random.RandomState(seed % 2**32).permutation(rows), count)[:models]
        return tuple((np.setdiff1d(rows, part, assume_unique=True), np.sort(part)) for part in parts)
    from sklearn.model_selection import StratifiedKFold

    with warnings.catch_warnings():
        # A class with fewer rows than folds is missing in some.
        warnings.simplefilter("ignore", UserWarning)
        cut = StratifiedKFold(n_splits=count, shuffle=True, random_state=seed % 2**32)
        return tuple(cut.split(labels, codes))[:models]


def _last(times: Array, fraction: float) -> tuple[Indices, Indices]:
    """Hold out the rows with the last times; rows of one time stay together."""
    ordered = np.sort(times)
    start = len(ordered) - int(np.ceil(fraction * len(ordered)))
    later = ordered[ordered > ordered[0]]
    if not len(later):
        raise DataError(
            f"fraction: none of {len(times)} rows can be held out, because all have the same time ({ordered[0]}); "
            "choose another column of times"
        )
    # The first time may have more rows than are to be kept.
    border = max(ordered[max(start, 1)], later[0])
    return np.flatnonzero(times < border), np.flatnonzero(times >= border)


def _groups(groups: Array, y: Array, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Hold out whole groups: of some random orders the first groups that come closest to ``fraction`` of each class."""
    names, codes = different(groups)
    if len(names) < 2:
        raise DataError(
            f"fraction: none of {len(groups)} rows can be held out, because all are of one group ({names[0]!r}); "
            "choose another column of groups"
        )
    classes, labels = np.unique(y, return_inverse=True)
    table = np.zeros((len(names), len(classes)))
    np.add.at(table, (codes, labels), 1)
    wanted = fraction * table.sum(axis=0)
    generator = np.random.default_rng(seed)
    best, least = np.empty(0, np.int64), np.inf
    for _ in range(_DRAWS):
        order = generator.permutation(len(names))
        misses = np.abs(np.cumsum(table[order[:-1]], axis=0) - wanted).sum(axis=1)
        at = int(misses.argmin())
        if misses[at] < least:
            best, least = order[: at + 1], misses[at]
    held = np.isin(codes, best)
    return np.flatnonzero(~held), np.flatnonzero(held)


def row_hashes(X: Features, targets: Array, rows: Indices | None = None) -> Hashes:
    """Return a 64-bit hash of each row: X (n, columns), targets (n,) or (n, k); equal numbers have equal hashes.

    ``rows`` are the indices in X of the rows of ``targets``; None for all.

    Missing numbers (NaN) are equal. Each value is mixed by two steps of splitmix64 (Steele, Lea and Flood, "Fast
    splittable pseudorandom number generators", 2014) with a constant of its column, and the row is their sum.
    """
    columns = X.shape[1] + (1 if targets.ndim == 1 else targets.shape[1])
    constants = np.arange(1, columns + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    hashes = np.empty(len(targets), np.uint64)
    step = max(1, _PIECE // columns)
    for start in range(0, len(targets), step):
        piece = slice(start, start + step)
        values = np.column_stack([X[piece if rows is None else rows[piece]], targets[piece]])
        # One zero and one NaN.
        values = values.astype(np.float64, copy=False) + 0.0
        values[np.isnan(values)] = np.nan
        bits = values.view(np.uint64)
        bits += constants
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            bits ^= bits >> np.uint64(shift)
            bits *= np.uint64(factor)
        bits ^= bits >> np.uint64(31)
        hashes[piece] = bits.sum(axis=1)
    return hashes


def among(rows: Hashes, known: Hashes) -> int:
    """Return the number of ``rows`` whose hash is one of the ``known``."""
    return int(np.isin(rows, known).sum())


def _numbers(dataset: Dataset, y: Array) -> Array:
    """Return labels as numbers: the places of classes, or the values of a regression."""
    return np.searchsorted(dataset.classes, y) if dataset.task == "classification" else y


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows for the engine: X (n, inputs), perhaps Columns, y for the loss, and ``labels`` as in the data."""

    X: Any
    y: Array
    labels: Array
    weight: Array | None = None

    def __len__(self) -> int:
        return len(self.X)


def fit_preprocessor(dataset: Dataset, rows: npt.ArrayLike, *, loss: str, **options: Any) -> Preprocessor:
    """Return a Preprocessor of the training ``rows`` with targets as ``loss`` takes them."""
    scale_targets = loss != "poisson" and dataset.task != "multilabel"
    return Preprocessor.fit(dataset, rows, one_hot_targets=loss in ONE_HOT, scale_targets=scale_targets, **options)


def network_ends(preprocessor: Preprocessor, loss: str) -> tuple[int, int]:
    """Return the widths of the network's first and last layer."""
    of_two = loss == "binary_cross_entropy" and preprocessor.classes is not None
    return preprocessor.width, 1 if of_two else preprocessor.outputs


def rows_for(
    preprocessor: Preprocessor,
    X: Array,
    labels: Array,
    *,
    precision: str,
    rows: Array | None = None,
    weight: Array | None = None,
    by_class: Array | None = None,
    codes: bool = False,
) -> Rows:
    """Return rows of X as ``load_data`` gives them (``rows`` are their indices, None for all) for an engine.

    ``weight`` (n,) are weights of the rows, times ``by_class`` (classes,). ``codes``: see ``network_inputs``.
    """
    if by_class is not None:
        weight = by_class[preprocessor.class_codes(labels)] * (1.0 if weight is None else weight)
    inputs = network_inputs(preprocessor, X, precision, rows, codes=codes)
    return Rows(inputs, preprocessor.encode_targets(labels), labels, weight)


def network_inputs(
    preprocessor: Preprocessor, X: Array, precision: str, rows: Array | None = None, *, codes: bool = False
) -> Any:
    """Return the inputs of rows (None: all) in the network's type, a piece at a time: float64 takes twice the memory.

    With ``codes`` they are Columns where these are shorter. Raises DataError before it takes more memory than there is.
    """
    count = len(X) if rows is None else len(rows)
    codes = codes and saves(preprocessor)
    check_memory(preprocessor, count, precision, codes=codes)
    coding = preprocessor.coding
    transform, width = preprocessor.transform_features, preprocessor.width
    if codes:
        transform, width = preprocessor.encode_features, coding.slots
    inputs = np.empty((count, width), np.float64 if precision == "fp64" else np.float32)
    finite = True
    try:
        with np.errstate(over="ignore"):
            for start in range(0, count, _PIECE):
                piece = inputs[start : start + _PIECE]
                selection = slice(start, start + _PIECE) if rows is None else rows[start : start + _PIECE]
                piece[:] = transform(X[selection])
                finite = finite and bool(np.isfinite(piece).all())
    except DataError:
        # Its message has the row in the piece.
        finite = False
    if not finite:
        # The engine's error names a value that float32 cannot hold.
        return preprocessor.transform_features(X if rows is None else X[rows])
    return Columns(coding, inputs) if codes else inputs


def saves(preprocessor: Preprocessor) -> bool:
    """Return whether a first layer has less to do with codes than with dense rows."""
    return SAVING * preprocessor.coding.slots <= preprocessor.width


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
        most, used, stat = ((group / f"memory.{name}").read_text("ascii") for name in ("max", "current", "stat"))
        if most.strip() != "max":
            figures = dict(line.split() for line in stat.splitlines())
            # cached files count as used, and give way when memory is needed
            files = sum(int(figures.get(name, 0)) for name in ("active_file", "inactive_file"))
            limits.append(max(0, int(most) - int(used) + files))
    return min(limits, default=None)


def check_memory(preprocessor: Preprocessor, rows: int, precision: str, *, codes: bool = False) -> None:
    """Raise DataError if the inputs of this many rows do not fit into memory; it names the columns that take most."""
    free, width = available_memory(), preprocessor.coding.slots if codes else preprocessor.width
    need = rows * width * (8 if precision == "fp64" else 4)
    if free is None or need <= free:
        return
    widest = sorted(zip(preprocessor.widths, preprocessor.feature_names, strict=True), reverse=True)[:3]
    examples = ", ".join(f"{count} of {name!r}" for count, name in widest)
    raise DataError(
        f"the inputs of the network take {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: {rows} rows "
        f"have {width} inputs, {examples} among them; --drop a column of many words, or give fewer rows"
    )
