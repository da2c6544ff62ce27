"""Load data sets by name or path, as arrays of features and labels.

A categorical column of a table becomes indices into its sorted categories, a missing cell of numbers NaN;
``preprocessing.Preprocessor`` turns them into the network's inputs.
"""

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fusemlp.datasets import cells, tables
from fusemlp.datasets.arrays import features_of_npz, from_path, named
from fusemlp.datasets.cells import Categories, Features, different, kept_features, parts_of, sources_of, spellings
from fusemlp.datasets.dataset import ColumnChoices as ColumnChoices
from fusemlp.datasets.dataset import Dataset as Dataset
from fusemlp.datasets.dataset import check_labels, missing_share, roles, targets_in, times, weights, without_useless
from fusemlp.datasets.preprocessing import Preprocessor
from fusemlp.datasets.tables import Frame, Place
from fusemlp.datasets.textfiles import MISSING, Form
from fusemlp.describe.checks import counted, listed, meant, some
from fusemlp.inputs.arrays import Array
from fusemlp_kernels.errors import ArgumentError, DataError, unknown_name

TASKS = ("classification", "regression", "multilabel")
NAMES = ("digits", *tables.SHIPPED, "breast_cancer", "wine", "diabetes", "iris", "mnist5k")
# Whole-number targets with more distinct values than this count as measurements.
MOST_CLASSES = 64
# Words of a last row that is no row.
_SUMS = ("total", "totals", "grand total", "sum", "summe", "gesamt")
# More classes than this are worth a note if they are a guess, and counts if one has this share of the mean class.
MANY_CLASSES, RARE = 10, 1 / 20


def load_data(
    source: Any,
    *,
    target: str | None = None,
    task: str | None = None,
    form: Form | None = None,
    columns: ColumnChoices | None = None,
) -> Dataset:
    """Load a data set by name (``NAMES``) or path, or take a table.

    Paths: ``.npz`` with arrays X and y (or x_train, y_train, x_test, y_test); ``.csv``, ``.tsv`` (plain, or compressed
    as ``.gz``, ``.bz2``, ``.xz`` or ``.zip``), ``.parquet``, ``.feather``, ``.arrow`` or ``.xlsx`` with the name of the
    ``target`` column; a folder of IDX files in MNIST's layout, plain or ``.gz``. A table is a DataFrame of pandas or
    polars, an Arrow table, or anything else that speaks Arrow's C stream interface.

    The beginning of a text table tells its separator, decimal mark and encoding, unless ``form`` sets them. Columns
    that are constant, count the rows, or hold another word in nearly every row are left out; ``columns`` chooses
    otherwise. Missing cells are allowed; rows without a target are left out.

    ``task`` None infers: words and truth values are classes; numbers with decimals are measurements; whole numbers
    are classes if there are at most ``MOST_CLASSES`` distinct ones and at least twice as many rows, unless there are
    more than ``MANY_CLASSES`` and some are rare, as of counts. Small whole numbers such as counts and ages are
    ambiguous: pass ``task="regression"`` for them. Several targets are several labels a row ("multilabel", or
    "classification") if all hold 0 and 1, yes and no or truth values, else a regression.

    Raises ArgumentError for an unknown name, DataError for any problem with the files.
    """
    if task is not None and task not in TASKS:
        raise unknown_name("task", task, TASKS)
    place = existing(source)
    if isinstance(place, Frame) or tables.is_table(place):
        shipped = isinstance(source, str) and source in tables.SHIPPED
        chosen = tables.SHIPPED[source] if shipped and target is None else target
        dataset = _from_table(place, chosen, form or Form(), columns or ColumnChoices(), task)
        return _with_task(replace(dataset, name=source) if shipped else dataset, task)
    if source in NAMES or place.is_dir() or place.suffix.lower() == ".npz":
        options = {"target": target, **(columns or ColumnChoices()).options()}
        option = next((option for option, value in options.items() if value), None)
        if option is not None:
            what = "one" if option == "target" else "columns with names"
            raise ArgumentError(f"{option}: only tables ({', '.join(tables.TABLES)}) have {what}, not {str(source)!r}")
    dataset = _read(source)
    if columns is not None and columns.like is not None:
        _matching(place, dataset.X, columns.like)
    return _with_task(dataset, task)


