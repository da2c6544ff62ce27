"""LightGBM at its defaults, as five folds with early stopping: an estimator, and a command that trains it on a file.

Each of five models trains on four fifths of the training rows, at most 2,000 rounds on one thread, and stops after 50
rounds without a better loss of the other fifth. The prediction is their mean, for classes that of the probabilities.
Words are pandas categories, missing cells stay missing. ``python -m bench.boosted``, a child of ``bench.trees``, writes
its predictions in the form of ``fusemlp predict``. It imports nothing of fusemlp, because its imports are measured too.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

ROUNDS, PATIENCE = 2000, 50


def columns_of(frame: Any) -> tuple[list[str], list[str]]:
    """Return the names of the columns of words and of numbers, without texts of another word in nearly every row."""
    from pandas.api.types import is_numeric_dtype

    numbers = [name for name in frame if is_numeric_dtype(frame[name])]
    words = [name for name in frame if name not in numbers and frame[name].nunique() < 0.5 * len(frame)]
    return words, numbers


def categories(frame: Any) -> Any:
    """Return the columns of ``columns_of``, those of words as categories."""
    words, numbers = columns_of(frame)
    return frame[[*words, *numbers]].astype(dict.fromkeys(words, "category"))


@dataclass
class FiveFolds:
    """Five models and the mean of their predictions. ``folds``: for each training row, the model that it validates."""

    folds: Any
    classify: bool
    seed: int = 0
    classes_: Any = ()
    models_: list[Any] = field(default_factory=list)

    def fit(self, X: Any, y: Any) -> FiveFolds:
        """Train on a DataFrame of numbers and categories."""
        from lightgbm import Dataset, early_stopping, train

        target, parameters = np.asarray(y), {"objective": "regression"}
        if self.classify:
            self.classes_, target = np.unique(target, return_inverse=True)
            binary = len(self.classes_) == 2
            parameters = (
                {"objective": "binary"} if binary else {"objective": "multiclass", "num_class": target.max() + 1}
            )
        parameters |= {"num_threads": 1, "seed": self.seed, "verbosity": -1}
        rows, self.models_ = _plain(X), []
        for fold in np.unique(self.folds):
            kept, held = np.flatnonzero(self.folds != fold), np.flatnonzero(self.folds == fold)
            trained = Dataset(rows.iloc[kept], target[kept])
            validated = trained.create_valid(rows.iloc[held], target[held])
            stop = early_stopping(PATIENCE, verbose=False)
            self.models_.append(train(parameters, trained, ROUNDS, valid_sets=[validated], callbacks=[stop]))
        return self

    def mean(self, X: Any) -> Any:
        """Return the mean of the models: numbers of shape (rows,), or probabilities of shape (rows, classes)."""
        rows = _plain(X)
        mean = np.mean([model.predict(rows, num_threads=1) for model in self.models_], axis=0)
        return np.stack([1 - mean, mean], axis=1) if self.classify and mean.ndim == 1 else mean

    def predict(self, X: Any) -> Any:
        """Return numbers, or the classes with the greatest probability."""
        mean = self.mean(X)
        return self.classes_[mean.argmax(axis=1)] if self.classify else mean

    predict_proba = mean


def _plain(X: Any) -> Any:
    """Name the columns by their places, because LightGBM refuses some characters in names."""
    return X.set_axis(range(X.shape[1]), axis=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train on a file, write the predictions of its held-out rows and return the exit code."""
    import pandas

    parser = argparse.ArgumentParser(prog="python -m bench.boosted", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path, metavar="FILE", help="a CSV file")
    parser.add_argument("--target", required=True, metavar="COLUMN")
    parser.add_argument("--classify", action="store_true", help="the target holds classes")
    parser.add_argument("--rows", type=Path, required=True, metavar="NPZ", help="trained, tested and folds, as rows")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the CSV file of predictions")
    options = parser.parse_args(arguments)
    frame = pandas.read_csv(options.file)
    X, y = categories(frame.drop(columns=options.target)), frame[options.target]
    rows = np.load(options.rows)
    model = FiveFolds(rows["folds"], options.classify, options.seed)
    model.fit(X.iloc[rows["trained"]], y.iloc[rows["trained"]].astype(str if options.classify else float))
    predicted = model.mean(X.iloc[rows["tested"]])
    answers = {"prediction": model.classes_[predicted.argmax(axis=1)] if options.classify else predicted}
    for place, name in enumerate(model.classes_):
        answers[f"probability_{name}"] = predicted[:, place]
    pandas.DataFrame(answers).to_csv(options.out, index=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
