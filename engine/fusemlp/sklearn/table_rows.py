"""The rows of a user's table: named columns of Arrow, the rows that count, and those to validate on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.utils import _safe_indexing, check_consistent_length
from sklearn.utils.validation import _check_sample_weight, validate_data

from fusemlp.datasets.dataset import ColumnChoices, Dataset, weights
from fusemlp.datasets.load import load_data, load_features
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.tables import Frame, as_frame, as_stored
from fusemlp.datasets.textfiles import Form
from fusemlp.describe.checks import arrow
from fusemlp.inputs.arrays import Array, is_sparse
from fusemlp_kernels.errors import ArgumentError, ArgumentTypeError, DataError, ShapeError

# Missing values of Python, NumPy and pandas, as text.
_GONE = frozenset({"None", "nan", "<NA>", "NaT"})


def form_of(estimator: Any) -> Form:
    """Return the form of an estimator's tables: the words that stand for missing cells."""
    missing = estimator.missing
    return Form(missing=[str(word) for word in ([missing] if np.isscalar(missing) else missing or ())])


def as_table(estimator: Any, X: Any, *, reset: bool = False) -> Frame:
    """Return X as a table with names; rows may be mappings; scikit-learn's errors for other things."""
    # some sparse matrices are mappings; a lazy frame has no rows yet; a frame's own attributes may be its columns
    refused = (isinstance(X, Mapping | str) and not is_sparse(X)) or hasattr(type(X), "to_frame")
    if refused or hasattr(type(X), "collect"):
        raise ArgumentTypeError(
            f"X: expected a data frame, an array (n, columns) or rows as mappings, got {type(X).__name__}; give a "
            "single row as [{'column': value}], X.collect() of a lazy frame, and read a file first: "
            "pandas.read_csv(path)"
        )
    if isinstance(X, list | tuple) and X and all(isinstance(row, Mapping) for row in X):
        entries = list(dict.fromkeys(name for row in X for name in row))
        others = [name for name in entries if not isinstance(name, str)]
        if others or not entries:
            kind = f"the key {others[0]!r}" if others else "rows without keys"
            raise ArgumentTypeError(f"X: expected rows whose keys are names of columns, got {kind}")
        X = _arrow_table(np.array([[row.get(name) for name in entries] for row in X], object), entries)
    if hasattr(X, "__arrow_c_stream__") or hasattr(X, "to_arrow"):
        # Later columns are taken by name, in any order.
        checked = validate_data(estimator, X, skip_check_array=True) if reset else X
        return Frame("X", as_frame(checked).table)
    if isinstance(X, list | tuple) and np.asarray(X).dtype.kind in "US":
        # Lists of numbers and words would become words alone.
        X = np.array(X, object)
    array = validate_data(estimator, _unmasked(X), dtype=None, ensure_all_finite=False, reset=reset)
    names = getattr(estimator, "feature_names_in_", None)
    names = [f"x{index}" for index in range(array.shape[1])] if names is None else list(names)
    return Frame("X", _arrow_table(array, names))


def _arrow_table(array: Array, names: list[str]) -> Any:
    """Return the columns of an array (n, columns) as an Arrow table.

    A column of numbers and words holds words, as of a DataFrame; in an array of text one of numbers alone holds these.
    """
    pyarrow = arrow()
    from fusemlp.datasets.columns import numbers_of

    columns = []
    for values in map(as_stored, array.T):
        try:
            column = pyarrow.array(values.tolist() if values.dtype.kind in "OU" else values, from_pandas=True)
        except (pyarrow.ArrowException, TypeError):
            # numbers and words
            texts = [None if value is None or value != value else str(value) for value in values]
            column = pyarrow.array(texts, pyarrow.string())
        if values.dtype.kind == "U":
            numbers, wrong = numbers_of(column, ".")
            column = column if len(wrong) else pyarrow.array(numbers)
        columns.append(column)
    return pyarrow.table(columns, names=names)


def _unmasked(values: Any) -> Any:
    """Return values with None, or NaT, in the place of masked ones."""
    if not isinstance(values, np.ma.MaskedArray):
        return values
    # nanoseconds beside None would become integers
    missing: Any = np.datetime64("NaT") if values.dtype.kind == "M" else None
    return np.where(np.ma.getmaskarray(values), missing, values.data)