def load_features(
    source: Any,
    preprocessor: Preprocessor | Dataset,
    *,
    form: Form | None = None,
    notes: list[str] | None = None,
    ids: dict[str, Any] | None = None,
    carried: Sequence[str] | None = (),
    typed: bool = False,
    ignore_unused: bool = False,
) -> Features:
    """Load the features of new data, a source as of ``load_data``, for ``preprocessor.transform_features``.

    An npz file gives its array X. A table gives the columns that the network was trained on, by name, in any order,
    among any others. A missing number and a word that is unseen in training become NaN, and ``notes`` takes a line on
    them, and one on columns that the training did not have unless ``ignore_unused``. ``ids`` takes the columns of the
    table that name the rows, or in their place those that are ``carried``, None for all, as Arrow's columns with the
    cells as they are; with ``typed`` numbers of a text file are numbers. Raises DataError that lists missing columns.
    """
    path = existing(source)
    notes = [] if notes is None else notes
    if isinstance(path, Frame) or tables.is_table(path):
        return _read_like(
            path, preprocessor, form or Form(), notes, ignore_unused, ids=ids, carried=carried, typed=typed
        )[0]
    is_npz = path.suffix.lower() == ".npz"
    return _matching(path, features_of_npz(path) if is_npz else _read(source).X, preprocessor)


def load_labelled(
    source: Any,
    like: Preprocessor | Dataset,
    *,
    form: Form | None = None,
    notes: list[str] | None = None,
    ignore_unused: bool = False,
) -> tuple[Features, Array]:
    """Load features and labels of new data for an evaluation, as ``load_features`` does.

    The columns and categories are those of a run's preprocessor or of an earlier data set. Rows without a label are
    left out, with a line in ``notes``. If the data bring a test set, the test set is returned.
    """
    path = existing(source)
    notes = [] if notes is None else notes
    if isinstance(path, Frame) or tables.is_table(path):
        X, table = _read_like(path, like, form or Form(), notes, ignore_unused, targets=like.targets)
        y = _labels(table, like.targets)
        return X, check_labels(str(path), y) if like.task == "multilabel" else y
    dataset = _read(source)
    X, y = (dataset.X, dataset.y) if dataset.test is None else dataset.test
    return _matching(path, X, like), y


def _read_like(
    path: Place,
    like: Preprocessor | Dataset,
    form: Form,
    notes: list[str],
    ignore_unused: bool,
    *,
    targets: tuple[str, ...] = (),
    ids: dict[str, Any] | None = None,
    carried: Sequence[str] | None = (),
    typed: bool = False,
) -> tuple[Features, dict[str, Array]]:
    """Return the features of a table by the training's columns, and its columns."""
    names, form = like.feature_names, form_like(form, like)
    present, kinds = tables.read_names(path, form), _kinds(like)
    if isinstance(like, Dataset):
        columns = {role.name for role in like.roles}
    else:
        columns = {*kinds, *like.ids, *like.unused, *like.targets}
    strange = [name for name in present if name not in columns]
    if strange and not ignore_unused:
        notes.append(f"columns that the training did not have, ignored: {listed(strange)}")
    gone = [name for name in targets if name not in present]
    if gone:
        raise DataError(
            f"{path}: there is no target column {listed(gone)} to judge rows by; the columns are {listed(present)}"
            f"{meant(gone, present)}; without a target there are fusemlp predict and explain --method integrated"
        )
    named = () if ids is None or carried != () else like.ids
    wanted = [name for name in named if name in present]
    kinds |= dict.fromkeys(wanted, "word")
    words = _label_words(like) if targets else ()
    table = tables.read_table(
        path,
        features=tuple(kinds),
        targets=targets,
        words=bool(words),
        form=form,
        kinds=kinds,
        known_labels=words,
        notes=notes,
        task=None if like.task == "classification" else "regression",
    )
    if ids is not None:
        carries = {} if carried == () else tables.read_cells(path, form, carried, typed=typed)
        ids |= {name: table[name] for name in wanted} | carries
        absent = [name for name in named if name not in wanted]
        if absent:
            notes.append(f"no columns {listed(absent)}, which named the rows in training")
    return coded(table, names, like, notes)[0], table


