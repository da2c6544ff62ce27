"""The rows of a user's table: named columns of Arrow, the rows that count, and those that are held out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from sklearn.utils import check_consistent_length
from sklearn.utils.validation import _check_sample_weight, validate_data

from fusemlp.datasets.dataset import Dataset
from fusemlp.datasets.load import load_data
from fusemlp.datasets.parts import Fold, folds, hold_out
from fusemlp.datasets.sources import Frame, as_frame
from fusemlp.describe.checks import as_number
from fusemlp.inputs.arrays import Array
from fusemlp.sklearn import table_settings as settings
from fusemlp.sklearn.table_settings import TableParameters
from fusemlp_kernels.errors import DataError


def as_table(estimator: TableParameters, X: Any, *, reset: bool = False) -> Frame:
    """Return X as a table with names; scikit-learn's errors for other things."""
    if hasattr(X, "__arrow_c_stream__") or hasattr(X, "to_arrow"):
        # Later columns are taken by name, in any order.
        checked = validate_data(estimator, X, skip_check_array=True) if reset else X
        return Frame("X", as_frame(checked).table)
    if isinstance(X, list | tuple) and np.asarray(X).dtype.kind in "US":
        # Lists of numbers and words would become words alone.
        X = np.array(X, object)
    array = validate_data(estimator, X, dtype=None, ensure_all_finite="allow-nan", reset=reset)
    names = getattr(estimator, "feature_names_in_", None)
    names = [f"x{index}" for index in range(array.shape[1])] if names is None else list(names)
    return Frame("X", _arrow_table(array, names))


def _arrow_table(array: Array, names: list[str]) -> Any:
    """Return the columns of an array (n, columns) as an Arrow table.

    A column of numbers and words holds words, as of a DataFrame; in an array of text one of numbers alone holds these.
    """
    import pyarrow

    from fusemlp.datasets.columns import numbers_of

    columns = []
    for values in array.T:
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


def read(estimator: TableParameters, X: Any, labels: Array, sample_weight: Any) -> tuple[Dataset, Array | None]:
    """Return the data set of all rows with a weight that is not 0, and their weights."""
    frame = as_table(estimator, X, reset=True)
    check_consistent_length(frame.table, labels)
    table, weight = frame.table, None
    if sample_weight is not None:
        weight = _check_sample_weight(sample_weight, labels)
        counted = weight != 0
        if not counted.any():
            raise DataError("sample_weight: expected at least one non-zero number, got zeros alone")
        table, labels, weight = table.filter(counted), labels[counted], weight[counted]
    target = "y"
    while target in table.column_names:
        target += "_"
    # The targets have been checked; the numbers of the rows stand for them while the table is read.
    whole = Frame("X", table.append_column(target, [np.arange(len(labels))]))
    dataset = load_data(whole, target=target, task="regression", columns=settings.columns(estimator))
    return replace(dataset, y=labels, task=estimator.task), weight


def held_out(
    estimator: TableParameters, dataset: Dataset, models: int, seed: int, notes: list[str]
) -> tuple[Array, Array, Sequence[Fold]]:
    """Return the training rows, those that early stopping watches and, in place of these, a fold for each of several
    models; 0 ``models`` watch none."""
    rows = np.arange(len(dataset.y))
    if not models:
        return rows, rows[:0], ()
    if models > 1 and estimator.validation_fraction and estimator.group is None and estimator.time is None:
        parts = folds(dataset.y, models, seed=seed, stratify=estimator.task == "classification")
        return rows, rows[:0], parts
    share = as_number("validation_fraction", estimator.validation_fraction, low=0.0, high=1.0, high_open=True)
    if share:
        try:
            return *hold_out(dataset, rows, fraction=share, seed=seed), ()
        except DataError as error:
            notes.append(f"no rows held out for early stopping: {str(error).removeprefix('fraction: ')}")
    return rows, rows[:0], ()
