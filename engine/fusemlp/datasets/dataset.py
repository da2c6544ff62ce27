"""A data set as it is in its source: features, labels, and notes on the columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fusemlp.datasets.coding import Categories, Features
from fusemlp.datasets.roles import Role
from fusemlp.inputs.arrays import Array


@dataclass(frozen=True, eq=False)
class Dataset:
    """Features and labels as they are in the source.

    ``X`` (n, columns) float64, images flattened; ``y`` (n,) labels as they are in the file: int, float, bool or
    str, or (n, k) float64 for a regression with several targets. ``task`` is "classification" or "regression".
    ``class_names`` go with the sorted distinct labels. ``test`` is the test set that came with the data, or X and y of
    a file of its own, as is ``validation``; ``test_source`` says which.
    ``categories`` holds for each column of X the words that its values are indices into, None for numbers. A missing
    number is NaN, a missing word the category "". ``dates`` are the table's columns of dates with the order of year,
    month and day in their text; X has the parts of each, named as in "sold: month". ``notes`` are lines on the
    reading: the form of the file, columns left out, missing cells. ``roles`` tell what each column of a table became.
    ``ids`` are the columns that name the rows, as text; ``groups`` and ``times`` (n,) are those that decide which rows
    are held out. ``guess`` says that whole numbers were taken as classes, if nothing had told so. ``joins_spellings``
    is that of ``Preprocessor``.
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
    test_source: str = "the data's own test set"
    guess: str = ""
    joins_spellings: bool = True

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