def form_like(form: Form, like: Preprocessor | Dataset | None) -> Form:
    """Return the form of a table that is read as an earlier one was: its missing words beside those of the form.

    Columns that had no names there mean no header here.
    """
    if like is None:
        return form
    unnamed = like.feature_names and all(re.match(r"column_\d+\b", name) for name in like.feature_names)
    header = False if form.header is None and unnamed else form.header
    missing = (*dict.fromkeys([*like.missing_words, *form.missing]),)
    return replace(form, earlier=dict(like.decimals), header=header, missing=missing)


def infer_task(y: Array) -> str:
    """Return the task that ``load_data`` infers for ``task=None``."""
    if y.ndim == 2:
        return "multilabel" if (np.isin(y, (0, 1)) | np.isnan(y)).all() else "regression"
    if y.dtype.kind not in "iuf":
        return "classification"
    if y.dtype.kind == "f" and (y != np.floor(y)).any():
        return "regression"
    rows = np.unique(y, return_counts=True)[1]
    counts = len(rows) > MANY_CLASSES and rows.min() < RARE * rows.mean()
    classes = len(rows) <= MOST_CLASSES and 2 * len(rows) <= len(y) and not counts
    return "classification" if classes else "regression"


def _with_task(dataset: Dataset, task: str | None) -> Dataset:
    y = dataset.y
    chosen = task or dataset.task or infer_task(y)
    if chosen == "regression" and y.dtype.kind not in "biuf":
        raise DataError(
            f"{dataset.name}: the target {dataset.target_name!r} holds words such as {str(y[0])!r}, which "
            "cannot be the target of a regression; use task='classification'"
        )
    if chosen == "classification" and y.ndim == 2:
        chosen = "multilabel"
    if chosen == "multilabel":
        if y.ndim == 1:
            raise DataError(f"{dataset.name}: multilabel takes several targets; give them, or task 'classification'")
        check_labels(dataset.name, y)
    shapes, of_test = ([array.shape for array in part] for part in ((dataset.X, y), dataset.test or (dataset.X, y)))
    if [shape[1:] for shape in of_test] != [shape[1:] for shape in shapes]:
        raise DataError(
            f"{dataset.name}: the test set has X and y of shapes {of_test[0]}, {of_test[1]}, which do not go with "
            f"{shapes[0]}, {shapes[1]} of the training set"
        )
    if task or dataset.task or chosen == "regression" or y.dtype.kind not in "iuf":
        return replace(dataset, task=chosen)
    count = len(np.unique(y))
    instead = "(--task regression takes them as numbers)"
    guess = f"{dataset.target_name!r}: {count} different whole numbers, taken as classes {instead}"
    note = (guess,) if count > MANY_CLASSES else ()
    return replace(dataset, task=chosen, guess=guess, notes=dataset.notes + note)


def _read(source: str | Path) -> Dataset:
    return named(str(source)) if source in NAMES else from_path(Path(source))