def with_target(table: Any, y: Any, checked: Callable[[Any], Array], notes: list[str]) -> tuple[Array, Array]:
    """Return the indices of the rows of a table that have a target, and these targets, ``checked``; note the others.

    A missing target is None, NaN, pandas.NA or NaT. Raises ValueError for another number of targets than of rows,
    DataError if all are missing.
    """
    check_consistent_length(table, y)
    y = _unmasked(y)
    # an array of text would spell NaN
    values: Array = np.asarray(y, object if isinstance(y, list | tuple) else None)
    missing: Array = np.isnan(values) if values.dtype.kind == "f" else np.zeros(values.shape, bool)
    if values.dtype.kind == "O":
        flat = [not isinstance(value, str) and str(value) in _GONE for value in values.ravel().tolist()]
        missing = np.array(flat, bool).reshape(values.shape)
    missing = np.asarray(missing.all(axis=tuple(range(1, missing.ndim))))
    kept = np.flatnonzero(~missing)
    if not len(kept):
        raise DataError(f"y: the target is missing in all {len(missing)} rows; give at least one")
    if len(kept) < len(missing):
        notes.append(f"rows without 'y', left out: {len(missing) - len(kept)} of {len(missing)}")
        y = _safe_indexing(y, kept)
    values = np.asarray(y)
    # whole numbers beside which a gap stood are such again
    values = np.asarray(values.tolist()) if values.dtype.kind == "O" else values
    return kept, checked(values if values.dtype.kind in "biu" else y)


def read(
    estimator: Any, X: Any, y: Any, checked: Callable[[Any], Array], sample_weight: Any, like: Preprocessor | None
) -> Dataset:
    """Return the data set of the rows with a target and a weight that is not 0, with their weights.

    ``checked`` returns the targets of rows that have one; ``like`` has a run's columns.
    """
    table, notes = as_table(estimator, X, reset=True).table, list[str]()
    kept, labels = with_target(table, y, checked, notes)
    table, weight = table.take(kept), None
    if sample_weight is not None:
        if estimator.weight is not None:
            raise ArgumentError(f"weight: fit got sample_weight too, beside the column {estimator.weight!r}; give one")
        weight = weights("sample_weight", _check_sample_weight(sample_weight, y))
        weight = weights("sample_weight of rows with a target", weight[kept])
        counted = weight != 0
        table, labels, weight = table.filter(counted), labels[counted], weight[counted]
    target = "y"
    while target in table.column_names:
        target += "_"
    names = estimator.drop, estimator.keep, estimator.categorical
    drop, keep, words = ([part] if isinstance(part, str) else [str(name) for name in part or ()] for part in names)
    asked = {name: getattr(estimator, name) for name in ("group", "time", "weight")}
    columns = ColumnChoices(drop, keep, words, like=like, **asked)
    # the targets have been checked: numbers stand for them
    numbered = Frame("X", table.append_column(target, [np.arange(table.num_rows)]))
    dataset = load_data(numbered, target=target, task="regression", form=form_of(estimator), columns=columns)
    # those of a data frame have names
    name = ",".join(map(str, y.columns)) if hasattr(y, "columns") else str(getattr(y, "name", None) or target)
    name = target if name in table.column_names else name
    task = "multilabel" if estimator.task == "classification" and labels.ndim == 2 else estimator.task
    about: Any = {"task": task, "target_name": name, "notes": (*notes, *dataset.notes)}
    # rows without a weight are left out
    labels = labels[dataset.y]
    return replace(dataset, y=labels, weight=dataset.weight if weight is None else weight, **about)


def with_validation(dataset: Dataset, estimator: Any, X: Any, y: Any, checked: Callable[[Any], Array]) -> Dataset:
    """Return the data set with the rows X to validate on."""
    table, notes = as_table(estimator, X).table, list[str]()
    kept, labels = with_target(table, y, checked, notes)
    width, expected = labels.size // len(labels), dataset.y.size // len(dataset.y)
    if width != expected:
        raise ShapeError(f"y_val: expected {expected} targets, as y has, got {width}; give each row the targets of y")
    labels = labels.reshape(-1, *dataset.y.shape[1:])
    features = load_features(Frame("X", table.take(kept)), dataset, form=form_of(estimator), notes=notes)
    if dataset.task == "classification":
        strange = np.setdiff1d(labels, dataset.classes)
        if len(strange):
            raise DataError(f"y_val: {strange.tolist()[0]!r} is no label of y; leave its rows out")
    return replace(dataset, validation=(features, labels), notes=(*dataset.notes, *notes))