def existing(source: Any, argument: str = "data") -> Place:
    """Return the path of a file or folder that exists, or a table; a name of ``NAMES`` needs none."""
    if not isinstance(source, (str, Path)):
        return tables.as_frame(source)
    if source in tables.SHIPPED:
        return Path(__file__).with_name(f"{source}.csv")
    path = Path(source)
    try:
        known = source in NAMES or path.exists()
    except OSError as error:
        raise DataError(f"{argument}: {str(source)!r} cannot be read ({error})") from error
    if known:
        return path
    folder, tables_there = path.absolute().parent, list[str]()
    with suppress(OSError):
        tables_there = [other.name for other in folder.iterdir() if tables.is_table(other)]
    near = meant([path.name], tables_there)
    if not near and not path.suffix and path.name == str(source):
        raise unknown_name(argument, source, NAMES)
    mend = near or f"; give a path that exists, or one of the names {', '.join(NAMES)}"
    raise DataError(f"{argument}: there is no file or folder {str(source)!r} (looked in {folder}){mend}")


def _from_table(path: Place, target: str | None, form: Form, columns: ColumnChoices, task: str | None) -> Dataset:
    form = form_like(form, columns.like)
    names = tables.read_names(path, form)
    if target is None:
        raise DataError(f"{path}: say which column is the target (--target COLUMN); the columns are {listed(names)}")
    targets = targets_in(target, names)
    columns.check(path, names, targets)
    notes: list[str] = []
    like, time, group, weight = columns.like, columns.time, columns.group, columns.weight
    kinds = dict.fromkeys(columns.categorical, "word") if like is None else _kinds(like)
    wanted = {*kinds}
    kinds |= dict.fromkeys(columns.texts, "word")
    aside, decimals = (*columns.texts, *filter(None, [time, weight])), dict[str, str]()
    table = tables.read_table(
        path,
        features=None if like is None else (*dict.fromkeys([*kinds, *aside]),),
        targets=targets,
        form=form,
        drop={*columns.drop} - {time, weight},
        kinds=kinds,
        known_labels=() if like is None or target != like.target_name else _label_words(like),
        notes=notes,
        weight=weight,
        decimals=decimals,
        task=task,
    )
    if weight is not None:
        counts = weights(f"{path}, {weight!r} of rows with a target", table[weight]) != 0
        if not counts.all():
            # with them a part to validate on might have no weight at all
            notes.append(f"rows without a weight, left out: {len(counts) - np.count_nonzero(counts)} of {len(counts)}")
            table = {name: column[counts] for name, column in table.items()}
    y = _labels(table, targets)
    no_inputs = {*columns.texts, weight, *(columns.drop if like is None else set(table) - wanted)}
    inputs = {name: column for name, column in table.items() if name not in no_inputs}
    if not inputs:
        besides = " and the columns that are no inputs" if no_inputs else ""
        raise DataError(f"{path}: there is no feature column besides the target {listed(targets)}{besides}")
    reasons = {} if like is not None else without_useless(path, inputs, {*columns.keep, *columns.categorical}, notes)
    inputs = {name: column for name, column in inputs.items() if name not in reasons}
    column_roles = roles(names, targets, columns, table, inputs, reasons)
    for name, column in table.items():
        if column.dtype.kind == "O" and column[-1].lower().rstrip(":") in _SUMS:
            notes.append(f"the last row holds {column[-1]!r} in {name!r}: delete it if it is the sum of the others")
    # The columns that are left out take no memory any longer.
    table = {name: table[name] for name in aside}
    dates = tuple((name, kinds[name]) for name in inputs if kinds[name] in cells.ORDERS)
    if dates:
        formats = (f"{name!r} (as {cells.EXAMPLES[order]})" for name, order in dates)
        notes.append(f"dates, taken as {', '.join(cells.PARTS)} where these differ: {', '.join(formats)}")
    kept = kept_features(inputs) if like is None else like.feature_names
    X, categories = coded(inputs, kept, like, notes)
    alone = 0 if group is None else round(missing_share(table[group]) * len(y))
    if alone:
        notes.append(f"{counted(alone, 'row')} without {group!r} count as one group")
    return Dataset(
        path.name,
        X,
        y,
        "",
        kept,
        ",".join(targets),
        categories=categories,
        notes=tuple(notes),
        dates=dates,
        roles=column_roles,
        ids={name: table[name] for name in columns.ids},
        groups=None if group is None else table[group],
        times=None if time is None else times(path, time, table[time]),
        joins_spellings=like is None or like.joins_spellings,
        weight=None if weight is None else table[weight],
        decimals=tuple(decimals.items()) if "," in decimals.values() else (),
        missing_words=(*form.missing,),
    )


def _labels(table: dict[str, Array], targets: tuple[str, ...]) -> Array:
    """Take the targets out of a table: (n,) of one, (n, targets) of several."""
    columns = [table.pop(name) for name in targets]
    return columns[0] if len(columns) == 1 else np.column_stack(columns)


def _kinds(like: Preprocessor | Dataset) -> dict[str, str]:
    """Return the columns of the table that the features come from, and what each holds."""
    dates = dict(like.dates)
    sources = zip(sources_of(like.feature_names, dates), like.categories, strict=True)
    return {source: dates.get(source) or ("number" if words is None else "word") for source, words in sources}


def _label_words(like: Preprocessor | Dataset) -> tuple[str, ...]:
    return tuple(str(label) for label in (() if like.classes is None else like.classes) if isinstance(label, str))


def _matching(path: Path, X: Features, like: Preprocessor | Dataset) -> Features:
    width = len(like.feature_names)
    if X.shape[1] != width:
        names = f"{listed(like.feature_names[:6])}{', ...' if width > 6 else ''}"
        raise DataError(f"{path}: has {X.shape[1]} features a row, and training had {width}; give data with {names}")
    if any(words is not None for words in like.categories):
        raise DataError(f"{path}: the network was trained on words too; give a table ({', '.join(tables.TABLES)})")
    return X


def coded(
    table: dict[str, Array], names: tuple[str, ...], like: Preprocessor | Dataset | None, notes: list[str]
) -> tuple[Features, Categories]:
    """Return the columns as one float64 matrix, words as indices into their categories: those of ``like``, or all."""
    sources = sources_of(names, [name for name, column in table.items() if column.dtype.kind == "M"])
    X = np.empty((len(next(iter(table.values()))), len(names)))
    categories: list[tuple[str, ...] | None] = []
    missing: dict[str, int] = {}
    unseen: list[str] = []
    parts: dict[str, Array] = {}
    for index, (name, source) in enumerate(zip(names, sources, strict=True)):
        if source != name and name not in parts:
            parts = parts_of(source, table[source])
        column = parts[name] if source != name else table[name]
        if column.dtype.kind in "biuf":
            categories.append(None)
            X[:, index] = column
            absent = int(np.isnan(column).sum())
        else:
            entries, rows = different(column)
            known = None if like is None else like.categories[index]
            words = tuple(sorted({"" if word in MISSING else word for word in entries})) if known is None else known
            categories.append(words)
            place: dict[str, float] = {word: code for code, word in enumerate(words)}
            if like is not None and like.joins_spellings:
                place = {word: place[same] for word, same in spellings(entries, words).items()} | place
            # a missing word is the category "" where there is one
            lost = {word: place.get("", math.nan) for word in MISSING}
            X[:, index] = np.array([place.get(word, lost.get(word, math.nan)) for word in entries], float)[rows]
            counts = dict(zip(entries, np.bincount(rows, minlength=len(entries)).tolist(), strict=True))
            absent = sum(counts.get(word, 0) for word in MISSING if not word or word not in place)
            strange = [word for word in entries if word not in place and word not in MISSING]
            if strange:
                unseen.append(f"{sum(map(counts.__getitem__, strange))} in {name!r} (such as {strange[0]!r})")
        if absent:
            missing[source] = absent
    if missing:
        notes.append(f"missing cells, filled in: {some([f'{count} in {name!r}' for name, count in missing.items()])}")
    if unseen:
        notes.append(f"words unseen in training, taken as one other category: {some(unseen)}")
    return X, tuple(categories)
